//! The leader's decisions, played against the real state.

use std::time::{Duration, Instant};

use super::ha::Ha;
use crate::{
    control::lease::{LEADER_LEASE, LeaderLeases},
    state::{command::*, report::*, testing::*, *},
};

/// A cluster of three with its leader, on a clock of its own.
struct World {
    state: ClusterState,
    ha: Ha,
    leases: LeaderLeases,
    now: Instant,
    runs: Vec<(NodeId, VmReport)>,
    alive: Vec<NodeId>,
    memory: u64,
    /// Features of nodes' processors; 1 when nothing is said.
    processors: std::collections::BTreeMap<NodeId, u64>,
    /// Whether nodes hold the processors of all guests.
    holds: bool,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            state: cluster(3),
            ha: Ha::default(),
            leases: LeaderLeases::new(1, now),
            now,
            runs: vec![],
            alive: (1..=3).map(node_id).collect(),
            memory: 4 << 30,
            processors: Default::default(),
            holds: false,
        }
    }

    fn ask(&mut self, op: Op, task: u128) -> CommandResult {
        self.state.apply(&Command { at: Timestamp(0), task: Some(TaskId(id(task))), op })
    }

    /// Some seconds pass: nodes that live renew and start what is assigned to them, the leader decides.
    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds * 2 {
            self.now += Duration::from_millis(500);
            for node in &self.alive {
                let vms = self.runs.iter().filter(|(at, _)| at == node).map(|(_, run)| run.clone()).collect();
                let report = NodeReport {
                    machine: MachineReport {
                        memory_bytes: self.memory,
                        cpu_models: [vmm::CpuModel::Host].into(),
                        processor: Some(vmm::Processor {
                            vendor: "AuthenticAMD".into(),
                            features: self.processors.get(node).copied().unwrap_or(1),
                        }),
                        ..Default::default()
                    },
                    local: LocalReport { vms, data_process: ProcessState::Up, ..Default::default() },
                    boot_files: vec![],
                };
                self.leases.renewed(*node, report, self.now);
            }
            for command in self.ha.decide(&self.state, &self.leases, self.now, Timestamp(0)) {
                // A refusal is what a leader sees when somebody was faster; it looks again.
                let _ = self.state.apply(&command);
                assert_eq!(invariants::violations(&self.state), Vec::<String>::new());
            }
            self.runs = self
                .state
                .vms
                .values()
                .filter_map(|vm| {
                    let run = vm.assignment?;
                    let state = if self.holds { VmRunState::Paused } else { VmRunState::Running };
                    Some((
                        run.node,
                        VmReport {
                            vm: vm.id,
                            epoch: run.epoch,
                            state,
                            agent: None,
                            executable: Default::default(),
                        },
                    ))
                })
                .collect();
        }
    }

    fn node_of(&self, vm: VmId) -> Option<NodeId> {
        self.state.vms[&vm].assignment.map(|run| run.node)
    }

    fn lose(&mut self, node: NodeId) {
        self.alive.retain(|other| *other != node);
    }
}

fn vm(n: u128) -> (NewVm, VmId) {
    let vm = new_vm(n, vec![new_volume(n, 3)]);
    (vm.clone(), vm.id)
}

#[test]
fn vms_spread_and_their_tasks_end() {
    let mut world = World::new();
    let mut nodes = std::collections::BTreeSet::new();
    for n in 1..=3 {
        let (new, id) = vm(n);
        world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 50 + n).unwrap();
        world.pass(2);
        nodes.insert(world.node_of(id));
        assert_eq!(world.state.tasks[&TaskId(testing::id(50 + n))].state, TaskState::Done);
    }
    assert_eq!(nodes.len(), 3);
}

