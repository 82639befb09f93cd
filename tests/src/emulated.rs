//! An emulated machine with KVM: QEMU emulates a processor that can virtualize, so that real guests run under our VMM where there is no KVM.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Result, ensure};

/// QEMU before version 11 fails an assertion of its own (`tcg_handle_interrupt`) when a nested guest writes to CR8 while an interrupt is pending, which
/// happens in firmware now and then. It says nothing about what runs in the machine; any other end does.
const ATTEMPTS: u32 = 4;

/// What the clock of an emulated machine goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// This machine's.
    Time,
    /// The instructions that are executed: nothing else makes a difference.
    Instructions,
}

/// An emulated machine with KVM, in which guests run.
#[derive(Debug, Clone, Copy)]
pub struct Emulated<'a> {
    /// Its kernel.
    pub kernel: &'a Path,
    /// Its initramfs, whose programs say `PASS` at the end.
    pub initramfs: &'a Path,
    /// What its kernel is told beside what it always is; what the kernel does not know, programs find in their environment.
    pub arguments: &'a str,
    /// Its memory.
    pub mib: u32,
    /// Its clock.
    pub clock: Clock,
    /// How long it may run.
    pub patience: Duration,
}

impl Emulated<'_> {
    /// Runs it until it is switched off, with its console in a file.
    ///
    /// # Errors
    /// It did not end in time, or nobody said `PASS`; with all that was said.
    pub fn pass(&self, console: &Path) -> Result<()> {
        let mut status = self.run(console)?;
        for attempt in 2..=ATTEMPTS {
            if status.signal() != Some(libc::SIGABRT) {
                break;
            }
            println!("QEMU has given up by itself: attempt {attempt} of {ATTEMPTS}");
            status = self.run(console)?;
        }
        let said = String::from_utf8_lossy(&fs::read(console)?).into_owned();
        ensure!(status.success(), "the machine ended with {status}:\n{said}");
        let passed = said.lines().any(|line| line.trim() == "PASS");
        ensure!(passed, "{said}\nnobody said PASS:\n{}", reasons(&said).join("\n"));
        Ok(())
    }

    fn run(&self, console: &Path) -> Result<ExitStatus> {
        let accelerator: &[&str] = match self.clock {
            Clock::Time => &["-accel", "tcg,thread=multi"],
            Clock::Instructions => &["-accel", "tcg", "-icount", "shift=0,sleep=off"],
        };
        Ok(Command::new("timeout")
            .arg(self.patience.as_secs().to_string())
            .arg("qemu-system-x86_64")
            .args(accelerator)
            .args(["-M", "q35", "-cpu", "EPYC-Milan,+svm,+npt", "-smp", "1", "-m", &self.mib.to_string()])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 {}", self.arguments), "-kernel"])
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .status()?)
    }
}

/// The lines that say why a program ended, which much of what its guest said may follow.
fn reasons(said: &str) -> Vec<&str> {
    let tells = |line: &&str| ["Error: ", "the VMM is stopped"].iter().any(|start| line.starts_with(start));
    said.lines().map(str::trim_end).filter(tells).collect()
}
