//! Rebuilding, emptying and evening out, played against the real state: nodes that report, coordinators that fill copies,
//! nodes that remove what has left.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::{
    control::{leader::ha::Ha, lease::LeaderLeases},
    state::{command::*, report::*, testing::*, *},
};

const GIB: u64 = 1 << 30;

/// A cluster whose nodes do what the state says.
struct World {
    state: ClusterState,
    ha: Ha,
    leases: LeaderLeases,
    now: Instant,
    at: Timestamp,
    alive: BTreeSet<NodeId>,
    /// Bytes used on each disk, beside 1 GiB for each copy.
    extra: BTreeMap<DiskId, u64>,
    scrubs: BTreeMap<DiskId, ScrubReport>,
    broken: BTreeSet<DiskId>,
    /// Copies that were on their way to or from one disk at the same time, at most.
    most_moves: usize,
    /// The volumes that got copies, in that order.
    added: Vec<VolumeId>,
}

impl World {
    fn new(nodes: u128) -> Self {
        let now = Instant::now();
        Self {
            state: cluster(nodes),
            ha: Ha::default(),
            leases: LeaderLeases::new(1, now),
            now,
            at: Timestamp(0),
            alive: (1..=nodes).map(node_id).collect(),
            extra: BTreeMap::new(),
            scrubs: BTreeMap::new(),
            broken: BTreeSet::new(),
            most_moves: 0,
            added: vec![],
        }
    }

    fn run(&mut self, op: Op) {
        let shown = format!("{op:?}");
        self.state.apply(&Command { at: self.at, task: None, op }).unwrap_or_else(|e| panic!("{shown}: {e}"));
    }

    fn ask(&mut self, op: Op) -> Result<TaskId, Refusal> {
        let task = TaskId::random();
        self.state.apply(&Command { at: self.at, task: Some(task), op }).map(|_| task)
    }

    fn add_disk(&mut self, disk: u128, node: u128) {
        let (disk, node, path) = (disk_id(disk), node_id(node), format!("/dev/vd{disk}"));
        self.run(Op::AddDisk { disk, node, path, wipe: WipePolicy::Refuse, key_salt: None });
        self.run(Op::DiskReady { disk, store: "/store".into(), capacity_bytes: 100 * GIB });
    }

    /// A node with a disk of its number.
    fn add_node(&mut self, n: u128) {
        self.run(Op::AddNode { node: new_node(n), token: TokenId(id(502)) });
        self.alive.insert(node_id(n));
        self.add_disk(n, n);
    }

    /// A volume of three segments.
    fn volume(&mut self, n: u128, replicas: u8) -> VolumeId {
        let volume = new_volume(n, replicas);
        let id = volume.id;
        self.run(Op::CreateVolume { volume, near: None, unreachable: vec![] });
        id
    }

    fn used(&self, disk: DiskId) -> u64 {
        u64::from(self.state.segments_on(disk)) * GIB + self.extra.get(&disk).copied().unwrap_or(0)
    }

