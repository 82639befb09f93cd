//! Virtual processors: one thread each, which owns its vCPU and does nothing but run it and pass its exits to the buses.
//!
//! All vCPUs follow one [`Gate`]: run, pause or stop. A thread looks at the gate between any two runs; whoever changes the gate kicks
//! the threads out of the guest with a signal, again and again until all have followed, so that a signal that comes just before
//! the entry costs a millisecond, not a hang.
//!
//! A thread at the closed gate has let go of its vCPU, whose registers are whole: what the last exit began (the value of a register that
//! was read) has been brought to its end. That is when others look at it and change it ([`SharedVcpu`]).

pub(crate) mod cpuid;
pub(crate) mod gate;
pub(crate) mod model;
pub(crate) mod registers;
pub(crate) mod throttle;

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};
use parking_lot::Mutex;

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

/// A vCPU, locked by its thread while that runs it.
pub(crate) type SharedVcpu = Arc<Mutex<VcpuFd>>;

/// KVM says that the guest asked the hypervisor for this (`KVM_SYSTEM_EVENT_*`).
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;

/// Starts the thread of one vCPU.
pub(crate) fn spawn(id: u8, vcpu: SharedVcpu, context: VcpuContext) -> io::Result<JoinHandle<()>> {
    let gate = context.gate.clone();
    gate.enter();
    let thread = std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
        confine_thread(ThreadKind::Vcpu);
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&vcpu, &context)));
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

fn run(vcpu: &Mutex<VcpuFd>, context: &VcpuContext) {
    while context.gate.pass() == Passage::Run {
        let ended = run_until_closed(&mut vcpu.lock(), context);
        if let Some(reason) = ended {
            context.lifecycle.end(reason);
            context.gate.wait_for_change();
        }
    }
}

/// Runs the guest until the gate closes. Returns a reason if the guest cannot go on.
fn run_until_closed(vcpu: &mut VcpuFd, context: &VcpuContext) -> Option<ExitReason> {
    while context.gate.is_open() {
        if let Step::Ended(reason) = step(vcpu, context) {
            return Some(reason);
        }
    }
    // KVM finishes what the last exit began only when it is entered again; it is told not to enter the guest.
    vcpu.set_kvm_immediate_exit(1);
    let ended = loop {
        match step(vcpu, context) {
            // An access that was cut in pieces has another one.
            Step::Done => {}
            Step::Interrupted => break None,
            Step::Ended(reason) => break Some(reason),
        }
    };
    vcpu.set_kvm_immediate_exit(0);
    ended
}

/// What came of a run.
enum Step {
    /// What the guest asked for was done.
    Done,
    /// Somebody wants the vCPU to look at the gate.
    Interrupted,
    /// The guest cannot go on.
    Ended(ExitReason),
}

/// Runs the guest until something has to be done for it.
fn step(vcpu: &mut VcpuFd, context: &VcpuContext) -> Step {
    let crashed = |what: String| Step::Ended(ExitReason::Crashed(what));
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => context.ports.write(port.into(), data),
        Ok(VcpuExit::IoIn(port, data)) => context.ports.read(port.into(), data),
        Ok(VcpuExit::MmioWrite(address, data)) => context.mmio.write(address, data),
        Ok(VcpuExit::MmioRead(address, data)) => context.mmio.read(address, data),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Step::Interrupted,
        // A triple fault resets a real machine; Linux also uses it on purpose as a last way to reboot.
        Ok(VcpuExit::Shutdown) => return Step::Ended(ExitReason::Reset),
        Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN, _)) => return Step::Ended(ExitReason::Shutdown),
        Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _)) => return Step::Ended(ExitReason::Reset),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return crashed(format!("KVM could not enter the guest: reason {reason:#x} on CPU {cpu}"));
        }
        Ok(VcpuExit::InternalError) => return crashed(internal_error(vcpu)),
        Ok(exit) => return crashed(format!("unexpected exit from the guest: {exit:?}")),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Step::Interrupted,
        Err(error) => return crashed(format!("KVM_RUN: {error}")),
    }
    Step::Done
}

/// What can be said about an instruction that KVM could not emulate.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    let rip = vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this member of the union is the one that KVM filled.
    let detail = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    format!("KVM internal error {} at guest address {rip:#x}", detail.suberror)
}
