//! The coordinator of a volume: the one place through which all its I/O goes while this node has it open.
//!
//! # Parts
//!
//! | module | it is |
//! |---|---|
//! | `members` | pure: which replicas are attached and in sync, when a write or a flush is complete |
//! | `ranges` | pure: which operations may touch which blocks at the same time (`locks` waits for them) |
//! | `diff` | pure: which blocks of replicas differ and what they become |
//! | `health` | pure: deadlines from observed latencies, disks that are too slow |
//! | `geometry` | pure: byte ranges, segments, blocks |
//! | `call` | one request to one replica, and what its failure means |
//! | `limits` | pure: operations and bytes per second |
//! | `io` | reads, writes and flushes |
//! | `open` | announcing the generation, reconciliation, opening again |
//! | `resync` | attaching replicas that come back, copying what they lack |
//! | `commit` | changes of the in-sync set, one at a time |
//! | `release` | replicas in sync that leave their sets |
//! | `damage` | repair of what scrubs have found |
//! | `copy` | carrying out the fixes that `diff` found |
//! | `layers` | where reads look and writes go, and the door that holds a point in time |
//! | `freeze` | taking a snapshot, of one volume or several at once |
//! | `merge` | merging layers that no snapshot needs any more |
//!
//! # Life
//!
//! Opening → Open → (Opening again when a segment lost every replica in sync) → Closed. Fenced from any of these, for ever.
//! Requests are accepted at any time and wait until the volume is open; they are dropped with `BlockError::Closed` when the
//! coordinator ends. Each request is a task; the coordinator owns all tasks and [`Coordinator::stop`] ends them.

mod call;
mod commit;
mod copy;
mod damage;
mod diff;
mod freeze;
mod geometry;
mod health;
mod io;
mod layers;
mod limits;
mod locks;
mod members;
mod merge;
mod open;
mod ranges;
pub(crate) mod release;
mod resync;

use crate::config::{CleanState, Durability, VolumeConfig};
use crate::control::{CommitError, ControlPlane};
use crate::device::{BlockDevice, BlockError, BlockOp, Completion};
use crate::ids::{Generation, Version, VolumeId};
use crate::lease::{Lease, Term};
use crate::metrics::VolumeMetrics;
use crate::replica::protocol::{AckWhen, BootEpoch, Session};
use crate::replica::server::ReplicaServer;
use crate::scrub::ScrubPolicy;
use crate::signal::Signal;
use crate::status::{Handover, VolumeState, VolumeStatus};
use crate::store::Compression;
use crate::transport::Transport;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use health::Health;
use layers::Layers;
use limits::Limiter;
use locks::RangeLocks;
use members::{MemberTable, Patience};
use netfabric::NodeId;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bits of a version's sequence that count writes; those above are the boot epoch of the coordinator's process, so that a
/// volume opened again by a restarted process with the same generation never gives a version twice.
const SEQUENCE_BITS: u32 = 44;

/// Deadlines and pacing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// A replica that is silent for this long is taken out of the in-sync set; sooner when it used to be much faster.
    pub member_deadline: Duration,
    /// The same for flushes, which take as long as the disk does. A node that vanished is noticed by its connection.
    pub flush_deadline: Duration,
    /// How long opening waits for replicas that Raft holds as in sync before it takes them out.
    pub open_grace: Duration,
    /// Pause between attempts (attaching, commits).
    pub retry: Duration,
    /// How long a clean close may take before it becomes an unclean one.
    pub close_deadline: Duration,
    /// Most bytes per second that one replica's resync copies.
    pub resync_rate: u64,
    /// Verification of the disks in the background.
    pub scrub: ScrubPolicy,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            member_deadline: Duration::from_millis(2500),
            flush_deadline: Duration::from_secs(10),
            open_grace: Duration::from_secs(3),
            retry: Duration::from_millis(300),
            close_deadline: Duration::from_secs(5),
            resync_rate: 400 << 20,
            scrub: ScrubPolicy::default(),
        }
    }
}

/// What a coordinator reaches the world through.
#[derive(Clone)]
pub(crate) struct Rim {
    pub(crate) node: NodeId,
    pub(crate) boot: BootEpoch,
    pub(crate) replicas: Arc<ReplicaServer>,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) control: Arc<dyn ControlPlane>,
    pub(crate) lease: Arc<Lease>,
    pub(crate) timing: Timing,
}

/// Where the coordinator is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Opening,
    Open,
    Closing,
    Fenced,
    Closed,
}

/// What is asked of writes.
#[derive(Clone, Copy, Debug)]
struct Policy {
    durability: Durability,
    compression: Compression,
}

impl Policy {
    fn of(config: &VolumeConfig) -> Self {
        Self { durability: config.durability, compression: config.compression }
    }

    fn ack(self) -> AckWhen {
        match self.durability {
            Durability::WriteBack => AckWhen::Logged,
            Durability::WriteThrough => AckWhen::Durable,
        }
    }
}

