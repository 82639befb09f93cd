//! `guest-agent RUN_DIR KERNEL INITRAMFS`: starts a guest as a node does, with a seed disk and the agent's port, has the guest's agent do
//! everything that a node asks it for, pauses it, writes it down and has it go on in another VMM, and lets a second guest panic. Runs in a
//! machine with KVM; says `PASS` at the end.

use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use hci_node::agent::{AgentFailure, Agents, Answer, Ended, GuestPid, Hold, HowEnded, Progress, Request};
use hci_node::cloud_init;
use hci_node::paths::{NodePaths, VmPaths};
use hci_node::state::{CloudInit, RunEpoch, VmId};
use hci_node::vmm_role::protocol::{
    self, BringFlow, BringState, FetchState, GuestState, Kill, Pause, Resume, Save, StateFlow, Status,
};
use hci_node::vmm_role::record::{self, Begin, RunFile};
use hci_node::vmm_role::saved::PIECE;

/// How long a guest may take on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_millis(200);
const KEY: &str = "ssh-ed25519 AAAA \"somebody\"";

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [run, kernel, initramfs] = &arguments[..] else { bail!("guest-agent RUN_DIR KERNEL INITRAMFS") };
    let paths = NodePaths::new(run, run);

    let (vm, agents, vmm) = boot(&paths, kernel, initramfs).await?;
    seed_is_read(&agents, vm).await?;
    file_systems_freeze(&agents, vm).await?;
    let counter = start_counting(&agents, vm).await?;
    pause_and_resume(&paths, &agents, vm, counter).await?;
    let (agents, vmm) = save_and_restore(&paths, agents, vm, vmm, counter).await?;
    // Once more: what was restored is as whole as what was not.
    let (agents, mut vmm) = save_and_restore(&paths, agents, vm, vmm, counter).await?;
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
    let agents = attend(paths, vm, &mut vmm).await?;
    Ok((vm, agents, vmm))
}

/// Waits until the guest's agent answers.
async fn attend(paths: &NodePaths, vm: VmId, vmm: &mut Child) -> Result<Agents> {
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
    Ok(agents)
}

/// A program that counts in its memory, sleeps by the guest's timers in between, and writes to memory what it has come to.
const COUNT: &str =
    "n=0; echo alive >/tmp/kept; while :; do n=$((n+1)); echo $n >/tmp/count; sleep 0.5; done";

async fn start_counting(agents: &Agents, vm: VmId) -> Result<GuestPid> {
    let command = ["/bin/sh", "-c", COUNT].map(str::to_owned).to_vec();
    let Answer::Started(pid) = agents.ask(vm, Request::Start { command }).await? else {
        bail!("not started")
    };
    let began = Instant::now();
    while counted(agents, vm).await?.count < 3 {
        ensure!(began.elapsed() < PATIENCE, "nobody counts");
        tokio::time::sleep(LOOK).await;
    }
    Ok(pid)
}

/// How far the guest is.
#[derive(Debug, Clone, Copy)]
struct Counted {
    count: u64,
    /// Seconds that its clock has run.
    uptime: f64,
    /// Seconds since 1970 by its clock.
    wall: f64,
}

async fn counted(agents: &Agents, vm: VmId) -> Result<Counted> {
    let script = "cat /tmp/count /proc/uptime /tmp/kept; date +%s";
    let began = Instant::now();
    let said = loop {
        match run_in(agents, vm, ["/bin/sh", "-c", script]).await {
            // An emulated guest that is busy may miss a deadline of its agent's.
            Err(error) if began.elapsed() < PATIENCE => println!("once more: {error}"),
            ended => break text(ended?)?,
        }
        tokio::time::sleep(5 * LOOK).await;
    };
    let words: Vec<&str> = said.split_whitespace().collect();
    let [count, uptime, _, "alive", wall] = words[..] else { bail!("the guest says {said:?}") };
    Ok(Counted { count: count.parse()?, uptime: uptime.parse()?, wall: wall.parse()? })
}

/// Waits until the program that was started before counts on.
async fn counts_on(agents: &Agents, vm: VmId, from: Counted) -> Result<Counted> {
    let began = Instant::now();
    loop {
        let now = counted(agents, vm).await?;
        ensure!(now.count >= from.count && now.uptime >= from.uptime, "from {from:?} back to {now:?}");
        if now.count > from.count + 3 {
            return Ok(now);
        }
        ensure!(began.elapsed() < PATIENCE, "the program does not go on: {now:?}");
        tokio::time::sleep(LOOK).await;
    }
}

async fn pause_and_resume(paths: &NodePaths, agents: &Agents, vm: VmId, counter: GuestPid) -> Result<()> {
    const PAUSE: Duration = Duration::from_secs(5);
    let socket = paths.vm(vm).socket();
    let before = counted(agents, vm).await?;
    protocol::call(&socket, &Pause).await?;
    ensure!(protocol::call(&socket, &Status).await?.guest == GuestState::Paused, "it is not paused");
    tokio::time::sleep(PAUSE).await;
    protocol::call(&socket, &Resume).await?;
    let after = counts_on(agents, vm, before).await?;
    ensure!(
        after.uptime - before.uptime >= PAUSE.as_secs_f64(),
        "its clock stood still: {before:?}, {after:?}"
    );
    ensure!(is_running(agents, vm, counter).await?, "the program has ended");
    println!("paused at {before:?}, counts on at {after:?}");
    Ok(())
}

