//! `firmware-guest RUN_DIR CODE VARIABLES DISK`: starts guests with UEFI firmware as a node does, and looks at what they print. Runs in a
//! machine with KVM; says `PASS` at the end.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use hci_node::paths::NodePaths;
use hci_node::state::{RunEpoch, VmId};
use hci_node::vmm_role::record::{self, RunFile};

/// How long a guest may take on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(100);
/// No write of these guests is held back.
const HOLD_NOTHING: &str = "1000000000";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run, code, template, disk] = &arguments[..] else {
        bail!("firmware-guest RUN_DIR CODE VARIABLES DISK")
    };
    let paths = NodePaths::new(run, run);
    let machine = Machine { paths, code: code.into(), template: template.into() };

    let empty = Path::new(run).join("empty.img");
    fs::File::create(&empty)?.set_len(1 << 20)?;
    let vm = VmId::random();
    let said = machine.boot(vm, &empty, Until::Says("UEFI Interactive Shell"))?;
    ensure!(said.contains("failed to load"), "nothing is said of the disk without a boot loader: {said}");
    println!("a disk without a boot loader: the console says so, and the shell starts");

    let vm = VmId::random();
    let disk = Path::new(disk);
    let said = machine.boot(vm, disk, Until::Ends)?;
    for wanted in ["Welcome to GRUB!", "stored", "tables: found", "interrupts: by the tables"] {
        ensure!(said.contains(wanted), "the guest did not say {wanted:?}: {said}");
    }
    ensure!(said.contains(&format!("machine: {vm}")), "the guest does not know its machine: {said}");
    let clock: u64 = line(&said, "clock: ")?.parse()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    ensure!(clock.abs_diff(now) < 600, "the guest's clock shows {clock}, the host's {now}");
    println!("a disk with Debian's GRUB and kernel boots");

    let said = machine.boot(vm, disk, Until::Ends)?;
    ensure!(line(&said, "kept: ")? == "hello", "the variable is gone: {said}");
    println!("variables are kept");

    let variables = machine.paths.vm(vm).variables();
    let len = fs::metadata(&variables)?.len() as usize;
    fs::write(&variables, vec![0; len])?;
    let said = machine.boot(vm, disk, Until::Ends)?;
    ensure!(said.contains("stored"), "the guest does not start with damaged variables: {said}");
    println!("damaged variables are set back");
    println!("PASS");
    Ok(())
}

fn line<'a>(said: &'a str, start: &str) -> Result<&'a str> {
    let found = said.lines().find_map(|line| line.trim().strip_prefix(start));
    found.with_context(|| format!("no line {start:?}: {said}"))
}

/// When a guest has said enough.
#[derive(Clone, Copy)]
enum Until {
    Says(&'static str),
    Ends,
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

impl Machine {
    /// Boots a VM from a disk and returns what its console showed.
    fn boot(&self, vm: VmId, disk: &Path, until: Until) -> Result<String> {
        let files = self.paths.vm(vm);
        fs::create_dir_all(files.dir())?;
        let socket = files.dir().join("disk.sock");
        let _backend = serve_disk(&socket, disk, files.dir())?;
        let config = serde_json::json!({
            "name": "probe", "id": vm.to_string(), "vcpus": 1, "memory_bytes": 512 << 20,
            "boot": { "firmware": { "code": self.code, "template": self.template, "variables": files.variables() } },
            "disks": [{ "id": "disk0", "socket": socket }],
            "console_socket": files.console(),
        });
        let run = RunFile {
            vm,
            epoch: RunEpoch(1),
            config: serde_json::from_value(config)?,
            begin: Default::default(),
        };
        record::write_run_file(&files, &run)?;
        for stale in [files.console(), files.socket(), files.exit()] {
            let _ = fs::remove_file(stale);
        }
        let mut vmm = Running(
            beside("hci")?
                .args(["vmm", "run", "--config"])
                .arg(files.config())
                .spawn()
                .context("the VMM does not start")?,
        );
        let began = Instant::now();
        let mut console = loop {
            match UnixStream::connect(files.console()) {
                Ok(console) => break console,
                Err(_) => ensure!(began.elapsed() < PATIENCE, "the console is not served"),
            }
            std::thread::sleep(LOOK);
        };
        console.set_read_timeout(Some(LOOK))?;
        let mut said = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match console.read(&mut buffer) {
                Ok(0) => {
                    ensure!(
                        matches!(until, Until::Ends),
                        "the guest ended: {}",
                        String::from_utf8_lossy(&said)
                    );
                    break;
                }
                Ok(len) => said.extend(&buffer[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            let text = String::from_utf8_lossy(&said);
            if let Until::Says(wanted) = until
                && text.contains(wanted)
            {
                return Ok(text.into_owned());
            }
            ensure!(began.elapsed() < PATIENCE, "the guest takes too long: {text}");
        }
        let status = vmm.0.wait()?;
        let text = String::from_utf8_lossy(&said).into_owned();
        ensure!(status.success(), "the VMM ended with {status}: {text}");
        Ok(text)
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
