//! `hotplug-guest RUN_DIR KERNEL INITRAMFS`: starts a Linux guest in a confined thread, has disks, a NIC and vCPUs come and disks and the NIC go, and asks
//! the guest each time what it sees; in between the guest is written down and goes on in another VM. Runs in a machine with KVM; says `PASS` at the end.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vmm::{
    BalloonConfig, Boot, DeviceConfig, DiskConfig, ExitReason, MacAddr, NicConfig, Vm, VmConfig, VmHandle,
    VsockConfig,
};

/// How long a guest may take on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(240);
const LOOK: Duration = Duration::from_millis(20);
/// No write of this guest is held back.
const HOLD_NOTHING: &str = "1000000000";
const SIZE: u64 = 8 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run, kernel, initramfs] = &arguments[..] else { bail!("hotplug-guest RUN_DIR KERNEL INITRAMFS") };
    let run = Path::new(run);
    let config = VmConfig {
        name: "plugged".into(),
        id: uuid::Uuid::from_u128(1),
        vcpus: 1,
        max_vcpus: Some(3),
        cpu_model: Default::default(),
        memory_bytes: 256 << 20,
        // What every VM of a node has.
        max_memory_bytes: Some(1 << 30),
        plugged_bytes: 0,
        balloon: Some(BalloonConfig::default()),
        vsock: Some(VsockConfig { cid: 3, socket: run.join("vsock") }),
        display_socket: None,
        boot: Boot::Kernel {
            kernel: kernel.into(),
            initramfs: Some(initramfs.into()),
            cmdline: "console=ttyS0 quiet panic=-1".into(),
        },
        disks: vec![],
        nics: vec![],
        seed: None,
        agent_socket: None,
        console_socket: run.join("console"),
        backend_timeout_ms: 10_000,
    };
    let mut guest = Guest::start(config.clone())?;
    guest.wait_for("READY")?;
    println!("the guest is there");

    let mut disk = DiskFile::new(run, "data")?;
    let plugged = Instant::now();
    let slot = guest.plug(DeviceConfig::Disk(disk.config(None)))?;
    guest.eventually("[ -b /dev/vda ]")?;
    println!("a disk was found after {:.1} s, in slot {slot}", plugged.elapsed().as_secs_f64());
    guest.answers("echo hello >/dev/vda && sync")?;
    ensure!(fs::read(&disk.file)?.starts_with(b"hello\n"), "what was written is not on the disk");

    let grown = Instant::now();
    disk.grow_to(2 * SIZE)?;
    guest.eventually(&format!("[ $(cat /sys/block/vda/size) = {} ]", 2 * SIZE / 512))?;
    println!("the disk was found to be larger after {:.1} s", grown.elapsed().as_secs_f64());

    guest.unplug("data")?;
    guest.answers("[ ! -e /dev/vda ] && [ ! -e /sys/bus/pci/devices/0000:00:02.0 ]")?;
    println!("the disk is gone");
    let slot = guest.plug(DeviceConfig::Disk(disk.config(Some(9))))?;
    ensure!(slot == 9, "it is in slot {slot}");
    guest.eventually("[ -b /dev/vda ]")?;
    guest.answers("[ $(busybox head -c 5 /dev/vda) = hello ]")?;
    println!("the disk is back, with what was on it");

    let nic = serve_nic(run)?;
    guest.plug(DeviceConfig::Nic(nic.clone()))?;
    guest.eventually(&format!("[ \"$(cat /sys/class/net/eth0/address)\" = {} ]", nic.mac))?;
    guest.answers("ip link set eth0 up && [ $(cat /sys/class/net/eth0/mtu) = 1400 ]")?;
    guest.unplug(&nic.id)?;
    guest.answers("[ ! -e /sys/class/net/eth0 ]")?;
    println!("a NIC came and went");

    guest.answers("[ $(nproc) = 1 ] && [ ! -e /sys/devices/system/cpu/cpu1 ]")?;
    guest.set_vcpus(3)?;
    for cpu in [1, 2] {
        let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        guest.eventually(&format!("[ -e {online} ]"))?;
        guest.answers(&format!("echo 1 >{online} && [ $(cat {online}) = 1 ]"))?;
    }
    guest.answers("[ $(nproc) = 3 ]")?;
    println!("two vCPUs were added");

    let config = VmConfig { vcpus: 3, disks: vec![disk.config(Some(9))], ..config };
    let mut guest = guest.save_and_restore(config)?;
    guest.answers("[ $(nproc) = 3 ] && [ $(busybox head -c 5 /dev/vda) = hello ]")?;
    guest.unplug("data")?;
    guest.answers("[ ! -e /dev/vda ]")?;
    guest.plug(DeviceConfig::Disk(disk.config(None)))?;
    guest.eventually("[ -b /dev/vda ]")?;
    println!("saved and restored, it goes on the same");

    guest.say("poweroff -f")?;
    let ended = guest.ended.recv_timeout(PATIENCE)??;
    ensure!(ended == ExitReason::Shutdown, "the guest {ended}");
    println!("PASS");
    Ok(())
}