/// The coordinator of one opening of a volume.
pub(crate) struct Coordinator {
    id: VolumeId,
    /// Grows only.
    size: AtomicU64,
    /// Tells that it did.
    grown: Signal<()>,
    generation: Generation,
    policy: Mutex<Policy>,
    clean: CleanState,
    rim: Rim,
    table: Mutex<MemberTable>,
    health: Mutex<Health>,
    limiter: Mutex<Limiter>,
    /// Tells of changes of `table`; whoever waits for one notes what it has seen before it looks.
    changed: Signal<()>,
    phase: Signal<Phase>,
    /// Opening has waited long enough for the replicas that it has not reached.
    give_up: Signal<bool>,
    /// The term of the lease in which the control plane has confirmed the generation.
    confirmed: Signal<Option<Term>>,
    ranges: RangeLocks,
    layers: Layers,
    sequence: AtomicU64,
    sessions: AtomicU64,
    /// Writes that were complete and not flushed may be gone, and nobody was told yet.
    loss: AtomicBool,
    /// How often the volume was opened again.
    reopenings: AtomicU64,
    /// Requests that wait for replicas.
    waiting: AtomicUsize,
    /// Held while a change of the in-sync set is on its way: there is never more than one.
    commits: tokio::sync::Mutex<()>,
    runtime: tokio::runtime::Handle,
    /// How it was closed.
    closed: tokio::sync::OnceCell<Handover>,
    /// Ends everything.
    stop: CancellationToken,
    fenced: CancellationToken,
    tasks: TaskTracker,
    requests: TaskTracker,
    metrics: VolumeMetrics,
}

impl Coordinator {
    /// Starts opening the volume, on the current tokio runtime.
    pub(crate) fn start(config: &VolumeConfig, rim: Rim, metrics: VolumeMetrics) -> Arc<Self> {
        let this = Arc::new(Self {
            id: config.id,
            size: AtomicU64::new(config.size.0),
            grown: Signal::new(()),
            generation: config.generation,
            policy: Mutex::new(Policy::of(config)),
            clean: config.clean,
            table: Mutex::new(MemberTable::new(config)),
            health: Mutex::default(),
            limiter: Mutex::new(Limiter::new(config.limits)),
            changed: Signal::new(()),
            phase: Signal::new(Phase::Opening),
            give_up: Signal::new(false),
            confirmed: Signal::new(None),
            ranges: RangeLocks::default(),
            layers: Layers::new(&config.layers),
            sequence: AtomicU64::new((rim.boot.0 << SEQUENCE_BITS) + 1),
            sessions: AtomicU64::new(1),
            loss: AtomicBool::new(false),
            reopenings: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            commits: tokio::sync::Mutex::default(),
            runtime: tokio::runtime::Handle::current(),
            closed: tokio::sync::OnceCell::new(),
            stop: CancellationToken::new(),
            fenced: CancellationToken::new(),
            tasks: TaskTracker::new(),
            requests: TaskTracker::new(),
            metrics,
            rim,
        });
        this.spawn(this.clone().run_phases());
        this.spawn(this.clone().run_commits());
        this.spawn(this.clone().run_resync());
        this.spawn(this.clone().run_confirm());
        this.spawn(this.clone().run_freezes());
        this.spawn(this.clone().run_merges());
        this.spawn(this.clone().run_repairs());
        this.spawn(this.clone().run_releases());
        this
    }

    /// The volume.
    pub(crate) fn id(&self) -> VolumeId {
        self.id
    }

    /// The generation of this opening.
    pub(crate) fn generation(&self) -> Generation {
        self.generation
    }

    /// Takes over a changed replica set of the same generation.
    pub(crate) fn configure(&self, config: &VolumeConfig) {
        self.limiter.lock().configure(config.limits);
        *self.policy.lock() = Policy::of(config);
        self.layers.configure(&config.layers);
        self.change(|table| table.configure(config));
        if self.phase.get() == Phase::Open {
            self.grow(Patience::Waits);
        }
    }

    /// Takes over what the volume grows by, as far as its replicas are there.
    fn grow(&self, patience: Patience) {
        let size = self.change(|table| {
            table.grow(patience);
            table.size()
        });
        if self.size.fetch_max(size, Ordering::AcqRel) < size {
            self.grown.set(());
            tracing::info!(volume = %self.id, size, "volume grown");
        }
    }

    /// The size that is served.
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// What it is doing.
    pub(crate) fn status(&self) -> VolumeStatus {
        let table = self.table.lock();
        let state = match self.phase.get() {
            Phase::Opening => VolumeState::Opening,
            Phase::Fenced => VolumeState::Fenced,
            Phase::Closed | Phase::Closing => VolumeState::Closed,
            Phase::Open if !self.may_complete() => VolumeState::Waiting("the node's lease has lapsed".into()),
            Phase::Open if self.waiting.load(Ordering::Relaxed) > 0 => VolumeState::Waiting(table.obstacle()),
            Phase::Open => VolumeState::Open,
        };
        VolumeStatus { id: self.id, generation: self.generation, state, replicas: table.status() }
    }

    /// Waits for requests to end, makes everything durable, tells the control plane, stops. When that cannot be done in time
    /// the close is unclean, which costs the next opening a comparison and nothing else. Done once, however often it is called.
    pub(crate) async fn close(&self) -> Handover {
        *self.closed.get_or_init(|| self.close_once()).await
    }

