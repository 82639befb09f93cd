//! From a guest's descriptor chain to a request, and back.
//!
//! Everything here is hostile input. A chain that can be answered gets an error status; one that cannot (no readable header,
//! no writable status byte, a broken chain) is [`Malformed`], upon which the queue stops, as the virtio specification has it for a
//! device that needs a reset. The walk is our own because a request that is submitted again after a restart is known by its
//! head alone.

use super::geometry::{MAX_DISCARD_SECTORS, MAX_REQUEST_BYTES, QUEUE_SIZE};
use crate::device::{BlockError, BlockOp};
use crate::ids::SECTOR_SIZE;
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes as _, GuestAddress, GuestMemory};

/// Length of the answer to GET_ID.
pub(super) const SERIAL_LEN: usize = 20;
/// Length of a request's header.
const HEADER_LEN: usize = 16;
/// Length of the range in a discard or write-zeroes request.
const RANGE_LEN: usize = 16;
const DESCRIPTOR_LEN: u64 = 16;
/// Descriptors of a chain at most: those of the largest request. By the specification a chain is not longer than its queue, but
/// Linux takes only the segments into account when it has indirect tables.
const MAX_CHAIN: u16 = QUEUE_SIZE;

/// A chain that cannot be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub(super) enum Malformed {
    /// A descriptor or table outside of memory, or an index outside of its table.
    #[error("a descriptor lies outside of the table or of memory")]
    Outside,
    /// More descriptors than any request has.
    #[error("the chain is too long or has a loop")]
    TooLong,
    /// An indirect descriptor within an indirect table, or one with a chain behind it.
    #[error("a wrong use of an indirect table")]
    Indirect,
    /// A readable descriptor behind a writable one.
    #[error("a readable descriptor behind a writable one")]
    Order,
    /// No header or no status byte.
    #[error("no room for header or status")]
    TooShort,
}

/// A piece of guest memory.
type Piece = (GuestAddress, u32);

/// Where the answer goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Reply {
    data: Vec<Piece>,
    status: GuestAddress,
}

/// What a request wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Action {
    /// Something for the device.
    Submit(BlockOp),
    /// The serial number.
    Serial,
    /// Nothing: it is wrong, and this is its status.
    Refuse(Status),
}

/// Status byte of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        (match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

impl From<&BlockError> for Status {
    fn from(_: &BlockError) -> Self {
        Self::IoError
    }
}

/// Where descriptors are.
#[derive(Clone, Copy, Debug)]
pub(super) struct DescriptorTable {
    pub(super) address: GuestAddress,
    pub(super) size: u16,
}

/// What the request may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Size of the device in bytes.
    pub(super) size: u64,
    /// Whether writes are refused.
    pub(super) access: super::Access,
}

/// Readable and writable pieces of a chain.
#[derive(Default)]
struct Chain {
    readable: Vec<Piece>,
    writable: Vec<Piece>,
}

fn walk<M: GuestMemory>(memory: &M, ring: DescriptorTable, head: u16) -> Result<Chain, Malformed> {
    let mut chain = Chain::default();
    let mut table = ring;
    let mut index = head;
    let mut indirect = false;
    // One more for the descriptor that leads to an indirect table.
    for _ in 0..=MAX_CHAIN {
        if index >= table.size {
            return Err(Malformed::Outside);
        }
        let at = table.address.checked_add(u64::from(index) * DESCRIPTOR_LEN).ok_or(Malformed::Outside)?;
        let descriptor: Descriptor = memory.read_obj(at).map_err(|_| Malformed::Outside)?;
        if descriptor.refers_to_indirect_table() {
            let entries = u64::from(descriptor.len()) / DESCRIPTOR_LEN;
            let aligned = u64::from(descriptor.len()).is_multiple_of(DESCRIPTOR_LEN);
            if indirect || descriptor.has_next() || !aligned || entries == 0 || entries > u64::from(u16::MAX)
            {
                return Err(Malformed::Indirect);
            }
            indirect = true;
            table = DescriptorTable { address: descriptor.addr(), size: entries as u16 };
            index = 0;
            continue;
        }
        let piece = (descriptor.addr(), descriptor.len());
        if descriptor.is_write_only() {
            chain.writable.push(piece);
        } else if chain.writable.is_empty() {
            chain.readable.push(piece);
        } else {
            return Err(Malformed::Order);
        }
        if !descriptor.has_next() {
            return Ok(chain);
        }
        index = descriptor.next();
    }
    Err(Malformed::TooLong)
}

/// Takes `len` bytes off the front of some pieces; `None` when there are fewer or memory is not there.
fn take_front<M: GuestMemory>(memory: &M, pieces: &mut Vec<Piece>, len: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let (address, left) = pieces.first_mut()?;
        let n = (*left as usize).min(len - out.len());
        memory.write_all_volatile_to(*address, &mut out, n).ok()?;
        *address = address.checked_add(n as u64)?;
        *left -= n as u32;
        if *left == 0 {
            pieces.remove(0);
        }
    }
    Some(out)
}

