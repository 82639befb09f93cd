//! The cluster's desired state and the commands that change it.
//!
//! [`ClusterState`] is the one value that Raft replicates. It is pure: [`ClusterState::apply`] uses no clock, no
//! randomness, no I/O and no hash order, so every node computes the same state from the same log. What nodes
//! *observe* is not in here but in [`report`].
//!
//! | read | for |
//! |---|---|
//! | [`model`] | what there is |
//! | [`command`] | what can be done to it, and how a command is refused |
//! | `apply/` | the rules, one file for each kind of thing |
//! | [`layers`] | what volumes are made of: snapshots, clones |
//! | [`transfers`] | what images come from, what is exported |
//! | [`placement`] | on which disks the copies of a segment go |
//! | [`invariants`] | what holds after every command; checked by the property tests |

mod apply;
pub mod command;
pub mod ids;
pub mod invariants;
pub mod layers;
pub mod model;
pub mod placement;
pub mod report;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod transfers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub use apply::{MAX_NAME, check_join_token};
pub use command::{Command, CommandResult, Op, Outcome, Refusal, RefusalKind};
pub use ids::*;
pub use layers::{DeadLayer, Freeze, FreezeStage, FreezeStep, LayerRef, Layers, PendingFreeze, Snapshot};
pub use model::*;
use serde::{Deserialize, Serialize};
pub use transfers::{AfterExport, Export, ImageSource, SourceLocation};

/// Finished tasks that are kept.
const KEEP_TASKS: usize = 500;
/// Events that are kept.
const KEEP_EVENTS: usize = 1000;

/// Everything that the cluster is meant to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterState {
    /// Number of commands that changed something.
    pub revision: u64,
    /// Identity of the cluster; none before the first command.
    pub cluster: Option<Cluster>,
    /// Members.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Disks of the pool.
    pub disks: BTreeMap<DiskId, Disk>,
    /// Volumes.
    pub volumes: BTreeMap<VolumeId, Volume>,
    /// Deleted volumes, and the disks that still hold data of them.
    pub purge: BTreeMap<VolumeId, BTreeSet<DiskId>>,
    /// Images.
    pub images: BTreeMap<ImageId, Image>,
    /// Overlay networks.
    pub networks: BTreeMap<NetworkId, Network>,
    /// NICs of VMs.
    pub ports: BTreeMap<PortId, Port>,
    /// VMs.
    pub vms: BTreeMap<VmId, Vm>,
    /// Tokens.
    pub tokens: BTreeMap<TokenId, Token>,
    /// Tasks: all that run and the latest that ended.
    pub tasks: BTreeMap<TaskId, Task>,
    /// The latest events.
    pub events: VecDeque<Event>,
    /// Number of the next event.
    pub next_event: u64,
    /// The next free network number.
    pub next_vni: u32,
    /// What holds for the pool as a whole.
    pub pool: PoolPolicy,
    /// Data of copies that have left their sets, still to be removed.
    pub retired: BTreeMap<VolumeId, BTreeMap<DiskId, Retired>>,
    /// Nodes that left the cluster for good: their certificates are not accepted any more.
    pub removed_nodes: BTreeSet<NodeId>,
    /// Snapshots that are being taken.
    pub freezes: BTreeMap<FreezeId, Freeze>,
    /// Layers that nothing refers to any more, still to be removed.
    pub dead_layers: BTreeMap<LayerRef, DeadLayer>,
    /// Volumes that are being read out.
    pub exports: BTreeMap<ExportId, Export>,
}

impl ClusterState {
    /// Applies one command. A refused command changes nothing.
    pub fn apply(&mut self, command: &Command) -> CommandResult {
        if let Some(task) = command.task
            && self.tasks.contains_key(&task)
        {
            return Ok(Outcome::Task(task));
        }
        let applied = apply::apply(self, command)?;
        self.revision += 1;
        match command.task {
            None => Ok(applied.outcome),
            Some(id) => {
                self.record_task(id, command.at, applied);
                Ok(Outcome::Task(id))
            }
        }
    }

