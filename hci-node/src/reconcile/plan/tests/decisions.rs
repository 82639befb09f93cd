//! Single decisions of the planner.

use std::{sync::Arc, time::Duration};

use storage::config::{Access, CleanState};

use super::*;
use crate::{
    reconcile::plan::{data::Leftover, vms::SHUTDOWN_GRACE},
    state::report::VmRunState,
};

/// A data process that serves what the state says.
fn serving(state: &ClusterState) -> DataView {
    let mut data = fresh_data(1);
    let planned = plan_for(state, &observed(Some(data.clone()))).data.unwrap();
    data.status.storage.volumes = vec![volume_status(state, VolumeState::Open)];
    data.applied = Some(Arc::new(planned));
    data
}

fn assigned() -> ClusterState {
    let mut state = cluster();
    assign(&mut state, me());
    state
}

#[test]
fn an_assigned_vm_is_configured_and_started_when_all_is_there() {
    let state = assigned();
    let fresh = fresh_data(1);
    let first = plan_for(&state, &observed(Some(fresh)));
    let config = first.data.clone().unwrap();
    assert_eq!(config.storage.volumes.len(), 1);
    assert_eq!(config.storage.volumes[0].clean, CleanState::Clean);
    assert_eq!(
        config.storage.volumes[0].access,
        Access::VhostUser { socket: paths().block_socket(vm(), volume()) }
    );
    assert_eq!((config.overlay.ports.len(), config.overlay.networks.len()), (1, 1));
    assert_eq!(config.peers.len(), 2);
    assert_eq!(first.actions, []);
    assert!(matches!(&first.vms[0].state, VmRunState::Waiting(why) if why.contains("opened")));

    let ready = plan_for(&state, &observed(Some(serving(&state))));
    let [Action::StartVm { vm: started, epoch: RunEpoch(1), config, cloud_init: Some(told), .. }] =
        &ready.actions[..]
    else {
        panic!("{:?}", ready.actions)
    };
    assert_eq!(*started, vm());
    assert_eq!(config.disks[0].socket, paths().block_socket(vm(), volume()));
    assert_eq!(config.nics[0].mtu, Some(1500));
    assert!(matches!(&config.boot, vmm::Boot::Kernel { cmdline, .. } if cmdline == "console=ttyS0"));
    assert_eq!(
        (config.seed.clone(), told.hostname.as_deref()),
        (Some(paths().vm(vm()).seed()), Some("front"))
    );
    assert!(first.data.is_some_and(|one| crate::reconcile::link::same(&one, &ready.data.unwrap())));
}

#[test]
fn nothing_is_left_to_do_for_a_vm_that_runs() {
    let state = assigned();
    let mut now = observed(Some(serving(&state)));
    now.runs.insert(vm(), alive(1));
    let plan = plan_for(&state, &now);
    assert_eq!(plan.actions, []);
    assert_eq!(plan.vms[0].state, VmRunState::Running);
}

#[test]
fn each_missing_thing_holds_a_vm_back() {
    let state = assigned();
    let ready = observed(Some(serving(&state)));
    let held_back = |observed: &Observed| {
        let plan = plan_for(&state, observed);
        assert!(
            !plan.actions.iter().any(|action| matches!(action, Action::StartVm { .. })),
            "{:?}",
            plan.actions
        );
        assert!(matches!(plan.vms[0].state, VmRunState::Waiting(_)));
    };
    let mut no_kernel = ready.clone();
    no_kernel.boot_files.clear();
    held_back(&no_kernel);
    held_back(&Observed { data: None, ..ready.clone() });
    for standing in [Standing::CatchingUp, Standing::Unknown, Standing::Lapsed] {
        held_back(&Observed { standing, ..ready.clone() });
    }
    let mut opening = ready.clone();
    opening.data.as_mut().unwrap().status.storage.volumes[0].state = VolumeState::Opening;
    held_back(&opening);
    let mut not_applied = ready;
    not_applied.data.as_mut().unwrap().applied = None;
    held_back(&not_applied);
}

