//! The link to the data process: looks how it is, hands it its configuration, passes the lease on.
//!
//! One task each for the two directions that must not wait for each other: a lease is passed on at once even while a
//! configuration takes long. Nothing is assumed about the data process between two looks; when it is another instance
//! than before, everything is told again.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::cluster::Lease;
use crate::data::{
    client::DataClient,
    protocol::{
        DataConfig, DataInstance, MonotonicTime, Observed as DataStatus, Readiness, RenewLease, Status,
    },
};

/// How often is looked when nothing happens.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often is looked while the data process is away: a restart must not cost a second.
const LOOK_EVERY_WHILE_AWAY: Duration = Duration::from_millis(50);
/// A data process that does not answer for so long counts as away.
const LOOK_DEADLINE: Duration = Duration::from_secs(2);
/// How long handing over a lease may take.
const LEASE_DEADLINE: Duration = Duration::from_secs(1);
/// Pause after a configuration that was not taken.
const APPLY_PAUSE: Duration = Duration::from_secs(1);

/// A configuration and the instance that it was planned for.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The instance.
    pub instance: DataInstance,
    /// The configuration.
    pub config: Arc<DataConfig>,
}

/// What the link knows of the data process.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkView {
    /// What it said last.
    pub status: DataStatus,
    /// What this instance took last.
    pub applied: Option<Arc<DataConfig>>,
}

/// Whether the lease may be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// It may.
    Open,
    /// The data process may still have volumes open that this node lost meanwhile.
    Closed,
}

/// The ends of the link that the reconciler holds.
pub struct Link {
    /// What the data process should do.
    pub wanted: watch::Sender<Option<Wanted>>,
    /// Whether it may be told the lease.
    pub gate: watch::Sender<Gate>,
    /// What it does; none while it does not answer.
    pub view: watch::Receiver<Option<LinkView>>,
}

/// Runs the link until `shutdown`. `started` tells of instances that greeted.
pub fn start(
    client: DataClient,
    lease: watch::Receiver<Lease>,
    started: mpsc::Receiver<DataInstance>,
    shutdown: CancellationToken,
    tasks: &tokio_util::task::TaskTracker,
) -> Link {
    let (wanted_in, wanted) = watch::channel(None);
    let (gate_in, gate) = watch::channel(Gate::Closed);
    let (view_out, view) = watch::channel(None);
    let configure = configure(client.clone(), wanted, started, view_out);
    let renew = pass_lease_on(client, lease, gate, view.clone());
    tasks.spawn(async move {
        tokio::select! { () = shutdown.cancelled() => {}, () = configure => {}, () = renew => {} }
    });
    Link { wanted: wanted_in, gate: gate_in, view }
}

async fn configure(
    client: DataClient,
    mut wanted: watch::Receiver<Option<Wanted>>,
    mut started: mpsc::Receiver<DataInstance>,
    view: watch::Sender<Option<LinkView>>,
) {
    let mut not_before = Instant::now();
    loop {
        let status = match client.call(&Status, LOOK_DEADLINE).await {
            Ok(status) if status.readiness == Readiness::Ready => Some(status),
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(%error, "the data process is away");
                None
            }
        };
        publish(&view, status);
        let due = wanted.borrow_and_update().clone().filter(|wanted| is_due(wanted, view.borrow().as_ref()));
        if let Some(due) = due
            && Instant::now() >= not_before
        {
            match client.apply(due.instance, &due.config).await {
                Ok(status) => {
                    tracing::debug!(revision = due.config.revision, "configured the data process");
                    view.send_replace(Some(LinkView { status, applied: Some(due.config) }));
                }
                Err(error) => {
                    tracing::warn!(%error, revision = due.config.revision, "the data process takes no configuration");
                    not_before = Instant::now() + APPLY_PAUSE;
                }
            }
        }
        let pause = if view.borrow().is_some() { LOOK_EVERY } else { LOOK_EVERY_WHILE_AWAY };
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            greeted = started.recv() => if greeted.is_none() { return },
            () = sleep(pause) => {}
        }
    }
}

/// Keeps what the instance took, as long as it is the same instance.
fn publish(view: &watch::Sender<Option<LinkView>>, status: Option<DataStatus>) {
    view.send_if_modified(|present| {
        let next = status.map(|status| {
            let applied = present
                .as_ref()
                .filter(|present| present.status.instance == status.instance)
                .and_then(|present| present.applied.clone());
            LinkView { status, applied }
        });
        let modified = *present != next;
        *present = next;
        modified
    });
}

fn is_due(wanted: &Wanted, view: Option<&LinkView>) -> bool {
    view.is_some_and(|view| {
        view.status.instance == wanted.instance
            && view.applied.as_ref().is_none_or(|applied| !same(applied, &wanted.config))
    })
}

/// Whether two configurations ask for the same; the revision they were made from does not matter.
pub fn same(one: &DataConfig, other: &DataConfig) -> bool {
    one.peers == other.peers && one.storage == other.storage && one.overlay == other.overlay
}

/// Passes each renewal on at once, and the present lease to each new instance.
async fn pass_lease_on(
    client: DataClient,
    mut lease: watch::Receiver<Lease>,
    mut gate: watch::Receiver<Gate>,
    mut view: watch::Receiver<Option<LinkView>>,
) {
    let mut told: Option<(DataInstance, Instant)> = None;
    loop {
        let instance = view.borrow_and_update().as_ref().map(|view| view.status.instance);
        let present = *lease.borrow_and_update();
        let open = *gate.borrow_and_update() == Gate::Open;
        if let (Some(instance), Lease::Until { at, .. }, true) = (instance, present, open)
            && at > Instant::now()
            && told != Some((instance, at))
        {
            let until = MonotonicTime::after(at.saturating_duration_since(Instant::now()));
            match client.call(&RenewLease { until }, LEASE_DEADLINE).await {
                Ok(()) => told = Some((instance, at)),
                Err(error) => tracing::debug!(%error, "the data process does not take the lease"),
            }
        }
        tokio::select! {
            changed = lease.changed() => if changed.is_err() { return },
            changed = gate.changed() => if changed.is_err() { return },
            changed = view.changed() => if changed.is_err() { return },
        }
    }
}