#[test]
fn a_lost_nodes_vm_runs_elsewhere_within_fifteen_seconds_but_not_before_its_lease_ended() {
    let mut world = World::new();
    let (mut new, vm) = vm(1);
    new.preferred_node = Some(node_id(2));
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    world.pass(2);
    assert_eq!(world.node_of(vm), Some(node_id(2)));
    world.lose(node_id(2));
    world.pass(LEADER_LEASE.as_secs() - 1);
    assert_eq!(world.node_of(vm), Some(node_id(2)), "its lease may still hold");
    world.pass(3);
    let run = world.state.vms[&vm].assignment.unwrap();
    assert_ne!(run.node, node_id(2));
    assert_eq!(run.epoch, RunEpoch(2));
    let kinds: Vec<_> = world.state.events.iter().map(|event| event.kind.as_str()).collect();
    for kind in ["node-lost", "volume-degraded", "vm-restarted"] {
        assert!(kinds.contains(&kind), "{kind} is missing in {kinds:?}");
    }
    world.alive.push(node_id(2));
    world.pass(2);
    assert_eq!(world.state.nodes[&node_id(2)].availability, Availability::Available);
    assert_eq!(world.state.vms[&vm].epoch, RunEpoch(2), "it stays where it is");
}

#[test]
fn a_new_leader_does_not_take_vms_from_nodes_that_have_not_renewed_yet() {
    let mut world = World::new();
    let (new, vm) = vm(1);
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    world.pass(2);
    let before = world.state.vms[&vm].clone();
    world.leases = LeaderLeases::new(2, world.now);
    world.ha = Ha::default();
    let alive = std::mem::take(&mut world.alive);
    world.pass(LEADER_LEASE.as_secs() - 1);
    assert_eq!(world.state.vms[&vm], before);
    world.alive = alive;
    world.pass(5);
    assert_eq!(world.state.vms[&vm], before);
}

#[test]
fn no_capacity_is_said_once_and_tried_until_there_is_some() {
    let mut world = World::new();
    world.memory = 1 << 30;
    let (new, vm) = vm(1);
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    world.pass(5);
    let told = world.state.events.iter().filter(|event| event.kind == "vm-without-node").count();
    assert_eq!((world.node_of(vm), told), (None, 1));
    let task = &world.state.tasks[&TaskId(id(51))];
    assert!(task.message.contains("waits for a node"), "{}", task.message);
    world.memory = 4 << 30;
    world.pass(2);
    assert!(world.node_of(vm).is_some());
}

#[test]
fn a_crashing_vm_is_tried_again_more_and_more_slowly() {
    let mut world = World::new();
    let (new, vm) = vm(1);
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    for _ in 0..120 {
        world.pass(1);
        if let Some(run) = world.state.vms[&vm].assignment {
            let exit = VmExit::Crashed("no kernel".into());
            world.state.apply(&command(Op::VmExited { vm, epoch: run.epoch, exit })).unwrap();
        }
    }
    let runs = world.state.vms[&vm].epoch.0;
    assert!((4..12).contains(&runs), "{runs} runs in two minutes");
}

#[test]
fn stopping_on_a_lost_node_ends_with_its_lease() {
    let mut world = World::new();
    let (new, vm) = vm(1);
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    world.pass(2);
    let node = world.node_of(vm).unwrap();
    world.lose(node);
    world.ask(Op::SetVmDesired { vm, desired: DesiredRun::Stopped(StopMode::Force) }, 52).unwrap();
    world.pass(LEADER_LEASE.as_secs() + 3);
    assert_eq!(world.node_of(vm), None);
    assert_eq!(world.state.tasks[&TaskId(id(52))].state, TaskState::Done);
}

#[test]
fn after_losing_two_of_three_copies_a_vm_waits_for_them() {
    let mut world = World::new();
    let mut new = new_vm(1, vec![new_volume(1, 1)]);
    new.near = Some(node_id(2));
    new.preferred_node = Some(node_id(2));
    let vm = new.id;
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    world.pass(2);
    world.lose(node_id(2));
    world.pass(LEADER_LEASE.as_secs() + 5);
    assert_eq!(world.state.vms[&vm].epoch, RunEpoch(1), "its only copy is gone");
    world.alive.push(node_id(2));
    world.pass(2);
    assert_eq!(world.node_of(vm), Some(node_id(2)));
}

