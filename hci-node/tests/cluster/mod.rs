//! Three nodes of real processes on loopback addresses of their own, and a VM with a real guest under KVM that prints letters.

// Each test uses some of it.
#![allow(dead_code, unreachable_pub)]

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// Whether there is KVM; says so if not.
pub fn has_kvm() -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            eprintln!("SKIPPED: /dev/kvm: {error}");
            false
        }
    }
}

#[path = "../../../vmm/tests/guest/mod.rs"]
pub mod guest;
pub mod guests;
#[path = "../../../vmm/tests/guest/letters.rs"]
pub mod letters;
#[path = "../../../vmm/tests/guest/writer.rs"]
pub mod writer;

/// Long enough for a loaded machine; every wait ends as soon as it may.
const PATIENCE: Duration = Duration::from_secs(90);

/// The processes of three nodes, killed when dropped.
pub struct Cluster {
    pub dir: tempfile::TempDir,
    net: [u8; 2],
    executable: PathBuf,
    pub nodes: Vec<[Child; 2]>,
}

impl Cluster {
    pub fn start() -> Self {
        Self::start_from(env!("CARGO_BIN_EXE_hci").into())
    }

    /// With nodes that run this executable.
    pub fn start_from(executable: PathBuf) -> Self {
        let [a, b, ..] = *uuid::Uuid::new_v4().as_bytes();
        let (dir, net) = (tempfile::tempdir().unwrap(), [a.clamp(1, 250), b]);
        let mut cluster = Self { dir, net, executable, nodes: vec![] };
        for n in 1..=3 {
            fs::create_dir_all(cluster.path(n, "state")).unwrap();
            fs::create_dir_all(cluster.path(n, "disk")).unwrap();
            let node = [cluster.spawn(n, "data"), cluster.spawn(n, "node")];
            cluster.nodes.push(node);
        }
        for n in 1..=3 {
            cluster.answers(n);
        }
        cluster.ok(1, &["cluster", "create", "prod"]);
        let token = cluster.ok(1, &["cluster", "token", "create", "--uses", "2", "-o", "json"]);
        let token: serde_json::Value = serde_json::from_str(&token).unwrap();
        for n in 2..=3 {
            cluster.ok(n, &["cluster", "join", token["token"].as_str().unwrap()]);
        }
        for n in 1..=3 {
            let disk = cluster.path(n, "disk");
            cluster.ok(1, &["disk", "add", &format!("n{n}"), disk.to_str().unwrap()]);
        }
        cluster
    }

    pub fn path(&self, n: usize, name: &str) -> PathBuf {
        self.dir.path().join(format!("n{n}")).join(name)
    }

