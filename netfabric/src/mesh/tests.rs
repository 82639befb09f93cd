//! Meshes of several nodes in one process, over real sockets on loopback.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::time::timeout;

use super::*;
use crate::pki::{ClusterCa, NodeKey};
use crate::rpc::{Caller, ErrorCode, MAX_BULK, RpcError};

const ECHO: u16 = 1;
const HANG: u16 = 2;
const PANIC: u16 = 3;
/// Far longer than anything here takes; reached only when a test fails.
const LONG: Duration = Duration::from_secs(20);

/// Echoes, hangs, or panics, and tells the caller who it is.
#[derive(Default)]
struct Echo {
    calls: AtomicUsize,
}

impl Handler for Echo {
    fn handle(&self, from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            let Caller::Node(from) = from else { return Err(RpcError::new(ErrorCode::Internal, "who?")) };
            match request.method {
                ECHO => Ok(Response::new(&from)?.with_bulk(request.bulk)),
                HANG => std::future::pending().await,
                PANIC => panic!("on purpose"),
                other => Err(RpcError::unknown_method(other)),
            }
        })
    }
}

fn identity(ca: &ClusterCa) -> Identity {
    let key = NodeKey::generate().unwrap();
    let cert = ca.issue_node(NodeId::random(), &key.csr("n").unwrap(), &[]).unwrap();
    Identity::new(&key, &cert, ca.cert_pem()).unwrap()
}

fn config(class: Class) -> MeshConfig {
    MeshConfig { link_mtu: Some(1500), ..MeshConfig::new(class, "127.0.0.1:0".parse().unwrap()) }
}

async fn start(identity: &Identity, config: MeshConfig) -> Mesh {
    Mesh::start(identity.clone(), config, Arc::new(Echo::default())).await.unwrap()
}

async fn node(ca: &ClusterCa, class: Class) -> Mesh {
    start(&identity(ca), config(class)).await
}

/// Makes everyone a peer of everyone and waits for the links.
async fn connect(meshes: &[&Mesh]) {
    let all: BTreeMap<NodeId, SocketAddr> = meshes.iter().map(|m| (m.node(), m.local_addr())).collect();
    for mesh in meshes {
        mesh.set_peers(all.clone());
    }
    for mesh in meshes {
        for node in all.keys().filter(|node| **node != mesh.node()) {
            wait_up(mesh, *node).await;
        }
    }
}

async fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let met = timeout(LONG, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    met.await.unwrap_or_else(|_| panic!("waited too long for: {what}"));
}

async fn wait_up(mesh: &Mesh, node: NodeId) {
    wait_until("a link", || matches!(mesh.peer_state(node), PeerState::Up { .. })).await;
}

async fn echo(mesh: &Mesh, to: NodeId, bulk: Bytes) -> Result<Response, CallError> {
    mesh.call(to, Request { method: ECHO, header: Bytes::new(), bulk }, LONG).await
}

#[tokio::test]
async fn every_node_calls_every_other_and_knows_who_calls() {
    let ca = ClusterCa::create("lab").unwrap();
    let (a, b, c) =
        (node(&ca, Class::Control).await, node(&ca, Class::Control).await, node(&ca, Class::Control).await);
    connect(&[&a, &b, &c]).await;
    for (from, to) in [(&a, &b), (&b, &a), (&b, &c), (&c, &a)] {
        let response = echo(from, to.node(), Bytes::new()).await.unwrap();
        assert_eq!(response.decode::<NodeId>().unwrap(), from.node());
    }
    let unknown = a.call(b.node(), Request { method: 99, ..Request::default() }, LONG).await;
    assert!(matches!(unknown, Err(CallError::Remote(RpcError { code: ErrorCode::UnknownMethod, .. }))));
    let nobody = echo(&a, NodeId::random(), Bytes::new()).await;
    assert!(matches!(nobody, Err(CallError::Unreachable(_))));
    let stats = a.stats();
    assert_eq!(stats.peers.len(), 2);
    assert!(
        stats.peers.iter().all(|p| p.rtt.is_some() && p.sent_bytes > 0 && p.received_bytes > 0),
        "{stats:?}"
    );
}

