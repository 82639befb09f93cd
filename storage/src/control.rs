//! What storage asks of the control plane. Every call is a Raft commit, refused when the generation is not current.

use crate::config::VolumeConfig;
use crate::ids::{DiskId, FreezeId, Generation, LayerRef, SegmentIndex, VolumeId};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a commit did not happen.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum CommitError {
    /// The volume was opened with a higher generation (or is gone): this coordinator is over.
    #[error("the generation is not current")]
    Fenced,
    /// The cluster state does not allow it, for example because the in-sync set would fall below its minimum.
    #[error("refused: {0}")]
    Refused(String),
    /// No answer from a majority; whether the change was made is unknown. To be tried again.
    #[error("the control plane is unavailable: {0}")]
    Unavailable(String),
}

/// How far a volume is with a freeze.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FreezeStep {
    /// No write is under way and none begins; all replicas in sync are flushed.
    Held,
    /// Writes go to the new layer; none went to the old one since the volume was held.
    Switched,
    /// It was not held long enough, or not at all: there will be no snapshot.
    Abandoned,
}

/// The control plane, as coordinators see it. Implemented by the data role. All calls are idempotent.
///
/// A coordinator makes one change of a volume's in-sync sets at a time. The implementation must keep that order: a call that
/// ended as [`CommitError::Unavailable`] may have been made, but must not take effect *after* a later call of the same volume and
/// generation has returned (for example by a number with each change that the state machine compares). Otherwise a replica
/// could get back into the in-sync set by a commit that was overtaken by the one that took it out.
pub trait ControlPlane: Send + Sync + 'static {
    /// Takes the disk out of the in-sync sets of all segments of the volume. Returns the volume as it stands then.
    fn replicas_out(
        &self,
        volume: VolumeId,
        generation: Generation,
        disk: DiskId,
        reason: String,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>>;

    /// Puts the disk back into one segment's in-sync set. Returns the volume as it stands then.
    fn replica_in(
        &self,
        volume: VolumeId,
        generation: Generation,
        segment: SegmentIndex,
        disk: DiskId,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>>;

    /// A replica in sync that was to leave ([`crate::config::Tenure`]) leaves its set: the others have everything without it, durably up to a
    /// moment ago. Returns the volume as it stands then; when the control plane has changed its mind, the replica is still in it
    /// and stays.
    fn replica_left(
        &self,
        volume: VolumeId,
        generation: Generation,
        segment: SegmentIndex,
        disk: DiskId,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>>;

    /// Replicas are equal and I/O starts now: from here on the volume counts as unclean.
    fn opened(&self, volume: VolumeId, generation: Generation)
    -> BoxFuture<'static, Result<(), CommitError>>;

    /// All I/O is complete and flushed on all replicas in sync: the next opening need not compare them.
    fn closed_clean(
        &self,
        volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'static, Result<(), CommitError>>;

    /// Says how far a volume is with a freeze. Returns the volume as it stands then; the freeze is no longer part of it when it is
    /// over, with a snapshot or without.
    fn freeze_step(
        &self,
        volume: VolumeId,
        generation: Generation,
        freeze: FreezeId,
        step: FreezeStep,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>>;

    /// All replicas in sync durably have in the layer above it what this layer has: it leaves the chain. Returns the volume as it
    /// stands then.
    fn merged(
        &self,
        volume: VolumeId,
        generation: Generation,
        layer: LayerRef,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>>;
}
