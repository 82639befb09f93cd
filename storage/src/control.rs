//! What storage asks of the control plane. Every call is a Raft commit, refused when the generation is not current.

use crate::config::VolumeConfig;
use crate::ids::{DiskId, Generation, SegmentIndex, VolumeId};
use futures_util::future::BoxFuture;
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

    /// Replicas are equal and I/O starts now: from here on the volume counts as unclean.
    fn opened(&self, volume: VolumeId, generation: Generation)
    -> BoxFuture<'static, Result<(), CommitError>>;

    /// All I/O is complete and flushed on all replicas in sync: the next opening need not compare them.
    fn closed_clean(
        &self,
        volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'static, Result<(), CommitError>>;
}
