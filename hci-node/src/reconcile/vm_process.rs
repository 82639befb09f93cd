//! VMM processes: starting them, finding them again, ending them.
//!
//! The VM's directory tells everything ([`crate::vmm_role::record`]), so that a control process that has just been
//! started sees the same as the one that started the VMM. No parent's knowledge of its child is needed.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant, SystemTime},
};

use netfabric::rpc::CallError;
use nix::unistd::User;

use super::observed::Vcpus;
use crate::{
    data,
    files::{self, Durability, remove_if_there},
    isolation::cgroup,
    paths::{NodePaths, VmPaths},
    state::{RunEpoch, VmId, report::Executable},
    vmm_role::{
        protocol::{self, Kill, Pause, PowerButton, Resume},
        record::{self, Ended, ExitRecord, ProcessRecord, RunFile},
    },
};

/// Has the allocator use small pages for a VMM's own few hundred KiB: it would take 2 MiB for each thread. Huge pages stay for the guest's memory
/// ([`crate::vmm_role::prepare`]).
pub const SMALL_PAGES: (&str, &str) = ("MIMALLOC_ALLOW_THP", "0");
/// User whose group VMMs have, when there is one by that name and the node runs as root.
const VMM_USER: &str = "hci-vmm";
/// How long after its run file was written a VMM may take to lock its directory before it counts as vanished.
const SPAWN_PATIENCE: Duration = Duration::from_secs(5);
/// How long a VMM may take to end after it was told to, before it gets SIGKILL.
const KILL_PATIENCE: Duration = Duration::from_secs(2);
/// How often is looked whether it has.
const KILL_POLL: Duration = Duration::from_millis(20);
/// Lines of the log that go into the reason of a crash.
const LOG_LINES: usize = 3;
/// Bytes of the log that are looked at for them.
const LOG_BYTES: usize = 4096;

/// A run, as its directory shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundRun {
    /// Which.
    pub epoch: RunEpoch,
    /// How it ended; none while its process is there.
    pub ended: Option<Ended>,
    /// What its process runs.
    pub executable: Executable,
}

/// Looks at all VMs' directories. A run that was just started and shows nothing yet counts as alive.
pub fn scan(paths: &NodePaths) -> io::Result<BTreeMap<VmId, FoundRun>> {
    let mut runs = BTreeMap::new();
    let present = executable().ok().and_then(|path| file_of(&path));
    let entries = match fs::read_dir(paths.vms()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(runs),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let Some(vm) = entry?.file_name().to_str().and_then(|name| name.parse::<VmId>().ok()) else {
            continue;
        };
        if let Some(run) = look(&paths.vm(vm), present)? {
            runs.insert(vm, run);
        }
    }
    Ok(runs)
}

/// Removes the directories of VMs that are gone: the logs that were kept for those who ask why.
pub fn sweep(paths: &NodePaths, is_there: impl Fn(VmId) -> bool) -> io::Result<()> {
    let entries = match fs::read_dir(paths.vms()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<VmId>().ok());
    for vm in names.filter(|vm| !is_there(*vm)) {
        // One with a run file goes when that run has ended and is told.
        if !paths.vm(vm).config().exists() {
            forget(&paths.vm(vm), Log::Remove)?;
        }
    }
    Ok(())
}

/// Device and number of a file.
type FileId = (u64, u64);

fn file_of(path: &Path) -> Option<FileId> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// What a process runs, where `present` is what would be started now. That of a process which is about to end counts as present.
fn executable_of(process: ProcessRecord, present: Option<FileId>) -> Executable {
    match (file_of(Path::new(&format!("/proc/{}/exe", process.pid))), present) {
        (Some(runs), Some(present)) if runs != present => Executable::Older,
        _ => Executable::Present,
    }
}

fn look(paths: &VmPaths, present: Option<FileId>) -> io::Result<Option<FoundRun>> {
    let Some(run) = record::run_file(paths)? else { return Ok(None) };
    let epoch = run.epoch;
    // In this order: a process that ends between the two looks has left its record.
    let running = record::running(paths)?;
    let alive = running.is_some();
    let executable = running.flatten().map_or(Executable::Present, |process| executable_of(process, present));
    let ended = match record::exit_record(paths)? {
        _ if alive => None,
        Some(record) if record.epoch == epoch => Some(record.ended),
        _ if age(paths) < SPAWN_PATIENCE && !was_locked(paths) => None,
        _ => Some(Ended::Crashed(format!("the VMM process vanished; {}", log_tail(paths)))),
    };
    Ok(Some(FoundRun { epoch, ended, executable }))
}

