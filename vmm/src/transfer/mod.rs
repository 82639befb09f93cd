//! A guest as a stream of bytes: paused, to be kept and gone on with later, on this machine or on another one; or running, to go on elsewhere
//! at once ([`migrate`]).
//!
//! ```text
//! Start      whose state it is and how large
//! Memory*    runs of pages; pages of zeroes are left out. Of a guest that runs, pages come again as it writes them,
//! Zeroes*    and those that have become zeroes are told
//! Machine    interrupt controllers, timer, clock
//! Processor  one for each vCPU
//! Devices    all devices by their places
//! End
//! ```
//!
//! The stream goes to any [`Write`] and comes from any [`Read`], frame by frame ([`frame`]): neither side ever holds more than one frame. Memory
//! comes first: what a device has done with its rings is read from there, and a sender that lets the guest run on sends pages again. A guest that
//! goes on in another process of the same machine keeps its memory, and the stream has none of it.
//!
//! # Invariants
//! - Nobody touches the guest's memory while the last of it is written, or while it is read: vCPUs wait at the gate and devices are held
//!   ([`crate::state::Devices::hold`]). A device that worked on would have a completion in a page that was copied and its data in one that was not.
//! - A guest that was read does not run, and its devices do not work, before [`crate::VmHandle::resume`]. So whoever resumes it can make sure
//!   first that no other one will.
//! - A stream is from a disk or a peer. What is damaged, cut off, of another guest or of a newer release is refused with the reason; what is
//!   hostile costs the guest that is made from it and nothing else.
//! - Each frame has a version of its own. A newer release reads what an older one wrote.
//!
//! # Time
//! The guest's clocks (TSC, kvmclock, PM timer) go on from where they were: for it no time has passed. Its real-time clock shows the host's
//! time, so that it can set its wall clock by that.

mod convergence;
mod dirty;
pub(crate) mod frame;
pub(crate) mod logs;
mod machine;
pub(crate) mod migrate;
mod pages;
mod processor;

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::CpuId;
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::frame::{FrameReader, FrameWriter, Kind, Part};
use self::logs::Logs;
use self::machine::MachineState;
use self::processor::ProcessorState;
use crate::memory::Memory;
use crate::state::{Devices, DevicesState, StateError};
use crate::vcpu::SharedVcpu;

/// Why a guest could not be saved, or not made from what was saved.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The stream could not be written or read.
    #[error("the stream of the saved guest broke: {0}")]
    Stream(#[from] io::Error),
    /// The stream was damaged, or never was one.
    #[error("the saved guest is damaged: {0}")]
    Damaged(&'static str),
    /// Written by a newer release.
    #[error("the saved guest has {part} of version {found}, and this release reads up to {known}")]
    Version {
        /// Which part of it.
        part: &'static str,
        /// What was found.
        found: u16,
        /// The newest one that is known.
        known: u16,
    },
    /// It is not the guest that was to be made.
    #[error("the saved guest is another one: {0}")]
    Another(String),
    /// This machine cannot go on with it.
    #[error("the saved guest cannot go on here: {0}")]
    Unfit(String),
    /// A call to KVM failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// A device has no state to give, or takes none.
    #[error(transparent)]
    Devices(#[from] StateError),
    /// Requests of the guest may be under way there, and nobody can say.
    #[error("the backend of device {0:?} is away")]
    BackendAway(String),
    /// The device's backend writes to the guest's memory without telling where, so that only a paused guest can be written.
    #[error("the guest cannot move while it runs: the backend of device {device:?} does not offer {why}")]
    CannotLog {
        /// The device.
        device: String,
        /// What it lacks.
        why: &'static str,
    },
    /// The guest writes its memory faster than that can be sent.
    #[error(
        "the guest writes {dirtied} bytes a second and {sent} can be sent, with it held for {throttle_percent} % of the time"
    )]
    DoesNotConverge {
        /// Bytes that it writes a second.
        dirtied: u64,
        /// Bytes that are sent a second.
        sent: u64,
        /// How much it was throttled, in percent.
        throttle_percent: u8,
    },
    /// The vCPUs could not be held for the last part.
    #[error("vCPUs were not held within {waited:?}")]
    VcpusRun {
        /// For how long it was waited.
        waited: Duration,
    },
    /// It ended while it moved.
    #[error("the guest has ended")]
    Ended,
}

