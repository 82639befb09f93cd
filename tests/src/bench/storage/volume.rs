//! Our target: three data processes, each in a network namespace with a disk of its own, and a volume on all three.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use storage::store::Compression;
use storage::store::disk::Encryption;

use super::Medium;
use super::client::Client;
use super::usage;
use super::workload::{AREA, Content, UNDER_LOSS, WORKLOADS};
use crate::bench::Row;
use crate::native::cluster::{self, DataCluster, Disks, PATIENCE};

/// A directory gives half of its room to the disk: that is for the data, its log and its checksums.
const DISK: u64 = 3 * AREA;
/// How long the load runs while a replica is lost; the loss comes in the middle.
const LOSS: Duration = Duration::from_secs(8);

/// What is asked of the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Nothing.
    Plain,
    /// To encrypt.
    Encrypted,
    /// To compress, and what is written compresses to a little less than half.
    Compressed,
}

/// How a replica's process is lost.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Killed,
    Stopped,
}

/// How long idleness is watched, after what was begun under load has come to rest.
const IDLE: Duration = Duration::from_secs(10);
const REST: Duration = Duration::from_secs(3);

/// Measures one.
pub fn measure(hci: &Path, medium: Medium, variant: Variant) -> Result<Vec<Row>> {
    let options = cluster::Options {
        hci: Some(hci.to_owned()),
        mtu: 9000,
        disks: match medium {
            Medium::Memory => Disks::Memory(vec![DISK; 3]),
            Medium::Disk => Disks::Temporary,
        },
        encryption: match variant {
            Variant::Encrypted => Encryption::Aes256Xts,
            Variant::Plain | Variant::Compressed => Encryption::None,
        },
        volume_bytes: AREA,
        compression: match variant {
            Variant::Compressed => Compression::Lz4,
            Variant::Plain | Variant::Encrypted => Compression::Off,
        },
        ..Default::default()
    };
    let mut cluster = DataCluster::start(&options)?;
    cluster.open(0)?;
    let (target, content) = match variant {
        Variant::Plain => (format!("volume, {}", medium.name()), Content::Random),
        Variant::Encrypted => (format!("volume on encrypted disks, {}", medium.name()), Content::Random),
        Variant::Compressed => (format!("volume, compressed, {}", medium.name()), Content::Halves),
    };
    let rows = on_cluster(&target, content, &mut cluster);
    rows.with_context(|| cluster.logs())
}

fn on_cluster(target: &str, content: Content, cluster: &mut DataCluster) -> Result<Vec<Row>> {
    let mut client = Client::connect(&cluster.socket(0), content)?;
    client.fill()?;
    let pids = cluster.pids();
    let mut rows = Vec::new();
    for workload in WORKLOADS {
        eprintln!("  {target}: {}", workload.name);
        rows.push(client.measure(workload, &pids)?.row(target, workload));
    }
    rows.push(Row::new(target, "idle", vec![("cpu_percent", idle(&pids)?)]));
    let in_sync = cluster.record().lock().in_sync();
    ensure!(in_sync == 3, "only {in_sync} replicas are in sync at the end: these are no figures of three");
    // The socket serves one client at a time.
    drop(client);
    for (loss, name) in [
        (Loss::Killed, "4 KiB random write, depth 8, a replica is killed"),
        (Loss::Stopped, "4 KiB random write, depth 8, a replica is stopped"),
    ] {
        let gap = longest_gap(cluster, content, loss)?;
        rows.push(Row::new(target, name, vec![("gap_s", gap.as_secs_f64())]));
    }
    Ok(rows)
}

/// Percent of one processor that the busiest process takes while nobody asks for anything.
fn idle(pids: &[u32]) -> Result<f64> {
    let used = || pids.iter().map(|pid| usage::cpu(&[*pid])).collect::<Result<Vec<_>>>();
    std::thread::sleep(REST);
    let before = used()?;
    std::thread::sleep(IDLE);
    let busiest = used()?.into_iter().zip(before).map(|(after, before)| after - before).max();
    Ok(busiest.unwrap_or_default().as_secs_f64() / IDLE.as_secs_f64() * 100.0)
}

fn longest_gap(cluster: &mut DataCluster, content: Content, loss: Loss) -> Result<Duration> {
    let socket = cluster.socket(0);
    let load =
        std::thread::spawn(move || Client::connect(&socket, content)?.measure_for(UNDER_LOSS, &[], LOSS));
    std::thread::sleep(LOSS / 4);
    let lost = Pid::from_raw(i32::try_from(cluster.pids()[2])?);
    match loss {
        Loss::Killed => cluster.kill(&[2])?,
        Loss::Stopped => kill(lost, Signal::SIGSTOP)?,
    }
    let measured = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
    match loss {
        Loss::Killed => cluster.start_node(2)?,
        Loss::Stopped => kill(lost, Signal::SIGCONT)?,
    }
    cluster.wait_in_sync().with_context(|| format!("the lost replica is not back within {PATIENCE:?}"))?;
    Ok(measured.longest_gap)
}
