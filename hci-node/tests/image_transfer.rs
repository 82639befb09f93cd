//! Images in and out as users do it: a node of real processes, the command line, real images; a control process that
//! is killed in the middle.
//!
//! Needs `qemu-img` (Debian: qemu-utils).

// The lint knows test functions, not their helpers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::Ipv4Addr,
    os::unix::{
        fs::{FileExt, MetadataExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use support::{MIB, Server, disk, qemu_img, sum};

/// Long enough for a loaded machine; every wait ends as soon as it may.
const PATIENCE: Duration = Duration::from_secs(90);

/// A node of one: its data and control processes, killed when dropped.
struct Node {
    dir: tempfile::TempDir,
    address: Ipv4Addr,
    data: Child,
    control: Child,
}

fn hci() -> Command {
    Command::new(env!("CARGO_BIN_EXE_hci"))
}

impl Node {
    /// A cluster of one node with one disk.
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, ..] = *uuid::Uuid::new_v4().as_bytes();
        let address = Ipv4Addr::new(127, a.clamp(1, 250), b, 1);
        fs::create_dir_all(dir.path().join("state")).unwrap();
        fs::create_dir_all(dir.path().join("disk")).unwrap();
        let data = Self::spawn(dir.path(), address, &["data", "run"], "data.log");
        let control = Self::spawn_control(dir.path(), address);
        let node = Self { dir, address, data, control };
        node.answers();
        node.ok(&["cluster", "create", "prod"]);
        node.ok(&["disk", "add", "n1", node.path("disk").to_str().unwrap()]);
        eventually("the disk is ready", || {
            let disks = node.ok(&["disk", "list", "-o", "json"]);
            disks.contains("\"ready\"").then_some(())
        });
        node
    }

    fn spawn(dir: &Path, address: Ipv4Addr, role: &[&str], log: &str) -> Child {
        let log = File::options().create(true).append(true).open(dir.join(log)).unwrap();
        let mut command = hci();
        command.args(role).arg("--state").arg(dir.join("state")).arg("--run").arg(dir.join("run"));
        for (flag, port) in [("--listen-storage", 7401), ("--listen-frames", 7402)] {
            command.arg(flag).arg(format!("{address}:{port}"));
        }
        command.args(["--link-mtu", "1500"]);
        if role[0] == "node" {
            command.args(["--node-name", "n1", "--advertise", &address.to_string()]);
            command.args(["--listen-control", &format!("{address}:7400")]);
            command.args(["--listen-api", &format!("{address}:7443")]);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }

    fn spawn_control(dir: &Path, address: Ipv4Addr) -> Child {
        Self::spawn(dir, address, &["node", "run"], "control.log")
    }

    fn answers(&self) {
        eventually("the node answers", || UnixStream::connect(self.path("run/node.sock")).ok());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = hci();
        command.args(args).env("HCI_ENDPOINT", format!("unix://{}", self.path("run/node.sock").display()));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What a command prints that must succeed.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let talk = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "hci {args:?}: {talk}\n{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says that must fail.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "hci {args:?} succeeded");
        String::from_utf8(output.stderr).unwrap()
    }

    fn kill_control(&mut self) {
        self.control.kill().unwrap();
        self.control.wait().unwrap();
    }

    fn restart_control(&mut self) {
        self.control = Self::spawn_control(self.dir.path(), self.address);
        self.answers();
    }

    fn state_of(&self, image: &str) -> Option<String> {
        let shown = self.run(&["image", "get", image, "-o", "json"]);
        let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).ok()?;
        shown["state"].as_str().map(str::to_owned)
    }

    fn log(&self) -> String {
        let text = fs::read_to_string(self.path("control.log")).unwrap_or_default();
        text.lines().rev().take(20).collect::<Vec<_>>().join("\n")
    }

    fn spool(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("state/spool")).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for child in [&mut self.control, &mut self.data] {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "waited too long: {what}");
        // What is to be caught in the middle takes a second or so.
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn kernel(dir: &Path) -> PathBuf {
    let path = dir.join("kernel");
    fs::write(&path, b"\x7fELF and so on").unwrap();
    path
}

/// Exports an image both ways and compares it with the disk that it was made from.
fn assert_same(node: &Node, image: &str, raw: &Path) {
    for format in ["raw", "qcow2"] {
        let file = node.path(&format!("{image}.{format}"));
        let to = file.to_str().unwrap();
        node.ok(&["image", "export", image, to, "--format", format]);
        qemu_img(&["compare", "-f", format, "-F", "raw", to, raw.to_str().unwrap()]);
        if format == "qcow2" {
            qemu_img(&["check", "-q", to]);
        }
        let taken = fs::metadata(&file).unwrap().blocks() * 512;
        assert!(taken < 4 * MIB as u64, "{format}: {taken} bytes are taken for a disk that is mostly empty");
        let again = node.fails(&["image", "export", image, to, "--format", format]);
        assert!(again.contains("there is a file of this name"), "{again}");
        fs::remove_file(file).unwrap();
    }
}

#[test]
fn images_come_in_from_everywhere_and_go_out_again() {
    let node = Node::start();
    let dir = node.dir.path();
    let (raw, kernel) = (disk(dir), kernel(dir));
    let (raw, kernel) = (raw.as_path(), kernel.to_str().unwrap());
    let image = dir.join("disk.qcow2");
    let qcow2 = image.to_str().unwrap();
    qemu_img(&["convert", "-c", "-O", "qcow2", raw.to_str().unwrap(), qcow2]);
    let bytes = fs::read(&image).unwrap();
    let good = sum(&bytes).to_string();

    node.ok(&["image", "import", "uploaded", "--kernel", kernel, "--disk", qcow2, "--sha256", &good]);
    assert_same(&node, "uploaded", raw);

    let content = Arc::new(Mutex::new(("\"tag\"".to_owned(), bytes.clone())));
    let server = Server::start(content, bytes.len() / 2 + 1);
    let url = server.url("/moved");
    node.ok(&["image", "import", "fetched", "--kernel", kernel, "--disk", &url, "--sha256", &good]);
    assert_same(&node, "fetched", raw);

    let file = format!("node:{}", raw.display());
    node.ok(&["image", "import", "local", "--kernel", &format!("node:{kernel}"), "--disk", &file]);
    assert_same(&node, "local", raw);
    assert!(raw.exists() && Path::new(kernel).exists(), "sources stay");

    let wrong = "0".repeat(64);
    for source in [qcow2, &url, &format!("node:{qcow2}")] {
        let said =
            node.fails(&["image", "import", "bad", "--kernel", kernel, "--disk", source, "--sha256", &wrong]);
        assert!(said.contains(&good) && said.contains(&wrong), "{source}: {said}");
        assert_eq!(node.state_of("bad"), None, "{source}: it was taken back");
    }
    let gone = server.url("/none");
    let said = node.fails(&["image", "import", "bad", "--kernel", kernel, "--disk", &gone]);
    assert!(said.contains("404"), "{said}");
    let begun = Instant::now();
    while !node.spool().is_empty() {
        assert!(begun.elapsed() < PATIENCE / 3, "left in the spool: {:?}", node.spool());
        std::thread::sleep(Duration::from_millis(100));
    }
    let volumes = node.ok(&["volume", "list", "-o", "name"]);
    assert_eq!(volumes.lines().count(), 3, "{volumes}");

    // A snapshot goes out through a clone that is gone afterwards.
    node.ok(&["volume", "snapshot", "create", "image-local", "--name", "before"]);
    let to = dir.join("snapshot.raw");
    let export = ["volume", "export", "image-local", to.to_str().unwrap(), "--format", "raw"];
    node.ok(&[&export[..], &["--snapshot", "before"]].concat());
    qemu_img(&["compare", "-f", "raw", "-F", "raw", to.to_str().unwrap(), raw.to_str().unwrap()]);
    fs::remove_file(&to).unwrap();
    let said = node.fails(&[&export[..], &["--snapshot", "none"]].concat());
    assert!(said.contains("no snapshot none"), "{said}");
    eventually("the clone is gone", || {
        (node.ok(&["volume", "list", "-o", "name"]).lines().count() == 3).then_some(())
    });
}

#[test]
fn a_killed_control_process_goes_on_with_its_downloads() {
    let mut node = Node::start();
    let dir = node.dir.path();
    let kernel = kernel(dir);
    let mut bytes = vec![0; 6 * MIB];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (at / 4096 + at) as u8;
    }
    let raw = dir.join("source.raw");
    fs::write(&raw, &bytes).unwrap();
    // Each answer brings a megabyte, and a pause follows: there is time to be killed in.
    let content = Arc::new(Mutex::new(("\"tag\"".to_owned(), bytes)));
    let server = Server::start(content, MIB);
    let url = server.url("/file");
    let args = ["image", "import", "slow", "--kernel", kernel.to_str().unwrap(), "--disk", &url, "--no-wait"];
    node.ok(&args);
    eventually("some of it has come", || (server.requests.lock().unwrap().len() > 2).then_some(()));
    node.kill_control();
    let before = server.requests.lock().unwrap().len();
    assert!(before < 6, "it was killed too late to show anything");
    node.restart_control();
    eventually("the image is ready", || (node.state_of("slow")? == "ready").then_some(()));
    let requests = server.requests.lock().unwrap().clone();
    let from_the_start = requests.iter().filter(|line| !line.contains("bytes=")).count();
    assert_eq!(from_the_start, 1, "{requests:?}");
    let out = node.path("out.raw");
    node.ok(&["image", "export", "slow", out.to_str().unwrap(), "--format", "raw"]);
    qemu_img(&["compare", out.to_str().unwrap(), raw.to_str().unwrap()]);
}

