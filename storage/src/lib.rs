//! Volumes: block devices for guests, replicated over the disks of several nodes.
//!
//! # What it is
//!
//! One [`Storage`] in the data process of each node. It is told by the control plane, declaratively, which disks the node has and which
//! volumes the node has open ([`StorageConfig`]), and tells it what is observed ([`status::StorageStatus`]).
//!
//! A volume is cut into segments of 1 GiB, each with a set of replicas on disks of distinct nodes. One node at a time has the
//! volume open: its **coordinator** takes every request, writes to all replicas in sync at the same time and reads from the
//! nearest. On every node a **replica server** carries out what coordinators ask, and refuses those whose generation is over.
//!
//! ```text
//!  guest ─ target (vhost-user-blk) ─► coordinator ─┬─► replica server ─► disk store      this node
//!                                       │          └─► transport ─► replica server …     other nodes
//!                                       └─► control plane: changes of the in-sync set (Raft), never on the I/O path
//! ```
//!
//! A segment's content lies in a chain of **layers**: a block is that of the first layer that has it. A snapshot freezes the top and starts another
//! one, a clone is a volume whose chain ends in layers of another, so neither copies anything (`coordinator::layers`, `freeze`, `merge`).
//! A replica is in sync only when it holds every layer of its volume.
//!
//! # Where to start reading
//!
//! | module | it is |
//! |---|---|
//! | [`config`], [`status`], [`ids`] | what goes in, what comes out, the words for it |
//! | `service` | [`Storage`]: converging to the configuration |
//! | `coordinator` | the replication protocol: one volume's I/O, opening, resync |
//! | [`replica`] | the other end: messages, fencing, sessions |
//! | [`store`] | contents of one disk |
//! | `target` | vhost-user-blk for VMs |
//! | `standby` | what is between a target and its volume, so that the volume can move while the target stays |
//! | `scrub` | verification of the disks in the background |
//! | `poll` | busy polling while there is I/O |
//! | [`device`], [`control`], [`transport`] | the boundaries: block device, control plane, network |
//! | `sim` (tests) | all of the above but target and store in a simulated cluster with crashes and partitions |
//!
//! # Threads
//!
//! Coordinators, replica servers and the queues of targets are tasks on the tokio runtime that started [`Storage`]. The data process gives
//! it a runtime of one thread, a **shard**, together with the mesh: a guest's request is taken from its ring, sent to the replicas and
//! answered without a change of threads. While I/O goes on the shard does not sleep (`poll`). A store or a
//! target may have threads of its own, none of which is on the way of a request that needs no waiting. Every task is owned: it
//! ends with its coordinator or its connection.
//!
//! # Invariants
//!
//! | | | kept by |
//! |---|---|---|
//! | S1 | A write acknowledged before an acknowledged flush survives the loss of all but one in-sync replica, and power loss everywhere. | `coordinator::members` |
//! | S2 | A read returns the last completed write; no two coordinators complete I/O at the same time. | generations and sessions in [`replica`], `lease` |
//! | S3 | The in-sync set changes by Raft commit only. | `coordinator::commit` |
//! | S4 | Damaged data never reach a guest; they are repaired from another replica. | `coordinator::io` |
//! | S5 | After a crash replicas are made identical before the first read. | `coordinator::open` |
//! | S6 | Malformed input ends in an error for that request. | `replica::wire`, `replica::server` |

mod boot;
pub mod config;
pub mod control;
mod coordinator;
pub mod device;
pub mod ids;
mod key;
mod lease;
pub mod mesh;
mod metrics;
mod poll;
pub mod replica;
mod scrub;
mod service;
mod signal;
mod standby;
pub mod status;
pub mod store;
pub mod target;
pub mod transport;

#[cfg(test)]
mod sim;

pub use config::{StandbyConfig, StorageConfig, VolumeConfig};
pub use coordinator::Timing;
pub use key::{DISK_KEY_BYTES, DiskKey, KeySalt, Keyring};
pub use mesh::MeshTransport;
pub use metrics::Metrics;
pub use netfabric::NodeId;
pub use poll::BusyPoll;
pub use scrub::ScrubPolicy;
pub use service::{
    RunningTarget, Storage, StorageError, StorageOptions, StoreOpener, TargetStarter, disk_stores,
};
