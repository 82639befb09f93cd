//! `firmware-guest RUN_DIR CODE VARIABLES DISKS STAGE`: starts guests with UEFI firmware as a node does, from one of the disks in a folder, and looks at what
//! they print and show. Runs in a machine with KVM; says `PASS` at the end.

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use hci_node::paths::{NodePaths, VmPaths};
use hci_node::state::{RunEpoch, VmId};
use hci_node::vmm_role::record::{self, RunFile};
use hci_tests::rfbclient::{Picture, RETURN, Viewer};

/// How long a guest may take on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(100);
/// Between two keys: firmware looks for them now and then.
const TYPING: Duration = Duration::from_millis(60);
/// No write of these guests is held back.
const HOLD_NOTHING: &str = "1000000000";
/// Memory of a guest, in bytes, and of Debian's installer, which with less asks another question first.
const MEMORY: u64 = 512 << 20;
const INSTALLER_MEMORY: u64 = 1 << 30;
/// Memtest86+'s background.
const MEMTEST_BLUE: u32 = 0x00_00aa;
/// The A key, by its code of set 1 and by Linux's, which is the same.
const KEY_A: u32 = 0x1e;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run, code, template, disks, stage] = &arguments[..] else {
        bail!("firmware-guest RUN_DIR CODE VARIABLES DISKS STAGE")
    };
    let machine = Machine { paths: NodePaths::new(run, run), code: code.into(), template: template.into() };
    let disks = Path::new(disks);
    let disk = disks.join(format!("{stage}.img"));
    match stage.as_str() {
        "shell" => shell(&machine, run)?,
        "debian" => debian(&machine, &disk)?,
        "memtest" => memtest(&machine, &disk)?,
        "ipxe" => ipxe(&machine, &disk)?,
        "installer" => installer(&machine, &disk)?,
        other => bail!("{other}: shell, debian, memtest, ipxe or installer"),
    }
    println!("PASS");
    Ok(())
}

/// A disk without a boot loader: the firmware's shell, on the screen too, in which one types.
fn shell(machine: &Machine, run: &str) -> Result<()> {
    let empty = Path::new(run).join("empty.img");
    fs::File::create(&empty)?.set_len(1 << 20)?;
    let mut guest = machine.start(VmId::random(), &empty, Display::Present)?;
    guest.wait_for("UEFI Interactive Shell")?;
    ensure!(guest.text().contains("failed to load"), "nothing is said of the disk: {}", guest.text());
    println!("a disk without a boot loader: the console says so, and the shell starts");

    guest.wait_for("Shell>")?;
    let mut viewer = guest.view()?;
    let picture = viewer.look()?;
    ensure!(picture.width >= 640 && picture.height >= 480, "a screen of {}", size(picture));
    let lit = picture.pixels.iter().filter(|pixel| **pixel != 0).count();
    ensure!(lit > 1000, "{lit} pixels of {} are not black", size(picture));
    println!("the shell's screen has {} pixels, of which {lit} are not black", size(picture));
    let before = picture.clone();
    for key in "echo HCI-KEY_1".chars().map(u32::from).chain([RETURN]) {
        viewer.press(key)?;
        std::thread::sleep(TYPING);
    }
    // Between the letters of what is typed the console moves its cursor; what the shell answers is in one piece.
    guest.wait_for("HCI-KEY_1")?;
    ensure!(*viewer.look()? != before, "the screen does not show what was typed");
    println!("what is typed at the display reaches the shell");
    Ok(())
}

