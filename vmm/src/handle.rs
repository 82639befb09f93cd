//! Control of a running guest from other threads.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::error::VmError;
use crate::hotplug::Attached;
use crate::lifecycle::ExitReason;
use crate::resize::{MemoryError, MemoryStatus};
use crate::state::{DevicesState, StateError};
use crate::transfer::migrate::{self, Destination, Migrated, MigrationOptions, MigrationProgress};
use crate::transfer::{Pages, TransferError};
use crate::vcpu::gate::Wanted;
use crate::virtio::vhost_user::worker::BackendStatus;
use crate::vm::Machine;

/// How long vCPUs may take to leave the guest and come to the gate.
const GATE_DEADLINE: Duration = Duration::from_secs(5);

/// What the guest is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// vCPUs run.
    Running,
    /// vCPUs are held by [`VmHandle::pause`], or have not run since [`crate::Vm::restore`].
    Paused,
    /// The guest has ended.
    Ended(ExitReason),
}

/// Whether a device's backend is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendState {
    /// Connected and negotiated.
    Connected,
    /// Away; the queues stall and the VMM dials again.
    Waiting,
}

/// Whether a device stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Presence {
    /// It does.
    Present,
    /// The guest was asked to let go of it ([`VmHandle::unplug`]). Until it has, the device works on.
    Leaving,
}

/// A disk or NIC, seen from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// The id from the configuration.
    pub id: String,
    /// Its PCI slot.
    pub slot: u8,
    /// Whether it stays.
    pub presence: Presence,
    /// Its backend.
    pub backend: BackendState,
    /// How often the backend came back after it had been lost.
    pub reconnects: u64,
}

/// A guest, seen from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// What it is doing.
    pub state: VmState,
    /// How many vCPUs it has. Its system may not use those yet that were added.
    pub vcpus: u8,
    /// Its disks and NICs.
    pub devices: Vec<DeviceStatus>,
    /// How much memory it has.
    #[serde(default)]
    pub memory: MemoryStatus,
}

/// Controls a guest. Clones control the same one; all stay valid after its end.
#[derive(Clone)]
pub struct VmHandle {
    pub(crate) machine: Arc<Machine>,
}

impl VmHandle {
    /// Presses the power button. The guest shuts down if it cares.
    pub fn power_button(&self) {
        self.machine.power.press_power_button();
    }

    /// Ends the guest as if it had asked for a reset.
    pub fn reset(&self) {
        self.machine.lifecycle.end(ExitReason::Reset);
    }

    /// Ends the guest at once, like a pulled plug.
    pub fn kill(&self) {
        self.machine.lifecycle.end(ExitReason::Killed);
    }

    /// Holds all vCPUs. Returns when they have stopped; after an error they run on.
    pub fn pause(&self) -> Result<(), VmError> {
        self.set_gate(Wanted::Pause, "pause")
    }

    /// Lets the vCPUs run again, and devices work that were held by [`VmHandle::save`] or [`crate::Vm::restore`]: that makes threads, as
    /// [`VmHandle::save_devices`] does.
    ///
    /// The guest's clocks have gone on meanwhile, unless it was made by [`crate::Vm::restore`]. Its watchdog for hung processors is told that they
    /// were not.
    pub fn resume(&self) -> Result<(), VmError> {
        if self.machine.lifecycle.ended().is_some() {
            return Err(VmError::Ended);
        }
        for backend in self.machine.attached() {
            backend.come_back();
        }
        self.machine.devices.release().map_err(VmError::Device)?;
        if let Some(core) = &mut *self.machine.core.lock() {
            core.logs.take();
            core.tell_of_pause();
        }
        self.set_gate(Wanted::Run, "resume")
    }

    /// Writes a paused guest down: memory, processors and devices, for [`crate::Vm::restore`]. It can go on afterwards, also after an error. Until
    /// it does its devices leave its memory alone.
    ///
    /// As [`VmHandle::save_devices`], not for every thread of a confined process.
    pub fn save(&self, to: &mut dyn Write) -> Result<(), TransferError> {
        self.while_paused(|| {
            let core = self.machine.core.lock();
            let core = core.as_ref().ok_or(StateError::Ended)?;
            self.machine.hold_devices()?;
            core.save(&self.machine.devices, Pages::Written, to)
        })
    }

    /// Writes a paused guest down as [`VmHandle::save`] does, but without its memory, which stays where it is, and leaves its backends: for another
    /// process of this machine that has the memory ([`VmHandle::memory`]) and goes on with the guest ([`crate::Vm::succeed`]). Until the other one
    /// does, this one can ([`VmHandle::resume`]); whoever lets it sees to it that the other one will not.
    ///
    /// For the main thread only, as [`VmHandle::save`].
    pub fn save_for_successor(&self, to: &mut dyn Write) -> Result<(), TransferError> {
        self.while_paused(|| {
            let core = self.machine.core.lock();
            let core = core.as_ref().ok_or(StateError::Ended)?;
            self.machine.hold_devices()?;
            core.save(&self.machine.devices, Pages::Kept, to)?;
            for backend in self.machine.attached() {
                backend.leave();
            }
            Ok(())
        })
    }

    /// The descriptor of the memfd that the guest's memory is in; none once the guest has been taken apart.
    pub fn memory(&self) -> Option<RawFd> {
        let core = self.machine.core.lock();
        let region = core.as_ref()?.memory.iter().next()?;
        region.file_offset().map(|place| place.file().as_raw_fd())
    }

