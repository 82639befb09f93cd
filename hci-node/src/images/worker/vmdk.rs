//! VMware's disks in one file: monolithicSparse, and streamOptimized as OVF exports have it. (imago reads only the
//! kind whose data is in a second file.)
//!
//! A directory of tables gives for each grain (64 KiB usually) the sector where it is; in streamOptimized files the
//! grain there is a zlib stream behind a small head, and the directory's place is in a footer. Everything is checked
//! against the length of the file; one table and one inflated grain are held at a time.

use std::{fs::File, io, os::unix::fs::FileExt};

use miniz_oxide::inflate;

use super::source::{Content, ImageError, Source, read_some};
use crate::images::protocol::{Format, MAX_DISK_BYTES};

pub(super) const MAGIC: &[u8] = b"KDMV";

const SECTOR: u64 = 512;
/// The directory is at the end of the file, says the header.
const AT_END: u64 = u64::MAX;
/// Grains may be marked as zero.
const ZERO_GRAINS: u32 = 1 << 2;
/// Grains are compressed.
const COMPRESSED: u32 = 1 << 16;
const DEFLATE: u16 = 1;
/// An entry of a zero grain, where they may be marked.
const ZERO_ENTRY: u32 = 1;
/// Largest grain: VMware writes 64 KiB.
const MAX_GRAIN: u64 = 1 << 20;
/// Entries of a table: always 512 in practice.
const MAX_TABLE: u32 = 4096;
const MAX_DIRECTORY: u64 = 4 << 20;
const MAX_DESCRIPTOR: u64 = 64 << 10;

pub(super) struct Vmdk {
    file: File,
    length: u64,
    header: Header,
    /// Where the tables are, in sectors.
    directory: Vec<u32>,
    /// The table read last, and which one it is.
    table: Option<(u64, Vec<u32>)>,
    /// The grain inflated last, and where in the disk it is.
    grain: Option<(u64, Vec<u8>)>,
}

#[derive(Clone, Copy)]
struct Header {
    flags: u32,
    size: u64,
    grain: u64,
    descriptor: (u64, u64),
    table_entries: u32,
    directory: u64,
    compression: u16,
}

const fn corrupt(what: &'static str) -> ImageError {
    ImageError::Corrupt(Format::Vmdk, what)
}

fn unreadable(source: io::Error) -> ImageError {
    ImageError::Io { format: Format::Vmdk, source }
}

