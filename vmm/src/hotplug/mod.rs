//! Disks, NICs and vCPUs that come while the guest runs, and disks and NICs that go.
//!
//! The guest hears of it through ACPI: a general-purpose event, whose method ([`crate::acpi`]) reads in the [`registers`] what has happened. A device that
//! was plugged is in its slot before the guest hears of it. One that is to go stays, and works, until the guest has let go of it; then it disappears
//! from the bus at once ([`controller`]), and the main thread takes it apart: its worker, its queues, its interrupts.
//!
//! # Invariants
//! - Parts come and go on the main thread, between two of its jobs: never while the guest is written ([`crate::VmHandle::save`],
//!   [`crate::VmHandle::migrate`]). [`Machine::core`]'s lock sees to that where other threads do it.
//! - So the devices of a guest that is written are those that its status names, those included that the guest has let go of meanwhile. Which these are is
//!   part of the registers' state; they are taken apart where the guest goes on.
//! - A device that could not be plugged leaves nothing behind.

pub(crate) mod controller;
pub(crate) mod maker;
pub(crate) mod registers;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{MappedMutexGuard, MutexGuard};

use self::maker::Maker;
use crate::config::{ConfigError, DeviceConfig};
use crate::error::{VmError, resource};
use crate::handle::{BackendState, VmHandle};
use crate::pci::slots;
use crate::transfer::{Core, Vcpu};
use crate::vcpu::{self, VcpuContext};
use crate::virtio::vhost_user::worker;
use crate::vm::Machine;

/// How long a plugged device's backend may take to answer, at most: the main thread waits for it.
const BACKEND_DEADLINE: Duration = Duration::from_secs(10);
/// How often that wait looks whether it is there, and whether the guest has ended.
const LOOK: Duration = Duration::from_millis(2);
/// Between a backend's connection and what it says of itself, or for the error to be told.
const LAST_WORD: Duration = Duration::from_millis(200);
/// How long the gate may be about to change, at most.
const GATE_DEADLINE: Duration = Duration::from_secs(6);
/// How long others may use the guest's core for something short.
const CORE_DEADLINE: Duration = Duration::from_millis(200);

/// Why a part could not be added or taken away. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The guest is being written down or moved, or has been and is held for that.
    #[error("the guest is being saved or moved; try again when that has ended")]
    Busy,
    /// The guest has ended.
    #[error("the guest has ended")]
    Ended,
    /// The configuration is not acceptable; everything that is wrong with it.
    #[error("bad configuration: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<ConfigError>),
    /// There is a device of this name, or one that the guest has not let go of yet.
    #[error("there already is a device {0:?}")]
    IdTaken(String),
    /// A device uses this socket.
    #[error("socket {socket} is device {id:?}'s")]
    SocketTaken {
        /// The socket.
        socket: PathBuf,
        /// Whose it is.
        id: String,
    },
    /// There is a device in this slot.
    #[error("slot {slot} is device {id:?}'s")]
    SlotTaken {
        /// The slot.
        slot: u8,
        /// Whose it is.
        id: String,
    },
    /// All slots are taken.
    #[error("all slots for disks and NICs are taken")]
    Full,
    /// There is no such device.
    #[error("there is no disk or NIC {0:?}")]
    Unknown(String),
    /// vCPUs are only added, up to what the guest was made for.
    #[error("{wanted} vCPUs are asked for; a guest that runs with {now} can have {now} to {most}")]
    Vcpus {
        /// What was asked for.
        wanted: u8,
        /// What there is.
        now: u8,
        /// What there can be.
        most: u8,
    },
    /// The part could not be made. vCPUs that were added before the one that could not stay.
    #[error(transparent)]
    Make(#[from] VmError),
}

/// A disk or NIC that a guest has.
pub(crate) struct Attached {
    pub(crate) slot: u8,
    pub(crate) backend: Arc<worker::Shared>,
}

