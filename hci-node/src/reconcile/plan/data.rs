//! Plans what the data process does, and what has to be committed for it.
//!
//! The rule that carries safety: **a data process serves a generation only when no other one can have served it.** Its
//! predecessor, killed a moment ago, may have had writes under way that the new one knows nothing of. So after a
//! restart every volume that was being written to is opened anew, with a higher generation, before it is served.

use std::time::Duration;

use netfabric::overlay::{ForwardEntry, NetworkConfig, OverlayConfig, PortConfig, PortStanding, Vni};
use storage::{
    config::{Access, DiskConfig, StandbyConfig, StorageConfig, VolumeConfig},
    ids::ByteSize,
    status::{DiskHealth, VolumeState},
};

use super::{Action, View, convert, lost_nodes};
use crate::{
    data::protocol::{DataConfig, NodeSecret, PeerConfig},
    reconcile::observed::DataView,
    state::{
        Cleanliness, ClusterState, Custody, DeadLayer, Disk, DiskId, DiskState, LayerRef, MigrationStage,
        Network, NodeId, Port, PortId, Retired, SegmentIndex, Vm, VmId, Volume, VolumeFill, VolumeId,
        VolumeUse,
    },
};

/// Plans the configuration, and all actions about volumes and disks. None while there is no data process.
pub fn plan(view: View<'_>, actions: &mut Vec<Action>) -> Option<DataConfig> {
    let data = view.observed.data.as_ref()?;
    plan_disks(view, data, actions);
    let mut volumes = Vec::new();
    for volume in view.state.volumes_on(view.me) {
        let access = match view.state.volume_use(volume) {
            // It let go of it, and gets it back only when its VM is seen to stay.
            VolumeUse::Guest(vm) if is_handed_over(view, vm, volume, data) => {
                let present = data.applied.iter().flat_map(|config| &config.storage.volumes);
                volumes.extend(present.filter(|there| VolumeId::from(there.id) == volume.id).cloned());
                continue;
            }
            VolumeUse::Guest(vm) => Access::VhostUser { socket: view.paths.block_socket(vm, volume.id) },
            VolumeUse::Internal => Access::Internal,
            VolumeUse::Nothing => {
                plan_close(volume, data, actions);
                continue;
            }
        };
        if may_serve(volume, data) {
            volumes.push(convert::volume_config(volume, access));
        } else {
            actions.push(open(view, volume));
        }
        if let VolumeFill::CopyOf(source) = volume.fill {
            plan_fill(view, data, volume, source, actions);
        }
    }
    plan_purges(view, data, actions);
    plan_releases(view, data, actions);
    plan_replica_purges(view, data, actions);
    plan_layers(view, data, actions);
    Some(DataConfig {
        revision: view.state.revision,
        peers: peers(view),
        storage: StorageConfig { disks: disks(view), volumes, standby: standby(view) },
        overlay: overlay(view),
    })
}

/// Whether the data process has let go of a volume for a VM that is still on its way.
fn is_handed_over(view: View<'_>, vm: VmId, volume: &Volume, data: &DataView) -> bool {
    let migration = view.state.vms.get(&vm).and_then(|vm| vm.migration);
    migration.is_some_and(|migration| migration.stage == MigrationStage::LettingGo)
        && volume.cleanliness == Cleanliness::Clean
        && matches!(status(data, volume.id), Some((_, VolumeState::Closed)))
}

/// Volumes of VMs that are about to arrive: their sockets are served before they are open here.
fn standby(view: View<'_>) -> Vec<StandbyConfig> {
    let arriving = view.state.vms_arriving(view.me);
    let disks = arriving.flat_map(|(vm, _)| vm.disks.iter().map(|disk| (vm.id, disk)));
    let volumes = disks.filter_map(|(vm, disk)| Some((vm, view.state.volumes.get(disk)?)));
    volumes
        .filter(|(_, volume)| volume.coordinator != Some(view.me))
        .map(|(vm, volume)| StandbyConfig {
            id: volume.id.into(),
            size: ByteSize(volume.size_bytes),
            socket: view.paths.block_socket(vm, volume.id),
        })
        .collect()
}

fn open(view: View<'_>, volume: &Volume) -> Action {
    Action::OpenVolume {
        volume: volume.id,
        expected: volume.generation,
        unreachable: lost_nodes(view.state).into_iter().filter(|node| *node != view.me).collect(),
    }
}

