//! A VM is paused, suspended on one node and resumed on another, as users do it: three nodes of real processes, the command line, a real
//! guest under KVM.
//!
//! Skipped, with a message, where /dev/kvm cannot be opened.

// The lint knows test functions, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

#[path = "../../vmm/tests/guest/mod.rs"]
mod guest;
#[path = "../../vmm/tests/guest/letters.rs"]
mod letters;

/// Long enough for a loaded machine; every wait ends as soon as it may.
const PATIENCE: Duration = Duration::from_secs(90);

/// Between two letters of the guest: a few come in a second.
const PAUSE: u32 = 500_000;

/// The processes of three nodes, killed when dropped.
struct Cluster {
    dir: tempfile::TempDir,
    net: [u8; 2],
    nodes: Vec<[Child; 2]>,
}

impl Cluster {
    fn start() -> Self {
        let [a, b, ..] = *uuid::Uuid::new_v4().as_bytes();
        let (dir, net) = (tempfile::tempdir().unwrap(), [a.clamp(1, 250), b]);
        let mut cluster = Self { dir, net, nodes: vec![] };
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

    fn path(&self, n: usize, name: &str) -> PathBuf {
        self.dir.path().join(format!("n{n}")).join(name)
    }

    fn spawn(&self, n: usize, role: &str) -> Child {
        let log =
            File::options().create(true).append(true).open(self.path(n, role).with_extension("log")).unwrap();
        let address = Ipv4Addr::new(127, self.net[0], self.net[1], n as u8);
        let mut command = Command::new(env!("CARGO_BIN_EXE_hci"));
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

    fn answers(&self, n: usize) {
        eventually("the node answers", || UnixStream::connect(self.path(n, "run/node.sock")).ok());
    }

    fn restart_control(&mut self, n: usize) {
        let [_, control] = &mut self.nodes[n - 1];
        control.kill().unwrap();
        control.wait().unwrap();
        self.nodes[n - 1][1] = self.spawn(n, "node");
        self.answers(n);
    }

    /// Everything of a node ends at once.
    fn lose(&mut self, n: usize) {
        for process in &mut self.nodes[n - 1] {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    fn run(&self, n: usize, args: &[&str]) -> Output {
        let endpoint = format!("unix://{}", self.path(n, "run/node.sock").display());
        Command::new(env!("CARGO_BIN_EXE_hci")).args(args).env("HCI_ENDPOINT", endpoint).output().unwrap()
    }

    /// What a command prints that must succeed.
    fn ok(&self, n: usize, args: &[&str]) -> String {
        let output = self.run(n, args);
        let talk = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "hci {args:?}: {talk}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says that must fail.
    fn fails(&self, n: usize, args: &[&str]) -> String {
        let output = self.run(n, args);
        assert!(!output.status.success(), "hci {args:?} succeeded");
        String::from_utf8(output.stderr).unwrap()
    }

    /// State and node of the VM.
    fn vm(&self, n: usize) -> (String, Option<String>) {
        let shown = self.ok(n, &["vm", "get", "web1", "-o", "json"]);
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        (shown["state"].as_str().unwrap().to_owned(), shown["node"].as_str().map(str::to_owned))
    }

    /// Checks what its guest has printed in its present run, which begins with this letter and goes on with the ones after it. Returns the one that comes
    /// next.
    fn letters(&self, n: usize, first: u8) -> u8 {
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

    /// Names of all volumes.
    fn volumes(&self, n: usize) -> String {
        self.ok(n, &["volume", "list", "-o", "name"])
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
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

fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited for long: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_vm_is_paused_suspended_and_goes_on_on_another_node() {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("SKIPPED: /dev/kvm: {error}");
        return;
    }
    let mut cluster = Cluster::start();
    let kernel = cluster.dir.path().join("letters");
    fs::write(&kernel, guest::pvh_elf(&letters::code(PAUSE))).unwrap();
    cluster.ok(1, &["image", "import", "letters", "--kernel", kernel.to_str().unwrap()]);
    cluster.ok(1, &["network", "create", "lan", "--subnet", "10.9.0.0/24"]);
    let create =
        ["--memory", "64MiB", "--disk", "64MiB", "--network", "lan", "--cpu-model", "host", "--node", "n1"];
    cluster.ok(1, &[&["vm", "create", "web1", "--image", "letters"], &create[..]].concat());
    assert_eq!(cluster.vm(2), ("running".to_owned(), Some("n1".to_owned())));
    cluster.letters(2, b'a');

    // A pause outlives the control process of its node.
    cluster.ok(2, &["vm", "pause", "web1"]);
    let paused_at = cluster.letters(2, b'a');
    cluster.restart_control(1);
    eventually("the VM is seen paused again", || (cluster.vm(2).0 == "paused").then_some(()));
    assert_eq!(cluster.letters(2, b'a'), paused_at, "it runs while it is paused");
    cluster.ok(2, &["vm", "resume", "web1"]);
    eventually("it prints more", || (cluster.letters(2, b'a') != paused_at).then_some(()));

    // Suspended it is nowhere; what it printed last is known, because it was paused before.
    cluster.ok(2, &["vm", "pause", "web1"]);
    let next = cluster.letters(2, b'a');
    cluster.ok(2, &["vm", "suspend", "web1"]);
    assert_eq!(cluster.vm(2), ("suspended".to_owned(), None));
    assert!(cluster.volumes(2).contains("web1-state"));
    assert!(cluster.fails(2, &["vm", "stop", "web1"]).contains("--discard-state"));
    assert!(cluster.fails(2, &["volume", "delete", "web1-state", "--yes"]).contains("suspended VM web1"));

    // Its node is lost, and takes nothing of it along.
    cluster.lose(1);
    eventually("the node is lost", || {
        let nodes = cluster.run(2, &["node", "list", "-o", "json"]).stdout;
        String::from_utf8_lossy(&nodes).contains("\"lost\"").then_some(())
    });
    cluster.ok(2, &["vm", "resume", "web1"]);
    let (state, node) = cluster.vm(2);
    assert!(state == "running" && node.is_some_and(|node| node != "n1"), "{state}");
    cluster.letters(2, next);
    assert!(!cluster.volumes(2).contains("web1-state"), "what it went on with is used up");
}