    fn report(&self, node: NodeId) -> NodeReport {
        let disks = self.state.disks.values().filter(|disk| disk.node == node).map(|disk| DiskReport {
            disk: disk.id,
            capacity_bytes: 100 * GIB,
            used_bytes: self.used(disk.id),
            health: DiskHealth::Ok,
            scrub: self.scrubs.get(&disk.id).copied().unwrap_or_default(),
            smart: None,
            volumes: Vec::new(),
        });
        let vms = self.state.vms_on(node).filter_map(|vm| {
            let epoch = vm.assignment?.epoch;
            Some(VmReport {
                vm: vm.id,
                epoch,
                state: VmRunState::Running,
                agent: None,
                executable: Default::default(),
            })
        });
        NodeReport {
            machine: MachineReport {
                memory_bytes: 4 * GIB,
                cpu_models: [vmm::CpuModel::Host].into(),
                ..Default::default()
            },
            local: LocalReport {
                disks: disks.collect(),
                vms: vms.collect(),
                data_process: ProcessState::Up,
                ..Default::default()
            },
            boot_files: vec![],
        }
    }

    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds * 2 {
            self.now += Duration::from_millis(500);
            self.at = Timestamp(self.at.0 + 500);
            for node in self.alive.clone() {
                let report = self.report(node);
                self.leases.renewed(node, report, self.now);
            }
            for command in self.ha.decide(&self.state, &self.leases, self.now, self.at) {
                let before = self.state.clone();
                let _ = self.state.apply(&command);
                self.check(&before, &command.op);
            }
            self.nodes_act();
        }
    }

    /// Whatever the leader does by itself, no segment gets fewer complete copies than it should have or had.
    fn check(&mut self, before: &ClusterState, op: &Op) {
        assert_eq!(invariants::violations(&self.state), Vec::<String>::new());
        if matches!(op, Op::AddReplica { .. } | Op::RemoveReplica { .. }) {
            for (id, volume) in &self.state.volumes {
                for (now, was) in volume.segments.iter().zip(&before.volumes[id].segments) {
                    assert!(now.in_sync() >= was.in_sync().min(usize::from(volume.replicas)), "{op:?}");
                }
            }
        }
        if let Op::AddReplica { volume, .. } = op {
            self.added.push(*volume);
        }
        let mut moves: BTreeMap<DiskId, usize> = BTreeMap::new();
        for copy in self.state.volumes.values().flat_map(|v| &v.segments).flat_map(|s| &s.replicas) {
            if let (ReplicaState::OutOfSync, Some(old)) = (copy.state, copy.replaces) {
                *moves.entry(copy.disk).or_default() += 1;
                *moves.entry(old).or_default() += 1;
            }
        }
        self.most_moves = moves.into_values().max().unwrap_or(0).max(self.most_moves);
    }

    /// Coordinators take out what they cannot reach, fill what is out, let go of what has left, and close what nobody
    /// needs; nodes remove what is free to be removed; guests move and stop when they are told to.
    fn nodes_act(&mut self) {
        let reachable = |world: &Self, copy: &Replica| {
            world.alive.contains(&copy.node) && !world.broken.contains(&copy.disk)
        };
        let open: Vec<_> = self.state.volumes.values().cloned().collect();
        for volume in open {
            let Some(node) = volume.coordinator.filter(|node| self.alive.contains(node)) else { continue };
            let (id, generation) = (volume.id, volume.generation);
            for (index, segment) in volume.numbered() {
                // What is to leave goes while all that stay are there.
                let all_there = segment
                    .replicas
                    .iter()
                    .all(|copy| copy.state == ReplicaState::OutOfSync || reachable(self, copy));
                for copy in &segment.replicas {
                    let departures = self.state.volumes[&id].departures;
                    let (disk, reach) = (copy.disk, reachable(self, copy));
                    let op = match copy.state {
                        ReplicaState::InSync if !reach => {
                            Op::ReplicasOut { volume: id, generation, disk, reason: "away".into() }
                        }
                        ReplicaState::OutOfSync if reach => {
                            Op::ReplicaIn { volume: id, generation, segment: index, disk, departures }
                        }
                        ReplicaState::InSync if copy.tenure == Tenure::Leaves && all_there => {
                            Op::ReplicaLeft { volume: id, generation, segment: index, disk }
                        }
                        _ => continue,
                    };
                    // The last complete copy cannot be taken out, and a dead disk's copy may have left already.
                    let _ = self.state.apply(&Command { at: self.at, task: None, op });
                }
            }
            for (disk, retired) in self.state.retired.get(&id).cloned().unwrap_or_default() {
                let segments = retired.segments.into_iter().collect();
                self.run(Op::ReplicasReleased { volume: id, generation, disk, segments });
            }
            if self.state.volume_use(&self.state.volumes[&id]) == VolumeUse::Nothing {
                assert!(self.alive.contains(&node));
                self.run(Op::CloseVolume { volume: id, generation, cleanliness: Cleanliness::Clean });
            }
        }
        for (volume, disks) in self.state.retired.clone() {
            for (disk, retired) in disks {
                let there =
                    self.alive.contains(&self.state.disks[&disk].node) && !self.broken.contains(&disk);
                if there && self.state.may_purge(volume, &retired) {
                    let segments = retired.segments.into_iter().collect();
                    let layers = retired.layers.into_iter().collect();
                    self.run(Op::ReplicasPurged { volume, disk, segments, layers });
                }
            }
        }
        let moving: Vec<_> =
            self.state.vms.values().filter_map(|vm| Some((vm.id, vm.migration?.epoch))).collect();
        for (vm, epoch) in moving {
            self.run(Op::VmArrived { vm, epoch });
        }
        let ending: Vec<_> = self.state.vms.values().filter(|vm| vm.restart.is_some()).cloned().collect();
        for vm in ending {
            let Some(run) = vm.assignment.filter(|run| self.alive.contains(&run.node)) else { continue };
            self.run(Op::VmExited { vm: vm.id, epoch: run.epoch, exit: VmExit::GuestShutdown });
        }
    }

    fn disks_of(&self, volume: VolumeId) -> BTreeSet<DiskId> {
        let segments = &self.state.volumes[&volume].segments;
        segments.iter().flat_map(|segment| &segment.replicas).map(|copy| copy.disk).collect()
    }

    fn is_settled(&self, volume: VolumeId) -> bool {
        self.state.volumes[&volume].is_settled()
    }

    fn told(&self, kind: &str) -> usize {
        self.state.events.iter().filter(|event| event.kind == kind).count()
    }

    fn task(&self, id: TaskId) -> &Task {
        &self.state.tasks[&id]
    }
}