/// What the data process says about a volume: generation and state.
fn status(data: &DataView, volume: VolumeId) -> Option<(crate::state::Generation, &VolumeState)> {
    let volumes = &data.status.storage.volumes;
    let found = volumes.iter().find(|status| VolumeId::from(status.id) == volume)?;
    Some((found.generation.into(), &found.state))
}

/// Whether this instance of the data process may serve the volume's present generation.
fn may_serve(volume: &Volume, data: &DataView) -> bool {
    let granted = data.grants.get(&volume.id) == Some(&volume.generation);
    match status(data, volume.id) {
        // It let go of it for a VM that was to move and then stayed, and could not say that it had.
        Some((generation, VolumeState::Closed)) if generation == volume.generation => false,
        _ if granted => true,
        // It serves it already.
        Some((generation, state)) if generation == volume.generation => *state != VolumeState::Fenced,
        // It was raised while this instance had an older one: nobody else had it.
        Some((generation, _)) if generation < volume.generation => true,
        // Every coordinator marks the volume as unclean before it serves.
        _ => volume.cleanliness == Cleanliness::Clean,
    }
}

/// Whether the volume is open in its present generation, and configured as the state says now.
pub fn is_open(volume: &Volume, data: &DataView) -> bool {
    status(data, volume.id) == Some((volume.generation, &VolumeState::Open))
}

fn plan_close(volume: &Volume, data: &DataView, actions: &mut Vec<Action>) {
    let configured = data.applied.as_ref().is_none_or(|config| {
        config.storage.volumes.iter().any(|present| VolumeId::from(present.id) == volume.id)
    });
    let closing = matches!(status(data, volume.id), Some((_, state)) if *state != VolumeState::Closed);
    // While the data process closes it, it tells the cluster itself that all replicas are equal.
    if !configured && !closing {
        actions.push(Action::CloseVolume {
            volume: volume.id,
            generation: volume.generation,
            cleanliness: volume.cleanliness,
        });
    }
}

fn plan_fill(view: View<'_>, data: &DataView, volume: &Volume, source: VolumeId, actions: &mut Vec<Action>) {
    // The leader opens the source beside the volume when nobody else copies from it.
    let Some(source) = view.state.volumes.get(&source) else { return };
    if is_open(volume, data) && is_open(source, data) {
        actions.push(Action::FillVolume {
            volume: volume.id,
            generation: volume.generation,
            source: source.id,
            size_bytes: source.size_bytes,
        });
    }
}

fn my_disks<'a>(view: View<'a>) -> impl Iterator<Item = &'a Disk> {
    view.state.disks.values().filter(move |disk| disk.node == view.me)
}

fn disks(view: View<'_>) -> Vec<DiskConfig> {
    let prepared = my_disks(view).filter_map(|disk| disk.store.as_ref().map(|store| (disk, store)));
    let config = |(disk, store): (&Disk, &String)| DiskConfig {
        id: disk.id.into(),
        path: store.into(),
        key_salt: disk.key_salt,
        scrubs: disk.scrubs,
    };
    prepared.map(config).collect()
}

fn plan_disks(view: View<'_>, data: &DataView, actions: &mut Vec<Action>) {
    for disk in my_disks(view) {
        let health = data.status.storage.disks.iter().find(|status| status.id == disk.id.into());
        match (&disk.state, health.map(|status| &status.health)) {
            (DiskState::Preparing, _) => actions.push(Action::PrepareDisk {
                disk: disk.id,
                path: disk.path.clone().into(),
                wipe: disk.wipe,
                key_salt: disk.key_salt,
                secret: secret(view),
            }),
            (DiskState::Ready, Some(DiskHealth::Failed(reason))) => {
                actions.push(Action::ReportDisk { disk: disk.id, failed: Some(reason.clone()) });
            }
            (DiskState::Failed { .. }, Some(DiskHealth::Ok | DiskHealth::Full)) => {
                actions.push(Action::ReportDisk { disk: disk.id, failed: None });
            }
            _ => {}
        }
    }
}

/// A disk that is not prepared yet has nothing that was encrypted.
fn secret(view: View<'_>) -> NodeSecret {
    let encrypted = |disk: &Disk| disk.key_salt.is_some() && disk.state != DiskState::Preparing;
    if my_disks(view).any(encrypted) { NodeSecret::IsInUse } else { NodeSecret::MayBeMade }
}

