//! Commands on a server of the lab, over SSH through a forwarded port of the loopback.
//!
//! One connection is kept for each server, as a handshake costs seconds of an emulated CPU. It is started when the
//! server is ready and forgotten when its power is cut; without it each command makes its own.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::server::Settings;

/// What a command did.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code; `None` when it was killed.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Output {
    /// Whether it ended well.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

/// The code that ssh itself ends with when there is no connection.
const SSH_FAILED: i32 = 255;

pub(super) fn generate_key(dir: &Path) -> Result<PathBuf> {
    let key = dir.join("key");
    if !key.exists() {
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f"])
            .arg(&key)
            .status()
            .context("cannot start ssh-keygen; install openssh-client")?;
        ensure!(made.success(), "ssh-keygen failed with {made}");
    }
    Ok(key)
}

fn options(settings: &Settings) -> Vec<String> {
    let mut options = vec!["-i".to_owned(), settings.key.display().to_string()];
    for option in [
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        "BatchMode=yes",
        "ConnectTimeout=15",
        "ServerAliveInterval=5",
        "ServerAliveCountMax=6",
        "IdentitiesOnly=yes",
    ] {
        options.extend(["-o".to_owned(), option.to_owned()]);
    }
    options
}

fn ssh(settings: &Settings) -> Command {
    let mut command = Command::new("ssh");
    command.args(options(settings)).arg("-S").arg(settings.socket("ssh")).args([
        "-p",
        &settings.ssh_port.to_string(),
        "root@127.0.0.1",
    ]);
    command
}

pub(super) fn command_line(settings: &Settings) -> String {
    format!(
        "ssh -i {} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -p {} root@127.0.0.1",
        settings.key.display(),
        settings.ssh_port
    )
}

/// Whether the server can be logged in to; keeps a connection when it can.
pub(super) fn ready(settings: &Settings) -> bool {
    let mut checked = ssh(settings);
    checked.args(["-O", "check"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if checked.status().is_ok_and(|status| status.success()) {
        return true;
    }
    let mut command = Command::new("ssh");
    command
        .args(options(settings))
        .args(["-M", "-N", "-f", "-S"])
        .arg(settings.socket("ssh"))
        .args(["-p", &settings.ssh_port.to_string(), "root@127.0.0.1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else { return false };
    matches!(wait(&mut child, Duration::from_secs(40)), Ok(Some(code)) if code == 0)
}

pub(super) fn forget(settings: &Settings) {
    let mut command = ssh(settings);
    command.args(["-O", "exit"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Without a connection there is nothing to forget.
    let _ = command.status();
    let _ = std::fs::remove_file(settings.socket("ssh"));
}

pub(super) fn run(settings: &Settings, command: &str, limit: Duration) -> Result<Output> {
    let mut ssh = ssh(settings);
    ssh.arg("--").arg(command).stdin(Stdio::null());
    finish(settings, ssh, command, limit)
}

pub(super) fn copy_to(settings: &Settings, file: &Path, to: &str, limit: Duration) -> Result<()> {
    let mut ssh = ssh(settings);
    let source = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    ssh.arg("--").arg(format!("cat > '{to}'")).stdin(source);
    let done = finish(settings, ssh, &format!("copying {}", file.display()), limit)?;
    ensure!(done.success(), "copying {} to {} failed: {}", file.display(), settings.name, done.stderr.trim());
    Ok(())
}

fn finish(settings: &Settings, mut ssh: Command, what: &str, limit: Duration) -> Result<Output> {
    let mut child = ssh
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start ssh; install openssh-client")?;
    let stdout = reader(child.stdout.take());
    let stderr = reader(child.stderr.take());
    let code = match wait(&mut child, limit)? {
        Some(code) => code,
        None => bail!("`{what}` on {} is not done after {} s", settings.name, limit.as_secs()),
    };
    let output = Output {
        code: Some(code),
        stdout: stdout.join().unwrap_or_default(),
        stderr: stderr.join().unwrap_or_default(),
    };
    if code == SSH_FAILED {
        bail!("{} cannot be reached: {}", settings.name, output.stderr.trim());
    }
    Ok(output)
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before a broken pipe is what there is.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The exit code, or `None` when the limit was over and the process was killed.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<i32>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.code().unwrap_or(SSH_FAILED)));
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
