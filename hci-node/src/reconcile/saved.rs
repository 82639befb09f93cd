//! Runs of VMs that are written to volumes, and runs that are made from what was written.
//!
//! The VMM and the volume are on this node; pieces go through this process from the one to the other, a few at a time. Both directions may be
//! cut off anywhere: writing begins anew, reading goes on where the VMM is. What counts is committed at the end, see `state/apply/suspension.rs`.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream, stream::FuturesUnordered};
use netfabric::rpc::CallError;
use tokio::time::Instant;
use vmm::Processor;

use super::{
    actions::{ActionError, Tools, vmm, vmm_text},
    cluster::ProposeError,
    plan::lost_nodes,
};
use crate::{
    agent::{AgentFailure, Request},
    data::protocol::{VolumeFlush, VolumeRead, VolumeWrite},
    state::{BLOCK_BYTES, Generation, Op, RunEpoch, TaskError, TaskId, VmId, VolumeId},
    vmm_role::{
        protocol::{self, BringFlow, BringState, FetchState, GuestState, Resume, Save, StateFlow, Status},
        saved::PIECE,
    },
};

/// Writes to, and reads from, a volume under way at a time.
const UNDER_WAY: usize = 8;
/// How often a task is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked whether a guest is made.
const LOOK: Duration = Duration::from_millis(20);
/// How long a guest may take to be made once it has all of its state.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a resumed guest's agent is waited for, so that it sets the guest's clock.
const AGENT_PATIENCE: Duration = Duration::from_secs(60);
/// Pause before a question is asked once more: of an agent that is not there, or a cluster that does not answer.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// A run that is to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saving {
    pub(super) vm: VmId,
    pub(super) epoch: RunEpoch,
    pub(super) volume: VolumeId,
    pub(super) generation: Generation,
    pub(super) memory_bytes: u64,
    pub(super) task: Option<TaskId>,
}

/// Why a run was not written.
enum Unsaved {
    /// It is too early, or nobody wants it any more.
    NotNow(ActionError),
    /// It did not work; the run is to go on.
    Failed(String),
}

type Writes = FuturesUnordered<BoxFuture<'static, Result<(), CallError>>>;

fn unwritten(error: CallError) -> Unsaved {
    Unsaved::Failed(format!("its volume cannot be written: {error}"))
}

impl Tools {
    /// Writes a run and tells the cluster, or that it was not. It is not tried twice: the guest is held meanwhile.
    pub(super) async fn save_vm(&self, saving: Saving) -> Result<(), ActionError> {
        let Saving { vm, epoch, generation, .. } = saving;
        let began = Instant::now();
        let op = match self.write_state(saving).await {
            Ok((bytes, processor)) => {
                let took_ms = began.elapsed().as_millis();
                tracing::info!(%vm, epoch = epoch.0, bytes, took_ms, "wrote the state of a VM");
                Op::VmSuspended { vm, epoch, generation, bytes, processor }
            }
            Err(Unsaved::NotNow(error)) => return Err(error),
            Err(Unsaved::Failed(detail)) => {
                tracing::warn!(%vm, epoch = epoch.0, detail, "cannot write the state of a VM");
                let next = "remove the cause, then suspend it again: hci vm suspend".to_owned();
                Op::SuspensionFailed { vm, epoch, error: TaskError { detail, next } }
            }
        };
        let told = self.propose(op).await;
        if let Err(ActionError::Propose(ProposeError::Unavailable(_))) = &told {
            self.raise_generation(saving).await;
        }
        told.map(drop)
    }

    /// Whether what was told is committed, or will be, is not known, and the volume must not be written again if it is. What was told counts under
    /// the volume's present generation only: it is raised, whatever became of the other command. Returns when it is.
    async fn raise_generation(&self, Saving { volume, generation, .. }: Saving) {
        loop {
            let unreachable = lost_nodes(&self.cluster.state().borrow());
            let op = Op::OpenVolume { volume, node: self.me, expected: generation, unreachable };
            match self.propose(op).await {
                Err(ActionError::Propose(ProposeError::Unavailable(_))) => {
                    tokio::time::sleep(ASK_AGAIN).await
                }
                // Or somebody else has raised it, or the volume is gone.
                _ => return,
            }
        }
    }

    /// Whether the run is still to be written, under the generation that its volume had.
    fn check_wanted(&self, saving: Saving) -> Result<(), Unsaved> {
        let state = self.cluster.state().borrow().clone();
        let is_saved = state.vms.get(&saving.vm).is_some_and(|vm| vm.saving() == Some(saving.epoch));
        if !is_saved {
            return Err(Unsaved::NotNow(ActionError::NotYet(
                "the VM is not to be suspended any more".to_owned(),
            )));
        }
        match state.volumes.get(&saving.volume) {
            Some(volume) if volume.generation == saving.generation => Ok(()),
            _ => Err(Unsaved::Failed("its volume was opened anew meanwhile".to_owned())),
        }
    }