fn works(data: &DataView, disk: &Disk) -> bool {
    let found = data.status.storage.disks.iter().find(|status| status.id == disk.id.into());
    found.is_some_and(|status| !matches!(status.health, DiskHealth::Failed(_)))
}

/// Lets copies go that have left their sets, once the data process has taken a configuration without them.
fn plan_releases(view: View<'_>, data: &DataView, actions: &mut Vec<Action>) {
    for volume in view.state.volumes_on(view.me) {
        let Some(retired) = view.state.retired.get(&volume.id) else { continue };
        let Some(applied) = applied(data, volume) else { continue };
        for (disk, retired) in retired {
            let is_held = retired.custody == Custody::Coordinator && retired.generation == volume.generation;
            let uses = |segment: &SegmentIndex| {
                let segment = applied.segments.get(segment.0 as usize);
                segment.is_some_and(|segment| {
                    segment.replicas.iter().any(|replica| replica.disk == (*disk).into())
                })
            };
            if is_held && !retired.segments.iter().any(uses) {
                actions.push(Action::ReleaseReplicas {
                    volume: volume.id,
                    generation: volume.generation,
                    disk: *disk,
                    segments: retired.segments.iter().copied().collect(),
                });
            }
        }
    }
}

/// How long the data of a copy that has left its set are kept. A request that was on its way to it then must have ended:
/// each step of one has a deadline of about three seconds at its coordinator.
pub const PURGE_DELAY: Duration = Duration::from_secs(30);

/// Removes the data of copies that have left their sets.
fn plan_replica_purges(view: View<'_>, data: &DataView, actions: &mut Vec<Action>) {
    for (volume, disk, retired) in purgeable(view.state, view.me) {
        let waited = view.observed.purgeable_for.get(&Leftover::Copies(volume, disk.id));
        if works(data, disk) && waited.is_some_and(|waited| *waited >= PURGE_DELAY) {
            let segments: Vec<_> = retired.segments.iter().take(PURGE_SEGMENTS).copied().collect();
            let parts =
                retired.layers.iter().flat_map(|layer| segments.iter().map(|segment| (*layer, *segment)));
            let parts =
                parts.filter(|(layer, segment)| !view.state.needs_part(*layer, *segment, disk.id)).collect();
            let layers = retired.layers.iter().copied().collect();
            actions.push(Action::PurgeReplicas { volume, disk: disk.id, segments, layers, parts });
        }
    }
}

/// Segments whose data are removed in one step.
const PURGE_SEGMENTS: usize = 64;

/// Lets go of layers that nothing refers to, and removes their data.
fn plan_layers(view: View<'_>, data: &DataView, actions: &mut Vec<Action>) {
    for (layer, dead) in &view.state.dead_layers {
        let holder = view.state.volumes.get(&dead.holder);
        if let Some(volume) = holder.filter(|volume| volume.coordinator == Some(view.me))
            && dead.custody == Custody::Coordinator
            && dead.generation == volume.generation
            && applied(data, volume).is_some_and(|applied| {
                let layers = &applied.layers;
                layers.chain.iter().chain(&layers.kept).all(|there| *there != (*layer).into())
            })
        {
            actions.push(Action::ReleaseLayer {
                volume: volume.id,
                generation: volume.generation,
                layer: *layer,
            });
        }
    }
    for (layer, disk, dead) in removable(view.state, view.me) {
        let waited = view.observed.purgeable_for.get(&Leftover::Layer(layer, disk.id));
        if works(data, disk) && waited.is_some_and(|waited| *waited >= PURGE_DELAY) {
            actions.push(Action::PurgeLayer { layer, disk: disk.id, segments: dead.segments });
        }
    }
}

/// The volume as the data process has taken it up, in its present generation.
fn applied<'a>(data: &'a DataView, volume: &Volume) -> Option<&'a VolumeConfig> {
    data.applied
        .as_ref()?
        .storage
        .volumes
        .iter()
        .find(|there| VolumeId::from(there.id) == volume.id && there.generation == volume.generation.into())
}

/// Data on a disk that are to be removed once they have been free for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leftover {
    /// Of copies of a volume that have left their sets.
    Copies(VolumeId, DiskId),
    /// Of a layer that nothing refers to.
    Layer(LayerRef, DiskId),
}

