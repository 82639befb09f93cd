//! A volume with three replicas beside the medium that holds them.
//!
//! The volume is driven through vhost-user-blk as a VM would; the medium with fio, as one file with O_DIRECT: one copy
//! without network, checksums or a log. A volume's completed write is in the log of every replica, not yet durable, like in
//! a disk with a cache; `flush` rows make each write durable.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Row, micros};
use crate::blkclient::{BlkClient, LoadReport, MAX_DEPTH, Op, Options};
use crate::native::cluster::{self, DataCluster, Disks};
use crate::native::scratch::Directory;

/// The part of the volume, and the file, that is worked on.
const AREA: u64 = 128 << 20;
/// One measurement.
const DURATION: Duration = Duration::from_secs(2);
const SMALL: u32 = 4 << 10;
const LARGE: u32 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write,
    /// Each write followed by a flush, one at a time.
    WriteFlush,
    Read,
}

#[derive(Clone, Copy, Debug)]
struct Workload {
    name: &'static str,
    kind: Kind,
    size: u32,
    depth: u16,
}

const WORKLOADS: [Workload; 7] = [
    Workload { name: "4 KiB random write, depth 1", kind: Kind::Write, size: SMALL, depth: 1 },
    Workload { name: "4 KiB random write + flush, depth 1", kind: Kind::WriteFlush, size: SMALL, depth: 1 },
    Workload { name: "4 KiB random read, depth 1", kind: Kind::Read, size: SMALL, depth: 1 },
    Workload { name: "4 KiB random write, depth 32", kind: Kind::Write, size: SMALL, depth: 32 },
    Workload { name: "4 KiB random read, depth 32", kind: Kind::Read, size: SMALL, depth: 32 },
    Workload { name: "1 MiB write, depth 8", kind: Kind::Write, size: LARGE, depth: 8 },
    Workload { name: "1 MiB read, depth 8", kind: Kind::Read, size: LARGE, depth: 8 },
];

/// Measures in memory and on the disk that holds the folder for temporary files.
pub fn measure(hci: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (medium, disks) in [("memory", Disks::Memory(vec![1 << 30; 3])), ("disk", Disks::Temporary)] {
        let directory = Directory::new()?;
        let place = match disks {
            Disks::Memory(_) => directory.mount_memory("raw", 2 * AREA)?,
            Disks::Temporary => directory.path().to_owned(),
        };
        eprintln!("storage: the raw {medium}");
        let file = place.join("raw");
        write_all(&file)?;
        for workload in WORKLOADS {
            rows.push(raw(&format!("raw {medium}"), workload, &file)?);
        }
        drop(directory);
        eprintln!("storage: a volume with three replicas, {medium}");
        rows.extend(volume(&format!("volume, {medium}"), hci, disks)?);
    }
    Ok(rows)
}

fn volume(target: &str, hci: &Path, disks: Disks) -> Result<Vec<Row>> {
    let options = cluster::Options {
        hci: Some(hci.to_owned()),
        mtu: 9000,
        disks,
        volume_bytes: AREA,
        ..Default::default()
    };
    let mut cluster = DataCluster::start(&options)?;
    cluster.open(0)?;
    let socket = cluster.socket(0);
    let measured = (|| {
        // What was never written is not read from anywhere.
        let mut client = connect(&socket, 1, LARGE)?;
        for offset in (0..AREA).step_by(LARGE as usize) {
            client.write(offset, &pattern(LARGE, offset))?;
        }
        client.flush()?;
        drop(client);
        WORKLOADS.iter().map(|workload| on_volume(target, *workload, &socket)).collect::<Result<Vec<_>>>()
    })();
    let rows = measured.with_context(|| cluster.logs())?;
    let in_sync = cluster.record().lock().in_sync();
    ensure!(
        in_sync == 3,
        "only {in_sync} replicas are in sync at the end: these are no figures of three\n{}",
        cluster.logs()
    );
    Ok(rows)
}

fn connect(socket: &Path, depth: u16, buffer: u32) -> Result<BlkClient> {
    ensure!(depth <= MAX_DEPTH, "depth {depth}");
    BlkClient::connect(socket, Options { depth, buffer, ..Options::default() })
}

fn on_volume(target: &str, workload: Workload, socket: &Path) -> Result<Row> {
    let mut client = connect(socket, workload.depth, workload.size)?;
    let mut offsets = Offsets::new(workload.size);
    let end = Instant::now() + DURATION;
    let report = if workload.kind == Kind::WriteFlush {
        write_and_flush(&mut client, &mut offsets, end)?
    } else {
        let data = pattern(workload.size, 1);
        let next = || {
            (Instant::now() < end).then(|| {
                let offset = offsets.next();
                match workload.kind {
                    Kind::Read => (0, Op::Read { offset, len: workload.size }),
                    Kind::Write | Kind::WriteFlush => (0, Op::Write { offset, data: data.clone() }),
                }
            })
        };
        client.load(next, |done| {
            ensure!(done.status == 0, "status {}", done.status);
            Ok(())
        })?
    };
    let figures = vec![
        ("iops", report.rate()),
        ("mean_us", micros(report.mean())),
        ("p50_us", micros(report.percentile(0.50))),
        ("p99_us", micros(report.percentile(0.99))),
        ("mb_per_s", report.rate() * f64::from(workload.size) / 1e6),
    ];
    Ok(Row::new(target, workload.name, figures))
}

