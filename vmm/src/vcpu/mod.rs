//! Virtual processors: one thread each, which owns its vCPU and does nothing but run it and pass its exits to the buses.
//!
//! All vCPUs follow one [`Gate`]: run, pause or stop. A thread looks at the gate between any two runs; whoever changes the gate kicks
//! the threads out of the guest with a signal, again and again until all have followed, so that a signal that comes just before
//! the entry costs a millisecond, not a hang.

pub(crate) mod cpuid;
pub(crate) mod gate;
pub(crate) mod model;
pub(crate) mod registers;

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::isolation::{ThreadKind, confine_thread};
use crate::lifecycle::{ExitReason, Lifecycle};
use gate::{Gate, Passage};

/// What a vCPU thread works with.
pub(crate) struct VcpuContext {
    pub(crate) gate: Arc<Gate>,
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) ports: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
}

/// KVM says that the guest asked the hypervisor for this (`KVM_SYSTEM_EVENT_*`).
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;

/// Starts the thread of one vCPU.
pub(crate) fn spawn(id: u8, mut vcpu: VcpuFd, context: VcpuContext) -> io::Result<JoinHandle<()>> {
    let gate = context.gate.clone();
    gate.enter();
    let thread = std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
        confine_thread(ThreadKind::Vcpu);
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&mut vcpu, &context)));
        if let Err(panic) = outcome {
            let what = panic_text(panic.as_ref());
            context.lifecycle.end(ExitReason::Crashed(format!("thread of vCPU {id} panicked: {what}")));
        }
        context.gate.leave();
    });
    if thread.is_err() {
        gate.leave();
    }
    thread
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

fn run(vcpu: &mut VcpuFd, context: &VcpuContext) {
    while context.gate.pass() == Passage::Run {
        if let Some(reason) = step(vcpu, context) {
            context.lifecycle.end(reason);
            context.gate.wait_for_change();
        }
    }
}

/// Runs the guest until something has to be done for it. Returns a reason if the guest cannot go on.
fn step(vcpu: &mut VcpuFd, context: &VcpuContext) -> Option<ExitReason> {
    let crashed = |what: String| Some(ExitReason::Crashed(what));
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => context.ports.write(port.into(), data),
        Ok(VcpuExit::IoIn(port, data)) => context.ports.read(port.into(), data),
        Ok(VcpuExit::MmioWrite(address, data)) => context.mmio.write(address, data),
        Ok(VcpuExit::MmioRead(address, data)) => context.mmio.read(address, data),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
        // A triple fault resets a real machine; Linux also uses it on purpose as a last way to reboot.
        Ok(VcpuExit::Shutdown) => return Some(ExitReason::Reset),
        Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN, _)) => return Some(ExitReason::Shutdown),
        Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _)) => return Some(ExitReason::Reset),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return crashed(format!("KVM could not enter the guest: reason {reason:#x} on CPU {cpu}"));
        }
        Ok(VcpuExit::InternalError) => return crashed(internal_error(vcpu)),
        Ok(exit) => return crashed(format!("unexpected exit from the guest: {exit:?}")),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
        Err(error) => return crashed(format!("KVM_RUN: {error}")),
    }
    None
}

/// What can be said about an instruction that KVM could not emulate.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    let rip = vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this member of the union is the one that KVM filled.
    let detail = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    format!("KVM internal error {} at guest address {rip:#x}", detail.suberror)
}
