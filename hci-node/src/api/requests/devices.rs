//! Requests about what a VM gets and loses while it runs: disks, NICs, memory.

use super::{Context, invalid, not_found};
use crate::{
    api::{
        problem::{Problem, ProblemKind},
        types as api,
    },
    control::leader::scheduler,
    state::{
        AfterDetach, Compression, Durability, MAX_NAME, Op, PortId, Vm, VmDevice, VolumeId,
        command::{GivenDisk, NewPort, NewVolume},
    },
};

impl Context<'_> {
    /// `POST /v1/vms/NAME/disks`: a new volume, or one that is there.
    pub fn attach_disk(&self, name: &str, request: api::AttachDisk) -> Result<Op, Problem> {
        let vm = self.vm(name)?;
        let disk = match (request.volume, request.size_bytes) {
            (Some(volume), None) => GivenDisk::Volume(self.volume(&volume)?),
            (None, Some(size_bytes)) => GivenDisk::New(NewVolume {
                id: VolumeId::random(),
                name: request.name.unwrap_or_else(|| self.disk_name(vm)),
                size_bytes,
                replicas: request.replicas.unwrap_or_else(|| self.usual_replicas()),
                min_in_sync: None,
                durability: Durability::WriteBack,
                compression: Compression::Off,
            }),
            _ => {
                return Err(invalid(
                    "a disk is either a volume that is there, or a new one of some size",
                    "hci volume attach VOLUME VM, or hci vm disk add VM --size 10GiB",
                ));
            }
        };
        Ok(Op::AttachDisk { vm: vm.id, disk, unreachable: self.silent.clone() })
    }

    /// The first free name of the kind that the VM's first disks have.
    fn disk_name(&self, vm: &Vm) -> String {
        let mut names = (0..u16::MAX).map(|index| format!("{}-disk{index}", vm.name));
        let free = names.find(|name| self.state.find_volume(name).is_none());
        free.filter(|name| name.len() <= MAX_NAME).unwrap_or_else(|| format!("disk-{}", VolumeId::random()))
    }

    /// `POST /v1/vms/NAME/disks/VOLUME/detach`.
    pub fn detach_disk(&self, name: &str, volume: &str, request: api::DetachDisk) -> Result<Op, Problem> {
        let vm = self.vm(name)?.id;
        let then = if request.delete { AfterDetach::Delete } else { AfterDetach::Keep };
        Ok(Op::DetachDevice { vm, device: VmDevice::Disk(self.volume(volume)?), then })
    }

    /// `POST /v1/vms/NAME/nics`.
    pub fn attach_nic(&self, name: &str, request: &api::AttachNic) -> Result<Op, Problem> {
        let vm = self.vm(name)?.id;
        let network = self
            .state
            .find_network(&request.network)
            .ok_or_else(|| not_found("network", &request.network))?;
        Ok(Op::AttachNic { vm, port: NewPort { id: PortId::random(), network: network.id } })
    }

    /// `DELETE /v1/vms/NAME/nics/NIC`: by its Ethernet address, or by its network if it is the only one there.
    pub fn detach_nic(&self, name: &str, nic: &str) -> Result<Op, Problem> {
        let vm = self.vm(name)?;
        let network = self.state.find_network(nic).map(|network| network.id);
        let is_meant = |port: &&PortId| {
            self.state.ports.get(port).is_some_and(|port| {
                port.mac.to_string().eq_ignore_ascii_case(nic) || network == Some(port.network)
            })
        };
        let meant: Vec<_> = vm.ports.iter().filter(is_meant).collect();
        match meant.as_slice() {
            [port] => {
                let device = VmDevice::Nic(**port);
                Ok(Op::DetachDevice { vm: vm.id, device, then: AfterDetach::Delete })
            }
            [] => Err(Problem::new(
                ProblemKind::NotFound,
                format!("VM {} has no NIC {nic}", vm.name),
                format!("see what it has: hci vm get {}", vm.name),
            )),
            _ => Err(invalid(
                format!("VM {} has several NICs on network {nic}", vm.name),
                "name one by its Ethernet address: hci vm nic remove VM MAC",
            )),
        }
    }

    /// Whether the node that a VM runs on has the memory that it is to get.
    pub(super) fn check_growth(&self, vm: &Vm, wanted: Option<u64>) -> Result<(), Problem> {
        let (Some(run), Some(wanted)) = (vm.assignment, wanted) else { return Ok(()) };
        let Some(report) = self.reports.get(&run.node) else { return Ok(()) };
        let more = wanted.min(run.make.most.memory_bytes).saturating_sub(run.make.memory_bytes);
        let free = scheduler::free_memory(self.state, run.node, report);
        if more <= free {
            return Ok(());
        }
        let node = self.state.nodes.get(&run.node).map_or("its node", |node| &node.name);
        Err(Problem::new(
            ProblemKind::Capacity,
            format!("VM {} needs {} MiB more, and {node} has {} MiB left", vm.name, more >> 20, free >> 20),
            format!("move it to a node with more memory first: hci vm migrate {}", vm.name),
        ))
    }
}