    pub fn spawn(&self, n: usize, role: &str) -> Child {
        let log =
            File::options().create(true).append(true).open(self.path(n, role).with_extension("log")).unwrap();
        let address = Ipv4Addr::new(127, self.net[0], self.net[1], n as u8);
        let mut command = Command::new(&self.executable);
        command.args([role, "run"]).arg("--state").arg(self.path(n, "state"));
        command.arg("--run").arg(self.path(n, "run")).args(["--link-mtu", "1500"]);
        let mut listen = vec![("--listen-storage", 7401), ("--listen-frames", 7402)];
        if role == "node" {
            command.args(["--node-name", &format!("n{n}"), "--advertise", &address.to_string()]);
            listen.extend([("--listen-control", 7400), ("--listen-api", 7443)]);
        }
        for (flag, port) in listen {
            command.arg(flag).arg(format!("{address}:{port}"));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }

    pub fn answers(&self, n: usize) {
        eventually("the node answers", || UnixStream::connect(self.path(n, "run/node.sock")).ok());
    }

    pub fn restart_control(&mut self, n: usize) {
        let [_, control] = &mut self.nodes[n - 1];
        control.kill().unwrap();
        control.wait().unwrap();
        self.nodes[n - 1][1] = self.spawn(n, "node");
        self.answers(n);
    }

    /// Everything of a node ends at once.
    pub fn lose(&mut self, n: usize) {
        for process in &mut self.nodes[n - 1] {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    pub fn run(&self, n: usize, args: &[&str]) -> Output {
        let endpoint = format!("unix://{}", self.path(n, "run/node.sock").display());
        Command::new(env!("CARGO_BIN_EXE_hci")).args(args).env("HCI_ENDPOINT", endpoint).output().unwrap()
    }

    /// What a command prints that must succeed.
    pub fn ok(&self, n: usize, args: &[&str]) -> String {
        let output = self.run(n, args);
        let talk = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "hci {args:?}: {talk}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says that must fail.
    pub fn fails(&self, n: usize, args: &[&str]) -> String {
        let output = self.run(n, args);
        assert!(!output.status.success(), "hci {args:?} succeeded");
        String::from_utf8(output.stderr).unwrap()
    }

    /// State and node of the VM.
    pub fn vm(&self, n: usize) -> (String, Option<String>) {
        let shown = self.ok(n, &["vm", "get", "web1", "-o", "json"]);
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        (shown["state"].as_str().unwrap().to_owned(), shown["node"].as_str().map(str::to_owned))
    }

    /// Checks what its guest has printed in its present run, which begins with this letter and goes on with the ones after it. Returns the one that comes
    /// next.
    pub fn letters(&self, n: usize, first: u8) -> u8 {
        let said = eventually("the guest prints", || {
            let said = self.run(n, &["vm", "console", "web1", "--log"]).stdout;
            (said.len() > 3).then_some(said)
        });
        let mut expected = first;
        for letter in said {
            assert_eq!(letter as char, expected as char);
            expected = letters::following(Some(letter));
        }
        expected
    }

    /// Creates the VM on n1, with a guest that pauses so long between two letters.
    pub fn create_vm(&self, pause: u32) {
        self.create_vm_with(&letters::code(pause), "64MiB");
    }

    /// Creates the VM on n1, with a guest of this code.
    pub fn create_vm_with(&self, code: &[u8], memory: &str) {
        let kernel = self.dir.path().join("kernel");
        fs::write(&kernel, guest::pvh_elf(code)).unwrap();
        self.ok(1, &["image", "import", "tiny", "--kernel", kernel.to_str().unwrap()]);
        self.ok(1, &["network", "create", "lan", "--subnet", "10.9.0.0/24"]);
        let create = [
            "--memory",
            memory,
            "--disk",
            "64MiB",
            "--network",
            "lan",
            "--cpu-model",
            "host",
            "--node",
            "n1",
        ];
        self.ok(1, &[&["vm", "create", "web1", "--image", "tiny"], &create[..]].concat());
        assert_eq!(self.vm(2), ("running".to_owned(), Some("n1".to_owned())));
    }

    /// What the processes said last, for whoever looks for the reason of a failure.
    fn say_logs(&self) {
        let vms = (1..=3).filter_map(|n| Some((n, fs::read_dir(self.path(n, "run/vm")).ok()?)));
        let vms = vms.flat_map(|(n, vms)| vms.flatten().map(move |vm| (n, vm.path().join("vmm.log"))));
        let nodes = (1..=3).flat_map(|n| ["node", "data"].map(|role| (n, role)));
        let nodes = nodes.map(|(n, role)| (n, self.path(n, role).with_extension("log")));
        for (n, path) in nodes.chain(vms) {
            let log = fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("-- n{n} {}", path.file_name().unwrap_or_default().display());
            lines[lines.len().saturating_sub(40)..].iter().for_each(|line| eprintln!("{line}"));
        }
    }

    /// Names of all volumes.
    pub fn volumes(&self, n: usize) -> String {
        self.ok(n, &["volume", "list", "-o", "name"])
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.say_logs();
        }
        // VMMs outlive the others; the last order ends this one.
        for n in 1..=3 {
            let _ = self.run(n, &["vm", "stop", "web1", "--force", "--timeout", "10s"]);
        }
        for process in self.nodes.iter_mut().flatten() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

pub fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited for long: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
