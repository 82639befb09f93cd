//! What a VMM process leaves in its VM's directory, so that a control process that comes later knows it again.
//!
//! - `vmm.json`, written by the control process: what to run, in which run epoch.
//! - `vmm.pid`: pid and start time. The file is locked for as long as the process lives, which is what "alive" means
//!   here: a pid can be given to somebody else, a lock cannot. At most one process at a time can run from a directory. One that is about to take
//!   its place has a file of its own until it does ([`super::succession`]).
//! - `exit.json`: how the run ended. A process that was killed leaves none.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, OpenOptionsExt},
        },
    },
    path::Path,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use vmm::VmConfig;

use super::succession::Predecessor;
use crate::{
    files::{self, Durability},
    paths::VmPaths,
    state::{RunEpoch, VmId},
};

/// How long a starting VMM waits for the lock: somebody may be looking whether it is held.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// Length of a record of a process, filled up with spaces.
const PROCESS_BYTES: usize = 96;
/// Pause between attempts.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Contents of `vmm.json`: one run of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    /// The VM.
    pub vm: VmId,
    /// Which run of it.
    pub epoch: RunEpoch,
    /// What it is made of.
    pub config: VmConfig,
    /// What it begins with.
    #[serde(default)]
    pub begin: Begin,
}

impl RunFile {
    /// The name of its process' control group. A VM that moves has two runs, and each has a limit of its own.
    pub fn cgroup(&self) -> String {
        format!("{}.{}", self.vm, self.epoch.0)
    }
}

/// What a run begins with. Should its guest reset itself, it boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Begin {
    /// It boots.
    #[default]
    Boot,
    /// It goes on with a state that the control process brings, once that lets it.
    Saved,
    /// It goes on in the memory of another process of this node, with a state of the rest that the control process brings, once that other one
    /// has left it the guest.
    Successor(Predecessor),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// The guest shut itself down.
    GuestShutdown,
    /// It was killed by order.
    Killed,
    /// It was killed because the node's lease ran out.
    LeaseLapsed,
    /// It could not start, could not go on, or its process vanished.
    Crashed(String),
}

/// Contents of `exit.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Which run it was.
    pub epoch: RunEpoch,
    /// How it ended.
    pub ended: Ended,
}

/// Contents of `vmm.pid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// The process.
    pub pid: i32,
    /// When it started, in clock ticks since boot: tells it from another one with the same pid.
    pub start_ticks: u64,
}

/// Held by a VMM process for as long as it lives.
#[derive(Debug)]
pub struct RunLock {
    file: Held,
    process: ProcessRecord,
}

/// The locked record. What the lock is on is the open file, which a successor has a hold of, too ([`super::succession`]).
#[derive(Debug)]
enum Held {
    /// This process has locked it.
    Own(Flock<File>),
    /// Another one has, and left it to this one.
    Inherited(File),
}

impl Held {
    fn file(&self) -> &File {
        match self {
            Self::Own(file) => file,
            Self::Inherited(file) => file,
        }
    }
}

impl RunLock {
    /// Takes the directory whose record this is for this process; an error of kind `AlreadyExists` when another one runs from it.
    pub fn take(record: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(record)?;
        let deadline = std::time::Instant::now() + LOCK_PATIENCE;
        let locked = loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => break locked,
                Err((_, Errno::EWOULDBLOCK)) if std::time::Instant::now() >= deadline => {
                    return Err(io::Error::new(
                        io::ErrorKind::AlreadyExists,
                        "another VMM runs from this directory",
                    ));
                }
                Err((unlocked, Errno::EWOULDBLOCK)) => file = unlocked,
                Err((_, error)) => return Err(error.into()),
            }
            std::thread::sleep(LOCK_PAUSE);
        };
        let pid = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        let start_ticks =
            start_ticks(pid).ok_or_else(|| io::Error::other("/proc does not show this process"))?;
        let process = ProcessRecord { pid, start_ticks };
        locked.set_len(0)?;
        write_process(&locked, process)?;
        Ok(Self { file: Held::Own(locked), process })
    }

    /// What was locked by another process that left it to this one.
    pub(super) fn inherited(file: File, process: ProcessRecord) -> Self {
        Self { file: Held::Inherited(file), process }
    }

    /// This process.
    pub(super) fn process(&self) -> ProcessRecord {
        self.process
    }

    /// The locked record's descriptor.
    pub(super) fn descriptor(&self) -> RawFd {
        self.file.file().as_raw_fd()
    }

    /// Leaves the directory to a process that has a hold of the same open file.
    pub(super) fn name_successor(&self, successor: ProcessRecord) -> io::Result<()> {
        write_process(self.file.file(), successor)
    }

    /// Lets go of it without unlocking it: it is the successor's.
    pub(super) fn leave(self) {
        match self.file {
            Held::Own(file) => std::mem::forget(file),
            Held::Inherited(file) => drop(file),
        }
    }
}