#[test]
fn an_upload_goes_on_where_it_broke_off() {
    let node = Node::start();
    let dir = node.dir.path();
    let mut bytes = vec![0; 6 * MIB];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (at / 4096 + at) as u8;
    }
    let raw = dir.join("source.raw");
    fs::write(&raw, &bytes).unwrap();
    let kernel = kernel(dir);
    let body = serde_json::json!({ "name": "up", "kernel": true, "disk": true }).to_string();
    node.ok(&["api", "POST", "/v1/images", &body]);
    // A client that dies after two megabytes.
    let mut stream = UnixStream::connect(node.path("run/node.sock")).unwrap();
    let (total, part) = (bytes.len(), 2 * MIB);
    write!(
        stream,
        "PUT /v1/images/up/disk HTTP/1.1\r\nhost: n\r\ncontent-length: {total}\r\nupload-offset: 0\r\nupload-length: {total}\r\n\r\n"
    )
    .unwrap();
    stream.write_all(&bytes[..part]).unwrap();
    drop(stream);
    let there = eventually("the node keeps what came", || {
        let shown = node.ok(&["api", "GET", "/v1/images/up/disk"]);
        let shown: serde_json::Value = serde_json::from_str(&shown).ok()?;
        shown["offset"].as_u64().filter(|offset| *offset > 0)
    });
    assert!(there <= part as u64);
    // One that leaves a gap is refused.
    let mut stream = UnixStream::connect(node.path("run/node.sock")).unwrap();
    write!(
        stream,
        "PUT /v1/images/up/disk HTTP/1.1\r\nhost: n\r\nconnection: close\r\ncontent-length: 1\r\nupload-offset: {}\r\nupload-length: {total}\r\n\r\nx",
        3 * MIB
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 409"), "{answer}");
    // The same command again goes on with what is there.
    let said = node.run(&[
        "image",
        "import",
        "up",
        "--kernel",
        kernel.to_str().unwrap(),
        "--disk",
        raw.to_str().unwrap(),
    ]);
    let talk = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success() && talk.contains("goes on with the import"), "{talk}");
    let out = node.path("out.qcow2");
    node.ok(&["image", "export", "up", out.to_str().unwrap()]);
    qemu_img(&["compare", out.to_str().unwrap(), raw.to_str().unwrap()]);
}

