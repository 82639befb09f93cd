//! Node identifiers.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Names one node for as long as it is a member of its cluster. Displayed as a hyphenated UUID.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(Uuid);

impl NodeId {
    /// Makes a node id from its UUID.
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// Draws a new random id.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }

    /// The UUID itself.
    pub const fn as_uuid(&self) -> &Uuid {
        &self.0
    }

    /// True for the all-zero id, which no node has.
    pub const fn is_nil(&self) -> bool {
        self.0.is_nil()
    }

    /// The DNS name under which the node's certificate is issued.
    pub fn dns_name(&self) -> String {
        format!("{DNS_PREFIX}{self}{DNS_SUFFIX}")
    }

    /// The inverse of [`Self::dns_name`]; accepts that exact form only.
    pub fn from_dns_name(name: &str) -> Option<Self> {
        let id: Self = name.strip_prefix(DNS_PREFIX)?.strip_suffix(DNS_SUFFIX)?.parse().ok()?;
        (id.dns_name() == name).then_some(id)
    }
}

const DNS_PREFIX: &str = "node-";
const DNS_SUFFIX: &str = ".hci";

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for NodeId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(text).map(Self)
    }
}

impl From<Uuid> for NodeId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl From<NodeId> for Uuid {
    fn from(node: NodeId) -> Self {
        node.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_name_round_trips_and_rejects_other_spellings() {
        let node = NodeId::random();
        assert_eq!(NodeId::from_dns_name(&node.dns_name()), Some(node));
        for other in [
            node.to_string(),
            format!("node-{node}"),
            format!("node-{}.hci", node.to_string().to_uppercase()),
            format!("node-{}.hci", node.as_uuid().simple()),
            "node-.hci".to_owned(),
        ] {
            assert_eq!(NodeId::from_dns_name(&other), None, "{other}");
        }
    }
}
