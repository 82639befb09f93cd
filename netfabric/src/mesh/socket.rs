//! The UDP socket under an endpoint.
//!
//! quinn hands the kernel batches of up to ten packets (segmentation offload). A batch must fit into one UDP
//! datagram's 65507 bytes; with jumbo frames ten packets do not, and the kernel refuses the batch, which quinn drops
//! silently. [`CappedSocket`] therefore announces fewer segments.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};

use super::refusal::Refusals;

/// Largest payload of one UDP send.
const MAX_UDP_SEND: usize = 65507;
/// A burst of a peer at 25 Gbit/s for more than a millisecond, while the receiving task waits for a processor.
const BUFFER_SIZE: usize = 8 << 20;
/// What we insist on, else a warning: the kernel doubles the request and caps it at `net.core.rmem_max`.
const WANTED_BUFFER: usize = 4 << 20;

/// Opens the socket for an endpoint whose packets have up to `payload` bytes.
pub(super) fn bind(address: SocketAddr, payload: u16) -> io::Result<(Arc<dyn AsyncUdpSocket>, Refusals)> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    set_buffers(&socket);
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    let refusals = Refusals::of(&socket)?;
    let inner = TokioRuntime.wrap_udp_socket(socket.into())?;
    let max_segments = (MAX_UDP_SEND / usize::from(payload)).min(inner.max_transmit_segments()).max(1);
    Ok((Arc::new(CappedSocket { inner, max_segments }), refusals))
}

fn set_buffers(socket: &Socket) {
    // Root may exceed the system-wide limit, which is 208 KiB by default; others get what the limit allows.
    if force_buffers(socket).is_err() {
        let _ = socket.set_recv_buffer_size(BUFFER_SIZE);
        let _ = socket.set_send_buffer_size(BUFFER_SIZE);
    }
    let got = socket.recv_buffer_size().unwrap_or(0);
    if got < WANTED_BUFFER {
        tracing::warn!(got, wanted = WANTED_BUFFER, "small UDP receive buffer: raise net.core.rmem_max");
    }
}

fn force_buffers(socket: &Socket) -> nix::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    setsockopt(socket, sockopt::RcvBufForce, &BUFFER_SIZE)?;
    setsockopt(socket, sockopt::SndBufForce, &BUFFER_SIZE)
}

/// A socket that offers the kernel no batch larger than it can send.
#[derive(Debug)]
struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    max_segments: usize,
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        // The kernel may turn offload off at run time, which the inner socket notices.
        self.max_segments.min(self.inner.max_transmit_segments())
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn batches_fit_into_one_send() {
        for payload in [1472_u16, 8972, 9188] {
            let (socket, _) = bind("127.0.0.1:0".parse().unwrap(), payload).unwrap();
            let segments = socket.max_transmit_segments();
            assert!(
                segments >= 1 && segments * usize::from(payload) <= MAX_UDP_SEND,
                "{payload}: {segments}"
            );
        }
    }
}