#[test]
fn a_closed_volume_that_lacks_a_copy_is_opened_until_it_has_it() {
    let mut world = World::new();
    let new = new_volume(7, 3);
    let volume = new.id;
    world.ask(Op::CreateVolume { volume: new, near: None, unreachable: vec![] }, 50).unwrap();
    let open =
        |node, expected| Op::OpenVolume { volume, node, expected: Generation(expected), unreachable: vec![] };
    world.ask(open(node_id(1), 0), 51).unwrap();
    let generation = Generation(1);
    let disk = world.state.volumes[&volume].segments[0].replicas[2].disk;
    world.ask(Op::ReplicasOut { volume, generation, disk, reason: "reset".into() }, 52).unwrap();
    let cleanliness = Cleanliness::Clean;
    world.ask(Op::CloseVolume { volume, generation, cleanliness }, 53).unwrap();

    world.pass(1);
    let healing = &world.state.volumes[&volume];
    assert!(healing.coordinator.is_some());
    assert_eq!(world.state.volume_use(healing), VolumeUse::Internal);

    let (generation, departures) = (healing.generation, healing.departures);
    for segment in (0..3).map(SegmentIndex) {
        let back = Op::ReplicaIn { volume, generation, segment, disk, departures };
        world.ask(back, 54 + u128::from(segment.0)).unwrap();
    }
    assert_eq!(world.state.volume_use(&world.state.volumes[&volume]), VolumeUse::Nothing);
    world.ask(Op::CloseVolume { volume, generation, cleanliness }, 60).unwrap();
    world.pass(1);
    assert_eq!(world.state.volumes[&volume].coordinator, None, "a complete volume stays closed");
}

#[test]
fn a_freeze_that_does_not_end_is_given_up_and_layers_are_merged_without_a_user() {
    let mut world = World::new();
    let volume = new_volume(1, 3);
    let id = volume.id;
    world.ask(Op::CreateVolume { volume, near: None, unreachable: vec![] }, 51).unwrap();
    let open = Op::OpenVolume { volume: id, node: node_id(1), expected: Generation(0), unreachable: vec![] };
    world.ask(open, 52).unwrap();
    let volumes = [(id, SnapshotId(testing::id(5000)))].into_iter().collect();
    let freeze = FreezeId(testing::id(6000));
    world.ask(Op::TakeSnapshot { freeze, name: "s1".into(), volumes }, 53).unwrap();
    world.pass(1);
    let decide = |world: &mut World, seconds| {
        let at = Timestamp(0).plus_seconds(seconds);
        world.ha.decide(&world.state, &world.leases, world.now, at)
    };
    assert!(decide(&mut world, 5).iter().all(|command| command.op != Op::AbandonFreeze(freeze)));
    for command in decide(&mut world, 11) {
        world.state.apply(&command).unwrap();
    }
    let task = &world.state.tasks[&TaskId(testing::id(53))];
    assert!(matches!(task.state, TaskState::Failed(_)), "{task:?}");
    assert!(world.state.volumes[&id].layers.snapshots.is_empty());

    // The layer that was put on for nothing goes again: the volume is opened for that.
    let (generation, cleanliness) = (Generation(1), Cleanliness::Clean);
    world.ask(Op::CloseVolume { volume: id, generation, cleanliness }, 54).unwrap();
    world.pass(1);
    let opened = &world.state.volumes[&id];
    assert!(opened.coordinator.is_some() && opened.layers.merge.is_some());
    let (generation, layer) = (opened.generation, opened.layers.merge.unwrap());
    world.ask(Op::LayerMerged { volume: id, generation, layer }, 55).unwrap();
    assert_eq!(world.state.volume_use(&world.state.volumes[&id]), VolumeUse::Nothing);
}