#[test]
fn a_new_data_process_serves_an_unclean_volume_only_in_a_new_generation() {
    let mut state = assigned();
    apply(&mut state, Op::VolumeOpened { volume: volume(), generation: Generation(1) });
    let mut restarted = fresh_data(2);
    let plan = plan_for(&state, &observed(Some(restarted.clone())));
    assert_eq!(plan.data.unwrap().storage.volumes, []);
    let open = Action::OpenVolume { volume: volume(), expected: Generation(1), unreachable: Vec::new() };
    assert_eq!(plan.actions, [open]);

    apply(
        &mut state,
        Op::OpenVolume { volume: volume(), node: me(), expected: Generation(1), unreachable: Vec::new() },
    );
    restarted.grants.insert(volume(), Generation(2));
    let plan = plan_for(&state, &observed(Some(restarted)));
    let served = &plan.data.unwrap().storage.volumes[0];
    assert_eq!((served.generation.0, served.clean), (2, CleanState::Unclean));
    assert_eq!(plan.actions, []);
}

#[test]
fn a_generation_raised_under_a_living_data_process_is_served_at_once() {
    let mut state = assigned();
    let data = serving(&state);
    apply(&mut state, Op::VolumeOpened { volume: volume(), generation: Generation(1) });
    apply(
        &mut state,
        Op::OpenVolume { volume: volume(), node: me(), expected: Generation(1), unreachable: Vec::new() },
    );
    let plan = plan_for(&state, &observed(Some(data)));
    assert_eq!(plan.data.unwrap().storage.volumes[0].generation.0, 2);
    assert_eq!(plan.actions, []);
}

#[test]
fn what_is_not_meant_to_run_here_is_killed_and_forgotten() {
    let mut state = assigned();
    let kill = |epoch| Action::KillVm { vm: vm(), epoch: RunEpoch(epoch), why: Ended::Killed };
    let mut now = observed(Some(serving(&state)));
    now.runs.insert(vm(), alive(0));
    assert_eq!(plan_for(&state, &now).actions, [kill(0)]);

    // The leader took it away: the lease of this node had ended.
    apply(
        &mut state,
        Op::AssignVm {
            vm: vm(),
            node: node(2),
            expected: RunEpoch(1),
            reason: command::AssignReason::Failover,
            unreachable: vec![me()],
        },
    );
    now.runs.insert(vm(), alive(1));
    let plan = plan_for(&state, &now);
    assert_eq!(plan.actions, [kill(1)]);
    assert_eq!(plan.data.unwrap().storage.volumes, []);
    now.runs.insert(vm(), Run { epoch: RunEpoch(1), phase: RunPhase::Ended(Ended::Killed) });
    assert_eq!(plan_for(&state, &now).actions, [Action::ForgetRun { vm: vm(), epoch: RunEpoch(1) }]);
}

#[test]
fn a_lapsed_lease_kills_everything_and_begins_nothing() {
    let state = assigned();
    let mut now = observed(Some(serving(&state)));
    now.standing = Standing::Lapsed;
    now.runs.insert(vm(), alive(1));
    let plan = plan_for(&state, &now);
    assert_eq!(plan.data, None);
    assert_eq!(plan.actions, [Action::KillVm { vm: vm(), epoch: RunEpoch(1), why: Ended::LeaseLapsed }]);
}

#[test]
fn stopping_is_a_button_then_patience_then_force() {
    let mut state = assigned();
    let mut now = observed(Some(serving(&state)));
    now.runs.insert(vm(), alive(1));
    apply(&mut state, Op::SetVmDesired { vm: vm(), desired: DesiredRun::Stopped(StopMode::Graceful) });
    let press = Action::PressPowerButton { vm: vm(), epoch: RunEpoch(1) };
    let kill = Action::KillVm { vm: vm(), epoch: RunEpoch(1), why: Ended::Killed };
    assert_eq!(plan_for(&state, &now).actions, std::slice::from_ref(&press));
    let mut pressed = |ago| {
        let phase = RunPhase::Alive { button_pressed: Some(ago), vcpus: Some(Vcpus::Running) };
        now.runs.insert(vm(), Run { epoch: RunEpoch(1), phase });
        plan_for(&state, &now).actions
    };
    assert_eq!(pressed(SHUTDOWN_GRACE - Duration::from_secs(1)), []);
    assert_eq!(pressed(SHUTDOWN_GRACE), std::slice::from_ref(&kill));

    let mut restarted = assigned();
    apply(&mut restarted, Op::RestartVm(vm()));
    now.runs.insert(vm(), alive(1));
    assert_eq!(plan_for(&restarted, &now).actions, [press]);

    let mut forced = assigned();
    apply(&mut forced, Op::SetVmDesired { vm: vm(), desired: DesiredRun::Stopped(StopMode::Force) });
    assert_eq!(plan_for(&forced, &now).actions, [kill]);
}

