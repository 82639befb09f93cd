//! Leases: how the leader knows that a node's guests have stopped, without a word from the node.
//!
//! Every node renews its lease once a second. At the node a lease runs [`NODE_LEASE`] from the moment the renewal was
//! *sent*; at the leader [`LEADER_LEASE`] from the moment it *arrived*, which is later. Both count on their own
//! monotonic clock, and the difference is the margin for clocks that drift and for stopping the guests. A leader
//! grants only after a majority has confirmed that it leads, and a new leader waits a full leader's lease before it
//! declares anybody dead: it does not know what its predecessor granted last.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::state::{NodeId, report::NodeReport};

/// How long a lease holds at the node: long enough for a control process that was killed to be back, also on a slow machine.
pub const NODE_LEASE: Duration = Duration::from_secs(8);
/// How long a lease holds at the leader.
pub const LEADER_LEASE: Duration = Duration::from_secs(10);
/// How often a node renews.
pub const RENEW_EVERY: Duration = Duration::from_secs(1);

/// What the leader knows of a node's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseStanding {
    /// It was renewed in time.
    Held,
    /// Nothing was heard, but an earlier leader may have granted one that still holds.
    Unknown,
    /// It has ended: the node's guests have stopped.
    Expired,
}

#[derive(Clone, Debug)]
struct Renewal {
    at: Instant,
    report: NodeReport,
}

/// The leases that a leader granted in one term, and the reports that came with the renewals.
#[derive(Clone, Debug)]
pub struct LeaderLeases {
    term: u64,
    since: Instant,
    renewals: BTreeMap<NodeId, Renewal>,
}

impl LeaderLeases {
    /// A leader's term begins: it knows nothing.
    pub fn new(term: u64, now: Instant) -> Self {
        Self { term, since: now, renewals: BTreeMap::new() }
    }

    /// The term that this is about.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// A node renewed; the leader had its leadership confirmed after the renewal arrived.
    pub fn renewed(&mut self, node: NodeId, report: NodeReport, now: Instant) {
        self.renewals.insert(node, Renewal { at: now, report });
    }

    /// How a node's lease stands.
    pub fn standing(&self, node: NodeId, now: Instant) -> LeaseStanding {
        match self.renewals.get(&node) {
            Some(renewal) if now.saturating_duration_since(renewal.at) < LEADER_LEASE => LeaseStanding::Held,
            Some(_) => LeaseStanding::Expired,
            None if now.saturating_duration_since(self.since) < LEADER_LEASE => LeaseStanding::Unknown,
            None => LeaseStanding::Expired,
        }
    }

    /// What a node reported last, while its lease holds.
    pub fn report(&self, node: NodeId, now: Instant) -> Option<&NodeReport> {
        if self.standing(node, now) != LeaseStanding::Held {
            return None;
        }
        self.renewals.get(&node).map(|renewal| &renewal.report)
    }

    /// All reports of nodes whose lease holds.
    pub fn reports(&self, now: Instant) -> BTreeMap<NodeId, NodeReport> {
        let held = |(node, renewal): (&NodeId, &Renewal)| {
            (now.saturating_duration_since(renewal.at) < LEADER_LEASE)
                .then(|| (*node, renewal.report.clone()))
        };
        self.renewals.iter().filter_map(held).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: u128) -> NodeId {
        NodeId::new(uuid::Uuid::from_u128(n))
    }

    #[test]
    fn the_leader_waits_longer_than_the_node() {
        assert!(LEADER_LEASE >= NODE_LEASE + 2 * RENEW_EVERY);
    }

    #[test]
    fn a_silent_node_is_dead_after_the_leaders_lease() {
        let start = Instant::now();
        let mut leases = LeaderLeases::new(1, start);
        leases.renewed(node(1), NodeReport::default(), start + Duration::from_secs(1));
        let end = start + Duration::from_secs(1) + LEADER_LEASE;
        assert_eq!(leases.standing(node(1), end - Duration::from_secs(1)), LeaseStanding::Held);
        assert_eq!(leases.standing(node(1), end), LeaseStanding::Expired);
    }

    #[test]
    fn a_new_leader_declares_nobody_dead_before_a_full_lease() {
        let start = Instant::now();
        let leases = LeaderLeases::new(2, start);
        assert_eq!(leases.standing(node(1), start + Duration::from_secs(6)), LeaseStanding::Unknown);
        assert_eq!(leases.standing(node(1), start + LEADER_LEASE), LeaseStanding::Expired);
    }
}
