//! QEMU as the front end of a volume: a real guest's driver, on an emulated CPU, that boots from it and writes to it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::process::executable;
use crate::blkclient::BlkClient;
use crate::demo::workload::Report;
use crate::guest::{self, GuestImage};

/// How much of the console is shown when something went wrong.
const CONSOLE_LINES: usize = 25;
const LOOK: Duration = Duration::from_millis(100);

/// The image that the guest boots, built where the lab's is.
pub fn image() -> Result<GuestImage> {
    let hci = executable()?;
    let target = hci.ancestors().nth(2).context("the executable is in no target directory")?;
    guest::build(&Path::new(env!("CARGO_MANIFEST_DIR")).join("guest"), &target.join("guest"))
}

/// Puts the guest's root file system at the start of a volume.
pub fn install(image: &GuestImage, client: &mut BlkClient) -> Result<()> {
    const PIECE: usize = 64 << 10;
    let disk = fs::read(&image.disk)?;
    for (index, piece) in disk.chunks(PIECE).enumerate() {
        client.write((index * PIECE) as u64, piece)?;
    }
    client.flush()
}

/// A guest under QEMU. Its power is cut when it is dropped.
#[derive(Debug)]
pub struct GuestVm {
    child: Child,
    console: PathBuf,
}

impl GuestVm {
    /// Boots it from the volume behind that socket; its console goes to a file.
    pub fn boot(image: &GuestImage, socket: &Path, console: &Path) -> Result<Self> {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg", "-M", "q35,memory-backend=memory", "-cpu", "EPYC-Milan", "-m", "256"])
            .args(["-object", "memory-backend-memfd,id=memory,size=256M,share=on"])
            .args(["-nodefaults", "-display", "none"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="])
            .args(["-chardev", &format!("socket,id=volume,path={},reconnect=1", socket.display())])
            .args(["-device", "vhost-user-blk-pci,chardev=volume,num-queues=1"])
            .args(["-append", "console=ttyS0 quiet panic=-1", "-kernel"])
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initramfs);
        // SAFETY: between fork and exec only an async-signal-safe call is made: prctl.
        unsafe {
            qemu.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let log = fs::File::create(console.with_extension("qemu"))?;
        let child = qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        Ok(Self { child: child.context("cannot start qemu-system-x86_64")?, console: console.to_owned() })
    }

    /// What its workload has said; fails when that is an error, or when QEMU has ended.
    pub fn report(&mut self) -> Result<Report> {
        let log = String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned();
        let report = Report::parse(&log);
        report.check("the guest")?;
        let ended = self.child.try_wait()?;
        ensure!(ended.is_none(), "QEMU ended: {ended:?}: {}", self.said());
        Ok(report)
    }

    /// Waits until its report is as wanted.
    pub fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        mut is_so: impl FnMut(&Report) -> bool,
    ) -> Result<Report> {
        let deadline = Instant::now() + limit;
        loop {
            let report = self.report()?;
            if is_so(&report) {
                return Ok(report);
            }
            ensure!(Instant::now() < deadline, "waited {limit:?} for {what}; {report:?}; {}", self.said());
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until it has flushed more than it has now.
    pub fn goes_on(&mut self, limit: Duration) -> Result<u64> {
        let before = self.report()?.flushed.unwrap_or_default();
        let report = self.wait("the guest to write on", limit, |now| now.flushed > Some(before))?;
        Ok(report.flushed.unwrap_or_default())
    }

    fn said(&self) -> String {
        let of = |path: &Path| {
            let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
        };
        format!("console:\n{}\nQEMU:\n{}", of(&self.console), of(&self.console.with_extension("qemu")))
    }
}

impl Drop for GuestVm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