#[test]
fn the_end_of_a_run_is_told_until_the_cluster_has_taken_note() {
    let mut state = assigned();
    let mut now = observed(Some(serving(&state)));
    for (ended, exit) in [
        (Ended::GuestShutdown, VmExit::GuestShutdown),
        (Ended::Killed, VmExit::Stopped),
        (Ended::LeaseLapsed, VmExit::NodeLost),
        (Ended::Crashed("why".to_owned()), VmExit::Crashed("why".to_owned())),
    ] {
        now.runs.insert(vm(), Run { epoch: RunEpoch(1), phase: RunPhase::Ended(ended) });
        let report = Action::ReportExit { vm: vm(), epoch: RunEpoch(1), exit };
        assert_eq!(plan_for(&state, &now).actions, [report]);
    }
    apply(&mut state, Op::VmExited { vm: vm(), epoch: RunEpoch(1), exit: VmExit::GuestShutdown });
    let plan = plan_for(&state, &now);
    assert_eq!(plan.actions, [Action::ForgetRun { vm: vm(), epoch: RunEpoch(1) }]);
    assert_eq!(plan.data.unwrap().storage.volumes, [], "its volume is closed");
}

#[test]
fn a_volume_that_no_data_process_has_is_closed_in_the_state_as_it_is() {
    let mut state = assigned();
    apply(&mut state, Op::VolumeOpened { volume: volume(), generation: Generation(1) });
    apply(&mut state, Op::VmExited { vm: vm(), epoch: RunEpoch(1), exit: VmExit::GuestShutdown });
    let mut data = fresh_data(2);
    assert_eq!(
        plan_for(&state, &observed(Some(data.clone()))).actions,
        [],
        "not before it has a configuration"
    );
    data.applied = plan_for(&state, &observed(Some(data.clone()))).data.map(Arc::new);
    let close = Action::CloseVolume {
        volume: volume(),
        generation: Generation(1),
        cleanliness: Cleanliness::Unclean,
    };
    assert_eq!(plan_for(&state, &observed(Some(data.clone()))).actions, [close]);
    data.status.storage.volumes = vec![volume_status(&state, VolumeState::Open)];
    assert_eq!(plan_for(&state, &observed(Some(data))).actions, [], "the data process is closing it");
}

#[test]
fn disks_are_prepared_and_their_health_is_told() {
    let mut state = cluster();
    state.vms.clear();
    state.volumes.clear();
    let mut data = fresh_data(1);
    state.disks.get_mut(&disk(1)).unwrap().state = DiskState::Preparing;
    let prepare = Action::PrepareDisk {
        disk: disk(1),
        path: "/dev/vd1".into(),
        wipe: WipePolicy::Refuse,
        key_salt: None,
        secret: NodeSecret::MayBeMade,
    };
    assert_eq!(plan_for(&state, &observed(Some(data.clone()))).actions, [prepare]);
    // While a disk of this node is encrypted its secret is not made anew.
    let other = Disk {
        id: disk(77),
        key_salt: Some(KeySalt([1; 32])),
        state: DiskState::Ready,
        ..state.disks[&disk(1)].clone()
    };
    let mut with_other = state.clone();
    with_other.disks.insert(other.id, other);
    let actions = plan_for(&with_other, &observed(Some(data.clone()))).actions;
    let in_use = |action: &Action| matches!(action, Action::PrepareDisk { secret: NodeSecret::IsInUse, .. });
    assert!(actions.iter().any(in_use), "{actions:?}");

    state.disks.get_mut(&disk(1)).unwrap().state = DiskState::Ready;
    data.status.storage.disks[0].health = DiskHealth::Failed("EIO".to_owned());
    let report = Action::ReportDisk { disk: disk(1), failed: Some("EIO".to_owned()) };
    assert_eq!(plan_for(&state, &observed(Some(data.clone()))).actions, [report]);

    apply(&mut state, Op::SetDiskHealth { disk: disk(1), failed: Some("EIO".to_owned()) });
    assert_eq!(plan_for(&state, &observed(Some(data.clone()))).actions, []);
    data.status.storage.disks[0].health = DiskHealth::Full;
    let works = Action::ReportDisk { disk: disk(1), failed: None };
    assert_eq!(plan_for(&state, &observed(Some(data))).actions, [works]);
}