#[test]
fn a_failed_disks_copies_are_rebuilt_at_once_a_few_at_a_time() {
    let mut world = World::new(4);
    let volumes: Vec<_> = (1..=4).map(|n| world.volume(n, 3)).collect();
    world.pass(1);
    let disk = disk_id(2);
    let hit = world.state.segments_on(disk);
    assert!(hit > 0);
    world.broken.insert(disk);
    world.run(Op::SetDiskHealth { disk, failed: Some("I/O errors".into()) });
    world.pass(30);
    assert_eq!(world.state.segments_on(disk), 0);
    assert!(volumes.iter().all(|volume| world.is_settled(*volume)));
    assert!(world.most_moves <= usize::from(world.state.pool.moves_per_disk), "{}", world.most_moves);
    assert_eq!(world.told("rebuild"), 1);
}

#[test]
fn a_lost_nodes_copies_are_rebuilt_after_the_grace_and_not_before() {
    let mut world = World::new(4);
    world.run(Op::SetPoolPolicy(PoolPolicy { rebuild_grace_seconds: 60, ..PoolPolicy::default() }));
    let volume = world.volume(1, 3);
    let gone = world.state.volumes[&volume].segments[0].replicas[0].node;
    let disk = world.state.disks.values().find(|disk| disk.node == gone).unwrap().id;
    world.alive.remove(&gone);
    world.pass(50);
    assert!(world.disks_of(volume).contains(&disk), "it may come back");
    world.pass(60);
    assert!(!world.disks_of(volume).contains(&disk));
    assert!(world.is_settled(volume));
    assert!(world.state.retired[&volume].contains_key(&disk), "its data are still there");
    world.alive.insert(gone);
    world.pass(5);
    assert!(world.state.retired.is_empty(), "and are removed when the node is back");
}

#[test]
fn a_node_that_returns_within_the_grace_keeps_its_copies() {
    let mut world = World::new(4);
    let volume = world.volume(1, 3);
    let before = world.disks_of(volume);
    let gone = world.state.volumes[&volume].segments[0].replicas[0].node;
    world.alive.remove(&gone);
    world.pass(120);
    world.alive.insert(gone);
    world.pass(20);
    assert_eq!(world.disks_of(volume), before);
    assert!(world.is_settled(volume));
}

#[test]
fn without_a_place_nothing_is_moved_and_that_is_said_once() {
    let mut world = World::new(3);
    let volume = world.volume(1, 3);
    world.broken.insert(disk_id(3));
    world.run(Op::SetDiskHealth { disk: disk_id(3), failed: Some("I/O errors".into()) });
    world.pass(30);
    assert_eq!(world.told("no-place"), 1);
    assert!(world.disks_of(volume).contains(&disk_id(3)));
    world.add_disk(5, 3);
    world.pass(30);
    assert!(world.is_settled(volume), "a new disk in the same node takes them");
    assert!(world.disks_of(volume).contains(&disk_id(5)));
}

#[test]
fn rebuilding_leaves_every_disk_its_reserve() {
    let mut world = World::new(3);
    let volume = world.volume(1, 3);
    let spare = disk_id(4);
    world.add_node(4);
    world.extra.insert(spare, 89 * GIB);
    let failed = *world.disks_of(volume).first().unwrap();
    world.broken.insert(failed);
    world.run(Op::SetDiskHealth { disk: failed, failed: Some("I/O errors".into()) });
    world.pass(30);
    assert!(world.used(spare) <= 90 * GIB, "{} GiB used", world.used(spare) / GIB);
    assert_eq!(world.told("no-place"), 1);
    world.extra.insert(spare, 91 * GIB);
    world.pass(2);
    assert_eq!(world.state.disks[&spare].room, DiskRoom::Reserved);
    world.extra.insert(spare, 10 * GIB);
    world.pass(30);
    assert_eq!(world.state.disks[&spare].room, DiskRoom::Free);
    assert!(world.is_settled(volume));
}

