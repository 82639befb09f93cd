//! From requests of the API to commands: names are looked up, ids and random numbers drawn, defaults filled in.
//!
//! Only what needs the state to understand is checked here; whether a command is allowed is decided where it is applied.

mod devices;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;
use storage::{KeySalt, store::disk::Encryption};
use vmm::CpuModel;

use super::{
    problem::{Problem, ProblemKind},
    types as api,
};
use crate::control::leader::scheduler;
use crate::state::{
    CloudInit, ClusterState, Compression, DesiredRun, Disk, DiskId, DiskService, DiskState, Durability,
    FreezeId, Growth, ImageId, ImagePart, MAX_NAME, Make, MigrationTerms, NetworkId, Node, NodeId,
    NodeService, Op, PoolPolicy, PortId, Rebalancing, Segment, SnapshotId, StopMode, Subject, Vm, VmId,
    VolumeId, VolumeLimits, WipePolicy,
    command::{NewPort, NewVm, NewVolume, VmChange, VolumeChange},
    report::NodeReport,
};

/// Memory of a VM when nothing was said.
const USUAL_MEMORY_BYTES: u64 = 1 << 30;
/// MTU of guests when nothing was said: frames are split over the mesh, whatever its MTU.
const USUAL_MTU: u16 = 1500;
/// Copies of a volume when nothing was said, as far as there are nodes.
const USUAL_REPLICAS: usize = 3;

/// What the state of a run takes at most beside its memory: for each vCPU, for its devices, and for the frames around its memory.
const VCPU_STATE_BYTES: u64 = 64 << 10;
const DEVICES_STATE_BYTES: u64 = 16 << 20;
const FRAMES_PART: u64 = 64;

/// How large the state of a run can become.
fn state_bytes(run: Make) -> u64 {
    let memory = run.memory_bytes + run.memory_bytes / FRAMES_PART;
    memory + u64::from(run.vcpus) * VCPU_STATE_BYTES + DEVICES_STATE_BYTES
}

/// What requests are understood with.
pub struct Context<'a> {
    /// The replicated state.
    pub state: &'a ClusterState,
    /// What the live nodes reported.
    pub reports: &'a BTreeMap<NodeId, NodeReport>,
    /// Nodes where nothing new is put.
    pub silent: Vec<NodeId>,
}

/// There is nothing of that name.
pub fn not_found(what: &str, name: &str) -> Problem {
    Problem::new(
        ProblemKind::NotFound,
        format!("there is no {what} {name}"),
        format!("see what there is: hci {what} list"),
    )
}

fn invalid(detail: impl Into<String>, next: &str) -> Problem {
    Problem::new(ProblemKind::Invalid, detail, next)
}

fn durability(asked: api::Durability) -> Durability {
    match asked {
        api::Durability::WriteBack => Durability::WriteBack,
        api::Durability::WriteThrough => Durability::WriteThrough,
    }
}

fn compression(asked: api::Compression) -> Compression {
    match asked {
        api::Compression::Off => Compression::Off,
        api::Compression::Lz4 => Compression::Lz4,
    }
}

fn random_salt() -> Result<KeySalt, Problem> {
    let mut salt = [0; 32];
    aws_lc_rs::rand::fill(&mut salt).map_err(|_| {
        Problem::new(ProblemKind::Internal, "the system gives no random numbers", "try again")
    })?;
    Ok(KeySalt(salt))
}

