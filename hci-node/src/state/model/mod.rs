//! What the cluster is meant to be: the values that [`super::ClusterState`] is made of.
//!
//! All of them are stored with postcard, which does not describe itself: no `skip`, `flatten`, `untagged`, and
//! new fields or variants only at the end of a type.

mod cloud_init;
mod cluster;
mod device;
mod disk;
mod firmware;
mod image;
mod network;
mod node;
mod segment;
mod task;
mod vm;
mod volume;

pub use cloud_init::*;
pub use cluster::*;
pub use device::*;
pub use disk::*;
pub use firmware::*;
pub use image::*;
pub use network::*;
pub use node::*;
pub use segment::*;
pub use task::*;
pub use vm::*;
pub use volume::*;
