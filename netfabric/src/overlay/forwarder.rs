//! The forwarding tasks: frames from guests' rings to the switch and on, frames from the mesh to guests' rings.
//!
//! All of them run on one single-threaded runtime, the one that the mesh of class Frames runs on. A kick wakes that
//! thread once; ring, switch, QUIC and socket follow without another wake-up. The same holds the other way.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::frame::packet::ETHERNET_HEADER;
use super::frame::vnet::{Gso, VNET_HEADER, VnetHeader};
use super::id::Vni;
use super::metrics::Metrics;
use super::port::device::{Device, Session};
use super::port::ring::FrameBuffer;
use super::stats::DropReason;
use super::switch::table::{PortIndex, Table};
use super::switch::{Source, Verdict, handle_frame};
use super::tunnel::piece::split;
use super::tunnel::reassembly::{Accepted, Reassembler, Whole};
use super::tunnel::transport::FrameTransport;
use crate::NodeId;
use crate::mesh::DatagramError;

/// Frames taken from one guest before others get their turn.
const BATCH: usize = 64;
/// Datagrams taken from the mesh before guests are interrupted and others get their turn.
const MESH_BATCH: usize = 64;
/// Turns of the runtime without a frame before a guest's ring is left to its kick. Each turn is a microsecond or so in
/// which the guest often has the next frame ready; going to sleep and being woken costs it ten times that.
const IDLE_TURNS: u32 = 16;
/// How long frames for a node wait for room before that node counts as stalled. A few round trips of a healthy link.
const STALL: Duration = Duration::from_millis(10);
/// How often frames that wait for pieces are looked at.
const EXPIRY: Duration = Duration::from_millis(100);

/// Table and ports that belong together.
#[derive(Default)]
pub(crate) struct Snapshot {
    pub(crate) table: Table,
    /// In the table's order.
    pub(crate) ports: Vec<Arc<Device>>,
}

impl Snapshot {
    fn index_of(&self, device: &Device) -> Option<PortIndex> {
        self.ports.iter().position(|port| port.id() == device.id()).map(PortIndex)
    }
}

/// What all forwarding tasks share.
pub(crate) struct Forwarder {
    transport: Arc<dyn FrameTransport>,
    pub(crate) snapshot: ArcSwap<Snapshot>,
    pub(crate) metrics: Metrics,
    pub(crate) fenced: AtomicBool,
    next_frame: AtomicU32,
    /// Nodes whose link took nothing for [`STALL`]: frames for them do not wait, or one dead node would hold up a
    /// guest's frames to all others.
    stalled: Mutex<HashSet<NodeId>>,
    /// Whether there are any, to look at for each datagram.
    any_stalled: AtomicBool,
}

/// Ports whose guests are to be interrupted after the batch.
type Dirty = Vec<PortIndex>;

impl Forwarder {
    pub(crate) fn new(transport: Arc<dyn FrameTransport>, metrics: Metrics) -> Self {
        Self {
            transport,
            snapshot: ArcSwap::default(),
            metrics,
            fenced: AtomicBool::new(false),
            // Not from zero, so that pieces of frames from before a restart do not meet new ones.
            next_frame: AtomicU32::new(rand::random()),
            stalled: Mutex::default(),
            any_stalled: AtomicBool::new(false),
        }
    }

    fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// Serves one port: its guest's frames, and buffers that its guest offers.
    pub(crate) async fn run_port(self: Arc<Self>, device: Arc<Device>) {
        let mut buffer = FrameBuffer::new();
        loop {
            if let Some(session) = device.session()
                && let Err(error) = self.run_session(&device, &session, &mut buffer).await
            {
                tracing::warn!(port = %device.id(), %error, "cannot wait for the guest's kicks");
            }
            device.changed().await;
        }
    }

    /// Serves a VMM until its rings change.
    async fn run_session(
        &self,
        device: &Device,
        session: &Session,
        buffer: &mut FrameBuffer,
    ) -> io::Result<()> {
        let kicks = session.kicks()?;
        let (Some(rx), Some(tx)) = (kicks.rx, kicks.tx) else { return Ok(()) };
        // The kicks are never read: each write to an event is an edge of its own, which is what tokio waits for.
        let rx = watch(rx)?;
        let tx = watch(tx)?;
        device.flush();
        loop {
            self.drain(device, session, buffer).await;
            tokio::select! {
                kick = tx.readable() => kick?.clear_ready(),
                kick = rx.readable() => {
                    kick?.clear_ready();
                    device.flush();
                }
                () = device.changed() => {
                    // Seen by the caller as well, which looks for the new session.
                    device.renotify();
                    return Ok(());
                }
            }
        }
    }