    /// How it was closed; none while it was not.
    pub(crate) fn closed(&self) -> Option<Handover> {
        self.closed.get().copied()
    }

    async fn close_once(&self) -> Handover {
        let mut handover = Handover::Unclean;
        // Closing already: whoever began it gave up waiting.
        if matches!(self.phase.get(), Phase::Open | Phase::Closing) {
            self.phase.set(Phase::Closing);
            self.requests.close();
            let clean = tokio::time::timeout(self.rim.timing.close_deadline, self.close_clean()).await;
            match clean {
                Ok(Ok(())) => {
                    handover = Handover::Clean;
                    tracing::info!(volume = %self.id, "volume closed clean");
                }
                Ok(Err(error)) => tracing::warn!(volume = %self.id, %error, "volume closed unclean"),
                Err(_) => tracing::warn!(volume = %self.id, "volume closed unclean: took too long"),
            }
        }
        self.stop().await;
        handover
    }

    async fn close_clean(&self) -> Result<(), CommitError> {
        self.requests.wait().await;
        self.flush_replicas().await;
        // No replica may be on its way into the in-sync set, unflushed, behind our back.
        let _commits = self.commits.lock().await;
        self.rim.control.closed_clean(self.id, self.generation).await
    }

    /// Ends all tasks at once. Requests not complete are dropped with `Closed`.
    pub(crate) async fn stop(&self) {
        self.kill();
        self.requests.close();
        self.tasks.close();
        self.requests.wait().await;
        self.tasks.wait().await;
    }

    /// The same without waiting.
    pub(crate) fn kill(&self) {
        self.stop.cancel();
        self.phase.change_if(|phase| {
            let ends = *phase != Phase::Fenced;
            if ends {
                *phase = Phase::Closed;
            }
            ends
        });
    }

    /// A newer generation exists: nothing is completed from now on.
    fn fence(&self) {
        self.fenced.cancel();
        self.phase.change_if(|phase| {
            let news = !matches!(phase, Phase::Fenced | Phase::Closed);
            if news {
                tracing::warn!(volume = %self.id, generation = %self.generation, "fenced: the volume was opened elsewhere");
                *phase = Phase::Fenced;
            }
            news
        });
    }

    /// Waits until the volume is open.
    async fn serving(&self) {
        self.phase.wait_for(|p| matches!(p, Phase::Open | Phase::Closing)).await;
    }

    /// Whether requests may be completed at this moment: the lease holds, and the generation was confirmed since it last lapsed.
    fn may_complete(&self) -> bool {
        self.rim.lease.term().is_some_and(|term| self.confirmed.get() == Some(term))
    }

    /// Waits until requests may be completed.
    async fn leased(&self) {
        let mut seen = self.confirmed.seen();
        while !self.may_complete() {
            self.confirmed.changed(&mut seen).await;
        }
    }

    /// Changes the table and wakes those who wait for a change.
    fn change<T>(&self, change: impl FnOnce(&mut MemberTable) -> T) -> T {
        let result = change(&mut self.table.lock());
        self.changed.set(());
        result
    }

    fn next_version(&self) -> Version {
        Version { generation: self.generation.0, sequence: self.sequence.fetch_add(1, Ordering::Relaxed) }
    }

    fn next_session(&self) -> Session {
        Session { boot: self.rim.boot, number: self.sessions.fetch_add(1, Ordering::Relaxed) }
    }

    /// Runs a task of the coordinator until it ends or the coordinator does.
    fn spawn(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) {
        let (stop, fenced) = (self.stop.clone(), self.fenced.clone());
        self.tasks.spawn_on(
            async move {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => {}
                    () = fenced.cancelled() => {}
                    () = task => {}
                }
            },
            &self.runtime,
        );
    }

    /// Carries out one request. It ends early only when the coordinator does; a fenced coordinator completes nothing.
    async fn request(self: Arc<Self>, op: BlockOp) -> Result<Bytes, BlockError> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(BlockError::Closed),
            () = self.fenced.cancelled() => {
                self.stop.cancelled().await;
                Err(BlockError::Closed)
            }
            result = self.execute(op) => result,
        }
    }
}

/// A coordinator as a block device.
#[derive(Clone)]
pub(crate) struct VolumeDevice(pub(crate) Arc<Coordinator>);

impl BlockDevice for VolumeDevice {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn grown_from(&self, size: u64) -> BoxFuture<'static, ()> {
        let coordinator = self.0.clone();
        Box::pin(async move { coordinator.grown.wait_for(|()| coordinator.size() > size).await })
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        let coordinator = self.0.clone();
        // Counted before the phase is looked at: a close waits for whatever is counted, and what comes later sees it.
        let counted = coordinator.requests.token();
        if matches!(coordinator.phase.get(), Phase::Closing | Phase::Closed) {
            return done(Err(BlockError::Closed));
        }
        let runtime = coordinator.runtime.clone();
        runtime.spawn(async move {
            let result = coordinator.request(op).await;
            drop(counted);
            done(result);
        });
    }
}