#[test]
fn the_most_endangered_segments_come_first() {
    let mut world = World::new(6);
    world.run(Op::SetPoolPolicy(PoolPolicy { moves_per_disk: 1, ..PoolPolicy::default() }));
    let (safe, risky) = (world.volume(1, 3), world.volume(2, 2));
    let shared: Vec<_> = world.disks_of(safe).intersection(&world.disks_of(risky)).copied().collect();
    let Some(disk) = shared.first().copied() else { panic!("the volumes share no disk") };
    world.pass(1);
    world.broken.insert(disk);
    world.run(Op::SetDiskHealth { disk, failed: Some("I/O errors".into()) });
    world.pass(30);
    let last_risky = world.added.iter().rposition(|volume| *volume == risky).unwrap();
    let first_safe = world.added.iter().position(|volume| *volume == safe).unwrap();
    assert!(last_risky < first_safe, "one complete copy is left of the one, two of the other");
}

#[test]
fn a_drained_disk_is_emptied_and_leaves_with_progress() {
    let mut world = World::new(4);
    let volumes: Vec<_> = (1..=4).map(|n| world.volume(n, 3)).collect();
    world.pass(1);
    let disk = disk_id(1);
    let task = world.ask(Op::SetDiskService { disk, service: DiskService::Draining }).unwrap();
    world.pass(2);
    assert_eq!(world.task(task).state, TaskState::Running);
    assert!(world.task(task).message.contains("have been moved"), "{}", world.task(task).message);
    world.pass(40);
    assert_eq!(world.task(task).state, TaskState::Done);
    assert!(!world.state.disks.contains_key(&disk));
    assert!(volumes.iter().all(|volume| world.is_settled(*volume)));
}

#[test]
fn a_dead_disk_leaves_even_when_its_copies_find_no_other_place() {
    let mut world = World::new(3);
    let volume = world.volume(1, 3);
    world.broken.insert(disk_id(2));
    world.run(Op::SetDiskHealth { disk: disk_id(2), failed: Some("I/O errors".into()) });
    let task = world.ask(Op::SetDiskService { disk: disk_id(2), service: DiskService::Dead }).unwrap();
    world.pass(10);
    assert_eq!(world.task(task).state, TaskState::Done);
    assert!(world.state.volumes[&volume].is_degraded());
    world.add_disk(5, 2);
    world.pass(20);
    assert!(world.is_settled(volume));
}

#[test]
fn a_volume_that_cannot_be_opened_does_not_hold_up_others() {
    let mut world = World::new(4);
    let (stuck, fine) = (world.volume(1, 1), world.volume(2, 2));
    world.pass(1);
    let lost = world.state.volumes[&stuck].segments[0].replicas[0].node;
    let leaving = world.state.volumes[&stuck]
        .segments
        .iter()
        .map(|segment| segment.replicas[0])
        .find(|copy| copy.node != lost && world.disks_of(fine).contains(&copy.disk));
    let Some(leaving) = leaving else { panic!("the volumes share no disk") };
    let service = DiskService::Draining;
    world.alive.remove(&lost);
    world.pass(10);
    world.ask(Op::SetDiskService { disk: leaving.disk, service }).unwrap();
    world.pass(30);
    assert!(!world.disks_of(fine).contains(&leaving.disk), "it has been moved");
    assert!(world.disks_of(stuck).contains(&leaving.disk), "it waits for its last copy");
    world.alive.insert(lost);
    world.pass(30);
    assert!(!world.state.disks.contains_key(&leaving.disk));
}

#[test]
fn a_disk_that_is_declared_dead_is_not_filled_again_though_it_answers() {
    let mut world = World::new(3);
    let volume = world.volume(1, 3);
    world.pass(1);
    let task = world.ask(Op::SetDiskService { disk: disk_id(2), service: DiskService::Dead }).unwrap();
    world.pass(10);
    assert_eq!(world.task(task).state, TaskState::Done);
    assert!(!world.disks_of(volume).contains(&disk_id(2)) && !world.state.disks.contains_key(&disk_id(2)));
    assert_eq!(world.state.volumes[&volume].fewest_in_sync(), 2);
}

#[test]
fn a_node_is_emptied_of_vms_and_data_and_then_only_membership_is_left() {
    let mut world = World::new(4);
    let mut new = new_vm(1, vec![new_volume(1, 3)]);
    new.preferred_node = Some(node_id(4));
    new.near = Some(node_id(4));
    let (vm, volume) = (new.id, new.disks[0].id);
    world.run(Op::CreateVm { vm: new, unreachable: vec![] });
    world.pass(3);
    assert_eq!(world.state.vms[&vm].assignment.unwrap().node, node_id(4));
    let drain = world.ask(Op::SetNodeService { node: node_id(4), service: NodeService::Draining }).unwrap();
    world.pass(5);
    assert_eq!(world.task(drain).state, TaskState::Done);
    assert_ne!(world.state.vms[&vm].assignment.unwrap().node, node_id(4));
    assert!(world.disks_of(volume).contains(&disk_id(4)), "its data stay for the time being");
    world.ask(Op::SetNodeService { node: node_id(4), service: NodeService::Leaving }).unwrap();
    world.pass(30);
    assert!(super::leaving::is_ready_to_go(&world.state, node_id(4)));
    assert!(world.is_settled(volume) && !world.state.disks.contains_key(&disk_id(4)));
}