fn age(paths: &VmPaths) -> Duration {
    let written = fs::metadata(paths.config()).and_then(|meta| meta.modified());
    written.ok().and_then(|at| SystemTime::now().duration_since(at).ok()).unwrap_or(Duration::MAX)
}

/// Whether a process of this run has held the directory: it writes the pid file anew, after the run file.
fn was_locked(paths: &VmPaths) -> bool {
    let modified = |path: PathBuf| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    match (modified(paths.pid()), modified(paths.config())) {
        (Some(pid), Some(config)) => pid >= config,
        _ => false,
    }
}

pub(super) fn log_tail(paths: &VmPaths) -> String {
    let log = fs::read(paths.log()).unwrap_or_default();
    let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_BYTES)..]).into_owned();
    let lines: Vec<&str> =
        tail.lines().rev().filter(|line| !line.trim().is_empty()).take(LOG_LINES).collect();
    match lines.is_empty() {
        true => "its log is empty".to_owned(),
        false => format!("last in its log: {}", lines.into_iter().rev().collect::<Vec<_>>().join(" | ")),
    }
}

/// What files a VMM finds beside its configuration.
#[derive(Default)]
pub struct Contents {
    /// Of its seed disk.
    pub seed: Option<Vec<u8>>,
    /// Of its firmware's variables; the VMM makes them when there are none.
    pub variables: Option<Vec<u8>>,
}

/// Starts a VMM with these files. It is the child of this process but does not depend on it.
pub fn start(paths: &NodePaths, run: &RunFile, contents: &Contents) -> io::Result<tokio::process::Child> {
    let vm = paths.vm(run.vm);
    make_directory(paths, &vm)?;
    // The VMM sees this directory, with what is made in it later, or nothing.
    data::make_socket_directory(&vm.backends().join("any"))?;
    // Nothing of an earlier run may be taken for this one's.
    for stale in vm.made_sockets().into_iter().chain([vm.exit(), vm.variables()]) {
        remove_if_there(&stale)?;
    }
    if let Some(content) = &contents.variables {
        files::replace(&vm.variables(), content, 0o600, Durability::Volatile)?;
    }
    if let (Some(path), Some(content)) = (&run.config.seed, &contents.seed) {
        // Only the VMM's user gets into the directory, so that nobody else reads what may hold secrets.
        files::replace(path, content, 0o644, Durability::Volatile)?;
    }
    record::write_run_file(&vm.config(), run)?;
    spawn(&vm, &vm.config())
}

/// Starts a VMM that is to take the place of the one that runs the VM, with the files of that one.
pub fn start_successor(paths: &NodePaths, run: &RunFile) -> io::Result<tokio::process::Child> {
    let vm = paths.vm(run.vm);
    for stale in vm.made_sockets() {
        remove_if_there(&vm.successor(&stale))?;
    }
    let config = vm.successor(&vm.config());
    record::write_run_file(&config, run)?;
    spawn(&vm, &config)
}

