//! The loop: look, plan, do, wait for something to happen.
//!
//! It keeps four things in memory, none of which it needs after a restart: which generations were opened for the
//! present instance of the data process (they are opened anew), whose power button was pressed when (it is pressed
//! again), whose processors are held or not (they are held or let go once more), and how long to wait before what failed is tried again.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    actions::{ActionError, Remember, Tools},
    boot_files,
    cluster::{Lease, ProposeError},
    link::{self, Gate, Link, Wanted},
    observed::{DataView, Observed, Run, RunPhase, Standing, Vcpus},
    plan::{self, Action, ActionKey, View, data::Leftover},
    report::local_report,
    vm_process,
};
use crate::{
    data::protocol::DataInstance,
    state::{
        ClusterState, ContentHash, Generation, Retired, RunEpoch, VmId, VolumeId,
        report::{Executable, LocalReport},
    },
};

/// How often is looked when nothing happens: VMMs that another control process started tell nobody when they end.
const TICK: Duration = Duration::from_millis(500);
/// How long an action that succeeded is not repeated: the local copy of the state may lag.
const SETTLE: Duration = Duration::from_millis(200);
/// First and longest pause before an action that failed is tried again.
const RETRY: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(5);

/// What the loop shows to others.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown {
    pub(super) report: LocalReport,
    pub(super) boot_files: Vec<ContentHash>,
}

struct Pause {
    until: Instant,
    next: Duration,
}

type Finished = (ActionKey, Result<Remember, ActionError>);

pub(super) struct Executor {
    tools: Tools,
    state: watch::Receiver<Arc<ClusterState>>,
    lease: watch::Receiver<Lease>,
    link: Link,
    shown: Arc<Mutex<Shown>>,
    /// A lease of this process' predecessor has ended by then.
    predecessor_until: Instant,
    standing: Standing,
    grants: BTreeMap<VolumeId, (DataInstance, Generation)>,
    pressed: BTreeMap<VmId, (RunEpoch, Instant)>,
    vcpus: BTreeMap<VmId, (RunEpoch, Vcpus)>,
    /// What the VMs' processes run.
    executables: BTreeMap<VmId, Executable>,
    /// Data that are free to be removed, and since when this was seen.
    purgeable: BTreeMap<Leftover, (Option<Retired>, Instant)>,
    pauses: BTreeMap<ActionKey, Pause>,
    running: JoinSet<Finished>,
    under_way: BTreeMap<ActionKey, tokio::task::Id>,
}

impl Executor {
    pub(super) fn new(
        tools: Tools,
        lease: watch::Receiver<Lease>,
        node_lease: Duration,
        link: Link,
        shown: Arc<Mutex<Shown>>,
    ) -> Self {
        Self {
            state: tools.cluster.state(),
            tools,
            lease,
            link,
            shown,
            predecessor_until: Instant::now() + node_lease,
            standing: Standing::Unknown,
            grants: BTreeMap::new(),
            pressed: BTreeMap::new(),
            vcpus: BTreeMap::new(),
            executables: BTreeMap::new(),
            purgeable: BTreeMap::new(),
            pauses: BTreeMap::new(),
            running: JoinSet::new(),
            under_way: BTreeMap::new(),
        }
    }

