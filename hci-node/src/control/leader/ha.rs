//! What the leader has to do next. Pure: state, leases and reports in, commands out.
//!
//! [`Ha::decide`] is asked again after every change and every tick; it proposes what is missing between what is wanted
//! and what is seen. Nothing depends on a message that is sent once, so a new leader goes on where the last one was.
//! What it keeps in memory is only how long to wait before a crashed VM is tried again, and what it has said already.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::{
    pool::{self, Pool},
    scheduler,
};
use crate::{
    control::lease::{LeaderLeases, LeaseStanding},
    state::{
        Assignment, Availability, ClusterState, Command, DesiredRun, DeviceStage, Goal, ImagePart, Migration,
        MigrationTerms, NodeId, NodeService, Op, PartState, ReplicaState, RunEpoch, Severity, Subject, Task,
        TaskError, TaskState, Timestamp, Vm, VmExit, VmId, Volume, VolumeFill,
        command::AssignReason,
        report::{NodeReport, VmReport, VmRunState},
    },
};

/// First and longest pause before a crashed VM is started again.
const CRASH_PAUSE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
struct Crash {
    epoch: RunEpoch,
    again: Instant,
    pause: Duration,
}

/// How often a run is migrated from a node that is emptied before it is restarted elsewhere instead, and the pause in between.
const MOVE_TRIES: u32 = 3;
const MOVE_PAUSE: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug)]
struct Moves {
    tried: u32,
    again: Instant,
}

/// The leader's memory, see the module.
#[derive(Debug, Default)]
pub struct Ha {
    pool: Pool,
    crashes: BTreeMap<VmId, Crash>,
    moves: BTreeMap<VmId, Moves>,
    without_node: BTreeSet<VmId>,
}

/// What one decision looks at.
struct View<'a> {
    state: &'a ClusterState,
    at: Timestamp,
    now: Instant,
    live: BTreeMap<NodeId, NodeReport>,
    dead: Vec<NodeId>,
}

impl View<'_> {
    fn is_dead(&self, node: NodeId) -> bool {
        self.dead.contains(&node)
    }

    /// What its node says of a run of a VM.
    fn vm_report(&self, vm: &Vm, run: Assignment) -> Option<&VmReport> {
        let told = &self.live.get(&run.node)?.local.vms;
        told.iter().find(|seen| seen.vm == vm.id && seen.epoch == run.epoch)
    }

    fn command(&self, op: Op) -> Command {
        Command { at: self.at, task: None, op }
    }
}

impl Ha {
    /// The commands that are due now.
    pub fn decide(
        &mut self,
        state: &ClusterState,
        leases: &LeaderLeases,
        now: Instant,
        at: Timestamp,
    ) -> Vec<Command> {
        let live = leases.reports(now);
        let standing = |node: &NodeId| leases.standing(*node, now);
        let dead =
            state.nodes.keys().copied().filter(|node| standing(node) == LeaseStanding::Expired).collect();
        let view = View { state, at, now, live, dead };
        self.crashes.retain(|vm, _| state.vms.contains_key(vm));
        self.moves.retain(|vm, _| state.vms.contains_key(vm));
        self.without_node.retain(|vm| state.vms.contains_key(vm));

        let mut commands = availability(&view);
        for vm in state.vms.values() {
            self.vm(&view, vm, &mut commands);
        }
        for volume in state.volumes.values() {
            fill(&view, volume, &mut commands);
            heal(&view, volume, &mut commands);
        }
        imports(&view, &mut commands);
        exports(&view, &mut commands);
        freezes(&view, &mut commands);
        let pool_view = pool::View { state, live: &view.live, at };
        commands.extend(self.pool.decide(pool_view, now).into_iter().map(|op| view.command(op)));
        for task in state.tasks.values().filter(|task| task.state == TaskState::Running) {
            settle(&view, task, &mut commands);
        }
        commands
    }

