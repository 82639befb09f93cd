//! One server of the lab: a QEMU process with its disks, networks, console and power.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::ssh::{self, Output};

const SYSTEM_DISK_MIB: u64 = 8192;
/// An emulated server that prints nothing new is still starting; one that is gone is not.
const LOOK: Duration = Duration::from_millis(500);
const QMP_LIMIT: Duration = Duration::from_secs(5);

/// What a server is made of; kept in the lab's state file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    pub(super) name: String,
    pub(super) number: usize,
    pub(super) dir: PathBuf,
    pub(super) iso: PathBuf,
    pub(super) memory_mib: u32,
    pub(super) segment_port: u16,
    pub(super) ssh_port: u16,
    pub(super) api_port: u16,
    pub(super) key: PathBuf,
}

/// The interfaces of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nic {
    /// To the other servers.
    Segment,
    /// To this machine.
    Outside,
}

/// The state of a server's link to the private segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Plugged in.
    Up,
    /// Pulled out.
    Down,
}

/// The MAC address of an interface of a server.
pub fn mac(number: usize, nic: Nic) -> String {
    let kind = match nic {
        Nic::Segment => 1,
        Nic::Outside => 2,
    };
    format!("52:54:00:48:{kind:02x}:{:02x}", number & 0xff)
}

/// How servers are run on this machine, in words.
pub fn accelerator() -> &'static str {
    if kvm_nests() { "KVM" } else { "emulated CPU" }
}

/// Real KVM with nested virtualisation switched on.
fn kvm_nests() -> bool {
    let nested = |module: &str| {
        fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|on| ["1", "Y"].contains(&on.trim()))
    };
    Path::new("/dev/kvm").exists() && (nested("kvm_amd") || nested("kvm_intel"))
}

impl Settings {
    /// The file that the firmware channel hands to the installer.
    pub(super) fn answer_file(&self) -> PathBuf {
        self.dir.join("answer.toml")
    }

