//! What the move of a running VM needs of its ports: a VMM that is connected in standby and goes on when the VM is there, and a log of
//! what the port writes into guest memory.

// A test may panic.
#![allow(clippy::unwrap_used)]

mod front_end;

use bytes::Bytes;
use front_end::{BUFFERS, FrontEnd, PAGE, WRITE};
use futures_util::future::BoxFuture;
use netfabric::NodeId;
use netfabric::mesh::DatagramError;
use netfabric::overlay::{
    DropReason, ForwardEntry, FrameTransport, MacAddr, NetworkConfig, Overlay, OverlayConfig, OverlayOptions,
    PortConfig, PortId, PortStanding, Vni,
};
use nix::fcntl::SealFlag;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

const SOON: Duration = Duration::from_secs(10);
const RX: usize = 0;
const TX: usize = 1;
const LOG: u64 = 4096;
/// Across the border of two pages.
const RX_BUFFER: u64 = BUFFERS + PAGE - 30;
const TX_BUFFER: u64 = BUFFERS + 8 * PAGE;
const VNET_HEADER: usize = 12;

type Received = mpsc::Receiver<(NodeId, Bytes)>;

/// Other nodes: takes datagrams, sends none.
#[derive(Clone)]
struct Others {
    sent: Arc<Mutex<Vec<NodeId>>>,
    _sender: mpsc::Sender<(NodeId, Bytes)>,
    receiver: Arc<Mutex<Option<Received>>>,
}

impl FrameTransport for Others {
    fn max_datagram(&self, _to: NodeId) -> Option<usize> {
        Some(1400)
    }

    fn try_send(&self, to: NodeId, _datagram: Bytes) -> Result<(), DatagramError> {
        self.sent.lock().push(to);
        Ok(())
    }

    fn send(&self, to: NodeId, datagram: Bytes) -> BoxFuture<'_, Result<(), DatagramError>> {
        Box::pin(async move { self.try_send(to, datagram) })
    }

    fn receiver(&self) -> Option<Received> {
        self.receiver.lock().take()
    }
}

fn mac(last: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, last])
}

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, last)
}

/// A TCP segment in an Ethernet frame, behind a virtio-net header that asks for nothing.
fn frame(from: u8, to: u8) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([mac(to).octets(), mac(from).octets()].concat());
    frame.extend([8, 0, 0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    frame.extend([ip(from).octets(), ip(to).octets()].concat());
    frame.extend([from; 40]);
    frame
}

fn send(guest: &mut FrontEnd, frame: &[u8]) {
    guest.write(TX_BUFFER, frame);
    guest.offer(TX, 0, &[(TX_BUFFER, frame.len() as u32, 0)]);
    assert_eq!(guest.take(TX, SOON), Some((0, 0)), "the port takes the frame");
}

fn received(guest: &mut FrontEnd) -> Vec<u8> {
    let (_, length) = guest.take(RX, SOON).expect("a frame");
    let data = guest.read(RX_BUFFER, length as usize);
    guest.offer(RX, 0, &[(RX_BUFFER, 2048, WRITE)]);
    data[VNET_HEADER..].to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_leaves_standby_with_its_connection_and_logs_what_it_writes() {
    let dir = tempfile::tempdir().unwrap();
    let (sender, receiver) = mpsc::channel(1);
    let others =
        Others { sent: Arc::default(), _sender: sender, receiver: Arc::new(Mutex::new(Some(receiver))) };
    let overlay = Overlay::start(others.clone(), OverlayOptions::default()).unwrap();
    let vni = Vni::try_from(1).unwrap();
    let port = |last, standing| PortConfig {
        id: PortId::random(),
        vni,
        mac: mac(last),
        ip: ip(last),
        hostname: "vm".to_owned(),
        socket: dir.path().join(format!("{last}.sock")),
        standing,
    };
    let away = NodeId::random();
    let mut config = OverlayConfig {
        networks: vec![NetworkConfig {
            vni,
            subnet: "10.1.0.0/24".parse().unwrap(),
            gateway: ip(1),
            mtu: 1500,
            dns: vec![],
            domain: String::new(),
        }],
        ports: vec![port(10, PortStanding::Active), port(11, PortStanding::Standby)],
        forwarding: vec![ForwardEntry { vni, mac: mac(11), ip: ip(11), node: away }],
    };
    overlay.apply(&config).unwrap();
    let mut guests = [10, 11].map(|last| {
        let mut guest = FrontEnd::connect(&dir.path().join(format!("{last}.sock")), 2);
        guest.offer(RX, 0, &[(RX_BUFFER, 2048, WRITE)]);
        guest
    });
    let [stays, comes] = &mut guests;

    // In standby the address is at the other node, and nothing comes from the port.
    send(stays, &frame(10, 11));
    assert_eq!(*others.sent.lock(), [away]);
    send(comes, &frame(11, 10));
    let drops = || overlay.stats().ports[&config.ports[1].id].drops.clone();
    let deadline = Instant::now() + SOON;
    while drops().get(&DropReason::Standby) != Some(&1) {
        assert!(Instant::now() < deadline, "{:?}", drops());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(stays.take(RX, Duration::from_millis(100)), None);
    assert_eq!(comes.take(RX, Duration::from_millis(100)), None);

    // It comes: in both directions, on the same connections.
    config.ports[1].standing = PortStanding::Active;
    config.forwarding.clear();
    overlay.apply(&config).unwrap();
    comes.start_log(LOG, LOG, SealFlag::F_SEAL_SHRINK).unwrap();
    send(comes, &frame(11, 10));
    assert_eq!(received(stays), frame(11, 10)[VNET_HEADER..]);
    send(stays, &frame(10, 11));
    assert_eq!(received(comes), frame(10, 11)[VNET_HEADER..]);
    assert_eq!(others.sent.lock().len(), 1);

    // What it logs: the frame, over both pages, and the used rings.
    std::thread::sleep(Duration::from_millis(20));
    let page = RX_BUFFER / PAGE;
    let written: BTreeSet<u64> = [page, page + 1, comes.used_page(RX), comes.used_page(TX)].into();
    assert_eq!(comes.take_log(), written);
    comes.stop_log();
    send(comes, &frame(11, 10));
    assert!(comes.take_log().is_empty());
    assert!(comes.start_log(LOG, LOG, SealFlag::empty()).is_err(), "a log that may shrink");
}
