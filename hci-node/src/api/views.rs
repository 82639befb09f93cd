//! From cluster state and reports to the resources of the API. Pure. Volumes, and what may happen to them, are in
//! `volumes`; what is told of a VM's inside is in `guest`.

mod guest;
mod smart;
pub mod volumes;

use std::{collections::BTreeMap, time::Duration};

use super::types as api;
use crate::{
    control::replicated::{Member, MemberRole},
    state::{
        Availability, ClusterState, DesiredRun, DeviceStage, Disk, DiskRoom, DiskService, DiskState, Event,
        Image, Network, Node, NodeId, NodeService, PartState, PortId, Rebalancing, Severity, Subject, Task,
        TaskState, Token, TokenKind, Vm, VmDevice, VmExit, VolumeId,
        report::{
            CandidateDisk, DiskHealth, NodeReport, ProcessState, ScrubProgress, ScrubReport, VmReport,
            VmRunState,
        },
    },
};
use storage::{KeySalt, store::disk::Encryption};

/// What views are made from.
pub struct Views<'a> {
    /// The replicated state.
    pub state: &'a ClusterState,
    /// What nodes reported; empty where nobody leads.
    pub reports: &'a BTreeMap<NodeId, NodeReport>,
    /// How long volumes need until nothing of them is missing, as far as can be told.
    pub etas: &'a BTreeMap<VolumeId, Duration>,
    /// The consensus group.
    pub members: &'a [Member],
    /// The leader.
    pub leader: Option<NodeId>,
}

fn device_state(vm: &Vm, device: VmDevice) -> api::DeviceState {
    match vm.devices.get(&device).map(|place| place.stage) {
        Some(DeviceStage::Joining) => api::DeviceState::Attaching,
        Some(DeviceStage::Leaving(_)) => api::DeviceState::Detaching,
        Some(DeviceStage::Present) | None => api::DeviceState::Attached,
    }
}

