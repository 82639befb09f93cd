//! One vCPU: registers, floating point, local interrupt controller, and what it shows of itself.
//!
//! KVM wants some of it in order: what the processor is before anything else, the mode of the local controller (in the system registers)
//! before its registers, time before the deadline that is measured by it, and what is pending last.

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::frame::{Kind, Part};
use super::{TransferError, Vcpu, kvm};
use crate::vcpu::model;

/// Model-specific registers that are asked for at a time.
const AT_ONCE: usize = 128;
/// Most of them that are taken from a stream.
const MAX_MSRS: usize = 1024;
/// When the local timer fires, in ticks of the TSC.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// How far two processors' rates may be apart, in millionths, to count as the same: what a guest's clock corrects by itself.
const RATE_TOLERANCE: u64 = 250;

/// The state. The structures are those of the kernel's interface, which never change.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ProcessorState {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Of the TSC, in kHz, if it is known.
    rate: Option<u32>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

impl Part for ProcessorState {
    const KIND: Kind = Kind::Processor;
    const NAME: &'static str = "a processor";
    type Body = Self;
}

impl ProcessorState {
    /// The state of a vCPU that waits at the gate. `msrs` are those that KVM knows of; what this one does not have is left out.
    pub(super) fn capture(vcpu: &Vcpu, msrs: &[u32]) -> Result<Self, TransferError> {
        let fd = vcpu.fd.lock();
        // First: it moves interrupts that are on their way, and processors that wait for INIT or SIPI, to where the rest shows them.
        let mp_state = fd.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?;
        Ok(Self {
            cpuid: vcpu.cpuid.lock().as_slice().to_vec(),
            rate: fd.get_tsc_khz().ok(),
            mp_state,
            regs: fd.get_regs().map_err(kvm("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(kvm("KVM_GET_SREGS"))?,
            xsave: fd.get_xsave().map_err(kvm("KVM_GET_XSAVE"))?,
            xcrs: fd.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?,
            debug: fd.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?,
            msrs: get_msrs(&fd, msrs)?,
            // After the registers that time is read from: a timer that fires in between is in here.
            lapic: fd.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?,
            events: fd.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Makes a vCPU that has never run what the saved one was.
    pub(super) fn restore(&self, vcpu: &Vcpu) -> Result<(), TransferError> {
        if self.msrs.len() > MAX_MSRS {
            return Err(TransferError::Damaged("a processor has too many registers"));
        }
        let shown = CpuId::from_entries(&self.cpuid)
            .map_err(|_| TransferError::Damaged("a processor shows too much of itself"))?;
        let mut own = vcpu.cpuid.lock();
        model::check_fit(&shown, &own).map_err(TransferError::Unfit)?;
        let fd = vcpu.fd.lock();
        fd.set_cpuid2(&shown).map_err(kvm("KVM_SET_CPUID2"))?;
        *own = shown;
        self.restore_rate(&fd)?;
        fd.set_mp_state(self.mp_state).map_err(kvm("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        fd.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads as much as the structure has unless a guest was permitted to use larger state, which this VMM never asks for.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&self.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&self.debug).map_err(kvm("KVM_SET_DEBUGREGS"))?;
        let (deadline, others): (Vec<_>, Vec<_>) =
            self.msrs.iter().partition(|(index, _)| *index == MSR_TSC_DEADLINE);
        set_msrs(&fd, &others)?;
        fd.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        set_msrs(&fd, &deadline)?;
        fd.set_vcpu_events(&self.events).map_err(kvm("KVM_SET_VCPU_EVENTS"))
    }

    /// The guest measures time by the TSC and has measured its rate once.
    fn restore_rate(&self, fd: &VcpuFd) -> Result<(), TransferError> {
        let (Some(saved), Ok(own)) = (self.rate, fd.get_tsc_khz()) else { return Ok(()) };
        let apart = u64::from(saved.abs_diff(own));
        if apart * 1_000_000 <= u64::from(own) * RATE_TOLERANCE {
            return Ok(());
        }
        fd.set_tsc_khz(saved).map_err(|_| {
            TransferError::Unfit(format!(
                "its processor's time counter ran at {saved} kHz, and this node's runs at {own} kHz and cannot be adapted"
            ))
        })
    }
}

/// KVM stops at the first register that it cannot read.
fn get_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, TransferError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let asked = &left[..left.len().min(AT_ONCE)];
        let entries: Vec<_> =
            asked.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| TransferError::Damaged("too many registers"))?;
        let read = fd.get_msrs(&mut msrs).map_err(kvm("KVM_GET_MSRS"))?.min(asked.len());
        found.extend(msrs.as_slice()[..read].iter().map(|entry| (entry.index, entry.data)));
        // The one that it stopped at is not there.
        left = left.get(if read < asked.len() { read + 1 } else { read }..).unwrap_or_default();
    }
    Ok(found)
}

/// The same for writing. A register that takes no value but has this one already is as it should be.
fn set_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), TransferError> {
    let mut left = values;
    while !left.is_empty() {
        let asked = &left[..left.len().min(AT_ONCE)];
        let entries: Vec<_> = asked
            .iter()
            .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| TransferError::Damaged("too many registers"))?;
        let written = fd.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?.min(asked.len());
        left = &left[written..];
        if written < asked.len()
            && let Some(((index, data), rest)) = left.split_first()
        {
            if get_msrs(fd, &[*index])? != [(*index, *data)] {
                return Err(TransferError::Unfit(format!(
                    "its processor's register {index:#x} has the value {data:#x}, which this node's does not take"
                )));
            }
            left = rest;
        }
    }
    Ok(())
}
