//! What carries datagrams between nodes.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use crate::NodeId;
use crate::mesh::{DatagramError, Mesh};

/// Datagrams to and from other nodes. The real one is the mesh of class Frames; tests bring their own.
pub trait FrameTransport: Send + Sync + 'static {
    /// Largest datagram that the node can be sent now; none while there is no link to it.
    fn max_datagram(&self, to: NodeId) -> Option<usize>;

    /// Sends a datagram if that needs no waiting.
    fn try_send(&self, to: NodeId, datagram: Bytes) -> Result<(), DatagramError>;

    /// Sends a datagram as soon as there is room for it.
    fn send(&self, to: NodeId, datagram: Bytes) -> BoxFuture<'_, Result<(), DatagramError>>;

    /// The received datagrams; none if somebody has taken them already.
    fn receiver(&self) -> Option<mpsc::Receiver<(NodeId, Bytes)>>;
}

impl FrameTransport for Mesh {
    fn max_datagram(&self, to: NodeId) -> Option<usize> {
        Self::max_datagram(self, to)
    }

    fn try_send(&self, to: NodeId, datagram: Bytes) -> Result<(), DatagramError> {
        self.try_send_datagram(to, datagram)
    }

    fn send(&self, to: NodeId, datagram: Bytes) -> BoxFuture<'_, Result<(), DatagramError>> {
        Box::pin(self.send_datagram(to, datagram))
    }

    fn receiver(&self) -> Option<mpsc::Receiver<(NodeId, Bytes)>> {
        self.datagrams()
    }
}
