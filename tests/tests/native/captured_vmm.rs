//! A VMM that its guest has taken over tries to get out of its jail. `src/bin/captured-vmm.rs` plays it: it enters the jail by the code of
//! `hci vmm run` and tries one thing. Each attempt has to fail in the jail, and to succeed without it, so that it is known to be one.

use std::fs::{self, Permissions};
use std::io::Read;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hci_node::isolation::cgroup;
use hci_node::paths::{NodePaths, VmPaths};
use hci_node::state::{PortId, RunEpoch, VmId, VolumeId};
use hci_node::vmm_role::protocol::{self, Kill, Reset, Status};
use hci_node::vmm_role::record::{self, Ended, RunFile};
use hci_tests::native::process::executable;
use tempfile::TempDir;

#[path = "../../../vmm/tests/guest/mod.rs"]
mod tiny;

/// A user that every Debian has; VMMs get its group.
const USER: &str = "nobody";
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);
/// How a process ends that the filter of system calls stops.
const FILTERED: i32 = 128 + libc_sigsys();
/// `mov al, '!'; mov dx, 0x3f8; out dx, al; jmp $`
const GUEST: [u8; 9] = [0xb0, b'!', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfe];

const fn libc_sigsys() -> i32 {
    nix::sys::signal::Signal::SIGSYS as i32
}

/// What else stops an attempt when the filter of system calls does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behind {
    /// Another layer.
    Another,
    /// None: the kernel lets every process do this.
    Nothing,
}

struct Attempt {
    what: &'static str,
    name: &'static str,
    target: String,
    behind: Behind,
}

/// A node with a VM, another VM, and what an attacker would like to reach.
struct World {
    _folder: TempDir,
    paths: NodePaths,
    vm: VmId,
    config: PathBuf,
    victim: Child,
    api: TcpListener,
    _sockets: Vec<UnixListener>,
    other: VmPaths,
    other_vm: VmId,
    backend: PathBuf,
}

impl Drop for World {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.victim.kill();
        let _ = self.victim.wait();
        cgroup::remove(Path::new(cgroup::TREE), &self.vm.to_string());
    }
}

/// A socket that everybody may connect to, as far as its own permissions go.
fn open_socket(path: &Path) -> Result<UnixListener> {
    fs::create_dir_all(path.parent().context("no directory")?)?;
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o777))?;
    Ok(listener)
}

