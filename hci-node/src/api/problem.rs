//! Errors of the API: RFC 9457 problem documents that say what to do next.

use serde::{Deserialize, Serialize};

/// Media type of a problem document.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// A problem document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{detail}")]
pub struct Problem {
    /// Kind of problem, stable: `urn:hci:problem:conflict`.
    #[serde(rename = "type")]
    pub kind: Box<str>,
    /// The kind in words.
    pub title: Box<str>,
    /// HTTP status.
    pub status: u16,
    /// What failed and why.
    pub detail: String,
    /// The next command to type.
    #[serde(default)]
    pub next: String,
    /// Id of the task or event that tells more.
    #[serde(default)]
    pub evidence: Option<String>,
}

/// Kinds of problems, each with its HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemKind {
    /// The request makes no sense.
    Invalid,
    /// Who asks is not known.
    Unauthorized,
    /// Who asks may not.
    Forbidden,
    /// There is no such thing.
    NotFound,
    /// The method does not exist there.
    MethodNotAllowed,
    /// It is taken, in use, or somebody was faster.
    Conflict,
    /// The body is too large.
    TooLarge,
    /// The request is right but a check refuses it.
    Refused,
    /// There is too little of something.
    Capacity,
    /// The cluster has no leader, or the node is in no cluster.
    Unavailable,
    /// It took too long.
    Timeout,
    /// A fault of ours.
    Internal,
}

impl ProblemKind {
    fn parts(self) -> (&'static str, &'static str, u16) {
        match self {
            Self::Invalid => ("invalid", "The request is not valid", 400),
            Self::Unauthorized => ("unauthorized", "Authentication is required", 401),
            Self::Forbidden => ("forbidden", "Not allowed", 403),
            Self::NotFound => ("not-found", "Not found", 404),
            Self::MethodNotAllowed => ("method-not-allowed", "Method not allowed", 405),
            Self::Conflict => ("conflict", "Conflict", 409),
            Self::TooLarge => ("too-large", "Too large", 413),
            Self::Refused => ("refused", "Refused by a safety check", 422),
            Self::Capacity => ("capacity", "Not enough capacity", 507),
            Self::Unavailable => ("unavailable", "Unavailable", 503),
            Self::Timeout => ("timeout", "Timed out", 504),
            Self::Internal => ("internal", "Internal error", 500),
        }
    }
}

impl Problem {
    /// A problem of some kind.
    pub fn new(kind: ProblemKind, detail: impl Into<String>, next: impl Into<String>) -> Self {
        let (name, title, status) = kind.parts();
        Self {
            kind: format!("urn:hci:problem:{name}").into(),
            title: title.into(),
            status,
            detail: detail.into(),
            next: next.into(),
            evidence: None,
        }
    }

    /// Whether it is of that kind.
    pub fn is(&self, kind: ProblemKind) -> bool {
        self.kind.strip_prefix("urn:hci:problem:") == Some(kind.parts().0)
    }
}