impl Views<'_> {
    /// What holds for the pool as a whole, and how it is.
    pub fn pool(&self) -> api::Pool {
        let policy = self.state.pool;
        let volumes = || self.state.volumes.values();
        let disks: Vec<_> = self.disks().into_iter().filter(|disk| disk.id.is_some()).collect();
        let left = self.state.retired.values().flat_map(|disks| disks.values());
        api::Pool {
            rebuild_grace_seconds: policy.rebuild_grace_seconds,
            reserve_percent: policy.reserve_percent,
            moves_per_disk: policy.moves_per_disk,
            rebalance: policy.rebalancing == Rebalancing::On,
            moves: volumes().map(volumes::moves).sum(),
            segments_degraded: volumes().map(volumes::degraded).sum(),
            segments: count(volumes().flat_map(|volume| &volume.segments)),
            segments_to_remove: count(left.flat_map(|retired| &retired.segments)),
            raw_bytes: disks.iter().map(|disk| disk.capacity_bytes).sum(),
            used_bytes: disks.iter().filter_map(|disk| disk.used_bytes).sum(),
            scrub: pool_scrub(&disks),
        }
    }

    fn node_name(&self, node: NodeId) -> String {
        self.state.subject_name(&Subject::Node(node))
    }

    /// The cluster.
    pub fn cluster(&self) -> Option<api::ClusterInfo> {
        let cluster = self.state.cluster.as_ref()?;
        Some(api::ClusterInfo {
            id: cluster.id.to_string(),
            name: cluster.name.clone(),
            ca_fingerprint: cluster.ca_fingerprint.clone(),
            ca_pem: cluster.ca_cert_pem.clone(),
            leader: self.leader.map(|node| self.node_name(node)),
            revision: self.state.revision,
            created: cluster.created.to_string(),
        })
    }

    /// A node.
    pub fn node(&self, node: &Node) -> api::Node {
        let report = self.reports.get(&node.id);
        let role = match self.members.iter().find(|member| member.node == node.id).map(|member| member.role) {
            _ if self.leader == Some(node.id) => "leader",
            Some(MemberRole::Voter) => "voter",
            Some(MemberRole::Learner) => "learner",
            None => "joining",
        };
        let (state, lost_since) = match node.availability {
            Availability::Available => (api::NodeState::Available, None),
            Availability::Lost { since } => (api::NodeState::Lost, Some(since.to_string())),
        };
        api::Node {
            id: node.id.to_string(),
            name: node.name.clone(),
            state,
            role: role.to_owned(),
            lost_since,
            address: node.addresses.control.to_string(),
            api: node.addresses.api.to_string(),
            version: report.map(|report| report.machine.version.clone()),
            cpus: report.map(|report| report.machine.cpus),
            cpu_models: report.map(|report| report.machine.cpu_models.clone()),
            memory_bytes: report.map(|report| report.machine.memory_bytes),
            memory_available_bytes: report.map(|report| report.machine.memory_available_bytes),
            vms: count(self.state.vms_on(node.id)),
            disks: count(self.state.disks.values().filter(|disk| disk.node == node.id)),
            service: match node.service {
                NodeService::InService => api::NodeService::InService,
                NodeService::Draining => api::NodeService::Draining,
                NodeService::Leaving => api::NodeService::Leaving,
            },
            rack: node.rack.clone(),
            data_process_up: report.map(|report| report.local.data_process == ProcessState::Up),
            joined: node.joined.to_string(),
        }
    }

    /// The disks of the pool, then the candidates.
    pub fn disks(&self) -> Vec<api::Disk> {
        let pool = self.state.disks.values().map(|disk| self.disk(disk));
        let candidates = self.reports.iter().flat_map(|(node, report)| {
            report.machine.candidates.iter().map(|candidate| self.candidate(*node, candidate))
        });
        let mut all: Vec<_> = pool.chain(candidates).collect();
        all.sort_by(|a, b| (&a.node, &a.path).cmp(&(&b.node, &b.path)));
        all
    }

    fn disk(&self, disk: &Disk) -> api::Disk {
        let seen = self
            .reports
            .get(&disk.node)
            .and_then(|report| report.local.disks.iter().find(|seen| seen.disk == disk.id));
        let lost = matches!(
            self.state.nodes.get(&disk.node).map(|node| node.availability),
            Some(Availability::Lost { .. })
        );
        let (state, message) = match (&disk.state, seen.map(|seen| &seen.health)) {
            (DiskState::Preparing, _) => (api::DiskState::Preparing, None),
            _ if disk.service == DiskService::Dead => {
                (api::DiskState::Dead, Some("its copies are rebuilt elsewhere".to_owned()))
            }
            (DiskState::Failed { reason }, _) => (api::DiskState::Failed, Some(reason.clone())),
            (DiskState::Ready, Some(DiskHealth::Failed(why))) => (api::DiskState::Failed, Some(why.clone())),
            (DiskState::Ready, Some(DiskHealth::Full)) => (api::DiskState::Full, None),
            (DiskState::Ready, _) if lost => (api::DiskState::Unreachable, None),
            (DiskState::Ready, _) if disk.service == DiskService::Draining => {
                (api::DiskState::Draining, Some("its copies are moved to other disks".to_owned()))
            }
            (DiskState::Ready, _) if disk.room == DiskRoom::Reserved => (api::DiskState::Reserved, None),
            (DiskState::Ready, _) => (api::DiskState::Ready, None),
        };
        let node = self.node_name(disk.node);
        let smart = seen.map(|seen| smart::view(seen.smart.as_ref(), &format!("{node}:{}", disk.path)));
        let warning = smart.as_ref().and_then(|smart| smart.warning.clone());
        api::Disk {
            id: Some(disk.id.to_string()),
            node,
            path: disk.path.clone(),
            state,
            segments: self.state.segments_on(disk.id),
            message: message.or(warning),
            capacity_bytes: seen.map_or(disk.capacity_bytes, |seen| seen.capacity_bytes),
            used_bytes: seen.map(|seen| seen.used_bytes),
            model: None,
            scrub: seen.map(|seen| scrub(&seen.scrub)),
            smart,
            encryption: disk.key_salt.map_or(Encryption::None, |_| Encryption::Aes256Xts),
            key_salt: disk.key_salt.map(|KeySalt(salt)| hex::encode(salt)),
        }
    }

    fn candidate(&self, node: NodeId, candidate: &CandidateDisk) -> api::Disk {
        api::Disk {
            id: None,
            node: self.node_name(node),
            path: candidate.path.clone(),
            state: if candidate.holds.is_some() { api::DiskState::Foreign } else { api::DiskState::Free },
            segments: 0,
            message: candidate.holds.as_ref().map(|what| format!("holds {what}")),
            capacity_bytes: candidate.size_bytes,
            used_bytes: None,
            model: Some(candidate.model.clone()).filter(|model| !model.is_empty()),
            scrub: None,
            smart: None,
            encryption: Encryption::None,
            key_salt: None,
        }
    }

    /// An image.
    pub fn image(&self, image: &Image) -> api::Image {
        let size_of = |volume: &VolumeId| self.state.volumes.get(volume).map(|volume| volume.size_bytes);
        let part = |(part, state): (&crate::state::ImagePart, &PartState)| {
            let (word, size_bytes, file) = match state {
                PartState::Awaiting => ("awaiting", None, None),
                PartState::Fetching { .. } => ("fetching", None, None),
                PartState::Importing { volume, file, .. } => {
                    let size = volume.as_ref().and_then(size_of).or(file.map(|file| file.size_bytes));
                    ("importing", size, *file)
                }
                PartState::File(file) => ("ready", Some(file.size_bytes), Some(*file)),
                PartState::Volume(volume) => ("ready", size_of(volume), None),
            };
            api::ImagePart {
                part: part.name().to_owned(),
                state: word.to_owned(),
                size_bytes,
                blake3: file.map(|file| file.hash.to_string()),
                source: match state {
                    PartState::Fetching { source, .. } => Some(source.location.as_str().to_owned()),
                    _ => None,
                },
            }
        };
        api::Image {
            id: image.id.to_string(),
            name: image.name.clone(),
            state: if image.is_ready() { api::ImageState::Ready } else { api::ImageState::Incomplete },
            cmdline: image.cmdline.clone(),
            parts: image.parts.iter().map(part).collect(),
            created: image.created.to_string(),
        }
    }

    /// A network.
    pub fn network(&self, network: &Network) -> api::Network {
        api::Network {
            id: network.id.to_string(),
            name: network.name.clone(),
            vni: network.vni.0,
            subnet: network.subnet.to_string(),
            gateway: network.gateway.to_string(),
            mtu: network.mtu,
            dns: network.dns.iter().map(ToString::to_string).collect(),
            domain: network.domain.clone(),
            ports: count(self.state.ports_of(network.id)),
            created: network.created.to_string(),
        }
    }

    /// What the node of a VM says of its present run.
    fn vm_report(&self, vm: &Vm) -> Option<&VmReport> {
        let run = vm.assignment?;
        let told = &self.reports.get(&run.node)?.local.vms;
        told.iter().find(|seen| seen.vm == vm.id && seen.epoch == run.epoch)
    }

    fn vm_state(&self, vm: &Vm) -> (api::VmState, Option<String>) {
        let wanted = vm.desired == DesiredRun::Running;
        let Some(run) = vm.assignment else {
            if let Some(saved) = vm.saved() {
                let failed = match &vm.last_exit {
                    Some(VmExit::Crashed(why)) => format!("; it could not be resumed: {why}"),
                    _ => String::new(),
                };
                let size = saved.bytes.div_ceil(1 << 20);
                return match wanted {
                    true => (api::VmState::Pending, Some("suspended, waits for a node".to_owned())),
                    false => (
                        api::VmState::Suspended,
                        Some(format!("since {}, its state takes {size} MiB{failed}", saved.at)),
                    ),
                };
            }
            let ended = match &vm.last_exit {
                Some(VmExit::Crashed(why)) => Some(format!("crashed: {why}")),
                Some(VmExit::GuestShutdown) => Some("the guest shut itself down".to_owned()),
                Some(VmExit::NodeLost) => Some("its node was lost".to_owned()),
                Some(VmExit::Stopped) | None => None,
            };
            let filling =
                vm.disks.iter().filter_map(|disk| self.state.volumes.get(disk)).any(|disk| !disk.is_filled());
            return match (wanted, filling) {
                (true, true) => {
                    (api::VmState::Pending, Some("its disk is being copied from the image".to_owned()))
                }
                (true, false) => {
                    (api::VmState::Pending, ended.or_else(|| Some("waits for a node".to_owned())))
                }
                (false, _) => (api::VmState::Stopped, ended),
            };
        };
        if !self.reports.contains_key(&run.node) {
            return (
                api::VmState::Unknown,
                Some(format!("node {} does not answer", self.node_name(run.node))),
            );
        }
        if vm.saving().is_some() || vm.is_written(run.epoch) {
            return (api::VmState::Suspending, None);
        }
        match self.vm_report(vm).map(|seen| &seen.state) {
            _ if !wanted => (api::VmState::Stopping, None),
            Some(VmRunState::Running | VmRunState::Paused) if vm.migration.is_some() => {
                let to = vm.migration.map(|migration| format!("to {}", self.node_name(migration.to)));
                (api::VmState::Migrating, to)
            }
            Some(VmRunState::Running | VmRunState::Paused) if vm.renewal.is_some() => {
                (api::VmState::Migrating, Some("into a new process".to_owned()))
            }
            Some(VmRunState::Running) => (api::VmState::Running, None),
            Some(VmRunState::Paused) => (api::VmState::Paused, None),
            Some(VmRunState::Waiting(why)) => (api::VmState::Starting, Some(why.clone())),
            Some(VmRunState::Stopping | VmRunState::Exited) => (api::VmState::Stopping, None),
            None => (api::VmState::Starting, None),
        }
    }

    /// A VM.
    pub fn vm(&self, vm: &Vm) -> api::Vm {
        let (state, message) = self.vm_state(vm);
        let image = self.state.images.get(&vm.image);
        let disk = |id: &VolumeId| {
            let volume = self.state.volumes.get(id)?;
            let state = device_state(vm, VmDevice::Disk(*id));
            Some(api::VmDisk { volume: volume.name.clone(), size_bytes: volume.size_bytes, state })
        };
        let nic = |id: &PortId| {
            let port = self.state.ports.get(id)?;
            let state = device_state(vm, VmDevice::Nic(*id));
            let network = self.state.subject_name(&Subject::Network(port.network));
            Some(api::VmNic { network, mac: port.mac.to_string(), ip: port.ip.to_string(), state })
        };
        let agent = self.vm_report(vm).and_then(|report| report.agent.as_ref());
        let nics: Vec<_> = vm.ports.iter().filter_map(nic).collect();
        api::Vm {
            id: vm.id.to_string(),
            name: vm.name.clone(),
            state,
            message,
            desired: match vm.desired {
                _ if vm.saving().is_some() || vm.is_suspended() => api::VmDesired::Suspended,
                DesiredRun::Running if vm.paused.is_some() => api::VmDesired::Paused,
                DesiredRun::Running => api::VmDesired::Running,
                DesiredRun::Stopped(_) => api::VmDesired::Stopped,
            },
            after_crash: vm.after_crash,
            node: vm.assignment.map(|run| self.node_name(run.node)),
            epoch: vm.epoch.0,
            vcpus: vm.vcpus,
            cpu_model: vm.cpu_model,
            memory_bytes: vm.memory_bytes,
            image: image.map(|image| image.name.clone()).unwrap_or_default(),
            cmdline: vm
                .cmdline
                .clone()
                .or_else(|| image.map(|image| image.cmdline.clone()))
                .unwrap_or_default(),
            disks: vm.disks.iter().filter_map(disk).collect(),
            addresses: guest::addresses(agent, &nics),
            agent: agent.map(guest::agent),
            nics,
            created: vm.created.to_string(),
            cloud_init: vm.cloud_init.as_ref().map(|given| guest::cloud_init(given, &vm.name)),
            machine: vm.assignment.map(|run| api::Machine {
                vcpus: run.make.vcpus,
                max_vcpus: run.make.most.vcpus,
                memory_bytes: run.make.memory_bytes,
                max_memory_bytes: run.make.most.memory_bytes,
                executable: self.vm_report(vm).map(|seen| seen.executable),
            }),
        }
    }

    /// Health of the whole, and what is not as it should be.
    pub fn status(&self) -> api::Status {
        let problems = self.problems();
        let health = problems.iter().map(|problem| problem.health).max().unwrap_or(api::Health::Healthy);
        let (can_lose_nodes, can_lose) = self.can_lose();
        let nodes_available =
            count(self.state.nodes.values().filter(|node| node.availability == Availability::Available));
        let disks = self.disks();
        let pool: Vec<_> = disks.iter().filter(|disk| disk.id.is_some()).collect();
        let raw_bytes: u64 = pool.iter().map(|disk| disk.capacity_bytes).sum();
        let nodes_with_disks: std::collections::BTreeSet<_> = pool.iter().map(|disk| &disk.node).collect();
        let copies = count(nodes_with_disks.iter()).clamp(1, 3);
        api::Status {
            cluster: self.state.cluster.as_ref().map(|cluster| cluster.name.clone()),
            health,
            problems,
            can_lose,
            can_lose_nodes,
            leader: self.leader.map(|node| self.node_name(node)),
            nodes: count(self.state.nodes.values()),
            nodes_available,
            disks: count(pool.iter()),
            volumes: count(self.state.volumes.values()),
            volumes_degraded: count(self.state.volumes.values().filter(|volume| volume.is_degraded())),
            moves: self.state.volumes.values().map(volumes::moves).sum(),
            vms: count(self.state.vms.values()),
            vms_running: count(
                self.state.vms.values().filter(|vm| self.vm_state(vm).0 == api::VmState::Running),
            ),
            raw_bytes,
            used_bytes: pool.iter().filter_map(|disk| disk.used_bytes).sum(),
            usable_bytes: raw_bytes / u64::from(copies),
            usable_copies: copies,
        }
    }

    fn problems(&self) -> Vec<api::StatusProblem> {
        let mut problems = Vec::new();
        let mut add = |health, kind: &str, name: String, message: String| {
            problems.push(api::StatusProblem { health, kind: kind.to_owned(), name, message });
        };
        if self.leader.is_none() {
            add(
                api::Health::Critical,
                "cluster",
                "cluster".into(),
                "there is no leader: no majority answers".into(),
            );
        }
        for node in self.state.nodes.values() {
            match node.availability {
                Availability::Lost { since } => {
                    add(api::Health::Degraded, "node", node.name.clone(), format!("lost since {since}"));
                }
                Availability::Available => {
                    let away = |report: &NodeReport| report.local.data_process == ProcessState::Away;
                    if self.reports.get(&node.id).is_some_and(away) {
                        let message = "its data process does not answer".to_owned();
                        add(api::Health::Degraded, "node", node.name.clone(), message);
                    }
                }
            }
        }
        for disk in self.disks() {
            use api::DiskState::{Dead, Failed, Full, Reserved};
            if matches!(disk.state, Failed | Full | Reserved | Dead) {
                let message = match disk.state {
                    Full => "full".to_owned(),
                    Reserved => "only its reserve is left, it gets no new copies".to_owned(),
                    _ => disk.message.unwrap_or_else(|| "failed".to_owned()),
                };
                add(api::Health::Degraded, "disk", format!("{}:{}", disk.node, disk.path), message);
            }
            // A disk that is given up already needs no warning.
            if !matches!(disk.state, Failed | Dead)
                && let Some(warning) = disk.smart.and_then(|smart| smart.warning)
            {
                add(api::Health::Degraded, "disk", format!("{}:{}", disk.node, disk.path), warning);
            }
            let damaged = disk.scrub.map_or(0, |scrub| scrub.damaged_blocks);
            if damaged > 0 {
                let message = format!("{damaged} damaged blocks wait for repair from other copies");
                add(api::Health::Degraded, "disk", format!("{}:{}", disk.node, disk.path), message);
            }
        }
        for volume in self.state.volumes.values() {
            let view = self.volume(volume);
            if view.state == api::VolumeState::Waiting {
                let message = view.message.unwrap_or_else(|| "I/O waits".to_owned());
                add(api::Health::Critical, "volume", view.name, message);
            } else if let Some(lost) = self.out_of_reach(volume) {
                let message = format!("no complete copy of {lost} of {} segments is in reach", view.segments);
                add(api::Health::Critical, "volume", view.name, message);
            } else if volume.is_degraded() {
                let mut message = format!(
                    "{} of {} copies, {} of {} segments lack some",
                    view.in_sync, view.replicas, view.segments_degraded, view.segments
                );
                if view.state == api::VolumeState::Resyncing {
                    message.push_str(&format!(", rebuilding, {:.0} % there", view.progress * 100.0));
                }
                if let Some(seconds) = view.eta_seconds {
                    message.push_str(&format!(", about {seconds} s to go"));
                }
                if let Some(left) = view.resync_blocks_left.filter(|left| *left > 0) {
                    message.push_str(&format!(", {left} blocks left"));
                }
                add(api::Health::Degraded, "volume", view.name, message);
            }
        }
        for vm in self.state.vms.values().filter(|vm| vm.desired == DesiredRun::Running) {
            if let (api::VmState::Pending | api::VmState::Unknown, message) = self.vm_state(vm) {
                let message = message.unwrap_or_else(|| "does not run".to_owned());
                add(api::Health::Degraded, "vm", vm.name.clone(), message);
            }
        }
        problems.sort_by_key(|problem| std::cmp::Reverse(problem.health));
        problems
    }

    /// How many nodes may be lost now: what consensus and every volume can bear.
    fn can_lose(&self) -> (u32, String) {
        let lost =
            count(self.state.nodes.values().filter(|node| node.availability != Availability::Available));
        let voters = count(self.members.iter().filter(|member| member.role == MemberRole::Voter));
        let consensus = (voters.saturating_sub(1) / 2).saturating_sub(lost);
        let volumes = self.state.volumes.values().map(|volume| self.spare_copies(volume)).min();
        let volumes = volumes.unwrap_or(u32::MAX);
        let nodes = consensus.min(volumes);
        let sentence = match nodes {
            0 if consensus == 0 => "nothing: one more node lost and there is no majority".to_owned(),
            0 => "nothing: some volume has no copy to spare".to_owned(),
            1 => "any 1 node".to_owned(),
            nodes => format!("any {nodes} nodes"),
        };
        (nodes, sentence)
    }
}