    /// Writes a running guest so that another VMM can go on with it ([`crate::Vm::restore`]): while it runs, then, held, the last of it. On success it
    /// is held and its devices leave memory alone, as after [`VmHandle::save`], until [`VmHandle::resume`] (if the move is given up after all) or its end.
    /// After an error it goes on as if nothing had been: running again if it ran before. One that is paused moves, too, and stays paused.
    ///
    /// That all of it has been written does not say that it has arrived: the VMM at the other side does. Whoever resumes a guest that was written makes
    /// sure first that the other one will not go on.
    ///
    /// # Errors
    /// Any error of the destination ends the move at once; that is how it is called off. [`TransferError::CannotLog`] comes before anything is written.
    ///
    /// As [`VmHandle::save`], for the main thread only ([`VmHandle::ask`]).
    pub fn migrate(
        &self,
        to: &mut dyn Destination,
        options: &MigrationOptions,
        progress: &MigrationProgress,
    ) -> Result<Migrated, TransferError> {
        migrate::run(&self.machine, to, options, progress)
    }

    /// Has the thread that waits in [`crate::Vm::wait`] do something. It is dropped undone if the guest ends first.
    pub fn ask(&self, job: impl FnOnce(&Self) + Send + 'static) {
        let handle = self.clone();
        self.machine.lifecycle.ask(Box::new(move || job(&handle)));
    }

    /// The state of all devices of a paused guest. It can go on afterwards. Memory and processors are not part of it.
    ///
    /// Devices that run are stopped and started again for it, which makes threads: in a confined process the main thread may call this, the
    /// one that takes orders may not ([`crate::isolation`]). The same goes for [`VmHandle::restore_devices`].
    pub fn save_devices(&self) -> Result<DevicesState, StateError> {
        self.while_paused(|| self.machine.devices.save())
    }

    /// Has all devices of a paused guest take over this state, which another guest of the same making was saved with. Memory comes first:
    /// queues go on where it says. After an error the guest must not go on.
    pub fn restore_devices(&self, state: &DevicesState) -> Result<(), StateError> {
        self.while_paused(|| self.machine.devices.restore(state))
    }

    /// Nobody can resume the guest meanwhile: the lock of the threads is held.
    fn while_paused<T, E: From<StateError>>(&self, act: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let _threads = self.machine.vcpu_threads.lock();
        if self.machine.lifecycle.ended().is_some() {
            return Err(StateError::Ended.into());
        }
        match self.machine.gate.wanted() {
            Wanted::Pause => act(),
            Wanted::Run | Wanted::Stop => Err(StateError::NotPaused.into()),
        }
    }

    /// Asks the guest to have so many bytes of memory in all: from `memory_bytes` to `max_memory_bytes` of its configuration, in steps of 2 MiB. Returns at once:
    /// [`VmHandle::status`] says how far it is. A guest that has no driver for it, or uses what it is to unplug, has more or less.
    ///
    /// # Errors
    /// The guest has ended, or cannot have so much or little.
    pub fn set_memory(&self, bytes: u64) -> Result<(), MemoryError> {
        match self.machine.lifecycle.ended() {
            Some(_) => Err(MemoryError::Ended),
            None => self.machine.memories.set_memory(bytes),
        }
    }

    /// Asks the guest's balloon to take so many bytes of memory from it, for the node; less than before gives some back. Returns at once:
    /// [`VmHandle::status`] says how far it is. A guest that has no driver for it, or can spare less, gives less.
    ///
    /// # Errors
    /// The guest has no balloon or has ended, or the number is not one of whole pages up to all of its memory.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), MemoryError> {
        match self.machine.lifecycle.ended() {
            Some(_) => Err(MemoryError::Ended),
            None => self.machine.memories.set_balloon(bytes),
        }
    }

    /// What the guest is doing now.
    pub fn status(&self) -> VmStatus {
        let state = match (self.machine.lifecycle.ended(), self.machine.gate.wanted()) {
            (Some(reason), _) => VmState::Ended(reason),
            (None, Wanted::Pause) => VmState::Paused,
            (None, _) => VmState::Running,
        };
        let leaving = self.machine.hotplug.leaving();
        let device = |device: &Attached| {
            let BackendStatus { backend, reconnects } = device.backend.status();
            let presence = if leaving.contains(device.slot) { Presence::Leaving } else { Presence::Present };
            DeviceStatus {
                id: device.backend.id().to_owned(),
                slot: device.slot,
                presence,
                backend,
                reconnects,
            }
        };
        VmStatus {
            state,
            vcpus: self.machine.hotplug.vcpus(),
            devices: self.machine.backends.read().iter().map(device).collect(),
            memory: self.machine.memories.status(),
        }
    }

    fn set_gate(&self, wanted: Wanted, what: &'static str) -> Result<(), VmError> {
        if self.machine.lifecycle.ended().is_some() {
            return Err(VmError::Ended);
        }
        let threads = self.machine.vcpu_threads.lock();
        let deadline = Instant::now() + GATE_DEADLINE;
        if self.machine.gate.set(wanted, &threads, deadline) {
            return Ok(());
        }
        self.machine.gate.set(Wanted::Run, &threads, deadline);
        Err(VmError::VcpuTimeout { what, waited: GATE_DEADLINE })
    }
}