#[test]
fn a_copy_that_left_is_let_go_once_the_data_process_has_forgotten_it_and_removed_later() {
    let mut state = assigned();
    let mut now = observed(Some(serving(&state)));
    now.runs.insert(vm(), alive(1));
    let (volume, segment, generation) = (volume(), SegmentIndex(0), Generation(1));
    let two = Some(2);
    apply(
        &mut state,
        Op::SetVolume {
            volume,
            change: command::VolumeChange { replicas: two, ..command::VolumeChange::default() },
            unreachable: Vec::new(),
        },
    );
    apply(&mut state, Op::RemoveReplica { volume, segment, disk: disk(1) });
    apply(&mut state, Op::ReplicaLeft { volume, generation, segment, disk: disk(1) });
    let plan = plan_for(&state, &now);
    assert_eq!(plan.actions, [], "the data process may still read from it");
    now.data.as_mut().unwrap().applied = plan.data.map(Arc::new);
    let release = Action::ReleaseReplicas { volume, generation, disk: disk(1), segments: vec![segment] };
    assert_eq!(plan_for(&state, &now).actions, [release]);

    apply(&mut state, Op::ReplicasReleased { volume, generation, disk: disk(1), segments: vec![segment] });
    for (waited, due) in [(0, false), (29, false), (30, true)] {
        now.purgeable_for.insert(Leftover::Copies(volume, disk(1)), Duration::from_secs(waited));
        let layers = vec![LayerRef { volume, number: 0 }];
        let parts = vec![(layers[0], segment)];
        let purge = Action::PurgeReplicas { volume, disk: disk(1), segments: vec![segment], layers, parts };
        assert_eq!(plan_for(&state, &now).actions.contains(&purge), due, "after {waited} s");
    }
}

#[test]
fn a_forced_restart_kills_and_a_graceful_one_presses_the_button() {
    for (restart, force) in [(Op::RestartVm(vm()), false), (Op::ResetVm(vm()), true)] {
        let mut state = assigned();
        let mut now = observed(Some(serving(&state)));
        now.runs.insert(vm(), alive(1));
        apply(&mut state, restart);
        let epoch = RunEpoch(1);
        let expected = match force {
            true => Action::KillVm { vm: vm(), epoch, why: Ended::Killed },
            false => Action::PressPowerButton { vm: vm(), epoch },
        };
        assert_eq!(plan_for(&state, &now).actions, [expected]);
    }
}

#[test]
fn deleted_volumes_are_purged_from_disks_that_work() {
    let mut state = cluster();
    apply(&mut state, Op::SetVmDesired { vm: vm(), desired: DesiredRun::Stopped(StopMode::Force) });
    apply(&mut state, Op::DeleteVm(vm()));
    let mut data = fresh_data(1);
    let purge = Action::PurgeVolume { volume: volume(), disks: vec![disk(1)] };
    assert_eq!(plan_for(&state, &observed(Some(data.clone()))).actions, [purge]);
    data.status.storage.disks.clear();
    assert_eq!(plan_for(&state, &observed(Some(data))).actions, []);
}

#[test]
fn boot_files_are_fetched_spread_and_removed() {
    let mut state = cluster();
    state.vms.clear();
    let new = BootFile { hash: ContentHash([8; 32]), size_bytes: 5 };
    let importing = |node| PartState::Importing { node, volume: None, file: Some(new), task: None };
    state.nodes.get_mut(&node(3)).unwrap().availability = Availability::Lost { since: Timestamp(1) };
    state.images.get_mut(&image()).unwrap().parts.insert(ImagePart::Initramfs, importing(node(2)));
    let mut now = observed(None);
    let fetch = Action::FetchBootFile { file: new, from: vec![node(2)] };
    assert_eq!(plan_for(&state, &now).actions, [fetch]);
    now.boot_files.insert(new.hash);
    assert_eq!(plan_for(&state, &now).actions, []);

    state.images.get_mut(&image()).unwrap().parts.insert(ImagePart::Initramfs, importing(me()));
    let spread =
        Action::SpreadBootFile { image: image(), part: ImagePart::Initramfs, file: new, to: vec![node(2)] };
    assert_eq!(plan_for(&state, &now).actions, [spread]);

    state.images.clear();
    let removed = [Action::RemoveBootFile { file: kernel().hash }, Action::RemoveBootFile { file: new.hash }];
    assert_eq!(plan_for(&state, &now).actions, removed);
}

