//! qcow2, read by the crate `imago`.
//!
//! What imago would do and we do not want is refused here, before it opens the file: backing files and external data
//! files (no other file is ever opened), encryption. What imago overlooks is checked here: it reads zeroes behind the
//! end of the file, so that a truncated image would lose data silently.

use std::{fs::File, io};

use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, file::File as Storage};

use super::source::{Content, ImageError, Source, read_some};
use crate::images::protocol::Format;

pub(super) const MAGIC: &[u8] = b"QFI\xfb";

/// The bits of a table entry that are an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// 64 TiB with the smallest useful clusters needs less.
const MAX_L1_ENTRIES: u32 = 4 << 20;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;
const EXTERNAL_DATA: u64 = 4;
const OTHER_COMPRESSION: u64 = 8;
const EXTENDED_ENTRIES: u64 = 16;

pub(super) struct Qcow2 {
    image: FormatAccess<Storage>,
    /// The length of the file, up to the end of its last cluster.
    length: u64,
}

const fn corrupt(what: &'static str) -> ImageError {
    ImageError::Corrupt(Format::Qcow2, what)
}

fn unreadable(source: io::Error) -> ImageError {
    ImageError::Io { format: Format::Qcow2, source }
}

impl Qcow2 {
    pub(super) fn open(file: File) -> Result<Self, ImageError> {
        let length = file.metadata().map_err(unreadable)?.len();
        let cluster = check_header(&file, length)?;
        let storage = Storage::try_from(file).map_err(unreadable)?;
        let image = imago::qcow2::Qcow2::<Storage>::builder(storage)
            .backing(None)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())
            .map_err(unreadable)?;
        Ok(Self { image: FormatAccess::new(image), length: length.next_multiple_of(cluster) })
    }
}

/// Checks the header and the first table; answers the size of clusters.
fn check_header(file: &File, length: u64) -> Result<u64, ImageError> {
    let mut head = [0; 104];
    // A version 2 header is shorter, and followed by a table at least.
    if read_some(file, &mut head, 0).map_err(unreadable)? < head.len() {
        return Err(corrupt("the header is cut off"));
    }
    let be32 = |at: usize| head[at..at + 4].try_into().map_or(0, u32::from_be_bytes);
    let be64 = |at: usize| head[at..at + 8].try_into().map_or(0, u64::from_be_bytes);
    let unsupported = |what| Err(ImageError::Unsupported(Format::Qcow2, what));
    let (version, cluster_bits, size) = (be32(4), be32(20), be64(24));
    if !(2..=3).contains(&version) {
        return unsupported("another version than 2 or 3");
    }
    if be64(8) != 0 {
        return unsupported("a backing file");
    }
    if be32(32) != 0 {
        return unsupported("encryption");
    }
    let features = if version == 3 { be64(72) } else { 0 };
    let known = [
        (EXTERNAL_DATA, "an external data file"),
        (OTHER_COMPRESSION, "another compression than zlib"),
        (EXTENDED_ENTRIES, "extended entries"),
        (DIRTY | CORRUPT, "damage or without having been closed (qemu-img check -r all)"),
        (u64::MAX, "features that are not known"),
    ];
    if let Some((_, what)) = known.iter().find(|(bits, _)| features & bits != 0) {
        return unsupported(what);
    }
    if !(9..=21).contains(&cluster_bits) {
        return Err(corrupt("impossible clusters"));
    }
    let cluster = 1u64 << cluster_bits;
    let (entries, start) = (be32(36), be64(40));
    // Each entry covers a cluster of 8-byte entries of one cluster each.
    let needed = size.div_ceil(1 << (2 * cluster_bits - 3));
    if u64::from(entries) < needed || entries > MAX_L1_ENTRIES {
        return Err(corrupt("the first table has the wrong size"));
    }
    let inside = |start: u64, bytes: u64| start.checked_add(bytes).is_some_and(|end| end <= length);
    if !inside(start, u64::from(entries) * 8) {
        return Err(corrupt("the first table is outside of the file"));
    }
    let mut table = vec![0; usize::try_from(entries).unwrap_or(0) * 8];
    read_some(file, &mut table, start).map_err(unreadable)?;
    let mut entries = table.chunks_exact(8).map(|entry| entry.try_into().map_or(0, u64::from_be_bytes));
    let outside = |entry: u64| entry & OFFSET_MASK != 0 && !inside(entry & OFFSET_MASK, cluster);
    if entries.any(outside) {
        return Err(corrupt("a table is outside of the file"));
    }
    Ok(cluster)
}

impl Source for Qcow2 {
    fn size_bytes(&self) -> u64 {
        self.image.size()
    }

    fn look(&mut self, offset: u64, limit: u64) -> Result<(Content, u64), ImageError> {
        let (mapping, length) = self.image.get_mapping(offset, limit).map_err(unreadable)?;
        match mapping {
            Mapping::Eof { .. } => Ok((Content::Zero, limit)),
            _ if length == 0 => Err(corrupt("a mapping without end")),
            Mapping::Zero { .. } => Ok((Content::Zero, length)),
            Mapping::Raw { offset: at, .. } => {
                if at.checked_add(length).is_none_or(|end| end > self.length) {
                    return Err(corrupt("a cluster is outside of the file"));
                }
                Ok((Content::Data, length))
            }
            _ => Ok((Content::Data, length)),
        }
    }

    fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.image.read(buffer, offset).map_err(unreadable)
    }
}