/// A disk as Debian's installer leaves it, and the firmware's variables.
fn debian(machine: &Machine, disk: &Path) -> Result<()> {
    let vm = VmId::random();
    let mut guest = machine.start(vm, disk, Display::Present)?;
    guest.wait_for("input: ready")?;
    let mut viewer = guest.view()?;
    let picture = viewer.look()?;
    println!("Linux's screen has {} pixels", size(picture));
    // Programs in the guest see only what happens while they look.
    let mut place = 0;
    guest.wait_until("a key and a position", |said| {
        let _ = viewer.press_code(KEY_A);
        place = (place + 7) % 100;
        let _ = viewer.point(place, place, 0);
        said.contains("key: ") && said.contains("tablet: ")
    })?;
    let said = guest.finish()?;
    for wanted in
        ["Welcome to GRUB!", "stored", "tables: found", "interrupts: by the tables", "frame buffer: "]
    {
        ensure!(said.contains(wanted), "the guest did not say {wanted:?}: {said}");
    }
    ensure!(said.contains(&format!("machine: {vm}")), "the guest does not know its machine: {said}");
    let clock: u64 = line(&said, "clock: ")?.parse()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    ensure!(clock.abs_diff(now) < 600, "the guest's clock shows {clock}, the host's {now}");
    println!("a disk with Debian's GRUB and kernel boots");
    // Type, code and value as the kernel has them: EV_KEY, and EV_ABS.
    ensure!(line(&said, "key: ")?.starts_with("0001 001e 000"), "another key: {said}");
    ensure!(line(&said, "tablet: ")?.starts_with("0003 0000 "), "another event: {said}");
    println!("Linux sees keyboard and tablet: {}; {}", line(&said, "key: ")?, line(&said, "tablet: ")?);

    let said = machine.start(vm, disk, Display::Absent)?.finish()?;
    ensure!(line(&said, "kept: ")? == "hello", "the variable is gone: {said}");
    println!("variables are kept");

    let variables = machine.paths.vm(vm).variables();
    let len = fs::metadata(&variables)?.len() as usize;
    fs::write(&variables, vec![0; len])?;
    let said = machine.start(vm, disk, Display::Absent)?.finish()?;
    ensure!(said.contains("stored"), "the guest does not start with damaged variables: {said}");
    println!("damaged variables are set back");
    Ok(())
}

/// Memtest86+ shows itself on the screen only.
fn memtest(machine: &Machine, disk: &Path) -> Result<()> {
    let mut guest = machine.start(VmId::random(), disk, Display::Present)?;
    let mut viewer = guest.view()?;
    let mut last = None;
    guest
        .wait_until("Memtest86+ on the screen", |_| {
            let Ok(picture) = viewer.look() else { return false };
            let colours = picture.colours();
            let blue = colours.get(&MEMTEST_BLUE).copied().unwrap_or(0);
            last = Some(format!("{} pixels, {blue} of them blue, {} colours", size(picture), colours.len()));
            blue > picture.pixels.len() / 2 && colours.len() > 2
        })
        .with_context(|| format!("the screen: {last:?}"))?;
    println!("memtest86+ runs: {}", last.unwrap_or_default());
    Ok(())
}

fn ipxe(machine: &Machine, disk: &Path) -> Result<()> {
    let mut guest = machine.start(VmId::random(), disk, Display::Present)?;
    guest.wait_for("Open Source Network Boot Firmware")?;
    println!("iPXE starts");
    Ok(())
}

/// Debian's installer, up to its first question.
fn installer(machine: &Machine, disk: &Path) -> Result<()> {
    let mut guest = machine.start_with(INSTALLER_MEMORY, VmId::random(), disk, Display::Present)?;
    guest.wait_for("Select a language")?;
    println!("Debian's installer asks its first question");
    Ok(())
}

fn size(picture: &Picture) -> String {
    format!("{}x{}", picture.width, picture.height)
}

fn line<'a>(said: &'a str, start: &str) -> Result<&'a str> {
    let found = said.lines().find_map(|line| line.trim().strip_prefix(start));
    found.with_context(|| format!("no line {start:?}: {said}"))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Display {
    Present,
    Absent,
}

struct Machine {
    paths: NodePaths,
    code: PathBuf,
    template: PathBuf,
}

/// A process that is killed when it is not needed any more.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A VM that runs.
struct Guest {
    // In this order they end.
    vmm: Running,
    _disk: Running,
    files: VmPaths,
    console: UnixStream,
    said: Vec<u8>,
    began: Instant,
}

impl Machine {
    /// Boots a VM from a disk.
    fn start(&self, vm: VmId, disk: &Path, display: Display) -> Result<Guest> {
        self.start_with(MEMORY, vm, disk, display)
    }

