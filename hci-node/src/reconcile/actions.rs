//! Does what was planned. Each action runs as a task of its own and may fail or be cut off anywhere: the planner sees
//! what is still missing and asks for it again.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use netfabric::rpc::{CallError, ErrorCode};
use parking_lot::Mutex;
use storage::KeySalt;
use tokio::{sync::Notify, task::JoinSet};

use super::{
    boot_files,
    cluster::{Cluster, ProposeError},
    machine::Adaptation,
    observed::Vcpus,
    peers::{self, HasBootFile, Holding},
    plan::Action,
    renewing::Renewed,
    saved::Saving,
    variables,
    vm_process::{self, Contents, Log},
};
use crate::{
    agent::{self, Agents},
    cloud_init,
    data::{
        client::{DataClient, SLOW},
        protocol::{
            CopyVolume, DataInstance, DeleteParts, DeleteVolume, FormatDisk, NodeSecret, VolumeFlush, Wipe,
        },
    },
    paths::NodePaths,
    state::{
        BootFile, DiskId, Generation, ImageId, ImagePart, LayerRef, NodeId, Op, Outcome, RunEpoch,
        SegmentIndex, TaskError, VmId, VolumeId, WipePolicy,
    },
    vmm_role::record::{self, Begin, Ended, ExitRecord, RunFile},
};

/// A copy between volumes is asked for in pieces of this size.
const COPY_PIECE: u64 = 64 << 20;
/// Segments of a layer that are removed in one step.
const PARTS_AT_ONCE: usize = 256;
/// Making a file system on a slow disk takes a while.
const PREPARE_DEADLINE: Duration = Duration::from_secs(300);

/// What actions need.
#[derive(Clone)]
pub(super) struct Tools {
    pub(super) me: NodeId,
    pub(super) paths: NodePaths,
    pub(super) cluster: Arc<dyn Cluster>,
    pub(super) data: DataClient,
    /// Told when a VMM that was started here has ended.
    pub(super) vm_ended: Arc<Notify>,
    /// The agents in the guests.
    pub(super) agents: Agents,
    /// What goes on when an action has come to its end. It ends with the reconciler.
    pub(super) aside: Arc<Mutex<JoinSet<()>>>,
}

/// What the reconciler has to remember of an action that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remember {
    /// Nothing: the next look shows it.
    Nothing,
    /// This generation was opened for that instance of the data process.
    Granted(DataInstance, VolumeId, Generation),
    /// The power button of that run was pressed.
    Pressed(VmId, RunEpoch),
    /// That was done with the processors of that run.
    Vcpus(VmId, RunEpoch, Vcpus),
}

