//! The `hci` executable: every role of a node and the admin command line in one file.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`state`] | the cluster's desired state and the commands that change it: pure, replicated by Raft |
//! | [`consensus`] | the replicated state machine: Raft, its log, snapshots and membership |
//! | [`meta_store`] | small durable tables, a careful wrapper around sled |
//! | [`control`] | `hci node run`: joining, leases, the leader's decisions, the start of everything else |
//! | [`api`] | the HTTP API: resources, problems, server |
//! | [`reconcile`] | makes what runs on this node match the state: volumes, ports, VMs, disks |
//! | [`data`] | `hci data run`: storage and overlay of this node in a process of its own |
//! | [`vmm_role`] | `hci vmm run`: the process around one guest |
//! | [`agent`] | the QEMU guest agent in guests: what they say, and how they are asked to do something |
//! | [`cloud_init`] | the disk that tells a guest who it is |
//! | [`images`] | `hci image-worker` and the reader of images that come from outside |
//! | [`isolation`] | what processes give up that touch what may be hostile: VMMs, image workers |
//! | [`paths`] | where a node keeps its files |
//! | [`cli`] | the command line: parses, calls the API of a node, prints |

pub mod agent;
pub mod api;
pub mod cli;
pub mod cloud_init;
pub mod consensus;
pub mod control;
pub mod data;
pub mod exposition;
pub mod files;
pub mod images;
pub mod isolation;
pub mod meta_store;
pub mod paths;
pub mod pinned_tls;
pub mod reconcile;
pub mod state;
pub mod vmm_role;
