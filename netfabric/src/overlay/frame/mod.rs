//! Frames as bytes: headers, checksums, offloads.
//!
//! | module | it is |
//! |---|---|
//! | [`packet`] | views of the headers that the switch looks at |
//! | [`checksum`] | the Internet checksum |
//! | [`vnet`] | the virtio-net header: what the sender left for someone else to do |
//! | [`offload`] | doing it, for a receiver that cannot take such frames |

pub(crate) mod checksum;
pub(crate) mod offload;
pub(crate) mod packet;
pub(crate) mod vnet;
