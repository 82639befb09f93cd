//! `guest-memory RUN_DIR KERNEL INITRAMFS`: runs a guest and changes how much memory it has: it plugs some, keeps it while it is written down and goes on, unplugs
//! it, reports free pages and fills a balloon; talks to a program in it by vsock meanwhile. Runs in a machine with KVM; says `PASS` at the end.
//!
//! The guest runs in this process, whose main thread and all that it starts are confined as in a VMM; only the thread that asks is not.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vmm::{BalloonConfig, Boot, MemoryStatus, Vm, VmConfig, VmHandle, VsockConfig};

/// How long the guest may take for anything on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(180);
const LOOK: Duration = Duration::from_millis(100);
const MIB: u64 = 1 << 20;
const BOOT: u64 = 256 * MIB;
const MOST: u64 = 768 * MIB;

/// What a guest begins with: nothing, or what another one was saved with.
type Begin = Option<Vec<u8>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run, kernel, initramfs] = &arguments[..] else { bail!("guest-memory RUN_DIR KERNEL INITRAMFS") };
    let config = config(Path::new(run), kernel, initramfs)?;
    let (begin, begun) = channel();
    let (made, handles) = channel();
    let host = Host { socket: Path::new(run).join("vsock"), begin, handles };
    let asking = std::thread::spawn(move || ask(host));
    vmm::isolation::confine_process()?;
    for begin in begun {
        let vm = match begin {
            None => Vm::start(config.clone())?,
            Some(state) => Vm::restore(config.clone(), &mut &state[..])?,
        };
        if made.send(vm.handle()).is_err() {
            break;
        }
        println!("the guest has ended: {}", vm.wait());
    }
    match asking.join() {
        Ok(asked) => asked?,
        Err(_) => bail!("whoever asks has panicked"),
    }
    println!("PASS");
    Ok(())
}

fn config(run: &Path, kernel: &str, initramfs: &str) -> Result<VmConfig> {
    let cmdline = "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable".to_owned();
    let boot = Boot::Kernel { kernel: kernel.into(), initramfs: Some(initramfs.into()), cmdline };
    let config = serde_json::json!({
        "name": "memory", "vcpus": 1, "memory_bytes": BOOT, "max_memory_bytes": MOST, "plugged_bytes": MOST - BOOT,
        "balloon": BalloonConfig::default(), "vsock": VsockConfig { cid: 3, socket: run.join("vsock") },
        "boot": boot, "console_socket": run.join("console"),
    });
    Ok(serde_json::from_value(config)?)
}

/// What the thread that asks has.
struct Host {
    socket: PathBuf,
    begin: Sender<Begin>,
    handles: Receiver<VmHandle>,
}

impl Host {
    fn guest(&self, begin: Begin) -> Result<VmHandle> {
        self.begin.send(begin)?;
        let guest = self.handles.recv_timeout(PATIENCE).context("the guest is not made")?;
        let console = UnixStream::connect(self.socket.with_file_name("console"))?;
        std::thread::spawn(move || std::io::copy(&mut &console, &mut std::io::stdout()));
        Ok(guest)
    }

    /// A stream to the program in the guest, once it is there.
    fn call(&self) -> Result<UnixStream> {
        const OK: &str = "OK ";
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.write_all(b"CONNECT 1024\n")?;
            let mut line = String::new();
            let mut byte = [0];
            while !line.ends_with('\n') && stream.read(&mut byte)? == 1 {
                line.push(byte[0].into());
            }
            if line.starts_with(OK) {
                return Ok(stream);
            }
            std::thread::sleep(LOOK);
        }
        bail!("nobody in the guest answers")
    }

    /// Has the program do something, and returns what it says.
    fn have(&self, line: &str) -> Result<String> {
        let mut stream = self.call()?;
        stream.write_all(format!("{line}\n").as_bytes())?;
        let mut said = String::new();
        stream.read_to_string(&mut said).with_context(|| format!("{line}: no answer"))?;
        Ok(said)
    }

    fn have_done(&self, line: &str) -> Result<()> {
        let said = self.have(line)?;
        ensure!(said == "ok", "{line}: {said:?}");
        Ok(())
    }

    fn total(&self) -> Result<u64> {
        Ok(self.have("total")?.parse()?)
    }
}

/// Bytes of this machine that the guest's memory takes.
fn taken() -> Result<u64> {
    let mut most = 0;
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        if fs::read_link(&path).is_ok_and(|target| target.to_string_lossy().contains("guest-memory")) {
            most = most.max(fs::metadata(&path)?.blocks() * 512);
        }
    }
    Ok(most)
}

fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let began = Instant::now();
    while !holds()? {
        ensure!(began.elapsed() < PATIENCE, "not in time: {what}");
        std::thread::sleep(LOOK);
    }
    Ok(began.elapsed())
}

fn memory(guest: &VmHandle) -> MemoryStatus {
    guest.status().memory
}

fn ask(host: Host) -> Result<()> {
    let asked = changes(&host);
    if let Err(error) = &asked {
        println!("failed: {error:#}");
        // The main thread waits for the guest.
        std::process::exit(1);
    }
    asked
}