    fn vm(&mut self, view: &View<'_>, vm: &Vm, commands: &mut Vec<Command>) {
        if let DesiredRun::Stopped(_) = vm.desired {
            // A node that is dead cannot tell that the VM has ended; its lease does.
            if let Some(run) = vm.assignment.filter(|run| view.is_dead(run.node)) {
                commands.push(view.command(Op::VmExited {
                    vm: vm.id,
                    epoch: run.epoch,
                    exit: VmExit::NodeLost,
                }));
            }
            return;
        }
        let reason = match (vm.assignment, &vm.last_exit) {
            (Some(run), _) if view.is_dead(run.node) => AssignReason::Failover,
            (Some(run), _) => {
                self.without_node.remove(&vm.id);
                if let Some(migration) = vm.migration {
                    commands.extend(lost_target(view, vm, migration));
                    return;
                }
                // It is moved, or suspended, when that has come to its end.
                if vm.renewal.is_some() {
                    return;
                }
                let is_ending = vm.restart.is_some_and(|restart| restart.epoch == run.epoch);
                // What is being suspended, or has not begun yet, cannot be moved: it goes when that has come to its end.
                if is_in_service(view.state, run.node) {
                    self.moves.remove(&vm.id);
                } else if !is_ending && vm.suspension.is_none() {
                    commands.extend(self.move_away(view, vm, run));
                }
                return;
            }
            (None, Some(VmExit::NodeLost)) => AssignReason::Failover,
            (None, Some(VmExit::Crashed(_))) if vm.epoch.0 > 0 => {
                if !self.may_try_again(vm, view.now) {
                    return;
                }
                AssignReason::Crash
            }
            (None, _) => AssignReason::Start,
        };
        let state = vm.suspension.as_ref().map(|suspension| &suspension.volume);
        let disks: Vec<_> =
            vm.disks.iter().chain(state).filter_map(|disk| view.state.volumes.get(disk)).collect();
        if disks.iter().any(|volume| !volume.is_filled()) {
            return;
        }
        // Where its volumes are still open it can start at once; elsewhere only when they are closed.
        let holder = disks.iter().filter_map(|volume| volume.coordinator).find(|node| !view.is_dead(*node));
        match scheduler::choose(view.state, &view.live, vm, holder) {
            Ok(node) => commands.push(view.command(Op::AssignVm {
                vm: vm.id,
                node,
                expected: vm.epoch,
                reason,
                unreachable: view.dead.clone(),
            })),
            // A holder that is not heard of may come back within its lease.
            Err(_) if holder.is_some_and(|node| !view.live.contains_key(&node)) => {}
            // One that is emptied closes them in a moment.
            Err(_) if holder.is_some_and(|node| !is_in_service(view.state, node)) => {}
            Err(why) => self.no_node(view, vm, &why, commands),
        }
    }

    /// A run whose node is emptied: it is migrated, and restarted elsewhere when that has failed too often.
    fn move_away(&mut self, view: &View<'_>, vm: &Vm, run: Assignment) -> Option<Command> {
        let moves = self.moves.entry(vm.id).or_insert(Moves { tried: 0, again: view.now });
        if view.now < moves.again {
            return None;
        }
        let op = match scheduler::choose_other(view.state, &view.live, vm, run, None) {
            Ok(to) if moves.tried < MOVE_TRIES => {
                moves.tried += 1;
                Op::MigrateVm { vm: vm.id, to, terms: MigrationTerms::default() }
            }
            // Nowhere to migrate to, or not for long enough; a run that is made anew may still find a node.
            _ => {
                scheduler::choose(view.state, &view.live, vm, None).ok()?;
                Op::RestartVm(vm.id)
            }
        };
        moves.again = view.now + MOVE_PAUSE;
        Some(view.command(op))
    }

    fn may_try_again(&mut self, vm: &Vm, now: Instant) -> bool {
        match self.crashes.get(&vm.id) {
            Some(crash) if crash.epoch == vm.epoch => now >= crash.again,
            earlier => {
                let pause =
                    earlier.map_or(*CRASH_PAUSE.start(), |crash| (crash.pause * 2).min(*CRASH_PAUSE.end()));
                self.crashes.insert(vm.id, Crash { epoch: vm.epoch, again: now + pause, pause });
                false
            }
        }
    }

    /// Says once that a VM finds no node, and again should it find none a second time.
    fn no_node(&mut self, view: &View<'_>, vm: &Vm, why: &str, commands: &mut Vec<Command>) {
        if !self.without_node.insert(vm.id) {
            return;
        }
        commands.push(view.command(Op::Note {
            severity: Severity::Critical,
            kind: "vm-without-node".to_owned(),
            subject: Subject::Vm(vm.id),
            message: format!("VM {} waits for a node: {why}", vm.name),
        }));
        let waiting = |task: &&Task| {
            task.state == TaskState::Running && matches!(task.goal, Goal::VmRuns(id, _) if id == vm.id)
        };
        for task in view.state.tasks.values().filter(waiting) {
            let message = format!("waits for a node: {why}");
            commands.push(view.command(Op::UpdateTask { task: task.id, permille: 0, message }));
        }
    }
}

