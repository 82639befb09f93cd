//! What the firmware of VMs keeps, brought into the cluster's state: boot entries are there on whichever node a VM runs next.
//!
//! A VMM writes them to a file of its own, before its guest goes on. They are few and change seldom (the first boot, an installation),
//! so files that have changed are looked for now and then, and once more when a run has ended. A node that is lost in between takes the
//! changes of the last seconds with it.

use std::{
    collections::BTreeMap,
    fs, io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, ProposeError};
use crate::{
    paths::NodePaths,
    state::{FirmwareVariables, NodeId, Op, RunEpoch, VmId},
};

/// Pause between two looks.
const PAUSE: Duration = Duration::from_secs(2);

/// Looks after the VMs of this node until `shutdown`.
pub(super) async fn keep(
    cluster: Arc<dyn Cluster>,
    paths: NodePaths,
    me: NodeId,
    shutdown: CancellationToken,
) {
    let mut stored: BTreeMap<VmId, SystemTime> = BTreeMap::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(PAUSE) => {}
        }
        let state = cluster.state().borrow().clone();
        stored.retain(|vm, _| state.vms.contains_key(vm));
        let here = state.vms.values().filter_map(|vm| {
            let assignment = vm.assignment.filter(|assignment| assignment.node == me)?;
            Some((vm.id, assignment.epoch))
        });
        for (vm, epoch) in here {
            let changed = fs::metadata(paths.vm(vm).variables()).and_then(|file| file.modified());
            let Ok(changed) = changed else { continue };
            if stored.get(&vm) == Some(&changed) {
                continue;
            }
            match store(cluster.as_ref(), &paths, vm, epoch).await {
                Ok(()) => drop(stored.insert(vm, changed)),
                Err(error) => tracing::debug!(%vm, %error, "the firmware's variables are not stored yet"),
            }
        }
    }
}

/// Stores what a VM's file holds, if that is news. A run that is over is none.
pub(super) async fn store(
    cluster: &dyn Cluster,
    paths: &NodePaths,
    vm: VmId,
    epoch: RunEpoch,
) -> Result<(), ProposeError> {
    let content = match fs::read(paths.vm(vm).variables()) {
        Ok(content) if !content.is_empty() => content,
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%vm, %error, "cannot read the firmware's variables");
            return Ok(());
        }
        _ => return Ok(()),
    };
    let Some(variables) = FirmwareVariables::of(&content) else {
        tracing::warn!(%vm, "the firmware keeps too much: boot entries are not taken along when the VM moves");
        return Ok(());
    };
    let known = cluster.state().borrow().vms.get(&vm).and_then(|vm| vm.firmware.clone());
    if known.as_ref() == Some(&variables) {
        return Ok(());
    }
    tracing::info!(%vm, bytes = variables.kept(), "the firmware's variables have changed");
    match cluster.propose(Op::StoreVariables { vm, epoch, variables }).await {
        Ok(_) => Ok(()),
        Err(ProposeError::Refused(refusal)) => {
            tracing::debug!(%vm, %refusal, "the firmware's variables are not wanted");
            Ok(())
        }
        Err(error) => Err(error),
    }
}
