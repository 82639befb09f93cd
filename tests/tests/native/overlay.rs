//! Two overlays over a real mesh, with clients that drive the ports' rings as guests would.

// Helpers of tests fail like tests.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hci_tests::netclient::{Frame, NetClient, Options, SUPER_FRAME_BUFFER, features};
use hci_tests::overlay_node::{OverlayNode, identity};
use netfabric::NodeId;
use netfabric::overlay::{
    DropReason, Fencing, ForwardEntry, MacAddr, NetworkConfig, OverlayConfig, PortConfig, PortId,
    PortStanding, Vni,
};
use netfabric::pki::ClusterCa;
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

const SOON: Duration = Duration::from_secs(5);
const NEVER: Duration = Duration::from_millis(200);
const OFFLOADS: [u32; 6] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_EVENT_IDX,
];

fn vni(number: u32) -> Vni {
    Vni::try_from(number).unwrap()
}

fn mac(last: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, last])
}

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, 0, last)
}

/// Two nodes: ports 10 and 11 on the first, 20 on the second, all in one network; 30 on the second in another.
struct Lab {
    folder: tempfile::TempDir,
    nodes: [OverlayNode; 2],
    ids: BTreeMap<u8, PortId>,
}

impl Lab {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = ClusterCa::create("test").unwrap();
        let names = [NodeId::random(), NodeId::random()];
        let nodes = names.map(|name| {
            OverlayNode::start(identity(&ca, name).unwrap(), "127.0.0.1:0".parse().unwrap()).unwrap()
        });
        let addresses = [nodes[0].address().unwrap(), nodes[1].address().unwrap()];
        nodes[0].set_peers([(names[1], addresses[1])].into());
        nodes[1].link([(names[0], addresses[0])].into()).unwrap();
        nodes[0].link([(names[1], addresses[1])].into()).unwrap();