/// Writes a record over another one, in one go: all are of the same length.
fn write_process(file: &File, process: ProcessRecord) -> io::Result<()> {
    let mut text = serde_json::to_vec(&process)?;
    text.resize(PROCESS_BYTES, b' ');
    file.write_all_at(&text, 0)
}

/// Who is named in an open record.
pub fn process_in(record: &File) -> Option<ProcessRecord> {
    let mut text = [0; PROCESS_BYTES];
    let len = record.read_at(&mut text, 0).ok()?;
    serde_json::from_slice(&text[..len]).ok()
}

/// The process that runs from this directory, if one does. It may not have written its record yet.
pub fn running(paths: &VmPaths) -> io::Result<Option<Option<ProcessRecord>>> {
    holder(&paths.pid())
}

/// The process that is about to take that one's place, if there is one.
pub fn successor(paths: &VmPaths) -> io::Result<Option<Option<ProcessRecord>>> {
    holder(&paths.successor(&paths.pid()))
}

/// The process that holds a record.
fn holder(record: &Path) -> io::Result<Option<Option<ProcessRecord>>> {
    let file = match OpenOptions::new().read(true).open(record) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_free) => Ok(None),
        Err((file, Errno::EWOULDBLOCK)) => Ok(Some(process_in(&file))),
        Err((_, error)) => Err(error.into()),
    }
}

/// `exit.json`, kept open by a VMM that will not be able to make files when its guest ends.
#[derive(Debug)]
pub struct ExitFile(File);

impl ExitFile {
    /// Makes it. As long as it is empty it is no record.
    pub fn open(paths: &VmPaths) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o644).custom_flags(libc::O_NOFOLLOW);
        options.open(paths.exit()).map(Self)
    }

    /// Records how the run ended. If somebody has recorded it meanwhile, in a new file, that stays.
    pub fn write(mut self, record: &ExitRecord) -> io::Result<()> {
        self.0.write_all(&serde_json::to_vec(record)?)
    }
}