    fn record_task(&mut self, id: TaskId, at: Timestamp, applied: apply::Applied) {
        let done = applied.goal == Goal::Applied;
        let task = Task {
            id,
            kind: applied.kind.to_owned(),
            subject_name: applied.name,
            subject: applied.subject,
            state: if done { TaskState::Done } else { TaskState::Running },
            permille: if done { 1000 } else { 0 },
            message: String::new(),
            goal: applied.goal,
            created: at,
            finished: done.then_some(at),
        };
        self.tasks.insert(id, task);
        self.forget_old_tasks();
    }

    fn forget_old_tasks(&mut self) {
        let mut finished: Vec<_> =
            self.tasks.values().filter_map(|task| task.finished.map(|at| (at, task.id))).collect();
        if finished.len() > KEEP_TASKS {
            finished.sort();
            for (_, id) in &finished[..finished.len() - KEEP_TASKS] {
                self.tasks.remove(id);
            }
        }
    }

    fn note(&mut self, at: Timestamp, severity: Severity, kind: &str, subject: Subject, message: String) {
        let subject_name = self.subject_name(&subject);
        self.events.push_back(Event {
            sequence: self.next_event,
            at,
            severity,
            kind: kind.to_owned(),
            subject,
            subject_name,
            message,
        });
        self.next_event += 1;
        while self.events.len() > KEEP_EVENTS {
            self.events.pop_front();
        }
    }

    /// Name of a subject, or its id when it is gone.
    pub fn subject_name(&self, subject: &Subject) -> String {
        let name = match subject {
            Subject::Cluster => self.cluster.as_ref().map(|cluster| cluster.name.clone()),
            Subject::Node(id) => self.nodes.get(id).map(|node| node.name.clone()),
            Subject::Disk(id) => self.disks.get(id).map(|disk| {
                let node = self.nodes.get(&disk.node).map_or("?", |node| &node.name);
                format!("{node}:{}", disk.path)
            }),
            Subject::Volume(id) => self.volumes.get(id).map(|volume| volume.name.clone()),
            Subject::Image(id) => self.images.get(id).map(|image| image.name.clone()),
            Subject::Network(id) => self.networks.get(id).map(|network| network.name.clone()),
            Subject::Vm(id) => self.vms.get(id).map(|vm| vm.name.clone()),
            Subject::Token(id) => Some(id.to_string()),
        };
        name.unwrap_or_else(|| match subject {
            Subject::Cluster => "cluster".to_owned(),
            Subject::Node(id) => id.to_string(),
            Subject::Disk(id) => id.to_string(),
            Subject::Volume(id) => id.to_string(),
            Subject::Image(id) => id.to_string(),
            Subject::Network(id) => id.to_string(),
            Subject::Vm(id) => id.to_string(),
            Subject::Token(id) => id.to_string(),
        })
    }

    /// A node by name or id.
    pub fn find_node(&self, name: &str) -> Option<&Node> {
        find(&self.nodes, name, |node| &node.name)
    }

    /// A volume by name or id.
    pub fn find_volume(&self, name: &str) -> Option<&Volume> {
        find(&self.volumes, name, |volume| &volume.name)
    }

    /// An image by name or id.
    pub fn find_image(&self, name: &str) -> Option<&Image> {
        find(&self.images, name, |image| &image.name)
    }

    /// A network by name or id.
    pub fn find_network(&self, name: &str) -> Option<&Network> {
        find(&self.networks, name, |network| &network.name)
    }

    /// A VM by name or id.
    pub fn find_vm(&self, name: &str) -> Option<&Vm> {
        find(&self.vms, name, |vm| &vm.name)
    }

    /// The VMs assigned to a node: what its reconciler runs.
    pub fn vms_on(&self, node: NodeId) -> impl Iterator<Item = &Vm> {
        self.vms.values().filter(move |vm| vm.assignment.is_some_and(|assignment| assignment.node == node))
    }

    /// The VMs that move to a node.
    pub fn vms_arriving(&self, node: NodeId) -> impl Iterator<Item = (&Vm, Migration)> {
        self.vms.values().filter_map(move |vm| Some((vm, vm.arriving(node)?)))
    }

    /// The volumes that a node coordinates: what its data process has open.
    pub fn volumes_on(&self, node: NodeId) -> impl Iterator<Item = &Volume> {
        self.volumes.values().filter(move |volume| volume.coordinator == Some(node))
    }