/// Writes the guest down, ends it, and has it go on in another VMM.
async fn save_and_restore(
    paths: &NodePaths,
    agents: Agents,
    vm: VmId,
    mut vmm: Child,
    counter: GuestPid,
) -> Result<(Agents, Child)> {
    const AWAY: Duration = Duration::from_secs(5);
    let files = paths.vm(vm);
    let before = counted(&agents, vm).await?;
    let began = Instant::now();
    protocol::call(&files.socket(), &Save).await?;
    let mut state = Vec::new();
    loop {
        let fetch = FetchState { at: state.len() as u64 };
        match protocol::exchange(&files.socket(), &fetch, Bytes::new()).await? {
            (StateFlow::Piece, piece) => state.extend_from_slice(&piece),
            (StateFlow::End, _) => break,
            (StateFlow::Settle | StateFlow::Held | StateFlow::Quiet, _) => bail!("it is saved, not migrated"),
        }
    }
    let saving = began.elapsed();
    agents.dismiss();
    protocol::call(&files.socket(), &Kill).await?;
    ended(&mut vmm).await?;
    tokio::time::sleep(AWAY).await;

    let mut run = record::run_file(&files)?.context("there is no run file")?;
    run.begin = Begin::Saved;
    // One whose state is damaged says so and ends.
    let mut damaged = state.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let mut vmm = spawn(&files, &run)?;
    let refused = bring(&files, &damaged).await;
    ended(&mut vmm).await?;
    let how = record::exit_record(&files)?.context("nobody recorded how it ended")?.ended;
    ensure!(matches!(&how, record::Ended::Crashed(why) if why.contains("damaged")), "{refused:?}: {how:?}");

    let began = Instant::now();
    let mut vmm = spawn(&files, &run)?;
    bring(&files, &state).await?;
    while protocol::call(&files.socket(), &Status).await?.guest != GuestState::Paused {
        ensure!(began.elapsed() < PATIENCE, "the guest is not made");
        ensure!(vmm.try_wait()?.is_none(), "the guest has ended: {:?}", record::exit_record(&files)?);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let restoring = began.elapsed();
    protocol::call(&files.socket(), &Resume).await?;
    let agents = attend(paths, vm, &mut vmm).await?;
    let after = counts_on(&agents, vm, before).await?;
    let passed = after.wall - before.wall;
    agents.ask(vm, Request::SetTime).await?;
    let set = counted(&agents, vm).await?.wall;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
    ensure!((set - now).abs() < 30.0, "its agent set its clock to {set} at {now}");
    ensure!(is_running(&agents, vm, counter).await?, "the program has ended");
    println!(
        "saved {} KiB in {:.2} s, restored in {:.2} s: {before:?}, {after:?}, {passed:.1} s by its clock",
        state.len() >> 10,
        saving.as_secs_f64(),
        restoring.as_secs_f64()
    );
    Ok((agents, vmm))
}

async fn bring(files: &VmPaths, state: &[u8]) -> Result<()> {
    let began = Instant::now();
    while !matches!(
        protocol::call(&files.socket(), &Status).await.map(|it| it.guest),
        Ok(GuestState::Restoring(0))
    ) {
        ensure!(began.elapsed() < PATIENCE, "the VMM does not wait for a state");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut at = 0;
    while at < state.len() {
        let end = state.len().min(at + PIECE);
        let flow = if end == state.len() { BringFlow::Last } else { BringFlow::More };
        let piece = Bytes::copy_from_slice(&state[at..end]);
        protocol::exchange(&files.socket(), &BringState { at: at as u64, flow }, piece).await?;
        at = end;
    }
    Ok(())
}

async fn is_running(agents: &Agents, vm: VmId, pid: GuestPid) -> Result<bool> {
    let began = Instant::now();
    loop {
        match agents.ask(vm, Request::Progress(pid)).await {
            Err(AgentFailure::Away | AgentFailure::Silent) if began.elapsed() < PATIENCE => {}
            answer => return Ok(answer? == Answer::Progress(Progress::Running)),
        }
        tokio::time::sleep(5 * LOOK).await;
    }
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
    let run = RunFile { vm, epoch: RunEpoch(1), config: serde_json::from_value(config)?, begin: Begin::Boot };
    spawn(&files, &run)
}

fn spawn(files: &VmPaths, run: &RunFile) -> Result<Child> {
    for stale in [files.exit(), files.socket(), files.console(), files.agent()] {
        // Of an earlier run, if there was one.
        let _ = std::fs::remove_file(stale);
    }
    record::write_run_file(&files.config(), run)?;
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
