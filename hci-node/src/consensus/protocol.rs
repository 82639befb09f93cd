//! The messages between Raft nodes: methods `0x0100` to `0x01ff` of the control mesh.
//!
//! Messages that may be large travel as bulk data, the others as headers; all are versioned postcard.

use std::net::SocketAddr;
use std::ops::RangeInclusive;

use bytes::Bytes;
use netfabric::NodeId;
use netfabric::rpc::{Request, codec};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::types::{SnapshotMeta, Vote};

/// Methods served here; all others go to the control plane's own handler.
pub(super) const METHODS: RangeInclusive<u16> = 0x0100..=0x01ff;

/// AppendEntries, heartbeats included. Bulk: the request; header of the answer: the response.
pub(super) const APPEND: u16 = 0x0100;
/// RequestVote.
pub(super) const VOTE: u16 = 0x0101;
/// Asks whether a vote would be granted.
pub(super) const PRE_VOTE: u16 = 0x0102;
/// Hands leadership over.
pub(super) const TRANSFER_LEADER: u16 = 0x0103;
/// The leader pushes a piece of a snapshot. Header: [`SnapshotPiece`], bulk: its bytes.
pub(super) const SNAPSHOT_PUSH: u16 = 0x0104;
/// A node whose store was lost pulls a piece of a snapshot. Header: [`SnapshotPull`]; answer: [`SnapshotPart`] and bytes.
pub(super) const SNAPSHOT_PULL: u16 = 0x0105;
/// A proposal on its way to the leader. Bulk: the proposal; bulk of the answer: the reply.
pub(super) const PROPOSE: u16 = 0x0106;
/// Asks the leader up to where one must have applied to read what is committed now. Answer: an index.
pub(super) const READ_INDEX: u16 = 0x0107;
/// A change of membership on its way to the leader. Header: [`MembershipChange`].
pub(super) const CHANGE_MEMBERSHIP: u16 = 0x0108;

/// Largest command. One that does not fit into a message would be accepted and could never be replicated.
pub(super) const MAX_COMMAND: usize = 1 << 20;
/// Bytes of a snapshot in one call.
pub(super) const PIECE: usize = 4 << 20;
/// Largest snapshot that is taken from a peer.
pub(super) const MAX_SNAPSHOT: u64 = 1 << 30;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SnapshotPiece {
    pub(super) vote: Vote,
    pub(super) meta: SnapshotMeta,
    pub(super) total: u64,
    pub(super) offset: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct SnapshotPull {
    /// The snapshot must cover this entry.
    pub(super) covers: u64,
    pub(super) offset: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SnapshotPart {
    pub(super) meta: SnapshotMeta,
    pub(super) total: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum MembershipChange {
    /// Makes a node a learner and waits until it has caught up.
    AddLearner { node: NodeId, control: SocketAddr },
    /// Chooses the voters anew among the members.
    SettleVoters,
    /// Takes a node out.
    Remove { node: NodeId },
}

/// A request whose message travels as bulk data.
pub(super) fn bulk_request<T: Serialize>(method: u16, message: &T) -> Result<Request, codec::EncodeError> {
    Ok(Request { method, header: Bytes::new(), bulk: codec::encode(message)? })
}

/// Reads a message that travelled as bulk data.
pub(super) fn from_bulk<T: DeserializeOwned>(bulk: &[u8]) -> Result<T, codec::DecodeError> {
    codec::decode(bulk)
}