impl World {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let root = folder.path();
        fs::set_permissions(root, Permissions::from_mode(0o755))?;
        let paths = NodePaths::new(root.join("state"), root.join("run"));
        let (vm, other_vm) = (VmId::random(), VmId::random());
        let other = paths.vm(other_vm);
        let files = paths.vm(vm);
        fs::create_dir_all(files.dir())?;
        fs::create_dir_all(paths.boot_files())?;
        let kernel = paths.boot_files().join("kernel");
        fs::write(&kernel, tiny::pvh_elf(&GUEST))?;
        let backend = paths.block_socket(vm, VolumeId::random());
        let sockets = [
            paths.control_socket(),
            other.console(),
            other.socket(),
            paths.block_socket(other_vm, VolumeId(other_volume())),
            paths.port_socket(other_vm, PortId(other_volume())),
            backend.clone(),
        ];
        let mut listeners = sockets.iter().map(|path| open_socket(path)).collect::<Result<Vec<_>>>()?;
        listeners.push(UnixListener::bind_addr(&SocketAddr::from_abstract_name(vm.to_string())?)?);
        let config = serde_json::json!({
            "name": "captured", "vcpus": 1, "memory_bytes": 16 << 20, "boot": { "kernel": { "kernel": kernel } },
            "disks": [{ "id": "disk0", "socket": backend }],
            "console_socket": files.console(),
        });
        let run = RunFile {
            vm,
            epoch: RunEpoch(1),
            config: serde_json::from_value(config)?,
            begin: Default::default(),
        };
        record::write_run_file(&files.config(), &run)?;
        Ok(Self {
            config: files.config(),
            victim: Command::new("sleep").arg("600").spawn()?,
            api: TcpListener::bind("127.0.0.1:0")?,
            _sockets: listeners,
            _folder: folder,
            paths,
            vm,
            other,
            other_vm,
            backend,
        })
    }

    fn play(&self, place: &str, attempt: &str, target: &str) -> Result<(ExitStatus, String)> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_captured-vmm"));
        let output = command.arg(place).arg(&self.config).args([USER, attempt, target]).output()?;
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        Ok((output.status, said))
    }

    fn attempts(&self) -> Result<Vec<Attempt>> {
        let files = self.paths.vm(self.vm);
        let (another, nothing) = (Behind::Another, Behind::Nothing);
        let victim = self.victim.id().to_string();
        let text = |path: PathBuf| path.display().to_string();
        let outside = text(self.paths.run().join("outside"));
        let attempt =
            |what, name, target: &str, behind| Attempt { what, name, target: target.into(), behind };
        Ok(vec![
            attempt("the host's passwords", "read", "/etc/shadow", another),
            attempt("the kernel's log", "read", "/dev/kmsg", another),
            attempt("a disk", "read", &disk()?, another),
            attempt("a disk, by a node of its own", "node", "", another),
            attempt("what is said of processes", "read", "/proc/1/status", another),
            attempt("the API, over the network", "tcp", &self.api.local_addr()?.to_string(), another),
            attempt("the control process", "unix", &text(self.paths.control_socket()), another),
            attempt("another VM's console", "unix", &text(self.other.console()), another),
            attempt("another VMM's orders", "unix", &text(self.other.socket()), another),
            attempt(
                "another VM's disk",
                "unix",
                &text(self.paths.block_socket(self.other_vm, VolumeId(other_volume()))),
                another,
            ),
            attempt(
                "another VM's NIC",
                "unix",
                &text(self.paths.port_socket(self.other_vm, PortId(other_volume()))),
                another,
            ),
            attempt("a socket without a file", "abstract", &self.vm.to_string(), another),
            attempt("another process, by signal", "signal", &victim, another),
            attempt("another process, as its tracer", "trace", &victim, another),
            attempt("another process's memory", "look-into", &victim, another),
            attempt("a file outside of its directory", "create", &outside, another),
            attempt("a file in its directory", "create", &text(files.dir().join("new")), another),
            attempt("a link in its directory, for root to follow", "link", "", another),
            attempt("whom root kills in its place", "write", &text(files.pid()), another),
            attempt("how root believes that it ended", "write", &text(files.exit()), another),
            attempt("what root believes that it runs", "remove", &text(files.config()), another),
            attempt("mounts", "mount", "", another),
            attempt("root", "root", "", another),
            attempt("another program", "exec", "/bin/true", another),
            attempt("many threads", "threads", "", another),
            attempt("a user namespace", "user-namespace", "", nothing),
            attempt("a process", "fork", "", nothing),
            attempt("BPF", "bpf", "", nothing),
            attempt("io_uring", "io-uring", "", nothing),
        ])
    }
}

/// The same in all runs: somebody else's volume and port.
fn other_volume() -> uuid::Uuid {
    uuid::Uuid::from_u128(0x0dd)
}

/// Some block device of this machine.
fn disk() -> Result<String> {
    let devices =
        fs::read_dir("/sys/block")?.flatten().map(|device| Path::new("/dev").join(device.file_name()));
    let found = devices.into_iter().find(|device| fs::File::open(device).is_ok());
    Ok(found.context("this machine has no block device")?.display().to_string())
}

#[test]
fn a_captured_vmm_does_not_get_out() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "needs root");
    let world = World::new()?;
    let mut wrong = Vec::new();
    for Attempt { what, name, target, behind } in world.attempts()? {
        let mut tried = |place: &str, right: fn(&ExitStatus) -> bool| -> Result<()> {
            // What an attempt makes without a jail must not be there for the next.
            let (status, said) = world.play(place, name, &target)?;
            let _ = fs::remove_file(world.paths.vm(world.vm).dir().join("link"));
            if !right(&status) {
                wrong.push(format!("{what} ({name} {target}), {place}: {status}: {said}"));
            }
            Ok(())
        };
        tried("jailed", |status| status.code() == Some(1) || status.code() == Some(FILTERED))?;
        if behind == Behind::Another {
            tried("unfiltered", |status| status.code() == Some(1))?;
        }
        // It removes files that the others need.
        let config = fs::read(&world.config)?;
        tried("free", ExitStatus::success)?;
        fs::write(&world.config, config)?;
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn what_a_vmm_needs_is_there() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "needs root");
    let world = World::new()?;
    let backend = world.backend.display().to_string();
    for (name, target) in [("kvm", ""), ("unix", &backend), ("serve", "")] {
        let (status, said) = world.play("jailed", name, target)?;
        let lacks_kvm = name == "kvm" && !Path::new("/dev/kvm").exists();
        ensure!(status.success() || lacks_kvm, "{name} {target}: {status}: {said}");
        let _ = fs::remove_file(world.paths.vm(world.vm).console());
    }
    // A backend that is restarted makes its socket anew, and a VMM that is in its jail already finds it.
    fs::remove_file(&world.backend)?;
    let console = world.paths.vm(world.vm).console();
    let makes_it = {
        let (console, socket) = (console.clone(), world.backend.clone());
        std::thread::spawn(move || -> Result<UnixListener> {
            let began = Instant::now();
            while !console.exists() {
                ensure!(began.elapsed() < PATIENCE, "nobody is in the jail");
                std::thread::sleep(LOOK);
            }
            open_socket(&socket)
        })
    };
    let (status, said) = world.play("jailed", "return", &backend)?;
    let _listener = makes_it.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    ensure!(status.success(), "{status}: {said}");
    Ok(())
}

