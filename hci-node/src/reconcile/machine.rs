//! Brings the machine of a run to what the cluster says that it is to have: devices come and go, it grows and shrinks.
//!
//! Whatever is done is told to the cluster at once, each thing by itself. What the guest has still to do (let go of a device, give memory back) is
//! looked for a moment, and the guest is asked again with the next attempt.

use std::{path::Path, time::Duration};

use netfabric::rpc::{CallError, ErrorCode};
use tokio::time::{Instant, sleep};
use vmm::DeviceConfig;

use super::actions::{ActionError, Tools, io, vmm};
use crate::{
    isolation::cgroup,
    paths::VmPaths,
    state::{Goal, Op, RunEpoch, Shape, TaskState, VmDevice, VmId},
    vmm_role::{
        jail,
        protocol::{self, MachineStatus, Plug, Reshape, Status, Unplug},
        record,
    },
};

/// How long the guest is watched before it is asked again.
const PATIENCE: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(50);

/// What a run's machine is to have.
pub(super) struct Adaptation {
    pub(super) vm: VmId,
    pub(super) epoch: RunEpoch,
    /// Devices that it is to get.
    pub(super) join: Vec<(VmDevice, DeviceConfig)>,
    /// Devices that its guest is to let go of, and what the VMM calls them.
    pub(super) leave: Vec<(VmDevice, String)>,
    /// How large it is to be.
    pub(super) shape: Option<Shape>,
}

impl Tools {
    pub(super) async fn adapt(&self, wanted: Adaptation) -> Result<(), ActionError> {
        let Adaptation { vm, epoch, join, leave, shape } = wanted;
        let files = self.paths.vm(vm);
        let has = self.machine(&files).await?.devices;
        // What is refused holds nothing else up.
        let mut refused = None;
        for (device, config) in join {
            if !has.iter().any(|id| id == config.id()) {
                let plugged = protocol::call(&files.socket(), &Plug { device: config }).await;
                let plugged = self.or_say(&Goal::DeviceSettled(vm, device), plugged).await;
                if let Some(refusal) = refusal(plugged)? {
                    refused = Some(refusal);
                    continue;
                }
            }
            self.propose(Op::DeviceJoined { vm, epoch, device }).await?;
        }
        for (device, id) in leave.iter().filter(|(_, id)| has.contains(id)) {
            let asked = protocol::call(&files.socket(), &Unplug { id: id.clone() }).await;
            let asked = self.or_say(&Goal::DeviceSettled(vm, *device), asked).await;
            refused = refusal(asked)?.or(refused);
        }
        if let Some(shape) = shape {
            // Its guest takes no more than that, and may take that much from now on.
            let now = self.machine(&files).await?.shape;
            let memory_bytes = shape.memory_bytes.max(now.memory_bytes);
            self.limit(&files, Shape { memory_bytes, ..shape }).map_err(io("read what a VM is made of"))?;
            let asked = protocol::call(&files.socket(), &Reshape { shape }).await;
            let asked = self.or_say(&Goal::VmReshaped(vm), asked).await;
            refused = refusal(asked)?.or(refused);
        }
        self.watch(vm, epoch, leave, shape).await?;
        refused.map_or(Ok(()), Err)
    }

    /// What came of an order. Whoever waits for its end is told why there is none yet.
    async fn or_say(&self, goal: &Goal, outcome: Result<(), CallError>) -> Result<(), ActionError> {
        if let Err(error) = &outcome {
            self.say(goal, &error.to_string()).await;
        }
        outcome.map_err(vmm)
    }

    /// Tells whoever waits for this why it takes long.
    async fn say(&self, goal: &Goal, why: &str) {
        let state = self.cluster.state().borrow().clone();
        let waiting = state.tasks.values().filter(|task| task.state == TaskState::Running);
        for task in waiting.filter(|task| task.goal == *goal && task.message != why) {
            let (task, message) = (task.id, why.to_owned());
            // Said again with the next attempt if it did not get there.
            let _ = self.cluster.propose(Op::UpdateTask { task, permille: 0, message }).await;
        }
    }

    /// Tells the cluster of what the guest does, as it does it.
    async fn watch(
        &self,
        vm: VmId,
        epoch: RunEpoch,
        mut leave: Vec<(VmDevice, String)>,
        mut shape: Option<Shape>,
    ) -> Result<(), ActionError> {
        let files = self.paths.vm(vm);
        let until = Instant::now() + PATIENCE;
        loop {
            let machine = self.machine(&files).await?;
            let (gone, left): (Vec<_>, Vec<_>) =
                leave.into_iter().partition(|(_, id)| !machine.devices.contains(id));
            leave = left;
            for (device, _) in gone {
                self.propose(Op::DeviceLeft { vm, epoch, device }).await?;
            }
            if let Some(to) = shape.take_if(|to| machine.shape == *to) {
                self.limit(&files, to).map_err(io("read what a VM is made of"))?;
                self.propose(Op::VmReshaped { vm, epoch, shape: to }).await?;
            }
            match (leave.first(), shape) {
                (None, None) => return Ok(()),
                _ if Instant::now() < until => sleep(LOOK).await,
                (Some((device, _)), _) => {
                    let why = "its guest has not let go of it yet".to_owned();
                    self.say(&Goal::DeviceSettled(vm, *device), &why).await;
                    return Err(ActionError::NotYet(why));
                }
                (None, Some(_)) => {
                    let memory = machine.shape.memory_bytes >> 20;
                    let why = format!("its guest has {memory} MiB of memory by now");
                    self.say(&Goal::VmReshaped(vm), &why).await;
                    return Err(ActionError::NotYet(why));
                }
            }
        }
    }

    /// Limits what the VMM may use to what a machine of this size is worth.
    fn limit(&self, files: &VmPaths, shape: Shape) -> std::io::Result<()> {
        let Some(run) = record::run_file(files)? else { return Ok(()) };
        let most = run.config.max_vcpus.unwrap_or(run.config.vcpus);
        let missing = cgroup::resize(Path::new(cgroup::TREE), &run.cgroup(), jail::limits_of(shape, most));
        for (controller, error) in missing {
            tracing::debug!(vm = %run.vm, controller, %error, "this host does not limit what a VMM uses of it");
        }
        Ok(())
    }

    async fn machine(&self, files: &VmPaths) -> Result<MachineStatus, ActionError> {
        let status = protocol::call(&files.socket(), &Status).await.map_err(vmm)?;
        status.machine.ok_or_else(|| ActionError::NotYet("the guest is just being made".to_owned()))
    }
}

/// What the VMM has refused, if it was that which went wrong.
fn refusal(outcome: Result<(), ActionError>) -> Result<Option<ActionError>, ActionError> {
    match outcome {
        Ok(()) => Ok(None),
        Err(ActionError::Vmm(CallError::Remote(error))) if error.code == ErrorCode::Refused => {
            Ok(Some(ActionError::Vmm(CallError::Remote(error))))
        }
        Err(error) => Err(error),
    }
}
