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

/// What a server starts with, before any of our code runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Firmware {
    /// A PC BIOS.
    #[default]
    Bios,
    /// UEFI, which starts anything.
    Uefi,
    /// UEFI, which starts only what is signed for Microsoft's keys.
    SecureBoot,
}

/// What holds the ISO.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Medium {
    /// A CD in a drive.
    #[default]
    Cd,
    /// A USB stick that the ISO was written to.
    UsbStick,
}

impl Firmware {
    /// The program and the store of variables that Debian's package has for it.
    fn images(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Bios => None,
            Self::Uefi => Some(("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd")),
            Self::SecureBoot => {
                Some(("/usr/share/OVMF/OVMF_CODE_4M.ms.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"))
            }
        }
    }
}

/// What a server is made of; kept in the lab's state file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    pub(super) name: String,
    pub(super) firmware: Firmware,
    pub(super) medium: Medium,
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

    /// Blank disks, which take space only for what is written, and the firmware's variables as they leave the factory.
    pub(super) fn make_disks(&self, data_disk_mib: u64) -> Result<()> {
        fs::create_dir_all(&self.dir)?;
        if let Some((_, variables)) = self.firmware.images() {
            fs::copy(variables, self.firmware_variables())
                .with_context(|| format!("cannot copy {variables}; `make setup` installs ovmf"))?;
        }
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

    fn firmware_variables(&self) -> PathBuf {
        self.dir.join("firmware-variables.fd")
    }

    /// A socket of the server. Paths of Unix sockets are short, so they are not in the lab's folder.
    pub(super) fn socket(&self, name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("hci-lab-{}-{}-{name}", self.ssh_port, self.name))
    }

    fn add_firmware(&self, qemu: &mut Command) {
        let smm = if self.firmware == Firmware::SecureBoot { "on" } else { "off" };
        qemu.args(["-M", &format!("q35,smm={smm}")]);
        let Some((program, _)) = self.firmware.images() else { return };
        let variables = self.firmware_variables();
        qemu.args(["-drive", &format!("if=pflash,unit=0,format=raw,readonly=on,file={program}")])
            .args(["-drive", &format!("if=pflash,unit=1,format=raw,file={}", variables.display())]);
        if self.firmware == Firmware::SecureBoot {
            // Only the firmware itself, in system management mode, may change its variables.
            qemu.args(["-global", "driver=cfi.pflash01,property=secure,value=on"])
                .args(["-global", "ICH9-LPC.disable_s3=1"]);
        }
    }

    fn add_medium(&self, qemu: &mut Command) {
        let iso = self.iso.display();
        // This BIOS tries one hard disk only, and a stick is one to it.
        let place = if self.firmware == Firmware::Bios { 0 } else { 2 };
        match self.medium {
            Medium::Cd => qemu
                .args(["-drive", &format!("if=none,id=iso,file={iso},format=raw,media=cdrom,readonly=on")])
                .args(["-device", "ide-cd,drive=iso,bootindex=2"]),
            // A stick can be written to; what is written is not kept.
            Medium::UsbStick => qemu
                .args(["-device", "qemu-xhci"])
                .args(["-drive", &format!("if=none,id=iso,file={iso},format=raw,snapshot=on")])
                .args(["-device", &format!("usb-storage,drive=iso,removable=on,bootindex={place}")]),
        };
    }

    fn command(&self) -> Command {
        let path = |name: &str| self.dir.join(name).display().to_string();
        let mut qemu = Command::new("qemu-system-x86_64");
        self.add_firmware(&mut qemu);
        if kvm_nests() {
            qemu.args(["-accel", "kvm", "-cpu", "host"]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi", "-cpu", "EPYC-Milan,+svm,+npt"]);
        }
        qemu.args(["-smp", "1", "-nodefaults", "-display", "none", "-name", &self.name])
            .args(["-m", &self.memory_mib.to_string()])
            .args(["-device", "virtio-rng-pci"])
            .args([
                "-chardev",
                &format!(
                    "socket,id=console,path={},server=on,wait=off,logfile={},logappend=on",
                    self.socket("console").display(),
                    path("console.log")
                ),
            ])
            .args(["-serial", "chardev:console"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", self.socket("qmp").display())])
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
                &format!("pcie-root-port,id=slot-{disk},chassis={number},slot={number}"),
                "-device",
                &format!(
                    "virtio-blk-pci,id=disk-{disk},bus=slot-{disk},drive={disk},serial={}-{disk},bootindex={}",
                    self.name,
                    number + if number == 0 { 1 } else { 10 }
                ),
            ]);
        }
        self.add_medium(&mut qemu);
        qemu.args([
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
        while self.pid().is_none() || UnixStream::connect(self.settings.socket("qmp")).is_err() {
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

    /// Pulls a data disk, `data1` or `data2`, out of its slot. It takes some seconds, and lasts until the power is cut.
    ///
    /// # Errors
    /// When the server does not take it.
    pub fn pull_disk(&self, disk: &str) -> Result<()> {
        self.qmp(&format!("{{\"execute\":\"device_del\",\"arguments\":{{\"id\":\"disk-{disk}\"}}}}"))
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

    /// Removes its disks and sockets; it is off.
    pub(super) fn remove_disks(&self) -> Result<()> {
        for socket in ["qmp", "console"] {
            // A killed QEMU leaves them, one that ended by itself does not.
            let _ = fs::remove_file(self.settings.socket(socket));
        }
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
        let mut stream = UnixStream::connect(self.settings.socket("qmp"))
            .with_context(|| format!("{} is off", self.name()))?;
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
