//! The faults that the test adds to the demo: killed roles, a cut link, and a power loss everywhere.

use std::time::Duration;

use anyhow::{Result, ensure};
use installer::lab::{Lab, Link};

use super::cluster::{Cluster, NODES};
use super::run::{flushed_by, found_its_data, go_on, healthy, restarted, wait_node_state};
use super::timeline::Timeline;

const SECOND: Duration = Duration::from_secs(1);
const BOOT_LIMIT: Duration = Duration::from_secs(240);
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
    timeline.step("all three servers lose power at once and come back by themselves", |progress| {
        let mut flushed = Vec::new();
        for vm in VMS {
            flushed.push(flushed_by(cluster, vm)?);
        }
        for server in 0..NODES.len() {
            lab.node(server).power_cut()?;
        }
        for server in 0..NODES.len() {
            lab.node(server).power_on()?;
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
    })
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
