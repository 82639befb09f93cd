//! The replication protocol in a simulated cluster: coordinators and replica servers run unmodified over a simulated network, clock,
//! disks and control plane, while nodes crash, lose power, are cut off and come back.
//!
//! Replicas are stored by a model of a disk, or by the real store on a simulated medium (see `media`).
//!
//! Everything random comes from one seed; time is tokio's paused clock on one thread. So a seed is a run: a failure prints the seed, and
//! `STORAGE_SIM_SEED=<seed> cargo test -p storage sim::invariants` plays it again, and with `RUST_LOG=debug` tells what happened.
//! `STORAGE_SIM_SEEDS=<count>` changes how many are run, `STORAGE_SIM_FROM=<seed>` from which on.
//!
//! | module | it is |
//! |---|---|
//! | `dice` | seeded randomness |
//! | `media` | what replicas are stored on: the model below or the real store |
//! | `disk` | a model of a disk with a volatile cache |
//! | `net` | the network |
//! | `flaws` | planted bugs, which the checker must find |
//! | `raft` | the control plane |
//! | `cluster` | nodes, faults, what the control plane does |
//! | `client` | the workload |
//! | `history` | which results are possible (S1, S2, S5) |
//! | `snapshots` | snapshots, and what each must read |
//! | `scripted` | single stories with exact expectations |

mod client;
mod cluster;
pub(crate) mod dice;
mod disk;
mod flaws;
mod history;
mod media;
mod net;
mod raft;
mod scripted;
mod snapshots;

use crate::config::Durability;
use crate::ids::{DiskId, LayerRef, SegmentKey};
use crate::store::Compression;
use cluster::{Cluster, NODES, Setup};
use dice::Dice;
use flaws::{FLAWS, Flaw};
use media::Kind;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Seeds of a normal run.
const SEEDS: u64 = 40;
/// The same with the real store, which takes longer.
const SEEDS_ON_STORES: u64 = 12;
/// Runs that found something once, whatever the count. 5686: a commit that took a replica out was not answered, the replica came back,
/// and stayed out of the set for ever. 13376: the same with a commit that was to put one in, while the volume opened again. 19326: a layer was
/// merged and given up although what was merged had been lost with the power, unflushed, before the volume opened again; and a read whose
/// first part had seen a write that was lost then.
const ONCE_FAILED: [u64; 3] = [5686, 13376, 19326];
/// Seeds within which a planted bug must be found.
const FLAW_SEEDS: u64 = 60;
/// How long faults go on, in simulated time.
const FAULTS: Duration = Duration::from_secs(8);
/// Everything must be well again within this time after the last fault.
const RECOVERY: Duration = Duration::from_secs(90);

/// Runs a future in simulated time.
fn simulate<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
        .block_on(future)
}

/// What a run did, to see that it tests something.
#[derive(Debug, Default)]
struct Tally {
    writes: u64,
    reads: u64,
    flushes: u64,
    losses: u64,
    openings: u64,
    snapshots: u64,
    merges: u64,
    restores: u64,
}

/// One random run. Returns what went wrong.
async fn run(seed: u64, disks: Kind) -> Result<Tally, Vec<String>> {
    run_with(seed, disks, None).await
}