/// A disk with a megabyte of data in every four; its content tells where it is.
fn large_disk(dir: &Path) -> PathBuf {
    let path = dir.join("large.raw");
    let file = File::create(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    let mut piece = vec![0; MIB];
    for start in (0..1u64 << 30).step_by(4 * MIB) {
        for block in piece.chunks_mut(8) {
            block.copy_from_slice(&(start + 1).to_le_bytes());
        }
        file.write_all_at(&piece, start).unwrap();
    }
    path
}

#[test]
fn a_killed_control_process_goes_on_with_writing_a_disk() {
    let mut node = Node::start();
    let dir = node.dir.path().to_owned();
    let (raw, kernel) = (large_disk(&dir), kernel(&dir));
    let source = format!("node:{}", raw.display());
    node.ok(&[
        "image",
        "import",
        "large",
        "--kernel",
        kernel.to_str().unwrap(),
        "--disk",
        &source,
        "--no-wait",
    ]);
    eventually("a note of how far it is", || {
        node.spool().iter().any(|name| name.ends_with(".disk.progress")).then_some(())
    });
    node.kill_control();
    // What was noted is not read again: a change there does not come in.
    let file = File::options().read(true).write(true).open(&raw).unwrap();
    let mut before = vec![0; MIB];
    file.read_exact_at(&mut before, 0).unwrap();
    file.write_all_at(&vec![0xee; MIB], 0).unwrap();
    node.restart_control();
    eventually("the image is ready", || (node.state_of("large")? == "ready").then_some(()));
    file.write_all_at(&before, 0).unwrap();
    let out = node.path("out.raw");
    node.ok(&["image", "export", "large", out.to_str().unwrap(), "--format", "raw"]);
    qemu_img(&["compare", "-f", "raw", "-F", "raw", out.to_str().unwrap(), raw.to_str().unwrap()]);
}

#[test]
fn a_killed_worker_is_the_end_of_its_import_and_of_nothing_else() {
    let node = Node::start();
    let dir = node.dir.path();
    let (raw, kernel) = (large_disk(dir), kernel(dir));
    let source = format!("node:{}", raw.display());
    let kernel = kernel.to_str().unwrap();
    let import = ["image", "import", "large", "--kernel", kernel, "--disk", &source];
    let mut running = node.command(&import).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    eventually("the worker reads", || {
        // Once it is being written: the worker that only looks at the tables is gone again at once.
        node.spool().iter().any(|name| name.ends_with(".disk.progress")).then_some(())
    });
    let children = format!("/proc/{0}/task", node.control.id());
    let workers = fs::read_dir(children).unwrap().flatten().flat_map(|thread| {
        let text = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    });
    for worker in workers {
        assert!(Command::new("kill").args(["-9", &worker]).status().unwrap().success());
    }
    assert!(!running.wait().unwrap().success());
    let mut said = String::new();
    running.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("the image worker ended early: it was killed"), "{said}");
    assert_eq!(node.state_of("large"), None, "it was taken back");
    node.ok(&["image", "import", "small", "--kernel", kernel, "--disk", kernel]);
}

