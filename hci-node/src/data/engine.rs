//! The running data plane of one node: meshes, storage and overlay, and the lease that lets them serve.
//!
//! Invariants: nothing is served before the first lease and after the last one ran out (storage then lets I/O wait,
//! the overlay goes silent); a configuration is applied whole, one after the other; a disk is handed to storage only
//! when it is there and carries its own id.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use netfabric::{
    mesh::{Class, Mesh, MeshConfig, MeshError},
    overlay::{Fencing, OverlayError},
    pki::Identity,
    rpc::{ErrorCode, MAX_BULK, RpcError},
};
use parking_lot::Mutex;
use storage::{
    MeshTransport, Storage, StorageError, StorageOptions, Timing,
    config::{DiskConfig, StorageConfig},
    ids::{ByteSize, DiskId, VolumeId},
    status::{DiskHealth, DiskStatus, DiskUsage, Handover, ScrubStatus},
};
use tokio::sync::watch;

use super::{
    backends,
    disks::{keyring::Keyring, prepare, smart::watch::SmartWatch},
    frames::Frames,
    metrics,
    protocol::{
        CopyVolume, DataConfig, DataInstance, DeleteParts, HandOver, LeaseState, MonotonicTime, Observed,
        Readiness,
    },
    server::{blocking, chain},
    shard::Shard,
    uplink::Uplink,
};
use crate::{files::remove_if_there, paths::NodePaths, state};

/// How often a disk that is not there is looked for again.
const RETRY_DISKS: Duration = Duration::from_secs(5);
/// One step of a copy between volumes.
const COPY_STEP: u64 = 4 << 20;
/// The unit in which a copy leaves out zeroes.
const COPY_GRAIN: usize = 64 << 10;

/// Where and how the data plane listens.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Paths of the node.
    pub paths: NodePaths,
    /// Storage mesh.
    pub listen_storage: SocketAddr,
    /// Frames mesh.
    pub listen_frames: SocketAddr,
    /// MTU of the links between nodes; read from the interface when none.
    pub link_mtu: Option<u16>,
}

