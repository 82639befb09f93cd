//! I/O that is over when the call returns: for media in memory, which never wait.
//!
//! io_uring hands I/O on a file in tmpfs to a worker thread, and to wake that costs twenty times the copy itself.

use super::buffer::AlignedBuf;
use super::{Device, Done, Finished, Request};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// See the module.
pub(super) struct InlineDevice {
    pub(super) file: File,
    pub(super) size: u64,
}

impl InlineDevice {
    fn run(&self, request: Request) -> Finished {
        match request {
            Request::Write(offset, data) => self.file.write_all_at(&data, offset).map(|()| None),
            Request::Read(pieces, mut buf) => {
                for (offset, piece) in pieces {
                    self.file.read_exact_at(&mut buf[piece], offset)?;
                }
                Ok(Some(buf))
            }
            Request::Sync => self.file.sync_data().map(|()| None),
        }
    }
}

impl Device for InlineDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn start(&self, request: Request, done: Done) {
        done(self.run(request));
    }

    fn read(&self, reads: &mut [(u64, AlignedBuf)]) -> io::Result<()> {
        reads.iter_mut().try_for_each(|(offset, buf)| self.file.read_exact_at(buf, *offset))
    }

    fn write(&self, writes: &[(u64, &[u8])]) -> io::Result<()> {
        writes.iter().try_for_each(|(offset, bytes)| self.file.write_all_at(bytes, *offset))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