/// Kills the process with SIGKILL, if it is still the one that was recorded, and a VMM of this directory: the VMM has its record open, so that a guest
/// that took it over could name somebody else there.
pub fn kill_recorded(paths: &VmPaths, process: ProcessRecord) -> io::Result<()> {
    if start_ticks(process.pid) != Some(process.start_ticks) || !is_about(process.pid, paths.dir()) {
        return Ok(());
    }
    match kill(Pid::from_raw(process.pid), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a process was started with a path in this directory.
fn is_about(pid: i32, dir: &Path) -> bool {
    let said = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let dir = dir.as_os_str().as_bytes();
    said.windows(dir.len()).any(|part| part == dir)
}

/// Whether that process is there, and has not ended without its parent having looked.
pub fn is_there(process: ProcessRecord) -> bool {
    let state = stat(process.pid).and_then(|fields| fields.first().cloned());
    start_ticks(process.pid) == Some(process.start_ticks) && state.is_some_and(|state| state != "Z")
}

/// When a process started, in clock ticks since boot; none when there is no such process.
pub(super) fn start_ticks(pid: i32) -> Option<u64> {
    stat(pid)?.get(19)?.parse().ok()
}

/// What `/proc` says of a process, from the third field on: its state. The second one is the program's name in brackets, which may hold anything.
fn stat(pid: i32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.get(stat.rfind(')')? + 1..)?.split_whitespace().map(str::to_owned).collect())
}

/// What runs, or ran last, from this directory.
pub fn run_file(paths: &VmPaths) -> io::Result<Option<RunFile>> {
    read(&paths.config())
}

/// The process that the present successor follows, or the last one did.
pub fn predecessor(paths: &VmPaths) -> io::Result<Option<ProcessRecord>> {
    let run: Option<RunFile> = read(&paths.successor(&paths.config()))?;
    Ok(run.and_then(|run| match run.begin {
        Begin::Successor(predecessor) => Some(predecessor.process),
        Begin::Boot | Begin::Saved => None,
    }))
}

/// Says what a VMM is to run, in the file that it is started with.
pub fn write_run_file(file: &Path, run: &RunFile) -> io::Result<()> {
    files::replace(file, &serde_json::to_vec_pretty(run)?, 0o644, Durability::Volatile)
}

/// How the run ended, if that was recorded.
pub fn exit_record(paths: &VmPaths) -> io::Result<Option<ExitRecord>> {
    read(&paths.exit())
}

/// Records how the run ended, unless that is recorded already: the first reason stays.
pub fn write_exit_record(paths: &VmPaths, record: &ExitRecord) -> io::Result<()> {
    if exit_record(paths)?.is_some_and(|present| present.epoch == record.epoch) {
        return Ok(());
    }
    files::replace(&paths.exit(), &serde_json::to_vec(record)?, 0o644, Durability::Volatile)
}

/// A record; none when there is none, or when a crash left something unreadable.
fn read<T: DeserializeOwned>(path: &std::path::Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_running_while_its_lock_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths::in_dir(dir.path());
        assert_eq!(running(&paths).unwrap(), None);
        let lock = RunLock::take(&paths.pid()).unwrap();
        let process = running(&paths).unwrap().unwrap().unwrap();
        assert_eq!(process.pid, i32::try_from(std::process::id()).unwrap());
        let second = RunLock::take(&paths.pid()).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AlreadyExists);
        drop(lock);
        assert_eq!(running(&paths).unwrap(), None);
    }

    #[test]
    fn only_the_recorded_process_is_killed_and_only_if_it_is_about_that_vm() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (paths, others) = (VmPaths::in_dir(dir.path()), VmPaths::in_dir(other.path()));
        fs::write(paths.log(), "").unwrap();
        let mut child = std::process::Command::new("tail").arg("-f").arg(paths.log()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        while !is_about(pid, paths.dir()) {
            std::thread::sleep(LOCK_PAUSE);
        }
        let process = ProcessRecord { pid, start_ticks: start_ticks(pid).unwrap() };
        kill_recorded(&paths, ProcessRecord { start_ticks: process.start_ticks + 1, ..process }).unwrap();
        kill_recorded(&others, process).unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        assert!(is_there(process));
        kill_recorded(&paths, process).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!is_there(process));
    }

    #[test]
    fn who_holds_a_directory_can_name_another_process_and_leave_it_locked() {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths::in_dir(dir.path());
        let lock = RunLock::take(&paths.pid()).unwrap();
        let other = ProcessRecord { pid: 77, start_ticks: 1_234_567_890_123 };
        lock.name_successor(other).unwrap();
        assert_eq!(running(&paths).unwrap(), Some(Some(other)));
        let shared = match &lock.file {
            Held::Own(file) => file.try_clone().unwrap(),
            Held::Inherited(_) => panic!("it was taken here"),
        };
        lock.leave();
        let heir = RunLock::inherited(shared, other);
        assert_eq!(running(&paths).unwrap(), Some(Some(other)));
        // What was left is still open in this process, as it is not in one that has ended.
        assert_eq!(heir.process(), other);
    }

    #[test]
    fn the_first_exit_record_stays_and_garbage_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        let paths = VmPaths::in_dir(dir.path());
        fs::write(paths.exit(), "{").unwrap();
        assert_eq!(exit_record(&paths).unwrap(), None);
        let first = ExitRecord { epoch: RunEpoch(3), ended: Ended::LeaseLapsed };
        write_exit_record(&paths, &first).unwrap();
        write_exit_record(&paths, &ExitRecord { epoch: RunEpoch(3), ended: Ended::Killed }).unwrap();
        assert_eq!(exit_record(&paths).unwrap(), Some(first));
    }
}
