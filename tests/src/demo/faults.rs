//! The faults that the test adds to the demo: killed roles, a pulled disk, a cut link, and a power loss of most servers and of all.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use installer::lab::{Lab, Link};

use super::cluster::{Cluster, NODES, number, text};
use super::run::{flushed_by, found_its_data, go_on, healthy, restarted, wait_node_state};
use super::timeline::{Look, Progress, Timeline};

const SECOND: Duration = Duration::from_secs(1);
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// After this long without a majority a node has stopped its VMs: a lease of 8 s, and time to end them on a slow machine.
const LEASES_END: Duration = Duration::from_secs(30);
/// What a VM's memory takes to be sent from one emulated server to another is a multiple of that.
const HALF_WAY: Duration = Duration::from_secs(8);
const VMS: [&str; 3] = ["web1", "web2", "web3"];

/// Tries them all; the cluster is healthy before and after each.
pub fn all(lab: &Lab, cluster: &mut Cluster<'_>, timeline: &mut Timeline) -> Result<()> {
    timeline.step("the control process is killed; no guest notices", |progress| {
        let before = boots(cluster, "web1")?;
        for _ in 0..2 {
            kill_role(lab, "hci-node")?;
            go_on(cluster, &VMS[..1], progress)?;
            wait_node_state(cluster, NODES[0], "available", progress)?;
        }
        ensure!(boots(cluster, "web1")? == before, "web1 was started again");
        Ok(())
    })?;
    timeline.step("the data process is killed; guests wait and go on", |progress| {
        let before = boots(cluster, "web1")?;
        for _ in 0..2 {
            kill_role(lab, "hci-data")?;
            go_on(cluster, &VMS, progress)?;
        }
        ensure!(boots(cluster, "web1")? == before, "web1 was started again");
        healthy(cluster, progress)
    })?;
    timeline.step("a data disk is pulled out; its copies are rebuilt on another one", |progress| {
        pull_disk(lab, cluster, progress)
    })?;
    timeline.step("n2 is cut off; its VM moves, and n2 lets go of it", |progress| {
        let node = cluster.show("vm get web2")?["node"].as_str().unwrap_or_default().to_owned();
        let server = NODES.iter().position(|name| *name == node).unwrap_or(1);
        cluster.ask_first((server + 1) % NODES.len());
        let flushed = flushed_by(cluster, "web2")?;
        lab.node(server).link(Link::Down)?;
        restarted(cluster, "web2", &node, flushed, progress)?;
        let left = lab.node(server).ssh("pgrep -cf '[h]ci vmm run' || true", 20 * SECOND)?;
        ensure!(
            left.stdout.trim() == "0",
            "{node} still runs {} VMs after it was cut off",
            left.stdout.trim()
        );
        lab.node(server).link(Link::Up)?;
        wait_node_state(cluster, &node, "available", progress)?;
        healthy(cluster, progress)
    })?;
    timeline.step(
        "the server that web1 moves to is cut off half-way; web1 stays and goes on",
        |progress| {
            let (from, to) = half_way(cluster, "web1")?;
            lab.node(to).link(Link::Down)?;
            progress.wait("web1 to stay", 90 * SECOND, || {
                let found = cluster.show("vm get web1")?;
                let (state, node) = (text(&found, "/state").to_owned(), text(&found, "/node").to_owned());
                ensure!(node == NODES[from], "web1 is on {node}");
                Ok(if state == "running" { Look::Done(()) } else { Look::NotYet(state) })
            })?;
            go_on(cluster, &VMS[..1], progress)?;
            lab.node(to).link(Link::Up)?;
            wait_node_state(cluster, NODES[to], "available", progress)?;
            healthy(cluster, progress)
        },
    )?;
    timeline.step(
        "the server that web1 moves from loses power half-way; web1 starts elsewhere",
        |progress| {
            let flushed = flushed_by(cluster, "web1")?;
            let (from, _) = half_way(cluster, "web1")?;
            lab.node(from).power_cut()?;
            restarted(cluster, "web1", NODES[from], flushed, progress)?;
            lab.node(from).power_on()?;
            lab.node(from).wait_ssh(BOOT_LIMIT)?;
            wait_node_state(cluster, NODES[from], "available", progress)?;
            healthy(cluster, progress)
        },
    )?;
    timeline.step(
        "two of three servers lose power, and the third lets go of its VMs until they are back",
        |progress| power_loss(lab, cluster, &[1, 2], LEASES_END, progress),
    )?;
    timeline.step("all three servers lose power at once and come back by themselves", |progress| {
        power_loss(lab, cluster, &[0, 1, 2], Duration::ZERO, progress)
    })
}