fn spawn(vm: &VmPaths, config: &Path) -> io::Result<tokio::process::Child> {
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(vm.log())?;
    let mut command = tokio::process::Command::new(executable()?);
    command
        .args(["vmm", "run", "--config"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .current_dir("/")
        .env(SMALL_PAGES.0, SMALL_PAGES.1)
        // A panic would look for its own executable, which a VMM cannot open.
        .env_remove("RUST_BACKTRACE")
        .kill_on_drop(false);
    if vmm_user().is_some() {
        command.args(["--user", VMM_USER]);
    }
    command.spawn()
}

/// What became of a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Succession {
    /// There is none, or it does not have the guest.
    None,
    /// It has the guest, and what was the predecessor's is its own.
    Done,
}

/// Gives a successor that runs the VM the names of its predecessor's files, once that one has ended and removes none of them any more.
pub async fn settle_succession(paths: &VmPaths) -> io::Result<Succession> {
    let next = paths.successor(&paths.pid());
    let successor = match fs::File::open(&next) {
        Ok(file) => record::process_in(&file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Succession::None),
        Err(error) => return Err(error),
    };
    if successor.is_none() || record::running(paths)?.flatten() != successor {
        return Ok(Succession::None);
    }
    let began = Instant::now();
    while let Some(predecessor) = record::predecessor(paths)?.filter(|process| record::is_there(*process)) {
        // The guest is not its own any more.
        if began.elapsed() >= KILL_PATIENCE {
            record::kill_recorded(paths, predecessor)?;
        }
        if began.elapsed() >= 2 * KILL_PATIENCE {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the VM's former process does not end"));
        }
        tokio::time::sleep(KILL_POLL).await;
    }
    for file in paths.made_sockets().into_iter().chain([paths.config()]) {
        match fs::rename(paths.successor(&file), &file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    // Last: as long as it is there, this is not done.
    remove_if_there(&next)?;
    Ok(Succession::Done)
}

/// Ends a successor that does not have the guest. Returns when it is gone, or has it.
pub async fn end_successor(paths: &VmPaths) -> io::Result<()> {
    let deadline = Instant::now() + KILL_PATIENCE;
    while let Some(found) = record::successor(paths)? {
        if let Some(process) = found {
            if record::running(paths)? == Some(Some(process)) {
                return Ok(());
            }
            record::kill_recorded(paths, process)?;
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the VM's other process does not end"));
        }
        tokio::time::sleep(KILL_POLL).await;
    }
    Ok(())
}

/// The executable of this process, also after the file was replaced by an upgrade.
fn executable() -> io::Result<PathBuf> {
    let path = fs::read_link("/proc/self/exe")?;
    Ok(match path.to_str().and_then(|path| path.strip_suffix(" (deleted)")) {
        Some(replaced) => PathBuf::from(replaced),
        None => path,
    })
}

/// The user whose group VMMs have.
fn vmm_user() -> Option<User> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    User::from_name(VMM_USER).ok().flatten()
}

/// On the way to the VM's directory and to the boot files everybody may pass, but not look. The VMM does the rest before it gives up root.
fn make_directory(paths: &NodePaths, vm: &VmPaths) -> io::Result<()> {
    fs::create_dir_all(vm.dir())?;
    fs::create_dir_all(paths.boot_files())?;
    for passage in [paths.state(), paths.run(), &paths.vms(), &paths.boot_files()] {
        fs::set_permissions(passage, fs::Permissions::from_mode(0o711))?;
    }
    fs::set_permissions(vm.dir(), fs::Permissions::from_mode(0o700))
}

/// Presses the power button.
pub async fn press_power_button(paths: &VmPaths) -> Result<(), CallError> {
    protocol::call(&paths.socket(), &PowerButton).await
}

/// Has the guest's processors held, or lets them run.
pub async fn set_vcpus(paths: &VmPaths, to: Vcpus) -> Result<(), CallError> {
    match to {
        Vcpus::Held => protocol::call(&paths.socket(), &Pause).await,
        Vcpus::Running => protocol::call(&paths.socket(), &Resume).await,
    }
}

/// Ends a VMM: by order first when there is time for it, then by SIGKILL. Returns when its directory is free.
pub async fn kill(paths: &VmPaths, epoch: RunEpoch, why: Ended) -> io::Result<()> {
    let record = ExitRecord { epoch, ended: why };
    if record.ended == Ended::Killed
        && protocol::call(&paths.socket(), &Kill).await.is_ok()
        && ends_within(paths, KILL_PATIENCE).await?
    {
        return record::write_exit_record(paths, &record);
    }
    let deadline = Instant::now() + KILL_PATIENCE;
    loop {
        match record::running(paths)? {
            // Recorded before anybody can see it gone and take it for a crash.
            None => return record::write_exit_record(paths, &record),
            Some(Some(process)) => record::kill_recorded(paths, process)?,
            // It has the lock and is about to write its pid.
            Some(None) => {}
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the VMM does not end"));
        }
        tokio::time::sleep(KILL_POLL).await;
    }
}

async fn ends_within(paths: &VmPaths, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    while record::running(paths)?.is_some() {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        tokio::time::sleep(KILL_POLL).await;
    }
    Ok(true)
}

/// Whether the log of an ended run is kept for those who ask why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// The VM is still there.
    Keep,
    /// The VM is gone.
    Remove,
}

/// Removes the records of an ended run.
pub fn forget(paths: &VmPaths, log: Log) -> io::Result<()> {
    if let Some(run) = record::run_file(paths)? {
        cgroup::remove(Path::new(cgroup::TREE), &run.cgroup());
    }
    match log {
        Log::Keep => {
            // The run file last: without it there is no run.
            let records = [paths.exit(), paths.seed(), paths.variables(), paths.config()];
            let next = [paths.config(), paths.pid()].map(|file| paths.successor(&file));
            for file in paths.made_sockets().into_iter().chain(next).chain(records) {
                remove_if_there(&file)?;
            }
            Ok(())
        }
        Log::Remove => match fs::remove_dir_all(paths.dir()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;

    use super::*;
    use crate::vmm_role::record::RunLock;

    fn run_in(paths: &NodePaths, vm: VmId, epoch: u64) -> VmPaths {
        let files = paths.vm(vm);
        fs::create_dir_all(files.dir()).unwrap();
        let config = serde_json::from_value(serde_json::json!({
            "name": "web", "vcpus": 1, "memory_bytes": 1 << 30, "boot": { "kernel": { "kernel": "/k" } }, "console_socket": "/c"
        }));
        let run = RunFile { vm, epoch: RunEpoch(epoch), config: config.unwrap(), begin: Default::default() };
        record::write_run_file(&files.config(), &run).unwrap();
        files
    }

    fn paths() -> (tempfile::TempDir, NodePaths) {
        let temp = tempfile::tempdir().unwrap();
        let paths = NodePaths::new(temp.path().join("state"), temp.path().join("run"));
        (temp, paths)
    }

    #[test]
    fn a_run_is_seen_alive_ended_and_vanished() {
        let (_temp, paths) = paths();
        let vm = VmId::random();
        assert!(scan(&paths).unwrap().is_empty());
        let files = run_in(&paths, vm, 3);
        let alive = FoundRun { epoch: RunEpoch(3), ended: None, executable: Executable::Present };
        assert_eq!(scan(&paths).unwrap()[&vm], alive, "it was started a moment ago");
        let lock = RunLock::take(&files.pid()).unwrap();
        assert_eq!(scan(&paths).unwrap()[&vm], alive);
        let other = file_of(files.dir());
        assert_eq!(look(&files, other).unwrap().unwrap().executable, Executable::Older);
        fs::write(files.log(), "first\n\nlast words\n").unwrap();
        drop(lock);
        let vanished = scan(&paths).unwrap()[&vm].ended.clone();
        assert!(matches!(&vanished, Some(Ended::Crashed(why)) if why.contains("last words")), "{vanished:?}");

        let record = ExitRecord { epoch: RunEpoch(3), ended: Ended::GuestShutdown };
        record::write_exit_record(&files, &record).unwrap();
        assert_eq!(scan(&paths).unwrap()[&vm].ended, Some(Ended::GuestShutdown));
        forget(&files, Log::Keep).unwrap();
        assert!(scan(&paths).unwrap().is_empty() && files.log().exists());
        sweep(&paths, |_| true).unwrap();
        assert!(files.log().exists());
        sweep(&paths, |_| false).unwrap();
        assert!(!files.dir().exists());
    }

    /// A process that holds the directory's lock, as a VMM does, and takes no orders.
    fn stubborn(files: &VmPaths) -> std::process::Child {
        let script = format!("exec 9<>'{0}'; flock -x 9; sleep 60", files.pid().display());
        let child = std::process::Command::new("sh").args(["-c", &script]).process_group(0).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while record::running(files).unwrap().is_none() {
            assert!(Instant::now() < deadline, "the process does not take the lock");
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }

    #[tokio::test]
    async fn a_vmm_that_takes_no_orders_is_killed_and_the_reason_recorded() {
        let (_temp, paths) = paths();
        let vm = VmId::random();
        let files = run_in(&paths, vm, 1);
        fs::write(files.pid(), "").unwrap();
        let mut child = stubborn(&files);
        let pid = i32::try_from(child.id()).unwrap();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let start_ticks = stat.split(") ").nth(1).unwrap().split(' ').nth(19).unwrap().parse().unwrap();
        fs::write(files.pid(), serde_json::to_vec(&ProcessRecord { pid, start_ticks }).unwrap()).unwrap();
        // Its child sleeps on with the lock unless the whole group goes; a VMM has no children.
        let reaper = std::thread::spawn(move || {
            let status = child.wait().unwrap();
            let _ =
                nix::sys::signal::killpg(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            status
        });
        kill(&files, RunEpoch(1), Ended::LeaseLapsed).await.unwrap();
        assert!(!reaper.join().unwrap().success());
        assert_eq!(scan(&paths).unwrap()[&vm].ended, Some(Ended::LeaseLapsed));
    }
}
