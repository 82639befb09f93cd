//! A small world around the planner: a data process, VMM processes and a leader that do what they are told, and that
//! crash wherever a random schedule says. Whatever happened, once it is quiet the world is as the state wants it, and
//! at no moment was one generation served by two data processes or one VM run twice, or from a memory that its disk has left behind.

use std::{collections::BTreeMap, collections::BTreeSet, sync::Arc};

use proptest::prelude::*;
use storage::config::CleanState;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Look, plan and do all of it.
    Converge,
    /// Look and plan, but crash after so many actions, in the middle of the last one if it has one; the configuration may not get through.
    ConvergeAndCrash { actions: usize, configured: bool },
    /// The guest computes and writes to its disk.
    GuestComputes,
    /// Somebody pauses, suspends or resumes it, or gives up its state.
    Ask(Ask),
    /// The data process is killed and started again.
    DataRestarts,
    /// The data process opens what it was told to.
    DataOpens,
    /// The VMM is killed by the kernel.
    VmmVanishes,
    /// The guest shuts itself down.
    GuestEnds,
    /// The guest does as its power button says.
    GuestObeys,
    /// The lease runs out.
    LeaseLapses,
    /// The lease is back.
    LeaseReturns,
    /// Somebody wants the VM to run or to stop.
    Want(DesiredRun),
    /// Somebody restarts it.
    Restart,
}

#[derive(Clone, Copy, Debug)]
enum Ask {
    Pause,
    Suspend,
    Resume,
    Discard,
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        9 => Just(Step::Converge),
        4 => (0_usize..3, any::<bool>())
            .prop_map(|(actions, configured)| Step::ConvergeAndCrash { actions, configured }),
        5 => Just(Step::DataOpens),
        2 => Just(Step::DataRestarts),
        1 => Just(Step::VmmVanishes),
        1 => Just(Step::GuestEnds),
        1 => Just(Step::GuestObeys),
        1 => Just(Step::LeaseLapses),
        2 => Just(Step::LeaseReturns),
        1 => Just(Step::Want(DesiredRun::Running)),
        1 => Just(Step::Want(DesiredRun::Stopped(StopMode::Graceful))),
        1 => Just(Step::Want(DesiredRun::Stopped(StopMode::Force))),
        1 => Just(Step::Restart),
        4 => Just(Step::GuestComputes),
        1 => Just(Step::Ask(Ask::Pause)),
        4 => Just(Step::Ask(Ask::Suspend)),
        2 => Just(Step::Ask(Ask::Resume)),
        1 => Just(Step::Ask(Ask::Discard)),
    ]
}

struct World {
    state: ClusterState,
    now: Observed,
    data_runs: u128,
    /// Who served which generation of which volume.
    served: BTreeMap<(VolumeId, Generation), DataInstance>,
    /// Runs that were ever started.
    started: BTreeSet<RunEpoch>,
    /// What the guest has done, as its disk knows it.
    disk: u64,
    /// The guest of the VMM that is there, if it has been made.
    guest: Option<Guest>,
    /// What state volumes hold: what the guest had done when it was written.
    written: BTreeMap<VolumeId, u64>,
    suspensions: u128,
}

/// A guest, as it is and not as the node knows it.
#[derive(Clone, Copy, Debug)]
struct Guest {
    /// What it has done, as its memory knows it.
    memory: u64,
    vcpus: Vcpus,
}

impl World {
    fn new() -> Self {
        let now = observed(Some(fresh_data(1)));
        Self {
            state: cluster(),
            now,
            data_runs: 1,
            served: BTreeMap::new(),
            started: BTreeSet::new(),
            disk: 0,
            guest: None,
            written: BTreeMap::new(),
            suspensions: 0,
        }
    }

    fn data(&mut self) -> &mut DataView {
        self.now.data.as_mut().unwrap()
    }

    fn propose(&mut self, op: Op) -> CommandResult {
        self.state.apply(&Command { at: Timestamp(1), task: None, op })
    }

    /// Assigns the VM whenever it should run and does not.
    fn leader(&mut self) {
        let vm_now = &self.state.vms[&vm()];
        if vm_now.desired == DesiredRun::Running && vm_now.assignment.is_none() {
            assign(&mut self.state, me());
        }
    }