    async fn write_state(&self, saving: Saving) -> Result<(u64, Processor), Unsaved> {
        let processor = Processor::of_host().map_err(|error| Unsaved::Failed(error.to_string()))?;
        let socket = self.paths.vm(saving.vm).socket();
        protocol::call(&socket, &Save).await.map_err(|error| match vmm(error) {
            ActionError::NotYet(why) => Unsaved::NotNow(ActionError::NotYet(why)),
            error => Unsaved::Failed(error.to_string()),
        })?;
        let (mut at, mut writes, mut told) = (0, Writes::new(), Instant::now());
        loop {
            self.check_wanted(saving)?;
            let fetched = protocol::exchange(&socket, &FetchState { at }, Bytes::new()).await;
            let (flow, piece) = fetched.map_err(|error| Unsaved::Failed(vmm_text(error)))?;
            if flow == StateFlow::End {
                break;
            }
            if writes.len() == UNDER_WAY
                && let Some(written) = writes.next().await
            {
                written.map_err(unwritten)?;
            }
            let (data, to) = (self.data.clone(), VolumeWrite { volume: saving.volume.into(), offset: at });
            at += piece.len() as u64;
            writes.push(async move { data.write(to, whole_blocks(piece)).await }.boxed());
            if told.elapsed() >= TELL_EVERY {
                self.tell_progress(saving, at).await;
                told = Instant::now();
            }
        }
        while let Some(written) = writes.next().await {
            written.map_err(unwritten)?;
        }
        self.data.flush(VolumeFlush { volume: saving.volume.into() }).await.map_err(unwritten)?;
        self.check_wanted(saving)?;
        Ok((at, processor))
    }

    async fn tell_progress(&self, saving: Saving, at: u64) {
        let Some(task) = saving.task else { return };
        let permille =
            u16::try_from(at.saturating_mul(1000) / saving.memory_bytes.max(1)).unwrap_or(999).min(999);
        let message = format!("wrote {} MiB", at >> 20);
        // It is told again in a moment.
        let _ = self.propose(Op::UpdateTask { task, permille, message }).await;
    }

    /// Makes a run go on with what was written. Its processors run when this returns.
    pub(super) async fn restore_vm(
        &self,
        vm: VmId,
        epoch: RunEpoch,
        volume: VolumeId,
        bytes: u64,
    ) -> Result<(), ActionError> {
        let socket = self.paths.vm(vm).socket();
        let began = Instant::now();
        let mut brought = None;
        loop {
            let status = protocol::call(&socket, &Status).await.map_err(vmm)?;
            if status.epoch != epoch {
                return Err(ActionError::NotYet("another run answers".to_owned()));
            }
            match status.guest {
                GuestState::Restoring(taken) if taken < bytes => {
                    self.bring_state(vm, volume, taken, bytes).await?;
                    brought = Some(Instant::now());
                }
                GuestState::Restoring(_) | GuestState::Starting => {
                    let since = *brought.get_or_insert_with(Instant::now);
                    if since.elapsed() > PATIENCE {
                        return Err(ActionError::NotYet("the guest is not made yet".to_owned()));
                    }
                    tokio::time::sleep(LOOK).await;
                }
                GuestState::Paused | GuestState::Running => break,
            }
        }
        // Now or never: what this run does cannot be undone.
        self.propose(Op::SuspensionUsed { vm, epoch }).await?;
        protocol::call(&socket, &Resume).await.map_err(vmm)?;
        tracing::info!(%vm, epoch = epoch.0, bytes, took_ms = began.elapsed().as_millis(), "a suspended VM goes on");
        self.set_time_later(vm);
        Ok(())
    }

    /// For a guest that was suspended no time has passed; its wall clock is wrong, and its agent sets it when it answers.
    fn set_time_later(&self, vm: VmId) {
        let agents = self.agents.clone();
        let mut aside = self.aside.lock();
        while aside.try_join_next().is_some() {}
        aside.spawn(async move {
            let deadline = Instant::now() + AGENT_PATIENCE;
            while let Err(AgentFailure::Away) = agents.ask(vm, Request::SetTime).await
                && Instant::now() < deadline
            {
                tokio::time::sleep(ASK_AGAIN).await;
            }
        });
    }

    async fn bring_state(
        &self,
        vm: VmId,
        volume: VolumeId,
        from: u64,
        bytes: u64,
    ) -> Result<(), ActionError> {
        let socket = self.paths.vm(vm).socket();
        let mut pieces = stream::iter((from..bytes).step_by(PIECE))
            .map(|offset| {
                let length = (bytes - offset).min(PIECE as u64);
                let (data, whole) = (self.data.clone(), length.next_multiple_of(BLOCK_BYTES));
                let range = VolumeRead { volume: volume.into(), offset, length: whole as u32 };
                async move { (offset, length as usize, data.read(range).await) }
            })
            .buffered(UNDER_WAY);
        while let Some((at, length, read)) = pieces.next().await {
            let piece = read.map_err(ActionError::Data)?;
            let piece = piece.slice(..length.min(piece.len()));
            let flow = if at + piece.len() as u64 >= bytes { BringFlow::Last } else { BringFlow::More };
            protocol::exchange(&socket, &BringState { at, flow }, piece).await.map_err(vmm)?;
        }
        Ok(())
    }
}

/// Volumes are written in whole blocks.
fn whole_blocks(piece: Bytes) -> Bytes {
    let whole = piece.len().next_multiple_of(BLOCK_BYTES as usize);
    if whole == piece.len() {
        return piece;
    }
    let mut padded = BytesMut::from(piece);
    padded.resize(whole, 0);
    padded.freeze()
}
