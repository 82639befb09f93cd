//! A VM moves to another server and back, and then into another process, while it writes: its guest goes on, and its peers reach it.

use std::time::Duration;

use anyhow::{Result, ensure};
use installer::lab::Lab;

use super::cluster::{Cluster, NODES, text};
use super::run::flushed_by;
use super::timeline::{Look, Progress};

const SECOND: Duration = Duration::from_secs(1);
/// Some hundred MiB through three emulated machines.
const MOVE_LIMIT: Duration = Duration::from_secs(300);

/// Moves the VM from the first server to the second and back.
pub fn there_and_back(lab: &Lab, cluster: &Cluster<'_>, vm: &str, progress: &Progress) -> Result<()> {
    for (from, to) in [(0, NODES[1]), (1, NODES[0])] {
        let flushed = flushed_by(cluster, vm)?;
        cluster.hci(&format!("vm migrate {vm} --to {to} --timeout 5m"), MOVE_LIMIT)?;
        let node = text(&cluster.show(&format!("vm get {vm}"))?, "/node").to_owned();
        ensure!(node == to, "{vm} should be on {to}, it is on {node}");
        goes_on(cluster, vm, flushed, progress)?;
        for part in parts_of_the_pause(lab, from)? {
            progress.note(&part);
        }
    }
    Ok(())
}

/// Moves the VM into a new process of the first server, where it is.
pub fn in_place(lab: &Lab, cluster: &Cluster<'_>, vm: &str, progress: &Progress) -> Result<()> {
    let id = text(&cluster.show(&format!("vm get {vm}"))?, "/id").to_owned();
    let process = || lab.node(0).ssh(&format!("cat /run/hci/vm/{id}/vmm.pid"), 20 * SECOND);
    let before = process()?.stdout;
    let flushed = flushed_by(cluster, vm)?;
    cluster.hci(&format!("vm migrate {vm} --in-place --timeout 2m"), MOVE_LIMIT)?;
    ensure!(process()?.stdout != before, "{vm} is in the process that it was in: {before}");
    goes_on(cluster, vm, flushed, progress)
}

/// Its console begins when it goes on.
fn goes_on(cluster: &Cluster<'_>, vm: &str, flushed: u64, progress: &Progress) -> Result<()> {
    progress.wait(&format!("{vm} to write on and reach its peers"), 120 * SECOND, || {
        let log = cluster.hci(&format!("vm console {vm} --log"), 60 * SECOND)?;
        ensure!(!log.contains("WL boot "), "{vm} was started again");
        let report = cluster.workload(vm)?;
        let writes = report.flushed.is_some_and(|now| now > flushed);
        Ok(match writes && report.peers.len() >= 2 {
            true => Look::Done(()),
            false => Look::NotYet(format!("flushed {:?}, peers {:?}", report.flushed, report.peers)),
        })
    })?;
    let events = cluster.list("event list")?;
    let told = events.iter().rev().find(|event| text(event, "/kind") == "vm-migration-pause");
    ensure!(told.is_some(), "nobody says how long {vm} was paused");
    progress.note(told.map_or("", |event| text(event, "/message")));
    Ok(())
}

/// What the pause was made of, as the server that the VM left has logged it.
fn parts_of_the_pause(lab: &Lab, server: usize) -> Result<Vec<String>> {
    const LOGS: &str = "grep -rhs 'written and held' /run/hci/vm/*/vmm.log | tail -n 1; \
        journalctl -q -o cat -u hci-data -g 'handed over' | tail -n 1";
    let logged = lab.node(server).ssh(LOGS, 20 * SECOND)?;
    // Behind the name of the module.
    let parts = logged.stdout.lines().map(|line| line.rsplit(": ").next().unwrap_or(line).trim().to_owned());
    Ok(parts.filter(|part| !part.is_empty()).collect())
}