#[tokio::test]
async fn many_calls_share_a_lane_and_each_gets_its_own_answer() {
    let ca = ClusterCa::create("lab").unwrap();
    let (a, b) = (node(&ca, Class::Storage).await, node(&ca, Class::Storage).await);
    connect(&[&a, &b]).await;
    let calls = (0..2000_usize).map(|i| {
        let (a, to) = (a.clone(), b.node());
        async move {
            let bulk = Bytes::from(vec![i as u8; if i % 500 == 0 { 1 << 20 } else { i % 5000 }]);
            let response = echo(&a, to, bulk.clone()).await.unwrap();
            assert!(response.bulk == bulk, "call {i}");
        }
    });
    futures_util::future::join_all(calls).await;
    let unknown = b.call(a.node(), Request { method: 99, ..Request::default() }, LONG).await;
    assert!(matches!(unknown, Err(CallError::Remote(RpcError { code: ErrorCode::UnknownMethod, .. }))));
}

#[tokio::test]
async fn calls_on_a_lane_have_deadlines_and_fail_with_the_link() {
    let ca = ClusterCa::create("lab").unwrap();
    let (a, b) = (node(&ca, Class::Storage).await, node(&ca, Class::Storage).await);
    connect(&[&a, &b]).await;
    let hang = || Request { method: HANG, ..Request::default() };
    let late = a.call(b.node(), hang(), Duration::from_millis(50)).await;
    assert_eq!(late, Err(CallError::Timeout));
    // One that hangs holds up no other.
    let hanging = tokio::spawn({
        let (a, to) = (a.clone(), b.node());
        async move { a.call(to, hang(), LONG).await }
    });
    echo(&a, b.node(), Bytes::from_static(b"x")).await.unwrap();
    let panicked = a.call(b.node(), Request { method: PANIC, ..Request::default() }, LONG).await;
    assert!(
        matches!(panicked, Err(CallError::Remote(RpcError { code: ErrorCode::Internal, .. }))),
        "{panicked:?}"
    );
    b.close().await;
    let broken = timeout(LONG, hanging).await.unwrap().unwrap();
    assert!(matches!(broken, Err(CallError::Reset(_) | CallError::Remote(_))), "{broken:?}");
}

#[tokio::test]
async fn a_node_of_another_ca_is_refused_by_both_sides() {
    let (ca, foreign) = (ClusterCa::create("lab").unwrap(), ClusterCa::create("lab").unwrap());
    let (ours, theirs) = (node(&ca, Class::Control).await, node(&foreign, Class::Control).await);
    ours.set_peers(BTreeMap::from([(theirs.node(), theirs.local_addr())]));
    let failed =
        |mesh: &Mesh, node| matches!(mesh.peer_state(node), PeerState::Connecting { attempts: 2.., .. });
    wait_until("refusal by the dialler", || failed(&ours, theirs.node())).await;
    ours.set_peers(BTreeMap::new());
    theirs.set_peers(BTreeMap::from([(ours.node(), ours.local_addr())]));
    wait_until("refusal by the listener", || failed(&theirs, ours.node())).await;
    assert_eq!(ours.peer_state(theirs.node()), PeerState::Unknown);
}

#[tokio::test]
async fn a_certificate_of_another_node_is_refused() {
    let ca = ClusterCa::create("lab").unwrap();
    let (a, b) = (node(&ca, Class::Control).await, node(&ca, Class::Control).await);
    let expected = NodeId::random();
    a.set_peers(BTreeMap::from([(expected, b.local_addr())]));
    wait_until("refusal", || match a.peer_state(expected) {
        PeerState::Connecting { last_error: Some(error), .. } => error.contains("certificate"),
        _ => false,
    })
    .await;
    assert_eq!(b.peer_state(a.node()), PeerState::Unknown);
}

