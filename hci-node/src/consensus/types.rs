//! The types with which openraft is instantiated.
//!
//! Commands and replies are opaque bytes to Raft, so that the log, the network and the stores know nothing about the
//! state machine; only [`super::machine`] decodes them.

use std::fmt;
use std::net::SocketAddr;

use bytes::Bytes;
use netfabric::NodeId;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

openraft::declare_raft_types!(
    /// How this crate uses openraft.
    pub(crate) TypeConfig:
        D = Proposal,
        R = Reply,
        NodeId = RaftId,
        Node = RaftNode,
);

pub(crate) type Vote = openraft::alias::VoteOf<TypeConfig>;
pub(crate) type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub(crate) type Entry = openraft::alias::EntryOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
/// A snapshot is held in memory: the cluster's state is small, see [`super::snapshot`].
pub(crate) type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

/// A node, as a member of the Raft group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct RaftId(pub(crate) NodeId);

impl fmt::Display for RaftId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a member is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RaftNode {
    /// UDP address of its control mesh.
    pub(crate) control: SocketAddr,
}

/// Names one proposal through all its retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct RequestId(Uuid);

impl RequestId {
    pub(crate) fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

/// A command on its way into the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Proposal {
    pub(crate) id: RequestId,
    pub(crate) command: Opaque,
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.id.0, self.command.0.len())
    }
}

/// What applying an entry gave; empty for entries that carry no command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reply(pub(crate) Opaque);

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.0.len())
    }
}

/// Encoded bytes, serialized in one piece rather than one by one.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Opaque(pub(crate) Bytes);

impl fmt::Debug for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Opaque {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Opaque {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl serde::de::Visitor<'_> for Visitor {
            type Value = Opaque;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Opaque, E> {
                Ok(Opaque(Bytes::copy_from_slice(bytes)))
            }

            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Opaque, E> {
                Ok(Opaque(bytes.into()))
            }
        }

        deserializer.deserialize_byte_buf(Visitor)
    }
}

/// What openraft's own test suite needs to make up members.
#[cfg(test)]
mod for_the_suite {
    use super::*;

    impl From<u64> for RaftId {
        fn from(number: u64) -> Self {
            Self(NodeId::new(Uuid::from_u128(number.into())))
        }
    }

    impl Default for RaftNode {
        fn default() -> Self {
            Self { control: SocketAddr::from(([127, 0, 0, 1], 1)) }
        }
    }
}