async fn run_with(seed: u64, disks: Kind, flaw: Option<Flaw>) -> Result<Tally, Vec<String>> {
    let dice = Dice::new(seed);
    let setup = Setup {
        min_in_sync: 1 + dice.below(2) as u8,
        durability: if dice.percent(20) { Durability::WriteThrough } else { Durability::WriteBack },
        compression: if dice.percent(40) { Compression::Lz4 } else { Compression::Off },
        disks,
    };
    let mut cluster = Cluster::new(dice.clone(), setup);
    if let Some(flaw) = flaw {
        cluster.network.plant(flaw);
    }
    let mut workers = JoinSet::new();
    let mut known: BTreeSet<u64> = BTreeSet::new();
    let end = Instant::now() + FAULTS;
    let mut next_fault = Instant::now() + dice.micros(1_500_000);
    let mut next_snapshot = Instant::now() + dice.micros(500_000);
    while Instant::now() < end {
        cluster.control_step();
        for (opening, device) in cluster.devices() {
            if known.insert(opening) {
                workers.spawn(client::watch(device.clone(), opening, cluster.history.clone(), dice.clone()));
                for _ in 0..4 {
                    workers.spawn(client::work(
                        device.clone(),
                        opening,
                        cluster.history.clone(),
                        dice.clone(),
                    ));
                }
            }
        }
        if Instant::now() >= next_snapshot {
            snapshots::check(&cluster);
            snapshots::step(&cluster);
            next_snapshot = Instant::now() + dice.micros(800_000);
        }
        if Instant::now() >= next_fault {
            fault(&mut cluster);
            next_fault = Instant::now() + dice.micros(2_000_000);
        }
        while workers.try_join_next().is_some() {}
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for n in 0..NODES {
        cluster.start(n);
    }
    cluster.network.heal();
    cluster.complete_sets();
    // Late messages arrive.
    cluster.run_until(Duration::from_secs(7), |_| false).await;
    if !cluster.run_until(RECOVERY, Cluster::is_healthy).await {
        let status = cluster.coordinator().map(|(_, c)| c.status());
        let layers = cluster.raft.record.lock().volume.layers.clone();
        let in_sync = cluster.raft.in_sync();
        return Err(vec![format!("not healthy again: {status:?}, in sync {in_sync:?}, {layers:?}")]);
    }
    workers.abort_all();
    while workers.join_next().await.is_some() {}
    finish(&mut cluster).await
}

/// Everything is read once more and the volume is closed; then the disks in sync must be equal.
async fn finish(cluster: &mut Cluster) -> Result<Tally, Vec<String>> {
    // The control plane does not run from here on.
    cluster.lease = Duration::from_secs(3600);
    cluster.control_step();
    for (opening, device) in cluster.devices() {
        if cluster.coordinator().is_some_and(|(o, _)| o == opening) {
            let checked = client::read_and_check(&device, opening, &cluster.history, client::HOT);
            if let Err(error) = checked.await {
                cluster.history.lock().violation(format!("the last read failed: {error}"));
            }
        }
    }
    if let Some((_, coordinator)) = cluster.coordinator() {
        coordinator.close().await;
    }
    snapshots::check(cluster);
    let in_sync = cluster.raft.in_sync();
    let nodes = cluster.nodes.iter().filter(|n| in_sync.contains(&n.disk_id));
    // What is late may write to a layer that is gone; nobody reads it. At the bottom zeroes may be stored or not.
    let layers = cluster.raft.record.lock().volume.layers.clone();
    let there: Vec<LayerRef> = layers.chain.iter().chain(&layers.kept).copied().collect();
    let is_bottom = |key: &SegmentKey| layers.chain.last().is_some_and(|l| l.key(key.segment) == *key);
    let mut disks: Vec<(DiskId, BTreeMap<_, _>)> = Vec::new();
    for node in nodes {
        let mut contents =
            node.disk.contents(&there).map_err(|error| vec![format!("disk {}: {error}", node.disk_id)])?;
        contents.retain(|(key, _), stored| !(is_bottom(key) && stored.data.iter().all(|byte| *byte == 0)));
        disks.push((node.disk_id, contents));
    }
    let mut history = cluster.history.lock();
    for (disk, contents) in &disks[1..] {
        for (key, stored) in contents.iter().chain(&disks[0].1) {
            let (a, b) = (contents.get(key), disks[0].1.get(key));
            if a != b {
                let versions = (a.map(|s| s.version), b.map(|s| s.version), stored.version);
                history.violation(format!("disks {disk} and {} differ in {key:?}: {versions:?}", disks[0].0));
            }
        }
    }
    if !history.violations().is_empty() {
        return Err(history.violations().to_vec());
    }
    let record = cluster.raft.record.lock();
    Ok(Tally {
        writes: history.acknowledged_writes,
        reads: history.reads,
        flushes: history.flushes,
        losses: history.losses,
        openings: record.opening,
        snapshots: record.snapshots.count,
        merges: record.snapshots.merges,
        restores: record.snapshots.restores,
    })
}

/// Something happens.
fn fault(cluster: &mut Cluster) {
    let dice = cluster.dice.clone();
    let n = dice.below(NODES as u64) as usize;
    let id = cluster.nodes[n].id;
    match dice.below(100) {
        // Crashes of the coordinator or a replica, with and without loss of the disk's cache.
        0..18 => cluster.kill(n),
        18..34 => cluster.power_cut(&[n]),
        34..40 => cluster.power_cut(&[0, 1, 2]),
        // All but one: the coordinator's, maybe, whose own replica is out of sync.
        40..42 => {
            let others: Vec<_> = (0..NODES).filter(|other| *other != n).collect();
            cluster.power_cut(&others);
        }
        // A node is cut off, in both directions or in one.
        42..52 => {
            for other in (0..NODES).filter(|o| *o != n) {
                cluster.network.cut(id, cluster.nodes[other].id);
                cluster.network.cut(cluster.nodes[other].id, id);
            }
        }
        52..58 => {
            let other = cluster.nodes[(n + 1) % NODES].id;
            if dice.percent(50) { cluster.network.cut(id, other) } else { cluster.network.cut(other, id) }
        }
        58..62 => cluster.network.set_late(1 + dice.below(5)),
        62..72 => cluster.network.heal(),
        72..84 => cluster.reshape(n),
        _ => (0..NODES).for_each(|n| cluster.start(n)),
    }
}

#[test]
fn invariants_hold_under_random_faults() {
    run_seeds(Kind::Model, SEEDS);
}

#[test]
fn invariants_hold_on_the_real_store() {
    run_seeds(Kind::Store, SEEDS_ON_STORES);
}

/// Runs the seeds that are asked for, or so many from the first on.
fn run_seeds(disks: Kind, usual: u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    if let Some(seed) = number("STORAGE_SIM_SEED") {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let told = tracing_subscriber::fmt().with_env_filter(filter).with_timer(SimulatedTime).finish();
        let _told = tracing::subscriber::set_default(told);
        let result = simulate(run(seed, disks));
        panic_on_violations(seed, &result);
        println!("seed {seed}: {result:?}");
        return;
    }
    let count = number("STORAGE_SIM_SEEDS").unwrap_or(usual);
    let from = number("STORAGE_SIM_FROM").unwrap_or(0);
    // A different set each day would make failures hard to attribute; a fixed one is what CI runs.
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get() as u64);
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..threads)
            .map(|t| {
                scope.spawn(move || {
                    let mut tallies = Vec::new();
                    for seed in (from + t..from + count).step_by(threads as usize) {
                        let result = simulate(run(seed, disks));
                        panic_on_violations(seed, &result);
                        tallies.extend(result);
                    }
                    tallies
                })
            })
            .collect();
        runs.into_iter().flat_map(|r| r.join().expect("a run failed")).collect()
    });
    let sum = |f: fn(&Tally) -> u64| tallies.iter().map(f).sum::<u64>();
    println!(
        "{count} seeds: {} openings, {} writes, {} flushes, {} sectors read, {} losses of caches, {} snapshots, {} merges, {} restores",
        sum(|t| t.openings),
        sum(|t| t.writes),
        sum(|t| t.flushes),
        sum(|t| t.reads),
        sum(|t| t.losses),
        sum(|t| t.snapshots),
        sum(|t| t.merges),
        sum(|t| t.restores)
    );
    assert!(sum(|t| t.snapshots) > count && sum(|t| t.merges) > count / 2, "too few snapshots and merges");
    assert!(sum(|t| t.writes) > count * 100, "the runs do too little to prove anything");
}

