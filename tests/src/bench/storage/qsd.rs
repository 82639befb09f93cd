//! qemu-storage-daemon: one file as a vhost-user-blk device, the least that a vhost-user target can cost.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::client::Client;
use super::workload::{AREA, Content, WORKLOADS};
use super::{Medium, write_all};
use crate::bench::Row;
use crate::native::scratch::Directory;

const START_LIMIT: Duration = Duration::from_secs(10);

/// A process that ends when dropped, or with this one.
#[derive(Debug)]
pub(super) struct Server(Child);

impl Server {
    /// Starts a command in the background; what it complains of goes to a file.
    pub(super) fn start(mut command: Command, log: &Path) -> Result<Self> {
        // SAFETY: between fork and exec only an async-signal-safe call is made: prctl.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let log = File::options().create(true).append(true).open(log)?;
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        Ok(Self(child.with_context(|| format!("cannot start {:?}", command.get_program()))?))
    }

    /// Whether it has not ended.
    pub(super) fn runs(&mut self) -> Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures one.
pub fn measure(medium: Medium) -> Result<Vec<Row>> {
    let directory = Directory::new()?;
    let file = medium.place(&directory, 2 * AREA)?.join("disk");
    write_all(&file)?;
    let socket = directory.path().join("socket");
    let server = start(&file, &socket)?;
    let target = format!("qemu-storage-daemon, {}", medium.name());
    let mut client = Client::connect(&socket, Content::Random)?;
    client.fill()?;
    let mut rows = Vec::new();
    for workload in WORKLOADS {
        rows.push(client.measure(workload, &[server.pid()])?.row(&target, workload));
    }
    Ok(rows)
}

fn start(file: &Path, socket: &Path) -> Result<Server> {
    let mut command = Command::new("qemu-storage-daemon");
    command
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring", file.display()))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on",
            socket.display()
        ));
    let server = Server::start(command, &socket.with_extension("log"))?;
    let deadline = Instant::now() + START_LIMIT;
    while !socket.exists() {
        ensure!(Instant::now() < deadline, "qemu-storage-daemon made no socket within {START_LIMIT:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(server)
}