/// Begins to move a VM, and returns in the middle of it: from which server, and to which. The third one is asked from now on.
fn half_way(cluster: &mut Cluster<'_>, vm: &str) -> Result<(usize, usize)> {
    let found = cluster.show(&format!("vm get {vm}"))?;
    let from = NODES.iter().position(|name| text(&found, "/node") == *name).context("it is nowhere")?;
    let to = (from + 1) % NODES.len();
    cluster.ask_first((from + 2) % NODES.len());
    cluster.hci(&format!("vm migrate {vm} --to {} --no-wait", NODES[to]), 60 * SECOND)?;
    std::thread::sleep(HALF_WAY);
    let state = text(&cluster.show(&format!("vm get {vm}"))?, "/state").to_owned();
    ensure!(state == "migrating", "{vm} is {state} already");
    Ok((from, to))
}

/// Takes the power from some servers at once, gives it back after a time, and waits until all VMs have found what they had flushed.
fn power_loss(
    lab: &Lab,
    cluster: &mut Cluster<'_>,
    servers: &[usize],
    dark: Duration,
    progress: &Progress,
) -> Result<()> {
    let mut flushed = Vec::new();
    for vm in VMS {
        flushed.push(flushed_by(cluster, vm)?);
    }
    for server in servers {
        lab.node(*server).power_cut()?;
    }
    std::thread::sleep(dark);
    for (server, name) in NODES.iter().enumerate() {
        if servers.contains(&server) {
            continue;
        }
        let left = lab.node(server).ssh("pgrep -cf '[h]ci vmm run' || true", 20 * SECOND)?;
        let left = left.stdout.trim();
        ensure!(left == "0", "{name} runs {left} VMs although most servers are off");
    }
    for server in servers {
        lab.node(*server).power_on()?;
    }
    for (server, node) in NODES.iter().enumerate() {
        lab.node(server).wait_ssh(BOOT_LIMIT)?;
        progress.note(&format!("{node} is up"));
    }
    cluster.ask_first(0);
    for (vm, flushed) in VMS.iter().zip(flushed) {
        found_its_data(cluster, vm, flushed, progress)?;
    }
    healthy(cluster, progress)
}

/// Pulls the disk of n2 that holds most, waits until all copies are on others, and takes it out of the pool.
fn pull_disk(lab: &Lab, cluster: &Cluster<'_>, progress: &Progress) -> Result<()> {
    const NODE: usize = 1;
    let disks = cluster.list("disk list")?;
    let of_node =
        disks.iter().filter(|disk| text(disk, "/node") == NODES[NODE] && text(disk, "/state") == "ready");
    let pulled =
        of_node.max_by_key(|disk| number(disk, "/segments")).context("n2 has no disk in the pool")?;
    ensure!(number(pulled, "/segments") > 0, "no disk of n2 holds anything: {pulled}");
    let (path, id) = (text(pulled, "/path"), text(pulled, "/id"));
    let serial = lab
        .node(NODE)
        .ssh(&format!("cat /sys/block/{}/serial", path.trim_start_matches("/dev/")), 20 * SECOND)?;
    let name = serial.stdout.trim().rsplit('-').next().unwrap_or_default().to_owned();
    lab.node(NODE).pull_disk(&name)?;
    progress.note(&format!(
        "{path} of {} is out, which held {} segments",
        NODES[NODE],
        number(pulled, "/segments")
    ));
    progress.wait("the cluster to say that the disk failed", 90 * SECOND, || {
        let disks = cluster.list("disk list")?;
        let state =
            disks.iter().find(|disk| text(disk, "/id") == id).map_or("gone", |disk| text(disk, "/state"));
        Ok(if state == "failed" { Look::Done(()) } else { Look::NotYet(state.to_owned()) })
    })?;
    go_on(cluster, &VMS, progress)?;
    progress.wait("all volumes to be whole without it", 180 * SECOND, || {
        let volumes = cluster.list("volume list")?;
        let lacking: Vec<_> = volumes
            .iter()
            .filter(|volume| number(volume, "/in_sync") < number(volume, "/replicas"))
            .map(|volume| format!("{} {}", text(volume, "/name"), number(volume, "/in_sync")))
            .collect();
        Ok(if lacking.is_empty() { Look::Done(()) } else { Look::NotYet(lacking.join(", ")) })
    })?;
    cluster.hci(&format!("disk evict {}:{path} --force --yes", NODES[NODE]), 120 * SECOND)?;
    healthy(cluster, progress)
}

/// Kills a role's process on the first server; systemd starts it again.
fn kill_role(lab: &Lab, unit: &str) -> Result<()> {
    let killed = lab.node(0).ssh(&format!("systemctl kill --kill-who=main -s KILL {unit}"), 20 * SECOND)?;
    ensure!(killed.success(), "{unit} cannot be killed: {}", killed.stderr.trim());
    Ok(())
}

/// How often a VM was assigned and how often its process was started: a guest that noticed nothing has both as before.
fn boots(cluster: &Cluster<'_>, vm: &str) -> Result<(u64, usize)> {
    let epoch = cluster.show(&format!("vm get {vm}"))?["epoch"].as_u64().unwrap_or_default();
    let log = cluster.hci(&format!("vm console {vm} --log"), 60 * SECOND)?;
    Ok((epoch, log.matches("WL boot ").count()))
}
