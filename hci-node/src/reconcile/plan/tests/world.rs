//! A small world around the planner: a data process, VMM processes and a leader that do what they are told, and that
//! crash wherever a random schedule says. Whatever happened, once it is quiet the world is as the state wants it, and
//! at no moment was one generation served by two data processes or one VM run twice.

use std::{collections::BTreeMap, collections::BTreeSet, sync::Arc};

use proptest::prelude::*;
use storage::config::CleanState;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// Look, plan and do all of it.
    Converge,
    /// Look and plan, but crash after so many actions; the configuration may not get through.
    ConvergeAndCrash { actions: usize, configured: bool },
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

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Converge),
        4 => (0_usize..3, any::<bool>())
            .prop_map(|(actions, configured)| Step::ConvergeAndCrash { actions, configured }),
        3 => Just(Step::DataOpens),
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
    ]
}

struct World {
    state: ClusterState,
    now: Observed,
    data_runs: u128,
    /// Who served which generation.
    served: BTreeMap<Generation, DataInstance>,
    /// Runs that were ever started.
    started: BTreeSet<RunEpoch>,
}

impl World {
    fn new() -> Self {
        let now = observed(Some(fresh_data(1)));
        Self { state: cluster(), now, data_runs: 1, served: BTreeMap::new(), started: BTreeSet::new() }
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
        for action in plan.actions.into_iter().take(actions) {
            self.perform(action);
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
            let generation = open.generation.into();
            let clean = Op::CloseVolume { volume: volume(), generation, cleanliness: Cleanliness::Clean };
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
        let opening: Vec<_> = {
            let open = self.data().status.storage.volumes.iter();
            open.filter(|volume| volume.state == VolumeState::Opening)
                .map(|volume| volume.generation.into())
                .collect()
        };
        let instance = self.data().instance();
        for generation in opening {
            let current = self.state.volumes[&volume()].generation == generation;
            if self.propose(Op::VolumeOpened { volume: volume(), generation }).is_err() || !current {
                continue;
            }
            let first = *self.served.entry(generation).or_insert(instance);
            assert_eq!(first, instance, "two data processes served generation {generation}");
            for open in &mut self.data().status.storage.volumes {
                open.state = VolumeState::Open;
            }
        }
    }

    fn perform(&mut self, action: Action) {
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
            Action::StartVm { vm, epoch, .. } => {
                assert!(!self.now.runs.contains_key(&vm), "it runs already");
                assert!(self.started.insert(epoch), "run epoch {epoch:?} was started twice");
                self.now.runs.insert(vm, alive(epoch.0));
            }
            Action::PressPowerButton { vm, .. } => {
                if let Some(Run { phase: RunPhase::Alive { button_pressed }, .. }) =
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
        }
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
            Step::GuestEnds => self.end(vm(), Ended::GuestShutdown),
            Step::GuestObeys => {
                let pressed = |run: &Run| matches!(run.phase, RunPhase::Alive { button_pressed: Some(_) });
                if self.now.runs.get(&vm()).is_some_and(pressed) {
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
    fn everything_converges_after_any_crash_at_any_point(steps in proptest::collection::vec(steps(), 0..40)) {
        let mut world = World::new();
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
