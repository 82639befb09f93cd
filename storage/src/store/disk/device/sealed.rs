//! A device of which all but the superblocks is encrypted.
//!
//! It stands between a store and its medium and knows nothing of either. What the store gives away to be written is not changed: it may be read from memory meanwhile. What is read is
//! decrypted where it lies. A place that was never written reads as noise, which no checksum takes for anything.

use super::buffer::AlignedBuf;
use super::xts::Xts;
use super::{Device, Done, Request};
use crate::ids::BLOCK_SIZE;
use crate::key::DiskKey;
use crate::store::disk::format::layout::LOG_OFFSET;
use std::io;
use std::sync::Arc;

/// Bytes that are encrypted before they are given to the medium.
const AT_ONCE: usize = 4 << 20;
/// What of the key the superblock says: a sector of zeroes with a number that no disk has.
const CHECKED_SECTOR: u64 = u64::MAX;

/// Something by which a key is known, and from which nothing else can be learnt about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::store::disk) struct KeyCheck(pub(in crate::store::disk) [u8; 16]);

impl KeyCheck {
    pub(in crate::store::disk) fn of(key: &DiskKey) -> io::Result<Self> {
        let mut sector = [0; BLOCK_SIZE as usize];
        Xts::new(key)?.encrypt(CHECKED_SECTOR, &mut sector)?;
        let mut check = [0; 16];
        check.copy_from_slice(&sector[..16]);
        Ok(Self(check))
    }
}

/// See the module.
pub(in crate::store::disk) struct SealedDevice {
    inner: Arc<dyn Device>,
    xts: Arc<Xts>,
}

impl SealedDevice {
    pub(in crate::store::disk) fn new(inner: Arc<dyn Device>, key: &DiskKey) -> io::Result<Self> {
        Ok(Self { inner, xts: Arc::new(Xts::new(key)?) })
    }

    fn sealed(&self, offset: u64, bytes: &[u8]) -> io::Result<AlignedBuf> {
        let mut sealed = AlignedBuf::copy_of(bytes);
        if !is_plain(offset) {
            self.xts.encrypt(offset / BLOCK_SIZE, &mut sealed)?;
        }
        Ok(sealed)
    }
}

fn is_plain(offset: u64) -> bool {
    offset < LOG_OFFSET
}

fn open(xts: &Xts, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    if is_plain(offset) { Ok(()) } else { xts.decrypt(offset / BLOCK_SIZE, bytes) }
}

impl Device for SealedDevice {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn start(&self, request: Request, done: Done) {
        match request {
            Request::Write(offset, data) => match self.sealed(offset, &data) {
                Ok(sealed) => self.inner.start(Request::Write(offset, Arc::new(sealed)), done),
                Err(error) => done(Err(error)),
            },
            Request::Read(pieces, buf) => {
                let (xts, places) = (self.xts.clone(), pieces.clone());
                let opened = move |finished: io::Result<Option<AlignedBuf>>| {
                    done(finished.and_then(|buf| {
                        let Some(mut buf) = buf else { return Ok(None) };
                        for (offset, piece) in places {
                            open(&xts, offset, &mut buf[piece])?;
                        }
                        Ok(Some(buf))
                    }));
                };
                self.inner.start(Request::Read(pieces, buf), Box::new(opened));
            }
            Request::Sync => self.inner.start(Request::Sync, done),
        }
    }

    fn read(&self, reads: &mut [(u64, AlignedBuf)]) -> io::Result<()> {
        self.inner.read(reads)?;
        reads.iter_mut().try_for_each(|(offset, buf)| open(&self.xts, *offset, buf))
    }

    fn write(&self, writes: &[(u64, &[u8])]) -> io::Result<()> {
        let mut sealed: Vec<(u64, AlignedBuf)> = Vec::new();
        let mut bytes = 0;
        for (i, (offset, data)) in writes.iter().enumerate() {
            sealed.push((*offset, self.sealed(*offset, data)?));
            bytes += data.len();
            if bytes >= AT_ONCE || i + 1 == writes.len() {
                let slices: Vec<(u64, &[u8])> = sealed.iter().map(|(at, buf)| (*at, &buf[..])).collect();
                self.inner.write(&slices)?;
                (sealed, bytes) = (Vec::new(), 0);
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn quiesce(&self) {
        self.inner.quiesce();
    }
}
