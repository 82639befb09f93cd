//! The rules: what each command does, and when it is refused.
//!
//! Every function checks first and changes afterwards, so that a refusal leaves the state as it was.

mod cloud_init;
mod cluster;
mod devices;
mod disks;
mod exports;
mod images;
mod migration;
mod networks;
mod renewal;
mod replicas;
mod scrubs;
mod snapshots;
mod storage;
mod suspension;
mod tasks;
mod vms;

pub use cluster::check_join_token;

use super::{ClusterState, Command, Goal, Op, Outcome, Refusal, RefusalKind, StopMode, Subject};

/// What a command that was accepted did.
pub(super) struct Applied {
    pub(super) kind: &'static str,
    pub(super) subject: Subject,
    pub(super) name: String,
    pub(super) goal: Goal,
    pub(super) outcome: Outcome,
}

impl Applied {
    fn now(kind: &'static str, subject: Subject, name: impl Into<String>) -> Self {
        Self { kind, subject, name: name.into(), goal: Goal::Applied, outcome: Outcome::Done }
    }

    fn until(mut self, goal: Goal) -> Self {
        self.goal = goal;
        self
    }

    fn answer(mut self, outcome: Outcome) -> Self {
        self.outcome = outcome;
        self
    }
}

pub(super) fn apply(state: &mut ClusterState, command: &Command) -> Result<Applied, Refusal> {
    let at = command.at;
    if state.cluster.is_none() && !matches!(command.op, Op::CreateCluster { .. }) {
        return Err(Refusal::new(
            RefusalKind::Conflict,
            "there is no cluster yet",
            "create one: hci cluster create NAME",
        ));
    }
    match &command.op {
        Op::CreateCluster { cluster, node, admin, join } => {
            cluster::create(state, cluster, node, admin, join.as_ref(), at)
        }
        Op::AddNode { node, token } => cluster::add_node(state, node, *token, at),
        Op::SetNodeAddresses { node, addresses } => cluster::set_addresses(state, *node, *addresses),
        Op::SetAvailability { node, availability } => {
            cluster::set_availability(state, *node, *availability, at)
        }
        Op::CreateToken(token) => cluster::create_token(state, token),
        Op::RevokeToken(token) => cluster::revoke_token(state, *token),

        Op::AddDisk { disk, node, path, wipe, key_salt } => {
            disks::add_disk(state, *disk, *node, path, *wipe, *key_salt, at)
        }
        Op::DiskReady { disk, store, capacity_bytes } => {
            disks::disk_ready(state, *disk, store, *capacity_bytes, at)
        }
        Op::AbortDisk { disk, error } => disks::abort_disk(state, *disk, error, at),
        Op::SetDiskHealth { disk, failed } => disks::set_disk_health(state, *disk, failed.as_deref(), at),

        Op::CreateVolume { volume, near, unreachable } => {
            storage::create_volume(state, volume, *near, unreachable, at)
        }
        Op::DeleteVolume(volume) => storage::delete_volume(state, *volume),
        Op::VolumePurged { volume, disks } => storage::volume_purged(state, *volume, disks),
        Op::OpenVolume { volume, node, expected, unreachable } => {
            storage::open_volume(state, *volume, *node, *expected, unreachable, at)
        }
        Op::VolumeOpened { volume, generation } => storage::volume_opened(state, *volume, *generation),
        Op::CloseVolume { volume, generation, cleanliness } => {
            storage::close_volume(state, *volume, *generation, *cleanliness)
        }
        Op::ReplicasOut { volume, generation, disk, reason } => {
            storage::replicas_out(state, *volume, *generation, *disk, reason, at)
        }
        Op::ReplicaIn { volume, generation, segment, disk, departures } => {
            storage::replica_in(state, *volume, *generation, *segment, *disk, *departures, at)
        }
        Op::VolumeFilled { volume, generation } => storage::volume_filled(state, *volume, *generation),

        Op::CreateImage { image, name, cmdline, parts } => {
            images::create(state, *image, name, cmdline, parts, at)
        }
        Op::BeginImagePart { image, part, node, volume, file, unreachable } => images::begin_part(
            state,
            command.task,
            *image,
            *part,
            *node,
            volume.as_ref(),
            *file,
            unreachable,
            at,
        ),
        Op::CompleteImagePart { image, part, node } => images::complete_part(state, *image, *part, *node, at),
        Op::FailImagePart { image, part, node, error } => {
            images::fail_part(state, *image, *part, *node, error, at)
        }
        Op::FetchImagePart { image, part, node, source } => {
            images::fetch_part(state, command.task, *image, *part, *node, source)
        }
        Op::BeginExport { export, volume, snapshot, node } => {
            exports::begin(state, *export, *volume, *snapshot, *node, at)
        }
        Op::EndExport(export) => exports::end(state, *export),
        Op::DeleteImage(image) => images::delete(state, *image, at),

        Op::AttachDisk { vm, disk, unreachable } => devices::attach_disk(state, *vm, disk, unreachable, at),
        Op::AttachNic { vm, port } => devices::attach_nic(state, *vm, port),
        Op::DetachDevice { vm, device, then } => devices::detach(state, *vm, *device, *then),
        Op::DeviceJoined { vm, epoch, device } => devices::joined(state, *vm, *epoch, *device, at),
        Op::DeviceLeft { vm, epoch, device } => devices::left(state, *vm, *epoch, *device, at),
        Op::VmReshaped { vm, epoch, shape } => devices::reshaped(state, *vm, *epoch, *shape, at),

        Op::CreateNetwork { network, name, subnet, gateway, mtu, dns, domain } => {
            networks::create(state, *network, name, *subnet, *gateway, *mtu, dns, domain, at)
        }
        Op::DeleteNetwork(network) => networks::delete(state, *network),

        Op::CreateVm { vm, unreachable } => vms::create(state, vm, unreachable, at),
        Op::SetVm { vm, change } => vms::set(state, *vm, *change),
        Op::SetVmDesired { vm, desired } => vms::set_desired(state, *vm, *desired, at),
        Op::RestartVm(vm) => vms::restart(state, *vm, StopMode::Graceful),
        Op::DeleteVm(vm) => vms::delete(state, *vm),
        Op::AssignVm { vm, node, expected, reason, unreachable } => {
            vms::assign(state, *vm, *node, *expected, *reason, unreachable, at)
        }
        Op::PauseVm(vm) => suspension::pause(state, *vm, at),
        Op::ResumeVm(vm) => suspension::resume(state, *vm, at),
        Op::SuspendVm { vm, volume, unreachable } => {
            suspension::begin(state, command.task, *vm, volume, unreachable, at)
        }
        Op::VmSuspended { vm, epoch, generation, bytes, processor } => {
            suspension::written(state, *vm, *epoch, *generation, *bytes, processor, at)
        }
        Op::SuspensionFailed { vm, epoch, error } => suspension::failed(state, *vm, *epoch, error, at),
        Op::SuspensionUsed { vm, epoch } => suspension::used(state, *vm, *epoch, at),
        Op::DiscardSuspension { vm, desired } => suspension::discard(state, *vm, *desired, at),
        Op::MigrateVm { vm, to, terms } => migration::begin(state, command.task, *vm, *to, *terms, at),
        Op::VmArrived { vm, epoch } => migration::arrived(state, *vm, *epoch, at),
        Op::MigrationFailed { vm, epoch, error } => migration::failed(state, *vm, *epoch, error, at),
        Op::CancelMigration(vm) => migration::cancel(state, *vm, at),
        Op::RenewVm(vm) => renewal::begin(state, *vm),
        Op::RenewalEnded { vm, epoch, error } => renewal::ended(state, *vm, *epoch, error.as_ref(), at),
        Op::StoreVariables { vm, epoch, variables } => vms::store_variables(state, *vm, *epoch, variables),
        Op::VmExited { vm, epoch, exit } => vms::exited(state, *vm, *epoch, exit, at),

        Op::UpdateTask { task, permille, message } => tasks::update(state, *task, *permille, message),
        Op::FinishTask { task, error } => tasks::finish(state, *task, error.as_ref(), at),
        Op::Note { severity, kind, subject, message } => {
            state.note(at, *severity, kind, subject.clone(), message.clone());
            Ok(Applied::now("note", subject.clone(), ""))
        }

        Op::AddReplica { volume, segment, disk, replaces } => {
            replicas::add(state, *volume, *segment, *disk, *replaces)
        }
        Op::ReplicaLeft { volume, generation, segment, disk } => {
            replicas::left(state, *volume, *generation, *segment, *disk)
        }
        Op::RemoveReplica { volume, segment, disk } => replicas::remove(state, *volume, *segment, *disk),
        Op::ReplicasReleased { volume, generation, disk, segments } => {
            replicas::released(state, *volume, *generation, *disk, segments)
        }
        Op::ReplicasPurged { volume, disk, segments, layers } => {
            replicas::purged(state, *volume, *disk, segments, layers)
        }

        Op::SetPoolPolicy(policy) => disks::set_policy(state, *policy, at),
        Op::ScrubDisk(disk) => disks::scrub(state, *disk),
        Op::NoteVerified { disk, verified } => scrubs::note(state, *disk, *verified, at),
        Op::SetDiskService { disk, service } => disks::set_service(state, *disk, *service, at),
        Op::SetDiskRoom { disk, room } => disks::set_room(state, *disk, *room, at),
        Op::RemoveDisk(disk) => disks::remove(state, *disk, at),
        Op::SetNodeRack { node, rack } => cluster::set_rack(state, *node, rack.as_deref()),
        Op::SetNodeService { node, service } => cluster::set_service(state, *node, *service, at),
        Op::RemoveNode(node) => cluster::remove_node(state, *node, at),

        Op::SetVolume { volume, change, unreachable } => {
            storage::set_volume(state, *volume, change, unreachable)
        }
        Op::GrowVolume { volume, size_bytes, unreachable } => {
            storage::grow_volume(state, *volume, *size_bytes, unreachable, at)
        }
        Op::ResetVm(vm) => vms::restart(state, *vm, StopMode::Force),

        Op::TakeSnapshot { freeze, name, volumes } => snapshots::take(state, *freeze, name, volumes, at),
        Op::FreezeProgress { volume, generation, freeze, step } => {
            snapshots::progress(state, *volume, *generation, *freeze, *step, at)
        }
        Op::AbandonFreeze(freeze) => snapshots::abandon(state, *freeze, at),
        Op::DeleteSnapshot { volume, snapshot } => snapshots::delete(state, *volume, *snapshot),
        Op::RestoreSnapshot { volume, snapshot } => snapshots::restore(state, *volume, *snapshot, at),
        Op::CloneVolume { volume, name, source, snapshot } => {
            snapshots::clone(state, *volume, name, *source, *snapshot, at)
        }
        Op::LayerMerged { volume, generation, layer } => {
            snapshots::merged(state, *volume, *generation, *layer)
        }
        Op::LayerReleased { volume, generation, layer } => {
            snapshots::released(state, *volume, *generation, *layer)
        }
        Op::LayerPurged { layer, disk } => snapshots::purged(state, *layer, *disk),
    }
}