#[tokio::test]
async fn strangers_are_let_in_by_admission_only() {
    let ca = ClusterCa::create("lab").unwrap();
    let (open, dialler) = (node(&ca, Class::Control).await, node(&ca, Class::Control).await);
    dialler.set_peers(BTreeMap::from([(open.node(), open.local_addr())]));
    wait_up(&dialler, open.node()).await;
    // The one that was dialled can call back.
    wait_up(&open, dialler.node()).await;
    echo(&open, dialler.node(), Bytes::new()).await.unwrap();

    let (strict, dialler) = (node(&ca, Class::Storage).await, node(&ca, Class::Storage).await);
    dialler.set_peers(BTreeMap::from([(strict.node(), strict.local_addr())]));
    wait_until("refusal", || {
        matches!(dialler.peer_state(strict.node()), PeerState::Connecting { attempts: 2.., .. })
    })
    .await;
    assert!(strict.stats().refused_connections >= 2);
    strict.set_peers(BTreeMap::from([(dialler.node(), dialler.local_addr())]));
    wait_up(&dialler, strict.node()).await;
    // No longer a peer: the link ends and does not come back.
    strict.set_peers(BTreeMap::new());
    wait_until("the end of the link", || !matches!(dialler.peer_state(strict.node()), PeerState::Up { .. }))
        .await;
}

#[tokio::test]
async fn a_restarted_peer_is_noticed_and_reached_again() {
    let ca = ClusterCa::create("lab").unwrap();
    let (a, identity_b) = (node(&ca, Class::Control).await, identity(&ca));
    let b = start(&identity_b, config(Class::Control)).await;
    connect(&[&a, &b]).await;
    let mut events = a.subscribe();
    let address = b.local_addr();
    b.close().await;
    drop(b);
    let down = timeout(LONG, events.recv()).await.unwrap().unwrap();
    assert_eq!(down, PeerEvent::Down { node: identity_b.node(), reason: DownReason::Closed });
    let gone = echo(&a, identity_b.node(), Bytes::new()).await;
    assert!(matches!(gone, Err(CallError::Unreachable(_))));

    // The socket is released by quinn's driver a moment after the last handle is gone.
    wait_until("the port", || std::net::UdpSocket::bind(address).is_ok()).await;
    let b = start(&identity_b, MeshConfig { listen: address, ..config(Class::Control) }).await;
    let up = timeout(LONG, events.recv()).await.unwrap().unwrap();
    assert_eq!(up, PeerEvent::Up { node: b.node() });
    echo(&a, b.node(), Bytes::new()).await.unwrap();
}

/// The predecessor is not closed but forgotten, as kill -9 would do: its connections stay open at the other side.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_and_restarted_peer_supersedes_its_predecessor() {
    let ca = ClusterCa::create("lab").unwrap();
    let (identity_a, identity_b) = (identity(&ca), identity(&ca));
    let a = start(&identity_a, config(Class::Control)).await;
    let b = start(&identity_b, config(Class::Control)).await;
    connect(&[&a, &b]).await;
    let mut events = a.subscribe();
    let waiting = {
        let (a, b) = (a.clone(), b.node());
        tokio::spawn(async move { a.call(b, Request { method: HANG, ..Request::default() }, LONG).await })
    };
    // Another process with the same identity; a learns of it when it dials.
    let successor = start(&identity_b, config(Class::Control)).await;
    successor.set_peers(BTreeMap::from([(a.node(), a.local_addr())]));
    wait_up(&successor, a.node()).await;
    assert!(matches!(waiting.await.unwrap(), Err(CallError::Reset(_))));
    let down = timeout(LONG, events.recv()).await.unwrap().unwrap();
    assert_eq!(down, PeerEvent::Down { node: b.node(), reason: DownReason::Restarted });
    assert_eq!(timeout(LONG, events.recv()).await.unwrap().unwrap(), PeerEvent::Up { node: b.node() });
}