/// A guest in a thread of its own, confined as the main thread of a VMM's process is.
struct Guest {
    handle: VmHandle,
    /// What was saved goes on there.
    next: Sender<(VmConfig, Vec<u8>)>,
    made: Receiver<Result<VmHandle>>,
    ended: Receiver<Result<ExitReason>>,
    console: UnixStream,
    said: Vec<u8>,
}

impl Guest {
    fn start(config: VmConfig) -> Result<Self> {
        let (next, nexts) = channel::<(VmConfig, Vec<u8>)>();
        let (making, made) = channel();
        let (ending, ended) = channel();
        let path = config.console_socket.clone();
        std::thread::spawn(move || {
            let confined = vmm::isolation::confine_process().context("the thread is not confined");
            let mut vm = confined.and_then(|()| Ok(Vm::start(config)?));
            loop {
                let ended = match vm {
                    Ok(vm) => {
                        let _ = making.send(Ok(vm.handle()));
                        Ok(vm.wait())
                    }
                    Err(error) => {
                        let _ = making.send(Err(error));
                        return;
                    }
                };
                let _ = ending.send(ended);
                let Ok((config, state)) = nexts.recv() else { return };
                vm = Vm::restore(config, &mut &state[..]).map_err(Into::into);
            }
        });
        let handle = made.recv_timeout(PATIENCE)??;
        let console = console(&path)?;
        Ok(Self { handle, next, made, ended, console, said: Vec::new() })
    }

