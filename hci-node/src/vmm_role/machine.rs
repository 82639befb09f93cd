//! What a guest's machine gets and loses while it runs, and what it is made with when the guest resets it.
//!
//! A guest that resets itself gets a new machine, which has what the old one had come to have: what was plugged is in it, and what the guest was
//! asked to let go of is not.

use std::collections::BTreeSet;

use netfabric::rpc::RpcError;
use tokio::sync::oneshot;
use vmm::{DeviceConfig, VmConfig, VmHandle};

use super::{
    Machine, ended, error_chain,
    protocol::{MachineStatus, Plug, Reshape, Unplug},
    refused,
};
use crate::state::Shape;

/// What the next machine of a run is made with.
pub(super) struct Making {
    config: VmConfig,
    /// Devices that the guest was asked to let go of.
    leaving: BTreeSet<String>,
}

impl Making {
    pub(super) fn new(config: VmConfig) -> Self {
        Self { config, leaving: BTreeSet::new() }
    }

    /// The configuration of the next machine, which will not have what was to leave.
    pub(super) fn next(&mut self) -> VmConfig {
        let leaving = std::mem::take(&mut self.leaving);
        self.config.disks.retain(|disk| !leaving.contains(&disk.id));
        self.config.nics.retain(|nic| !leaving.contains(&nic.id));
        self.config.clone()
    }

    /// The machine has this now.
    fn joined(&mut self, device: DeviceConfig) {
        self.leaving.remove(device.id());
        match device {
            DeviceConfig::Disk(disk) => {
                self.config.disks.retain(|other| other.id != disk.id);
                self.config.disks.push(disk);
            }
            DeviceConfig::Nic(nic) => {
                self.config.nics.retain(|other| other.id != nic.id);
                self.config.nics.push(nic);
            }
        }
    }

    fn leaves(&mut self, id: String) {
        self.leaving.insert(id);
    }

    fn reshaped(&mut self, shape: Shape) {
        self.config.vcpus = self.config.vcpus.max(shape.vcpus);
        self.config.plugged_bytes = shape.memory_bytes.saturating_sub(self.config.memory_bytes);
    }
}

impl Machine {
    pub(super) async fn plug(&self, Plug { device }: Plug) -> Result<(), RpcError> {
        let plugged = device.clone();
        self.on_main_thread(move |guest| guest.plug(device).map(drop)).await?;
        self.now.lock().making.joined(plugged);
        Ok(())
    }

    pub(super) fn unplug(&self, Unplug { id }: Unplug) -> Result<(), RpcError> {
        self.guest()?.unplug(&id).map_err(|error| refused(error_chain(&error)))?;
        self.now.lock().making.leaves(id);
        Ok(())
    }

    pub(super) async fn reshape(&self, Reshape { shape }: Reshape) -> Result<(), RpcError> {
        let guest = self.guest()?;
        // Processors are only ever added.
        if shape.vcpus > guest.status().vcpus {
            self.on_main_thread(move |guest| guest.set_vcpus(shape.vcpus)).await?;
        }
        let asked = guest.set_memory(shape.memory_bytes);
        asked.map_err(|error| refused(error_chain(&error)))?;
        self.now.lock().making.reshaped(shape);
        Ok(())
    }

    /// What the machine has.
    pub(super) fn seen(guest: &VmHandle) -> MachineStatus {
        let status = guest.status();
        MachineStatus {
            shape: Shape { vcpus: status.vcpus, memory_bytes: status.memory.present_bytes },
            devices: status.devices.into_iter().map(|device| device.id).collect(),
        }
    }

    /// Has the main thread do it, between whatever else it does.
    pub(super) async fn on_main_thread<E: std::error::Error>(
        &self,
        act: impl FnOnce(&VmHandle) -> Result<(), E> + Send + 'static,
    ) -> Result<(), RpcError> {
        let (done, outcome) = oneshot::channel();
        // Whoever asked may have gone meanwhile.
        self.guest()?.ask(move |guest| drop(done.send(act(guest).map_err(|error| error_chain(&error)))));
        outcome.await.map_err(|_| ended())?.map_err(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(slot: u8) -> DeviceConfig {
        let config =
            serde_json::json!({ "disk": { "id": format!("disk{slot}"), "socket": "/d", "slot": slot } });
        serde_json::from_value(config).unwrap()
    }

    #[test]
    fn a_guest_that_resets_itself_keeps_what_was_plugged_and_not_what_was_to_leave() {
        let config = serde_json::from_value(serde_json::json!({
            "name": "web", "vcpus": 1, "memory_bytes": 1 << 30, "boot": { "kernel": { "kernel": "/k" } }, "console_socket": "/c",
            "disks": [{ "id": "disk2", "socket": "/a", "slot": 2 }],
        }));
        let mut making = Making::new(config.unwrap());
        let ids = |config: &VmConfig| config.disks.iter().map(|disk| disk.id.clone()).collect::<Vec<_>>();
        making.joined(disk(3));
        making.joined(disk(4));
        making.leaves("disk3".into());
        making.reshaped(Shape { vcpus: 3, memory_bytes: 3 << 29 });
        let next = making.next();
        assert_eq!((ids(&next), next.vcpus), (vec!["disk2".to_owned(), "disk4".to_owned()], 3));
        assert_eq!((next.memory_bytes, next.plugged_bytes), (1 << 30, 1 << 29));
        // One that left and came again stays.
        making.leaves("disk4".into());
        making.joined(disk(4));
        assert_eq!(ids(&making.next()), ["disk2", "disk4"]);
    }
}
