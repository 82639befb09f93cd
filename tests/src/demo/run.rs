//! The steps of the run, in their order. Each asserts what its name says.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use installer::lab::{Lab, LabOptions};

use super::cluster::{Cluster, NODES, number, text};
use super::timeline::{Look, Progress, Timeline};
use crate::guest::GuestImage;

/// The VMs, one for each server.
const VMS: [&str; 3] = ["web1", "web2", "web3"];
/// The server that loses its power, and so the VM that moves.
const LOST: usize = 2;
const SECOND: Duration = Duration::from_secs(1);
const INSTALL_LIMIT: Duration = Duration::from_secs(480);
const BOOT_LIMIT: Duration = Duration::from_secs(240);
const COMMAND_LIMIT: Duration = Duration::from_secs(120);
const VM_LIMIT: Duration = Duration::from_secs(300);
const HEAL_LIMIT: Duration = Duration::from_secs(240);

/// What a run needs.
#[derive(Debug, Clone)]
pub struct Options {
    /// The install ISO.
    pub iso: PathBuf,
    /// Where the lab keeps its disks and logs.
    pub lab: PathBuf,
    /// The image that the VMs boot.
    pub guest: GuestImage,
    /// Whether the faults that the demo leaves out are tried too.
    pub faults: Faults,
}

/// How much a run breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// One server loses power: the demo.
    PowerOfOne,
    /// Also processes that are killed, a cut link, and a power loss everywhere: the test.
    All,
}

/// Starts the lab and runs all steps; the lab is up when it returns.
pub fn run(options: &Options, timeline: &mut Timeline) -> Result<Lab> {
    let lab = timeline
        .step("three servers boot the ISO, install themselves and start from their disks", |progress| {
            install(options, progress)
        })?;
    let outcome = on_servers(&lab, options, timeline);
    if outcome.is_err() {
        for server in lab.nodes() {
            println!(
                "--- last lines of the console of {} ---
{}",
                server.name(),
                server.console_tail(25)
            );
        }
    }
    outcome.map(|()| lab)
}

fn install(options: &Options, progress: &Progress) -> Result<Lab> {
    let lab = Lab::up(&LabOptions::from_iso(&options.lab, &options.iso), &mut |line| progress.note(line))?;
    for server in lab.nodes() {
        server
            .wait_ssh(INSTALL_LIMIT)
            .with_context(|| format!("{} did not come up from its disk", server.name()))?;
        progress.note(&format!("{} is installed and runs from its disk", server.name()));
    }
    Ok(lab)
}

fn on_servers(lab: &Lab, options: &Options, timeline: &mut Timeline) -> Result<()> {
    let mut cluster = Cluster::new(lab);
    timeline.step("hci cluster create on n1", |progress| {
        wait_for_roles(&cluster, progress)?;
        cluster.hci("cluster create demo", COMMAND_LIMIT).map(|_| ())
    })?;
    timeline.step("a token, and hci cluster join on n2 and n3", |progress| join(&cluster, progress))?;
    timeline.step("six disks into the pool", |progress| add_disks(&cluster, progress))?;
    timeline.step("an image is imported", |progress| import(&cluster, &options.guest, progress))?;
    timeline.step("an overlay network", |_| {
        cluster.hci("network create lan --subnet 10.77.0.0/24", COMMAND_LIMIT).map(|_| ())
    })?;
    timeline
        .step("three VMs, each with a volume of three replicas", |progress| create_vms(&cluster, progress))?;
    timeline.step("the VMs boot, get addresses and write", |progress| vms_write(&cluster, progress))?;
    timeline.step("the VMs reach each other over the overlay", |progress| vms_meet(&cluster, progress))?;
    timeline.step("web1 moves to n2 and back while it runs", |progress| {
        super::migration::there_and_back(lab, &cluster, VMS[0], progress)
    })?;
    timeline.step("web1 moves into a new process while it runs", |progress| {
        super::migration::in_place(lab, &cluster, VMS[0], progress)
    })?;
    timeline.step(
        "web2 gets a disk, a NIC and a processor while it runs, and lets disk and NIC go",
        |progress| super::devices::come_and_go(&cluster, VMS[1], progress),
    )?;
    let flushed = timeline.step("n3 loses power", |progress| {
        let flushed = flushed_by(&cluster, VMS[LOST])?;
        lab.node(LOST).power_cut()?;
        progress.note(&format!("{} had said that {flushed} records are flushed", VMS[LOST]));
        Ok(flushed)
    })?;
    timeline.step("the cluster says what is degraded", |progress| degraded(&cluster, progress))?;
    timeline
        .step("the VMs on the other servers go on", |progress| go_on(&cluster, &VMS[..LOST], progress))?;
    timeline.step("web3 starts on a survivor with all that it had flushed", |progress| {
        restarted(&cluster, VMS[LOST], NODES[LOST], flushed, progress)
    })?;
    timeline.step("n3 comes back", |progress| {
        lab.node(LOST).power_on()?;
        lab.node(LOST).wait_ssh(BOOT_LIMIT)?;
        wait_node_state(&cluster, NODES[LOST], "available", progress)
    })?;
    timeline
        .step("the volumes resync what changed; all is healthy", |progress| healthy(&cluster, progress))?;
    if options.faults == Faults::All {
        super::faults::all(lab, &mut cluster, timeline)?;
    }
    timeline.step("every VM starts again and finds all its data", |progress| verify_all(&cluster, progress))
}

