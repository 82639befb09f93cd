//! The storage of one node: converges disks, coordinators and targets to the configuration given by the control plane.

use crate::config::{Access, DiskConfig, StandbyConfig, StorageConfig, VolumeConfig};
use crate::control::ControlPlane;
use crate::coordinator::{Coordinator, Rim, Timing, VolumeDevice};
use crate::device::{BlockDevice, BlockError, BlockOp};
use crate::ids::{BLOCK_SIZE, ByteSize, DiskId, Generation, MAX_DEPTH, SegmentKey, VolumeId};
use crate::key::Keyring;
use crate::lease::Lease;
use crate::mesh::ReplicaHandler;
use crate::metrics::Metrics;
use crate::poll::BusyPoll;
use crate::replica::server::ReplicaServer;
use crate::scrub::Scrubber;
use crate::standby::Relay;
use crate::status::{DiskHealth, DiskStatus, DiskUsage, Handover, ScrubStatus, StorageStatus};
use crate::store::disk::{LogStore, OpenError};
use crate::store::{DiskStore, StoreError};
use crate::transport::Transport;
use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use netfabric::NodeId;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::oneshot;

/// Opens the store of a disk.
pub type StoreOpener =
    Arc<dyn Fn(DiskConfig) -> BoxFuture<'static, Result<Arc<dyn DiskStore>, StoreError>> + Send + Sync>;

/// Opens devices and files that are disk stores.
pub fn disk_stores(keyring: Keyring) -> StoreOpener {
    Arc::new(move |disk: DiskConfig| {
        let keyring = keyring.clone();
        let open = move || {
            let key = disk.key_salt.map(|salt| keyring(disk.id, salt)).transpose();
            let key = key.map_err(|source| OpenError::Io { doing: "making its key", source })?;
            LogStore::open(&disk.path, disk.id, key.as_ref())
        };
        Box::pin(async move {
            // What is in a store's log is applied first, and that takes its time.
            match tokio::task::spawn_blocking(open).await {
                Ok(Ok(store)) => Ok(Arc::new(store) as Arc<dyn DiskStore>),
                Ok(Err(error)) => Err(StoreError::Io(error.to_string())),
                Err(error) => Err(StoreError::Io(error.to_string())),
            }
        })
    })
}

/// A running target: something that offers a volume to a guest, until it is dropped.
pub type RunningTarget = Box<dyn Send>;

/// Starts a target for a volume on a socket.
pub type TargetStarter =
    Arc<dyn Fn(VolumeId, PathBuf, Arc<dyn BlockDevice>) -> Result<RunningTarget, String> + Send + Sync>;

/// What storage needs to start.
#[derive(Clone)]
pub struct StorageOptions {
    /// This node.
    pub node: NodeId,
    /// Where this process keeps what is its own (the boot epoch).
    pub state_dir: PathBuf,
    /// Deadlines and pacing.
    pub timing: Timing,
    /// How disks are opened.
    pub open_store: StoreOpener,
    /// How volumes are offered to VMs.
    pub start_target: TargetStarter,
    /// Polling of the runtime that storage runs on; whoever owns the runtime runs it.
    pub poll: Arc<BusyPoll>,
}

