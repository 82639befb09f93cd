//! Frames out of and into a guest's ring.
//!
//! All addresses, lengths and indices here come from the guest. Every access goes through its memory's bounds; a
//! chain is as long as its ring at most; what makes no sense is given back unused.

use std::sync::atomic::{Ordering, fence};

use vhost_user_backend::{VringStateMutGuard, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::features::Features;
use super::vring::{Memory, PortVring};
use crate::dirty_log::LoggedMemory;
use crate::overlay::frame::vnet::{MAX_FRAME, NUM_BUFFERS_AT, VNET_HEADER, VnetHeader};
use crate::overlay::stats::DropReason;

const NO_INTERRUPT: u16 = 1;
const RING_HEADER: u64 = 4;
const AVAIL_ELEMENT: u64 = 2;
const USED_ELEMENT: u64 = 8;

/// Room for the largest frame with its header.
pub(crate) struct FrameBuffer(Box<[u8]>);

impl FrameBuffer {
    /// A buffer full of zeroes.
    pub(crate) fn new() -> Self {
        Self(vec![0; VNET_HEADER + MAX_FRAME].into_boxed_slice())
    }

    /// The first `length` bytes of the frame in it.
    pub(crate) fn frame(&self, length: usize) -> &[u8] {
        &self.0[VNET_HEADER..VNET_HEADER + length]
    }
}

/// A frame that was taken from a guest: its header, and its length in the buffer.
pub(crate) type Taken = (VnetHeader, usize);

/// Why a frame could not be given to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PutError {
    /// No buffers now; there may be later.
    Full,
    /// Never, for this reason.
    Refused(DropReason),
}

/// A ring, locked, that is started and enabled.
pub(crate) struct Ring<'a> {
    state: <PortVring as VringStateMutGuard<'a, Memory>>::G,
    memory: <Memory as GuestAddressSpace>::T,
    features: Features,
}

/// One end of a ring that was published to the guest.
type Used = (u16, u32);

impl<'a> Ring<'a> {
    /// Locks a ring; nothing while the guest does not run it.
    pub(crate) fn lock(vring: &'a PortVring, features: Features) -> Option<Self> {
        let state = vring.get_mut();
        let is_running = state.is_enabled() && state.get_queue().ready();
        is_running.then(|| Self { state, memory: vring.memory().memory(), features })
    }

    /// Takes the next frame that the guest sends. The chain goes back at once, since the frame is copied.
    pub(crate) fn take(&mut self, buffer: &mut FrameBuffer) -> Option<Result<Taken, DropReason>> {
        let memory: &LoggedMemory = &self.memory;
        let chain = match self.state.get_queue_mut().iter(memory) {
            Ok(mut chains) => chains.next()?,
            Err(_) => return Some(Err(DropReason::Malformed)),
        };
        let head = chain.head_index();
        let taken = gather(chain, memory, buffer);
        if self.publish(&[(head, 0)]).is_err() {
            return Some(Err(DropReason::Malformed));
        }
        Some(taken)
    }

    /// Gives a frame to the guest, in several buffers if it can take that.
    pub(crate) fn put<B: AsRef<[u8]>>(
        &mut self,
        header: &VnetHeader,
        parts: &[B],
        length: usize,
    ) -> Result<(), PutError> {
        let before = self.state.get_queue().next_avail();
        let result = self.try_put(header, parts, length);
        if matches!(result, Err(PutError::Full)) {
            self.state.get_queue_mut().set_next_avail(before);
        }
        result
    }

    fn try_put<B: AsRef<[u8]>>(
        &mut self,
        header: &VnetHeader,
        parts: &[B],
        length: usize,
    ) -> Result<(), PutError> {
        let total = VNET_HEADER + length;
        let memory: &LoggedMemory = &self.memory;
        let mut used: Vec<Used> = Vec::with_capacity(2);
        let mut areas: Vec<(GuestAddress, usize)> = Vec::with_capacity(2);
        let mut room = 0;
        let mut chains =
            self.state.get_queue_mut().iter(memory).map_err(|_| PutError::Refused(DropReason::Malformed))?;
        while room < total {
            if !used.is_empty() && !self.features.can_merge_buffers() {
                // Its one buffer is too small, and so might be all others: give it back, drop the frame.
                let _ = self.publish(&[(used[0].0, 0)]);
                return Err(PutError::Refused(DropReason::TooLarge));
            }
            let chain = chains.next().ok_or(PutError::Full)?;
            let head = chain.head_index();
            let before = room;
            for descriptor in chain {
                if descriptor.is_write_only() && room < total {
                    let take = (total - room).min(descriptor.len() as usize);
                    areas.push((descriptor.addr(), take));
                    room += take;
                }
            }
            used.push((head, (room - before) as u32));
        }
        let mut head = header.encode();
        let count = u16::try_from(used.len()).map_err(|_| PutError::Refused(DropReason::TooLarge))?;
        head[NUM_BUFFERS_AT..].copy_from_slice(&count.to_le_bytes());
        let written = scatter(memory, &areas, &head, parts);
        if written.is_err() {
            // Back with nothing in them; a guest that lies about its buffers finds empty ones.
            used.iter_mut().for_each(|used| used.1 = 0);
        }
        self.publish(&used).map_err(|_| PutError::Refused(DropReason::Malformed))?;
        written.map_err(PutError::Refused)
    }

