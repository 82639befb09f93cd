//! Measures a volume of three replicas beside the raw medium, in one run: random 4 KiB reads and writes at queue depth
//! 1 and 32, and 1 MiB throughput. Prints a table; writes `storage.json` into the folder that is its argument (default
//! `target/bench`).
//!
//! The three nodes' storage runs in this process, each on a runtime of its own, with plain stores on tmpfs and real QUIC
//! meshes over the loopback; the client drives the vhost-user-blk socket as a VM would. Both targets share all cores, so
//! only the ratio of rows within one run says something. tmpfs makes syncing free: what is compared is software.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use futures_util::future::BoxFuture;
use hci_tests::blkclient::{BlkClient, LoadReport, Op, Options};
use netfabric::NodeId;
use netfabric::mesh::{Class, Mesh, MeshConfig};
use netfabric::pki::{ClusterCa, Identity, NodeKey};
use serde_json::{Value, json};
use storage::config::{
    Access, CleanState, DiskConfig, Durability, ReplicaConfig, ReplicaState, SegmentConfig, VolumeConfig,
};
use storage::control::{CommitError, ControlPlane};
use storage::ids::{ByteSize, DiskId, Generation, SegmentIndex, VolumeId};
use storage::status::VolumeState;
use storage::target::{self, Target, TargetOptions};
use storage::{MeshTransport, Storage, StorageConfig, StorageOptions, Timing, plain_stores};

const VOLUME_BYTES: u64 = 256 << 20;
const RUN: Duration = Duration::from_secs(3);
const LIMIT: Duration = Duration::from_secs(60);
const LARGE: u32 = 1 << 20;
const SMALL: u32 = 4096;

#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
}

/// One row's load.
#[derive(Clone, Copy)]
struct Workload {
    name: &'static str,
    kind: Kind,
    bytes: u32,
    depth: u16,
}

const WORKLOADS: [Workload; 6] = [
    Workload { name: "randwrite 4 KiB, depth 1", kind: Kind::Write, bytes: SMALL, depth: 1 },
    Workload { name: "randread 4 KiB, depth 1", kind: Kind::Read, bytes: SMALL, depth: 1 },
    Workload { name: "randwrite 4 KiB, depth 32", kind: Kind::Write, bytes: SMALL, depth: 32 },
    Workload { name: "randread 4 KiB, depth 32", kind: Kind::Read, bytes: SMALL, depth: 32 },
    Workload { name: "write 1 MiB, depth 4", kind: Kind::Write, bytes: LARGE, depth: 4 },
    Workload { name: "read 1 MiB, depth 4", kind: Kind::Read, bytes: LARGE, depth: 4 },
];

fn main() -> Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "target/bench".to_owned());
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder}"))?;
    let medium = tempfile::Builder::new()
        .prefix("hci-bench-")
        .tempdir_in("/dev/shm")
        .context("no tmpfs at /dev/shm")?;
    let mut rows = Vec::new();
    println!(
        "{:<16} {:<28} {:>10} {:>9} {:>9} {:>9} {:>9}",
        "target", "workload", "iops", "mean us", "p50 us", "p99 us", "MB/s"
    );
    for workload in WORKLOADS {
        rows.push(row("raw", workload, &raw(medium.path(), workload)?));
    }
    let (runtimes, nodes, socket) = cluster(medium.path())?;
    for workload in WORKLOADS {
        rows.push(row("volume, 3 copies", workload, &volume(&socket, workload)?));
    }
    drop(nodes);
    for runtime in runtimes {
        runtime.shutdown_background();
    }
    let file = Path::new(&folder).join("storage.json");
    fs::write(&file, serde_json::to_string_pretty(&rows)? + "\n")?;
    println!("\nwritten to {}", file.display());
    Ok(())
}

