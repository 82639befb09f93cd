//! Methods that control processes serve each other on the control mesh: `0x0300` to `0x03ff`.

use serde::{Deserialize, Serialize};

use crate::state::report::NodeReport;

/// A node renews its lease with the leader. Bulk: [`Renew`], because reports may exceed a header.
pub const RENEW: u16 = 0x0300;
/// A request to the API that the leader answers. Bulk: the body.
pub const API: u16 = 0x0301;

/// A renewal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Renew {
    /// What the node sees.
    pub report: NodeReport,
}

/// Its answer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Renewed {
    /// Revision of the leader's state when it renewed.
    pub as_of: u64,
}

/// A forwarded request to the API.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ApiCall {
    /// HTTP method.
    pub method: String,
    /// Path without the query.
    pub path: String,
}

/// Its answer; the body is in the bulk part.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ApiAnswer {
    /// HTTP status.
    pub status: u16,
}