/// Longest name of anything.
pub const MAX_NAME: usize = 63;

/// Names are used as host names, file names and path elements of the API: letters, digits and inner hyphens or dots.
fn check_name(what: &str, name: &str) -> Result<(), Refusal> {
    let fine = !name.is_empty()
        && name.len() <= MAX_NAME
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.ends_with(|last: char| last.is_ascii_alphanumeric())
        && name.parse::<uuid::Uuid>().is_err();
    if fine {
        return Ok(());
    }
    Err(Refusal::new(
        RefusalKind::Invalid,
        format!("{name:?} is no name for a {what}"),
        format!(
            "use 1 to {MAX_NAME} letters, digits, hyphens and dots, with a letter or digit at both ends, and no id"
        ),
    ))
}

fn check_free<'a>(
    what: &str,
    name: &str,
    mut taken: impl Iterator<Item = &'a String>,
) -> Result<(), Refusal> {
    if taken.any(|other| other == name) {
        return Err(Refusal::new(
            RefusalKind::Taken,
            format!("there is a {what} named {name} already"),
            format!("choose another name, or see it: hci {what} get {name}"),
        ));
    }
    Ok(())
}

fn not_found(what: &str, id: impl std::fmt::Display) -> Refusal {
    Refusal::new(
        RefusalKind::NotFound,
        format!("there is no {what} {id}"),
        format!("see what there is: hci {what} list"),
    )
}

fn invalid(detail: impl Into<String>, next: impl Into<String>) -> Refusal {
    Refusal::new(RefusalKind::Invalid, detail, next)
}

fn conflict(detail: impl Into<String>, next: impl Into<String>) -> Refusal {
    Refusal::new(RefusalKind::Conflict, detail, next)
}
