//! End-to-end and fault tests of the whole product, its demo and its benchmarks: everything as a user would do it,
//! through the executable.
//!
//! | module | it is |
//! |---|---|
//! | [`guest`] | the image that test VMs boot |
//! | [`emulated`] | an emulated machine with KVM, in which guests run under our VMM |
//! | [`initramfs`] | what a machine runs that has nothing but memory |
//! | [`blkclient`] | a vhost-user-blk client without a VM |
//! | [`bench`] | `make bench`: figures of storage and overlay beside what they run on |
//! | [`native`] | nodes as processes in network namespaces, and the control plane that a test plays |
//! | [`demo`] | the run in the lab: from the ISO to a lost server and back |
//! | [`unattended`] | the install in the lab that nobody attends, on servers of three kinds |
//! | [`netclient`] | raw frames at a port of the overlay, without a VM |
//! | [`overlay_node`] | the overlay of one node, without the rest of it |
//! | [`rfbclient`] | a viewer of a VM's display |
//! | [`tap`] | a TAP device as a guest of the overlay |

pub mod bench;
pub mod blkclient;
pub mod demo;
pub mod emulated;
pub mod guest;
pub mod initramfs;
pub mod native;
pub mod netclient;
pub mod overlay_node;
pub mod rfbclient;
pub mod tap;
pub mod unattended;