    /// Blank disks; they take space only for what is written.
    pub(super) fn make_disks(&self, data_disk_mib: u64) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        for (disk, size) in [("system", SYSTEM_DISK_MIB), ("data1", data_disk_mib), ("data2", data_disk_mib)]
        {
            let path = self.disk(disk);
            File::create(&path)
                .and_then(|file| file.set_len(size << 20))
                .with_context(|| format!("cannot make {}", path.display()))?;
        }
        let console = self.dir.join("console.log");
        if console.exists() {
            fs::remove_file(console)?;
        }
        Ok(())
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.raw"))
    }

    fn command(&self) -> Command {
        let path = |name: &str| self.dir.join(name).display().to_string();
        let mut qemu = Command::new("qemu-system-x86_64");
        if kvm_nests() {
            qemu.args(["-accel", "kvm", "-cpu", "host"]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi", "-cpu", "EPYC-Milan,+svm,+npt"]);
        }
        qemu.args(["-M", "q35", "-smp", "1", "-nodefaults", "-display", "none", "-name", &self.name])
            .args(["-m", &self.memory_mib.to_string()])
            .args(["-device", "virtio-rng-pci"])
            .args([
                "-chardev",
                &format!(
                    "socket,id=console,path={},server=on,wait=off,logfile={},logappend=on",
                    path("console.sock"),
                    path("console.log")
                ),
            ])
            .args(["-serial", "chardev:console"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp.sock"))])
            .args(["-fw_cfg", &format!("name=opt/org.hci/answer,file={}", self.answer_file().display())])
            .args(["-pidfile", &path("qemu.pid")]);
        for (number, disk) in ["system", "data1", "data2"].iter().enumerate() {
            qemu.args([
                "-drive",
                &format!(
                    "if=none,id={disk},file={},format=raw,cache=writeback,discard=unmap",
                    self.disk(disk).display()
                ),
            ])
            .args([
                "-device",
                &format!(
                    "virtio-blk-pci,drive={disk},serial={}-{disk},bootindex={}",
                    self.name,
                    number + if number == 0 { 1 } else { 10 }
                ),
            ]);
        }
        qemu.args([
            "-drive",
            &format!("if=none,id=iso,file={},format=raw,media=cdrom,readonly=on", self.iso.display()),
        ])
        .args(["-device", "ide-cd,drive=iso,bootindex=2"])
        .args([
            "-netdev",
            &format!("socket,id=segment,mcast=230.0.0.7:{},localaddr=127.0.0.1", self.segment_port),
        ])
        .args([
            "-device",
            &format!(
                "virtio-net-pci,netdev=segment,id=nic-segment,romfile=,mac={}",
                mac(self.number, Nic::Segment)
            ),
        ])
        .args([
            "-netdev",
            &format!(
                "user,id=outside,hostfwd=tcp:127.0.0.1:{}-:22,hostfwd=tcp:127.0.0.1:{}-:7443",
                self.ssh_port, self.api_port
            ),
        ])
        .args([
            "-device",
            &format!("virtio-net-pci,netdev=outside,romfile=,mac={}", mac(self.number, Nic::Outside)),
        ]);
        qemu
    }
}

/// A server, on or off.
#[derive(Debug)]
pub struct Server {
    settings: Settings,
}

impl Server {
    pub(super) fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// Its hostname.
    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// The port of this machine that its API is forwarded to.
    pub fn api_port(&self) -> u16 {
        self.settings.api_port
    }

    /// Switches it on.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn power_on(&self) -> Result<()> {
        ensure!(!self.is_on(), "{} is on already", self.name());
        let log = File::create(self.settings.dir.join("qemu.log"))?;
        let mut child = self
            .settings
            .command()
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start qemu-system-x86_64; `make setup` installs it")?;
        let started = Instant::now();
        while self.pid().is_none() || UnixStream::connect(self.settings.dir.join("qmp.sock")).is_err() {
            let ended = child.try_wait()?;
            if ended.is_some() || started.elapsed() > Duration::from_secs(20) {
                let said = fs::read_to_string(self.settings.dir.join("qemu.log")).unwrap_or_default();
                bail!(
                    "{} did not start: {}",
                    self.name(),
                    said.lines().last().unwrap_or("QEMU said nothing")
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        // Reaped here, or by init when this process ends first: the lab outlives it on purpose.
        std::thread::spawn(move || child.wait());
        Ok(())
    }

    /// Pulls the plug. A server that is off stays off.
    ///
    /// # Errors
    /// When its process cannot be ended.
    pub fn power_cut(&self) -> Result<()> {
        ssh::forget(&self.settings);
        let Some(pid) = self.pid() else { return Ok(()) };
        // It may have ended by itself meanwhile, which is what is wanted.
        let _ = kill(pid, Signal::SIGKILL);
        let started = Instant::now();
        while self.is_on() {
            ensure!(started.elapsed() < Duration::from_secs(10), "{} does not go off", self.name());
            std::thread::sleep(Duration::from_millis(20));
        }
        fs::remove_file(self.settings.dir.join("qemu.pid")).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        Ok(())
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// When the server does not take it.
    pub fn power_button(&self) -> Result<()> {
        self.qmp("{\"execute\":\"system_powerdown\"}")
    }

    /// Plugs or pulls its cable to the other servers.
    ///
    /// # Errors
    /// When the server does not take it.
    pub fn link(&self, link: Link) -> Result<()> {
        let up = link == Link::Up;
        self.qmp(&format!(
            "{{\"execute\":\"set_link\",\"arguments\":{{\"name\":\"nic-segment\",\"up\":{up}}}}}"
        ))
    }

    /// Whether its QEMU runs.
    pub fn is_on(&self) -> bool {
        self.pid().is_some_and(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // A zombie is off; so is another program that got the same process id.
            stat.contains("(qemu-system") && !stat.contains(") Z ")
        })
    }

    /// Runs a command on it.
    ///
    /// # Errors
    /// When it cannot be reached or the limit is over; a command that fails is no error.
    pub fn ssh(&self, command: &str, limit: Duration) -> Result<Output> {
        ssh::run(&self.settings, command, limit)
    }

    /// Copies a file to it.
    ///
    /// # Errors
    /// When it cannot be copied in time.
    pub fn copy_to(&self, file: &Path, to: &str, limit: Duration) -> Result<()> {
        ssh::copy_to(&self.settings, file, to, limit)
    }

    /// What a person types to log in.
    pub fn ssh_command_line(&self) -> String {
        ssh::command_line(&self.settings)
    }

    /// Waits until it can be logged in to.
    ///
    /// # Errors
    /// When the limit is over or the server is off, with the last lines of its console.
    pub fn wait_ssh(&self, limit: Duration) -> Result<()> {
        let started = Instant::now();
        loop {
            if ssh::ready(&self.settings) {
                return Ok(());
            }
            if !self.is_on() {
                bail!(
                    "{} went off while it was waited for; its console ends with:\n{}",
                    self.name(),
                    self.console_tail(20)
                );
            }
            if started.elapsed() > limit {
                bail!(
                    "{} cannot be logged in to after {} s; its console ends with:\n{}",
                    self.name(),
                    limit.as_secs(),
                    self.console_tail(20)
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The last lines of its console.
    pub fn console_tail(&self, lines: usize) -> String {
        let log = fs::read(self.settings.dir.join("console.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let all: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    pub(super) fn remove_disks(&self) -> Result<()> {
        for disk in ["system", "data1", "data2"] {
            let path = self.settings.disk(disk);
            if path.exists() {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn pid(&self) -> Option<Pid> {
        fs::read_to_string(self.settings.dir.join("qemu.pid")).ok()?.trim().parse().ok().map(Pid::from_raw)
    }

    fn qmp(&self, command: &str) -> Result<()> {
        let socket = self.settings.dir.join("qmp.sock");
        let mut stream = UnixStream::connect(&socket).with_context(|| format!("{} is off", self.name()))?;
        stream.set_read_timeout(Some(QMP_LIMIT))?;
        let mut answers = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        answers.read_line(&mut line)?;
        for command in ["{\"execute\":\"qmp_capabilities\"}", command] {
            stream.write_all(command.as_bytes())?;
            loop {
                line.clear();
                ensure!(answers.read_line(&mut line)? > 0, "QEMU of {} hung up", self.name());
                if line.contains("\"error\"") {
                    bail!("QEMU of {} refused {command}: {line}", self.name());
                }
                if line.contains("\"return\"") {
                    break;
                }
            }
        }
        Ok(())
    }
}
