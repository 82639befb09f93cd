//! Two nodes between which a VM moves while it runs, and which crash wherever a random schedule says: at no moment do two guests of it run, or one
//! from a memory that its disk has left behind; and once it is quiet there is one, with all that it has done.

use std::{collections::BTreeMap, collections::BTreeSet, sync::Arc};

use proptest::prelude::*;

use super::*;

/// What is done of a migration, one after the other, by the node that the VM leaves or, at its request, by the other one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// The guest is held and all of it is on the other node.
    Brought,
    /// The data process has let go of the volume.
    LetGo,
    /// The cluster knows that the VM has arrived.
    Arrived,
    /// Its guest runs there.
    Resumed,
}

const STAGES: [Stage; 4] = [Stage::Brought, Stage::LetGo, Stage::Arrived, Stage::Resumed];

/// How a migration goes.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// To its end.
    Succeeds,
    /// It fails before this stage, and the node that it leaves says so.
    FailsBefore(Stage),
    /// The node's control process crashes before this stage.
    CrashesBefore(Stage),
    /// It crashes when it has asked the other node to take over, which that does later.
    AsksAndCrashes,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A node looks, plans and does all of it.
    Converge(usize, Fate),
    GuestComputes,
    DataOpens(usize),
    DataRestarts(usize),
    VmmVanishes(usize),
    /// A node loses its lease, and the leader has its VMs started elsewhere.
    IsLost(usize),
    Returns(usize),
    Migrate,
    /// A node takes over, as it was asked to some time ago.
    TakesOver,
    Cancel,
    Pause,
    Resume,
    Want(DesiredRun),
}

fn steps() -> impl Strategy<Value = Step> {
    let node = 0..2usize;
    let stage = (0..STAGES.len()).prop_map(|at| STAGES[at]);
    let fate = prop_oneof![
        3 => Just(Fate::Succeeds),
        1 => stage.clone().prop_map(Fate::FailsBefore),
        2 => stage.prop_map(Fate::CrashesBefore),
        1 => Just(Fate::AsksAndCrashes),
    ];
    prop_oneof![
        12 => (node.clone(), fate).prop_map(|(node, fate)| Step::Converge(node, fate)),
        6 => node.clone().prop_map(Step::DataOpens),
        6 => Just(Step::GuestComputes),
        6 => Just(Step::Migrate),
        3 => Just(Step::TakesOver),
        1 => Just(Step::Cancel),
        1 => node.clone().prop_map(Step::DataRestarts),
        1 => node.clone().prop_map(Step::VmmVanishes),
        1 => node.clone().prop_map(Step::IsLost),
        2 => node.prop_map(Step::Returns),
        1 => Just(Step::Pause),
        1 => Just(Step::Resume),
        1 => Just(Step::Want(DesiredRun::Running)),
        1 => Just(Step::Want(DesiredRun::Stopped(StopMode::Force))),
    ]
}

/// A guest, as it is and not as its node knows it.
#[derive(Clone, Copy, Debug)]
struct Guest {
    /// What it has done, as its memory knows it.
    memory: u64,
    vcpus: Vcpus,
}

struct Place {
    id: NodeId,
    now: Observed,
    guest: Option<Guest>,
}

struct World {
    state: ClusterState,
    places: [Place; 2],
    data_runs: u128,
    /// Who served which generation of the volume.
    served: BTreeMap<Generation, DataInstance>,
    started: BTreeSet<RunEpoch>,
    /// What the guest has done, as its disk knows it.
    disk: u64,
    /// How often it arrived.
    arrivals: u32,
    /// Somebody was asked to take over and has not done so yet.
    asked: Option<(usize, Migration)>,
}

impl World {
    fn new() -> Self {
        let place = |number| Place { id: node(number), now: observed(Some(fresh_data(number))), guest: None };
        Self {
            state: cluster(),
            places: [place(1), place(2)],
            data_runs: 2,
            served: BTreeMap::new(),
            started: BTreeSet::new(),
            disk: 0,
            arrivals: 0,
            asked: None,
        }
    }

    fn propose(&mut self, op: Op) -> CommandResult {
        let result = self.state.apply(&Command { at: Timestamp(1), task: None, op });
        assert_eq!(invariants::violations(&self.state), Vec::<String>::new());
        result
    }

    fn data(&mut self, at: usize) -> &mut DataView {
        self.places[at].now.data.as_mut().unwrap()
    }