    /// Takes frames until there have been none for a while and the guest will kick for the next.
    async fn drain(&self, device: &Device, session: &Session, buffer: &mut FrameBuffer) {
        session.disarm_tx();
        let mut idle = 0;
        loop {
            if self.forward_batch(device, session, buffer).await > 0 {
                idle = 0;
            } else {
                idle += 1;
            }
            if idle >= IDLE_TURNS {
                if !session.arm_tx() {
                    return;
                }
                session.disarm_tx();
                idle = 0;
            }
            tokio::task::yield_now().await;
        }
    }

    async fn forward_batch(&self, device: &Device, session: &Session, buffer: &mut FrameBuffer) -> usize {
        let snapshot = self.snapshot.load_full();
        let Some(index) = snapshot.index_of(device) else { return 0 };
        let mut dirty = Dirty::new();
        let mut count = 0;
        while count < BATCH {
            let Some(taken) = session.take(buffer) else { break };
            count += 1;
            let outcome = match taken {
                Ok((header, length)) => {
                    device.counters.sent(length);
                    let frame = buffer.frame(length);
                    self.forward(&snapshot, index, &header, frame, &mut dirty).await
                }
                Err(reason) => Err(reason),
            };
            if let Err(reason) = outcome {
                device.counters.dropped(reason);
            }
        }
        if count > 0 {
            session.signal_tx();
        }
        snapshot.signal(&dirty);
        count
    }

    /// Sends one guest's frame where it belongs. Drops at the receiver are counted there.
    async fn forward(
        &self,
        snapshot: &Snapshot,
        from: PortIndex,
        header: &VnetHeader,
        frame: &[u8],
        dirty: &mut Dirty,
    ) -> Result<(), DropReason> {
        if self.is_fenced() {
            return Err(DropReason::Fenced);
        }
        check_size(&snapshot.table, from, header, frame.len())?;
        match handle_frame(&snapshot.table, Source::Port(from), frame) {
            Verdict::Deliver(to) => snapshot.deliver(to, header, &[frame], frame.len(), dirty),
            Verdict::Send(node, vni) => self.send(node, vni, header, frame).await?,
            Verdict::Reply(reply) => {
                let length = reply.len();
                snapshot.deliver(from, &VnetHeader::PLAIN, &[reply], length, dirty);
            }
            Verdict::Consumed => {}
            Verdict::Drop(reason) => return Err(reason),
        }
        Ok(())
    }

    async fn send(
        &self,
        node: NodeId,
        vni: Vni,
        header: &VnetHeader,
        frame: &[u8],
    ) -> Result<(), DropReason> {
        let max = self.transport.max_datagram(node).ok_or(DropReason::NodeUnreachable)?;
        let number = self.next_frame.fetch_add(1, Ordering::Relaxed);
        let pieces = split(&header.encode(), frame, vni, number, max).ok_or(DropReason::NodeUnreachable)?;
        for piece in pieces {
            match self.transport.try_send(node, piece.clone()) {
                Ok(()) => self.unstall(node),
                Err(DatagramError::Full) => self.send_when_there_is_room(node, piece).await?,
                Err(_) => return Err(DropReason::NodeUnreachable),
            }
        }
        Ok(())
    }

    fn unstall(&self, node: NodeId) {
        if self.any_stalled.load(Ordering::Relaxed) {
            let mut stalled = self.stalled.lock();
            stalled.remove(&node);
            self.any_stalled.store(!stalled.is_empty(), Ordering::Relaxed);
        }
    }

    /// Holds the guest back (its ring fills, its TCP notices) instead of dropping, as long as the link moves at all.
    async fn send_when_there_is_room(&self, node: NodeId, piece: Bytes) -> Result<(), DropReason> {
        if self.stalled.lock().contains(&node) {
            // One attempt that does not wait has just failed; the mark is taken away when one succeeds.
            return Err(DropReason::NodeCongested);
        }
        match tokio::time::timeout(STALL, self.transport.send(node, piece)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(DropReason::NodeUnreachable),
            Err(_) => {
                self.stalled.lock().insert(node);
                self.any_stalled.store(true, Ordering::Relaxed);
                tracing::debug!(%node, "link takes no frames");
                Err(DropReason::NodeCongested)
            }
        }
    }