impl Context<'_> {
    fn usual_replicas(&self) -> u8 {
        let ready =
            |disk: &&crate::state::Disk| disk.state == DiskState::Ready && !self.silent.contains(&disk.node);
        let nodes: std::collections::BTreeSet<_> =
            self.state.disks.values().filter(ready).map(|disk| disk.node).collect();
        u8::try_from(nodes.len().clamp(1, USUAL_REPLICAS)).unwrap_or(1)
    }

    /// `POST /v1/disks`.
    pub fn add_disk(&self, request: api::AddDisk) -> Result<Op, Problem> {
        let node = self.state.find_node(&request.node).ok_or_else(|| not_found("node", &request.node))?;
        if let Some(report) = self.reports.get(&node.id)
            && !request.wipe
            && let Some(candidate) = report.machine.candidates.iter().find(|disk| disk.path == request.path)
            && let Some(holds) = &candidate.holds
        {
            return Err(Problem::new(
                ProblemKind::Refused,
                format!("{} of node {} holds {holds}", request.path, node.name),
                format!("to destroy that: hci disk add {} {} --wipe", node.name, request.path),
            ));
        }
        Ok(Op::AddDisk {
            disk: DiskId::random(),
            node: node.id,
            path: request.path,
            wipe: if request.wipe { WipePolicy::Wipe } else { WipePolicy::Refuse },
            key_salt: match request.encryption {
                Encryption::None => None,
                Encryption::Aes256Xts => Some(random_salt()?),
            },
        })
    }

    /// `POST /v1/volumes`.
    pub fn create_volume(&self, request: api::CreateVolume) -> Op {
        Op::CreateVolume {
            volume: NewVolume {
                id: VolumeId::random(),
                name: request.name,
                size_bytes: request.size_bytes,
                replicas: request.replicas.unwrap_or_else(|| self.usual_replicas()),
                min_in_sync: request.min_in_sync,
                durability: durability(request.durability),
                compression: compression(request.compression),
            },
            near: None,
            unreachable: self.silent.clone(),
        }
    }

    /// A disk of the pool by its id, or as `NODE:PATH`.
    fn disk(&self, name: &str) -> Result<&Disk, Problem> {
        let by_id = || name.parse::<DiskId>().ok().and_then(|id| self.state.disks.get(&id));
        let by_path = || {
            let (node, path) = name.split_once(':')?;
            let node = self.state.find_node(node)?.id;
            self.state.disks.values().find(|disk| disk.node == node && disk.path == path)
        };
        by_id().or_else(by_path).ok_or_else(|| not_found("disk", name))
    }

    /// `POST /v1/disks/DISK/evict`.
    pub fn evict_disk(&self, name: &str, request: api::EvictDisk) -> Result<Op, Problem> {
        let disk = self.disk(name)?;
        let shown = self.state.subject_name(&Subject::Disk(disk.id));
        if request.force {
            return Ok(Op::SetDiskService { disk: disk.id, service: DiskService::Dead });
        }
        let lost = self.state.nodes.get(&disk.node).is_none_or(Node::is_lost);
        if lost || matches!(disk.state, DiskState::Failed { .. }) {
            return Err(Problem::new(
                ProblemKind::Refused,
                format!("disk {shown} cannot be read, so nothing can be moved off it"),
                format!("have its copies rebuilt from the others: hci disk evict {shown} --force"),
            ));
        }
        self.check_places(&[disk.id])?;
        Ok(Op::SetDiskService { disk: disk.id, service: DiskService::Draining })
    }

    /// `POST /v1/disks/DISK/resume`.
    pub fn resume_disk(&self, name: &str) -> Result<Op, Problem> {
        Ok(Op::SetDiskService { disk: self.disk(name)?.id, service: DiskService::InService })
    }

    /// `POST /v1/disks/DISK/scrub`.
    pub fn scrub_disk(&self, name: &str) -> Result<Op, Problem> {
        Ok(Op::ScrubDisk(self.disk(name)?.id))
    }

    /// Whether what is on these disks can go elsewhere, as far as nodes go: each copy needs one that has none yet.
    fn check_places(&self, leaving: &[DiskId]) -> Result<(), Problem> {
        let stays = |disk: &&Disk| {
            let node = self.state.nodes.get(&disk.node);
            !leaving.contains(&disk.id)
                && disk.takes_replicas()
                && !self.silent.contains(&disk.node)
                && node.is_some_and(|node| node.service == NodeService::InService)
        };
        let nodes: BTreeSet<_> = self.state.disks.values().filter(stays).map(|disk| disk.node).collect();
        for volume in self.state.volumes.values() {
            let has_place = |segment: &Segment| {
                let keeps = segment.replicas.iter().filter(|copy| !leaving.contains(&copy.disk));
                let taken: BTreeSet<_> = keeps.map(|copy| copy.node).collect();
                nodes.difference(&taken).next().is_some()
            };
            let is_hit = |segment: &&Segment| leaving.iter().any(|disk| segment.on(*disk).is_some());
            if volume.segments.iter().filter(is_hit).any(|segment| !has_place(segment)) {
                return Err(Problem::new(
                    ProblemKind::Capacity,
                    format!(
                        "the {} copies of volume {} need {} nodes with usable disks, and without this there are {}",
                        volume.replicas,
                        volume.name,
                        volume.replicas,
                        nodes.len()
                    ),
                    format!(
                        "add a disk first (hci disk add NODE PATH), or use fewer copies: hci volume set {} --replicas {}",
                        volume.name,
                        volume.replicas.saturating_sub(1).max(1)
                    ),
                ));
            }
        }
        Ok(())
    }

    fn node(&self, name: &str) -> Result<&Node, Problem> {
        self.state.find_node(name).ok_or_else(|| not_found("node", name))
    }

    /// `PATCH /v1/nodes/NAME`.
    pub fn set_node(&self, name: &str, request: api::SetNode) -> Result<Op, Problem> {
        let node = self.node(name)?.id;
        match request.rack {
            Some(rack) => Ok(Op::SetNodeRack { node, rack: Some(rack).filter(|rack| !rack.is_empty()) }),
            None => Err(invalid("nothing is to be changed", "hci node set NAME --rack RACK")),
        }
    }

    /// `POST /v1/nodes/NAME/drain`, `resume` and `evict`.
    pub fn set_node_service(&self, name: &str, service: NodeService) -> Result<Op, Problem> {
        let node = self.node(name)?;
        if service == NodeService::Leaving && !node.is_lost() {
            let disks = self.state.disks.values().filter(|disk| disk.node == node.id);
            self.check_places(&disks.map(|disk| disk.id).collect::<Vec<_>>())?;
        }
        Ok(Op::SetNodeService { node: node.id, service })
    }

    /// `PATCH /v1/pool`.
    pub fn set_pool(&self, request: api::SetPool) -> Op {
        let now = self.state.pool;
        let rebalancing = match request.rebalance {
            Some(true) => Rebalancing::On,
            Some(false) => Rebalancing::Off,
            None => now.rebalancing,
        };
        Op::SetPoolPolicy(PoolPolicy {
            rebuild_grace_seconds: request.rebuild_grace_seconds.unwrap_or(now.rebuild_grace_seconds),
            reserve_percent: request.reserve_percent.unwrap_or(now.reserve_percent),
            moves_per_disk: request.moves_per_disk.unwrap_or(now.moves_per_disk),
            rebalancing,
        })
    }

    fn volume(&self, name: &str) -> Result<VolumeId, Problem> {
        Ok(self.state.find_volume(name).ok_or_else(|| not_found("volume", name))?.id)
    }

    /// `PATCH /v1/volumes/NAME`.
    pub fn set_volume(&self, name: &str, request: api::SetVolume) -> Result<Op, Problem> {
        if request == api::SetVolume::default() {
            return Err(invalid("nothing is to be changed", "hci volume set NAME --replicas 3"));
        }
        Ok(Op::SetVolume {
            volume: self.volume(name)?,
            change: VolumeChange {
                replicas: request.replicas,
                min_in_sync: request.min_in_sync,
                durability: request.durability.map(durability),
                compression: request.compression.map(compression),
                limits: self.limits(name, request)?,
            },
            unreachable: self.silent.clone(),
        })
    }

    /// The limits of a volume after a request that may name one of them only; 0 takes one away.
    fn limits(&self, name: &str, request: api::SetVolume) -> Result<Option<VolumeLimits>, Problem> {
        if request.operations_per_second.is_none() && request.bytes_per_second.is_none() {
            return Ok(None);
        }
        let volume = self.state.find_volume(name).ok_or_else(|| not_found("volume", name))?;
        let changed =
            |asked: Option<u64>, now| asked.map_or(now, |limit| Some(limit).filter(|limit| *limit > 0));
        Ok(Some(VolumeLimits {
            operations_per_second: changed(
                request.operations_per_second,
                volume.limits.operations_per_second,
            ),
            bytes_per_second: changed(request.bytes_per_second, volume.limits.bytes_per_second),
        }))
    }

    /// `POST /v1/volumes/NAME/grow`.
    pub fn grow_volume(&self, name: &str, request: api::GrowVolume) -> Result<Op, Problem> {
        Ok(Op::GrowVolume {
            volume: self.volume(name)?,
            size_bytes: request.size_bytes,
            unreachable: self.silent.clone(),
        })
    }

    /// `POST /v1/snapshots` and its like for one volume.
    pub fn take_snapshots(&self, name: String, volumes: &[String]) -> Result<Op, Problem> {
        let numbered = volumes.iter().map(|volume| Ok((self.volume(volume)?, SnapshotId::random())));
        let volumes = numbered.collect::<Result<_, Problem>>()?;
        Ok(Op::TakeSnapshot { freeze: FreezeId::random(), name, volumes })
    }

    /// `POST /v1/vms/NAME/snapshots`: of all its disks at one point in time.
    pub fn take_vm_snapshot(&self, vm: &str, name: String) -> Result<Op, Problem> {
        let vm = self.state.find_vm(vm).ok_or_else(|| not_found("vm", vm))?;
        if vm.disks.is_empty() {
            return Err(invalid(format!("VM {} has no disks", vm.name), "see it: hci vm get NAME"));
        }
        let volumes = vm.disks.iter().map(|disk| (*disk, SnapshotId::random())).collect();
        Ok(Op::TakeSnapshot { freeze: FreezeId::random(), name, volumes })
    }

    fn snapshot(&self, volume: &str, snapshot: &str) -> Result<(VolumeId, SnapshotId), Problem> {
        let found = self.state.find_volume(volume).ok_or_else(|| not_found("volume", volume))?;
        let missing = || {
            Problem::new(
                ProblemKind::NotFound,
                format!("volume {volume} has no snapshot {snapshot}"),
                format!("see what there is: hci volume snapshot list {volume}"),
            )
        };
        Ok((found.id, found.layers.find(snapshot).ok_or_else(missing)?.id))
    }

    /// `DELETE /v1/volumes/NAME/snapshots/SNAPSHOT`.
    pub fn delete_snapshot(&self, volume: &str, snapshot: &str) -> Result<Op, Problem> {
        let (volume, snapshot) = self.snapshot(volume, snapshot)?;
        Ok(Op::DeleteSnapshot { volume, snapshot })
    }

    /// `POST /v1/volumes/NAME/snapshots/SNAPSHOT/restore`.
    pub fn restore_snapshot(&self, volume: &str, snapshot: &str) -> Result<Op, Problem> {
        let (volume, snapshot) = self.snapshot(volume, snapshot)?;
        Ok(Op::RestoreSnapshot { volume, snapshot })
    }

    /// `POST /v1/volumes/NAME/snapshots/SNAPSHOT/clone`.
    pub fn clone_snapshot(&self, volume: &str, snapshot: &str, name: String) -> Result<Op, Problem> {
        let (source, snapshot) = self.snapshot(volume, snapshot)?;
        Ok(Op::CloneVolume { volume: VolumeId::random(), name, source, snapshot })
    }

    /// The volume of an image's disk.
    pub fn image_volume(&self, image: &str, size_bytes: u64) -> NewVolume {
        NewVolume {
            id: VolumeId::random(),
            name: format!("image-{image}"),
            size_bytes,
            replicas: self.usual_replicas(),
            min_in_sync: None,
            durability: Durability::WriteBack,
            compression: Compression::Off,
        }
    }

    /// `POST /v1/images`.
    pub fn create_image(&self, request: api::CreateImage) -> Op {
        let declared = [
            (request.kernel, ImagePart::Kernel),
            (request.initramfs, ImagePart::Initramfs),
            (request.disk, ImagePart::Disk),
        ];
        Op::CreateImage {
            image: ImageId::random(),
            name: request.name,
            cmdline: request.cmdline,
            parts: declared.into_iter().filter(|(comes, _)| *comes).map(|(_, part)| part).collect(),
        }
    }

    /// `POST /v1/networks`.
    pub fn create_network(&self, request: api::CreateNetwork) -> Result<Op, Problem> {
        let subnet: Ipv4Net = request.subnet.parse().map_err(|_| {
            invalid(format!("{:?} is no IPv4 subnet", request.subnet), "use --subnet 10.9.0.0/24")
        })?;
        let address = |text: &String| {
            text.parse::<Ipv4Addr>()
                .map_err(|_| invalid(format!("{text:?} is no IPv4 address"), "use 10.9.0.1"))
        };
        let domain = request.domain.unwrap_or_else(|| format!("{}.internal", request.name));
        Ok(Op::CreateNetwork {
            network: NetworkId::random(),
            name: request.name,
            subnet,
            gateway: request.gateway.as_ref().map(address).transpose()?,
            mtu: request.mtu.unwrap_or(USUAL_MTU),
            dns: request.dns.iter().map(address).collect::<Result<_, _>>()?,
            domain,
        })
    }

    /// `POST /v1/vms`.
    pub fn create_vm(&self, request: api::CreateVm) -> Result<Op, Problem> {
        let image =
            self.state.find_image(&request.image).ok_or_else(|| not_found("image", &request.image))?;
        let node = match &request.node {
            None => None,
            Some(name) => Some(self.state.find_node(name).ok_or_else(|| not_found("node", name))?.id),
        };
        let mut ports = Vec::new();
        for name in &request.networks {
            let network = self.state.find_network(name).ok_or_else(|| not_found("network", name))?;
            ports.push(NewPort { id: PortId::random(), network: network.id });
        }
        let disk = |(index, disk): (usize, &api::CreateVmDisk)| NewVolume {
            id: VolumeId::random(),
            name: format!("{}-disk{index}", request.name),
            size_bytes: disk.size_bytes,
            replicas: disk.replicas.unwrap_or_else(|| self.usual_replicas()),
            min_in_sync: None,
            durability: Durability::WriteBack,
            compression: Compression::Off,
        };
        let desired = match request.stopped {
            false => DesiredRun::Running,
            true => DesiredRun::Stopped(StopMode::Graceful),
        };
        let mut disks: Vec<_> = request.disks.iter().enumerate().map(disk).collect();
        if disks.is_empty()
            && let Some(size_bytes) =
                image.disk().and_then(|id| self.state.volumes.get(&id)).map(|disk| disk.size_bytes)
        {
            disks.push(disk((0, &api::CreateVmDisk { size_bytes, replicas: None })));
        }
        let vm = NewVm {
            id: VmId::random(),
            name: request.name.clone(),
            vcpus: request.vcpus.unwrap_or(1),
            cpu_model: self.cpu_model(request.cpu_model)?,
            memory_bytes: request.memory_bytes.unwrap_or(USUAL_MEMORY_BYTES),
            image: image.id,
            cmdline: request.cmdline.clone(),
            disks,
            ports,
            preferred_node: node,
            near: node.filter(|node| !self.silent.contains(node)).or_else(|| self.roomiest()),
            desired,
            after_crash: request.after_crash.unwrap_or_default(),
            growth: Growth { vcpus: request.max_vcpus, memory_bytes: request.max_memory_bytes },
            cloud_init: request.cloud_init.map(|given| CloudInit {
                user_data: given.user_data,
                network_config: given.network_config,
                ssh_keys: given.ssh_keys,
                hostname: given.hostname,
            }),
        };
        Ok(Op::CreateVm { vm, unreachable: self.silent.clone() })
    }

    /// `PATCH /v1/vms/NAME`.
    pub fn set_vm(&self, name: &str, request: api::SetVm) -> Result<Op, Problem> {
        if request == api::SetVm::default() {
            return Err(invalid("nothing is to be changed", "hci vm set NAME --memory 8GiB"));
        }
        let vm = self.vm(name)?;
        self.check_growth(vm, request.memory_bytes)?;
        Ok(Op::SetVm {
            vm: vm.id,
            change: VmChange {
                vcpus: request.vcpus,
                cpu_model: request.cpu_model.map(|model| self.cpu_model(Some(model))).transpose()?,
                memory_bytes: request.memory_bytes,
                after_crash: request.after_crash,
                growth: Growth { vcpus: request.max_vcpus, memory_bytes: request.max_memory_bytes },
            },
        })
    }

    /// `POST /v1/vms/NAME/start`: a suspended VM goes on where it was, unless that is discarded.
    pub fn start_vm(&self, name: &str, request: api::StartVm) -> Result<Op, Problem> {
        let vm = self.vm(name)?;
        let desired = DesiredRun::Running;
        if request.discard_state {
            return Ok(Op::DiscardSuspension { vm: vm.id, desired });
        }
        self.check_resumable(vm)?;
        Ok(Op::SetVmDesired { vm: vm.id, desired })
    }

    /// `POST /v1/vms/NAME/resume`.
    pub fn resume_vm(&self, name: &str) -> Result<Op, Problem> {
        let vm = self.vm(name)?;
        self.check_resumable(vm)?;
        Ok(Op::ResumeVm(vm.id))
    }

    /// Whether some node can go on with a suspended VM. One that was never suspended may wait for a node.
    fn check_resumable(&self, vm: &Vm) -> Result<(), Problem> {
        if !vm.is_suspended() || self.reports.is_empty() {
            return Ok(());
        }
        scheduler::choose(self.state, self.reports, vm, None).map(|_| ()).map_err(|why| {
            Problem::new(
                ProblemKind::Capacity,
                format!("no node can go on with VM {} now: {why}", vm.name),
                format!(
                    "free memory or bring a node back (hci node list); to boot it anew instead: hci vm start {} --discard-state",
                    vm.name
                ),
            )
        })
    }

    /// `POST /v1/vms/NAME/migrate`: refused at once when the VM cannot be there.
    pub fn migrate_vm(&self, name: &str, request: api::MigrateVm) -> Result<Op, Problem> {
        let vm = self.vm(name)?;
        if request.in_place {
            if request != (api::MigrateVm { in_place: true, ..Default::default() }) {
                return Err(Problem::new(
                    ProblemKind::Invalid,
                    "a VM that stays on its node is not sent anywhere",
                    "leave out node, bytes_per_second and longest_pause_ms",
                ));
            }
            return Ok(Op::RenewVm(vm.id));
        }
        let only = request.node.as_deref().map(|node| self.node(node).map(|node| node.id)).transpose()?;
        let run = vm.assignment.ok_or_else(|| {
            Problem::new(
                ProblemKind::Conflict,
                format!("VM {} does not run", vm.name),
                format!(
                    "a VM that is off needs no migration, it starts on any node: hci vm start {}",
                    vm.name
                ),
            )
        })?;
        let to = match only {
            // Said by the rules, in their words.
            Some(node) if node == run.node || self.reports.is_empty() => node,
            _ => scheduler::choose_other(self.state, self.reports, vm, run, only).map_err(|why| {
                Problem::new(
                    ProblemKind::Capacity,
                    format!("VM {} cannot be moved: {why}", vm.name),
                    "choose another node, free memory there, or bring a node back: hci node list",
                )
            })?,
        };
        let api::MigrateVm { bytes_per_second, longest_pause_ms, .. } = request;
        Ok(Op::MigrateVm { vm: vm.id, to, terms: MigrationTerms { bytes_per_second, longest_pause_ms } })
    }

    /// `POST /v1/vms/NAME/suspend`: the volume is thin, and as large as the state can become.
    pub fn suspend_vm(&self, name: &str) -> Result<Op, Problem> {
        let vm = self.vm(name)?;
        let run = vm.assignment.map_or(vm.make(), |run| run.make);
        let plain = format!("{}-state", vm.name);
        let free = plain.len() <= MAX_NAME && self.state.find_volume(&plain).is_none();
        let volume = NewVolume {
            id: VolumeId::random(),
            name: if free { plain } else { format!("state-{}", vm.id) },
            size_bytes: state_bytes(run),
            replicas: self.state_replicas(vm),
            min_in_sync: None,
            durability: Durability::WriteBack,
            compression: Compression::Off,
        };
        Ok(Op::SuspendVm { vm: vm.id, volume, unreachable: self.silent.clone() })
    }

    /// As many copies as the VM's disks have: what is lost with those is lost anyway.
    fn state_replicas(&self, vm: &Vm) -> u8 {
        let disks = vm.disks.iter().filter_map(|disk| self.state.volumes.get(disk));
        disks.map(|disk| disk.replicas).max().unwrap_or_else(|| self.usual_replicas())
    }

    fn vm(&self, name: &str) -> Result<&Vm, Problem> {
        self.state.find_vm(name).ok_or_else(|| not_found("vm", name))
    }

    /// The model that a new VM gets: one that some node has, and by default one that all have, so that it can move everywhere.
    fn cpu_model(&self, wanted: Option<CpuModel>) -> Result<CpuModel, Problem> {
        let has = |report: &NodeReport, model| report.machine.cpu_models.contains(&model);
        let Some(wanted) = wanted else {
            let mut levels = CpuModel::ALL.into_iter().filter(|model| *model != CpuModel::Host);
            let common = levels.rfind(|level| self.reports.values().all(|report| has(report, *level)));
            return Ok(common.filter(|_| !self.reports.is_empty()).unwrap_or(CpuModel::Host));
        };
        if self.reports.is_empty() || self.reports.values().any(|report| has(report, wanted)) {
            return Ok(wanted);
        }
        Err(invalid(
            format!("no node that is there has CPU model {wanted}"),
            "see what they have: hci node list -o wide",
        ))
    }

    /// The live node with the most memory left: where the scheduler will probably put the next VM.
    fn roomiest(&self) -> Option<NodeId> {
        let free = |(node, report): (&NodeId, &NodeReport)| {
            let taken: u64 = self.state.vms_on(*node).map(|vm| vm.memory_bytes).sum();
            (report.machine.memory_bytes.saturating_sub(taken), *node)
        };
        self.reports.iter().map(free).max().map(|(_, node)| node)
    }
}

