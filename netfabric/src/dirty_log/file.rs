//! Whether the file behind a mapped log can be written without fear.
//!
//! A file that is shorter than what is mapped of it, or becomes so, kills whoever touches the rest (`SIGBUS`). So a log must
//! be sealed against shrinking (a memfd can be) and long enough. The vhost-user crate maps the file and shows nobody its descriptor;
//! it is open while the log is being set up, though, so it is found among those of this process by what the address is mapped to.
//!
//! Guest memory comes the same way. Its length is checked when it is mapped; that it does not shrink afterwards is the front end's word: VMMs of
//! ours seal it, one that was captured by its guest need not.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::makedev;

/// What a range of addresses is mapped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    device: u64,
    inode: u64,
    /// Where in the file the address asked for is.
    offset: u64,
}

/// Checks that `bytes` from a mapped address on are backed by a file now and for ever.
pub(super) fn check(address: usize, bytes: usize) -> io::Result<()> {
    let refused = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("log refused: {why}"));
    let maps = fs::read_to_string("/proc/self/maps")?;
    let mapping = find(&maps, address as u64).ok_or_else(|| refused("it is not mapped"))?;
    let file = open(mapping)?.ok_or_else(|| refused("its file is not open"))?;
    // Files that cannot be sealed have an error here.
    let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(|_| refused("its file cannot be sealed"))?;
    if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Err(refused("its file is not sealed against shrinking"));
    }
    let end = mapping.offset.checked_add(bytes as u64);
    if end.is_none_or(|end| end > file.metadata().map_or(0, |metadata| metadata.len())) {
        return Err(refused("its file is too short"));
    }
    Ok(())
}

/// Opens the file of a mapping anew, by a descriptor of this process.
fn open(mapping: Mapping) -> io::Result<Option<File>> {
    let is_it = |metadata: &fs::Metadata| metadata.dev() == mapping.device && metadata.ino() == mapping.inode;
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        // Descriptors come and go meanwhile: one that is gone is not it, and what was opened is looked at again.
        if fs::metadata(&path).is_ok_and(|metadata| is_it(&metadata))
            && let Ok(file) = File::open(&path)
            && is_it(&file.metadata()?)
        {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// Finds an address in the text of `/proc/self/maps`.
fn find(maps: &str, address: u64) -> Option<Mapping> {
    maps.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = fields.next()?.split_once('-')?;
        let (start, end) = (hex(start)?, hex(end)?);
        let offset = hex(fields.nth(1)?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = makedev(hex(major)?, hex(minor)?);
        let inode = fields.next()?.parse().ok()?;
        (start..end).contains(&address).then_some(Mapping {
            device,
            inode,
            offset: offset + (address - start),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_in_its_mapping() {
        let maps = "7f0000000000-7f0000001000 r-xp 00002000 fe:01 99 /lib/a b.so\n\
                    7f0000001000-7f0000003000 rw-s 00001000 00:01 1234 /memfd:log (deleted)\n\
                    7f0000003000-7f0000004000 rw-p 00000000 00:00 0 \n";
        let found = Mapping { device: makedev(0, 1), inode: 1234, offset: 0x2000 };
        assert_eq!(find(maps, 0x7f00_0000_2000), Some(found));
        assert_eq!(find(maps, 0x7f00_0000_4000), None);
        assert_eq!(find("nonsense\n1-2\n", 1), None);
    }
}
