//! Frames between nodes: each is sent whole, virtio-net header and all, as one or more datagrams of the mesh.
//!
//! | module | it is |
//! |---|---|
//! | [`piece`] | the wire format, and cutting a frame into pieces |
//! | [`reassembly`] | putting pieces together again, within bounds |
//! | [`transport`] | what carries the datagrams: the mesh, or a stand-in in tests |
//!
//! There is no retransmission: a piece that is lost takes its frame along, as on any Ethernet, and the guests' own
//! protocols repair it.

pub(crate) mod piece;
pub(crate) mod reassembly;
pub(crate) mod transport;