    fn is_lost(&self, at: usize) -> bool {
        self.places[at].now.standing == Standing::Lapsed
    }

    /// Gives the VM a node when it has none, or has lost it.
    fn leader(&mut self) {
        let lost: Vec<_> = (0..2).filter(|at| self.is_lost(*at)).map(|at| self.places[at].id).collect();
        let now = &self.state.vms[&vm()];
        let (expected, migration) = (now.epoch, now.migration);
        if let Some(migration) = migration.filter(|migration| lost.contains(&migration.to)) {
            let error = TaskError { detail: "lost".into(), next: "wait".into() };
            let _ = self.propose(Op::MigrationFailed { vm: vm(), epoch: migration.epoch, error });
        }
        let now = &self.state.vms[&vm()];
        let needs = now.assignment.is_none_or(|run| lost.contains(&run.node));
        let free = self.state.volumes[&volume()].coordinator;
        let to = (0..2)
            .filter(|at| !self.is_lost(*at))
            .map(|at| self.places[at].id)
            .find(|node| free.is_none_or(|holder| holder == *node || lost.contains(&holder)));
        if now.desired == DesiredRun::Running
            && needs
            && let Some(node) = to
        {
            let reason = command::AssignReason::Start;
            // The third copy is on a node that never moves: one is always in reach.
            let _ = self.propose(Op::AssignVm { vm: vm(), node, expected, reason, unreachable: lost });
        } else if let (DesiredRun::Stopped(_), Some(run)) = (now.desired, now.assignment)
            && lost.contains(&run.node)
        {
            let _ = self.propose(Op::VmExited { vm: vm(), epoch: run.epoch, exit: VmExit::NodeLost });
        }
    }

    fn converge(&mut self, at: usize, fate: Fate) -> bool {
        self.leader();
        let place = &self.places[at];
        let view = View { me: place.id, paths: &paths(), state: &self.state, observed: &place.now };
        let plan = plan(view);
        let quiet = plan.actions.is_empty();
        if let Some(config) = plan.data {
            self.configure(at, config);
        }
        for action in plan.actions {
            self.perform(at, action, fate);
        }
        if let Fate::CrashesBefore(_) | Fate::AsksAndCrashes = fate {
            // The next control process does not know what was done.
            self.know(at, None);
        }
        quiet
    }

    fn configure(&mut self, at: usize, config: DataConfig) {
        let wanted: BTreeMap<_, _> =
            config.storage.volumes.iter().map(|volume| (volume.id, volume.generation)).collect();
        let data = self.data(at);
        let open: Vec<_> = data.status.storage.volumes.clone();
        data.status.storage.volumes.retain(|open| wanted.contains_key(&open.id));
        for (id, generation) in &wanted {
            match data.status.storage.volumes.iter_mut().find(|open| open.id == *id) {
                Some(open) if open.generation == *generation => {}
                Some(open) => (open.generation, open.state) = (*generation, VolumeState::Opening),
                None => data.status.storage.volumes.push(VolumeStatus {
                    id: *id,
                    generation: *generation,
                    state: VolumeState::Opening,
                    replicas: Vec::new(),
                }),
            }
        }
        data.applied = Some(Arc::new(config));
        for open in open.into_iter().filter(|open| !wanted.contains_key(&open.id)) {
            if open.state == VolumeState::Open {
                let (volume, generation) = (open.id.into(), open.generation.into());
                // Refused when it was opened elsewhere meanwhile.
                let _ = self.propose(Op::CloseVolume { volume, generation, cleanliness: Cleanliness::Clean });
            }
        }
    }

    fn data_opens(&mut self, at: usize) {
        let opening = self.data(at).status.storage.volumes.first().cloned();
        let Some(open) = opening.filter(|open| open.state == VolumeState::Opening) else { return };
        let (volume, generation) = (open.id.into(), Generation::from(open.generation));
        let current = self.state.volumes[&volume].generation == generation;
        if self.is_lost(at) || !current || self.propose(Op::VolumeOpened { volume, generation }).is_err() {
            return;
        }
        let instance = self.data(at).instance();
        let first = *self.served.entry(generation).or_insert(instance);
        assert_eq!(first, instance, "two data processes served generation {generation}");
        self.data(at).status.storage.volumes[0].state = VolumeState::Open;
    }