/// A migration to a node that is dead ends: nobody there can say so.
fn lost_target(view: &View<'_>, vm: &Vm, migration: Migration) -> Option<Command> {
    view.is_dead(migration.to).then(|| {
        let node = view.state.subject_name(&Subject::Node(migration.to));
        let error = TaskError {
            detail: format!("node {node} was lost"),
            next: format!("choose another one: hci vm migrate {}", vm.name),
        };
        view.command(Op::MigrationFailed { vm: vm.id, epoch: migration.epoch, error })
    })
}

fn is_in_service(state: &ClusterState, node: NodeId) -> bool {
    state.nodes.get(&node).is_some_and(|node| node.service == NodeService::InService)
}

fn availability(view: &View<'_>) -> Vec<Command> {
    let mut commands = Vec::new();
    for node in view.state.nodes.values() {
        let change = match node.availability {
            Availability::Available if view.is_dead(node.id) => Availability::Lost { since: view.at },
            Availability::Lost { .. } if view.live.contains_key(&node.id) => Availability::Available,
            _ => continue,
        };
        commands.push(view.command(Op::SetAvailability { node: node.id, availability: change }));
    }
    commands
}

/// A volume that starts as a copy is opened on one live node, then its source beside it; that node copies.
fn fill(view: &View<'_>, volume: &Volume, commands: &mut Vec<Command>) {
    let VolumeFill::CopyOf(source) = volume.fill else { return };
    let Some(source) = view.state.volumes.get(&source) else { return };
    let free = |volume: &Volume| volume.coordinator.is_none_or(|node| view.is_dead(node));
    let open = |volume: &Volume, node| {
        view.command(Op::OpenVolume {
            volume: volume.id,
            node,
            expected: volume.generation,
            unreachable: view.dead.clone(),
        })
    };
    let here = volume.segments.iter().flat_map(|segment| &segment.replicas).map(|replica| replica.node);
    if free(volume) {
        if let Some(node) = here.into_iter().find(|node| view.live.contains_key(node)) {
            commands.push(open(volume, node));
        }
    } else if let Some(node) = volume.coordinator
        && free(source)
    {
        commands.push(open(source, node));
    }
}

/// A volume that nobody uses but that lacks copies, or has layers to be merged, is opened where a complete one is, so that the others are completed;
/// it is closed when they are.
fn heal(view: &View<'_>, volume: &Volume, commands: &mut Vec<Command>) {
    let is_open = volume.coordinator.is_some_and(|node| !view.is_dead(node));
    if is_open || !view.state.needs_healing(volume) {
        return;
    }
    let complete = volume
        .segments
        .iter()
        .flat_map(|segment| &segment.replicas)
        .filter(|replica| replica.state == ReplicaState::InSync)
        .map(|replica| replica.node)
        .filter(|node| view.live.contains_key(node))
        .min_by_key(|node| !is_in_service(view.state, *node));
    if let Some(node) = complete {
        commands.push(view.command(Op::OpenVolume {
            volume: volume.id,
            node,
            expected: volume.generation,
            unreachable: view.dead.clone(),
        }));
    }
}

/// An import ends with the node that had the upload, or got it.
fn imports(view: &View<'_>, commands: &mut Vec<Command>) {
    for image in view.state.images.values() {
        for (part, state) in &image.parts {
            let (PartState::Importing { node, .. } | PartState::Fetching { node, .. }) = state else {
                continue;
            };
            if view.is_dead(*node) {
                commands.push(view.command(Op::FailImagePart {
                    image: image.id,
                    part: *part,
                    node: *node,
                    error: TaskError {
                        detail: format!(
                            "node {} was lost while it took in the {}",
                            view.state.subject_name(&Subject::Node(*node)),
                            part.name()
                        ),
                        next: format!("import it again: hci image import {}", image.name),
                    },
                }));
            }
        }
    }
}