/// Why an action did not succeed. It is tried again.
#[derive(Debug, thiserror::Error)]
pub(super) enum ActionError {
    /// The cluster did not commit it.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// The data process did not do it.
    #[error("data process: {0}")]
    Data(#[source] CallError),
    /// The VMM did not do it.
    #[error("VMM: {0}")]
    Vmm(#[source] CallError),
    /// A file of the VM cannot be read, written or removed, or its process not started or ended.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A boot file did not come.
    #[error(transparent)]
    Fetch(#[from] boot_files::FetchError),
    /// Other nodes do not have a boot file yet.
    #[error("{0}")]
    NotYet(String),
}

/// A VMM that is just making its guest is asked again.
pub(super) fn vmm(error: CallError) -> ActionError {
    match error {
        CallError::Remote(error) if error.code == ErrorCode::Unavailable => {
            ActionError::NotYet(error.message)
        }
        error => ActionError::Vmm(error),
    }
}

/// For people who wait. What a VMM says is about its guest, and needs no more words.
pub(super) fn vmm_text(error: CallError) -> String {
    match error {
        CallError::Remote(error) if error.code == ErrorCode::Refused => error.message,
        error => format!("its VMM: {error}"),
    }
}

pub(super) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> ActionError {
    move |source| ActionError::Io { what, source }
}

impl Tools {
    pub(super) async fn propose(&self, op: Op) -> Result<Outcome, ActionError> {
        Ok(self.cluster.propose(op).await?)
    }

    /// Removes segments in layers from a disk of this node.
    async fn delete(&self, disk: DiskId, parts: Vec<(LayerRef, SegmentIndex)>) -> Result<(), ActionError> {
        let key = |(layer, segment): (LayerRef, SegmentIndex)| {
            storage::ids::LayerRef::from(layer).key(storage::ids::SegmentIndex(segment.0))
        };
        let delete = DeleteParts { disk: disk.into(), parts: parts.into_iter().map(key).collect() };
        self.data.call(&delete, SLOW).await.map_err(ActionError::Data)
    }

    /// Does it. `instance` is the data process that the action was planned for.
    pub(super) async fn perform(
        self,
        action: Action,
        instance: Option<DataInstance>,
    ) -> Result<Remember, ActionError> {
        match action {
            Action::OpenVolume { volume, expected, unreachable } => {
                let op = Op::OpenVolume { volume, node: self.me, expected, unreachable };
                match (self.propose(op).await?, instance) {
                    (Outcome::Volume(opened), Some(instance)) => {
                        return Ok(Remember::Granted(instance, volume, opened.generation));
                    }
                    _ => return Ok(Remember::Nothing),
                }
            }
            Action::CloseVolume { volume, generation, cleanliness } => {
                self.propose(Op::CloseVolume { volume, generation, cleanliness }).await?;
            }
            Action::FillVolume { volume, generation, source, size_bytes } => {
                self.fill(volume, generation, source, size_bytes).await?;
            }
            Action::PurgeVolume { volume, disks } => {
                let delete = DeleteVolume { volume: volume.into() };
                self.data.call(&delete, SLOW).await.map_err(ActionError::Data)?;
                self.propose(Op::VolumePurged { volume, disks }).await?;
            }
            Action::ReleaseReplicas { volume, generation, disk, segments } => {
                self.propose(Op::ReplicasReleased { volume, generation, disk, segments }).await?;
            }
            Action::PurgeReplicas { volume, disk, segments, layers, parts } => {
                self.delete(disk, parts).await?;
                self.propose(Op::ReplicasPurged { volume, disk, segments, layers }).await?;
            }
            Action::ReleaseLayer { volume, generation, layer } => {
                self.propose(Op::LayerReleased { volume, generation, layer }).await?;
            }
            Action::PurgeLayer { layer, disk, segments } => {
                let segments: Vec<_> = (0..segments).map(|segment| (layer, SegmentIndex(segment))).collect();
                for parts in segments.chunks(PARTS_AT_ONCE) {
                    self.delete(disk, parts.to_vec()).await?;
                }
                self.propose(Op::LayerPurged { layer, disk }).await?;
            }
            Action::PrepareDisk { disk, path, wipe, key_salt, secret } => {
                self.prepare_disk(disk, path, wipe, key_salt, secret).await?;
            }
            Action::ReportDisk { disk, failed } => {
                self.propose(Op::SetDiskHealth { disk, failed }).await?;
            }
            Action::FetchBootFile { file, from } => {
                boot_files::fetch(self.cluster.as_ref(), &self.paths, file, &from).await?;
                tracing::info!(file = %file.hash, bytes = file.size_bytes, "fetched a boot file");
            }
            Action::RemoveBootFile { file } => {
                boot_files::remove(&self.paths, file).map_err(io("remove a boot file"))?;
            }
            Action::SpreadBootFile { image, part, file, to } => self.spread(image, part, file, to).await?,
            Action::StartVm { vm, epoch, config, cloud_init, firmware, begin } => {
                let seed = cloud_init.map(|given| cloud_init::disk(vm, &config.name, &given));
                let variables = firmware.map(|kept| kept.content());
                let contents = Contents { seed, variables };
                self.start_vm(RunFile { vm, epoch, config: *config, begin }, &contents).await?;
                if begin == Begin::Boot {
                    return Ok(Remember::Vcpus(vm, epoch, Vcpus::Running));
                }
            }
            Action::SetVcpus { vm, epoch, to } => {
                vm_process::set_vcpus(&self.paths.vm(vm), to).await.map_err(vmm)?;
                return Ok(Remember::Vcpus(vm, epoch, to));
            }
            Action::SaveVm { vm, epoch, volume, generation, memory_bytes, task } => {
                self.save_vm(Saving { vm, epoch, volume, generation, memory_bytes, task }).await?;
            }
            Action::RestoreVm { vm, epoch, volume, bytes } => {
                self.restore_vm(vm, epoch, volume, bytes).await?;
                return Ok(Remember::Vcpus(vm, epoch, Vcpus::Running));
            }
            Action::MigrateVm { vm, migration } => self.migrate_vm(vm, migration).await?,
            Action::RenewVm { vm, epoch, config, vcpus } => {
                self.renew_vm(Renewed { vm, epoch, config: *config, vcpus }).await?;
            }
            Action::AdaptVm { vm, epoch, join, leave, shape } => {
                self.adapt(Adaptation { vm, epoch, join, leave, shape }).await?;
            }
            Action::PressPowerButton { vm, epoch } => {
                self.shut_down(vm).await?;
                return Ok(Remember::Pressed(vm, epoch));
            }
            Action::KillVm { vm, epoch, why } => {
                tracing::info!(%vm, epoch = epoch.0, ?why, "killing a VM");
                vm_process::kill(&self.paths.vm(vm), epoch, why).await.map_err(io("kill the VMM"))?;
            }
            Action::ReportExit { vm, epoch, exit } => {
                // What it stored last must not be lost with the run.
                variables::store(self.cluster.as_ref(), &self.paths, vm, epoch).await?;
                self.propose(Op::VmExited { vm, epoch, exit }).await?;
            }
            Action::ForgetRun { vm, .. } => {
                let there = self.cluster.state().borrow().vms.contains_key(&vm);
                let log = if there { Log::Keep } else { Log::Remove };
                vm_process::forget(&self.paths.vm(vm), log).map_err(io("remove the records of a VM"))?;
            }
        }
        Ok(Remember::Nothing)
    }

    async fn fill(
        &self,
        volume: VolumeId,
        generation: Generation,
        source: VolumeId,
        size_bytes: u64,
    ) -> Result<(), ActionError> {
        let (mut offset, mut written) = (0, 0);
        while offset < size_bytes {
            let length = COPY_PIECE.min(size_bytes - offset);
            let range = CopyVolume { source: source.into(), target: volume.into(), offset, length };
            written += self.data.copy(range).await.map_err(ActionError::Data)?;
            offset += length;
        }
        self.data.flush(VolumeFlush { volume: volume.into() }).await.map_err(ActionError::Data)?;
        tracing::info!(%volume, %source, bytes = written, "filled a volume");
        self.propose(Op::VolumeFilled { volume, generation }).await?;
        Ok(())
    }

    /// By the guest's agent when it answers, which works in guests that do not look at their power button.
    async fn shut_down(&self, vm: VmId) -> Result<(), ActionError> {
        match self.agents.ask(vm, agent::Request::Shutdown).await {
            Ok(_) => {
                tracing::info!(%vm, "the guest's agent shuts it down");
                Ok(())
            }
            Err(failure) => {
                tracing::info!(%vm, %failure, "pressing the power button");
                vm_process::press_power_button(&self.paths.vm(vm)).await.map_err(ActionError::Vmm)
            }
        }
    }

    async fn prepare_disk(
        &self,
        disk: DiskId,
        path: std::path::PathBuf,
        wipe: WipePolicy,
        key_salt: Option<KeySalt>,
        secret: NodeSecret,
    ) -> Result<(), ActionError> {
        let wipe = match wipe {
            WipePolicy::Refuse => Wipe::Refuse,
            WipePolicy::Wipe => Wipe::Everything,
        };
        let shown = path.display().to_string();
        let call = FormatDisk { disk: disk.into(), path, wipe, key_salt, secret };
        let op = match self.data.call(&call, PREPARE_DEADLINE).await {
            Ok(prepared) => Op::DiskReady {
                disk,
                store: prepared.store.display().to_string(),
                capacity_bytes: prepared.capacity_bytes,
            },
            // Refused for good: the operator has to decide.
            Err(CallError::Remote(error)) if error.code == ErrorCode::Refused => Op::AbortDisk {
                disk,
                error: TaskError {
                    next: match wipe {
                        Wipe::Refuse => format!("name another disk, or destroy what is on {shown}: --wipe"),
                        Wipe::Everything => "name another disk: hci disk list".to_owned(),
                    },
                    detail: error.message,
                },
            },
            Err(error) => return Err(ActionError::Data(error)),
        };
        self.propose(op).await?;
        Ok(())
    }

    /// An image's file counts as imported when every node that is there can start a VM with it.
    async fn spread(
        &self,
        image: ImageId,
        part: ImagePart,
        file: BootFile,
        to: Vec<NodeId>,
    ) -> Result<(), ActionError> {
        for node in to {
            let call = HasBootFile { file: file.hash };
            match peers::call(self.cluster.as_ref(), node, &call, Bytes::new()).await {
                Ok((Holding::Complete, _)) => {}
                Ok((Holding::Missing, _)) => {
                    return Err(ActionError::NotYet(format!(
                        "node {node} has not fetched {} yet",
                        file.hash
                    )));
                }
                Err(error) => return Err(ActionError::NotYet(format!("node {node}: {error}"))),
            }
        }
        self.propose(Op::CompleteImagePart { image, part, node: self.me }).await?;
        Ok(())
    }

    async fn start_vm(&self, run: RunFile, contents: &Contents) -> Result<(), ActionError> {
        let (vm, epoch) = (run.vm, run.epoch);
        tracing::info!(%vm, epoch = epoch.0, name = run.config.name, "starting a VM");
        let child = match vm_process::start(&self.paths, &run, contents) {
            Ok(child) => child,
            Err(error) => {
                let ended = Ended::Crashed(format!("its VMM cannot be started: {error}"));
                let paths = self.paths.vm(vm);
                record::write_run_file(&paths.config(), &run).map_err(io("write the VM's run file"))?;
                let record = ExitRecord { epoch, ended };
                return record::write_exit_record(&paths, &record)
                    .map_err(io("record why a VM did not start"));
            }
        };
        self.wait_for(child, vm, epoch);
        Ok(())
    }

    /// Only to be told at once, and to leave no zombie. When this process ends first, nothing is lost.
    pub(super) fn wait_for(&self, mut child: tokio::process::Child, vm: VmId, epoch: RunEpoch) {
        let ended = self.vm_ended.clone();
        tokio::spawn(async move {
            match child.wait().await {
                Ok(status) => tracing::info!(%vm, epoch = epoch.0, %status, "a VMM has ended"),
                Err(error) => tracing::warn!(%vm, %error, "cannot wait for a VMM"),
            }
            ended.notify_one();
        });
    }
}