    fn is_alive(&self, at: usize) -> bool {
        self.places[at].now.runs.get(&vm()).is_some_and(|run| matches!(run.phase, RunPhase::Alive { .. }))
    }

    /// A guest that runs does something, if its node can write for it.
    fn guest_computes(&mut self) {
        let running = |place: &&Place| place.guest.is_some_and(|guest| guest.vcpus == Vcpus::Running);
        assert!(self.places.iter().filter(running).count() <= 1, "two guests of one VM run");
        let generation = self.state.volumes[&volume()].generation;
        for place in &mut self.places {
            let data = place.now.data.as_ref().unwrap();
            let can_write = data
                .status
                .storage
                .volumes
                .iter()
                .any(|open| open.state == VolumeState::Open && open.generation == generation.into());
            if let Some(guest) = place.guest.as_mut().filter(|guest| guest.vcpus == Vcpus::Running) {
                assert_eq!(guest.memory, self.disk, "a guest runs whose disk knows more than it does");
                if can_write {
                    self.disk += 1;
                    guest.memory = self.disk;
                }
            }
        }
    }

    fn know(&mut self, at: usize, to: Option<Vcpus>) {
        if let Some(Run { phase: RunPhase::Alive { vcpus, .. }, .. }) =
            self.places[at].now.runs.get_mut(&vm())
        {
            *vcpus = to;
        }
    }

    fn set_vcpus(&mut self, at: usize, to: Vcpus) {
        if let Some(guest) = &mut self.places[at].guest {
            guest.vcpus = to;
            self.know(at, Some(to));
        }
    }

    fn end(&mut self, at: usize, ended: Ended) {
        if self.is_alive(at) {
            self.places[at].now.runs.get_mut(&vm()).unwrap().phase = RunPhase::Ended(ended);
            self.places[at].guest = None;
        }
    }

    /// Stage after stage, as far as it gets.
    fn migrate(&mut self, from: usize, migration: Migration, fate: Fate) {
        self.know(from, None);
        let to = 1 - from;
        for stage in STAGES {
            match fate {
                Fate::CrashesBefore(at) if at == stage => return,
                Fate::FailsBefore(at) if at == stage => return self.fail(migration),
                _ if stage < Stage::Resumed && !self.is_current(migration) => return,
                _ => {}
            }
            let waits = self.is_alive(to) && self.places[to].now.runs[&vm()].epoch == migration.epoch;
            match stage {
                Stage::Brought => {
                    if !waits || self.places[to].guest.is_some() {
                        // It is not there yet, or has a part of an earlier try.
                        if waits {
                            self.fail(migration);
                        }
                        return;
                    }
                    let Some(guest) = &mut self.places[from].guest else { return };
                    guest.vcpus = Vcpus::Held;
                    self.places[to].guest = Some(*guest);
                }
                Stage::LetGo => {
                    let open = self.data(from).status.storage.volumes.first_mut();
                    if let Some(open) = open.filter(|open| open.state == VolumeState::Open) {
                        open.state = VolumeState::Closed;
                        let (volume, generation) = (open.id.into(), open.generation.into());
                        let cleanliness = Cleanliness::Clean;
                        self.propose(Op::CloseVolume { volume, generation, cleanliness }).unwrap();
                    }
                }
                Stage::Arrived if matches!(fate, Fate::AsksAndCrashes) => {
                    self.asked = Some((to, migration));
                    return;
                }
                Stage::Arrived => {
                    if !waits || self.is_lost(to) || !self.arrives(migration) {
                        return self.fail(migration);
                    }
                }
                Stage::Resumed => self.goes_on(to),
            }
        }
    }

    fn is_current(&self, migration: Migration) -> bool {
        self.state.vms[&vm()].migration.is_some_and(|now| now.epoch == migration.epoch)
    }

    fn arrives(&mut self, migration: Migration) -> bool {
        let arrived = self.propose(Op::VmArrived { vm: vm(), epoch: migration.epoch }).is_ok();
        self.arrivals += u32::from(arrived);
        arrived
    }

    /// As the order to the VMM is, unknown to the planner.
    fn goes_on(&mut self, at: usize) {
        if self.state.vms[&vm()].paused.is_none() {
            self.places[at].guest.as_mut().unwrap().vcpus = Vcpus::Running;
        }
    }

