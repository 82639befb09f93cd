//! Several nodes on one machine at full speed: each node's data process (`hci data run`) in a network namespace of its own,
//! joined by a bridge. The control plane is played by the test, over the same two sockets as in a real node.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`cluster`] | nodes, their disks and one replicated volume, ready to use |
//! | [`control`] | the control plane: the volume's record, commits with generation checks, leases |
//! | [`fabric`] | namespaces and links, and how to break them |
//! | [`process`] | one data process |
//! | [`load`] | I/O on a thread of its own while the test breaks things |
//! | [`guest_vm`] | QEMU as the front end, with a guest that checks its own data |
//! | [`checker`] | knows which writes were acknowledged and flushed, and what a read may return |
//! | [`scratch`] | everything outside of this process carries its id and is removed, whatever happens |
//!
//! All of it needs root (namespaces, mounts) and iproute2.

pub mod checker;
pub mod cluster;
pub mod control;
pub mod fabric;
pub mod guest_vm;
pub mod load;
pub mod process;
pub mod scratch;