fn changes(host: &Host) -> Result<()> {
    let guest = host.guest(None)?;
    streams(host)?;
    let plugging = until("memory is plugged", || Ok(memory(&guest).present_bytes == MOST))?;
    until("the kernel has it", || Ok(host.total()? > 600 * MIB))?;
    println!(
        "{} MiB plugged after {plugging:.1?}: the kernel has {} MiB",
        (MOST - BOOT) / MIB,
        host.total()? / MIB
    );

    // More than it has booted with, so that a part is in what it has plugged.
    host.have_done("fill 200")?;
    println!("filled: the guest takes {} MiB", taken()? / MIB);
    let guest = save_and_restore(host, &guest)?;
    host.have_done("check")?;
    host.have_done("fill 450")?;
    host.have_done("check")?;
    let full = taken()?;
    ensure!(full > 450 * MIB, "450 MiB are filled, and the guest takes {full} bytes");
    host.have_done("drop")?;
    guest.set_memory(BOOT)?;
    let unplugging = until("memory is unplugged", || Ok(memory(&guest).present_bytes == BOOT))?;
    let left = taken()?;
    ensure!(left <= BOOT, "what is unplugged is still taken: {left} bytes");
    println!(
        "{} MiB unplugged after {unplugging:.1?}: {} MiB taken before, {} after",
        (MOST - BOOT) / MIB,
        full / MIB,
        left / MIB
    );

    report(host, &guest)?;
    balloon(host, &guest)?;
    guest.set_memory(BOOT + 128 * MIB)?;
    until("memory is plugged again", || Ok(memory(&guest).present_bytes == BOOT + 128 * MIB))?;
    guest.kill();
    Ok(())
}

/// Writes the guest down, ends it and has it go on.
fn save_and_restore(host: &Host, guest: &VmHandle) -> Result<VmHandle> {
    let before = memory(guest);
    guest.pause()?;
    let (done, saved) = channel();
    guest.ask(move |guest| {
        let mut state = Vec::new();
        let _ = done.send(guest.save(&mut state).map(|()| state));
    });
    let state = saved.recv()??;
    let size = state.len() as u64;
    guest.kill();
    let guest = host.guest(Some(state))?;
    let (done, resumed) = channel();
    guest.ask(move |guest| drop(done.send(guest.resume())));
    resumed.recv()??;
    let after = memory(&guest);
    ensure!(before == after, "{before:?} became {after:?}");
    println!("written down ({} MiB) and gone on: {after:?}", size / MIB);
    Ok(guest)
}

/// The guest reports what it has free, without being asked.
fn report(host: &Host, guest: &VmHandle) -> Result<()> {
    host.have_done("fill 100")?;
    let (full, reported) = (taken()?, memory(guest).reported_bytes);
    host.have_done("drop")?;
    let took = until("free pages are reported", || Ok(taken()? + 80 * MIB < full))?;
    println!(
        "free page reporting: {} MiB before, {} MiB after {took:.1?}; {} MiB reported",
        full / MIB,
        taken()? / MIB,
        (memory(guest).reported_bytes - reported) / MIB
    );
    Ok(())
}

fn balloon(host: &Host, guest: &VmHandle) -> Result<()> {
    const BALLOON: u64 = 64 * MIB;
    guest.set_balloon(BALLOON)?;
    let filling = until("the balloon is full", || Ok(memory(guest).balloon_bytes == BALLOON))?;
    let with = taken()?;
    ensure!(with <= BOOT - BALLOON, "{with} bytes are taken beside the balloon");
    guest.set_balloon(0)?;
    let emptying = until("the balloon is empty", || Ok(memory(guest).balloon_bytes == 0))?;
    host.have_done("fill 90")?;
    host.have_done("check")?;
    host.have_done("drop")?;
    println!("a balloon of {} MiB was filled in {filling:.1?} and emptied in {emptying:.1?}", BALLOON / MIB);
    Ok(())
}

/// Bytes that differ from stream to stream and from place to place.
fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(31) ^ at >> 9 ^ (seed * 77)) as u8).collect()
}

/// Several streams at once, of 10 MiB each way at most, and one that the guest begins.
fn streams(host: &Host) -> Result<()> {
    host.call()?;
    let began = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let lengths = [10 << 20, 1 << 20, 100_000, 1];
        let threads: Vec<_> = lengths
            .into_iter()
            .enumerate()
            .map(|(seed, length)| {
                let stream = host.call();
                scope.spawn(move || echoed(stream?, b"echo\n", &pattern(seed, length)))
            })
            .collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a stream's thread has panicked"))??;
        }
        Ok(())
    })?;
    println!("10 MiB there and back beside three other streams in {:.1?}", began.elapsed());
    let mut outward = host.socket.clone().into_os_string();
    outward.push("_77");
    let listener = UnixListener::bind(outward)?;
    std::thread::scope(|scope| -> Result<()> {
        let called = scope.spawn(|| echoed(listener.accept()?.0, b"", &pattern(9, 1 << 20)));
        host.have_done("call 77")?;
        called.join().map_err(|_| anyhow::anyhow!("a stream's thread has panicked"))?
    })?;
    ensure!(host.have("call 78").is_ok_and(|said| said.is_empty()), "somebody listens where nobody does");
    println!("the guest has called, and was refused where nobody listens");
    Ok(())
}

/// Sends these bytes, and makes sure that they come back, and then the end.
fn echoed(stream: UnixStream, line: &[u8], bytes: &[u8]) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| -> Result<()> {
            (&stream).write_all(line)?;
            (&stream).write_all(bytes)?;
            Ok(stream.shutdown(Shutdown::Write)?)
        });
        let mut back = Vec::new();
        (&stream).read_to_end(&mut back)?;
        sender.join().map_err(|_| anyhow::anyhow!("a sender has panicked"))??;
        ensure!(back == bytes, "{} bytes came back of {}, or others", back.len(), bytes.len());
        Ok(())
    })
}
