//! `guest-agent RUN_DIR KERNEL INITRAMFS`: starts a guest as a node does, with a seed disk and the agent's port, has the guest's agent do
//! everything that a node asks it for, and lets a second guest panic. Runs in a machine with KVM; says `PASS` at the end.

use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hci_node::agent::{Agents, Answer, Ended, Hold, HowEnded, Progress, Request};
use hci_node::cloud_init;
use hci_node::paths::NodePaths;
use hci_node::state::{CloudInit, RunEpoch, VmId};
use hci_node::vmm_role::record::{self, RunFile};

/// How long a guest may take on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(200);
const KEY: &str = "ssh-ed25519 AAAA \"somebody\"";

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run, kernel, initramfs] = &arguments[..] else { bail!("guest-agent RUN_DIR KERNEL INITRAMFS") };
    let paths = NodePaths::new(run, run);

    let (vm, agents, mut vmm) = boot(&paths, kernel, initramfs).await?;
    seed_is_read(&agents, vm).await?;
    file_systems_freeze(&agents, vm).await?;
    agents.ask(vm, Request::Shutdown).await?;
    let status = ended(&mut vmm).await?;
    ensure!(status.success(), "the VMM ended with {status}");
    println!("the guest was shut down");

    let (vm, agents, mut vmm) = boot(&paths, kernel, initramfs).await?;
    let panic = ["/bin/sh", "-c", "echo c > /proc/sysrq-trigger"].map(str::to_owned).to_vec();
    // The guest may be gone before its agent has answered.
    let _ = agents.ask(vm, Request::Start { command: panic }).await;
    ended(&mut vmm).await?;
    let how = record::exit_record(&paths.vm(vm))?.context("nobody recorded how the guest ended")?.ended;
    ensure!(matches!(&how, record::Ended::Crashed(why) if why.contains("panicked")), "{how:?}");
    println!("PASS");
    Ok(())
}

/// A guest whose agent answers.
async fn boot(paths: &NodePaths, kernel: &str, initramfs: &str) -> Result<(VmId, Agents, Child)> {
    let vm = VmId::random();
    let mut vmm = start(paths, vm, kernel, initramfs)?;
    let agents = Agents::new(paths.clone());
    agents.attend(&[(vm, RunEpoch(1))].into());
    let began = Instant::now();
    let version = loop {
        if let Some(report) = agents.seen(vm) {
            break report.version;
        }
        ensure!(began.elapsed() < PATIENCE, "the guest's agent does not answer");
        ensure!(vmm.try_wait()?.is_none(), "the guest has ended");
        tokio::time::sleep(LOOK).await;
    };
    println!("the agent {version} answers after {:.1} s", began.elapsed().as_secs_f64());
    Ok((vm, agents, vmm))
}

async fn seed_is_read(agents: &Agents, vm: VmId) -> Result<()> {
    let read = |name: &'static str| run_in(agents, vm, ["/bin/cat", name]);
    let meta_data = text(read("/mnt/meta-data").await?)?;
    let meta_data: serde_json::Value = serde_json::from_str(&meta_data)?;
    ensure!(meta_data["local-hostname"] == "front" && meta_data["public-keys"][0] == KEY, "{meta_data}");
    ensure!(text(read("/mnt/user-data").await?)? == "#cloud-config\npackages: [nginx]\n", "user data differ");
    ensure!(text(read("/mnt/network-config").await?)? == "version: 2\n", "network configuration differs");
    let missing = read("/mnt/nothing").await?;
    ensure!(missing.how == HowEnded::Exit(1) && !missing.stderr.is_empty(), "{missing:?}");
    println!("the seed disk is read, programs run");
    Ok(())
}

async fn file_systems_freeze(agents: &Agents, vm: VmId) -> Result<()> {
    let Answer::Frozen(count) = agents.ask(vm, Request::Freeze).await? else { bail!("not frozen") };
    ensure!(count == 1, "{count} file systems are frozen");
    let refused = agents.ask(vm, Request::Start { command: vec!["/bin/ls".to_owned()] }).await;
    ensure!(refused.is_err(), "programs run while file systems are frozen");
    let thawed = agents.ask(vm, Request::Thaw).await?;
    ensure!(thawed == Answer::Thawed(Hold::Held), "{thawed:?}");
    text(run_in(agents, vm, ["/bin/sh", "-c", "echo x > /data/x && sync"]).await?)?;
    println!("{count} file system was frozen and thawed");
    Ok(())
}

fn start(paths: &NodePaths, vm: VmId, kernel: &str, initramfs: &str) -> Result<Child> {
    let files = paths.vm(vm);
    std::fs::create_dir_all(files.dir())?;
    let given = CloudInit {
        user_data: Some("#cloud-config\npackages: [nginx]\n".to_owned()),
        network_config: Some("version: 2\n".to_owned()),
        ssh_keys: vec![KEY.to_owned()],
        hostname: Some("front".to_owned()),
    };
    std::fs::write(files.seed(), cloud_init::disk(vm, "probe", &given))?;
    let boot = serde_json::json!({
        "kernel": { "kernel": kernel, "initramfs": initramfs, "cmdline": "console=ttyS0 quiet panic=-1" },
    });
    let config = serde_json::json!({
        "name": "probe", "vcpus": 1, "memory_bytes": 256 << 20, "boot": boot, "seed": files.seed(),
        "agent_socket": files.agent(), "console_socket": files.console(),
    });
    let run = RunFile { vm, epoch: RunEpoch(1), config: serde_json::from_value(config)? };
    record::write_run_file(&files, &run)?;
    let hci = Path::new(&std::env::args().next().context("no name")?).with_file_name("hci");
    Command::new(hci)
        .args(["vmm", "run", "--user", "hci-vmm", "--config"])
        .arg(files.config())
        .spawn()
        .context("the VMM does not start")
}

async fn run_in<'a>(agents: &Agents, vm: VmId, command: impl IntoIterator<Item = &'a str>) -> Result<Ended> {
    let command = command.into_iter().map(str::to_owned).collect();
    let Answer::Started(pid) = agents.ask(vm, Request::Start { command }).await? else {
        bail!("not started")
    };
    let began = Instant::now();
    loop {
        if let Answer::Progress(Progress::Ended(ended)) = agents.ask(vm, Request::Progress(pid)).await? {
            return Ok(*ended);
        }
        ensure!(began.elapsed() < PATIENCE, "a program in the guest does not end");
        tokio::time::sleep(LOOK).await;
    }
}

/// What a program that succeeded wrote.
fn text(ended: Ended) -> Result<String> {
    ensure!(ended.how == HowEnded::Exit(0), "{ended:?}");
    Ok(String::from_utf8(ended.stdout)?)
}

async fn ended(vmm: &mut Child) -> Result<ExitStatus> {
    let began = Instant::now();
    loop {
        if let Some(status) = vmm.try_wait()? {
            return Ok(status);
        }
        if began.elapsed() > PATIENCE {
            vmm.kill()?;
            bail!("the guest does not shut down");
        }
        tokio::time::sleep(LOOK).await;
    }
}