/// Why storage did not do what it was asked.
#[derive(Debug, Error)]
pub enum StorageError {
    /// The state directory cannot be used.
    #[error("state directory")]
    State(#[from] std::io::Error),
    /// Metrics cannot be set up.
    #[error("metrics")]
    Metrics(#[from] prometheus::Error),
    /// Parts of a configuration could not be applied; all others were.
    #[error("not applied: {}", .0.join("; "))]
    Apply(Vec<String>),
    /// The volume is not open here.
    #[error("volume {0} is not open on this node")]
    NotOpen(VolumeId),
    /// The volume is open here in another generation than the one meant.
    #[error("volume {volume} is open in generation {}, not in {}", .open.0, .wanted.0)]
    OtherGeneration {
        /// The volume.
        volume: VolumeId,
        /// The generation that it is open in.
        open: Generation,
        /// The one that was meant.
        wanted: Generation,
    },
    /// The volume's tasks ended in disorder.
    #[error("closing volume {0} was cut short")]
    CutShort(VolumeId),
    /// A request to a volume failed.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

struct OpenVolume {
    coordinator: Arc<Coordinator>,
    access: Access,
    offer: Option<Offer>,
}

/// A target on its socket, with what is between it and the volume.
struct Offer {
    socket: PathBuf,
    relay: Relay,
    _target: RunningTarget,
}

struct Shared {
    options: StorageOptions,
    rim: Rim,
    metrics: Metrics,
    disks: Mutex<BTreeMap<DiskId, OpenDisk>>,
    volumes: Mutex<BTreeMap<VolumeId, OpenVolume>>,
    /// Targets of volumes that are not open here.
    standby: Mutex<BTreeMap<VolumeId, Offer>>,
    /// One configuration at a time.
    applying: tokio::sync::Mutex<()>,
}

struct OpenDisk {
    path: PathBuf,
    /// Why it could not be opened, when it could not.
    running: Result<RunningDisk, String>,
}

struct RunningDisk {
    store: Arc<dyn DiskStore>,
    scrubber: Scrubber,
}

/// The storage of this node. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Storage {
    shared: Arc<Shared>,
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Storage").field("node", &self.shared.rim.node).finish_non_exhaustive()
    }
}

impl Storage {
    /// Starts with no disks and no volumes, on the current tokio runtime.
    pub async fn start(
        options: StorageOptions,
        transport: Arc<dyn Transport>,
        control: Arc<dyn ControlPlane>,
    ) -> Result<Self, StorageError> {
        let boot = crate::boot::next(&options.state_dir)?;
        let metrics = Metrics::new()?;
        let replicas =
            Arc::new(ReplicaServer::new(options.node, boot, crate::boot::power_epoch(), metrics.clone()));
        let rim = Rim {
            node: options.node,
            boot,
            replicas,
            transport,
            control,
            lease: Arc::new(Lease::new()),
            timing: options.timing,
        };
        tracing::info!(node = %options.node, boot = boot.0, "storage starts");
        let shared = Shared {
            options,
            rim,
            metrics,
            disks: Mutex::default(),
            volumes: Mutex::default(),
            standby: Mutex::default(),
            applying: tokio::sync::Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The replica server, to be given to the Storage mesh.
    pub fn rpc_handler(&self) -> Arc<dyn netfabric::rpc::Handler> {
        Arc::new(ReplicaHandler {
            server: self.shared.rim.replicas.clone(),
            poll: self.shared.options.poll.clone(),
        })
    }

    /// Converges to the configuration: opens and drops disks, opens, reconfigures and closes volumes. Idempotent. Opening goes on
    /// after the return (see [`Self::status`]); closing is complete. What failed is named in the error and tried again next time.
    pub async fn apply(&self, config: StorageConfig) -> Result<(), StorageError> {
        let _one_at_a_time = self.shared.applying.lock().await;
        let mut failures = self.apply_disks(&config.disks).await;
        let gone: Vec<OpenVolume> = {
            let mut volumes = self.shared.volumes.lock();
            let stays = |id: &VolumeId, open: &OpenVolume| {
                config.volumes.iter().any(|v| {
                    v.id == *id && v.generation == open.coordinator.generation() && v.access == open.access
                })
            };
            let ids: Vec<VolumeId> =
                volumes.iter().filter(|(id, open)| !stays(id, open)).map(|(id, _)| *id).collect();
            ids.into_iter().filter_map(|id| volumes.remove(&id)).collect()
        };
        join_all(gone.into_iter().map(|volume| async move {
            if volume.coordinator.closed() == Some(Handover::Clean)
                && let Some(offer) = volume.offer
            {
                // Nothing of it was cut short: it can go on with whatever comes, if anything does on its socket.
                self.shared.standby.lock().insert(volume.coordinator.id(), offer);
            } else {
                // The target first: its guest must not see requests fail that are only cut short.
                end(volume.offer).await;
            }
            volume.coordinator.close().await;
        }))
        .await;
        self.end_standby(&config).await;
        for volume in &config.volumes {
            if let Err(error) = self.apply_volume(volume) {
                failures.push(format!("volume {}: {error}", volume.id));
            }
        }
        for standby in &config.standby {
            if let Err(error) = self.apply_standby(standby) {
                failures.push(format!("volume {}, in standby: {error}", standby.id));
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(StorageError::Apply(failures)) }
    }

    /// Ends targets in standby of which the configuration knows nothing any more.
    async fn end_standby(&self, config: &StorageConfig) {
        let gone: Vec<Offer> = {
            let mut standby = self.shared.standby.lock();
            let stays = |id: VolumeId, offer: &Offer| {
                let opens = config.volumes.iter().any(|v| {
                    v.id == id && matches!(&v.access, Access::VhostUser { socket } if *socket == offer.socket)
                });
                opens || config.standby.iter().any(|s| s.id == id && s.socket == offer.socket)
            };
            standby.extract_if(.., |id, offer| !stays(*id, offer)).map(|(_, offer)| offer).collect()
        };
        join_all(gone.into_iter().map(|offer| end(Some(offer)))).await;
    }

    fn apply_standby(&self, config: &StandbyConfig) -> Result<(), String> {
        if self.shared.volumes.lock().contains_key(&config.id) {
            return Err("it is open here".to_owned());
        }
        check_size(config.size)?;
        let mut standby = self.shared.standby.lock();
        match standby.get(&config.id) {
            Some(offer) => offer.relay.resize(config.size.0),
            None => {
                standby.insert(config.id, self.offer(config.id, config.size, &config.socket)?);
            }
        }
        Ok(())
    }

    /// Starts a target whose requests wait.
    fn offer(&self, volume: VolumeId, size: ByteSize, socket: &Path) -> Result<Offer, String> {
        let relay = Relay::new(size.0);
        let device = Arc::new(relay.clone());
        let target = (self.shared.options.start_target)(volume, socket.to_owned(), device)?;
        Ok(Offer { socket: socket.to_owned(), relay, _target: target })
    }

    async fn apply_disks(&self, wanted: &[DiskConfig]) -> Vec<String> {
        let mut failures = Vec::new();
        let current: Vec<(DiskId, PathBuf, bool)> =
            self.shared.disks.lock().iter().map(|(id, d)| (*id, d.path.clone(), d.running.is_ok())).collect();
        for (id, path, _) in &current {
            if !wanted.iter().any(|w| w.id == *id && w.path == *path) {
                self.shared.rim.replicas.remove_disk(*id);
                let removed = self.shared.disks.lock().remove(id);
                if let Some(OpenDisk { running: Ok(running), .. }) = removed {
                    running.scrubber.end().await;
                }
            }
        }
        for disk in wanted {
            if current.iter().any(|(id, path, open)| *id == disk.id && *path == disk.path && *open) {
                continue;
            }
            let running = match (self.shared.options.open_store)(disk.clone()).await {
                Ok(store) => Ok(self.run_disk(disk.id, store)),
                Err(error) => {
                    tracing::error!(disk = %disk.id, path = %disk.path.display(), %error, "disk cannot be opened");
                    failures.push(format!("disk {}: {error}", disk.id));
                    Err(error.to_string())
                }
            };
            self.shared.disks.lock().insert(disk.id, OpenDisk { path: disk.path.clone(), running });
        }
        let disks = self.shared.disks.lock();
        for disk in wanted {
            if let Some(OpenDisk { running: Ok(running), .. }) = disks.get(&disk.id) {
                running.scrubber.ask(disk.scrubs);
            }
        }
        failures
    }

    fn run_disk(&self, id: DiskId, store: Arc<dyn DiskStore>) -> RunningDisk {
        let options = &self.shared.options;
        let served = self.shared.rim.replicas.add_disk(id, store.clone());
        let file = options.state_dir.join(format!("scrub-{id}.json"));
        RunningDisk { store, scrubber: Scrubber::start(id, served, options.timing.scrub, Some(file)) }
    }

    fn apply_volume(&self, config: &VolumeConfig) -> Result<(), String> {
        check(config)?;
        let mut volumes = self.shared.volumes.lock();
        let open = match volumes.get_mut(&config.id) {
            Some(open) => {
                open.coordinator.configure(config);
                open
            }
            None => {
                let metrics = self.shared.metrics.volume(config.id);
                let coordinator = Coordinator::start(config, self.shared.rim.clone(), metrics);
                let open = OpenVolume { coordinator, access: config.access.clone(), offer: None };
                volumes.entry(config.id).or_insert(open)
            }
        };
        if let (Access::VhostUser { socket }, None, None) =
            (&config.access, &open.offer, open.coordinator.closed())
        {
            let ready = self.shared.standby.lock().remove(&config.id);
            let offer = match ready {
                Some(offer) => offer,
                None => self.offer(config.id, config.size, socket)?,
            };
            offer.relay.serve(Arc::new(VolumeDevice(open.coordinator.clone())));
            open.offer = Some(offer);
        }
        Ok(())
    }

    /// Closes an open volume, clean where possible, so that another node can open it, while its target and the connection to it stay: requests
    /// that come wait. It waits for the requests before, flushes the replicas, and has the clean close recorded. Doing it again tells
    /// the same again. It stays closed until [`Self::apply`] names it in a higher generation, in standby, or not at all; after a clean
    /// handover the target then goes on, if it is wanted on the same socket.
    ///
    /// # Errors
    /// When the volume is not open, or in another generation.
    pub async fn hand_over(
        &self,
        volume: VolumeId,
        generation: Generation,
    ) -> Result<Handover, StorageError> {
        let started = Instant::now();
        let coordinator = {
            let volumes = self.shared.volumes.lock();
            let open = volumes.get(&volume).ok_or(StorageError::NotOpen(volume))?;
            let is = open.coordinator.generation();
            if is != generation {
                return Err(StorageError::OtherGeneration { volume, open: is, wanted: generation });
            }
            if let Some(offer) = &open.offer {
                offer.relay.hold();
            }
            open.coordinator.clone()
        };
        // To its end, even if the caller gives up.
        let closing = tokio::spawn(async move { coordinator.close().await });
        let handover = closing.await.map_err(|_| StorageError::CutShort(volume))?;
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(%volume, generation = generation.0, ?handover, seconds, "volume handed over");
        Ok(handover)
    }

    /// Lets volumes serve for this long from now on. Zero ends it at once: requests wait, they do not fail.
    pub fn renew_lease(&self, valid_for: Duration) {
        self.shared.rim.lease.renew(valid_for);
    }

    /// The state of all open volumes and disks.
    pub fn status(&self) -> StorageStatus {
        let volumes = self.shared.volumes.lock().values().map(|open| open.coordinator.status()).collect();
        let disks = self.shared.disks.lock();
        let disks = disks.iter().map(|(id, disk)| match &disk.running {
            Ok(RunningDisk { store, scrubber }) => DiskStatus {
                id: *id,
                usage: store.usage(),
                health: store.health(),
                scrub: scrubber.status(),
                volumes: store.held(),
            },
            Err(error) => DiskStatus {
                id: *id,
                usage: DiskUsage::default(),
                health: DiskHealth::Failed(error.clone()),
                scrub: ScrubStatus::default(),
                volumes: Vec::new(),
            },
        });
        StorageStatus { volumes, disks: disks.collect() }
    }

    /// The open volume as a block device.
    pub fn device(&self, volume: VolumeId) -> Result<Arc<dyn BlockDevice>, StorageError> {
        let volumes = self.shared.volumes.lock();
        let open = volumes.get(&volume).ok_or(StorageError::NotOpen(volume))?;
        Ok(Arc::new(VolumeDevice(open.coordinator.clone())))
    }

    /// Reads from an open volume.
    pub async fn read(&self, volume: VolumeId, offset: u64, len: u64) -> Result<Bytes, StorageError> {
        self.request(volume, BlockOp::Read { offset, len }).await
    }

    /// Writes to an open volume.
    pub async fn write(&self, volume: VolumeId, offset: u64, data: Bytes) -> Result<(), StorageError> {
        self.request(volume, BlockOp::Write { offset, data }).await.map(drop)
    }

    /// Makes an open volume's completed writes durable.
    pub async fn flush(&self, volume: VolumeId) -> Result<(), StorageError> {
        self.request(volume, BlockOp::Flush).await.map(drop)
    }

    async fn request(&self, volume: VolumeId, op: BlockOp) -> Result<Bytes, StorageError> {
        let device = self.device(volume)?;
        let (sender, receiver) = oneshot::channel();
        let done = move |result| {
            // A caller that is gone needs no answer.
            let _ = sender.send(result);
        };
        device.submit(op, Box::new(done));
        Ok(receiver.await.unwrap_or(Err(BlockError::Closed))?)
    }

    /// Removes what the disks of this node hold of a volume that no longer exists. Idempotent.
    pub async fn delete_volume(&self, volume: VolumeId) -> Result<(), StorageError> {
        Ok(self.shared.rim.replicas.delete_volume(volume).await?)
    }

    /// Removes what a disk of this node holds of segments in layers that nobody needs there any more. Idempotent.
    pub async fn delete_parts(&self, disk: DiskId, parts: &[SegmentKey]) -> Result<(), StorageError> {
        Ok(self.shared.rim.replicas.delete_parts(disk, parts).await?)
    }

    /// Metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Lets go of all volumes and disks at once, as the end of the process would: requests go unanswered, nothing is closed
    /// clean, and another process may have the disks. Blocks until the stores have ended.
    pub fn abandon(&self) {
        for (_, open) in std::mem::take(&mut *self.shared.volumes.lock()) {
            open.coordinator.kill();
        }
        drop(std::mem::take(&mut *self.shared.standby.lock()));
        for (id, disk) in std::mem::take(&mut *self.shared.disks.lock()) {
            self.shared.rim.replicas.remove_disk(id);
            if let Ok(running) = disk.running {
                running.scrubber.end_blocking();
            }
        }
    }

    /// Closes all volumes, clean where possible.
    pub async fn shutdown(&self) {
        let disks = self.shared.disks.lock().iter().map(|(id, d)| (*id, d.path.clone())).collect::<Vec<_>>();
        let disks =
            disks.into_iter().map(|(id, path)| DiskConfig { id, path, key_salt: None, scrubs: 0 }).collect();
        if let Err(error) =
            self.apply(StorageConfig { disks, volumes: Vec::new(), standby: Vec::new() }).await
        {
            tracing::warn!(%error, "while closing volumes");
        }
    }
}

/// Ends a target; its threads are waited for.
async fn end(offer: Option<Offer>) {
    if tokio::task::spawn_blocking(move || drop(offer)).await.is_err() {
        tracing::error!("a target did not end in order");
    }
}

fn check_size(ByteSize(size): ByteSize) -> Result<(), String> {
    if size == 0 || !size.is_multiple_of(BLOCK_SIZE) {
        return Err(format!("the size {size} is not a positive multiple of {BLOCK_SIZE}"));
    }
    Ok(())
}

/// What comes from outside is checked before arithmetic is done with it.
fn check(config: &VolumeConfig) -> Result<(), String> {
    check_size(config.size)?;
    let size = config.size.0;
    let segments = size.div_ceil(crate::ids::SEGMENT_SIZE);
    let complete = config.segments.len() as u64 == segments
        && config
            .segments
            .iter()
            .zip(0..)
            .all(|(segment, i)| segment.index.0 == i && !segment.replicas.is_empty());
    if config.layers.chain.is_empty() || config.layers.chain.len() > MAX_DEPTH {
        return Err(format!("{} layers are no chain", config.layers.chain.len()));
    }
    if complete { Ok(()) } else { Err(format!("{segments} segments with replicas are needed, by index")) }
}