fn row(target: &str, workload: Workload, report: &LoadReport) -> Value {
    let us = |duration: Duration| duration.as_secs_f64() * 1e6;
    let (iops, mean) = (report.rate(), us(report.mean()));
    let (p50, p99) = (us(report.percentile(0.5)), us(report.percentile(0.99)));
    let mb = iops * f64::from(workload.bytes) / 1e6;
    println!("{target:<16} {:<28} {iops:>10.0} {mean:>9.1} {p50:>9.1} {p99:>9.1} {mb:>9.1}", workload.name);
    json!({
        "target": target, "workload": workload.name, "iops": iops, "mean_us": mean, "p50_us": p50, "p99_us": p99,
        "mb_per_s": mb,
    })
}

/// A generator of offsets that is the same in every run.
struct Offsets(u64);

impl Offsets {
    fn next(&mut self, bytes: u32) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % (VOLUME_BYTES / u64::from(bytes)) * u64::from(bytes)
    }
}

/// The same load on a file of the medium: as many threads as the depth, each with one request at a time.
fn raw(medium: &Path, workload: Workload) -> Result<LoadReport> {
    let path = medium.join("raw");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
    if file.metadata()?.len() == 0 {
        let piece = vec![0x5a; LARGE as usize];
        for at in (0..VOLUME_BYTES).step_by(LARGE as usize) {
            file.write_all_at(&piece, at)?;
        }
    }
    let started = Instant::now();
    let latencies = std::thread::scope(|scope| {
        let file = &file;
        let workers: Vec<_> = (0..workload.depth)
            .map(|seed| {
                scope.spawn(move || -> std::io::Result<Vec<Duration>> {
                    let (mut offsets, mut latencies) = (Offsets(u64::from(seed) + 1), Vec::new());
                    let mut buffer = vec![0xa5; workload.bytes as usize];
                    while started.elapsed() < RUN {
                        let (offset, begun) = (offsets.next(workload.bytes), Instant::now());
                        match workload.kind {
                            Kind::Read => file.read_exact_at(&mut buffer, offset)?,
                            Kind::Write => file.write_all_at(&buffer, offset)?,
                        }
                        latencies.push(begun.elapsed());
                    }
                    Ok(latencies)
                })
            })
            .collect();
        let mut all = Vec::new();
        for worker in workers {
            all.extend(worker.join().map_err(|_| anyhow!("a worker of the raw load panicked"))??);
        }
        anyhow::Ok(all)
    })?;
    let mut report = LoadReport { elapsed: started.elapsed(), latencies, longest_gap: Duration::ZERO };
    report.latencies.sort_unstable();
    Ok(report)
}

fn volume(socket: &Path, workload: Workload) -> Result<LoadReport> {
    let options = Options { queues: 1, depth: workload.depth, buffer: workload.bytes, ..Options::default() };
    let mut client = BlkClient::connect(socket, options)?;
    let (mut offsets, mut tag, started) = (Offsets(1), 0, Instant::now());
    client.load(
        || {
            tag += 1;
            let offset = offsets.next(workload.bytes);
            let op = match workload.kind {
                Kind::Read => Op::Read { offset, len: workload.bytes },
                Kind::Write => Op::Write { offset, data: vec![0xa5; workload.bytes as usize] },
            };
            (started.elapsed() < RUN).then_some((tag, op))
        },
        |done| {
            ensure!(done.status == 0, "request {} ended with status {}", done.tag, done.status);
            Ok(())
        },
    )
}