    /// Boots one with so much memory.
    fn start_with(&self, memory: u64, vm: VmId, disk: &Path, display: Display) -> Result<Guest> {
        let files = self.paths.vm(vm);
        fs::create_dir_all(files.dir())?;
        let socket = files.dir().join("disk.sock");
        let backend = serve_disk(&socket, disk, files.dir())?;
        let display = (display == Display::Present).then(|| files.display());
        let config = serde_json::json!({
            "name": "probe", "id": vm.to_string(), "vcpus": 1, "memory_bytes": memory,
            "boot": { "firmware": { "code": self.code, "template": self.template, "variables": files.variables() } },
            "disks": [{ "id": "disk0", "socket": socket }],
            "console_socket": files.console(), "display_socket": display,
            // What every VM of a node has.
            "max_vcpus": 4, "max_memory_bytes": 4 * memory, "balloon": {},
            "vsock": { "cid": 3, "socket": files.vsock() }, "agent_socket": files.agent(),
        });
        let run = RunFile {
            vm,
            epoch: RunEpoch(1),
            config: serde_json::from_value(config)?,
            begin: Default::default(),
        };
        record::write_run_file(&files.config(), &run)?;
        for stale in files.made_sockets().into_iter().chain([files.exit()]) {
            let _ = fs::remove_file(stale);
        }
        let vmm = Running(
            beside("hci")?
                .args(["vmm", "run", "--config"])
                .arg(files.config())
                .spawn()
                .context("the VMM does not start")?,
        );
        let began = Instant::now();
        let console = loop {
            match UnixStream::connect(files.console()) {
                Ok(console) => break console,
                Err(_) => ensure!(began.elapsed() < PATIENCE, "the console is not served"),
            }
            std::thread::sleep(LOOK);
        };
        console.set_read_timeout(Some(LOOK))?;
        Ok(Guest { vmm, _disk: backend, files, console, said: Vec::new(), began })
    }
}

/// Whether a console goes on.
#[derive(PartialEq, Eq)]
enum Console {
    Open,
    Ended,
}

impl Guest {
    /// What its console has shown.
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.said).into_owned()
    }

    /// Looks at its console for a moment.
    fn listen(&mut self) -> Result<Console> {
        let mut buffer = [0; 4096];
        match self.console.read(&mut buffer) {
            Ok(0) => return Ok(Console::Ended),
            Ok(len) => self.said.extend(&buffer[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        ensure!(self.began.elapsed() < PATIENCE, "the guest takes too long: {}", self.text());
        Ok(Console::Open)
    }

    fn wait_for(&mut self, text: &str) -> Result<()> {
        self.wait_until(text, |said| said.contains(text))
    }

    /// Waits until what its console has shown is enough.
    fn wait_until(&mut self, what: &str, mut enough: impl FnMut(&str) -> bool) -> Result<()> {
        while !enough(&self.text()) {
            let console = self.listen().with_context(|| format!("waiting for {what}"))?;
            ensure!(console == Console::Open, "the guest ended before {what}: {}", self.text());
        }
        Ok(())
    }

    /// Waits until it has ended by itself, and returns what its console has shown.
    fn finish(mut self) -> Result<String> {
        while self.listen()? == Console::Open {}
        let status = self.vmm.0.wait()?;
        ensure!(status.success(), "the VMM ended with {status}: {}", self.text());
        Ok(self.text())
    }

    /// Attaches a viewer to its display.
    fn view(&self) -> Result<Viewer> {
        Viewer::attach(&self.files.display())
    }
}

fn serve_disk(socket: &Path, disk: &Path, folder: &Path) -> Result<Running> {
    let _ = fs::remove_file(socket);
    let backend = beside("blk-target")?
        .arg(socket)
        .arg(folder.join("disk.inflight"))
        .arg(disk)
        .arg(folder.join("disk.journal"))
        .args(["1", HOLD_NOTHING])
        .spawn()
        .context("the disk is not served")?;
    Ok(Running(backend))
}

/// A program in the folder of this one.
fn beside(name: &str) -> Result<Command> {
    let own = std::env::current_exe()?;
    Ok(Command::new(own.with_file_name(name)))
}