    /// Converges until `shutdown`. VMMs go on.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let state = self.state.borrow_and_update().clone();
            let lease = *self.lease.borrow_and_update();
            self.link.view.mark_unchanged();
            match self.observe(&state, lease) {
                Ok(observed) => self.converge(&state, &observed),
                Err(error) => tracing::error!(%error, "cannot look at the VMs of this node"),
            }
            let wake = self.wake_at(lease);
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = self.state.changed() => if changed.is_err() { return },
                changed = self.lease.changed() => if changed.is_err() { return },
                changed = self.link.view.changed() => if changed.is_err() { return },
                () = self.tools.vm_ended.notified() => {}
                Some(finished) = self.running.join_next_with_id() => self.finished(finished),
                () = sleep_until(wake) => {}
            }
        }
    }

    fn wake_at(&self, lease: Lease) -> Instant {
        let now = Instant::now();
        let mut wake = now + TICK;
        if let Lease::Until { at, .. } = lease
            && at > now
        {
            wake = wake.min(at);
        }
        let due = self.pauses.values().map(|pause| pause.until).filter(|until| *until > now).min();
        due.map_or(wake, |due| wake.min(due))
    }

    fn observe(&mut self, state: &ClusterState, lease: Lease) -> std::io::Result<Observed> {
        let now = Instant::now();
        let standing = standing(lease, state.revision, now, self.predecessor_until);
        if standing != self.standing {
            match standing {
                Standing::Lapsed => tracing::warn!("the lease ran out: this node's guests are stopped"),
                _ => tracing::info!(?standing, "standing changed"),
            }
            self.standing = standing;
        }
        let runs = vm_process::scan(&self.tools.paths)?;
        self.pressed.retain(|vm, (epoch, _)| runs.get(vm).is_some_and(|run| run.epoch == *epoch));
        self.vcpus.retain(|vm, (epoch, _)| runs.get(vm).is_some_and(|run| run.epoch == *epoch));
        self.executables = runs.iter().map(|(vm, run)| (*vm, run.executable)).collect();
        let runs = runs.into_iter().map(|(vm, found)| {
            let phase = match found.ended {
                Some(ended) => RunPhase::Ended(ended),
                None => RunPhase::Alive {
                    button_pressed: self.pressed.get(&vm).map(|(_, at)| now.saturating_duration_since(*at)),
                    vcpus: self.vcpus.get(&vm).map(|(_, vcpus)| *vcpus),
                },
            };
            (vm, Run { epoch: found.epoch, phase })
        });
        let runs: BTreeMap<VmId, Run> = runs.collect();
        self.attend_agents(&runs);
        Ok(Observed {
            standing,
            data: self.data_view(),
            runs,
            boot_files: boot_files::held(&self.tools.paths)?,
            purgeable_for: self.purgeable_for(state, now),
        })
    }

    /// Guests that run have an agent perhaps.
    fn attend_agents(&self, runs: &BTreeMap<VmId, Run>) {
        let alive = runs.iter().filter(|(_, run)| matches!(run.phase, RunPhase::Alive { .. }));
        self.tools.agents.attend(&alive.map(|(vm, run)| (*vm, run.epoch)).collect());
    }

    /// Time counts from when exactly these data were free.
    fn purgeable_for(&mut self, state: &ClusterState, now: Instant) -> BTreeMap<Leftover, Duration> {
        let mut seen = std::mem::take(&mut self.purgeable);
        let free = plan::data::leftovers(state, self.tools.me).map(|(leftover, retired)| {
            let since =
                seen.remove(&leftover).filter(|(before, _)| *before == retired).map(|(_, since)| since);
            (leftover, (retired, since.unwrap_or(now)))
        });
        self.purgeable = free.collect();
        let waited = |since: Instant| now.saturating_duration_since(since);
        self.purgeable.iter().map(|(key, (_, since))| (*key, waited(*since))).collect()
    }

    fn data_view(&mut self) -> Option<DataView> {
        let view = self.link.view.borrow().clone()?;
        let instance = view.status.instance;
        self.grants.retain(|_, (granted_to, _)| *granted_to == instance);
        let grants = self.grants.iter().map(|(volume, (_, generation))| (*volume, *generation)).collect();
        Some(DataView { status: view.status, applied: view.applied, grants })
    }

    fn converge(&mut self, state: &ClusterState, observed: &Observed) {
        let view = View { me: self.tools.me, paths: &self.tools.paths, state, observed };
        let mut plan = plan::plan(view);
        for report in &mut plan.vms {
            report.agent = self.tools.agents.seen(report.vm);
            report.executable = self.executables.get(&report.vm).copied().unwrap_or_default();
        }
        *self.shown.lock() = Shown {
            report: local_report(observed.data.as_ref(), plan.vms),
            boot_files: observed.boot_files.iter().copied().collect(),
        };
        let instance = observed.data.as_ref().map(DataView::instance);
        self.tend_gate(observed, plan.data.as_ref());
        if let (Some(config), Some(instance)) = (plan.data, instance) {
            let wanted = Wanted { instance, config: Arc::new(config) };
            self.link.wanted.send_if_modified(|present| {
                let same = present.as_ref().is_some_and(|present| {
                    present.instance == instance && link::same(&present.config, &wanted.config)
                });
                if !same {
                    *present = Some(wanted);
                }
                !same
            });
        }
        for action in plan.actions {
            self.begin(action, instance);
        }
        if observed.standing == Standing::Leased
            && let Err(error) = vm_process::sweep(&self.tools.paths, |vm| state.vms.contains_key(&vm))
        {
            tracing::warn!(%error, "cannot remove what is left of deleted VMs");
        }
    }

    /// After a lapse the data process is told the lease again only when it has the configuration of now: it may have
    /// volumes open that were given to others meanwhile.
    fn tend_gate(&self, observed: &Observed, planned: Option<&crate::data::protocol::DataConfig>) {
        let gate = match (observed.standing, &observed.data, planned) {
            (Standing::Lapsed, _, _) => Gate::Closed,
            (Standing::Leased, Some(data), Some(planned)) => match &data.applied {
                Some(applied) if link::same(applied, planned) => Gate::Open,
                _ => return,
            },
            _ => return,
        };
        self.link.gate.send_if_modified(|present| {
            let modified = *present != gate;
            *present = gate;
            modified
        });
    }

    fn begin(&mut self, action: Action, instance: Option<DataInstance>) {
        let key = action.key();
        let paused = self.pauses.get(&key).is_some_and(|pause| pause.until > Instant::now());
        if paused || self.under_way.contains_key(&key) {
            return;
        }
        tracing::debug!(?action, "begins");
        if let Action::SetVcpus { vm, .. }
        | Action::SaveVm { vm, .. }
        | Action::RestoreVm { vm, .. }
        | Action::MigrateVm { vm, .. }
        | Action::RenewVm { vm, .. } = &action
        {
            // Until it has come to its end, wherever that is.
            self.vcpus.remove(vm);
        }
        let tools = self.tools.clone();
        let task = self.running.spawn(async move { (key, tools.perform(action, instance).await) });
        self.under_way.insert(key, task.id());
    }

    fn finished(&mut self, finished: Result<(tokio::task::Id, Finished), tokio::task::JoinError>) {
        match finished {
            Ok((_, (key, outcome))) => {
                self.under_way.remove(&key);
                self.settle(key, outcome);
            }
            Err(error) => {
                tracing::error!(%error, "an action did not end in order");
                let task = error.id();
                self.under_way.retain(|_, id| *id != task);
            }
        }
    }

    fn settle(&mut self, key: ActionKey, outcome: Result<Remember, ActionError>) {
        let now = Instant::now();
        match outcome {
            Ok(remember) => {
                match remember {
                    Remember::Nothing => {}
                    Remember::Granted(instance, volume, generation) => {
                        self.grants.insert(volume, (instance, generation));
                    }
                    Remember::Pressed(vm, epoch) => {
                        self.pressed.insert(vm, (epoch, now));
                    }
                    Remember::Vcpus(vm, epoch, vcpus) => {
                        self.vcpus.insert(vm, (epoch, vcpus));
                    }
                }
                self.pauses.insert(key, Pause { until: now + SETTLE, next: *RETRY.start() });
            }
            Err(error) => {
                let next = self.pauses.get(&key).map_or(*RETRY.start(), |pause| pause.next);
                match &error {
                    // Somebody was faster, or the local copy of the state lags: the next plan knows better.
                    ActionError::Propose(ProposeError::Refused(refusal)) => {
                        tracing::debug!(?key, %refusal, "refused");
                    }
                    ActionError::NotYet(why) => tracing::debug!(?key, why, "not yet"),
                    error => tracing::warn!(?key, %error, retry_ms = next.as_millis(), "did not work"),
                }
                self.pauses.insert(key, Pause { until: now + next, next: (next * 2).min(*RETRY.end()) });
            }
        }
        // What was settled long ago starts over with the shortest pause.
        self.pauses.retain(|_, pause| pause.until + *RETRY.end() > now);
    }
}

/// Whether guests may run.
fn standing(lease: Lease, revision: u64, now: Instant, predecessor_until: Instant) -> Standing {
    match lease {
        Lease::Until { at, .. } if at <= now => Standing::Lapsed,
        Lease::Until { as_of, .. } if revision < as_of => Standing::CatchingUp,
        Lease::Until { .. } => Standing::Leased,
        Lease::None if now < predecessor_until => Standing::Unknown,
        Lease::None => Standing::Lapsed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_may_run_only_under_a_lease_that_the_state_has_caught_up_with() {
        let began = Instant::now();
        let after = |seconds| began + Duration::from_secs(seconds);
        let lease = Lease::Until { at: after(5), as_of: 7 };
        assert_eq!(standing(lease, 7, after(4), began), Standing::Leased);
        assert_eq!(standing(lease, 6, after(4), began), Standing::CatchingUp);
        assert_eq!(standing(lease, 7, after(5), after(9)), Standing::Lapsed);
        assert_eq!(standing(Lease::None, 7, after(4), after(5)), Standing::Unknown);
        assert_eq!(standing(Lease::None, 7, after(5), after(5)), Standing::Lapsed);
    }
}