/// Three nodes with a volume open on the first, for as long as they are kept, and its vhost-user-blk socket.
fn cluster(medium: &Path) -> Result<(Vec<tokio::runtime::Runtime>, Vec<Node>, PathBuf)> {
    let ca = ClusterCa::create("bench")?;
    let ids: Vec<_> = (0..3).map(|_| (NodeId::random(), DiskId::random())).collect();
    let socket = medium.join("blk.sock");
    let replicas = ids.iter().map(|(node, disk)| ReplicaConfig {
        disk: *disk,
        node: *node,
        state: ReplicaState::InSync,
    });
    let volume = VolumeConfig {
        id: VolumeId::random(),
        size: ByteSize(VOLUME_BYTES),
        generation: Generation(1),
        min_in_sync: 2,
        durability: Durability::WriteBack,
        clean: CleanState::Clean,
        segments: vec![SegmentConfig { index: SegmentIndex(0), replicas: replicas.collect() }],
        access: Access::VhostUser { socket: socket.clone() },
    };
    let mut runtimes = Vec::new();
    let mut nodes = Vec::new();
    for (index, (node, disk)) in ids.iter().enumerate() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let started = runtime.block_on(start(&medium.join(index.to_string()), &ca, *node, *disk))?;
        nodes.push(started);
        runtimes.push(runtime);
    }
    let peers: BTreeMap<_, _> = nodes.iter().map(|(_, mesh, _)| (mesh.node(), mesh.local_addr())).collect();
    for ((_, mesh, _), runtime) in nodes.iter().zip(&runtimes) {
        let _guard = runtime.enter();
        mesh.set_peers(peers.clone());
    }
    let (storage, _, disks) = nodes[0].clone();
    let config = StorageConfig { disks, volumes: vec![volume] };
    runtimes[0].block_on(async {
        tokio::time::timeout(LIMIT, storage.apply(config))
            .await
            .context("the volume did not open in time")??;
        let opened = async {
            while !socket.exists()
                || storage.status().volumes.first().is_none_or(|volume| volume.state != VolumeState::Open)
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LIMIT, opened).await.context("the volume did not open in time")
    })?;
    Ok((runtimes, nodes, socket))
}

type Node = (Storage, Mesh, Vec<DiskConfig>);

async fn start(dir: &Path, ca: &ClusterCa, id: NodeId, disk: DiskId) -> Result<Node> {
    let state_dir = dir.join("state");
    fs::create_dir_all(&state_dir)?;
    let inflight = dir.join("inflight");
    let options = StorageOptions {
        node: id,
        state_dir,
        timing: Timing::default(),
        open_store: plain_stores(),
        start_target: Arc::new(move |volume, socket, device| {
            let options = TargetOptions {
                socket,
                socket_group: None,
                inflight: inflight.clone(),
                queues: 1,
                serial: volume.to_string().chars().take(20).collect(),
                access: target::Access::ReadWrite,
            };
            let target = Target::start(options, device).map_err(|error| error.to_string())?;
            Ok(Box::new(target) as Box<dyn Send>)
        }),
    };
    let transport = MeshTransport::new();
    let storage = Storage::start(options, transport.clone(), Arc::new(NoChanges)).await?;
    let key = NodeKey::generate()?;
    let certificate = ca.issue_node(id, &key.csr("bench")?, &[])?;
    let identity = Identity::new(&key, &certificate, ca.cert_pem())?;
    let config = MeshConfig::new(Class::Storage, (std::net::Ipv4Addr::LOCALHOST, 0).into());
    let mesh = Mesh::start(identity, config, storage.rpc_handler()).await?;
    // Ends with the runtime that it runs on.
    tokio::spawn(transport.bind(mesh.clone()));
    let path = dir.join("disk");
    fs::create_dir_all(&path)?;
    let disks = vec![DiskConfig { id: disk, path }];
    storage.apply(StorageConfig { disks: disks.clone(), volumes: vec![] }).await?;
    storage.renew_lease(Duration::from_secs(3600));
    Ok((storage, mesh, disks))
}

/// No replica may leave during a benchmark: a run in which one would is refused its figures by waiting for ever, and
/// ends at the client's limit.
struct NoChanges;

impl ControlPlane for NoChanges {
    fn replicas_out(
        &self,
        _: VolumeId,
        _: Generation,
        _: DiskId,
        reason: String,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        Box::pin(async move { Err(CommitError::Unavailable(format!("no replica may leave here: {reason}"))) })
    }

    fn replica_in(
        &self,
        _: VolumeId,
        _: Generation,
        _: SegmentIndex,
        _: DiskId,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        Box::pin(async { Err(CommitError::Unavailable("no replica was out".to_owned())) })
    }

    fn opened(&self, _: VolumeId, _: Generation) -> BoxFuture<'static, Result<(), CommitError>> {
        Box::pin(async { Ok(()) })
    }

    fn closed_clean(&self, _: VolumeId, _: Generation) -> BoxFuture<'static, Result<(), CommitError>> {
        Box::pin(async { Ok(()) })
    }
}
