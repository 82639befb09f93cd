//! The network between the nodes of a cluster.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`id`] | [`NodeId`], the name by which nodes know each other |
//! | [`pki`] | the cluster's own certificate authority and each node's identity |
//! | [`rpc`] | one framing for calls, over QUIC streams between nodes and unix sockets inside one |
//! | [`mesh`] | the full mesh of QUIC connections: calls, datagrams, peers that come and go |
//! | [`overlay`] | the switch that carries guests' Ethernet frames over the mesh |
//! | [`dirty_log`] | which pages of guest memory a vhost-user back end writes, while a VM moves (the `storage` crate uses it too) |
//!
//! # How it fits together
//!
//! A node has one [`pki::Identity`]: an Ed25519 key certified by the cluster's CA. For each [`mesh::Class`] of
//! traffic (control, storage, frames) a process starts a [`mesh::Mesh`] with that identity. Each mesh has a UDP
//! port and connections of its own, because a connection is the unit of congestion control and of scheduling: a
//! busy disk must not be able to delay a heartbeat. The control plane tells a mesh declaratively who its peers
//! are; the mesh keeps connections to them up. Nothing here knows the control plane.
//!
//! # Threads
//!
//! The crate starts no threads of its own for the mesh: everything runs as tasks on the runtime that called
//! [`mesh::Mesh::start`], so the caller decides how many threads serve a class. Every task ends when the mesh is closed.
//!
//! # Invariants
//!
//! - Bytes are exchanged only with a peer that holds a certificate of *our* CA, for the node id that was dialled.
//! - What a peer sends (garbage datagrams, malformed or oversized frames) ends that stream or that connection,
//!   never the process, and never holds more memory than the limits in [`rpc`] and the windows in [`mesh`] allow.
//! - Every call has a deadline; every queue is bounded.

pub mod dirty_log;
pub mod id;
pub mod mesh;
pub mod overlay;
pub mod pki;
pub mod rpc;

pub use id::NodeId;