#[test]
fn a_proxy_that_cuts_every_export_does_not_stop_it() {
    let node = Node::start();
    let dir = node.dir.path();
    let (raw, kernel) = (disk(dir), kernel(dir));
    let kernel = kernel.to_str().unwrap();
    node.ok(&["image", "import", "cut", "--kernel", kernel, "--disk", raw.to_str().unwrap()]);
    // Whoever listens here hands on what the node says, and hangs up after 500 kB of an answer.
    let proxy = node.path("proxy.sock");
    let listener = std::os::unix::net::UnixListener::bind(&proxy).unwrap();
    let target = node.path("run/node.sock");
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut server = UnixStream::connect(&target).unwrap();
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            // Either side may go away at any time.
            std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            let _ = std::io::copy(&mut Read::take(&mut server, 500_000), &mut client);
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
    });
    let out = node.path("out.raw");
    let mut command = node.command(&["image", "export", "cut", out.to_str().unwrap(), "--format", "raw"]);
    let output = command.env("HCI_ENDPOINT", format!("unix://{}", proxy.display())).output().unwrap();
    let talk = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && talk.contains("goes on at"), "{talk}");
    qemu_img(&["compare", "-f", "raw", "-F", "raw", out.to_str().unwrap(), raw.to_str().unwrap()]);
}
