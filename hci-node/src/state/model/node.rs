//! Nodes: the members of the cluster.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::state::ids::*;

/// Where a node is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddresses {
    /// Control mesh (UDP).
    pub control: SocketAddr,
    /// Storage mesh (UDP).
    pub storage: SocketAddr,
    /// Frames mesh (UDP).
    pub frames: SocketAddr,
    /// HTTPS API (TCP).
    pub api: SocketAddr,
}

/// Whether the leader has heard from a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Availability {
    /// Its lease is renewed.
    Available,
    /// Its lease ran out at this time; its guests have stopped.
    Lost {
        /// When the leader noticed.
        since: Timestamp,
    },
}

/// Whether a node is meant to carry anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeService {
    /// It is.
    #[default]
    InService,
    /// Its VMs go elsewhere and no new ones come; its disks stay. For maintenance.
    Draining,
    /// Its VMs and its data go elsewhere, then it leaves the cluster.
    Leaving,
}

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its id, which is also in its certificate.
    pub id: NodeId,
    /// Its name, unique.
    pub name: String,
    /// Where it is reached.
    pub addresses: NodeAddresses,
    /// The public key it joined with; a repeated join with the same key gets the same answer.
    pub public_key_pem: String,
    /// The certificate it was given.
    pub certificate_pem: String,
    /// When it joined.
    pub joined: Timestamp,
    /// Whether it is there.
    pub availability: Availability,
    /// The failure domain that it shares with others: copies go to distinct racks when there are enough.
    pub rack: Option<String>,
    /// Whether it is meant to carry anything.
    pub service: NodeService,
}

impl Node {
    /// Whether its lease ran out.
    pub fn is_lost(&self) -> bool {
        matches!(self.availability, Availability::Lost { .. })
    }
}
