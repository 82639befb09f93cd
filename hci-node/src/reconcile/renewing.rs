//! Runs that go on in a new process of this node while their guests run.
//!
//! A VMM process outlives the executable that it was started from. After an upgrade, the guest is moved into a process of the present one: as to
//! another node, but with its memory staying where it is, so that the pause does not depend on its size. Who has the guest when is in
//! [`crate::vmm_role::succession`]; this is the control process's part, which may be cut off anywhere. What it leaves behind then is found and ended
//! when it is begun again: as long as the successor is not named, the guest is the predecessor's.

use std::time::Duration;

use bytes::Bytes;
use netfabric::rpc::CallError;
use tokio::time::Instant;
use vmm::VmConfig;

use super::{
    actions::{ActionError, Tools, io, vmm, vmm_text},
    cluster::ProposeError,
    observed::Vcpus,
    vm_process::{self, Succession},
};
use crate::{
    paths::VmPaths,
    state::{Op, RunEpoch, TaskError, VmId},
    vmm_role::{
        protocol::{
            self, AwaitGuest, BringFlow, BringState, FetchState, GetDescriptors, GuestState, HandOver,
            Resume, SaveForSuccessor, StateFlow, Status,
        },
        record::{self, Begin, ProcessRecord, RunFile},
        succession::{PATIENCE, Predecessor},
    },
};

/// How long the new process may take until it can take a state.
const READY_PATIENCE: Duration = Duration::from_secs(20);
/// How long the whole of it may take until the successor is named: less than that waits for it.
const WHOLE_PATIENCE: Duration = Duration::from_secs(45);
const _: () = assert!(WHOLE_PATIENCE.as_secs() + 10 < PATIENCE.as_secs());
/// How often it is looked.
const LOOK: Duration = Duration::from_millis(10);
/// Pause before a cluster that does not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// A run that is to go on in a new process.
#[derive(Debug)]
pub(super) struct Renewed {
    pub(super) vm: VmId,
    pub(super) epoch: RunEpoch,
    pub(super) config: VmConfig,
    pub(super) vcpus: Vcpus,
}

/// Why it did not.
enum Unrenewed {
    /// It is too early.
    NotNow(ActionError),
    /// It did not work; the run goes on where it is.
    Failed(String),
}

impl Tools {
    /// Moves a run into a new process and tells the cluster, or that it stays where it is. It is not tried twice: the guest may have been held
    /// meanwhile.
    pub(super) async fn renew_vm(&self, renewed: Renewed) -> Result<(), ActionError> {
        let (vm, epoch) = (renewed.vm, renewed.epoch);
        let error = match self.move_into_new_process(renewed).await {
            Ok(paused) => {
                let paused_ms = paused.as_millis();
                tracing::info!(%vm, epoch = epoch.0, paused_ms, "a VM goes on in a new process");
                self.note_pause(vm, format!("it was paused for {} ms", paused.as_millis())).await;
                None
            }
            Err(Unrenewed::NotNow(error)) => return Err(error),
            Err(Unrenewed::Failed(detail)) => {
                tracing::warn!(%vm, epoch = epoch.0, detail, "a VM stays in its process");
                let next = "remove the cause, then try again: hci vm migrate NAME --in-place".to_owned();
                Some(TaskError { detail, next })
            }
        };
        let op = Op::RenewalEnded { vm, epoch, error };
        while let Err(ActionError::Propose(ProposeError::Unavailable(_))) = self.propose(op.clone()).await {
            tokio::time::sleep(ASK_AGAIN).await;
        }
        Ok(())
    }

    /// Returns for how long the guest was held.
    async fn move_into_new_process(&self, renewed: Renewed) -> Result<Duration, Unrenewed> {
        let Renewed { vm, epoch, config, vcpus } = renewed;
        let files = self.paths.vm(vm);
        let not_now = |why: &str| Unrenewed::NotNow(ActionError::NotYet(why.to_owned()));
        // What another control process has begun.
        if call_off(&files, vcpus).await.map_err(Unrenewed::NotNow)? == Succession::Done {
            return Ok(Duration::ZERO);
        }
        let socket = files.socket();
        let process = record::running(&files).map_err(io("look at the VM's process"));
        let process = process.map_err(Unrenewed::NotNow)?.flatten();
        let process = process.ok_or_else(|| not_now("the VM's process is just being started"))?;
        let status = protocol::call(&socket, &Status).await.map_err(early)?;
        if status.epoch != epoch {
            return Err(not_now("another run answers"));
        }
        let descriptors = protocol::call(&socket, &GetDescriptors).await.map_err(early)?;
        let begin = Begin::Successor(Predecessor { process, descriptors });
        let began = Instant::now();
        let outcome = self.switch(&files, RunFile { vm, epoch, config, begin }, began).await;
        let held_at = match outcome {
            Ok(held_at) => held_at,
            Err(why) => {
                // Also when the successor is gone already: the guest does not wait for the cluster to be told.
                take_back(&files, vcpus).await;
                return match call_off(&files, vcpus).await {
                    // It was named after all, only nobody heard of it. The planner lets it run.
                    Ok(Succession::Done) => Ok(began.elapsed()),
                    Ok(Succession::None) => Err(Unrenewed::Failed(why)),
                    Err(error) => Err(Unrenewed::Failed(format!("{why}; {error}"))),
                };
            }
        };
        if vcpus == Vcpus::Running {
            // The planner sees to it once more if this fails.
            if let Err(error) = protocol::call(&files.successor(&socket), &Resume).await {
                tracing::warn!(%vm, epoch = epoch.0, %error, "a guest in a new process does not run yet");
            }
        }
        let paused = held_at.elapsed();
        match vm_process::settle_succession(&files).await {
            Ok(Succession::Done) => Ok(paused),
            Ok(Succession::None) => Err(Unrenewed::Failed("the new process has ended".to_owned())),
            Err(error) => Err(Unrenewed::NotNow(io("settle who runs the VM")(error))),
        }
    }

