//! The HTTP API of a node.
//!
//! | module | it is |
//! |---|---|
//! | [`types`] | the JSON resources, shared with the command line |
//! | [`problem`] | errors, as RFC 9457 problem documents |
//! | [`http`] | HTTP around it: the local socket, HTTPS, who may do what, uploads, channels into guests |
//! | [`certificates`] | what a node shows of itself over HTTPS |
//! | [`display`] | a VM's screen in a browser |
//! | [`service`] | the API without HTTP; what is passed on to the leader |
//! | [`requests`] | from requests to commands |
//! | [`views`] | from state and reports to resources: pure |

pub mod certificates;
pub(crate) mod display;
mod guest;
pub mod http;
mod linger;
pub mod problem;
pub mod requests;
pub mod service;
pub mod types;
pub mod views;
