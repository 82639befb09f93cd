//! A port as the switch sees it: give it a frame, take a frame from it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::features::Features;
use super::ring::{FrameBuffer, PutError, Ring, Taken};
use super::vring::PortVring;
use crate::overlay::frame::offload::{complete_checksum, segment};
use crate::overlay::frame::vnet::{Gso, VNET_HEADER, VnetHeader};
use crate::overlay::id::{MacAddr, PortId};
use crate::overlay::metrics::PortCounters;
use crate::overlay::stats::DropReason;

/// How much may wait for a guest to offer buffers: a few super-frames, about a millisecond at 10 Gbit/s. More would
/// only add delay; TCP in the sender sees the loss and slows down.
const BACKLOG_BYTES: usize = 1 << 20;
/// As many small frames as a common receive ring has buffers.
const BACKLOG_FRAMES: usize = 512;
const LINK_UP: u16 = 1;

/// The rings of a connected VMM.
pub(crate) struct Session {
    rx: PortVring,
    tx: PortVring,
    features: Features,
    rx_signalled: AtomicU16,
    tx_signalled: AtomicU16,
}

/// The guest's kicks, one for each ring that is there.
pub(crate) struct Kicks {
    pub(crate) rx: Option<OwnedFd>,
    pub(crate) tx: Option<OwnedFd>,
}

impl Session {
    pub(crate) fn new(rx: PortVring, tx: PortVring, features: Features) -> Self {
        let session =
            Self { rx, tx, features, rx_signalled: AtomicU16::new(0), tx_signalled: AtomicU16::new(0) };
        // In case the last process died between publishing and interrupting.
        session.interrupt();
        session
    }

    /// Interrupts the guest for each ring about the last that was published, if it wants that.
    fn interrupt(&self) {
        for (ring, signalled) in [(&self.rx, &self.rx_signalled), (&self.tx, &self.tx_signalled)] {
            if let Some(mut ring) = Ring::lock(ring, self.features) {
                signalled.store(ring.signal(ring.published().wrapping_sub(1)), Ordering::Relaxed);
            }
        }
    }

    /// Handles of their own to the kicks.
    pub(crate) fn kicks(&self) -> io::Result<Kicks> {
        Ok(Kicks { rx: self.rx.clone_kick()?, tx: self.tx.clone_kick()? })
    }

    fn rx(&self) -> Option<Ring<'_>> {
        Ring::lock(&self.rx, self.features)
    }

    fn tx(&self) -> Option<Ring<'_>> {
        Ring::lock(&self.tx, self.features)
    }

    /// Takes the next frame that the guest sends.
    pub(crate) fn take(&self, buffer: &mut FrameBuffer) -> Option<Result<Taken, DropReason>> {
        self.tx()?.take(buffer)
    }

    /// Interrupts the guest about chains that went back, if it wants that.
    pub(crate) fn signal_tx(&self) {
        if let Some(mut ring) = self.tx() {
            let signalled = ring.signal(self.tx_signalled.load(Ordering::Relaxed));
            self.tx_signalled.store(signalled, Ordering::Relaxed);
        }
    }

    /// Asks for a kick at the next frame; true if one is there already.
    pub(crate) fn arm_tx(&self) -> bool {
        self.tx().is_some_and(|mut ring| ring.arm())
    }

    /// Asks for no kicks while frames are being taken anyway.
    pub(crate) fn disarm_tx(&self) {
        if let Some(mut ring) = self.tx() {
            ring.disarm();
        }
    }

    fn signal_rx(&self) {
        if let Some(mut ring) = self.rx() {
            let signalled = ring.signal(self.rx_signalled.load(Ordering::Relaxed));
            self.rx_signalled.store(signalled, Ordering::Relaxed);
        }
    }
}

/// Frames that wait for the guest to offer buffers.
#[derive(Default)]
struct Backlog {
    frames: VecDeque<(VnetHeader, Vec<u8>)>,
    bytes: usize,
}

/// A port.
pub(crate) struct Device {
    id: PortId,
    mac: MacAddr,
    mtu: AtomicU16,
    session: ArcSwapOption<Session>,
    changed: Notify,
    backlog: Mutex<Backlog>,
    pub(crate) counters: PortCounters,
    /// Raised at each attach; for the log.
    attached: AtomicU64,
}

impl Device {
    pub(crate) fn new(id: PortId, mac: MacAddr, mtu: u16, counters: PortCounters) -> Self {
        Self {
            id,
            mac,
            mtu: AtomicU16::new(mtu),
            session: ArcSwapOption::empty(),
            changed: Notify::new(),
            backlog: Mutex::default(),
            counters,
            attached: AtomicU64::new(0),
        }
    }

    pub(crate) fn id(&self) -> PortId {
        self.id
    }

