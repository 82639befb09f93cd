//! From requests of the API to commands: names are looked up, ids and random numbers drawn, defaults filled in.
//!
//! Only what needs the state to understand is checked here; whether a command is allowed is decided where it is applied.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;

use super::{
    problem::{Problem, ProblemKind},
    types as api,
};
use crate::state::{
    ClusterState, DesiredRun, DiskId, DiskState, ImageId, ImagePart, NetworkId, NodeId, Op, PortId, StopMode,
    VmId, VolumeId, WipePolicy,
    command::{NewPort, NewVm, NewVolume},
    report::NodeReport,
};

/// Memory of a VM when nothing was said.
const USUAL_MEMORY_BYTES: u64 = 1 << 30;
/// MTU of guests when nothing was said: frames are split over the mesh, whatever its MTU.
const USUAL_MTU: u16 = 1500;
/// Copies of a volume when nothing was said, as far as there are nodes.
const USUAL_REPLICAS: usize = 3;

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
            },
            near: None,
            unreachable: self.silent.clone(),
        }
    }

    /// The volume of an image's disk.
    pub fn image_volume(&self, image: &str, size_bytes: u64) -> NewVolume {
        NewVolume {
            id: VolumeId::random(),
            name: format!("image-{image}"),
            size_bytes,
            replicas: self.usual_replicas(),
            min_in_sync: None,
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
            memory_bytes: request.memory_bytes.unwrap_or(USUAL_MEMORY_BYTES),
            image: image.id,
            cmdline: request.cmdline.clone(),
            disks,
            ports,
            preferred_node: node,
            near: node.filter(|node| !self.silent.contains(node)).or_else(|| self.roomiest()),
            desired,
        };
        Ok(Op::CreateVm { vm, unreachable: self.silent.clone() })
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