/// Why the data plane cannot start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// A mesh cannot start.
    #[error("the {class} mesh does not start")]
    Mesh {
        /// Which.
        class: Class,
        /// Why.
        source: MeshError,
    },
    /// A thread that moves guests' data cannot start.
    #[error("a thread that moves guests' data does not start")]
    Thread(#[source] std::io::Error),
    /// Storage cannot start.
    #[error("storage does not start")]
    Storage(#[from] StorageError),
    /// The overlay cannot start.
    #[error("the overlay does not start")]
    Overlay(#[from] OverlayError),
}

/// The running data plane.
pub(crate) struct Engine {
    instance: DataInstance,
    paths: NodePaths,
    shard: Shard,
    storage: Storage,
    storage_mesh: Mesh,
    frames: Frames,
    lease: watch::Sender<Option<MonotonicTime>>,
    /// Held while a configuration is applied.
    applying: tokio::sync::Mutex<()>,
    applied: Mutex<Applied>,
    smart: SmartWatch,
    /// Tells storage of peers that come and go.
    binding: tokio::task::AbortHandle,
}

#[derive(Default)]
struct Applied {
    config: Option<DataConfig>,
    /// Disks that were found with their marker since this process started.
    present: BTreeSet<DiskId>,
    /// Disks that were not, and why.
    missing: BTreeMap<DiskId, String>,
}

impl Engine {
    /// Starts meshes, storage and overlay. They serve nobody until there is a lease.
    pub(crate) async fn start(
        instance: DataInstance,
        identity: Identity,
        options: &EngineOptions,
        uplink: Uplink,
    ) -> Result<Arc<Self>, StartError> {
        let node = identity.node();
        let mesh_config =
            |class, listen| MeshConfig { link_mtu: options.link_mtu, ..MeshConfig::new(class, listen) };
        let shard = Shard::start("storage").map_err(StartError::Thread)?;
        let transport = MeshTransport::new();
        let keyring = Keyring::new(options.paths.identity());
        let storage_options = StorageOptions {
            node,
            state_dir: options.paths.data(),
            timing: Timing::default(),
            open_store: storage::disk_stores(Arc::new(move |disk, salt| keyring.key(disk, salt))),
            start_target: backends::target_starter(&options.paths, &shard),
            poll: shard.poll().clone(),
        };
        let config = mesh_config(Class::Storage, options.listen_storage);
        let mesh_identity = identity.clone();
        let started = shard.run(async move {
            let storage = Storage::start(storage_options, transport.clone(), Arc::new(uplink)).await?;
            let mesh = Mesh::start(mesh_identity, config, storage.rpc_handler())
                .await
                .map_err(|source| StartError::Mesh { class: Class::Storage, source })?;
            let binding = tokio::spawn(transport.bind(mesh.clone()));
            Ok::<_, StartError>((storage, mesh, binding))
        });
        let vanished = |error| StartError::Thread(std::io::Error::other(error));
        let (storage, storage_mesh, binding) = started.await.map_err(vanished)??;
        let frames = Frames::start(identity, mesh_config(Class::Frames, options.listen_frames)).await?;
        Ok(Arc::new(Self {
            instance,
            paths: options.paths.clone(),
            shard,
            storage,
            storage_mesh,
            frames,
            lease: watch::Sender::new(None),
            applying: tokio::sync::Mutex::default(),
            applied: Mutex::default(),
            smart: SmartWatch::default(),
            binding: binding.abort_handle(),
        }))
    }

    /// Watches the lease and the disks, without end.
    pub(crate) async fn watch(&self) {
        let disks = || self.disks_here();
        tokio::join!(self.watch_lease(), self.watch_disks(), self.smart.run(disks));
    }

    /// Closes the meshes, ends the threads and lets go of the disks. Nothing is served afterwards.
    pub(crate) async fn close(&self) {
        self.binding.abort();
        self.storage_mesh.close().await;
        self.shard.stop().await;
        let storage = self.storage.clone();
        // What is there to be told of it went with the meshes.
        let _ = tokio::task::spawn_blocking(move || storage.abandon()).await;
        self.frames.stop().await;
    }

    pub(crate) fn renew_lease(&self, until: MonotonicTime) {
        let remaining = until.remaining();
        if !remaining.is_zero() {
            self.storage.renew_lease(remaining);
        }
        self.lease.send_replace(Some(until));
    }

    fn lease_state(&self) -> LeaseState {
        match *self.lease.borrow() {
            Some(until) if !until.remaining().is_zero() => LeaseState::Held,
            _ => LeaseState::Lapsed,
        }
    }

    /// Opens the overlay while the lease holds. Storage watches its own copy of the lease.
    async fn watch_lease(&self) {
        let mut lease = self.lease.subscribe();
        loop {
            let remaining = (*lease.borrow_and_update()).map_or(Duration::ZERO, MonotonicTime::remaining);
            if remaining.is_zero() {
                self.frames.overlay().set_fenced(Fencing::Fenced);
                if lease.changed().await.is_err() {
                    return;
                }
                continue;
            }
            self.frames.overlay().set_fenced(Fencing::Open);
            tokio::select! {
                changed = lease.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(remaining) => {
                    if self.lease_state() == LeaseState::Lapsed {
                        tracing::warn!("the lease ran out: guests' I/O waits and ports are silent");
                    }
                }
            }
        }
    }

    /// The disks of the pool that are there, by their links.
    fn disks_here(&self) -> BTreeMap<DiskId, PathBuf> {
        let applied = self.applied.lock();
        applied.present.iter().map(|disk| (*disk, self.paths.disk(state::DiskId(disk.0)))).collect()
    }

    async fn watch_disks(&self) {
        loop {
            tokio::time::sleep(RETRY_DISKS).await;
            let _applying = self.applying.lock().await;
            let config = {
                let applied = self.applied.lock();
                if applied.missing.is_empty() { None } else { applied.config.clone() }
            };
            if let Some(config) = config
                && let Err(error) = self.apply_storage(&config.storage).await
            {
                tracing::warn!(%error, "cannot take up a disk that came back");
            }
        }
    }

    /// Converges to a configuration.
    pub(crate) async fn apply(&self, config: DataConfig) -> Result<(), RpcError> {
        let _applying = self.applying.lock().await;
        let (storage, frames) = config
            .peers
            .iter()
            .map(|peer| ((peer.node, peer.storage), (peer.node, peer.frames)))
            .unzip::<_, _, BTreeMap<_, _>, BTreeMap<_, _>>();
        {
            let _on_its_thread = self.shard.enter();
            self.storage_mesh.set_peers(storage);
        }
        self.frames.set_peers(frames);
        // Each part is tried even when the other fails: a bad port must not keep volumes closed.
        for port in &config.overlay.ports {
            if let Err(error) = super::make_socket_directory(&port.socket) {
                tracing::warn!(socket = %port.socket.display(), %error, "no directory for a port's socket");
            }
        }
        let overlay = self.frames.overlay().apply(&config.overlay);
        let storage = self.apply_storage(&config.storage).await;
        let failed =
            |what: &str, error: String| RpcError::new(ErrorCode::Internal, format!("{what}: {error}"));
        overlay.map_err(|error| failed("overlay", chain(&error)))?;
        storage?;
        tracing::debug!(revision = config.revision, "applied a configuration");
        self.applied.lock().config = Some(config);
        Ok(())
    }

    async fn apply_storage(&self, config: &StorageConfig) -> Result<(), RpcError> {
        let known = self.applied.lock().present.clone();
        let wanted = config.disks.clone();
        let paths = self.paths.clone();
        let (present, missing) = blocking(move || look_for(&wanted, known, &paths)).await?;
        let disks = config.disks.iter().filter(|disk| present.contains(&disk.id)).cloned().collect();
        let here = StorageConfig { disks, volumes: config.volumes.clone(), standby: config.standby.clone() };
        {
            let mut applied = self.applied.lock();
            applied.present = present;
            applied.missing = missing;
        }
        let storage = self.storage.clone();
        // On the shard, as are the coordinators and stores that it starts.
        let applied = self.shard.run(async move { storage.apply(here).await }).await;
        let ended = |error| RpcError::new(ErrorCode::Unavailable, format!("storage has ended: {error}"));
        applied.map_err(ended)?.map_err(|error| storage_error(&error))
    }

    pub(crate) fn observed(&self) -> Observed {
        let mut storage = self.storage.status();
        let applied = self.applied.lock();
        storage.disks.retain(|disk| !applied.missing.contains_key(&disk.id));
        storage.disks.extend(applied.missing.iter().map(|(disk, why)| DiskStatus {
            id: *disk,
            usage: DiskUsage { used: ByteSize(0), total: ByteSize(0) },
            health: DiskHealth::Failed(why.clone()),
            scrub: ScrubStatus::default(),
            volumes: Vec::new(),
        }));
        Observed {
            instance: self.instance,
            revision: applied.config.as_ref().map(|config| config.revision),
            lease: self.lease_state(),
            readiness: Readiness::Ready,
            storage,
            smart: self.smart.said(),
        }
    }

    pub(crate) fn metrics(&self) -> String {
        metrics::text(&self.storage, self.frames.overlay(), &[&self.storage_mesh, self.frames.mesh()])
    }

    pub(crate) async fn read(&self, volume: VolumeId, offset: u64, length: u64) -> Result<Bytes, RpcError> {
        self.storage.read(volume, offset, length).await.map_err(|error| storage_error(&error))
    }

    pub(crate) async fn write(&self, volume: VolumeId, offset: u64, data: Bytes) -> Result<(), RpcError> {
        self.storage.write(volume, offset, data).await.map_err(|error| storage_error(&error))
    }

    pub(crate) async fn flush(&self, volume: VolumeId) -> Result<(), RpcError> {
        self.storage.flush(volume).await.map_err(|error| storage_error(&error))
    }

    pub(crate) async fn delete(&self, volume: VolumeId) -> Result<(), RpcError> {
        self.storage.delete_volume(volume).await.map_err(|error| storage_error(&error))?;
        remove_if_there(&self.paths.inflight_of(state::VolumeId(volume.0)))
            .map_err(|error| RpcError::new(ErrorCode::Internal, format!("cannot forget requests: {error}")))
    }

    pub(crate) async fn delete_parts(&self, call: &DeleteParts) -> Result<(), RpcError> {
        let deleted = self.storage.delete_parts(call.disk, &call.parts).await;
        deleted.map_err(|error| storage_error(&error))
    }

    pub(crate) async fn hand_over(&self, call: HandOver) -> Result<Handover, RpcError> {
        let storage = self.storage.clone();
        let closed =
            self.shard.run(async move { storage.hand_over(call.volume, call.generation).await }).await;
        let ended = |error| RpcError::new(ErrorCode::Unavailable, format!("storage has ended: {error}"));
        closed.map_err(ended)?.map_err(|error| storage_error(&error))
    }

    pub(crate) async fn copy(&self, range: CopyVolume) -> Result<u64, RpcError> {
        let end = range
            .offset
            .checked_add(range.length)
            .ok_or_else(|| RpcError::new(ErrorCode::Malformed, "the range overflows"))?;
        let (mut at, mut written) = (range.offset, 0);
        while at < end {
            let step = COPY_STEP.min(end - at).min(MAX_BULK as u64);
            let data = self.read(range.source, at, step).await?;
            for (start, piece) in pieces_to_copy(&data) {
                written += piece.len() as u64;
                self.write(range.target, at + start as u64, piece).await?;
            }
            at += step;
        }
        Ok(written)
    }
}

/// The parts of `data` that are not zero, as long runs of whole grains, with their offsets.
fn pieces_to_copy(data: &Bytes) -> Vec<(usize, Bytes)> {
    let mut pieces: Vec<(usize, usize)> = Vec::new();
    for start in (0..data.len()).step_by(COPY_GRAIN) {
        let end = data.len().min(start + COPY_GRAIN);
        if data[start..end].iter().all(|byte| *byte == 0) {
            continue;
        }
        match pieces.last_mut() {
            Some((_, last_end)) if *last_end == start => *last_end = end,
            _ => pieces.push((start, end)),
        }
    }
    pieces.into_iter().map(|(start, end)| (start, data.slice(start..end))).collect()
}

/// Which of the wanted disks are there. Those known before are not looked at again: when one breaks, storage sees it.
fn look_for(
    wanted: &[DiskConfig],
    known: BTreeSet<DiskId>,
    paths: &NodePaths,
) -> (BTreeSet<DiskId>, BTreeMap<DiskId, String>) {
    let (mut present, mut missing) = (BTreeSet::new(), BTreeMap::new());
    for disk in wanted {
        let link: PathBuf = paths.disk(state::DiskId(disk.id.0));
        if known.contains(&disk.id) {
            present.insert(disk.id);
            continue;
        }
        match prepare::reestablish(disk.id, &disk.path, &link) {
            Ok(()) => {
                present.insert(disk.id);
            }
            Err(error) => {
                tracing::warn!(disk = %disk.id, error = chain(&error), "a disk of the pool is not there");
                missing.insert(disk.id, chain(&error));
            }
        }
    }
    (present, missing)
}

fn storage_error(error: &StorageError) -> RpcError {
    RpcError::new(ErrorCode::Unavailable, chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_copied_and_zeroes_make_the_whole(
            grains in proptest::collection::vec(0_u8..3, 0..12),
            tail in 0_usize..COPY_GRAIN,
        ) {
            let mut data: Vec<u8> = grains.iter().flat_map(|byte| vec![*byte; COPY_GRAIN]).collect();
            data.extend(vec![1; tail]);
            let data = Bytes::from(data);
            let mut copy = vec![0; data.len()];
            let mut last_end = 0;
            for (start, piece) in pieces_to_copy(&data) {
                prop_assert!(start >= last_end && !piece.is_empty());
                last_end = start + piece.len();
                copy[start..last_end].copy_from_slice(&piece);
            }
            prop_assert_eq!(Bytes::from(copy), data);
        }
    }
}