/// What parts are made with while the guest runs.
pub(crate) struct Plant {
    pub(crate) maker: Arc<Maker>,
    /// How long a backend is waited for.
    pub(crate) backend_timeout: Duration,
    /// Most vCPUs that there can be.
    pub(crate) max_vcpus: u8,
    /// One that was made and could not be started. KVM makes none with the same number again.
    pub(crate) spare: Option<Vcpu>,
}

/// Has a guest's main thread take apart what the guest lets go of.
pub(crate) fn take_apart_on_main_thread(machine: &Arc<Machine>) {
    let weak = Arc::downgrade(machine);
    machine.hotplug.on_ejection(Box::new(move || {
        if let Some(machine) = weak.upgrade() {
            machine.clone().lifecycle.ask(Box::new(move || machine.take_apart()));
        }
    }));
}

impl VmHandle {
    /// Adds a disk or NIC: connects to its backend, puts it into its slot and tells the guest. Returns the slot.
    ///
    /// For the main thread ([`VmHandle::ask`]), as it makes threads and waits for the backend, for 10 seconds at most.
    ///
    /// # Errors
    /// The guest is as it was before.
    pub fn plug(&self, device: DeviceConfig) -> Result<u8, PlugError> {
        self.machine.plug(device)
    }

    /// Asks the guest to let go of a disk or NIC. Returns at once; the end is that the device is gone from [`VmHandle::status`]. A guest that does not
    /// care keeps it, and it works on. Asking again asks the guest again.
    pub fn unplug(&self, id: &str) -> Result<(), PlugError> {
        self.machine.unplug(id)
    }

    /// Adds vCPUs until there are so many, and tells the guest. They are only ever added.
    ///
    /// For the main thread ([`VmHandle::ask`]), as it makes threads.
    pub fn set_vcpus(&self, vcpus: u8) -> Result<(), PlugError> {
        self.machine.set_vcpus(vcpus)
    }
}

