//! `vmm-probe RUN_DIR KERNEL INITRAMFS NAME`: starts guests as a node does and prints, for each, a line `probe: NAME FIRST_BYTE BOOT PSS`:
//! nanoseconds from the start of the VMM's process to the first byte on the console and to the guest's init, and KiB of the VMM's memory beside
//! the guest's. Runs in a machine whose clock counts instructions.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hci_node::paths::NodePaths;
use hci_node::reconcile::vm_process::SMALL_PAGES;
use hci_node::state::{RunEpoch, VmId};
use hci_node::vmm_role::record::{self, RunFile};

const ROUNDS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two attempts to connect to the console.
const LOOK: Duration = Duration::from_micros(200);
const MARK: &str = "guest: init runs";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run, kernel, initramfs, name] = &arguments[..] else {
        bail!("vmm-probe RUN_DIR KERNEL INITRAMFS NAME")
    };
    let paths = NodePaths::new(run, run);
    let hci = std::env::current_exe()?.with_file_name("hci");
    // What is read from memory is not measured.
    for file in [kernel.as_ref(), initramfs.as_ref(), hci.as_path()] {
        drop(fs::read(file)?);
    }
    for _ in 0..ROUNDS {
        let vm = VmId::random();
        let files = paths.vm(vm);
        fs::create_dir_all(files.dir())?;
        let boot = serde_json::json!({ "kernel": {
            "kernel": kernel, "initramfs": initramfs, "cmdline": "console=ttyS0 reboot=k panic=-1 quiet",
        }});
        let config = serde_json::json!({
            "name": "probe", "vcpus": 1, "memory_bytes": 256 << 20, "boot": boot,
            "console_socket": files.console(),
            // What every VM of a node has.
            "max_vcpus": 4, "max_memory_bytes": 1u64 << 30, "balloon": {}, "agent_socket": files.agent(),
            "vsock": { "cid": 3, "socket": files.vsock() },
        });
        let run = RunFile {
            vm,
            epoch: RunEpoch(1),
            config: serde_json::from_value(config)?,
            begin: Default::default(),
        };
        record::write_run_file(&files.config(), &run)?;

        let began = Instant::now();
        let mut vmm = Command::new(&hci)
            .args(["vmm", "run", "--config"])
            .arg(files.config())
            .env(SMALL_PAGES.0, SMALL_PAGES.1)
            .spawn()
            .context("the VMM does not start")?;
        let mut console = loop {
            match UnixStream::connect(files.console()) {
                Ok(console) => break console,
                Err(_) => ensure!(began.elapsed() < PATIENCE, "the console is not served"),
            }
            std::thread::sleep(LOOK);
        };
        console.set_read_timeout(Some(PATIENCE))?;
        let (mut said, mut buffer) = (String::new(), [0; 4096]);
        let mut first = None;
        while !said.contains(MARK) {
            let len = console.read(&mut buffer)?;
            ensure!(len > 0, "the guest has ended: {said}");
            first.get_or_insert_with(|| began.elapsed());
            said.push_str(&String::from_utf8_lossy(&buffer[..len]));
        }
        let booted = began.elapsed();
        let pss = own_memory(vmm.id())?;
        vmm.kill()?;
        vmm.wait()?;
        let first = first.unwrap_or_default();
        println!("probe: {name} {} {} {pss}", first.as_nanos(), booted.as_nanos());
    }
    Ok(())
}

/// KiB of a process that are not shared memory, as the guest's is.
fn own_memory(process: u32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let field = |name: &str| -> Result<u64> {
        let line = rollup.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    };
    Ok(field("Pss:")? - field("Pss_Shmem:")?)
}