    /// Hands buffers back to the guest, all at the same moment: a guest that looks in between must not see the first
    /// buffers of a frame without the rest.
    fn publish(&mut self, used: &[Used]) -> Result<(), vm_memory::GuestMemoryError> {
        let queue = self.state.get_queue_mut();
        let ring = GuestAddress(queue.used_ring());
        let (mut next, size) = (queue.next_used(), queue.size().max(1));
        for &(head, length) in used {
            let element = u64::from(u32::from(head).to_le()) | u64::from(length.to_le()) << 32;
            let offset = RING_HEADER + USED_ELEMENT * u64::from(next % size);
            self.memory.write_obj(element, at(ring, offset)?)?;
            next = next.wrapping_add(1);
        }
        self.memory.store(next.to_le(), at(ring, 2)?, Ordering::Release)?;
        queue.set_next_used(next);
        Ok(())
    }

    /// Interrupts the guest if it asked to be, for what was published after `signalled`; returns the new mark.
    pub(crate) fn signal(&mut self, signalled: u16) -> u16 {
        let next = self.state.get_queue().next_used();
        if next != signalled && self.wants_interrupt(signalled, next) {
            // A guest whose interrupt cannot be delivered is the VMM's concern; there is nobody else to tell.
            let _ = self.state.signal_used_queue();
        }
        next
    }

    fn wants_interrupt(&self, old: u16, new: u16) -> bool {
        // What was published must be visible before the guest's wish is read.
        fence(Ordering::SeqCst);
        let queue = self.state.get_queue();
        let ring = GuestAddress(queue.avail_ring());
        let read = |offset| {
            let word: Option<u16> =
                at(ring, offset).and_then(|address| self.memory.load(address, Ordering::Relaxed)).ok();
            word.map(u16::from_le)
        };
        if self.features.has_event_idx() {
            let event = read(RING_HEADER + AVAIL_ELEMENT * u64::from(queue.size()));
            event.is_none_or(|event| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            read(0).is_none_or(|flags| flags & NO_INTERRUPT == 0)
        }
    }

    /// Where publishing stands.
    pub(crate) fn published(&self) -> u16 {
        self.state.get_queue().next_used()
    }

    /// Asks for a kick when more comes; true if more is there already.
    pub(crate) fn arm(&mut self) -> bool {
        self.state.enable_notification().unwrap_or(false)
    }

    /// Asks for a kick when the guest offers more buffers than it has by now; true if it has just done so.
    pub(crate) fn arm_beyond_available(&mut self) -> bool {
        let memory: &LoggedMemory = &self.memory;
        let queue = self.state.get_queue_mut();
        let next = queue.next_avail();
        let Ok(available) = queue.avail_idx(memory, Ordering::Acquire) else { return false };
        queue.set_next_avail(available.0);
        let has_more = queue.enable_notification(memory).unwrap_or(false);
        queue.set_next_avail(next);
        has_more
    }

    /// Asks for no kicks.
    pub(crate) fn disarm(&mut self) {
        // It only saves kicks; those that come anyway do no harm.
        let _ = self.state.disable_notification();
    }
}

fn at(base: GuestAddress, offset: u64) -> Result<GuestAddress, vm_memory::GuestMemoryError> {
    base.0.checked_add(offset).map(GuestAddress).ok_or(vm_memory::GuestMemoryError::InvalidGuestAddress(base))
}

/// Copies a chain into the buffer and checks the header.
fn gather(
    chain: DescriptorChain<&LoggedMemory>,
    memory: &LoggedMemory,
    buffer: &mut FrameBuffer,
) -> Result<Taken, DropReason> {
    let mut filled = 0;
    for descriptor in chain {
        if descriptor.is_write_only() {
            return Err(DropReason::Malformed);
        }
        let end = filled + descriptor.len() as usize;
        let area = buffer.0.get_mut(filled..end).ok_or(DropReason::TooLarge)?;
        memory.read_slice(area, descriptor.addr()).map_err(|_| DropReason::Malformed)?;
        filled = end;
    }
    let (header, _) = buffer.0[..filled].split_first_chunk().ok_or(DropReason::Malformed)?;
    let length = filled - VNET_HEADER;
    Ok((VnetHeader::parse(header, length)?, length))
}

/// Copies a header and the parts of a frame into areas that are exactly large enough.
fn scatter<B: AsRef<[u8]>>(
    memory: &LoggedMemory,
    areas: &[(GuestAddress, usize)],
    header: &[u8],
    parts: &[B],
) -> Result<(), DropReason> {
    let mut sources = std::iter::once(header).chain(parts.iter().map(AsRef::as_ref));
    let mut source: &[u8] = &[];
    for &(address, length) in areas {
        let mut done = 0;
        while done < length {
            if source.is_empty() {
                source = sources.next().ok_or(DropReason::Malformed)?;
                continue;
            }
            let (now, later) = source.split_at(source.len().min(length - done));
            let to = at(address, done as u64).map_err(|_| DropReason::Malformed)?;
            memory.write_slice(now, to).map_err(|_| DropReason::Malformed)?;
            done += now.len();
            source = later;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
