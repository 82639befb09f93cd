//! A VM gets a disk, a NIC and a processor while it writes, and its guest lets go of disk and NIC again when it is asked.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::cluster::{Cluster, number, text};
use super::run::flushed_by;
use super::timeline::{Look, Progress};

const SECOND: Duration = Duration::from_secs(1);
/// A guest on an emulated machine takes a while to look at a new device.
const LIMIT: Duration = Duration::from_secs(180);

/// Gives a VM what it did not boot with, and takes back what can be.
pub fn come_and_go(cluster: &Cluster<'_>, vm: &str, progress: &Progress) -> Result<()> {
    let epoch = number(&cluster.show(&format!("vm get {vm}"))?, "/epoch");
    cluster.hci(&format!("vm disk add {vm} --size 1GiB --timeout 2m"), LIMIT)?;
    cluster.hci(&format!("vm nic add {vm} --network lan --timeout 2m"), LIMIT)?;
    cluster.hci(&format!("vm set {vm} --cpu 2 --timeout 2m"), LIMIT)?;
    let shown = cluster.show(&format!("vm get {vm}"))?;
    let count = |what: &str| shown.pointer(what).and_then(|list| list.as_array()).map_or(0, Vec::len);
    ensure!((count("/disks"), count("/nics")) == (2, 2), "{vm} has not got all of it: {shown}");
    ensure!(number(&shown, "/machine/vcpus") == 2, "{vm} has no second processor: {shown}");
    progress.note("a disk, a NIC and a processor are in the machine");

    // That these end says that the guest has let go.
    let mac = text(&shown, "/nics/1/mac").to_owned();
    cluster.hci(&format!("vm nic remove {vm} {mac} --timeout 2m"), LIMIT)?;
    let volume = text(&shown, "/disks/1/volume").to_owned();
    cluster.hci(&format!("vm disk remove {vm} {volume} --yes --timeout 2m"), LIMIT)?;
    progress.note("its guest has let go of disk and NIC");

    let shown = cluster.show(&format!("vm get {vm}"))?;
    ensure!(number(&shown, "/epoch") == epoch, "{vm} was started again: {shown}");
    let flushed = flushed_by(cluster, vm)?;
    progress.wait(&format!("{vm} to write on"), 120 * SECOND, || {
        let now = cluster.workload(vm)?.flushed;
        Ok(match now.is_some_and(|now| now > flushed) {
            true => Look::Done(()),
            false => Look::NotYet(format!("flushed {now:?}")),
        })
    })
}