/// The peer's runtime ends as a process that is killed: its socket closes and nobody says goodbye. A link with a call in flight
/// ends by the next packet, one that is idle by the next sign of life.
#[tokio::test]
async fn a_killed_peer_is_noticed_by_its_closed_port() {
    let ca = ClusterCa::create("lab").unwrap();
    let a = node(&ca, Class::Storage).await;
    for waiting in [true, false] {
        let doomed =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let b = identity(&ca);
        let mesh = doomed.spawn({
            let (b, peers) = (b.clone(), BTreeMap::from([(a.node(), a.local_addr())]));
            async move {
                let mesh = start(&b, config(Class::Storage)).await;
                mesh.set_peers(peers);
                mesh
            }
        });
        let mesh = mesh.await.unwrap();
        a.set_peers(BTreeMap::from([(b.node(), mesh.local_addr())]));
        wait_up(&a, b.node()).await;
        let mut events = a.subscribe();
        let call = tokio::spawn({
            let (a, to) = (a.clone(), b.node());
            async move {
                if waiting {
                    a.call(to, Request { method: HANG, ..Request::default() }, LONG).await.map(drop)
                } else {
                    Ok(())
                }
            }
        });
        drop(mesh);
        doomed.shutdown_background();
        let down = timeout(LONG, events.recv()).await.unwrap().unwrap();
        assert_eq!(down, PeerEvent::Down { node: b.node(), reason: DownReason::Refused });
        let called = call.await.unwrap();
        assert!(!waiting || matches!(called, Err(CallError::Reset(_))), "{called:?}");
    }
}

