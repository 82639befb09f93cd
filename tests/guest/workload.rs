//! What runs inside the demo's and the end-to-end tests' VMs: it writes checksummed records to its disk, flushes
//! them, says on the console which ones it had flushed, and talks to every other VM of its network.
//!
//! It is started by the guest's init after DHCP, built statically, and uses the standard library only. Every line
//! that a checker reads starts with `WL `:
//!
//! | line | meaning |
//! |---|---|
//! | `WL verify ok last=L flushed=F records=N` | at boot: all records up to F, the last flush known to the disk, are there; so are those up to L |
//! | `WL verify FAILED …` | a flushed record is missing or a record is damaged |
//! | `WL flushed S` | every record up to S was written and the disk said that the flush is done |
//! | `WL peer ADDRESS ok bytes=B` | B bytes came from that VM over TCP, with the right checksum |
//! | `WL error …` | something failed; the run is not good |
//!
//! The records are a ring: record S lies in block S modulo the ring's length, so that a checker needs no index.
//! Each record also carries the newest S that was flushed when it was written; the largest of those found at boot
//! bounds from below what must be there.

use std::alloc::{Layout, alloc_zeroed};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
/// The ring starts behind the root file system, which is at the start of the same disk.
const RING_START: u64 = 64 << 20;
const RING_BLOCKS: u64 = 2048;
const BATCH: u64 = 8;
const MAGIC: u64 = 0x4843_4957_4f52_4b31;
const O_DIRECT: i32 = 0o40000;
const PEER_PORT: u16 = 7777;
const PEER_BYTES: usize = 256 << 10;

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(disk), Some(address)) = (args.next(), args.next()) else {
        println!("WL error usage: workload DISK ADDRESS");
        return;
    };
    let pause = args.next().and_then(|ms| ms.parse().ok()).unwrap_or(200);
    let Ok(address) = address.parse::<Ipv4Addr>() else {
        println!("WL error {address} is not an IPv4 address");
        return;
    };
    std::thread::spawn(serve_peers);
    std::thread::spawn(move || visit_peers(address));
    if let Err(error) = write_for_ever(&disk, Duration::from_millis(pause)) {
        println!("WL error disk: {error}");
    }
}

/// One 4 KiB block, aligned as `O_DIRECT` wants it.
struct Buffer(&'static mut [u8]);

impl Buffer {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes, BLOCK).unwrap_or(Layout::new::<[u64; 512]>());
        // SAFETY: the layout's size is not zero; the memory is owned by this value for the life of the program, is
        // zeroed and so a valid slice of bytes, and nobody else has the pointer.
        let slice = unsafe {
            let pointer = alloc_zeroed(layout);
            assert!(!pointer.is_null(), "out of memory");
            std::slice::from_raw_parts_mut(pointer, layout.size())
        };
        Self(slice)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Record {
    sequence: u64,
    flushed: u64,
}

impl Record {
    fn fill(self, block: &mut [u8]) {
        let mut noise = self.sequence ^ MAGIC;
        for word in block.chunks_exact_mut(8).skip(4) {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&noise.to_le_bytes());
        }
        block[0..8].copy_from_slice(&MAGIC.to_le_bytes());
        block[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        block[16..24].copy_from_slice(&self.flushed.to_le_bytes());
        let sum = checksum(&block[..24]) ^ checksum(&block[32..]);
        block[24..32].copy_from_slice(&sum.to_le_bytes());
    }

    /// The record in a block; `None` when the block was never written; an error when it is damaged.
    fn read(block: &[u8]) -> Result<Option<Self>, &'static str> {
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&block[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        if word(0) != MAGIC {
            return Err("magic");
        }
        if word(24) != checksum(&block[..24]) ^ checksum(&block[32..]) {
            return Err("checksum");
        }
        Ok(Some(Self { sequence: word(8), flushed: word(16) }))
    }
}

/// FNV-1a over 64-bit words: enough to see any torn, stale or misplaced block.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(7)
    })
}

