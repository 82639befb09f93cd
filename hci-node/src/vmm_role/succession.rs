//! A run that goes on in another process of its node: the successor's side.
//!
//! The control process starts the successor while the predecessor's guest runs. It takes a second hold of two descriptors of the predecessor, the
//! guest's memory and the locked record of who runs the VM (`vmm.pid`), locks itself up as every VMM and waits for the state of what is not memory.
//! The predecessor, once it has written that, keeps its guest paused, with its devices held and its backends left to the successor.
//!
//! | step | who has the guest |
//! |---|---|
//! | the successor has made the guest, paused | the predecessor, which can still let it run |
//! | the predecessor writes the successor into the record, after which it never lets it run | the successor |
//! | the predecessor ends | the successor, which lets it run when it is told to |
//!
//! # Invariants
//! - Who is named in the record, and only that process, has the guest. It is written by the one that has it, once, and never read back by it.
//! - The record stays locked from the one to the other: both have the same open file, and neither unlocks it but by its end.
//! - A successor whose predecessor ends without having named it ends, too, and so does one that is not named for [`PATIENCE`].
//! - Its files have names of their own ([`VmPaths::successor`]). When it is named, the control process gives them those of the predecessor's
//!   (`reconcile/renewing.rs`): a VMM renames nothing.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use netfabric::rpc::RpcError;
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};
use vmm::VmHandle;

use super::{
    Hold, Machine, Offer, ended,
    protocol::HandOver,
    record::{self, ProcessRecord, RunLock},
};
use crate::paths::VmPaths;

/// How long a successor waits to be named. Whoever has it named gives up sooner.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a predecessor offers: where in it the descriptors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptors {
    /// Of the guest's memory.
    pub memory: RawFd,
    /// Of the locked record of who runs the VM.
    pub lock: RawFd,
}

/// The process that a successor follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Predecessor {
    /// Which.
    pub process: ProcessRecord,
    /// What is taken from it.
    pub descriptors: Descriptors,
}

/// What a successor has of its predecessor.
#[derive(Debug)]
pub struct Heir {
    /// What it says of itself, also in a file of its own, which is locked for as long as it is a successor.
    own: ProcessRecord,
    announced: RunLock,
    /// Readable when the predecessor has ended.
    predecessor: OwnedFd,
    /// The record of who runs the VM.
    record: File,
}

impl Heir {
    /// Takes a hold of what the predecessor has, the guest's memory too. For a process that is not locked up yet.
    pub(super) fn new(paths: &VmPaths, from: Predecessor) -> io::Result<(Self, File)> {
        let announced = RunLock::take(&paths.successor(&paths.pid()))?;
        let own = announced.process();
        let predecessor = open_process(from.process.pid)?;
        // Not another one that has got its number meanwhile.
        if record::start_ticks(from.process.pid) != Some(from.process.start_ticks) {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the VM's process has ended"));
        }
        let take = |descriptor| take_descriptor(&predecessor, descriptor).map(File::from);
        let (memory, record) = (take(from.descriptors.memory)?, take(from.descriptors.lock)?);
        Ok((Self { own, announced, predecessor, record }, memory))
    }

    /// Whether this process has been named.
    fn is_named(&self) -> bool {
        record::process_in(&self.record) == Some(self.own)
    }
}

/// The successor's side.
impl Machine {
    /// What is readable when the predecessor has ended; none when there is none.
    pub(super) fn predecessor(&self) -> io::Result<Option<OwnedFd>> {
        match &*self.hold.lock() {
            Some(Hold::Heir(heir)) => heir.predecessor.try_clone().map(Some),
            _ => Ok(None),
        }
    }

    /// Whether this process has the guest. One that has been named meanwhile has.
    pub(super) fn runs_the_vm(&self) -> bool {
        let mut hold = self.hold.lock();
        let now = match hold.take() {
            Some(Hold::Heir(heir)) if heir.is_named() => {
                tracing::info!(vm = %self.run.vm, "this process has the guest from now on");
                let Heir { own, announced, record, .. } = heir;
                // The control process removes the file.
                announced.leave();
                Some(Hold::Run(RunLock::inherited(record, own)))
            }
            other => other,
        };
        let runs = matches!(now, Some(Hold::Run(_)));
        *hold = now;
        runs
    }

    /// Ends this process if it has not been named when its predecessor ends, or in time.
    pub(super) async fn follow(self: Arc<Self>, predecessor: OwnedFd) {
        let ended = async {
            // SAFETY: it is the descriptor's owner, and nothing else has that.
            match unsafe { AsyncFd::register_with_interest(predecessor, Interest::READABLE) } {
                Ok(predecessor) => drop(predecessor.readable().await),
                Err(error) => tracing::error!(%error, "the predecessor cannot be watched"),
            }
        };
        // It is looked at in any case.
        let _ = tokio::time::timeout(PATIENCE, ended).await;
        if !self.runs_the_vm() {
            self.kill();
        }
    }
}

/// The predecessor's side.
impl Machine {
    pub(super) fn descriptors(&self) -> Result<Descriptors, RpcError> {
        let memory = self.guest()?.memory().ok_or_else(ended)?;
        match &*self.hold.lock() {
            Some(Hold::Run(lock)) => Ok(Descriptors { memory, lock: lock.descriptor() }),
            _ => Err(ended()),
        }
    }

    /// By the main thread, which lets the guest run, too: one comes after the other.
    pub(super) async fn hand_over(self: &Arc<Self>, HandOver { to }: HandOver) -> Result<(), RpcError> {
        let machine = self.clone();
        self.on_main_thread(move |guest| machine.leave(guest, to)).await
    }

    fn leave(&self, guest: &VmHandle, to: ProcessRecord) -> io::Result<()> {
        if self.now.lock().offer != Offer::Made {
            return Err(io::Error::other("the guest was not written for a successor, or has run since"));
        }
        let mut hold = self.hold.lock();
        let Some(Hold::Run(lock)) = hold.take_if(|hold| matches!(hold, Hold::Run(_))) else {
            return Err(io::Error::other("the guest is another process's"));
        };
        let named = lock.name_successor(to);
        // It is not known what a record holds that could not be written: the guest goes on nowhere.
        *hold = Some(if named.is_ok() { Hold::Left(lock) } else { Hold::Run(lock) });
        guest.kill();
        named
    }
}

fn open_process(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd)
}

/// A second hold of a descriptor of another process, which takes the right to trace that.
fn take_descriptor(process: &OwnedFd, descriptor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), descriptor, 0) };
    owned(fd)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for this process, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