/// Times of the log of a run.
struct SimulatedTime;

impl tracing_subscriber::fmt::time::FormatTime for SimulatedTime {
    fn format_time(&self, to: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
        // The clock starts anywhere; within a run its differences mean something.
        write!(to, "{:?}", Instant::now())
    }
}

fn panic_on_violations(seed: u64, result: &Result<Tally, Vec<String>>) {
    if let Err(violations) = result {
        let shown = violations.iter().take(5).cloned().collect::<Vec<_>>().join("\n  ");
        panic!(
            "seed {seed}, {} violations:\n  {shown}\nplay again: STORAGE_SIM_SEED={seed}",
            violations.len()
        );
    }
}

#[test]
fn what_failed_once_does_not_again() {
    for seed in ONCE_FAILED {
        panic_on_violations(seed, &simulate(run(seed, Kind::Model)));
    }
}

#[test]
fn a_seed_is_a_run() {
    for disks in [Kind::Model, Kind::Store] {
        let twice: Vec<String> = (0..2).map(|_| format!("{:?}", simulate(run(7, disks)))).collect();
        assert_eq!(twice[0], twice[1]);
    }
}

/// The self-test of the checker: each planted bug is found within a few runs, by what was read or by what the disks hold at the end.
#[test]
fn planted_bugs_are_found() {
    std::thread::scope(|scope| {
        for flaw in FLAWS {
            scope.spawn(move || {
                let found = (0..FLAW_SEEDS).find(|seed| {
                    let result = simulate(run_with(*seed, Kind::Model, Some(flaw)));
                    result.is_err_and(|violations| !violations[0].starts_with("not healthy"))
                });
                match found {
                    Some(seed) => println!("{flaw:?}: found with seed {seed}"),
                    None => panic!("{flaw:?} was not found with {FLAW_SEEDS} seeds"),
                }
            });
        }
    });
}
