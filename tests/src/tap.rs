//! Plugs a TAP device into a port of the overlay: the kernel's network stack takes the place of a guest, offloads
//! included, so that ordinary tools (ping, iperf3) run over the overlay without a VM.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use crate::netclient::{NetClient, Options, SUPER_FRAME_BUFFER, VNET_HEADER, features};

const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const TUN_F_CSUM: u64 = 0x01;
const TUN_F_TSO4: u64 = 0x02;
const TUN_F_TSO6: u64 = 0x04;
const NAME_MAX: usize = 15;

/// What the kernel does as a guest. Frames lie in one buffer each, so that a read or write of the device is one copy.
const FEATURES: [u32; 8] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_MTU,
    VIRTIO_RING_F_EVENT_IDX,
];

/// The kernel's `struct ifreq`, as far as TUNSETIFF looks at it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_MAX + 1],
    flags: i16,
    rest: [u8; 22],
}

mod ioctls {
    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<i32>()),
        super::InterfaceRequest
    );
    nix::ioctl_write_ptr!(set_vnet_header_size, b'T', 216, i32);
    nix::ioctl_write_int_bad!(set_offload, nix::request_code_write!(b'T', 208, size_of::<u32>()));
}

/// Makes a TAP device in this thread's network namespace; it is gone when the file is closed.
pub fn open(name: &str) -> Result<File> {
    ensure!(!name.is_empty() && name.len() <= NAME_MAX, "{name:?} is no interface name");
    let file =
        OpenOptions::new().read(true).write(true).open("/dev/net/tun").context("cannot open /dev/net/tun")?;
    let mut request = InterfaceRequest {
        name: [0; NAME_MAX + 1],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let size = VNET_HEADER as i32;
    let offload = i32::try_from(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)?;
    // SAFETY: the descriptor is open, and each pointer is to a live value of the type that the request takes.
    unsafe {
        ioctls::set_interface(file.as_raw_fd(), &request).with_context(|| format!("cannot make {name}"))?;
        ioctls::set_vnet_header_size(file.as_raw_fd(), &size).context("cannot set the header's size")?;
        ioctls::set_offload(file.as_raw_fd(), offload).context("cannot set offloads")?;
    }
    Ok(file)
}

/// Moves frames between a TAP device and a port, until one of them fails.
pub fn bridge(tap: &File, socket: &Path) -> Result<()> {
    let options = Options { features: features(&FEATURES), queue_size: 256, rx_buffer: SUPER_FRAME_BUFFER };
    let (mut tx, mut rx, _connection) = NetClient::connect(socket, options)?.split();
    std::thread::scope(|scope| {
        let from_tap =
            std::thread::Builder::new().name("tap-to-port".to_owned()).spawn_scoped(scope, move || {
                loop {
                    tx.send_from(tap)?;
                }
            })?;
        loop {
            rx.receive_into(tap, Duration::from_millis(500))?;
            if from_tap.is_finished() {
                return from_tap.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            }
        }
    })
}
