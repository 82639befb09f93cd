//! A VM moves to another server and back while it writes: its guest goes on, and its peers reach it there.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::cluster::{Cluster, NODES, text};
use super::run::flushed_by;
use super::timeline::{Look, Progress};

const SECOND: Duration = Duration::from_secs(1);
/// Some hundred MiB through three emulated machines.
const MOVE_LIMIT: Duration = Duration::from_secs(300);

/// Moves the VM from the first server to the second and back.
pub fn there_and_back(cluster: &Cluster<'_>, vm: &str, progress: &Progress) -> Result<()> {
    for to in [NODES[1], NODES[0]] {
        let flushed = flushed_by(cluster, vm)?;
        cluster.hci(&format!("vm migrate {vm} --to {to} --timeout 5m"), MOVE_LIMIT)?;
        let node = text(&cluster.show(&format!("vm get {vm}"))?, "/node").to_owned();
        ensure!(node == to, "{vm} should be on {to}, it is on {node}");
        // The console there begins with the arrival.
        progress.wait(&format!("{vm} to write on there and reach its peers"), 120 * SECOND, || {
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
    }
    Ok(())
}
