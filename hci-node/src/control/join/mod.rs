//! Forming a cluster and joining one.
//!
//! | module | it is |
//! |---|---|
//! | [`token`] | token strings and proofs: pure |
//! | [`protocol`] | what the two sides say to each other |
//! | [`admit`] | the cluster's side: checks and certificates |
//! | [`client`] | the joining node's side |
//! | [`firstboot`] | forming a cluster unattended, from the installer's answers |

pub mod admit;
pub mod client;
pub mod firstboot;
pub mod protocol;
pub mod token;
