//! The cluster's own identity, and the tokens that let somebody in.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::state::ids::*;

/// Identity of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its id.
    pub id: ClusterId,
    /// Its name.
    pub name: String,
    /// Certificate of its own authority.
    pub ca_cert_pem: String,
    /// Private key of its authority. It is in the replicated state so that any leader can let a node join; the
    /// files that hold the state are readable by root only.
    pub ca_key_pem: CaKey,
    /// `sha256:…` of the authority's certificate.
    pub ca_fingerprint: String,
    /// When it was created.
    pub created: Timestamp,
}

/// A private key that never appears in logs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CaKey(pub String);

impl std::fmt::Debug for CaKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CaKey(..)")
    }
}

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenKind {
    /// Joining, this many times more.
    Join {
        /// Uses left.
        uses_left: u32,
    },
    /// The API, all of it.
    Admin,
}

/// A secret that lets somebody in; only its hash is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Its id, part of the token string.
    pub id: TokenId,
    /// What it is good for.
    pub kind: TokenKind,
    /// Hash of the secret.
    pub secret: SecretHash,
    /// When it was created.
    pub created: Timestamp,
    /// When it ends.
    pub expires: Option<Timestamp>,
    /// The nodes that joined with it.
    pub used_by: BTreeSet<NodeId>,
}