fn total(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|(_, len)| u64::from(*len)).sum()
}

/// Reads the request that starts at a head.
pub(super) fn parse<M: GuestMemory>(
    memory: &M,
    table: DescriptorTable,
    head: u16,
    limits: Limits,
) -> Result<(Action, Reply), Malformed> {
    let Chain { mut readable, mut writable } = walk(memory, table, head)?;
    let header = take_front(memory, &mut readable, HEADER_LEN).ok_or(Malformed::TooShort)?;
    // The status is the last writable byte.
    while writable.last().is_some_and(|(_, len)| *len == 0) {
        writable.pop();
    }
    let (address, len) = writable.last_mut().ok_or(Malformed::TooShort)?;
    *len -= 1;
    let status = address.checked_add(u64::from(*len)).ok_or(Malformed::Outside)?;
    let reply = Reply { data: writable, status };
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = header[8..16].iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
    let action = action(memory, kind, sector, &mut readable, &reply, limits).unwrap_or_else(Action::Refuse);
    Ok((action, reply))
}

fn action<M: GuestMemory>(
    memory: &M,
    kind: u32,
    sector: u64,
    readable: &mut Vec<Piece>,
    reply: &Reply,
    limits: Limits,
) -> Result<Action, Status> {
    let writes = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
    if writes && limits.access == super::Access::ReadOnly {
        return Err(Status::IoError);
    }
    match kind {
        VIRTIO_BLK_T_IN => {
            let len = total(&reply.data);
            let offset = range(sector, len, limits)?;
            Ok(Action::Submit(BlockOp::Read { offset, len }))
        }
        VIRTIO_BLK_T_OUT => {
            let len = total(readable);
            let offset = range(sector, len, limits)?;
            let data = take_front(memory, readable, len as usize).ok_or(Status::IoError)?;
            Ok(Action::Submit(BlockOp::Write { offset, data: data.into() }))
        }
        VIRTIO_BLK_T_FLUSH => Ok(Action::Submit(BlockOp::Flush)),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            if total(readable) != RANGE_LEN as u64 {
                return Err(Status::IoError);
            }
            let bytes = take_front(memory, readable, RANGE_LEN).ok_or(Status::IoError)?;
            let number = |from: usize, to: usize| {
                bytes[from..to].iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte))
            };
            let (sector, sectors, flags) = (number(0, 8), number(8, 12), number(12, 16));
            // The only flag there is lets write-zeroes unmap; for a discard it is reserved.
            if flags > 1 || (flags == 1 && kind == VIRTIO_BLK_T_DISCARD) {
                return Err(Status::Unsupported);
            }
            if sectors > u64::from(MAX_DISCARD_SECTORS) {
                return Err(Status::IoError);
            }
            let len = sectors * SECTOR_SIZE;
            let offset = in_device(sector, len, limits)?;
            Ok(Action::Submit(if kind == VIRTIO_BLK_T_DISCARD {
                BlockOp::Discard { offset, len }
            } else {
                BlockOp::WriteZeroes { offset, len }
            }))
        }
        VIRTIO_BLK_T_GET_ID if total(&reply.data) >= SERIAL_LEN as u64 => Ok(Action::Serial),
        VIRTIO_BLK_T_GET_ID => Err(Status::IoError),
        _ => Err(Status::Unsupported),
    }
}

/// The byte offset of a data request within its limits.
fn range(sector: u64, len: u64, limits: Limits) -> Result<u64, Status> {
    if len == 0 || !len.is_multiple_of(SECTOR_SIZE) || len > MAX_REQUEST_BYTES {
        return Err(Status::IoError);
    }
    in_device(sector, len, limits)
}

fn in_device(sector: u64, len: u64, limits: Limits) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoError)?;
    let end = offset.checked_add(len).ok_or(Status::IoError)?;
    if len == 0 || end > limits.size { Err(Status::IoError) } else { Ok(offset) }
}

impl Reply {
    /// Bytes that the answer may have, without the status.
    pub(super) fn capacity(&self) -> u64 {
        total(&self.data)
    }

    /// Writes the answer into guest memory; returns how many bytes that were. Memory that is not there turns it into an error.
    pub(super) fn write<M: GuestMemory>(&self, memory: &M, status: Status, data: &[u8]) -> u32 {
        let mut status = status;
        let mut written = 0;
        for (address, len) in &self.data {
            let n = (*len as usize).min(data.len() - written);
            if n == 0 {
                break;
            }
            if memory.write_slice(&data[written..written + n], *address).is_err() {
                status = Status::IoError;
                break;
            }
            written += n;
        }
        // Without a status the guest cannot tell; the length of 0 says that nothing was written.
        match memory.write_obj(status.byte(), self.status) {
            Ok(()) => written as u32 + 1,
            Err(_) => 0,
        }
    }
}

#[cfg(test)]
mod tests;
