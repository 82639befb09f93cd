//! What a joining node and the cluster say to each other, as JSON over HTTPS.

use serde::{Deserialize, Serialize};

use super::token::Secret;
use crate::state::{NodeAddresses, NodeId, TokenId};

/// `POST /v1/join/proof`: shows that the cluster knows the token, before it is told the secret.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProofRequest {
    /// The token.
    pub token: TokenId,
    /// Chosen by the joining node.
    pub nonce: [u8; 32],
}

/// Its answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProofAnswer {
    /// Certificate of the cluster's CA.
    pub ca_pem: String,
    /// See [`super::token::prove`].
    pub proof: [u8; 32],
}

/// `POST /v1/join`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The token.
    pub token: TokenId,
    /// Its secret.
    pub secret: Secret,
    /// Id that the node chose for itself.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Where it will be reached.
    pub addresses: NodeAddresses,
    /// Its signing request.
    pub csr_pem: String,
    /// Its clock, in milliseconds since 1970.
    pub clock: i64,
}

/// Its answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// Name of the cluster.
    pub cluster: String,
    /// The node's certificate.
    pub certificate_pem: String,
    /// Certificate of the cluster's CA.
    pub ca_pem: String,
    /// The members.
    pub members: Vec<JoinMember>,
}

/// A member, as told to a joining node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinMember {
    /// Its id.
    pub node: NodeId,
    /// Where it is reached.
    pub addresses: NodeAddresses,
}