/// The latency of a write and its flush together.
fn write_and_flush(client: &mut BlkClient, offsets: &mut Offsets, end: Instant) -> Result<LoadReport> {
    let data = pattern(SMALL, 1);
    let started = Instant::now();
    let mut report = LoadReport::default();
    while Instant::now() < end {
        let start = Instant::now();
        client.write(offsets.next(), &data)?;
        client.flush()?;
        report.latencies.push(start.elapsed());
    }
    report.elapsed = started.elapsed();
    report.latencies.sort_unstable();
    Ok(report)
}

/// Random offsets for small requests, ascending ones for large ones.
struct Offsets {
    size: u32,
    state: u64,
}

impl Offsets {
    fn new(size: u32) -> Self {
        Self { size, state: 0x2545_f491_4f6c_dd1d }
    }

    fn next(&mut self) -> u64 {
        let pieces = AREA / u64::from(self.size);
        if self.size == LARGE {
            self.state = self.state.wrapping_add(1);
        } else {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
        }
        self.state % pieces * u64::from(self.size)
    }
}

/// Bytes that do not compress.
fn pattern(length: u32, seed: u64) -> Vec<u8> {
    let mut state = seed | 1 << 63;
    let words = (0..length / 8).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().collect()
}

/// Writes the file once: what a file system has only promised is read from nowhere.
fn write_all(file: &Path) -> Result<()> {
    let mut file = File::create(file)?;
    for offset in (0..AREA).step_by(LARGE as usize) {
        file.write_all(&pattern(LARGE, offset))?;
    }
    Ok(file.sync_all()?)
}

/// The same workload on one file, without us.
fn raw(target: &str, workload: Workload, file: &Path) -> Result<Row> {
    let kind = match (workload.kind, workload.size) {
        (Kind::Read, SMALL) => "randread",
        (Kind::Read, _) => "read",
        (Kind::Write | Kind::WriteFlush, SMALL) => "randwrite",
        (Kind::Write | Kind::WriteFlush, _) => "write",
    };
    let mut fio = Command::new("timeout");
    fio.args([
        "60",
        "fio",
        "--name=raw",
        "--output-format=json",
        "--direct=1",
        "--time_based",
        "--refill_buffers",
    ]);
    fio.arg("--filename").arg(file);
    fio.arg(format!("--size={AREA}")).arg(format!("--runtime={}", DURATION.as_secs()));
    fio.arg(format!("--rw={kind}")).arg(format!("--bs={}", workload.size));
    fio.arg(format!("--iodepth={}", workload.depth));
    // One request at a time needs no queue: it would only add a wake-up.
    fio.arg(if workload.depth == 1 { "--ioengine=psync" } else { "--ioengine=libaio" });
    if workload.kind == Kind::WriteFlush {
        fio.arg("--fdatasync=1");
    }
    let output = fio.output().context("cannot run fio; is it installed?")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "fio failed: {error}");
    let text = String::from_utf8(output.stdout)?;
    let json: Value = serde_json::from_str(text.get(text.find('{').unwrap_or(0)..).unwrap_or_default())?;
    let job = &json["jobs"][0];
    let side = &job[if workload.kind == Kind::Read { "read" } else { "write" }];
    let number = |value: &Value| value.as_f64().context("fio left out a figure");
    let latency = &side["clat_ns"];
    let sync = &job["sync"]["lat_ns"];
    // fio counts the sync apart; its percentiles do not add up, but they bound the sum well enough to compare.
    let with_sync = |name: &[&str]| {
        let of = |latency: &Value| number(name.iter().fold(latency, |value, key| &value[*key]));
        let own = of(latency)? / 1e3;
        Ok::<_, anyhow::Error>(if workload.kind == Kind::WriteFlush { own + of(sync)? / 1e3 } else { own })
    };
    let figures = vec![
        ("iops", number(&side["iops"])?),
        ("mean_us", with_sync(&["mean"])?),
        ("p50_us", with_sync(&["percentile", "50.000000"])?),
        ("p99_us", with_sync(&["percentile", "99.000000"])?),
        ("mb_per_s", number(&side["bw_bytes"])? / 1e6),
    ];
    Ok(Row::new(target, workload.name, figures))
}