#[cfg(test)]
mod tests {
    use vmm::Processor;

    use super::*;
    use crate::{
        api::views::Views,
        state::{RunEpoch, VmExit, command::AssignReason, report::*, testing::*},
    };

    fn processor(features: u64) -> Processor {
        Processor { vendor: "AuthenticAMD".into(), features }
    }

    fn report(memory_bytes: u64, features: u64) -> NodeReport {
        let machine = MachineReport {
            memory_bytes,
            cpu_models: [CpuModel::Host].into(),
            processor: Some(processor(features)),
            ..Default::default()
        };
        let local = LocalReport { data_process: ProcessState::Up, ..Default::default() };
        NodeReport { machine, local, boot_files: vec![] }
    }

    fn shown(state: &ClusterState, reports: &BTreeMap<NodeId, NodeReport>, vm: VmId) -> api::Vm {
        let views = Views { state, reports, etas: &Default::default(), members: &[], leader: None };
        views.vm(&state.vms[&vm])
    }

    #[test]
    fn a_vm_is_suspended_to_a_volume_that_holds_all_of_it_and_resumed_only_where_it_can_go_on() {
        let mut state = cluster(2);
        let new = new_vm(1, vec![new_volume(1, 2)]);
        let vm = new.id;
        let run = |state: &mut ClusterState, op| state.apply(&command(op)).map(|_| ()).unwrap();
        run(&mut state, Op::CreateVm { vm: new, unreachable: vec![] });
        let (node, reason) = (node_id(1), AssignReason::Start);
        run(&mut state, Op::AssignVm { vm, node, expected: RunEpoch(0), reason, unreachable: vec![] });
        let mut reports: BTreeMap<_, _> =
            [(node_id(1), report(8 << 30, 1)), (node_id(2), report(8 << 30, 2))].into();

        let context = Context { state: &state, reports: &reports, silent: vec![] };
        let suspend = context.suspend_vm("vm1").unwrap();
        let Op::SuspendVm { volume, .. } = &suspend else { panic!("{suspend:?}") };
        assert_eq!((volume.name.as_str(), volume.replicas), ("vm1-state", 2));
        assert!(volume.size_bytes > (1 << 30) + (16 << 20));
        run(&mut state, suspend);
        let now = shown(&state, &reports, vm);
        assert_eq!((now.state, now.desired), (api::VmState::Suspending, api::VmDesired::Suspended));
        let id = state.vms[&vm].suspension.as_ref().unwrap().volume;
        let generation = state.volumes[&id].generation;
        let (epoch, processor) = (RunEpoch(1), processor(1));
        run(&mut state, Op::VmSuspended { vm, epoch, generation, bytes: 5 << 20, processor });
        run(&mut state, Op::VmExited { vm, epoch, exit: VmExit::Stopped });
        let now = shown(&state, &reports, vm);
        assert_eq!(
            (now.state, now.desired, now.node),
            (api::VmState::Suspended, api::VmDesired::Suspended, None)
        );
        assert!(now.message.unwrap().ends_with("its state takes 5 MiB"));

        let resume = |state: &ClusterState, reports: &BTreeMap<_, _>| {
            Context { state, reports, silent: vec![] }.resume_vm("vm1")
        };
        assert_eq!(resume(&state, &reports).unwrap(), Op::ResumeVm(vm));
        reports.insert(node_id(1), report(1 << 30, 1));
        let refused = resume(&state, &reports).unwrap_err();
        assert!(refused.is(ProblemKind::Capacity), "{refused}");
        for why in ["n1 has 640 MiB of memory left", "n2 has another processor"] {
            assert!(refused.detail.contains(why), "{refused}");
        }
        let context = Context { state: &state, reports: &reports, silent: vec![] };
        assert!(context.start_vm("vm1", api::StartVm::default()).is_err());
        let anew = context.start_vm("vm1", api::StartVm { discard_state: true }).unwrap();
        assert_eq!(anew, Op::DiscardSuspension { vm, desired: DesiredRun::Running });
        run(&mut state, anew);
        assert_eq!(state.vms[&vm].saved(), None);
    }

    #[test]
    fn the_state_of_a_vm_gets_a_name_that_is_free() {
        let mut state = cluster(1);
        let new = NewVm { name: "x".repeat(60), ..new_vm(1, vec![]) };
        let (long, short) = (new.id, VmId(id(2002)));
        for vm in [new, new_vm(2, vec![])] {
            state.apply(&command(Op::CreateVm { vm, unreachable: vec![] })).unwrap();
        }
        let taken = NewVolume { name: "vm2-state".into(), ..new_volume(7, 1) };
        state.apply(&command(Op::CreateVolume { volume: taken, near: None, unreachable: vec![] })).unwrap();
        let context = Context { state: &state, reports: &Default::default(), silent: vec![] };
        for (vm, name) in [(long, "x".repeat(60)), (short, "vm2".to_owned())] {
            let Op::SuspendVm { volume, .. } = context.suspend_vm(&name).unwrap() else { panic!("{name}") };
            assert_eq!(volume.name, format!("state-{vm}"));
        }
    }
}