/// An export ends with its node.
fn exports(view: &View<'_>, commands: &mut Vec<Command>) {
    for (id, export) in &view.state.exports {
        if view.is_dead(export.node) || !view.state.nodes.contains_key(&export.node) {
            commands.push(view.command(Op::EndExport(*id)));
        }
    }
}

/// Longest time in which all volumes of a group must have been frozen: a coordinator that is not heard of holds the others up.
const FREEZE_PATIENCE: i64 = 10;

/// A freeze that does not end is given up.
fn freezes(view: &View<'_>, commands: &mut Vec<Command>) {
    for (id, freeze) in &view.state.freezes {
        if freeze.begun.plus_seconds(FREEZE_PATIENCE) < view.at {
            commands.push(view.command(Op::AbandonFreeze(*id)));
        }
    }
}

enum Verdict {
    Wait,
    Done,
    Failed(TaskError),
}

fn failed(detail: impl Into<String>, next: impl Into<String>) -> Verdict {
    Verdict::Failed(TaskError { detail: detail.into(), next: next.into() })
}

fn settle(view: &View<'_>, task: &Task, commands: &mut Vec<Command>) {
    let verdict = match &task.goal {
        Goal::Applied => Verdict::Done,
        Goal::VmRuns(vm, epoch) => vm_runs(view, *vm, *epoch, task),
        Goal::VmIsStopped(vm) => vm_is_stopped(view, *vm),
        Goal::VmIsPaused(vm, epoch) => vm_is_paused(view, *vm, *epoch, task),
        Goal::VmIsSuspended(vm) => vm_is_suspended(view, *vm, task),
        Goal::VmIsMigrated(vm) => vm_is_migrated(view, *vm, task),
        // Ended by the commands about it; a VM that was deleted has nothing under way.
        Goal::VmIsRenewed(vm) => match view.state.vms.get(vm).and_then(|vm| vm.renewal) {
            Some(_) => Verdict::Wait,
            None => Verdict::Done,
        },
        // Ended by the commands about the disk and the part; what is gone cannot get there any more.
        Goal::DiskReady(disk) if !view.state.disks.contains_key(disk) => {
            failed("the disk is gone", "hci disk list")
        }
        Goal::ImagePartReady(image, part) => part_ready(view, *image, *part),
        // Ended by the commands that remove the disk and the node.
        Goal::DiskReady(_) | Goal::DiskGone { .. } | Goal::NodeGone { .. } => Verdict::Wait,
        // Ended with the freeze.
        Goal::SnapshotTaken(_) => Verdict::Wait,
        Goal::NodeDrained(node) => node_is_drained(view, *node),
        // Ended by the commands about them; a VM that was deleted has nothing under way.
        Goal::DeviceSettled(vm, device) => match view.state.vms.get(vm).and_then(|vm| vm.devices.get(device))
        {
            Some(place) if place.stage != DeviceStage::Present => Verdict::Wait,
            _ => Verdict::Done,
        },
        Goal::VmReshaped(vm) => match view.state.vms.get(vm).and_then(|vm| vm.reshaping) {
            Some(_) => Verdict::Wait,
            None => Verdict::Done,
        },
        Goal::VolumeSettled(volume) => match view.state.volumes.get(volume) {
            Some(volume) if !volume.is_settled() => Verdict::Wait,
            Some(_) => Verdict::Done,
            None => failed(format!("volume {} was deleted", task.subject_name), "hci volume list"),
        },
    };
    let error = match verdict {
        Verdict::Wait => return,
        Verdict::Done => None,
        Verdict::Failed(error) => Some(error),
    };
    commands.push(view.command(Op::FinishTask { task: task.id, error }));
}

fn part_ready(view: &View<'_>, image: crate::state::ImageId, part: ImagePart) -> Verdict {
    match view.state.images.get(&image).and_then(|image| image.parts.get(&part)) {
        Some(PartState::Importing { .. } | PartState::Fetching { .. }) => Verdict::Wait,
        Some(PartState::File(_) | PartState::Volume(_)) => Verdict::Done,
        Some(PartState::Awaiting) | None => {
            failed("the import was given up", "import it again: hci image import")
        }
    }
}

fn node_is_drained(view: &View<'_>, node: NodeId) -> Verdict {
    let has_open = || view.state.volumes_on(node).next().is_some();
    let is_empty = view.state.vms_on(node).next().is_none();
    if is_empty && (view.is_dead(node) || !has_open()) { Verdict::Done } else { Verdict::Wait }
}