    /// Everything up to the new process having the guest. Returns since when the guest is held.
    async fn switch(&self, files: &VmPaths, run: RunFile, began: Instant) -> Result<Instant, String> {
        let (old, new) = (files.socket(), files.successor(&files.socket()));
        let child = vm_process::start_successor(&self.paths, &run)
            .map_err(|error| format!("a new process cannot be started: {error}"))?;
        self.wait_for(child, run.vm, run.epoch);
        let successor = await_successor(files).await?;
        let held_at = Instant::now();
        protocol::call(&old, &SaveForSuccessor).await.map_err(vmm_text)?;
        let mut at = 0;
        loop {
            let (flow, piece) =
                protocol::exchange(&old, &FetchState { at }, Bytes::new()).await.map_err(vmm_text)?;
            let order = match flow {
                StateFlow::Piece => BringState { at, flow: BringFlow::More },
                StateFlow::End => BringState { at, flow: BringFlow::Last },
                StateFlow::Settle | StateFlow::Held | StateFlow::Quiet => continue,
            };
            at += piece.len() as u64;
            protocol::exchange(&new, &order, piece).await.map_err(vmm_text)?;
            if order.flow == BringFlow::Last {
                break;
            }
        }
        protocol::call(&new, &AwaitGuest)
            .await
            .map_err(|error| format!("the guest could not be made in it: {}", vmm_text(error)))?;
        if began.elapsed() > WHOLE_PATIENCE {
            return Err("it took too long".to_owned());
        }
        protocol::call(&old, &HandOver { to: successor }).await.map_err(vmm_text)?;
        Ok(held_at)
    }
}

/// Waits until the new process can take a state.
async fn await_successor(files: &VmPaths) -> Result<ProcessRecord, String> {
    let (began, socket) = (Instant::now(), files.successor(&files.socket()));
    loop {
        let found = record::successor(files).map_err(|error| error.to_string())?;
        if let (Some(Some(process)), Ok(status)) = (found, protocol::call(&socket, &Status).await)
            && matches!(status.guest, GuestState::Restoring(_))
        {
            return Ok(process);
        }
        if began.elapsed() > READY_PATIENCE {
            return Err(format!("the new process is not ready; {}", vm_process::log_tail(files)));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Ends what was begun, if anything was: the guest is the predecessor's, or it turns out to be the successor's.
async fn call_off(files: &VmPaths, vcpus: Vcpus) -> Result<Succession, ActionError> {
    let look = io("look at the VM's processes");
    if record::successor(files).map_err(look)?.is_none() {
        return vm_process::settle_succession(files).await.map_err(io("settle who runs the VM"));
    }
    // In this order.
    take_back(files, vcpus).await;
    let settled = vm_process::settle_succession(files).await.map_err(io("settle who runs the VM"))?;
    if settled == Succession::None {
        vm_process::end_successor(files).await.map_err(io("end a process"))?;
        // The order may have come between the two: what is named now stays so.
        return vm_process::settle_succession(files).await.map_err(io("settle who runs the VM"));
    }
    Ok(settled)
}

/// Has the predecessor go on with its guest. After it, it leaves the guest to nobody, if it has not done so before.
async fn take_back(files: &VmPaths, vcpus: Vcpus) {
    let told = vm_process::set_vcpus(files, vcpus).await;
    if let Err(error) = told {
        tracing::debug!(%error, "the VM's process takes its guest back no more");
    }
}

fn early(error: CallError) -> Unrenewed {
    match vmm(error) {
        ActionError::NotYet(why) => Unrenewed::NotNow(ActionError::NotYet(why)),
        error => Unrenewed::Failed(error.to_string()),
    }
}