#[test]
fn a_vmm_gets_no_more_memory_than_its_vm_is_worth() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "needs root");
    let world = World::new()?;
    let (status, said) = world.play("free", "memory", "")?;
    ensure!(status.success(), "{status}: {said}");
    let (status, said) = world.play("jailed", "memory", "")?;
    let group = |file: &str| Path::new(cgroup::TREE).join(file.replace("VM", &world.vm.to_string())).exists();
    if !group("hci-vm/VM/memory.max") && !group("memory/hci-vm/VM/memory.limit_in_bytes") {
        eprintln!("SKIPPED: this host limits no memory");
        return Ok(());
    }
    ensure!(!status.success() && status.code() != Some(2), "{status}: {said}");
    Ok(())
}

/// Waits for the guest's word on its console.
async fn hear(files: &VmPaths) -> Result<()> {
    let began = Instant::now();
    let console = loop {
        match UnixStream::connect(files.console()) {
            Ok(console) => break console,
            Err(_) => ensure!(began.elapsed() < PATIENCE, "there is no console"),
        }
        tokio::time::sleep(LOOK).await;
    };
    console.set_read_timeout(Some(PATIENCE))?;
    let mut byte = [0];
    (&console).read_exact(&mut byte)?;
    ensure!(byte == *b"!", "the guest said {byte:?}");
    Ok(())
}

#[tokio::test]
async fn a_guest_runs_and_ends_in_the_jail() -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "needs root");
    if !Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: no /dev/kvm");
        return Ok(());
    }
    let world = World::new()?;
    let files = world.paths.vm(world.vm);
    let mut run = record::run_file(&files)?.context("no run file")?;
    run.config.disks.clear();
    record::write_run_file(&files.config(), &run)?;
    let log = fs::File::create(files.log())?;
    let mut vmm = Command::new(executable()?)
        .args(["vmm", "run", "--user", USER, "--config"])
        .arg(files.config())
        .stderr(log)
        .spawn()?;
    let began = Instant::now();
    let said = || fs::read_to_string(files.log()).unwrap_or_default();
    hear(&files).await.with_context(said)?;

    let process = record::running(&files)?.flatten().context("it does not say that it runs")?;
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid))?;
    let field =
        |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
    ensure!(field("CapBnd:") == "0000000000000000" && field("CapEff:") == "0000000000000000", "{status}");
    ensure!(field("NoNewPrivs:") == "1" && field("Seccomp:") == "2", "{status}");
    ensure!(!field("Uid:").split_whitespace().any(|user| user == "0"), "{status}");
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{namespace}"));
        ensure!(of(&process.pid.to_string())? != of("self")?, "it shares the namespace {namespace}");
    }

    // Another machine is made, by a process that is in the jail already.
    protocol::call(&files.socket(), &Reset).await.with_context(said)?;
    while protocol::call(&files.socket(), &Status).await.with_context(said)?.resets == 0 {
        ensure!(began.elapsed() < PATIENCE, "it is not reset: {}", said());
        tokio::time::sleep(LOOK).await;
    }
    hear(&files).await.with_context(said)?;
    protocol::call(&files.socket(), &Kill).await.with_context(said)?;
    let ended = loop {
        if let Some(status) = vmm.try_wait()? {
            break status;
        }
        ensure!(began.elapsed() < PATIENCE, "it does not end: {}", said());
        tokio::time::sleep(LOOK).await;
    };
    ensure!(ended.code() == Some(20), "{ended}: {}", said());
    let record = record::exit_record(&files)?.with_context(said)?;
    ensure!(record.ended == Ended::Killed, "{record:?}");
    Ok(())
}