    fn takes_over(&mut self) {
        let Some((at, migration)) = self.asked.take() else { return };
        let made = self.is_alive(at)
            && self.places[at].now.runs[&vm()].epoch == migration.epoch
            && self.places[at].guest.is_some();
        if made && !self.is_lost(at) && self.arrives(migration) {
            self.goes_on(at);
        }
    }

    fn fail(&mut self, migration: Migration) {
        let error = TaskError { detail: "a cable".into(), next: "plug it in".into() };
        // Refused when it has arrived.
        let _ = self.propose(Op::MigrationFailed { vm: vm(), epoch: migration.epoch, error });
    }

    fn perform(&mut self, at: usize, action: Action, fate: Fate) {
        let me = self.places[at].id;
        match action {
            Action::OpenVolume { volume, expected, unreachable } => {
                let op = Op::OpenVolume { volume, node: me, expected, unreachable };
                if let Ok(Outcome::Volume(opened)) = self.propose(op) {
                    self.data(at).grants.insert(volume, opened.generation);
                }
            }
            Action::CloseVolume { volume, generation, cleanliness } => {
                let _ = self.propose(Op::CloseVolume { volume, generation, cleanliness });
            }
            Action::StartVm { vm, epoch, begin, .. } => {
                assert!(!self.places[at].now.runs.contains_key(&vm), "it runs already");
                assert!(self.started.insert(epoch), "run epoch {epoch:?} was started twice");
                let boots = Guest { memory: self.disk, vcpus: Vcpus::Running };
                let guest = (begin == Begin::Boot).then_some(boots);
                self.places[at].guest = guest;
                self.places[at].now.runs.insert(vm, with_vcpus(epoch.0, guest.map(|guest| guest.vcpus)));
            }
            Action::SetVcpus { to, .. } => self.set_vcpus(at, to),
            Action::MigrateVm { migration, .. } => self.migrate(at, migration, fate),
            // It does at once as it is told.
            Action::PressPowerButton { .. } => self.end(at, Ended::GuestShutdown),
            Action::KillVm { why, .. } => self.end(at, why),
            Action::ReportExit { vm, epoch, exit } => {
                self.propose(Op::VmExited { vm, epoch, exit }).unwrap();
            }
            Action::ForgetRun { vm, .. } => {
                let run = self.places[at].now.runs.remove(&vm).unwrap();
                assert!(matches!(run.phase, RunPhase::Ended(_)), "a run was forgotten that goes on");
            }
            other => panic!("not expected here: {other:?}"),
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Converge(at, fate) => drop(self.converge(at, fate)),
            Step::GuestComputes => self.guest_computes(),
            Step::DataOpens(at) => self.data_opens(at),
            Step::DataRestarts(at) => {
                self.data_runs += 1;
                self.places[at].now.data = Some(fresh_data(self.data_runs));
            }
            Step::VmmVanishes(at) => self.end(at, Ended::Crashed("vanished".to_owned())),
            Step::IsLost(at) => {
                self.places[at].now.standing = Standing::Lapsed;
                // It kills its guests before the leader takes it for dead.
                self.end(at, Ended::LeaseLapsed);
            }
            Step::Returns(at) => self.places[at].now.standing = Standing::Leased,
            Step::Migrate => {
                let from = self.state.vms[&vm()].assignment.map(|run| run.node);
                let to = if from == Some(node(1)) { node(2) } else { node(1) };
                let _ = self.propose(Op::MigrateVm { vm: vm(), to, terms: MigrationTerms::default() });
            }
            Step::TakesOver => self.takes_over(),
            Step::Cancel => drop(self.propose(Op::CancelMigration(vm()))),
            Step::Pause => drop(self.propose(Op::PauseVm(vm()))),
            Step::Resume => drop(self.propose(Op::ResumeVm(vm()))),
            Step::Want(desired) => drop(self.propose(Op::SetVmDesired { vm: vm(), desired })),
        }
    }