    fn converge(&mut self, actions: usize, configured: bool) -> bool {
        self.leader();
        let plan = plan_for(&self.state, &self.now);
        let quiet = plan.actions.is_empty();
        if let Some(config) = plan.data
            && configured
        {
            self.configure(config);
        }
        let crashes = actions < usize::MAX;
        for (number, action) in (1..).zip(plan.actions.into_iter().take(actions)) {
            self.perform(action, crashes && number == actions);
        }
        if crashes {
            // The next control process does not know what was done.
            self.know(vm(), None);
        }
        quiet
    }

    /// The data process takes a configuration: closes what is gone, begins to open what is new.
    fn configure(&mut self, config: DataConfig) {
        let wanted = config.storage.volumes.iter().map(|volume| (volume.id, volume.generation));
        let wanted: BTreeMap<_, _> = wanted.collect();
        let closing: Vec<_> = self
            .data()
            .status
            .storage
            .volumes
            .iter()
            .filter(|open| !wanted.contains_key(&open.id))
            .cloned()
            .collect();
        for open in closing {
            let (volume, generation) = (open.id.into(), open.generation.into());
            let clean = Op::CloseVolume { volume, generation, cleanliness: Cleanliness::Clean };
            // Refused when it was opened elsewhere meanwhile.
            let _ = self.propose(clean);
        }
        let data = self.data();
        data.status.storage.volumes.retain(|open| wanted.contains_key(&open.id));
        for (id, generation) in wanted {
            let present = data.status.storage.volumes.iter_mut().find(|open| open.id == id);
            match present {
                Some(open) if open.generation == generation => {}
                Some(open) => (open.generation, open.state) = (generation, VolumeState::Opening),
                None => data.status.storage.volumes.push(VolumeStatus {
                    id,
                    generation,
                    state: VolumeState::Opening,
                    replicas: Vec::new(),
                }),
            }
        }
        data.applied = Some(Arc::new(config));
    }

    fn data_opens(&mut self) {
        let opening: Vec<(VolumeId, Generation)> = {
            let open = self.data().status.storage.volumes.iter();
            open.filter(|volume| volume.state == VolumeState::Opening)
                .map(|volume| (volume.id.into(), volume.generation.into()))
                .collect()
        };
        let instance = self.data().instance();
        for (volume, generation) in opening {
            let current = self.state.volumes.get(&volume).is_some_and(|now| now.generation == generation);
            if self.propose(Op::VolumeOpened { volume, generation }).is_err() || !current {
                continue;
            }
            let first = *self.served.entry((volume, generation)).or_insert(instance);
            assert_eq!(first, instance, "two data processes served generation {generation}");
            let mut open = self.data().status.storage.volumes.iter_mut();
            if let Some(open) = open.find(|open| VolumeId::from(open.id) == volume) {
                open.state = VolumeState::Open;
            }
        }
    }

    /// The guest does something, if it runs: its memory has to know all that its disk does.
    fn guest_computes(&mut self) {
        let alive = |run: &Run| matches!(run.phase, RunPhase::Alive { .. });
        if !self.now.runs.get(&vm()).is_some_and(alive) {
            return;
        }
        if let Some(guest) = self.guest.as_mut().filter(|guest| guest.vcpus == Vcpus::Running) {
            assert_eq!(guest.memory, self.disk, "a guest runs whose disk knows more than it does");
            self.disk += 1;
            guest.memory = self.disk;
        }
    }

    fn know(&mut self, vm: VmId, to: Option<Vcpus>) {
        if let Some(Run { phase: RunPhase::Alive { vcpus, .. }, .. }) = self.now.runs.get_mut(&vm) {
            *vcpus = to;
        }
    }

    fn save(&mut self, vm: VmId, epoch: RunEpoch, volume: VolumeId, generation: Generation, cut: bool) {
        self.know(vm, None);
        let Some(guest) = &mut self.guest else { return };
        guest.vcpus = Vcpus::Held;
        self.written.insert(volume, guest.memory);
        if cut {
            return;
        }
        let processor = vmm::Processor::default();
        // Refused when it is not wanted any more.
        let _ = self.propose(Op::VmSuspended { vm, epoch, generation, bytes: 1, processor });
    }

    fn restore(&mut self, vm: VmId, epoch: RunEpoch, volume: VolumeId, cut: bool) {
        self.know(vm, None);
        let memory = self.written[&volume];
        self.guest.get_or_insert(Guest { memory, vcpus: Vcpus::Held });
        if self.propose(Op::SuspensionUsed { vm, epoch }).is_err() || cut {
            return;
        }
        self.set_vcpus(vm, Vcpus::Running);
    }

