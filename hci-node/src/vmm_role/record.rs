//! What a VMM process leaves in its VM's directory, so that a control process that comes later knows it again.
//!
//! - `vmm.json`, written by the control process: what to run, in which run epoch.
//! - `vmm.pid`: pid and start time. The file is locked for as long as the process lives, which is what "alive" means
//!   here: a pid can be given to somebody else, a lock cannot. At most one process at a time can run from a directory.
//! - `exit.json`: how the run ended. A process that was killed leaves none.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
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

use crate::{
    files::{self, Durability},
    paths::VmPaths,
    state::{RunEpoch, VmId},
};

/// How long a starting VMM waits for the lock: somebody may be looking whether it is held.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
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
    _file: Flock<File>,
}

impl RunLock {
    /// Takes the directory for this process; an error of kind `AlreadyExists` when another one runs from it.
    pub fn take(paths: &VmPaths) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(paths.pid())?;
        let deadline = std::time::Instant::now() + LOCK_PATIENCE;
        let mut locked = loop {
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
        let record = serde_json::to_vec(&ProcessRecord { pid, start_ticks })?;
        locked.set_len(0)?;
        locked.rewind()?;
        locked.write_all(&record)?;
        Ok(Self { _file: locked })
    }
}

/// The process that runs from this directory, if one does. It may not have written its record yet.
pub fn running(paths: &VmPaths) -> io::Result<Option<Option<ProcessRecord>>> {
    let file = match OpenOptions::new().read(true).open(paths.pid()) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_free) => Ok(None),
        Err((mut file, Errno::EWOULDBLOCK)) => {
            let mut text = String::new();
            file.read_to_string(&mut text)?;
            Ok(Some(serde_json::from_str(&text).ok()))
        }
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

/// Kills the process with SIGKILL, if it is still the one that was recorded.
pub fn kill_recorded(process: ProcessRecord) -> io::Result<()> {
    if start_ticks(process.pid) != Some(process.start_ticks) {
        return Ok(());
    }
    match kill(Pid::from_raw(process.pid), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// When a process started, in clock ticks since boot; none when there is no such process.
fn start_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets, which may hold anything; the 22nd is the start time.
    stat.get(stat.rfind(')')? + 1..)?.split_whitespace().nth(19)?.parse().ok()
}

/// What runs, or ran last, from this directory.
pub fn run_file(paths: &VmPaths) -> io::Result<Option<RunFile>> {
    read(&paths.config())
}

/// Says what the VMM in this directory is to run.
pub fn write_run_file(paths: &VmPaths, run: &RunFile) -> io::Result<()> {
    files::replace(&paths.config(), &serde_json::to_vec_pretty(run)?, 0o644, Durability::Volatile)
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
        let lock = RunLock::take(&paths).unwrap();
        let process = running(&paths).unwrap().unwrap().unwrap();
        assert_eq!(process.pid, i32::try_from(std::process::id()).unwrap());
        let second = RunLock::take(&paths).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AlreadyExists);
        drop(lock);
        assert_eq!(running(&paths).unwrap(), None);
    }

    #[test]
    fn only_the_recorded_process_is_killed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let start_ticks = start_ticks(pid).unwrap();
        kill_recorded(ProcessRecord { pid, start_ticks: start_ticks + 1 }).unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        kill_recorded(ProcessRecord { pid, start_ticks }).unwrap();
        assert!(!child.wait().unwrap().success());
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