impl Header {
    fn read(file: &File, offset: u64) -> Result<Self, ImageError> {
        let mut head = [0; 79];
        file.read_exact_at(&mut head, offset).map_err(unreadable)?;
        let le32 = |at: usize| head[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
        let le64 = |at: usize| head[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
        if !head.starts_with(MAGIC) {
            return Err(corrupt("the header or footer is missing"));
        }
        if !(1..=3).contains(&le32(4)) {
            return Err(ImageError::Unsupported(Format::Vmdk, "another version than 1 to 3"));
        }
        let bytes = |sectors: u64| sectors.checked_mul(SECTOR).ok_or(corrupt("impossible sizes"));
        let header = Self {
            flags: le32(8),
            size: bytes(le64(12))?,
            grain: bytes(le64(20))?,
            descriptor: (bytes(le64(28))?, bytes(le64(36))?),
            table_entries: le32(44),
            directory: le64(56),
            compression: u16::from_le_bytes([head[77], head[78]]),
        };
        let sane = (4096..=MAX_GRAIN).contains(&header.grain)
            && header.grain.is_power_of_two()
            && (1..=MAX_TABLE).contains(&header.table_entries)
            && header.size <= MAX_DISK_BYTES;
        if sane { Ok(header) } else { Err(corrupt("impossible sizes in the header")) }
    }

    const fn is_compressed(&self) -> bool {
        self.flags & COMPRESSED != 0
    }
}

impl Vmdk {
    pub(super) fn open(file: File) -> Result<Self, ImageError> {
        let length = file.metadata().map_err(unreadable)?.len();
        let first = Header::read(&file, 0)?;
        check_descriptor(&file, first.descriptor)?;
        let header = if first.directory == AT_END {
            // The footer is the last sector but one; an end marker follows.
            let footer = length.checked_sub(2 * SECTOR).ok_or(corrupt("the footer is missing"))?;
            Header::read(&file, footer)?
        } else {
            first
        };
        if header.size != first.size || header.grain != first.grain || header.flags != first.flags {
            return Err(corrupt("header and footer differ"));
        }
        if header.is_compressed() && header.compression != DEFLATE {
            return Err(ImageError::Unsupported(Format::Vmdk, "another compression than deflate"));
        }
        let tables = header.size.div_ceil(header.grain * u64::from(header.table_entries));
        if tables > MAX_DIRECTORY {
            return Err(corrupt("impossible sizes in the header"));
        }
        let mut vmdk = Self { file, length, header, directory: Vec::new(), table: None, grain: None };
        vmdk.directory = vmdk.entries(header.directory, tables)?;
        Ok(vmdk)
    }

    /// Reads a directory or table.
    fn entries(&self, sector: u64, count: u64) -> Result<Vec<u32>, ImageError> {
        let start = sector.checked_mul(SECTOR).ok_or(corrupt("a table is outside of the file"))?;
        if start == 0 || start.checked_add(count * 4).is_none_or(|end| end > self.length) {
            return Err(corrupt("a table is outside of the file"));
        }
        let mut bytes = vec![0; usize::try_from(count * 4).map_err(|_| corrupt("impossible sizes"))?];
        self.file.read_exact_at(&mut bytes, start).map_err(unreadable)?;
        Ok(bytes.chunks_exact(4).map(|entry| entry.try_into().map_or(0, u32::from_le_bytes)).collect())
    }

    /// Where in the file the grain of a disk's offset is; none if it is zero.
    fn place(&mut self, offset: u64) -> Result<Option<u64>, ImageError> {
        let grain = offset / self.header.grain;
        let entries = u64::from(self.header.table_entries);
        let (number, index) = (grain / entries, grain % entries);
        let sector = usize::try_from(number).ok().and_then(|number| self.directory.get(number)).copied();
        let Some(sector @ 1..) = sector else { return Ok(None) };
        if self.table.as_ref().is_none_or(|(now, _)| *now != number) {
            self.table = Some((number, self.entries(sector.into(), entries)?));
        }
        let entry = self.table.as_ref().and_then(|(_, table)| table.get(usize::try_from(index).ok()?));
        match entry.copied().unwrap_or(0) {
            0 => Ok(None),
            ZERO_ENTRY if self.header.flags & ZERO_GRAINS != 0 => Ok(None),
            sector => {
                let place = u64::from(sector) * SECTOR;
                let least = if self.header.is_compressed() { SECTOR } else { self.header.grain };
                if place + least > self.length {
                    return Err(corrupt("a grain is outside of the file"));
                }
                Ok(Some(place))
            }
        }
    }

    /// The content of a compressed grain.
    fn inflate(&mut self, offset: u64, place: u64) -> Result<&[u8], ImageError> {
        let start = offset - offset % self.header.grain;
        if self.grain.as_ref().is_none_or(|(now, _)| *now != start) {
            let mut head = [0; 12];
            self.file.read_exact_at(&mut head, place).map_err(unreadable)?;
            let sector = head[..8].try_into().map_or(0, u64::from_le_bytes);
            let packed = head[8..].try_into().map_or(0, u32::from_le_bytes);
            // Incompressible data grows a little.
            if sector.checked_mul(SECTOR) != Some(start) || u64::from(packed) > 2 * self.header.grain {
                return Err(corrupt("a grain is not the one that it should be"));
            }
            let mut bytes = vec![0; usize::try_from(packed).map_err(|_| corrupt("impossible sizes"))?];
            self.file.read_exact_at(&mut bytes, place + 12).map_err(unreadable)?;
            let grain = usize::try_from(self.header.grain).map_err(|_| corrupt("impossible sizes"))?;
            let mut data = inflate::decompress_to_vec_zlib_with_limit(&bytes, grain)
                .map_err(|_| corrupt("a grain cannot be decompressed"))?;
            // The last one of a disk may be cut short.
            data.resize(grain, 0);
            self.grain = Some((start, data));
        }
        Ok(self.grain.as_ref().map_or(&[], |(_, data)| data))
    }
}

/// Refuses what needs other files.
fn check_descriptor(file: &File, (offset, length): (u64, u64)) -> Result<(), ImageError> {
    if offset == 0 {
        return Err(ImageError::Unsupported(Format::Vmdk, "its descriptor in another file"));
    }
    let length = usize::try_from(length.min(MAX_DESCRIPTOR)).map_err(|_| corrupt("impossible sizes"))?;
    let mut bytes = vec![0; length];
    let read = read_some(file, &mut bytes, offset).map_err(unreadable)?;
    let text = String::from_utf8_lossy(&bytes[..read]);
    let value = |key: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        let found = lines.find(|(name, _)| name.trim().eq_ignore_ascii_case(key));
        found.map(|(_, value)| value.trim_matches(|c: char| c.is_whitespace() || c == '"' || c == '\0'))
    };
    if value("parentCID").is_some_and(|parent| !parent.eq_ignore_ascii_case("ffffffff")) {
        return Err(ImageError::Unsupported(Format::Vmdk, "a parent"));
    }
    match value("createType") {
        Some("monolithicSparse" | "streamOptimized") => Ok(()),
        _ => Err(ImageError::Unsupported(Format::Vmdk, "its data in other files")),
    }
}

impl Source for Vmdk {
    fn size_bytes(&self) -> u64 {
        self.header.size
    }

    fn look(&mut self, offset: u64, limit: u64) -> Result<(Content, u64), ImageError> {
        let mut length = 0;
        let mut content = None;
        while length < limit {
            let at = offset + length;
            let here = if self.place(at)?.is_some() { Content::Data } else { Content::Zero };
            if content.is_some_and(|content| content != here) {
                break;
            }
            content = Some(here);
            length += self.header.grain - at % self.header.grain;
        }
        Ok((content.unwrap_or(Content::Zero), length.min(limit)))
    }

    fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let within = at % self.header.grain;
            let left = usize::try_from(self.header.grain - within).unwrap_or(usize::MAX);
            let take = left.min(buffer.len() - done);
            let part = &mut buffer[done..done + take];
            match self.place(at)? {
                None => part.fill(0),
                Some(place) if self.header.is_compressed() => {
                    let within = usize::try_from(within).unwrap_or(usize::MAX);
                    let data = self.inflate(at, place)?;
                    let data = data.get(within..within + take);
                    part.copy_from_slice(data.ok_or(corrupt("a grain is too short"))?);
                }
                Some(place) => self.file.read_exact_at(part, place + within).map_err(unreadable)?,
            }
            done += take;
        }
        Ok(())
    }
}