/// All such data on a node's disks, with what it is that is free: when that changes the time begins anew.
pub fn leftovers(state: &ClusterState, node: NodeId) -> impl Iterator<Item = (Leftover, Option<Retired>)> {
    let copies = purgeable(state, node)
        .map(|(volume, disk, retired)| (Leftover::Copies(volume, disk.id), Some(retired.clone())));
    let layers = removable(state, node).map(|(layer, disk, _)| (Leftover::Layer(layer, disk.id), None));
    copies.chain(layers)
}

/// Layers on a node's disks that nothing refers to and no coordinator uses.
fn removable(state: &ClusterState, node: NodeId) -> impl Iterator<Item = (LayerRef, &Disk, &DeadLayer)> {
    state.dead_layers.iter().filter(|(_, dead)| state.may_remove(dead)).flat_map(move |(layer, dead)| {
        let disks = dead.disks.iter().filter_map(|disk| state.disks.get(disk));
        disks.filter(move |disk| disk.node == node).map(move |disk| (*layer, disk, dead))
    })
}

/// Copies on a node's disks that have left their sets and that no coordinator uses.
fn purgeable(state: &ClusterState, node: NodeId) -> impl Iterator<Item = (VolumeId, &Disk, &Retired)> {
    state.retired.iter().flat_map(move |(volume, disks)| {
        disks.iter().filter_map(move |(disk, retired)| {
            let disk = state.disks.get(disk).filter(|disk| disk.node == node)?;
            state.may_purge(*volume, retired).then_some((*volume, disk, retired))
        })
    })
}

/// Removes what is left of deleted volumes, from those disks that work.
fn plan_purges(view: View<'_>, data: &DataView, actions: &mut Vec<Action>) {
    for (volume, disks) in &view.state.purge {
        let mine: Vec<_> = my_disks(view)
            .filter(|disk| disks.contains(&disk.id) && works(data, disk))
            .map(|disk| disk.id)
            .collect();
        // Still open here: the configuration that is planned now closes it first.
        let open = matches!(status(data, *volume), Some((_, state)) if *state != VolumeState::Closed);
        if !mine.is_empty() && !open {
            actions.push(Action::PurgeVolume { volume: *volume, disks: mine });
        }
    }
}

fn peers(view: View<'_>) -> Vec<PeerConfig> {
    let others = view.state.nodes.values().filter(|node| node.id != view.me);
    others
        .map(|node| PeerConfig {
            node: node.id,
            storage: node.addresses.storage,
            frames: node.addresses.frames,
        })
        .collect()
}

fn overlay(view: View<'_>) -> OverlayConfig {
    let state = view.state;
    let port_of = |id: &PortId| state.ports.get(id);
    let mut config = OverlayConfig::default();
    let here = state.vms_on(view.me).map(|vm| (vm, PortStanding::Active));
    let arriving = state.vms_arriving(view.me).map(|(vm, _)| (vm, PortStanding::Standby));
    for (vm, standing) in here.chain(arriving) {
        let ports = vm.ports.iter().filter_map(port_of);
        config.ports.extend(ports.filter_map(|port| port_config(view, vm, port, standing)));
    }
    for network in state.networks.values() {
        let Ok(vni) = Vni::try_from(network.vni.0) else { continue };
        if config.ports.iter().any(|port| port.vni == vni) {
            config.networks.push(network_config(network, vni));
            config.forwarding.extend(state.ports_of(network.id).filter_map(|port| forward(view, port, vni)));
        }
    }
    config
}

fn port_config(view: View<'_>, vm: &Vm, port: &Port, standing: PortStanding) -> Option<PortConfig> {
    let network = view.state.networks.get(&port.network)?;
    Some(PortConfig {
        id: port.id.into(),
        vni: Vni::try_from(network.vni.0).ok()?,
        mac: port.mac.into(),
        ip: port.ip,
        hostname: vm.name.clone(),
        socket: view.paths.port_socket(vm.id, port.id),
        standing,
    })
}

fn network_config(network: &Network, vni: Vni) -> NetworkConfig {
    NetworkConfig {
        vni,
        subnet: network.subnet,
        gateway: network.gateway,
        mtu: network.mtu,
        dns: network.dns.clone(),
        domain: network.domain.clone(),
    }
}

/// Where the VM of a port runs, unless that is here or nowhere.
fn forward(view: View<'_>, port: &Port, vni: Vni) -> Option<ForwardEntry> {
    let node = view.state.vms.get(&port.vm)?.assignment?.node;
    (node != view.me).then(|| ForwardEntry { vni, mac: port.mac.into(), ip: port.ip, node })
}