    /// Has the guest's main thread do something.
    fn ask<T: Send + 'static>(&self, job: impl FnOnce(&VmHandle) -> T + Send + 'static) -> Result<T> {
        let (done, told) = channel();
        self.handle.ask(move |handle| drop(done.send(job(handle))));
        told.recv_timeout(PATIENCE).context("the guest's main thread does not answer")
    }

    fn plug(&self, device: DeviceConfig) -> Result<u8> {
        Ok(self.ask(|handle| handle.plug(device))??)
    }

    fn set_vcpus(&self, vcpus: u8) -> Result<()> {
        Ok(self.ask(move |handle| handle.set_vcpus(vcpus))??)
    }

    /// Waits until the guest has let go of it.
    fn unplug(&self, id: &str) -> Result<()> {
        self.handle.unplug(id)?;
        let began = Instant::now();
        while self.handle.status().devices.iter().any(|device| device.id == id) {
            ensure!(began.elapsed() < PATIENCE, "the guest does not let go of {id}");
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn say(&mut self, line: &str) -> Result<()> {
        self.said.clear();
        Ok(writeln!(self.console, "{line}")?)
    }

    /// Has the guest's shell do something, which succeeds.
    fn answers(&mut self, line: &str) -> Result<()> {
        self.say(line)?;
        let said = self.wait_for("ANSWERED ")?;
        ensure!(said.contains("ANSWERED 0"), "{line}: {said}");
        Ok(())
    }

    fn eventually(&mut self, condition: &str) -> Result<()> {
        self.answers(&format!("eventually '{condition}'"))
    }

    /// Returns what it has said, up to a line with this.
    fn wait_for(&mut self, wanted: &str) -> Result<String> {
        let began = Instant::now();
        let mut buffer = [0; 4096];
        loop {
            let said = String::from_utf8_lossy(&self.said).into_owned();
            if said.split_inclusive('\n').any(|line| line.contains(wanted) && line.ends_with('\n')) {
                return Ok(said);
            }
            ensure!(began.elapsed() < PATIENCE, "the guest takes too long: {said}");
            match self.console.read(&mut buffer) {
                Ok(0) => bail!("the guest has ended: {said}"),
                Ok(len) => self.said.extend(&buffer[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn save_and_restore(self, config: VmConfig) -> Result<Self> {
        let state = self.ask(|handle| -> Result<Vec<u8>> {
            let mut state = Vec::new();
            handle.pause()?;
            handle.save(&mut state)?;
            handle.kill();
            Ok(state)
        })??;
        let ended = self.ended.recv_timeout(PATIENCE)??;
        ensure!(ended == ExitReason::Killed, "the guest {ended}");
        let path = config.console_socket.clone();
        self.next.send((config, state)).ok().context("the guest's thread has ended")?;
        let handle = self.made.recv_timeout(PATIENCE)??;
        let console = console(&path)?;
        let guest = Self { handle, console, said: Vec::new(), ..self };
        guest.ask(VmHandle::resume)??;
        Ok(guest)
    }
}

fn console(path: &Path) -> Result<UnixStream> {
    let console = UnixStream::connect(path).context("the console is not served")?;
    console.set_read_timeout(Some(LOOK))?;
    Ok(console)
}

/// A disk, and the process that serves it.
struct DiskFile {
    id: String,
    file: PathBuf,
    socket: PathBuf,
    target: Child,
}

impl DiskFile {
    fn new(run: &Path, id: &str) -> Result<Self> {
        let (file, socket) = (run.join(format!("{id}.img")), run.join(format!("{id}.sock")));
        fs::File::create(&file)?.set_len(SIZE)?;
        let target = serve_disk(&socket, &file)?;
        Ok(Self { id: id.into(), file, socket, target })
    }

    fn config(&self, slot: Option<u8>) -> DiskConfig {
        let (id, socket) = (self.id.clone(), self.socket.clone());
        DiskConfig { id, socket, queues: 1, readonly: false, slot }
    }

    /// As a volume does it that grows: whoever serves it ends the connection, and tells the new size at the next one.
    fn grow_to(&mut self, size: u64) -> Result<()> {
        self.target.kill()?;
        self.target.wait()?;
        fs::OpenOptions::new().write(true).open(&self.file)?.set_len(size)?;
        self.target = serve_disk(&self.socket, &self.file)?;
        Ok(())
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.target.kill();
        let _ = self.target.wait();
    }
}

fn serve_disk(socket: &Path, file: &Path) -> Result<Child> {
    let _ = fs::remove_file(socket);
    let own = std::env::current_exe()?;
    Command::new(own.with_file_name("blk-target"))
        .arg(socket)
        .arg(file.with_extension("inflight"))
        .arg(file)
        .arg(file.with_extension("journal"))
        .args(["1", HOLD_NOTHING])
        .spawn()
        .context("the disk is not served")
}

/// A NIC whose cable leads nowhere: its backend negotiates, takes the queues and leaves them alone.
fn serve_nic(run: &Path) -> Result<NicConfig> {
    const GET_FEATURES: u32 = 1;
    const GET_VRING_BASE: u32 = 11;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    /// Modern virtio; there are protocol features, none of them.
    const OFFERED: u64 = 1 << 32 | 1 << 30;
    /// Version 1, an answer.
    const FLAGS: u32 = 0b101;
    let socket = run.join("nic.sock");
    let listener = UnixListener::bind(&socket)?;
    std::thread::spawn(move || -> Result<()> {
        for connection in listener.incoming() {
            let mut connection = connection?;
            let mut header = [0; 12];
            while connection.read_exact(&mut header).is_ok() {
                let word = |at: usize| {
                    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
                };
                connection.read_exact(&mut vec![0; word(8) as usize])?;
                let answer = match word(0) {
                    GET_FEATURES => OFFERED,
                    GET_PROTOCOL_FEATURES | GET_VRING_BASE => 0,
                    _ => continue,
                };
                let head = [word(0), FLAGS, 8].into_iter().flat_map(u32::to_le_bytes);
                connection.write_all(&head.chain(answer.to_le_bytes()).collect::<Vec<_>>())?;
            }
        }
        Ok(())
    });
    let mac = MacAddr([2, 0, 0, 0, 0, 1]);
    Ok(NicConfig { id: "lan".into(), socket, mac, mtu: Some(1400), slot: None })
}