#[test]
fn ports_elsewhere_are_forwarded_to_and_own_ones_are_not() {
    let mut state = assigned();
    let config = plan_for(&state, &observed(Some(fresh_data(1)))).data.unwrap();
    assert_eq!(config.overlay.forwarding, []);
    let second = PortId(Uuid::from_u128(0x41));
    let other = VmId(Uuid::from_u128(0x21));
    apply(
        &mut state,
        Op::CreateVm {
            vm: command::NewVm {
                id: other,
                name: "db".to_owned(),
                vcpus: 1,
                cpu_model: vmm::CpuModel::Host,
                memory_bytes: 1 << 30,
                image: image(),
                cmdline: None,
                disks: Vec::new(),
                ports: vec![command::NewPort { id: second, network: network() }],
                preferred_node: None,
                near: None,
                after_crash: AfterCrash::Restart,
                desired: DesiredRun::Running,
                cloud_init: None,
                growth: Default::default(),
            },
            unreachable: Vec::new(),
        },
    );
    let forwarding = |state: &ClusterState| {
        plan_for(state, &observed(Some(fresh_data(1)))).data.unwrap().overlay.forwarding
    };
    assert_eq!(forwarding(&state), [], "it runs nowhere yet");
    apply(
        &mut state,
        Op::AssignVm {
            vm: other,
            node: node(2),
            expected: RunEpoch(0),
            reason: command::AssignReason::Start,
            unreachable: Vec::new(),
        },
    );
    let entries = forwarding(&state);
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].node, entries[0].ip), (node(2), state.ports[&second].ip));
}

fn suspend(state: &mut ClusterState) -> VolumeId {
    let id = VolumeId(Uuid::from_u128(0x31));
    let volume = command::NewVolume {
        id,
        name: "web-state".to_owned(),
        size_bytes: 1 << 30,
        replicas: 3,
        min_in_sync: None,
        durability: Durability::WriteBack,
        compression: crate::state::Compression::Off,
    };
    apply(state, Op::SuspendVm { vm: vm(), volume, unreachable: Vec::new() });
    id
}

/// A data process that has all volumes of this node open.
fn all_open(state: &ClusterState) -> DataView {
    let mut data = serving(state);
    let open = state.volumes_on(me()).map(|volume| storage::status::VolumeStatus {
        id: volume.id.into(),
        generation: volume.generation.into(),
        ..volume_status(state, VolumeState::Open)
    });
    data.status.storage.volumes = open.collect();
    data
}

#[test]
fn processors_are_held_and_let_go_as_is_wanted_and_once_more_when_nobody_knows() {
    let mut state = assigned();
    let mut now = observed(Some(serving(&state)));
    let set = |to| Action::SetVcpus { vm: vm(), epoch: RunEpoch(1), to };
    let mut plan_with = |state: &ClusterState, vcpus| {
        now.runs.insert(vm(), with_vcpus(1, vcpus));
        plan_for(state, &now)
    };
    assert_eq!(plan_with(&state, Some(Vcpus::Running)).actions, []);
    assert_eq!(plan_with(&state, None).actions, [set(Vcpus::Running)]);
    apply(&mut state, Op::PauseVm(vm()));
    assert_eq!(plan_with(&state, Some(Vcpus::Running)).actions, [set(Vcpus::Held)]);
    assert_eq!(plan_with(&state, None).actions, [set(Vcpus::Held)]);
    let held = plan_with(&state, Some(Vcpus::Held));
    assert_eq!((held.actions, &held.vms[0].state), (vec![], &VmRunState::Paused));
    apply(&mut state, Op::SetVmDesired { vm: vm(), desired: DesiredRun::Stopped(StopMode::Graceful) });
    assert_eq!(
        plan_with(&state, Some(Vcpus::Held)).actions,
        [set(Vcpus::Running)],
        "it has to see its power button"
    );
    let press = Action::PressPowerButton { vm: vm(), epoch: RunEpoch(1) };
    assert_eq!(plan_with(&state, Some(Vcpus::Running)).actions, [press]);
}

