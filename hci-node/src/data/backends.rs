//! How volumes are offered to VMs in this process: vhost-user-blk targets.

use std::sync::Arc;

use storage::{
    TargetStarter,
    ids::VolumeId,
    target::{Access, Target, TargetOptions},
};

use super::{shard::Shard, vmm_group};
use crate::{paths::NodePaths, state};

/// Queues of a target; a VM uses as many of them as it has processors.
const QUEUES: u16 = 4;

/// Starts targets on the sockets that the configuration names, each with its record of requests in flight.
pub(crate) fn target_starter(paths: &NodePaths, shard: &Shard) -> TargetStarter {
    let paths = paths.clone();
    let (runtime, poll) = (shard.runtime().clone(), shard.poll().clone());
    Arc::new(move |volume, socket, device| {
        super::make_socket_directory(&socket).map_err(|error| format!("{}: {error}", socket.display()))?;
        let options = TargetOptions {
            socket,
            socket_group: vmm_group().map(nix::unistd::Gid::as_raw),
            inflight: paths.inflight_of(state::VolumeId(volume.0)),
            queues: QUEUES,
            serial: serial(volume),
            access: Access::ReadWrite,
            runtime: runtime.clone(),
            poll: poll.clone(),
        };
        let target = Target::start(options, device).map_err(|error| super::server::chain(&error))?;
        Ok(Box::new(target) as _)
    })
}

/// What the guest sees as the disk's serial number: the start of the volume's id, which `/dev/disk/by-id` then shows.
fn serial(volume: VolumeId) -> String {
    volume.0.as_simple().to_string().chars().take(20).collect()
}