/// A token without its secret.
pub fn token(token: &Token) -> api::Token {
    let (kind, uses_left) = match token.kind {
        TokenKind::Join { uses_left } => (api::TokenPurpose::Join, Some(uses_left)),
        TokenKind::Admin => (api::TokenPurpose::Admin, None),
    };
    api::Token {
        id: token.id.to_string(),
        kind,
        uses_left,
        expires: token.expires.map(|at| at.to_string()),
        created: token.created.to_string(),
    }
}

/// A task.
pub fn task(task: &Task) -> api::Task {
    let (state, error) = match &task.state {
        TaskState::Running => (api::TaskState::Running, None),
        TaskState::Done => (api::TaskState::Done, None),
        TaskState::Failed(error) => (
            api::TaskState::Failed,
            Some(api::TaskError { detail: error.detail.clone(), next: error.next.clone() }),
        ),
    };
    api::Task {
        id: task.id.to_string(),
        kind: task.kind.clone(),
        target: task.subject_name.clone(),
        target_id: subject_id(&task.subject),
        state,
        progress: f64::from(task.permille) / 1000.0,
        message: task.message.clone(),
        error,
        created: task.created.to_string(),
        finished: task.finished.map(|at| at.to_string()),
    }
}

/// An event.
pub fn event(event: &Event) -> api::Event {
    let severity = match event.severity {
        Severity::Info => "info",
        Severity::Warning => "warning",
        Severity::Critical => "critical",
    };
    api::Event {
        sequence: event.sequence,
        at: event.at.to_string(),
        severity: severity.to_owned(),
        kind: event.kind.clone(),
        subject: event.subject_name.clone(),
        subject_id: subject_id(&event.subject),
        message: event.message.clone(),
    }
}