    /// Takes what the mesh receives.
    pub(crate) async fn run_mesh(self: Arc<Self>, mut received: mpsc::Receiver<(NodeId, Bytes)>) {
        let mut reassembler = Reassembler::default();
        let mut batch = Vec::with_capacity(MESH_BATCH);
        loop {
            let receive = received.recv_many(&mut batch, MESH_BATCH);
            let count = if reassembler.is_waiting() {
                match tokio::time::timeout(EXPIRY, receive).await {
                    Ok(count) => count,
                    Err(_) => {
                        reassembler.expire(Instant::now());
                        self.count_given_up(&mut reassembler);
                        continue;
                    }
                }
            } else {
                receive.await
            };
            if count == 0 {
                return;
            }
            let snapshot = self.snapshot.load_full();
            let now = Instant::now();
            let mut dirty = Dirty::new();
            for (node, datagram) in batch.drain(..) {
                self.take_datagram(&snapshot, &mut reassembler, now, node, datagram, &mut dirty);
            }
            snapshot.signal(&dirty);
            self.count_given_up(&mut reassembler);
        }
    }

    fn take_datagram(
        &self,
        snapshot: &Snapshot,
        reassembler: &mut Reassembler,
        now: Instant,
        node: NodeId,
        datagram: Bytes,
        dirty: &mut Dirty,
    ) {
        let counters = &self.metrics.mesh;
        counters.datagrams.inc();
        match reassembler.accept(now, node, datagram) {
            Accepted::Whole(whole) => {
                counters.frames.inc();
                if let Err(reason) = self.deliver_whole(snapshot, node, whole, dirty) {
                    counters.drops.count(reason);
                }
            }
            Accepted::Waiting => {}
            Accepted::Duplicate => counters.duplicates.inc(),
            Accepted::Garbage => counters.garbage.inc(),
        }
    }

    fn deliver_whole(
        &self,
        snapshot: &Snapshot,
        node: NodeId,
        mut whole: Whole,
        dirty: &mut Dirty,
    ) -> Result<(), DropReason> {
        if self.is_fenced() {
            return Err(DropReason::Fenced);
        }
        let first = whole.pieces.first_mut().ok_or(DropReason::Malformed)?;
        let (header, _) = first.split_first_chunk::<VNET_HEADER>().ok_or(DropReason::Malformed)?;
        let length = whole.length - VNET_HEADER;
        let header = VnetHeader::parse(header, length)?;
        first.advance(VNET_HEADER);
        match handle_frame(&snapshot.table, Source::Node(node, whole.vni), first) {
            Verdict::Deliver(to) => {
                snapshot.deliver(to, &header, &whole.pieces, length, dirty);
                Ok(())
            }
            Verdict::Drop(reason) => Err(reason),
            // Nothing that a node sends is answered or sent on.
            Verdict::Send(..) | Verdict::Reply(_) | Verdict::Consumed => Err(DropReason::UnknownDestination),
        }
    }

    fn count_given_up(&self, reassembler: &mut Reassembler) {
        let given_up = reassembler.take_given_up();
        self.metrics.mesh.incomplete.inc_by(given_up.incomplete);
        self.metrics.mesh.evicted.inc_by(given_up.evicted);
    }
}

impl Snapshot {
    fn deliver<B: AsRef<[u8]>>(
        &self,
        to: PortIndex,
        header: &VnetHeader,
        parts: &[B],
        length: usize,
        dirty: &mut Dirty,
    ) {
        let Some(device) = self.ports.get(to.0) else { return };
        if let Err(reason) = device.deliver(header, parts, length) {
            device.counters.dropped(reason);
        }
        if !dirty.contains(&to) {
            dirty.push(to);
        }
    }

    fn signal(&self, dirty: &[PortIndex]) {
        for index in dirty {
            if let Some(device) = self.ports.get(index.0) {
                device.signal();
            }
        }
    }
}

/// Waits for an event's kicks on the current runtime.
fn watch(kick: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is one open descriptor for as long as it lives, and `AsyncFd` keeps it that long.
    unsafe { AsyncFd::register_with_interest(kick, Interest::READABLE) }.map_err(io::Error::from)
}

/// A guest's frame fits its network, or is to be cut into frames that do.
fn check_size(table: &Table, from: PortIndex, header: &VnetHeader, length: usize) -> Result<(), DropReason> {
    let (_, network) = table.port(from).ok_or(DropReason::PortDown)?;
    let mtu = usize::from(network.config.mtu);
    let fits = match header.gso {
        Gso::None => length <= ETHERNET_HEADER + mtu,
        Gso::TcpV4 | Gso::TcpV6 | Gso::Udp => usize::from(header.gso_size) <= mtu,
    };
    if fits { Ok(()) } else { Err(DropReason::TooLarge) }
}