fn write_for_ever(path: &str, pause: Duration) -> std::io::Result<()> {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(path)?;
    let (last, mut flushed) = verify(&disk)?;
    let mut next = last + 1;
    let buffer = Buffer::new(BLOCK);
    loop {
        for sequence in next..next + BATCH {
            Record { sequence, flushed }.fill(buffer.0);
            disk.write_all_at(buffer.0, block_offset(sequence))?;
        }
        disk.sync_data()?;
        next += BATCH;
        flushed = next - 1;
        println!("WL flushed {flushed}");
        std::thread::sleep(pause);
    }
}

fn block_offset(sequence: u64) -> u64 {
    RING_START + (sequence % RING_BLOCKS) * BLOCK as u64
}

/// Reads the whole ring and says on the console what it found. Returns the last record without a gap before it, and
/// the last known flush.
fn verify(disk: &File) -> std::io::Result<(u64, u64)> {
    const READ_BLOCKS: usize = 128;
    let buffer = Buffer::new(BLOCK * READ_BLOCKS);
    let (mut records, mut damaged) = (Vec::new(), Vec::new());
    for start in (0..RING_BLOCKS).step_by(READ_BLOCKS) {
        disk.read_exact_at(buffer.0, RING_START + start * BLOCK as u64)?;
        for (block, number) in buffer.0.chunks_exact(BLOCK).zip(start..) {
            match Record::read(block) {
                Ok(record) => records.push(record),
                Err(why) => {
                    damaged.push(format!("block {number} has a wrong {why}"));
                    records.push(None);
                }
            }
        }
    }
    let flushed = records.iter().flatten().map(|record| record.flushed).max().unwrap_or(0);
    let oldest_kept = (flushed + 1).saturating_sub(RING_BLOCKS).max(1);
    let in_block_of = |sequence: u64| records[usize::try_from(sequence % RING_BLOCKS).unwrap_or(0)];
    for sequence in oldest_kept..=flushed {
        match in_block_of(sequence) {
            Some(record) if record.sequence >= sequence => {}
            other => damaged.push(format!(
                "record {sequence} was flushed but its block holds {:?}",
                other.map(|record| record.sequence)
            )),
        }
    }
    // Above the last known flush any subset may be there; what is there without a gap may have been flushed too.
    let whole = |sequence: &u64| in_block_of(*sequence).is_some_and(|record| record.sequence == *sequence);
    let last = (flushed + 1..).take_while(whole).last().unwrap_or(flushed);
    if damaged.is_empty() {
        println!("WL verify ok last={last} flushed={flushed} records={}", records.iter().flatten().count());
        Ok((last, flushed))
    } else {
        println!("WL verify FAILED {} problems, the first: {}", damaged.len(), damaged[0]);
        Err(std::io::Error::other("flushed data is lost or damaged"))
    }
}

fn pattern() -> Vec<u8> {
    (0..PEER_BYTES).map(|at| (at as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

fn serve_peers() {
    let listener = match TcpListener::bind((Ipv4Addr::UNSPECIFIED, PEER_PORT)) {
        Ok(listener) => listener,
        Err(error) => return println!("WL error listen: {error}"),
    };
    for mut stream in listener.incoming().flatten() {
        let _ = stream.set_write_timeout(Some(Duration::from_secs(20)));
        // A peer that went away in the middle is its own loss: it will ask again.
        let _ = stream.write_all(&pattern());
    }
}

/// Asks the first addresses of the network, over and over, as no VM is told who the others are.
fn visit_peers(own: Ipv4Addr) {
    let expected = pattern();
    let [a, b, c, own_last] = own.octets();
    loop {
        for last in (2..=9).chain(100..=109).filter(|last| *last != own_last) {
            let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, last)), PEER_PORT);
            let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_millis(1500)) else {
                continue;
            };
            let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
            let (mut got, started) = (Vec::with_capacity(PEER_BYTES), Instant::now());
            match stream.read_to_end(&mut got) {
                Ok(_) if got == expected => println!(
                    "WL peer {} ok bytes={} ms={}",
                    address.ip(),
                    got.len(),
                    started.elapsed().as_millis()
                ),
                Ok(_) => println!("WL error peer {} sent {} bytes that differ", address.ip(), got.len()),
                Err(_) => {}
            }
        }
        std::thread::sleep(Duration::from_secs(3));
    }
}