#[test]
fn a_run_is_written_once_its_volume_is_open_and_killed_once_it_is_written() {
    let mut state = assigned();
    let mut now = observed(Some(serving(&state)));
    now.runs.insert(vm(), alive(1));
    let state_volume = suspend(&mut state);
    assert_eq!(plan_for(&state, &now).actions, [], "its volume is not open yet");
    now.data = Some(all_open(&state));
    let plan = plan_for(&state, &now);
    let save = Action::SaveVm {
        vm: vm(),
        epoch: RunEpoch(1),
        volume: state_volume,
        generation: Generation(1),
        memory_bytes: 1 << 30,
        task: None,
    };
    assert_eq!(plan.actions, [save]);
    let access = |id: VolumeId| {
        let config = plan.data.as_ref().unwrap();
        config.storage.volumes.iter().find(|volume| volume.id == id.into()).unwrap().access.clone()
    };
    assert_eq!(access(state_volume), Access::Internal);

    let mut vanished = now.clone();
    vanished.runs.clear();
    let [Action::ReportExit { exit: VmExit::Crashed(_), .. }] = &plan_for(&state, &vanished).actions[..]
    else {
        panic!("it must not be booted in the epoch that is being written");
    };

    let written = Op::VmSuspended {
        vm: vm(),
        epoch: RunEpoch(1),
        generation: Generation(1),
        bytes: 9,
        processor: vmm::Processor::default(),
    };
    apply(&mut state, written);
    let kill = Action::KillVm { vm: vm(), epoch: RunEpoch(1), why: Ended::Killed };
    assert_eq!(plan_for(&state, &now).actions, std::slice::from_ref(&kill));
    apply(&mut state, Op::ResumeVm(vm()));
    assert_eq!(plan_for(&state, &now).actions, [kill], "also when it is to go on: from what was written");
}

#[test]
fn a_resumed_run_is_brought_its_state_before_it_counts_as_running() {
    let mut state = assigned();
    let state_volume = suspend(&mut state);
    let processor = vmm::Processor::default();
    let (epoch, generation) = (RunEpoch(1), Generation(1));
    apply(&mut state, Op::VmSuspended { vm: vm(), epoch, generation, bytes: 9, processor });
    apply(&mut state, Op::VmExited { vm: vm(), epoch, exit: VmExit::Stopped });
    apply(&mut state, Op::ResumeVm(vm()));
    assign(&mut state, me());
    let mut now = observed(Some(all_open(&state)));
    let started = plan_for(&state, &now).actions;
    let [Action::StartVm { epoch: RunEpoch(2), begin: Begin::Saved, .. }] = &started[..] else {
        panic!("{started:?}")
    };
    now.runs.insert(vm(), with_vcpus(2, None));
    let restore = Action::RestoreVm { vm: vm(), epoch: RunEpoch(2), volume: state_volume, bytes: 9 };
    let plan = plan_for(&state, &now);
    assert_eq!(plan.actions, std::slice::from_ref(&restore));
    assert!(matches!(&plan.vms[0].state, VmRunState::Waiting(why) if why.contains("read back")));

    let mut stopped = state.clone();
    apply(&mut stopped, Op::SetVmDesired { vm: vm(), desired: DesiredRun::Stopped(StopMode::Graceful) });
    let kill = Action::KillVm { vm: vm(), epoch: RunEpoch(2), why: Ended::Killed };
    assert_eq!(plan_for(&stopped, &now).actions, [kill], "there is nobody to shut it down");

    apply(&mut state, Op::SuspensionUsed { vm: vm(), epoch: RunEpoch(2) });
    let set = Action::SetVcpus { vm: vm(), epoch: RunEpoch(2), to: Vcpus::Running };
    assert!(plan_for(&state, &now).actions.contains(&set), "the order was lost");
}