fn vm_runs(view: &View<'_>, id: VmId, epoch: RunEpoch, task: &Task) -> Verdict {
    let Some(vm) = view.state.vms.get(&id) else {
        return failed(format!("VM {} was deleted", task.subject_name), "hci vm list");
    };
    if vm.epoch >= epoch && vm.assignment.is_none() {
        match &vm.last_exit {
            Some(VmExit::Crashed(reason)) => {
                return failed(
                    format!("VM {} did not start: {reason}", vm.name),
                    format!("see its console: hci vm console {} --log", vm.name),
                );
            }
            Some(VmExit::GuestShutdown) => return Verdict::Done,
            _ => {}
        }
    }
    if vm.desired != DesiredRun::Running {
        return failed(
            format!("VM {} was stopped meanwhile", vm.name),
            format!("start it: hci vm start {}", vm.name),
        );
    }
    let runs = vm
        .assignment
        .filter(|run| run.epoch >= epoch)
        .is_some_and(|run| view.vm_report(vm, run).is_some_and(|seen| seen.state == VmRunState::Running));
    if runs { Verdict::Done } else { Verdict::Wait }
}

fn vm_is_paused(view: &View<'_>, id: VmId, epoch: RunEpoch, task: &Task) -> Verdict {
    let Some(vm) = view.state.vms.get(&id) else {
        return failed(format!("VM {} was deleted", task.subject_name), "hci vm list");
    };
    if vm.paused != Some(epoch) {
        return failed(
            format!("VM {} was resumed meanwhile, or its run ended", vm.name),
            format!("see it: hci vm get {}", vm.name),
        );
    }
    let seen = vm.assignment.and_then(|run| view.vm_report(vm, run));
    if seen.is_some_and(|seen| seen.state == VmRunState::Paused) { Verdict::Done } else { Verdict::Wait }
}

/// What comes to nothing ends the task itself.
fn vm_is_migrated(view: &View<'_>, id: VmId, task: &Task) -> Verdict {
    let Some(vm) = view.state.vms.get(&id) else {
        return failed(format!("VM {} was deleted", task.subject_name), "hci vm list");
    };
    let Some(run) = vm.assignment.filter(|_| vm.desired == DesiredRun::Running) else { return Verdict::Done };
    let is_there = |seen: &VmReport| matches!(seen.state, VmRunState::Running | VmRunState::Paused);
    let arrived = vm.migration.is_none() && view.vm_report(vm, run).is_some_and(is_there);
    if arrived { Verdict::Done } else { Verdict::Wait }
}

fn vm_is_suspended(view: &View<'_>, id: VmId, task: &Task) -> Verdict {
    let Some(vm) = view.state.vms.get(&id) else {
        return failed(format!("VM {} was deleted", task.subject_name), "hci vm list");
    };
    let Some(suspension) = &vm.suspension else {
        return failed(
            format!("VM {} was resumed meanwhile", vm.name),
            format!("see it: hci vm get {}", vm.name),
        );
    };
    let is_over = vm.saved().is_some_and(|saved| vm.assignment.is_none_or(|run| run.epoch != saved.epoch));
    let mut volumes =
        vm.disks.iter().chain([&suspension.volume]).filter_map(|disk| view.state.volumes.get(disk));
    let resumes = vm.desired == DesiredRun::Running;
    if is_over && (resumes || volumes.all(|volume| is_closed(view, volume))) {
        Verdict::Done
    } else {
        Verdict::Wait
    }
}

fn is_closed(view: &View<'_>, volume: &Volume) -> bool {
    volume.coordinator.is_none_or(|node| view.is_dead(node)) || view.state.needs_healing(volume)
}

fn vm_is_stopped(view: &View<'_>, id: VmId) -> Verdict {
    let Some(vm) = view.state.vms.get(&id) else { return Verdict::Done };
    if vm.desired == DesiredRun::Running {
        return failed(format!("VM {} was started again", vm.name), format!("hci vm get {}", vm.name));
    }
    let mut volumes = vm.disks.iter().filter_map(|disk| view.state.volumes.get(disk));
    if vm.assignment.is_none() && volumes.all(|volume| is_closed(view, volume)) {
        Verdict::Done
    } else {
        Verdict::Wait
    }
}
