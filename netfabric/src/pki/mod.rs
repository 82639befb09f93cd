//! Who is who: the cluster's certificate authority and each node's identity.
//!
//! A cluster has a CA of its own ([`ClusterCa`]) and trusts no other. A node makes its Ed25519 key itself
//! ([`NodeKey`]), sends a signing request, and gets a certificate for `node-<uuid>.hci` plus the addresses under
//! which its HTTPS API is reached. Key, certificate and CA certificate together are its [`Identity`].
//!
//! | module | it is |
//! |---|---|
//! | `ca` | creates the CA, issues certificates |
//! | `identity` | keys, signing requests, and the identity on disk |
//! | `tls` | reads the node id out of a verified certificate |
//!
//! Invariants: of a signing request only the public key is believed, names come from the issuer. Private keys are
//! written 0600 and atomically. Certificates do not expire in practice: membership decides who may talk, and a
//! cluster whose clocks went wrong must still be able to form a quorum.

mod ca;
mod identity;
mod tls;

pub use ca::{ClusterCa, Fingerprint};
pub use identity::{Identity, NodeKey};
pub use tls::node_of_certificate;

/// Why a key, certificate or identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file cannot be read or written.
    #[error("{what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Certificate machinery refused.
    #[error("{what}: {reason}")]
    Certificate {
        /// What was tried.
        what: &'static str,
        /// What was wrong.
        reason: String,
    },
    /// The parts of an identity do not belong together.
    #[error("the identity in {path} is damaged: {reason}")]
    Inconsistent {
        /// Its directory.
        path: String,
        /// What does not fit.
        reason: String,
    },
    /// Text that is not a fingerprint.
    #[error("a CA fingerprint is written sha256: and 64 hexadecimal digits")]
    Fingerprint,
}

fn certificate_error(what: &'static str) -> impl Fn(rcgen::Error) -> PkiError {
    move |error| PkiError::Certificate { what, reason: error.to_string() }
}
