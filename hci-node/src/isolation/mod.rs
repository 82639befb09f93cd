//! What a process gives up before it touches what may be hostile.
//!
//! Two roles do: the image worker, which reads images from outside, and the VMM, whose guest may take it over. Each says in one place what it
//! keeps (`images::worker::sandbox`, `vmm_role::jail`); the means are here, each a layer that holds by itself:
//!
//! | module | takes away |
//! |---|---|
//! | [`identity`] | the user, groups, capabilities; new privileges for good |
//! | [`root`] | every file but those that are named; the network; other processes' IPC |
//! | [`files`] | what may be done with files that are still there; abstract sockets, signals to others |
//! | [`cgroup`] | more memory, CPU time and threads than it is worth |
//!
//! System calls are taken away by [`vmm::isolation`], whose filters the image worker uses too.

pub mod cgroup;
pub mod files;
pub mod identity;
pub mod root;