fn subject_id(subject: &Subject) -> String {
    match subject {
        Subject::Cluster => String::new(),
        Subject::Node(id) => id.to_string(),
        Subject::Disk(id) => id.to_string(),
        Subject::Volume(id) => id.to_string(),
        Subject::Image(id) => id.to_string(),
        Subject::Network(id) => id.to_string(),
        Subject::Vm(id) => id.to_string(),
        Subject::Token(id) => id.to_string(),
    }
}

fn count(items: impl Iterator<Item: Sized>) -> u32 {
    u32::try_from(items.count()).unwrap_or(u32::MAX)
}

/// The scrubs of all disks together.
fn pool_scrub(disks: &[api::Disk]) -> api::PoolScrub {
    let scrubs = || disks.iter().filter_map(|disk| disk.scrub.as_ref());
    let running = || {
        let running = disks.iter().filter_map(|disk| Some((disk, disk.scrub.as_ref()?)));
        running.filter(|(_, scrub)| scrub.state == api::ScrubState::Running)
    };
    let checked: u64 = running().map(|(_, scrub)| scrub.checked_bytes).sum();
    let used: u64 = running().filter_map(|(disk, _)| disk.used_bytes).sum();
    // Times are written such that their order is that of their text.
    let ends: Option<Vec<&String>> =
        disks.iter().map(|disk| disk.scrub.as_ref()?.last_end.as_ref()).collect();
    api::PoolScrub {
        last_complete: ends.and_then(|ends| ends.into_iter().min().cloned()),
        disks_running: count(running()),
        percent: (used > 0).then(|| u8::try_from(checked.saturating_mul(100) / used).unwrap_or(100).min(100)),
        damaged_blocks: scrubs().map(|scrub| scrub.damaged_blocks).sum(),
        repaired_blocks: scrubs().map(|scrub| scrub.repaired_blocks).sum(),
    }
}

fn scrub(seen: &ScrubReport) -> api::DiskScrub {
    api::DiskScrub {
        state: match seen.progress {
            ScrubProgress::Idle => api::ScrubState::Idle,
            ScrubProgress::Running => api::ScrubState::Running,
        },
        last_end: seen.last_end.map(|at| at.to_string()),
        checked_bytes: seen.checked_bytes,
        damaged_blocks: seen.damaged_blocks,
        repaired_blocks: seen.repaired_blocks,
    }
}
