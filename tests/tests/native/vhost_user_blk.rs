//! The vhost-user-blk target, driven by our own client: requests, reconnects, and processes killed in the middle.

use anyhow::{Context, Result};
use hci_tests::blkclient::{BlkClient, Op, Options};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const SIZE: u64 = 64 << 20;

/// A target in a process of its own.
struct Process {
    dir: tempfile::TempDir,
    child: Child,
}

impl Process {
    fn start(hold: u64) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::File::create(dir.path().join("file"))?.set_len(SIZE)?;
        let child = spawn(dir.path(), hold)?;
        Ok(Self { dir, child })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// kill -9, and a new process.
    fn kill_and_restart(&mut self, hold: u64) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        self.child = spawn(self.dir.path(), hold)?;
        Ok(())
    }

    /// Lines of the journal: what was done to which block.
    fn journal(&self) -> Result<Vec<(String, u64)>> {
        let text = std::fs::read_to_string(self.dir.path().join("journal"))?;
        let lines = text.lines().map(|line| {
            let (kind, block) = line.split_once(' ').context("journal")?;
            Ok((kind.to_owned(), block.parse()?))
        });
        lines.collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has noticed then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &Path, hold: u64) -> Result<Child> {
    let path = |name: &str| dir.join(name).into_os_string();
    let socket = dir.join("socket");
    let before = std::fs::metadata(&socket).ok().map(|m| m.modified()).transpose()?;
    let child = Command::new(env!("CARGO_BIN_EXE_blk-target"))
        .args([path("socket"), path("record"), path("file"), path("journal")])
        .args(["2".to_owned(), hold.to_string()])
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let now = std::fs::metadata(&socket).ok().map(|m| m.modified()).transpose()?;
        if now.is_some() && now != before {
            return Ok(child);
        }
        anyhow::ensure!(Instant::now() < deadline, "no socket within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn block(block: u64, stamp: u64) -> Vec<u8> {
    (block << 32 ^ stamp).to_le_bytes().repeat(512)
}

#[test]
fn requests_do_what_they_say() -> Result<()> {
    let process = Process::start(u64::MAX)?;
    let mut client =
        BlkClient::connect(&process.socket(), Options { buffer: 1 << 20, ..Options::default() })?;
    assert_eq!(client.size()?, SIZE);
    assert_eq!(u16::from_le_bytes(client.config()?[34..36].try_into()?), 2, "queues");
    assert_eq!(client.read(SIZE - 4096, 4096)?, vec![0; 4096]);
    let data: Vec<u8> = (0..1 << 20).map(|n: u32| (n / 7) as u8).collect();
    client.write(8192, &data)?;
    client.write(512, &[7; 512])?;
    assert_eq!(client.read(8192, 1 << 20)?, data);
    assert_eq!(client.read(0, 1536)?, [vec![0; 512], vec![7; 512], vec![0; 512]].concat());
    client.flush()?;
    client.expect_ok(&Op::Discard { offset: 8192, len: 4096 })?;
    client.expect_ok(&Op::WriteZeroes { offset: 12288, len: 4096 })?;
    assert_eq!(client.read(8192, 8192)?, vec![0; 8192]);
    assert_eq!(client.call(&Op::Serial)?.data, b"0123456789abcdef0123");
    // Behind the end, over the end, an offset that overflows.
    for offset in [SIZE, SIZE - 512, u64::MAX - 511] {
        assert_eq!(client.call(&Op::Read { offset, len: 1024 })?.status, 1, "{offset}");
    }
    assert_eq!(client.call(&Op::Read { offset: 0, len: 100 })?.status, 1, "not whole sectors");
    assert_eq!(client.read(512, 512)?, [7; 512], "the queue goes on");
    Ok(())
}

#[test]
fn a_killed_process_continues_with_exactly_what_was_unfinished() -> Result<()> {
    let mut process = Process::start(10)?;
    let options = Options { queues: 1, depth: 32, ..Options::default() };
    let mut client = BlkClient::connect(&process.socket(), options)?;
    for n in 0..30 {
        client.submit(0, n, &Op::Write { offset: n * 4096, data: block(n, 1) })?;
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut answered = Vec::new();
    while answered.len() < 10 || process.journal()?.len() < 30 {
        answered.extend(client.reap(0)?.into_iter().map(|done| done.tag));
        assert!(Instant::now() < deadline, "{} answers", answered.len());
        std::thread::sleep(Duration::from_millis(5));
    }
    process.kill_and_restart(u64::MAX)?;
    while client.in_flight(0) > 0 {
        client.wait(Duration::from_millis(50))?;
        for done in client.reap(0)? {
            assert_eq!(done.status, 0);
            answered.push(done.tag);
        }
        assert!(Instant::now() < deadline + Duration::from_secs(10), "{} in flight", client.in_flight(0));
    }
    answered.sort_unstable();
    assert_eq!(answered, (0..30).collect::<Vec<_>>(), "each request is answered once");
    let journal = process.journal()?;
    let executed: Vec<u64> = journal.iter().filter(|(kind, _)| kind == "write").map(|(_, b)| *b).collect();
    assert_eq!(executed, (0..30).collect::<Vec<_>>(), "none twice, none lost, in their order");
    for n in 0..30 {
        assert_eq!(client.read(n * 4096, 4096)?, block(n, 1));
    }
    Ok(())
}

#[test]
fn a_load_survives_a_process_that_is_killed_again_and_again() -> Result<()> {
    let mut process = Process::start(u64::MAX)?;
    let mut client =
        BlkClient::connect(&process.socket(), Options { queues: 2, depth: 16, ..Options::default() })?;
    let blocks = 512u64;
    // A small generator of our own: the same load at every run.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    // What a block holds, and the blocks with a write in flight: one at a time for each.
    let latest: std::cell::RefCell<BTreeMap<u64, u64>> = std::cell::RefCell::default();
    let busy: std::cell::RefCell<BTreeSet<u64>> = std::cell::RefCell::default();
    let done = std::cell::Cell::new(0u64);
    let kills = std::cell::Cell::new(0u64);
    let total = 12_000u64;
    let mut stamp = 0;
    let report = client.load(
        || {
            if stamp >= total {
                return None;
            }
            stamp += 1;
            let at = loop {
                let at = random() % blocks;
                if busy.borrow_mut().insert(at) {
                    break at;
                }
            };
            if random() % 3 == 0 {
                let expected = latest.borrow().get(&at).copied().unwrap_or(0);
                Some((at << 32 | expected, Op::Read { offset: at * 4096, len: 4096 }))
            } else {
                latest.borrow_mut().insert(at, stamp);
                Some((at << 32, Op::Write { offset: at * 4096, data: block(at, stamp) }))
            }
        },
        |answer| {
            let at = answer.tag >> 32;
            anyhow::ensure!(answer.status == 0, "status {} for block {at}", answer.status);
            busy.borrow_mut().remove(&at);
            if !answer.data.is_empty() {
                let expected = answer.tag & 0xffff_ffff;
                let content = if expected == 0 { vec![0; 4096] } else { block(at, expected) };
                anyhow::ensure!(answer.data == content, "block {at} does not hold write {expected}");
            }
            done.set(done.get() + 1);
            if done.get().is_multiple_of(2000) && kills.get() < 5 {
                kills.set(kills.get() + 1);
                process.kill_and_restart(u64::MAX)?;
            }
            Ok(())
        },
    )?;
    assert_eq!(report.latencies.len() as u64, total);
    assert_eq!(kills.get(), 5);
    assert!(client.reconnects() >= 5);
    for (at, stamp) in latest.into_inner() {
        assert_eq!(client.read(at * 4096, 4096)?, block(at, stamp));
    }
    Ok(())
}

#[test]
fn a_new_guest_does_not_inherit_requests() -> Result<()> {
    let mut process = Process::start(0)?;
    let mut first = BlkClient::connect(&process.socket(), Options::default())?;
    first.submit(0, 0, &Op::Write { offset: 0, data: block(0, 1) })?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while process.journal()?.is_empty() {
        assert!(Instant::now() < deadline, "not submitted");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(first);
    process.kill_and_restart(u64::MAX)?;
    let mut second = BlkClient::connect(&process.socket(), Options::default())?;
    assert_eq!(second.read(0, 4096)?, vec![0; 4096]);
    assert_eq!(process.journal()?.iter().filter(|(kind, _)| kind == "write").count(), 0);
    Ok(())
}

#[test]
fn rings_can_be_reset_and_garbage_ends_its_connection_only() -> Result<()> {
    let process = Process::start(u64::MAX)?;
    for garbage in
        [&[0xffu8; 4096][..], b"GET / HTTP/1.1\r\n\r\n", &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f]]
    {
        let mut stream = UnixStream::connect(process.socket())?;
        // The target may have closed already.
        let _ = stream.write_all(garbage);
    }
    let mut client = BlkClient::connect(&process.socket(), Options::default())?;
    client.write(0, &block(0, 1))?;
    client.restart_queues()?;
    assert_eq!(client.read(0, 4096)?, block(0, 1));
    client.restart_queues()?;
    client.write(4096, &block(1, 2))?;
    assert_eq!(client.read(4096, 4096)?, block(1, 2));
    Ok(())
}