impl Machine {
    /// The guest's core, while nobody writes it down or moves it.
    fn settled(&self) -> Result<MappedMutexGuard<'_, Core>, PlugError> {
        if self.lifecycle.ended().is_some() {
            return Err(PlugError::Ended);
        }
        let core = self.core.try_lock_for(CORE_DEADLINE).ok_or(PlugError::Busy)?;
        let core = MutexGuard::try_map(core, Option::as_mut).map_err(|_| PlugError::Ended)?;
        match core.logs {
            // It was moved, and whoever moved it has not decided yet where it goes on.
            Some(_) => Err(PlugError::Busy),
            None => Ok(core),
        }
    }

    fn plug(&self, device: DeviceConfig) -> Result<u8, PlugError> {
        device.validate().map_err(PlugError::Config)?;
        let _core = self.settled()?;
        let root = self.devices.pci.upgrade().ok_or(PlugError::Ended)?;
        let plant = self.plant.lock();
        let plant = plant.as_ref().ok_or(PlugError::Ended)?;
        let slot = self.place(&device)?;
        let worker = maker::dial(device)?;
        let backend = worker.shared();
        let deadline = Instant::now() + plant.backend_timeout.min(BACKEND_DEADLINE);
        while backend.status().backend == BackendState::Waiting && Instant::now() < deadline {
            if self.lifecycle.ended().is_some() {
                return Err(PlugError::Ended);
            }
            std::thread::sleep(LOOK);
        }
        // One that is there has said what it offers, or does so at once.
        let function = plant.maker.vhost_user(slot.into(), worker, LAST_WORD)?;
        root.attach(slot.into(), function);
        tracing::info!(device = backend.id(), slot, "device is plugged");
        self.backends.write().push(Attached { slot, backend });
        self.hotplug.plug(slot);
        Ok(slot)
    }

    /// Where a device goes.
    fn place(&self, device: &DeviceConfig) -> Result<u8, PlugError> {
        let attached = self.backends.read();
        for other in attached.iter() {
            let id = || other.backend.id().to_owned();
            if other.backend.id() == device.id() {
                return Err(PlugError::IdTaken(id()));
            }
            if other.backend.socket() == device.socket() {
                return Err(PlugError::SocketTaken { socket: device.socket().to_owned(), id: id() });
            }
            if device.slot() == Some(other.slot) {
                return Err(PlugError::SlotTaken { slot: other.slot, id: id() });
            }
        }
        let taken = |slot: &u8| attached.iter().any(|other| other.slot == *slot);
        let free = || slots::DISKS_AND_NICS.map(|slot| slot as u8).find(|slot| !taken(slot));
        device.slot().or_else(free).ok_or(PlugError::Full)
    }

    fn unplug(&self, id: &str) -> Result<(), PlugError> {
        let _core = self.settled()?;
        let attached = self.backends.read();
        let device = attached.iter().find(|device| device.backend.id() == id);
        let slot = device.ok_or_else(|| PlugError::Unknown(id.to_owned()))?.slot;
        self.hotplug.ask(slot);
        tracing::info!(device = id, slot, "guest is asked to let go of a device");
        Ok(())
    }

    fn set_vcpus(&self, wanted: u8) -> Result<(), PlugError> {
        let mut core = self.settled()?;
        let mut plant = self.plant.lock();
        let plant = plant.as_mut().ok_or(PlugError::Ended)?;
        let (now, most) = (core.vcpus.len() as u8, plant.max_vcpus);
        if !(now..=most).contains(&wanted) {
            return Err(PlugError::Vcpus { wanted, now, most });
        }
        // Held until the new threads are among them: whoever changes the gate kicks all of them. Not waited for for ever: others take both locks in the
        // other order.
        let mut threads = self.vcpu_threads.try_lock_for(GATE_DEADLINE).ok_or(PlugError::Busy)?;
        let added = (now..wanted).try_for_each(|id| self.add_vcpu(id, &mut core, plant, &mut threads));
        let there = core.vcpus.len() as u8;
        if there > now {
            tracing::info!(vcpus = there, "vCPUs are added");
            self.hotplug.set_vcpus(there);
        }
        added
    }

    fn add_vcpu(
        &self,
        id: u8,
        core: &mut Core,
        plant: &mut Plant,
        threads: &mut Vec<JoinHandle<()>>,
    ) -> Result<(), PlugError> {
        let context = self.vcpu_context().ok_or(PlugError::Ended)?;
        let vcpu = match plant.spare.take() {
            Some(spare) => spare,
            None => plant.maker.vcpu(id, None)?,
        };
        match vcpu::spawn(id, vcpu.fd.clone(), context) {
            Ok(thread) => {
                threads.push(thread);
                core.vcpus.push(vcpu);
                Ok(())
            }
            Err(error) => {
                plant.spare = Some(vcpu);
                Err(resource("vCPU thread")(error).into())
            }
        }
    }

    /// What a vCPU's thread works with. `None` once the guest has ended.
    fn vcpu_context(&self) -> Option<VcpuContext> {
        if self.lifecycle.ended().is_some() {
            return None;
        }
        Some(VcpuContext {
            gate: self.gate.clone(),
            lifecycle: self.lifecycle.clone(),
            ports: self.devices.ports.upgrade()?,
            mmio: self.devices.mmio.upgrade()?,
        })
    }

    /// Takes apart what the guest has let go of.
    pub(crate) fn take_apart(&self) {
        // Not while it is written.
        let _core = self.core.lock();
        let Some(root) = self.devices.pci.upgrade() else { return };
        for slot in self.hotplug.ejected().iter() {
            let function = root.detach(slot.into());
            if let Some(function) = &function {
                function.keep_away();
            }
            drop(function);
            self.backends.write().retain(|device| device.slot != slot);
            self.hotplug.forget(slot);
            tracing::info!(slot, "guest has let go of a device");
        }
    }
}

#[cfg(test)]
mod tests;