    fn set_vcpus(&mut self, vm: VmId, to: Vcpus) {
        if let Some(guest) = &mut self.guest {
            guest.vcpus = to;
            self.know(vm, Some(to));
        }
    }

    /// Does it, or a part of it.
    fn perform(&mut self, action: Action, cut: bool) {
        match action {
            Action::OpenVolume { volume, expected, unreachable } => {
                let op = Op::OpenVolume { volume, node: me(), expected, unreachable };
                if let Ok(Outcome::Volume(opened)) = self.propose(op) {
                    self.data().grants.insert(volume, opened.generation);
                }
            }
            Action::CloseVolume { volume, generation, cleanliness } => {
                let _ = self.propose(Op::CloseVolume { volume, generation, cleanliness });
            }
            Action::StartVm { vm, epoch, begin, .. } => {
                assert!(!self.now.runs.contains_key(&vm), "it runs already");
                assert!(self.started.insert(epoch), "run epoch {epoch:?} was started twice");
                let (guest, vcpus) = match begin {
                    Begin::Boot => {
                        (Some(Guest { memory: self.disk, vcpus: Vcpus::Running }), Some(Vcpus::Running))
                    }
                    Begin::Saved => (None, None),
                    Begin::Successor(_) => panic!("nothing is started like this"),
                };
                self.guest = guest;
                self.now.runs.insert(vm, with_vcpus(epoch.0, vcpus));
            }
            Action::SetVcpus { vm, to, .. } => self.set_vcpus(vm, to),
            Action::SaveVm { vm, epoch, volume, generation, .. } => {
                self.save(vm, epoch, volume, generation, cut);
            }
            Action::RestoreVm { vm, epoch, volume, .. } => self.restore(vm, epoch, volume, cut),
            Action::PurgeVolume { volume, disks } => drop(self.propose(Op::VolumePurged { volume, disks })),
            Action::PressPowerButton { vm, .. } => {
                if let Some(Run { phase: RunPhase::Alive { button_pressed, .. }, .. }) =
                    self.now.runs.get_mut(&vm)
                {
                    *button_pressed = Some(crate::reconcile::plan::vms::SHUTDOWN_GRACE);
                }
            }
            Action::KillVm { vm, why, .. } => self.end(vm, why),
            Action::ReportExit { vm, epoch, exit } => {
                self.propose(Op::VmExited { vm, epoch, exit }).unwrap();
            }
            Action::ForgetRun { vm, .. } => {
                let run = self.now.runs.remove(&vm).unwrap();
                assert!(matches!(run.phase, RunPhase::Ended(_)), "a run was forgotten that goes on");
            }
            other => panic!("not expected here: {other:?}"),
        }
    }

    fn end(&mut self, vm: VmId, ended: Ended) {
        if let Some(run) = self.now.runs.get_mut(&vm)
            && matches!(run.phase, RunPhase::Alive { .. })
        {
            run.phase = RunPhase::Ended(ended);
            self.guest = None;
        }
    }