/// Has a VM suspended as its node does, from the request to the end of the run.
fn suspend(world: &mut World, vm: VmId, task: u128) {
    let volume = NewVolume { name: "state".into(), ..new_volume(40, 3) };
    let (id, run) = (volume.id, world.state.vms[&vm].assignment.unwrap());
    world.ask(Op::SuspendVm { vm, volume, unreachable: vec![] }, task).unwrap();
    let processor = vmm::Processor { vendor: "AuthenticAMD".into(), features: 1 };
    let generation = world.state.volumes[&id].generation;
    let written = Op::VmSuspended { vm, epoch: run.epoch, generation, bytes: 1, processor };
    world.state.apply(&command(written)).unwrap();
    world.state.apply(&command(Op::VmExited { vm, epoch: run.epoch, exit: VmExit::Stopped })).unwrap();
    let open: Vec<_> =
        world.state.volumes.values().filter(|volume| volume.coordinator.is_some()).cloned().collect();
    for volume in open {
        let (volume, generation) = (volume.id, volume.generation);
        let close = Op::CloseVolume { volume, generation, cleanliness: Cleanliness::Clean };
        world.state.apply(&command(close)).unwrap();
    }
}

#[test]
fn a_suspended_vm_takes_no_node_until_it_is_resumed_and_then_one_that_can_go_on_with_it() {
    let mut world = World::new();
    let (mut new, vm) = vm(1);
    new.preferred_node = Some(node_id(2));
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    world.pass(2);
    suspend(&mut world, vm, 52);
    world.pass(5);
    assert_eq!(world.node_of(vm), None);
    assert_eq!(world.state.tasks[&TaskId(testing::id(52))].state, TaskState::Done);

    // The node that it prefers has another processor by now.
    world.processors.insert(node_id(2), 2);
    world.ask(Op::ResumeVm(vm), 53).unwrap();
    world.pass(1);
    let first = world.node_of(vm).unwrap();
    assert_ne!(first, node_id(2));
    // Lost before it began: the other one that fits goes on with it.
    world.lose(first);
    world.pass(15);
    let second = world.node_of(vm).unwrap();
    assert!(second != node_id(2) && second != first && world.state.vms[&vm].restoring().is_some());
    let epoch = world.state.vms[&vm].epoch;
    world.state.apply(&command(Op::SuspensionUsed { vm, epoch })).unwrap();
    world.pass(1);
    assert_eq!(world.state.tasks[&TaskId(testing::id(53))].state, TaskState::Done);
    // Lost after it began: it is started anew, wherever.
    world.lose(second);
    world.alive.push(first);
    world.pass(15);
    assert!(world.node_of(vm).is_some() && world.state.vms[&vm].suspension.is_none());
}

#[test]
fn the_task_of_a_pause_ends_when_the_node_says_that_the_processors_are_held() {
    let mut world = World::new();
    let (new, vm) = vm(1);
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    world.pass(2);
    world.ask(Op::PauseVm(vm), 52).unwrap();
    world.pass(1);
    let state = |world: &World, task| world.state.tasks[&TaskId(testing::id(task))].state.clone();
    assert_eq!(state(&world, 52), TaskState::Running);
    world.holds = true;
    world.pass(1);
    assert_eq!(state(&world, 52), TaskState::Done);
    world.ask(Op::ResumeVm(vm), 53).unwrap();
    world.pass(1);
    assert_eq!(state(&world, 53), TaskState::Running, "it is held still");
    world.holds = false;
    world.pass(1);
    assert_eq!(state(&world, 53), TaskState::Done);
}

/// A VM on node 2, and what became of it once that is emptied for a while.
fn emptied(seconds: u64, migrates: impl Fn(&mut World, VmId, Migration)) -> (World, VmId) {
    let mut world = World::new();
    let (mut new, vm) = vm(1);
    new.preferred_node = Some(node_id(2));
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    world.pass(2);
    let drain = Op::SetNodeService { node: node_id(2), service: NodeService::Draining };
    world.ask(drain, 52).unwrap();
    for _ in 0..seconds {
        world.pass(1);
        if let Some(migration) = world.state.vms[&vm].migration {
            migrates(&mut world, vm, migration);
        }
    }
    (world, vm)
}