/// Right after its boot a server's roles may still be starting.
fn wait_for_roles(cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    for (server, name) in NODES.iter().enumerate() {
        progress.wait(&format!("the node service of {name}"), BOOT_LIMIT, || {
            cluster.hci_on(server, "api GET /healthz", 20 * SECOND).map(Look::Done)
        })?;
    }
    Ok(())
}

fn join(cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    let token = cluster.hci("cluster token create --uses 2", COMMAND_LIMIT)?;
    for (server, name) in NODES.iter().enumerate().skip(1) {
        cluster.hci_on(server, &format!("cluster join {}", token.trim()), COMMAND_LIMIT)?;
        progress.note(&format!("{name} joined"));
    }
    for name in NODES {
        wait_node_state(cluster, name, "available", progress)?;
    }
    Ok(())
}

/// Waits until a node is as told.
pub fn wait_node_state(cluster: &Cluster<'_>, node: &str, state: &str, progress: &Progress) -> Result<()> {
    progress.wait(&format!("node {node} to be {state}"), 90 * SECOND, || {
        let found = cluster.show(&format!("node get {node}"))?;
        let is = text(&found, "/state").to_owned();
        Ok(if is == state { Look::Done(()) } else { Look::NotYet(is) })
    })
}

fn add_disks(cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    for node in NODES {
        let free = progress.wait(&format!("{node} to show its two blank data disks"), 60 * SECOND, || {
            let disks = cluster.list("disk list")?;
            let free: Vec<_> = disks
                .iter()
                .filter(|disk| text(disk, "/node") == node && text(disk, "/state") == "free")
                .map(|disk| text(disk, "/path").to_owned())
                .collect();
            Ok(if free.len() == 2 { Look::Done(free) } else { Look::NotYet(format!("{free:?}")) })
        })?;
        cluster.hci(&format!("disk add {node} {}", free.join(" ")), COMMAND_LIMIT)?;
        progress.note(&format!("{node}: {}", free.join(" ")));
    }
    let ready = cluster.list("disk list")?.iter().filter(|disk| text(disk, "/state") == "ready").count();
    ensure!(ready == 6, "six disks should be ready, {ready} are");
    Ok(())
}

fn import(cluster: &Cluster<'_>, image: &GuestImage, progress: &Progress) -> Result<()> {
    for (file, to) in
        [(&image.kernel, "vmlinuz"), (&image.initramfs, "initrd.img"), (&image.disk, "root.img")]
    {
        cluster.copy_to(0, file, &format!("/tmp/{to}"), COMMAND_LIMIT)?;
        progress.note(&format!("{to} is on n1"));
    }
    cluster.hci(
        "image import debian --kernel /tmp/vmlinuz --initramfs /tmp/initrd.img --disk /tmp/root.img \
         --cmdline 'console=ttyS0 quiet panic=-1'",
        4 * COMMAND_LIMIT,
    )?;
    Ok(())
}

fn create_vms(cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    for (vm, node) in VMS.iter().zip(NODES) {
        let create = format!(
            "vm create {vm} --image debian --cpu 1 --memory 192MiB --disk 128MiB --replicas 3 --network lan --node {node} --no-wait"
        );
        cluster.hci(&create, COMMAND_LIMIT)?;
        progress.note(&format!("{vm} for {node}"));
    }
    Ok(())
}

fn vms_write(cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    for (vm, node) in VMS.iter().zip(NODES) {
        let address = progress.wait(&format!("{vm} to boot and write"), VM_LIMIT, || {
            let report = cluster.workload(vm)?;
            Ok(match (report.address, report.flushed) {
                (Some(address), Some(flushed)) if flushed >= 16 => Look::Done(address),
                (address, flushed) => Look::NotYet(format!("address {address:?}, flushed {flushed:?}")),
            })
        })?;
        let found = cluster.show(&format!("vm get {vm}"))?;
        ensure!(
            text(&found, "/node") == node,
            "{vm} should run on {node}, it is on {}",
            text(&found, "/node")
        );
        progress.note(&format!("{vm} runs on {node} as {address}"));
    }
    for volume in cluster.list("volume list")? {
        ensure!(
            number(&volume, "/replicas") == 3 && number(&volume, "/in_sync") == 3,
            "volume {} should have 3 of 3 replicas in sync: {volume}",
            text(&volume, "/name")
        );
    }
    Ok(())
}