/// Adds what was asked of KVM to its answer.
fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> TransferError {
    move |source| TransferError::Kvm { what, source }
}

/// What makes up a guest beside its devices.
pub(crate) struct Core {
    /// The guest's identity.
    pub(crate) id: Uuid,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: Memory,
    pub(crate) vcpus: Vec<Vcpu>,
    /// The model-specific registers that KVM keeps for a guest.
    pub(crate) msrs: Vec<u32>,
    /// What is still recorded of a guest that was moved: ending it takes a walk over all of its memory, which must not lengthen the pause.
    pub(crate) logs: Option<Logs>,
}

/// A vCPU, and what it shows its guest of itself.
pub(crate) struct Vcpu {
    pub(crate) fd: SharedVcpu,
    pub(crate) cpuid: Mutex<CpuId>,
}

/// How a guest's memory gets to where it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// In the stream.
    Written,
    /// Not at all: it is where it was.
    Kept,
}

/// Whose state a stream is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Start {
    id: Uuid,
    vcpus: u8,
    /// Where RAM lies: guest address and size.
    ram: Vec<(u64, u64)>,
}

impl Part for Start {
    const KIND: Kind = Kind::Start;
    const NAME: &'static str = "a beginning";
    type Body = Self;
}

struct DevicesPart;

impl Part for DevicesPart {
    const KIND: Kind = Kind::Devices;
    const NAME: &'static str = "a list of devices";
    type Body = DevicesState;
}

impl Core {
    fn start(&self) -> Start {
        Start { id: self.id, vcpus: self.vcpus.len() as u8, ram: pages::ranges(&self.memory) }
    }

    /// Writes the guest. Its vCPUs wait at the gate and its devices are held.
    pub(crate) fn save(
        &self,
        devices: &Devices,
        pages: Pages,
        to: &mut dyn Write,
    ) -> Result<(), TransferError> {
        let mut to = FrameWriter::new(to);
        self.write_start(&mut to)?;
        if pages == Pages::Written {
            pages::save(&self.memory, &mut to)?;
        }
        self.write_state(devices, &mut to)?;
        to.end()
    }

    fn write_start(&self, to: &mut FrameWriter<impl Write>) -> Result<(), TransferError> {
        to.part::<Start>(&self.start())
    }

    /// Writes what is not memory.
    fn write_state(&self, devices: &Devices, to: &mut FrameWriter<impl Write>) -> Result<(), TransferError> {
        to.part::<MachineState>(&MachineState::capture(&self.vm)?)?;
        for vcpu in &self.vcpus {
            to.part::<ProcessorState>(&ProcessorState::capture(vcpu, &self.msrs)?)?;
        }
        to.part::<DevicesPart>(&devices.save()?)
    }

    /// Tells the guest's watchdog for hung processors that they were not: it is about to go on after a pause.
    pub(crate) fn tell_of_pause(&self) {
        for vcpu in self.vcpus.iter().filter_map(|vcpu| vcpu.fd.try_lock()) {
            // Fails for guests that have no such clock.
            let _ = vcpu.kvmclock_ctrl();
        }
    }

    /// Reads a guest into one that was just made, as [`Core::save`] finds it.
    pub(crate) fn restore(&self, devices: &Devices, from: &mut dyn Read) -> Result<(), TransferError> {
        let mut from = FrameReader::new(from);
        self.check(&from.part::<Start>()?)?;
        pages::restore(&self.memory, &mut from)?;
        let machine = from.part::<MachineState>()?;
        machine.restore_controllers(&self.vm)?;
        for vcpu in &self.vcpus {
            from.part::<ProcessorState>()?.restore(vcpu)?;
        }
        devices.restore(&from.part::<DevicesPart>()?)?;
        // Last, so that as little time as possible passes for the guest.
        machine.restore_time(&self.vm)?;
        from.end()
    }

    fn check(&self, saved: &Start) -> Result<(), TransferError> {
        let own = self.start();
        let differs = |what: &str| Err(TransferError::Another(what.to_owned()));
        if saved.id != own.id {
            return differs("it has another identity");
        }
        if saved.vcpus != own.vcpus || saved.ram != own.ram {
            return differs("it has another number of processors or another size of memory");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
