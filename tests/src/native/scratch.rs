//! What a run leaves outside of its process: namespaces, directories, mounts, child processes.
//!
//! Every name carries the process id. So all of it can be found again without a list: at the end, on a signal, and by the
//! next run when a run was killed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};

const PREFIX: &str = "hcin";
static NEXT: AtomicU32 = AtomicU32::new(0);
/// Processes that were started and not yet waited for.
static CHILDREN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// A name that nobody else uses: of this process, and different at each call.
pub fn unique_name() -> String {
    format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A clear message when this cannot work here; also removes what killed runs left.
pub fn prepare() -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "this needs root: it makes network namespaces and mounts (run it with sudo, or in the lab's container)"
    );
    run("ip", &["netns", "list"])?;
    let is_dead = |pid: u32| !Path::new("/proc").join(pid.to_string()).exists();
    remove_of(is_dead);
    Ok(())
}

/// Removes all of this run and ends the process when it is told to end.
pub fn clean_up_on_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut signals = {
        let _context = runtime.enter();
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal)
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            let waits = signals.iter_mut().flatten().map(|signal| Box::pin(signal.recv()));
            futures_util::future::select_all(waits).await;
        });
        remove_own();
        std::process::exit(130);
    })?;
    Ok(())
}

fn remove_own() {
    for child in CHILDREN.lock().iter().filter_map(|pid| i32::try_from(*pid).ok()) {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
    }
    let own = std::process::id();
    remove_of(|pid| pid == own);
}

/// Notes that a process was started.
pub(super) fn child_started(pid: u32) {
    CHILDREN.lock().insert(pid);
}

/// Notes that a process has ended and was waited for.
pub(super) fn child_ended(pid: u32) {
    CHILDREN.lock().remove(&pid);
}

/// The process that a name belongs to.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

fn remove_of(whose: impl Fn(u32) -> bool) {
    let is_meant = |name: &str| owner(name).is_some_and(&whose);
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        if is_meant(&entry.file_name().to_string_lossy()) {
            remove_directory(&entry.path());
        }
    }
    let namespaces = run("ip", &["netns", "list"]).unwrap_or_default();
    for name in namespaces.lines().filter_map(|line| line.split_whitespace().next()) {
        if is_meant(name) {
            // Somebody else may be removing it, too.
            let _ = run("ip", &["netns", "delete", name]);
        }
    }
}

fn remove_directory(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new);
    for point in points.filter(|point| point.starts_with(directory)) {
        // What is left mounted is reported by the removal below.
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
    if let Err(error) = fs::remove_dir_all(directory) {
        eprintln!("cannot remove {}: {error}", directory.display());
    }
}

/// A directory, gone with what is mounted in it when dropped.
#[derive(Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// Makes one in the folder for temporary files.
    pub fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(unique_name());
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Mounts a file system in memory on a new directory in it.
    pub fn mount_memory(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let point = self.0.join(name);
        fs::create_dir(&point)?;
        let size = format!("size={bytes}");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), &point, Some("tmpfs"), flags, Some(size.as_str())).with_context(
            || {
                format!(
                    "cannot mount a tmpfs on {}; is this a container without CAP_SYS_ADMIN?",
                    point.display()
                )
            },
        )?;
        Ok(point)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        remove_directory(&self.0);
    }
}

/// Runs a program that ends by itself; its output.
pub fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}; is it installed?"))?;
    ensure!(
        output.status.success(),
        "{program} {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}
