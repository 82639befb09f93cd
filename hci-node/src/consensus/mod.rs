//! The replicated state machine: openraft over the control mesh, behind one handle.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`Consensus`] | the handle: start, propose, read, watch, membership |
//! | [`StateMachine`] | what is replicated; the control plane's `ClusterState` implements it |
//! | `machine` | the state machine behind openraft's interface: apply, snapshot, retries applied once |
//! | `snapshot` | the latest snapshot, in the metadata store and in a file |
//! | `log_store` | Raft's log and vote |
//! | `wal` | the write-ahead journal under it |
//! | `network`, `server`, `protocol` | Raft's messages over the mesh, out and in |
//! | `membership` | who votes |
//! | `recovery` | a node whose metadata store was lost gets a snapshot from a peer |
//! | `types` | the types with which openraft is instantiated |
//!
//! openraft is not visible outside this folder.
//!
//! # Threads
//!
//! Raft, its log writer and the control mesh's endpoint have a tokio runtime of their own with two threads, so that
//! nothing else can delay a heartbeat. One more thread writes the journal. Calls that are not Raft's are
//! served on the runtime that called [`Consensus::start`].
//!
//! # Invariants
//!
//! - A proposal that was answered is in the journals of a majority, synced. A vote is synced before it is answered.
//! - The log is purged only behind a snapshot that is durable on this node.
//! - A proposal is applied once, however often it is retried (within the last thousand proposals).
//! - Who proposed sees the effect in [`Consensus::state`] when the answer arrives, if it leads; after
//!   [`Consensus::read_barrier`] everyone sees everything that was answered before.
//!
//! # When files are lost
//!
//! A damaged metadata store is set aside (see [`crate::meta_store`]); the snapshot comes from its second copy beside the
//! log, or from a peer, then the node goes on with its own log and vote. A damaged journal stops the node with an error: without its log and vote it must
//! not take part. It has to be removed from the cluster and joined again.

mod handle;
mod log_store;
mod machine;
mod membership;
mod network;
mod protocol;
mod recovery;
mod server;
mod snapshot;
mod types;
mod wal;

#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use handle::{Consensus, ConsensusError, Leadership, Member, Options, Role, StartError, Status, Timing};
pub use log_store::LogError;
pub use recovery::RecoveryError;
pub use wal::WalError;

/// What is replicated.
///
/// State, commands and outputs are stored with postcard behind a version byte, so their types must not use serde
/// attributes that need a self-describing format (`skip_serializing_if`, `untagged`, `flatten`), and enums grow at
/// the end only.
pub trait StateMachine: Clone + Send + Sync + Serialize + DeserializeOwned + 'static {
    /// What changes the state.
    type Command: Serialize + DeserializeOwned + Send + Sync;
    /// What a command results in; refusals included.
    type Output: Serialize + DeserializeOwned + Send + Sync;

    /// Applies a command. Deterministic: no clock, no randomness, no I/O; must not panic.
    fn apply(&mut self, command: Self::Command) -> Self::Output;
}
