//! What is tested with the executable itself and without the lab: its processes in network namespaces, and its VMM with real guests in emulated machines.
//!
//! One program, as each is linked with everything. `make e2e-native` runs all of them; one alone: `cargo test -p tests --release --test native firmware`.

mod boot_cost;
mod captured_vmm;
mod data_plane;
mod firmware;
mod guest_agent;
mod guest_memory;
mod hotplug;
mod overlay;
mod vhost_user_blk;
