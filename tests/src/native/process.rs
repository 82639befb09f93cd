//! One node's data process: `hci data run` in the node's network namespace.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use hci_node::paths::NodePaths;
use nix::sys::signal::Signal;

use super::scratch;

/// How much of a log is shown when something went wrong.
const LOG_LINES: usize = 25;

/// The `hci` executable under test: in the directory `HCI_BIN`, or where cargo puts it beside this program.
pub fn executable() -> Result<PathBuf> {
    let hci = match std::env::var_os("HCI_BIN") {
        Some(directory) => PathBuf::from(directory).join("hci"),
        None => {
            let own = std::env::current_exe()?;
            // Tests are one directory further down.
            let beside = own.ancestors().skip(1).take(2).map(|directory| directory.join("hci"));
            beside.into_iter().find(|hci| hci.exists()).unwrap_or_else(|| "hci".into())
        }
    };
    ensure!(
        hci.exists(),
        "there is no executable {}: build it (cargo build --release -p hci-node), or name its directory in HCI_BIN",
        hci.display()
    );
    Ok(fs::canonicalize(hci)?)
}

/// A running data process. Killed when dropped.
#[derive(Debug)]
pub struct DataProcess {
    child: Child,
}

impl DataProcess {
    /// Starts it; its log is appended to `log`.
    pub fn start(hci: &Path, namespace: &str, paths: &NodePaths, log: &Path) -> Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(hci).args(["data", "run", "--state"]);
        command.arg(paths.state()).arg("--run").arg(paths.run());
        command
            .env("NO_COLOR", "1")
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into()));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let parent = std::process::id();
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl and getppid.
        unsafe {
            command.pre_exec(move || {
                // Nothing is left behind when this program is killed. It may have been just now.
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                let orphaned = u32::try_from(nix::unistd::getppid().as_raw()) != Ok(parent);
                if orphaned { Err(std::io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
            });
        }
        let child = command.spawn().context("cannot start a data process")?;
        scratch::child_started(child.id());
        Ok(Self { child })
    }

    /// Its process id. (`ip` replaces itself by the data process.)
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails when it has ended by itself.
    pub fn check(&mut self) -> Result<()> {
        let ended = self.child.try_wait()?;
        ensure!(ended.is_none(), "a data process ended by itself: {ended:?}");
        Ok(())
    }

    /// kill -9.
    pub fn kill(mut self) -> Result<()> {
        self.check()?;
        Ok(())
    }
}

impl Drop for DataProcess {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        scratch::child_ended(self.child.id());
    }
}

/// The end of a log, for people.
pub fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
