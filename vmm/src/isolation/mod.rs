//! What the threads of a VMM may ask of the kernel: one seccomp filter for each kind of thread.
//!
//! A guest that takes over a thread of its VMM gets what that thread's table ([`calls`]) lists and nothing else: not one of them starts a
//! program, opens a socket to the network, traces or signals another process, or mounts. The tables are data, one line for each system call with
//! its reason; [`filter`] turns them into programs for the kernel.
//!
//! # Invariants
//! - The filters bind only once the process has said so ([`confine_process`]): a test that runs a guest in its own process does not.
//! - A thread inherits the filter of the thread that starts it and adds its own, so a table of its starter holds all of its own lines. Devices are
//!   started by the vCPU whose driver sets them up, everything else by the main thread.
//! - A call that is not listed ends the process. What it was is said on standard error first ([`denial`]).
//! - A thread that cannot be confined does not run: the process ends.

mod calls;
mod denial;
mod filter;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

pub use calls::{Call, Only};
pub use filter::Denied;

/// What a thread does, and so what it may ask of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Makes machines, waits for their end, takes them apart.
    Main,
    /// Runs a vCPU, and what happens in devices when its guest touches them.
    Vcpu,
    /// Serves a device inside of the VMM.
    Device,
    /// Keeps the connection to a vhost-user backend.
    Backend,
    /// Connects the guest's sockets to those of the node.
    Vsock,
    /// Serves the clients of the serial console.
    Console,
    /// Serves the clients of the display.
    Display,
    /// Waits for the guest's watchdog.
    Watchdog,
    /// Has the guest run a part of the time only.
    Throttle,
    /// Takes orders from the node.
    Orders,
}

/// Whether the threads of this process are confined.
static CONFINED: AtomicBool = AtomicBool::new(false);

/// Confines the calling thread, and what it starts, to a table of the caller's own.
pub fn confine(table: &[Call], denied: Denied) -> io::Result<()> {
    filter::install(&filter::program(table, denied)?)
}

/// Confines the calling thread as the main one, and from now on every thread of a guest. To be called before there are other threads.
pub fn confine_process() -> io::Result<()> {
    share_one_heap()?;
    denial::report_denials()?;
    filter::install(&filter::old_thread_start()?)?;
    confine(&calls::of(ThreadKind::Main), Denied::Report)?;
    CONFINED.store(true, Ordering::Release);
    Ok(())
}

/// Has all threads take what the C library allocates for itself, a few bytes for each, from one heap.
///
/// Left to itself it gives each thread a heap, until there are more than eight; then it opens a file that tells how many processors there are, in
/// whichever thread comes next. One that may open nothing would end the VMM.
fn share_one_heap() -> io::Result<()> {
    // Other C libraries have one heap only.
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two numbers, and changes one that the library keeps.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } != 1 {
        return Err(io::Error::other("the C library does not limit its heaps"));
    }
    Ok(())
}

/// Confines the calling thread for good, if this process is confined.
pub fn confine_thread(kind: ThreadKind) {
    if kind == ThreadKind::Main || !CONFINED.load(Ordering::Acquire) {
        return;
    }
    if let Err(error) = confine(&calls::of(kind), Denied::Report) {
        tracing::error!(?kind, %error, "a thread cannot be confined");
        std::process::abort();
    }
}