#[tokio::test]
async fn a_refusal_ends_no_link_on_which_the_peer_is_heard() {
    let ca = ClusterCa::create("lab").unwrap();
    let (a, b) = (node(&ca, Class::Storage).await, node(&ca, Class::Storage).await);
    connect(&[&a, &b]).await;
    let mut events = a.subscribe();
    let forged = async {
        for _ in 0..20 {
            a.shared.peers.read()[&b.node()].note_refusal(b.local_addr());
            tokio::time::sleep(config::CONFIRM_REFUSAL / 4).await;
        }
    };
    let calls = async {
        loop {
            echo(&a, b.node(), Bytes::from_static(b"x")).await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        () = forged => {}
        () = calls => {}
    }
    assert!(matches!(a.peer_state(b.node()), PeerState::Up { .. }));
    assert!(events.try_recv().is_err(), "the link was lost");
}

#[tokio::test]
async fn deadlines_and_panics_end_one_call_only() {
    let ca = ClusterCa::create("lab").unwrap();
    let (a, b) = (node(&ca, Class::Control).await, node(&ca, Class::Control).await);
    connect(&[&a, &b]).await;
    let hang = Request { method: HANG, ..Request::default() };
    assert_eq!(a.call(b.node(), hang, Duration::from_millis(50)).await, Err(CallError::Timeout));
    let panicked = a.call(b.node(), Request { method: PANIC, ..Request::default() }, LONG).await;
    assert!(matches!(panicked, Err(CallError::Reset(_))), "{panicked:?}");
    echo(&a, b.node(), Bytes::new()).await.unwrap();
}

#[tokio::test]
async fn garbage_and_giants_end_their_stream_only() {
    let ca = ClusterCa::create("lab").unwrap();
    let (a, b) = (node(&ca, Class::Control).await, node(&ca, Class::Control).await);
    connect(&[&a, &b]).await;
    let udp = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for length in [1, 20, 1200, 1472] {
        let noise: Vec<u8> = (0..length).map(|_| rand::random()).collect();
        udp.send_to(&noise, b.local_addr()).await.unwrap();
    }
    let mut giant = b"hci1\x01\x00\x01\x00".to_vec();
    giant.extend_from_slice(&u32::MAX.to_le_bytes());
    giant.extend_from_slice(&u32::MAX.to_le_bytes());
    let link = a.link(b.node()).unwrap();
    for garbage in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), giant, vec![0; 100_000], b"hci1".to_vec(), Vec::new()]
    {
        let (mut send, mut receive) = link.connection.open_bi().await.unwrap();
        // The peer may stop the stream while we still write.
        let _ = send.write_all(&garbage).await;
        let _ = send.finish();
        let answer = timeout(LONG, receive.read_to_end(1000)).await.unwrap();
        assert!(answer.is_err(), "{answer:?}");
    }
    assert_eq!(b.stats().malformed_requests, 5);
    let over = echo(&a, b.node(), vec![0; MAX_BULK + 1].into()).await;
    assert!(matches!(over, Err(CallError::Invalid(_))));
    // Still the same link.
    echo(&a, b.node(), Bytes::new()).await.unwrap();
    assert_eq!(a.stats().peers[0].links, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_bulk_crosses_whole_and_in_parallel() {
    let ca = ClusterCa::create("lab").unwrap();
    for mtu in [1500, 9000] {
        let at = |mtu| MeshConfig { link_mtu: Some(mtu), ..config(Class::Storage) };
        let (a, b) = (start(&identity(&ca), at(mtu)).await, start(&identity(&ca), at(mtu)).await);
        connect(&[&a, &b]).await;
        let bulk: Bytes = (0..MAX_BULK).map(|i| (i / 7) as u8).collect::<Vec<u8>>().into();
        let calls = (0..4).map(|_| echo(&a, b.node(), bulk.clone()));
        for response in futures_util::future::join_all(calls).await {
            assert_eq!(response.unwrap().bulk, bulk, "MTU {mtu}");
        }
        a.close().await;
        b.close().await;
    }
}

#[tokio::test]
async fn datagrams_fill_the_mtu_and_larger_ones_are_refused() {
    let ca = ClusterCa::create("lab").unwrap();
    for mtu in [1500_u16, 9000] {
        let at = |mtu| MeshConfig { link_mtu: Some(mtu), ..config(Class::Frames) };
        let (a, b) = (start(&identity(&ca), at(mtu)).await, start(&identity(&ca), at(mtu)).await);
        connect(&[&a, &b]).await;
        let mut received = b.datagrams().unwrap();
        assert!(b.datagrams().is_none());
        let max = a.max_datagram(b.node()).unwrap();
        assert!(max > usize::from(mtu) - 100 && max < usize::from(mtu), "{max} of {mtu}");
        let data: Bytes = (0..max).map(|i| i as u8).collect::<Vec<u8>>().into();
        // More than a batch of segmentation offload, to see that jumbo batches are cut.
        for _ in 0..64 {
            a.send_datagram(b.node(), data.clone()).await.unwrap();
        }
        for _ in 0..64 {
            assert_eq!(timeout(LONG, received.recv()).await.unwrap().unwrap(), (a.node(), data.clone()));
        }
        let large = a.send_datagram(b.node(), vec![0; max + 1].into()).await;
        assert_eq!(large, Err(DatagramError::TooLarge));
        assert_eq!(a.try_send_datagram(NodeId::random(), data), Err(DatagramError::Unreachable));
    }
    let (a, b) = (node(&ca, Class::Control).await, node(&ca, Class::Control).await);
    connect(&[&a, &b]).await;
    assert_eq!(a.max_datagram(b.node()), None);
    assert_eq!(a.try_send_datagram(b.node(), Bytes::new()), Err(DatagramError::Disabled));
}

#[tokio::test]
async fn meshes_of_different_classes_do_not_talk() {
    let ca = ClusterCa::create("lab").unwrap();
    let (a, b) = (node(&ca, Class::Control).await, node(&ca, Class::Frames).await);
    a.set_peers(BTreeMap::from([(b.node(), b.local_addr())]));
    wait_until("refusal", || matches!(a.peer_state(b.node()), PeerState::Connecting { attempts: 1.., .. }))
        .await;
}