    /// Lets things settle, then checks that there is what should be.
    fn settle_and_check(&mut self) {
        let mut quiet = false;
        for at in 0..2 {
            self.take(Step::Returns(at));
        }
        for _ in 0..20 {
            quiet = self.converge(0, Fate::Succeeds) & self.converge(1, Fate::Succeeds);
            self.data_opens(0);
            self.data_opens(1);
            self.guest_computes();
        }
        assert!(quiet, "the planner does not come to rest: {:?}", self.state.vms[&vm()]);
        let now = &self.state.vms[&vm()];
        assert_eq!(now.migration, None);
        match now.desired {
            DesiredRun::Running => {
                let run = now.assignment.unwrap();
                let (here, there) = match run.node == self.places[0].id {
                    true => (&self.places[0], &self.places[1]),
                    false => (&self.places[1], &self.places[0]),
                };
                assert_eq!(here.now.runs[&vm()].epoch, run.epoch);
                let wanted = if now.paused.is_some() { Vcpus::Held } else { Vcpus::Running };
                let guest = here.guest.unwrap();
                assert_eq!((guest.vcpus, guest.memory), (wanted, self.disk));
                assert!(there.now.runs.is_empty() && there.guest.is_none(), "nothing of it is left there");
                let volume = &self.state.volumes[&volume()];
                assert!(crate::reconcile::plan::data::is_open(volume, here.now.data.as_ref().unwrap()));
                let config = there.now.data.as_ref().unwrap().applied.clone().unwrap();
                assert!(config.storage.standby.is_empty() && config.storage.volumes.is_empty());
                assert!(config.overlay.ports.is_empty());
            }
            DesiredRun::Stopped(_) => {
                assert!(self.places.iter().all(|place| place.now.runs.is_empty()));
                let volume = &self.state.volumes[&volume()];
                // Copies of a node that was lost are completed before it is closed.
                assert!(volume.coordinator.is_none() || self.state.needs_healing(volume));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn a_vm_that_moves_is_one_wherever_it_is_cut(steps in proptest::collection::vec(steps(), 0..60)) {
        let mut world = World::new();
        world.settle_and_check();
        for step in steps {
            world.take(step);
        }
        world.settle_and_check();
    }
}

#[test]
fn it_is_cut_at_every_stage_and_stays_or_arrives() {
    let fates = STAGES.iter().flat_map(|stage| [Fate::FailsBefore(*stage), Fate::CrashesBefore(*stage)]);
    for fate in [Fate::Succeeds, Fate::AsksAndCrashes].into_iter().chain(fates) {
        let mut world = World::new();
        world.settle_and_check();
        let before = world.disk;
        world.take(Step::Migrate);
        // The other node has volume and port in standby, then its VMM waits.
        for _ in 0..3 {
            world.take(Step::Converge(1, Fate::Succeeds));
        }
        assert!(world.is_alive(1) && world.places[1].guest.is_none(), "{fate:?}");
        world.take(Step::Converge(0, fate));
        world.settle_and_check();
        let at = world.state.vms[&vm()].assignment.unwrap().node;
        let stays = matches!(fate, Fate::FailsBefore(stage) if stage <= Stage::Arrived);
        // What a crash leaves is tried again by the next control process, or given up.
        if !matches!(fate, Fate::CrashesBefore(_) | Fate::AsksAndCrashes) {
            assert_eq!(at == node(1), stays, "{fate:?}");
        }
        assert!(world.disk > before, "{fate:?}: it goes on");
        // And once more, without a cut.
        world.take(Step::Migrate);
        world.settle_and_check();
        assert_ne!(world.state.vms[&vm()].assignment.unwrap().node, at, "{fate:?}");
    }
}

#[test]
fn the_other_node_keeps_its_connections_when_the_vm_arrives() {
    let mut world = World::new();
    world.settle_and_check();
    world.take(Step::Migrate);
    for _ in 0..3 {
        world.take(Step::Converge(1, Fate::Succeeds));
    }
    let config = world.data(1).applied.clone().unwrap();
    let standby = config.storage.standby[0].clone();
    assert_eq!(config.overlay.ports[0].standing, netfabric::overlay::PortStanding::Standby);
    assert!(config.storage.volumes.is_empty());
    world.take(Step::Converge(0, Fate::Succeeds));
    world.take(Step::Converge(1, Fate::Succeeds));
    let config = world.data(1).applied.clone().unwrap();
    let storage::config::Access::VhostUser { socket } = &config.storage.volumes[0].access else { panic!() };
    assert_eq!((socket, standby.id), (&standby.socket, config.storage.volumes[0].id));
    assert_eq!(config.overlay.ports[0].standing, netfabric::overlay::PortStanding::Active);
    assert!(config.storage.standby.is_empty());
    assert_eq!(world.arrivals, 1);
}