#[test]
fn the_number_of_copies_follows_what_is_asked_for() {
    let mut world = World::new(4);
    let volume = world.volume(1, 1);
    for replicas in [3, 2, 1, 2] {
        let op = Op::SetVolume {
            volume,
            change: VolumeChange { replicas: Some(replicas), ..VolumeChange::default() },
            unreachable: vec![],
        };
        let task = world.ask(op).unwrap();
        world.pass(20);
        assert_eq!(world.task(task).state, TaskState::Done, "{replicas}: {}", world.task(task).message);
        let copies = |segment: &Segment| segment.replicas.len() == usize::from(replicas);
        assert!(world.state.volumes[&volume].segments.iter().all(copies));
        assert_eq!(world.state.volumes[&volume].coordinator, None, "it is closed again");
    }
}

#[test]
fn a_new_empty_node_takes_its_share_unless_that_is_switched_off() {
    let mut world = World::new(3);
    let volumes: Vec<_> = (1..=10).map(|n| world.volume(n, 3)).collect();
    world.run(Op::SetPoolPolicy(PoolPolicy { rebalancing: Rebalancing::Off, ..PoolPolicy::default() }));
    world.add_node(4);
    world.pass(20);
    assert_eq!(world.state.segments_on(disk_id(4)), 0);
    world.run(Op::SetPoolPolicy(PoolPolicy::default()));
    world.pass(120);
    let counts: Vec<_> = (1..=4).map(|n| world.state.segments_on(disk_id(n))).collect();
    let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
    assert!(*least > 0 && most - least <= 11, "{counts:?}");
    assert!(volumes.iter().all(|volume| world.is_settled(*volume)));
    let before = counts;
    world.pass(60);
    let after: Vec<_> = (1..=4).map(|n| world.state.segments_on(disk_id(n))).collect();
    assert_eq!(before, after, "it comes to rest");
}

#[test]
fn copies_that_share_a_rack_are_spread_when_racks_are_named() {
    let mut world = World::new(3);
    let volume = world.volume(1, 3);
    world.add_node(4);
    for (n, rack) in [(1, "r1"), (2, "r1"), (3, "r2"), (4, "r3")] {
        world.run(Op::SetNodeRack { node: node_id(n), rack: Some(rack.to_owned()) });
    }
    world.pass(60);
    for segment in &world.state.volumes[&volume].segments {
        let racks: BTreeSet<_> =
            segment.replicas.iter().map(|copy| world.state.nodes[&copy.node].rack.clone()).collect();
        assert_eq!(racks.len(), 3);
    }
}

#[test]
fn the_end_of_each_scrub_and_each_damage_is_said_once() {
    let mut world = World::new(3);
    world.add_disk(1, 1);
    let disk = disk_id(1);
    let mut report = ScrubReport { progress: ScrubProgress::Running, ..Default::default() };
    let mut then = |report: ScrubReport| {
        let before = world.state.next_event;
        world.scrubs.insert(disk, report);
        world.pass(2);
        let new =
            world.state.events.iter().filter(|e| e.sequence >= before && e.subject == Subject::Disk(disk));
        new.map(|event| (event.kind.clone(), event.severity)).collect::<Vec<_>>()
    };
    assert_eq!(then(report), []);
    (report.damaged_blocks, report.found_blocks) = (3, 3);
    assert_eq!(then(report), [("disk-damage".to_owned(), Severity::Warning)]);
    report.damaged_blocks = 2;
    assert_eq!(then(report), []);
    (report.progress, report.last_end) = (ScrubProgress::Idle, Some(Timestamp(9)));
    assert_eq!(then(report), [("scrub-ended".to_owned(), Severity::Warning)]);
    report.damaged_blocks = 0;
    assert_eq!(then(report), [("disk-repaired".to_owned(), Severity::Info)]);
    (report.progress, report.found_blocks) = (ScrubProgress::Running, 0);
    assert_eq!(then(report), []);
    (report.progress, report.last_end) = (ScrubProgress::Idle, Some(Timestamp(11)));
    assert_eq!(then(report), [("scrub-ended".to_owned(), Severity::Info)]);
}