    pub(crate) fn set_mtu(&self, mtu: u16) {
        self.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Virtio's configuration space: hardware address, link status, queue pairs, MTU.
    pub(crate) fn config_space(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.octets());
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.load(Ordering::Relaxed).to_le_bytes());
        config
    }

    /// A ring of a VMM has started.
    pub(crate) fn attach(&self, session: Session) {
        self.session.store(Some(Arc::new(session)));
        let times = self.attached.fetch_add(1, Ordering::Relaxed) + 1;
        tracing::debug!(port = %self.id, times, "rings started");
        self.changed.notify_one();
    }

    /// The VMM is gone, or has reset the device.
    pub(crate) fn detach(&self) {
        if self.session.swap(None).is_some() {
            tracing::debug!(port = %self.id, "rings stopped");
        }
        *self.backlog.lock() = Backlog::default();
        self.changed.notify_one();
    }

    /// Has the rings looked at, and the guest at them: the port was in standby, and a kick or an interrupt may have been lost
    /// between the nodes.
    pub(crate) fn wake(&self) {
        if let Some(session) = self.session() {
            session.interrupt();
        }
        // Whoever waits for the guest's kicks begins anew, which is with a look.
        self.changed.notify_one();
    }

    /// The connected VMM's rings.
    pub(crate) fn session(&self) -> Option<Arc<Session>> {
        self.session.load_full()
    }

    /// Returns when the session has changed since the last call.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Makes the next [`Self::changed`] return at once.
    pub(crate) fn renotify(&self) {
        self.changed.notify_one();
    }

    /// Gives the guest a frame, finished as far as it needs. The guest is not interrupted yet.
    pub(crate) fn deliver<B: AsRef<[u8]>>(
        &self,
        header: &VnetHeader,
        parts: &[B],
        length: usize,
    ) -> Result<(), DropReason> {
        let session = self.session.load();
        let session = session.as_ref().ok_or(DropReason::PortDown)?;
        if session.features.can_receive(header) {
            return self.push(session, header, parts, length);
        }
        let mut frame = flatten(parts, length);
        if header.gso == Gso::None {
            complete_checksum(&mut frame, header)?;
            return self.push(session, &VnetHeader::PLAIN, &[frame], length);
        }
        for part in segment(&frame, header)? {
            let length = part.len();
            self.push(session, &VnetHeader::PLAIN, &[part], length)?;
        }
        Ok(())
    }

    fn push<B: AsRef<[u8]>>(
        &self,
        session: &Session,
        header: &VnetHeader,
        parts: &[B],
        length: usize,
    ) -> Result<(), DropReason> {
        let mut backlog = self.backlog.lock();
        if backlog.frames.is_empty() {
            let mut ring = session.rx().ok_or(DropReason::PortDown)?;
            match ring.put(header, parts, length) {
                Ok(()) => {
                    self.counters.received(length);
                    return Ok(());
                }
                Err(PutError::Refused(reason)) => return Err(reason),
                Err(PutError::Full) => {}
            }
        }
        if backlog.frames.len() == BACKLOG_FRAMES || backlog.bytes + length > BACKLOG_BYTES {
            return Err(DropReason::RingFull);
        }
        backlog.bytes += length;
        backlog.frames.push_back((*header, flatten(parts, length)));
        self.drain_backlog(session, &mut backlog);
        Ok(())
    }

    /// Goes on with what waits, after the guest has offered buffers. Interrupts it.
    pub(crate) fn flush(&self) {
        if let Some(session) = self.session.load().as_ref() {
            self.drain_backlog(session, &mut self.backlog.lock());
            session.signal_rx();
        }
    }

    /// Afterwards the backlog is empty, or the guest will kick when it offers more.
    fn drain_backlog(&self, session: &Session, backlog: &mut Backlog) {
        let Some(mut ring) = session.rx() else { return };
        while let Some((header, frame)) = backlog.frames.front() {
            match ring.put(header, &[frame], frame.len()) {
                Ok(()) => self.counters.received(frame.len()),
                Err(PutError::Refused(reason)) => self.counters.dropped(reason),
                Err(PutError::Full) => {
                    // What lies in the ring but is not enough for the frame must not look like more.
                    if ring.arm_beyond_available() {
                        continue;
                    }
                    return;
                }
            }
            backlog.bytes -= frame.len();
            backlog.frames.pop_front();
        }
        ring.disarm();
    }

    /// Interrupts the guest about frames that were delivered, if it wants that.
    pub(crate) fn signal(&self) {
        if let Some(session) = self.session.load().as_ref() {
            session.signal_rx();
        }
    }
}

fn flatten<B: AsRef<[u8]>>(parts: &[B], length: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(length + VNET_HEADER);
    for part in parts {
        frame.extend_from_slice(part.as_ref());
    }
    frame
}