        let ids = [10, 11, 20, 30].map(|last| (last, PortId::random())).into();
        let lab = Self { folder, nodes, ids };
        for node in 0..2 {
            let config = lab.config(node, names);
            lab.nodes[node].overlay.apply(&config).unwrap();
            lab.nodes[node].overlay.apply(&config).unwrap();
        }
        lab
    }

    fn config(&self, node: usize, names: [NodeId; 2]) -> OverlayConfig {
        let network = |number| NetworkConfig {
            vni: vni(number),
            subnet: "10.1.0.0/24".parse().unwrap(),
            gateway: ip(1),
            mtu: 1500,
            dns: vec![],
            domain: String::new(),
        };
        let port = |last, number| PortConfig {
            id: self.ids[&last],
            vni: vni(number),
            mac: mac(last),
            ip: ip(last),
            hostname: format!("vm{last}"),
            socket: self.socket(last),
            standing: PortStanding::Active,
        };
        let entry = |last, number, node: usize| ForwardEntry {
            vni: vni(number),
            mac: mac(last),
            ip: ip(last),
            node: names[node],
        };
        OverlayConfig {
            networks: vec![network(1), network(2)],
            ports: if node == 0 { vec![port(10, 1), port(11, 1)] } else { vec![port(20, 1), port(30, 2)] },
            forwarding: vec![entry(10, 1, 0), entry(11, 1, 0), entry(20, 1, 1), entry(30, 2, 1)],
        }
    }

    fn socket(&self, last: u8) -> PathBuf {
        self.folder.path().join(format!("net/{last}.sock"))
    }

    fn connect(&self, last: u8, wanted: &[u32], rx_buffer: usize) -> NetClient {
        let options = Options { features: features(wanted), queue_size: 256, rx_buffer };
        let client = NetClient::connect(&self.socket(last), options).unwrap();
        let deadline = Instant::now() + SOON;
        while !self.stats(last).connected {
            assert!(Instant::now() < deadline, "port {last} does not come up");
            std::thread::sleep(Duration::from_millis(1));
        }
        client
    }

    fn stats(&self, last: u8) -> netfabric::overlay::PortStats {
        let id = self.ids[&last];
        self.nodes.iter().find_map(|node| node.overlay.stats().ports.remove(&id)).unwrap()
    }

    fn wait_for_drop(&self, last: u8, reason: DropReason) {
        let deadline = Instant::now() + SOON;
        while !self.stats(last).drops.contains_key(&reason) {
            assert!(Instant::now() < deadline, "port {last}: {:?}", self.stats(last));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// An Ethernet frame with a TCP segment in it.
fn tcp(from: u8, to: u8, data: &[u8]) -> Frame {
    let mut packet = vec![0x45, 0];
    packet.extend((40 + data.len() as u16).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    packet.extend(ip(from).octets());
    packet.extend(ip(to).octets());
    let mut frame = [mac(to).octets(), mac(from).octets()].concat();
    frame.extend([8, 0]);
    frame.extend(packet);
    frame.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 5 << 4, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend(data);
    Frame::plain(frame)
}

/// The same as a super-frame that somebody has yet to cut and to checksum.
fn tso(from: u8, to: u8, data: &[u8]) -> Frame {
    let mut frame = tcp(from, to, data);
    // NEEDS_CSUM, TCPV4, header length 54, segment size 1448, checksum from 34 at offset 16.
    frame.header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    frame
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn frames_cross_the_mesh_whole() {
    let lab = Lab::new();
    let mut a = lab.connect(10, &OFFLOADS, 2048);
    let mut b = lab.connect(20, &OFFLOADS, 2048);
    for length in [0, 1, 1000, 1460] {
        let frame = tcp(10, 20, &pattern(length));
        a.send(&frame).unwrap();
        let got = b.receive(SOON).unwrap().unwrap();
        assert_eq!(got.data, frame.data);
    }
    // 60 KiB, both ways: many datagrams, many buffers, one frame.
    for (from, to, sender, receiver) in [(10, 20, 0, 1), (20, 10, 1, 0)] {
        let clients = [&mut a, &mut b];
        let frame = tso(from, to, &pattern(60 << 10));
        clients[sender].send(&frame).unwrap();
        let got = clients[receiver].receive(SOON).unwrap().unwrap();
        assert_eq!(got.header[..10], frame.header[..10]);
        assert!(got.data == frame.data, "the super-frame came damaged");
    }
    let stats = lab.stats(20);
    assert_eq!((stats.rx_frames, stats.tx_frames), (5, 1));
    assert!(stats.drops.is_empty(), "{stats:?}");
}

#[test]
fn many_frames_arrive_in_order_and_complete() {
    let lab = Lab::new();
    let mut a = lab.connect(10, &OFFLOADS, 2048);
    let (mut b_tx, mut b_rx, _b) = lab.connect(20, &OFFLOADS, SUPER_FRAME_BUFFER).split();
    let frames = 2000u32;
    let receiver = std::thread::spawn(move || {
        let mut next = 0;
        while next < frames {
            let got = b_rx.receive(SOON).unwrap().expect("frames are missing");
            let number = u32::from_be_bytes(got.data[54..58].try_into().unwrap());
            assert_eq!(number, next);
            next += 1;
            // Held back by its peer's acknowledgements, as TCP is.
            if next % 32 == 0 {
                b_tx.send(&tcp(20, 10, b"ack")).unwrap();
            }
        }
    });
    for number in 0..frames {
        let mut data = number.to_be_bytes().to_vec();
        data.resize(if number % 3 == 0 { 30_000 } else { 100 }, 1);
        let frame = if number % 3 == 0 { tso(10, 20, &data) } else { tcp(10, 20, &data) };
        a.send(&frame).unwrap();
        if (number + 1) % 32 == 0 {
            a.receive(SOON).unwrap().expect("no acknowledgement");
        }
    }
    receiver.join().unwrap();
}

#[test]
fn ports_of_one_node_meet_without_the_mesh() {
    let lab = Lab::new();
    let mut a = lab.connect(10, &OFFLOADS, 2048);
    let mut b = lab.connect(11, &OFFLOADS, 2048);
    let frame = tso(10, 11, &pattern(40_000));
    a.send(&frame).unwrap();
    assert!(b.receive(SOON).unwrap().unwrap().data == frame.data);
    for node in &lab.nodes {
        assert_eq!(node.overlay.stats().mesh.datagrams, 0);
    }
}

#[test]
fn a_guest_without_offloads_gets_frames_that_are_finished() {
    let lab = Lab::new();
    let mut a = lab.connect(10, &OFFLOADS, 2048);
    let mut b = lab.connect(20, &[], 2048);
    let data = pattern(10_000);
    a.send(&tso(10, 20, &data)).unwrap();
    let mut joined = Vec::new();
    while joined.len() < data.len() {
        let got = b.receive(SOON).unwrap().expect("segments are missing");
        assert_eq!(got.header[..2], [0, 0]);
        assert!(got.data.len() <= 1514);
        let ip_sum: u32 = got.data[14..34].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        assert_eq!((ip_sum & 0xffff) + (ip_sum >> 16), 0xffff);
        joined.extend_from_slice(&got.data[54..]);
    }
    assert!(joined == data);
}

#[test]
fn other_networks_and_forged_addresses_are_out_of_reach() {
    let lab = Lab::new();
    let mut a = lab.connect(10, &OFFLOADS, 2048);
    let mut b = lab.connect(20, &OFFLOADS, 2048);
    let mut stranger = lab.connect(30, &OFFLOADS, 2048);
    a.send(&tcp(10, 30, b"hello")).unwrap();
    lab.wait_for_drop(10, DropReason::UnknownDestination);
    a.send(&tcp(11, 20, b"hello")).unwrap();
    lab.wait_for_drop(10, DropReason::SpoofedMac);
    assert_eq!(stranger.receive(NEVER).unwrap(), None);
    assert_eq!(b.receive(Duration::ZERO).unwrap(), None);
}

#[test]
fn nothing_passes_while_fenced() {
    let lab = Lab::new();
    let mut a = lab.connect(10, &OFFLOADS, 2048);
    let mut b = lab.connect(20, &OFFLOADS, 2048);
    lab.nodes[0].overlay.set_fenced(Fencing::Fenced);
    a.send(&tcp(10, 20, b"out")).unwrap();
    lab.wait_for_drop(10, DropReason::Fenced);
    b.send(&tcp(20, 10, b"in")).unwrap();
    assert_eq!(a.receive(NEVER).unwrap(), None);
    assert_eq!(b.receive(Duration::ZERO).unwrap(), None);
    assert_eq!(lab.nodes[0].overlay.stats().mesh.drops.get(&DropReason::Fenced), Some(&1));
    lab.nodes[0].overlay.set_fenced(Fencing::Open);
    a.send(&tcp(10, 20, b"again")).unwrap();
    assert!(b.receive(SOON).unwrap().is_some());
}

#[test]
fn a_vmm_may_come_back_and_garbage_on_the_socket_is_survived() {
    use std::io::Write;
    let lab = Lab::new();
    let mut b = lab.connect(20, &OFFLOADS, 2048);
    for round in 0..5u8 {
        let mut garbage = std::os::unix::net::UnixStream::connect(lab.socket(10)).unwrap();
        garbage.write_all(&[round.wrapping_mul(37); 100]).unwrap();
        drop(garbage);
        let mut a = lab.connect(10, &OFFLOADS, 2048);
        a.send(&tcp(10, 20, &[round])).unwrap();
        assert_eq!(b.receive(SOON).unwrap().unwrap().data[54], round);
        drop(a);
        let deadline = Instant::now() + SOON;
        while lab.stats(10).connected {
            assert!(Instant::now() < deadline, "the port does not notice that the VMM is gone");
            std::thread::sleep(Duration::from_millis(1));
        }
        b.send(&tcp(20, 10, b"nobody")).unwrap();
    }
    lab.wait_for_drop(10, DropReason::PortDown);
}

#[test]
fn a_guest_that_takes_nothing_loses_frames_and_harms_nobody() {
    let lab = Lab::new();
    let mut a = lab.connect(10, &OFFLOADS, 2048);
    // The client gives buffers back only when it receives.
    let mut slow = lab.connect(11, &OFFLOADS, 2048);
    let mut b = lab.connect(20, &OFFLOADS, 2048);
    for _ in 0..100 {
        a.send(&tso(10, 11, &pattern(60_000))).unwrap();
    }
    lab.wait_for_drop(11, DropReason::RingFull);
    a.send(&tcp(10, 20, b"alive")).unwrap();
    assert!(b.receive(SOON).unwrap().is_some());
    // What waited for buffers comes when there are some again.
    let mut received = 0;
    while slow.receive(NEVER).unwrap().is_some() {
        received += 1;
    }
    assert!(received > 5, "{received}");
    assert_eq!(lab.stats(11).rx_frames, received);
}