    fn ask(&mut self, ask: Ask) {
        let vm = vm();
        let op = match ask {
            Ask::Pause => Op::PauseVm(vm),
            Ask::Resume => Op::ResumeVm(vm),
            Ask::Discard => Op::DiscardSuspension { vm, desired: DesiredRun::Running },
            Ask::Suspend => {
                self.suspensions += 1;
                let volume = command::NewVolume {
                    id: VolumeId(Uuid::from_u128(0x1000 + self.suspensions)),
                    name: format!("state{}", self.suspensions),
                    size_bytes: 1 << 30,
                    replicas: 3,
                    min_in_sync: None,
                    durability: Durability::WriteBack,
                    compression: crate::state::Compression::Off,
                };
                Op::SuspendVm { vm, volume, unreachable: Vec::new() }
            }
        };
        // Refused where it makes no sense.
        let _ = self.propose(op);
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Converge => drop(self.converge(usize::MAX, true)),
            Step::ConvergeAndCrash { actions, configured } => drop(self.converge(actions, configured)),
            Step::DataRestarts => {
                self.data_runs += 1;
                self.now.data = Some(fresh_data(self.data_runs));
            }
            Step::DataOpens => self.data_opens(),
            Step::VmmVanishes => self.end(vm(), Ended::Crashed("vanished".to_owned())),
            Step::GuestComputes => self.guest_computes(),
            Step::Ask(ask) => self.ask(ask),
            Step::GuestEnds => {
                if self.guest.is_some_and(|guest| guest.vcpus == Vcpus::Running) {
                    self.end(vm(), Ended::GuestShutdown);
                }
            }
            Step::GuestObeys => {
                let pressed =
                    |run: &Run| matches!(run.phase, RunPhase::Alive { button_pressed: Some(_), .. });
                if self.now.runs.get(&vm()).is_some_and(pressed)
                    && self.guest.is_some_and(|guest| guest.vcpus == Vcpus::Running)
                {
                    self.end(vm(), Ended::GuestShutdown);
                }
            }
            Step::LeaseLapses => self.now.standing = Standing::Lapsed,
            Step::LeaseReturns => self.now.standing = Standing::Leased,
            Step::Want(desired) => drop(self.propose(Op::SetVmDesired { vm: vm(), desired })),
            Step::Restart => drop(self.propose(Op::RestartVm(vm()))),
        }
    }

    /// Lets things settle, then checks that all is as the state wants it.
    fn settle_and_check(&mut self) {
        self.now.standing = Standing::Leased;
        for _ in 0..20 {
            self.converge(usize::MAX, true);
            self.data_opens();
            self.guest_computes();
        }
        let quiet = self.converge(usize::MAX, true);
        assert!(quiet, "the planner does not come to rest: {:?}", plan_for(&self.state, &self.now).actions);
        let (vm_now, volume_now) = (&self.state.vms[&vm()], &self.state.volumes[&volume()]);
        let data = self.now.data.as_ref().unwrap();
        match vm_now.desired {
            DesiredRun::Running => {
                let epoch = vm_now.assignment.unwrap().epoch;
                let run = &self.now.runs[&vm()];
                assert!(run.epoch == epoch && matches!(run.phase, RunPhase::Alive { .. }), "{run:?}");
                assert!(super::super::data::is_open(volume_now, data));
                let configured = &data.applied.as_ref().unwrap().storage.volumes[0];
                assert!(configured.generation == volume_now.generation.into());
                assert_eq!(vm_now.suspension, None, "what it went on with is used up");
                let wanted = if vm_now.paused.is_some() { Vcpus::Held } else { Vcpus::Running };
                assert_eq!(self.guest.map(|guest| guest.vcpus), Some(wanted));
            }
            DesiredRun::Stopped(_) => {
                assert_eq!((vm_now.assignment, self.now.runs.len()), (None, 0));
                assert_eq!(volume_now.coordinator, None);
                assert_eq!(data.status.storage.volumes, []);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn everything_converges_after_any_crash_at_any_point(
        runs in any::<bool>(),
        steps in proptest::collection::vec(steps(), 0..60),
    ) {
        let mut world = World::new();
        if runs {
            world.settle_and_check();
        }
        for step in steps {
            world.take(step);
        }
        world.settle_and_check();
    }
}

#[test]
fn a_clean_stop_leaves_a_clean_volume() {
    let mut world = World::new();
    world.settle_and_check();
    world.take(Step::Want(DesiredRun::Stopped(StopMode::Graceful)));
    world.settle_and_check();
    assert_eq!(world.state.volumes[&volume()].cleanliness, Cleanliness::Clean);
    world.take(Step::Want(DesiredRun::Running));
    world.take(Step::Converge);
    let applied = world.now.data.as_ref().unwrap().applied.clone().unwrap();
    assert_eq!(applied.storage.volumes[0].clean, CleanState::Clean);
}

#[test]
fn a_guest_goes_on_from_what_was_written_wherever_its_node_crashes() {
    for cut in [None, Some(1), Some(2)] {
        let mut world = World::new();
        world.settle_and_check();
        world.take(Step::Ask(Ask::Suspend));
        world.take(Step::Converge);
        world.take(Step::DataOpens);
        if cut.is_some() {
            // Written, and nobody was told: it is written again.
            world.take(Step::ConvergeAndCrash { actions: 1, configured: true });
            assert!(world.guest.is_some_and(|guest| guest.vcpus == Vcpus::Held));
        }
        world.settle_and_check();
        assert!(world.state.vms[&vm()].is_suspended() && world.guest.is_none());
        let before = world.disk;
        world.take(Step::Ask(Ask::Resume));
        for _ in 0..4 {
            world.take(Step::ConvergeAndCrash { actions: cut.unwrap_or(usize::MAX), configured: true });
            world.take(Step::DataOpens);
        }
        world.settle_and_check();
        assert!(world.disk > before, "the guest goes on: {:?}", world.guest);
    }
}