#[test]
fn the_vms_of_a_node_that_is_emptied_are_migrated_and_restarted_only_when_that_fails_again_and_again() {
    let (world, vm) = emptied(2, |world, vm, migration| {
        world.state.apply(&command(Op::VmArrived { vm, epoch: migration.epoch })).unwrap();
    });
    assert_ne!(world.node_of(vm), Some(node_id(2)));
    assert_eq!(world.state.vms[&vm].restart, None);
    assert_eq!(world.state.vms[&vm].last_exit, None, "its guest went on");

    let failing = |world: &mut World, vm, migration: Migration| {
        let error = TaskError { detail: "too busy".into(), next: "wait".into() };
        world.state.apply(&command(Op::MigrationFailed { vm, epoch: migration.epoch, error })).unwrap();
    };
    let (world, vm) = emptied(25, failing);
    assert_eq!((world.node_of(vm), world.state.vms[&vm].restart), (Some(node_id(2)), None));
    let tried = world.state.events.iter().filter(|event| event.kind == "vm-migrates").count();
    assert_eq!(tried, 3, "with pauses in between");
    let (world, vm) = emptied(35, failing);
    assert!(world.state.vms[&vm].restart.is_some());
}

#[test]
fn a_migration_to_a_lost_node_is_given_up_and_one_from_a_lost_node_ends_in_a_restart() {
    let moving = || {
        let mut world = World::new();
        let (mut new, vm) = vm(1);
        new.preferred_node = Some(node_id(2));
        world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
        world.pass(2);
        let to = node_id(3);
        world.ask(Op::MigrateVm { vm, to, terms: MigrationTerms::default() }, 52).unwrap();
        (world, vm)
    };
    let (mut world, vm) = moving();
    world.lose(node_id(3));
    world.pass(LEADER_LEASE.as_secs() + 2);
    assert_eq!((world.node_of(vm), world.state.vms[&vm].migration), (Some(node_id(2)), None));
    let TaskState::Failed(error) = &world.state.tasks[&TaskId(id(52))].state else { panic!("it goes on") };
    assert!(error.detail.contains("n3 was lost"), "{error:?}");

    let (mut world, vm) = moving();
    let epoch = world.state.vms[&vm].migration.unwrap().epoch;
    world.state.apply(&command(Op::VmArrived { vm, epoch })).unwrap();
    world.pass(1);
    assert_eq!(world.node_of(vm), Some(node_id(3)));
    assert_eq!(world.state.tasks[&TaskId(id(52))].state, TaskState::Done, "it is seen there");

    let (mut world, vm) = moving();
    world.lose(node_id(2));
    world.pass(LEADER_LEASE.as_secs() + 2);
    let run = world.state.vms[&vm].assignment.unwrap();
    assert!(run.node != node_id(2) && run.epoch == RunEpoch(3), "{run:?}");
    assert!(matches!(world.state.tasks[&TaskId(id(52))].state, TaskState::Failed(_)));
}

#[test]
fn a_run_goes_only_to_another_node_that_can_carry_it() {
    let mut world = World::new();
    world.processors.insert(node_id(3), 2);
    let (mut new, vm) = vm(1);
    (new.preferred_node, new.cpu_model) = (Some(node_id(2)), vmm::CpuModel::Host);
    world.ask(Op::CreateVm { vm: new, unreachable: vec![] }, 51).unwrap();
    world.pass(2);
    let choose = |world: &World, to| {
        let vm = &world.state.vms[&vm];
        let live = world.leases.reports(world.now);
        super::scheduler::choose_other(&world.state, &live, vm, vm.assignment.unwrap(), to)
    };
    assert_eq!(choose(&world, None), Ok(node_id(1)));
    let why = choose(&world, Some(node_id(3))).unwrap_err();
    assert!(why.contains("n3 has another processor than the one that the VM runs on"), "{why}");
    let why = choose(&world, Some(node_id(2))).unwrap_err();
    assert!(why.contains("no node"), "{why}");
    world.memory = 1 << 30;
    world.pass(1);
    let why = choose(&world, None).unwrap_err();
    assert!(why.contains("MiB of memory left"), "{why}");
}