fn vms_meet(cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    for vm in VMS {
        let peers = progress.wait(&format!("{vm} to get data from the two others"), VM_LIMIT, || {
            let peers = cluster.workload(vm)?.peers;
            Ok(if peers.len() >= 2 { Look::Done(peers) } else { Look::NotYet(format!("{peers:?}")) })
        })?;
        progress.note(&format!("{vm} reached {}", peers.join(" and ")));
    }
    Ok(())
}

/// The newest record that a VM called flushed.
pub fn flushed_by(cluster: &Cluster<'_>, vm: &str) -> Result<u64> {
    cluster.workload(vm)?.flushed.with_context(|| format!("{vm} has flushed nothing yet"))
}

fn degraded(cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    progress.wait("the cluster to name the lost node and the degraded volumes", 60 * SECOND, || {
        let status = cluster.show("status")?;
        let problems = status.get("problems").and_then(|list| list.as_array()).cloned().unwrap_or_default();
        let named = |kind: &str, name: &str| {
            problems.iter().any(|problem| {
                text(problem, "/kind") == kind && (name.is_empty() || text(problem, "/name") == name)
            })
        };
        let seen = problems.iter().map(|problem| text(problem, "/message")).collect::<Vec<_>>().join("; ");
        let complete =
            text(&status, "/health") != "healthy" && named("node", NODES[LOST]) && named("volume", "");
        if complete {
            progress.note(&seen);
        }
        Ok(if complete {
            Look::Done(())
        } else {
            Look::NotYet(format!("{}: {seen}", text(&status, "/health")))
        })
    })
}

/// Waits until each of these VMs has flushed something new.
pub fn go_on(cluster: &Cluster<'_>, vms: &[&str], progress: &Progress) -> Result<()> {
    for vm in vms {
        let mut before = None;
        progress.wait(&format!("{vm} to write on"), 90 * SECOND, || {
            let now = flushed_by(cluster, vm)?;
            let before = *before.get_or_insert(now);
            Ok(if now > before { Look::Done(()) } else { Look::NotYet(format!("still at record {now}")) })
        })?;
    }
    Ok(())
}

/// Waits until a VM runs on another node than before, and checks that what it had flushed is there.
pub fn restarted(
    cluster: &Cluster<'_>,
    vm: &str,
    from: &str,
    flushed: u64,
    progress: &Progress,
) -> Result<()> {
    let node = progress.wait(&format!("{vm} to be assigned to another node"), 60 * SECOND, || {
        let found = cluster.show(&format!("vm get {vm}"))?;
        let node = text(&found, "/node").to_owned();
        Ok(if node.is_empty() || node == from {
            Look::NotYet(format!("on {node:?}"))
        } else {
            Look::Done(node)
        })
    })?;
    progress.note(&format!("{vm} is assigned to {node}"));
    found_its_data(cluster, vm, flushed, progress)
}

/// Waits until a VM has started and checks that it found all that it had flushed.
pub fn found_its_data(cluster: &Cluster<'_>, vm: &str, flushed: u64, progress: &Progress) -> Result<()> {
    // Until the new start shows, the console still has the verdict of an earlier one, which is too low.
    let verified =
        progress.wait(&format!("{vm} to start and find its {flushed} flushed records"), VM_LIMIT, || {
            let verified = cluster.workload(vm)?.verified;
            Ok(match verified {
                Some(verified) if verified >= flushed => Look::Done(verified),
                Some(verified) => Look::NotYet(format!("it found only {verified}")),
                None => Look::NotYet("no verdict yet".to_owned()),
            })
        })?;
    progress.note(&format!("{vm} found all records up to {verified}; {flushed} were flushed"));
    Ok(())
}

/// Waits until the cluster is healthy with all replicas in sync.
pub fn healthy(cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    progress.wait("the cluster to be healthy", HEAL_LIMIT, || {
        let status = cluster.show("status")?;
        if text(&status, "/health") != "healthy" {
            return Ok(Look::NotYet(status.to_string()));
        }
        // The answers come one after the other: a replica may have been left out in between.
        let volumes = cluster.list("volume list")?;
        let lacking = volumes.iter().find(|volume| number(volume, "/in_sync") < number(volume, "/replicas"));
        Ok(match lacking {
            None => Look::Done(()),
            Some(volume) => Look::NotYet(format!("volume {} lacks replicas", text(volume, "/name"))),
        })
    })?;
    for volume in cluster.list("volume list")? {
        let name = text(&volume, "/name");
        if let Some(copied) = volume.pointer("/resync_blocks_copied").and_then(serde_json::Value::as_u64) {
            progress.note(&format!("{name}: {copied} blocks copied"));
        }
    }
    Ok(())
}

fn verify_all(cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    let mut flushed = Vec::new();
    for vm in VMS {
        flushed.push(flushed_by(cluster, vm)?);
        cluster.hci(&format!("vm stop {vm} --force"), COMMAND_LIMIT)?;
        cluster.hci(&format!("vm start {vm} --no-wait"), COMMAND_LIMIT)?;
    }
    for (vm, flushed) in VMS.iter().zip(flushed) {
        found_its_data(cluster, vm, flushed, progress)?;
    }
    Ok(())
}
