//! Refusals: what a peer's kernel says when nobody listens on the peer's port any more.
//!
//! UDP knows no reset, so a process that is killed leaves its peers waiting for a timeout. Its kernel, however, answers every
//! packet for the closed port with "port unreachable" (ICMP), within a round trip. Sockets that are not connected are told of it
//! only when they ask to (`IP_RECVERR`): each such answer waits in the socket's error queue, with the address that refused.
//!
//! A process that is stopped or hangs keeps its port: it is silent, never refused. ICMP is not authenticated; therefore a refusal
//! alone ends nothing. It makes [`super::peer`] listen for a moment, and ends a link on which nothing is heard meanwhile.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use socket2::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Room for the error and for what else the endpoint wants to know about packets.
const CONTROL_BYTES: usize = 512;

/// The error queue of an endpoint's socket.
#[derive(Debug)]
pub(super) struct Refusals(AsyncFd<OwnedFd>);

impl Refusals {
    /// Has the socket keep errors.
    pub(super) fn of(socket: &Socket) -> io::Result<Self> {
        setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
        if socket.local_addr()?.is_ipv6() {
            setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
        }
        let queue = OwnedFd::from(socket.try_clone()?);
        // SAFETY: an `OwnedFd` is open, and the same, for as long as it lives, which is in the `AsyncFd`.
        let registered = unsafe { AsyncFd::register_with_interest(queue, Interest::ERROR) };
        Ok(Self(registered.map_err(io::Error::from)?))
    }

    /// Waits for the next refusal: the address to which a packet was sent in vain.
    pub(super) async fn next(&self) -> io::Result<SocketAddr> {
        loop {
            let taken = self.0.async_io(Interest::ERROR, |queue| Ok(take(queue)?)).await?;
            if let Some(address) = taken {
                return Ok(address);
            }
        }
    }
}

/// Takes one error from the queue; none when it is of another kind.
fn take(queue: &OwnedFd) -> nix::Result<Option<SocketAddr>> {
    let mut control = [0; CONTROL_BYTES];
    // The packet that was refused is of no interest.
    let mut packet = [0; 1];
    let mut buffers = [IoSliceMut::new(&mut packet)];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrStorage>(queue.as_raw_fd(), &mut buffers, Some(&mut control), flags)?;
    let refused = message.cmsgs()?.any(|control| {
        let error = match control {
            ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => error,
            _ => return false,
        };
        let from_network = matches!(error.ee_origin, libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6);
        from_network && i32::try_from(error.ee_errno) == Ok(Errno::ECONNREFUSED as i32)
    });
    Ok(message.address.filter(|_| refused).and_then(socket_address))
}

/// IPv4 stays IPv4, also on a socket for both.
fn socket_address(address: SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|a| SocketAddr::from((a.ip(), a.port())));
    let v6 = || address.as_sockaddr_in6().map(|a| SocketAddr::from((a.ip().to_canonical(), a.port())));
    v4.or_else(v6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Type};
    use std::net::UdpSocket;
    use std::time::Duration;

    /// Sends a packet to a port that was closed just now, from a socket on `local`.
    async fn refused(local: &str, remote: &str) -> (SocketAddr, SocketAddr) {
        let local: SocketAddr = local.parse().unwrap();
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM, None).unwrap();
        if local.is_ipv6() {
            socket.set_only_v6(false).unwrap();
        }
        socket.bind(&local.into()).unwrap();
        let refusals = Refusals::of(&socket).unwrap();
        let closed = UdpSocket::bind(remote).unwrap().local_addr().unwrap();
        let target = match (local, closed) {
            (SocketAddr::V6(_), SocketAddr::V4(v4)) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
            _ => closed,
        };
        // One that listens says nothing.
        let open = UdpSocket::bind(local).unwrap();
        socket.send_to(b"x", &open.local_addr().unwrap().into()).unwrap();
        socket.send_to(b"x", &target.into()).unwrap();
        let told = tokio::time::timeout(Duration::from_secs(20), refusals.next()).await;
        (told.unwrap().unwrap(), closed)
    }

    #[tokio::test]
    async fn the_kernel_tells_which_address_refused() {
        for (local, remote) in
            [("127.0.0.1:0", "127.0.0.1:0"), ("[::1]:0", "[::1]:0"), ("[::]:0", "127.0.0.1:0")]
        {
            let (told, closed) = refused(local, remote).await;
            assert_eq!(told, closed, "from {local}");
        }
    }
}