    /// What a volume is open for on its coordinator. Its node closes it when that is nothing.
    pub fn volume_use(&self, volume: &Volume) -> VolumeUse {
        let Some(node) = volume.coordinator else { return VolumeUse::Nothing };
        if let VolumeOwner::Vm(vm) = volume.owner
            && self
                .vms
                .get(&vm)
                .is_some_and(|vm| vm.assignment.is_some_and(|assignment| assignment.node == node))
        {
            return VolumeUse::Guest(vm);
        }
        let is_restored = match volume.owner {
            VolumeOwner::Suspension(vm) => {
                self.vms.get(&vm).and_then(Vm::restoring).is_some_and(|run| run.node == node)
            }
            _ => false,
        };
        let is_source =
            |other: &Volume| other.coordinator == Some(node) && other.fill == VolumeFill::CopyOf(volume.id);
        let is_exported =
            self.exports.values().any(|export| export.volume == volume.id && export.node == node)
                && !self.is_wanted(volume);
        if !volume.is_filled()
            || self.volumes.values().any(is_source)
            || is_exported
            || is_restored
            || self.needs_healing(volume)
        {
            return VolumeUse::Internal;
        }
        VolumeUse::Nothing
    }

    /// Whether a VM is meant to run on a volume, or a copy is to be made of it. Whatever else has it open yields.
    pub fn is_wanted(&self, volume: &Volume) -> bool {
        let by_vm = match volume.owner {
            VolumeOwner::Vm(vm) | VolumeOwner::Suspension(vm) => self
                .vms
                .get(&vm)
                .is_some_and(|vm| vm.desired == DesiredRun::Running || vm.assignment.is_some()),
            VolumeOwner::Image(_) | VolumeOwner::None => false,
        };
        by_vm || self.volumes.values().any(|other| other.fill == VolumeFill::CopyOf(volume.id))
    }

    /// The segments of all volumes that have a copy on a disk.
    pub fn segments_on(&self, disk: DiskId) -> u32 {
        let copies = self.volumes.values().flat_map(|volume| &volume.segments);
        u32::try_from(copies.filter(|segment| segment.on(disk).is_some()).count()).unwrap_or(u32::MAX)
    }

    /// Whether the data of copies that left their sets may be removed: no coordinator can still be using them.
    pub fn may_purge(&self, volume: VolumeId, retired: &Retired) -> bool {
        let holder = self.volumes.get(&volume).filter(|volume| volume.coordinator.is_some());
        retired.custody == Custody::Nobody
            || holder.is_none_or(|volume| volume.generation != retired.generation)
    }

    /// Whether a volume that nobody uses is to be open only so that its copies are completed or its layers merged. It yields to whoever
    /// wants the volume: a VM that is meant to run, or a copy that is to be made of it.
    pub fn needs_healing(&self, volume: &Volume) -> bool {
        let in_reach = |replica: &Replica| {
            replica.state == ReplicaState::OutOfSync
                && self
                    .nodes
                    .get(&replica.node)
                    .is_some_and(|node| node.availability == Availability::Available)
                && self
                    .disks
                    .get(&replica.disk)
                    .is_some_and(|disk| disk.state == DiskState::Ready && disk.service != DiskService::Dead)
        };
        let curable = || volume.segments.iter().flat_map(|segment| &segment.replicas).any(in_reach);
        let has_work = || curable() || volume.layers.merge.is_some();
        volume.is_filled() && !self.is_wanted(volume) && has_work()
    }

    /// The NICs of a network, on any node: what forwarding is made from.
    pub fn ports_of(&self, network: NetworkId) -> impl Iterator<Item = &Port> {
        self.ports.values().filter(move |port| port.network == network)
    }
}

/// What a volume is open for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeUse {
    /// A VM that is assigned to the coordinator's node: it is served to a guest.
    Guest(VmId),
    /// An import or a copy by the coordinator's node itself.
    Internal,
    /// Nothing (any more): it is to be closed.
    Nothing,
}

fn find<'a, K, V>(table: &'a BTreeMap<K, V>, name: &str, name_of: impl Fn(&V) -> &String) -> Option<&'a V>
where
    K: Ord + std::str::FromStr,
{
    match name.parse::<K>().ok().and_then(|id| table.get(&id)) {
        Some(value) => Some(value),
        None => table.values().find(|value| name_of(value) == name),
    }
}
