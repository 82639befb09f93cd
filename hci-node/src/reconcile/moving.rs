//! Runs that move to another node while their guests run: the node that they leave.
//!
//! The VMM writes its guest ([`vmm::VmHandle::migrate`]), the other node's VMM reads it ([`super::arrivals`]); pieces go through the two control
//! processes, a few at a time, each on a stream of its own. When the guest is held for the last part, its volumes are let go of at the same time,
//! clean, so that the other node opens them without comparing copies. Then the other node is asked to take over: it commits that, and lets the
//! guest run.
//!
//! Should anything fail, it is committed that the migration was given up, and the guest runs on when that is seen; see
//! `state/apply/migration.rs` for why there is always one run, and never two.

use std::time::Duration;

use bytes::Bytes;
use netfabric::rpc::{CallError, ErrorCode};
use tokio::{task::JoinSet, time::Instant};
use vmm::{MigrationOptions, MigrationSnapshot};

use super::{
    actions::{ActionError, Tools, vmm},
    arrivals::{Arrival, ArrivalStatus, BringPiece, TakeOver},
    cluster::ProposeError,
    observed::Vcpus,
    peers,
};
use crate::{
    data::{client::SLOW, protocol::HandOver},
    state::{Generation, Migration, Op, Severity, Subject, TaskError, VmId, VolumeId},
    vmm_role::protocol::{self, FetchState, Migrate, StateFlow, Status},
};

/// Pieces on their way at a time.
const UNDER_WAY: usize = 6;
/// How long the other node may take to be ready.
const READY_PATIENCE: Duration = Duration::from_secs(60);
/// How often it is asked whether it is.
const LOOK: Duration = Duration::from_millis(50);
/// How often a task is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// Pause before a cluster that does not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Why a run did not move.
enum Unmoved {
    /// It is too early, or nobody wants it any more.
    NotNow(ActionError),
    /// It did not work; the run is to go on here.
    Failed(String),
}

/// What became of it.
struct Moved {
    bytes: u64,
    /// From when the guest was held here to when it ran there, as seen from here.
    paused: Duration,
}

type Sent = Result<(), String>;

impl Tools {
    /// Moves a run, or tells the cluster that it stays. It is not tried twice: the guest may have been held meanwhile.
    pub(super) async fn migrate_vm(&self, vm: VmId, migration: Migration) -> Result<(), ActionError> {
        let began = Instant::now();
        match self.move_run(vm, migration).await {
            Ok(Moved { bytes, paused }) => {
                let took = began.elapsed();
                let paused_ms = paused.as_millis();
                tracing::info!(%vm, epoch = migration.epoch.0, bytes, took_ms = took.as_millis(), paused_ms, "moved a VM");
                let (mib, seconds) = (bytes.div_ceil(1 << 20), took.as_secs_f64());
                let said = format!("{mib} MiB were sent in {seconds:.1} s, it was paused for {paused_ms} ms");
                self.note_pause(vm, said).await;
                Ok(())
            }
            Err(Unmoved::NotNow(error)) => Err(error),
            Err(Unmoved::Failed(detail)) => {
                tracing::warn!(%vm, epoch = migration.epoch.0, detail, "cannot move a VM");
                self.stay(vm, migration, detail).await;
                Ok(())
            }
        }
    }

    /// Returns when it is decided where the VM is: it stays, or it has arrived after all.
    async fn stay(&self, vm: VmId, migration: Migration, detail: String) {
        let next = "remove the cause, then migrate it again: hci vm migrate".to_owned();
        let op = Op::MigrationFailed { vm, epoch: migration.epoch, error: TaskError { detail, next } };
        while let Err(ActionError::Propose(ProposeError::Unavailable(_))) = self.propose(op.clone()).await {
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    /// For people who want to know; it is lost with this process.
    pub(super) async fn note_pause(&self, vm: VmId, said: String) {
        let name = self.cluster.state().borrow().subject_name(&Subject::Vm(vm));
        let message = format!("VM {name}: {said}");
        let kind = "vm-migration-pause".to_owned();
        let note = Op::Note { severity: Severity::Info, kind, subject: Subject::Vm(vm), message };
        if let Err(error) = self.propose(note).await {
            tracing::debug!(%error, "how long a migration took is not noted");
        }
    }

    fn check_migrates(&self, vm: VmId, migration: Migration) -> Result<(), Unmoved> {
        let state = self.cluster.state().borrow().clone();
        let is_wanted =
            state.vms.get(&vm).is_some_and(|vm| vm.migration.is_some_and(|now| now.epoch == migration.epoch));
        let no_more = || ActionError::NotYet("the VM is not to be migrated any more".to_owned());
        if is_wanted { Ok(()) } else { Err(Unmoved::NotNow(no_more())) }
    }

    async fn move_run(&self, vm: VmId, migration: Migration) -> Result<Moved, Unmoved> {
        let socket = self.paths.vm(vm).socket();
        self.await_target(vm, migration).await?;
        let status = protocol::call(&socket, &Status).await.map_err(not_now)?;
        if status.epoch != migration.from {
            return Err(Unmoved::NotNow(ActionError::NotYet("another run answers".to_owned())));
        }
        let own = MigrationOptions::default();
        let longest_pause_ms = migration.terms.longest_pause_ms.unwrap_or(own.longest_pause_ms);
        let options = MigrationOptions { longest_pause_ms, ..own };
        protocol::call(&socket, &Migrate { options }).await.map_err(not_now)?;
        let (mut sent, mut closed) = (JoinSet::new(), JoinSet::new());
        let (mut at, mut held_at) = (0, None);
        let (mut told, mut due) = (Instant::now(), Instant::now());
        loop {
            self.check_migrates(vm, migration)?;
            let fetched = protocol::exchange(&socket, &FetchState { at }, Bytes::new()).await;
            let (flow, piece) = fetched.map_err(|error| Unmoved::Failed(error_text(error)))?;
            match flow {
                StateFlow::Piece => {
                    while sent.len() >= UNDER_WAY {
                        arrived(&mut sent).await?;
                    }
                    let call = BringPiece { vm, epoch: migration.epoch, at };
                    at += piece.len() as u64;
                    if let Some(limit) = migration.terms.bytes_per_second.filter(|_| held_at.is_none()) {
                        due = due.max(Instant::now()) + time_of(piece.len() as u64, limit);
                        tokio::time::sleep_until(due).await;
                    }
                    let (cluster, to) = (self.cluster.clone(), migration.to);
                    sent.spawn(async move { send(cluster.as_ref(), to, &call, piece).await });
                }
                StateFlow::Settle => {
                    while !sent.is_empty() {
                        arrived(&mut sent).await?;
                    }
                }
                StateFlow::Held => held_at = Some(Instant::now()),
                StateFlow::Quiet => self.let_go(vm, &mut closed),
                StateFlow::End => break,
            }
            if told.elapsed() >= TELL_EVERY && held_at.is_none() {
                told = Instant::now();
                self.tell_migration(vm, migration);
            }
        }
        while !sent.is_empty() {
            arrived(&mut sent).await?;
        }
        // Closed or not, and clean or not: nothing is written any more, and the other node compares the copies if it has to.
        while let Some(done) = closed.join_next().await {
            if let Ok(Err(error)) = done {
                tracing::warn!(%vm, error, "a volume was not closed before its VM moved");
            }
        }
        self.check_migrates(vm, migration)?;
        let state = self.cluster.state().borrow().clone();
        let held = state.vms.get(&vm).is_some_and(|vm| vm.paused == Some(migration.from));
        let vcpus = if held { Vcpus::Held } else { Vcpus::Running };
        let call = TakeOver { vm, epoch: migration.epoch, vcpus };
        peers::call(self.cluster.as_ref(), migration.to, &call, Bytes::new())
            .await
            .map_err(|error| Unmoved::Failed(format!("it could not go on there: {}", error_text(error))))?;
        let paused = held_at.map_or(Duration::ZERO, |since| since.elapsed());
        Ok(Moved { bytes: at, paused })
    }

    /// Waits until the run there has its volumes and ports, and can take pieces.
    async fn await_target(&self, vm: VmId, migration: Migration) -> Result<(), Unmoved> {
        let began = Instant::now();
        let call = ArrivalStatus { vm, epoch: migration.epoch };
        loop {
            self.check_migrates(vm, migration)?;
            let why = match peers::call(self.cluster.as_ref(), migration.to, &call, Bytes::new()).await {
                Ok((Arrival::Ready, _)) => return Ok(()),
                Ok((Arrival::NotYet(why), _)) => why,
                Err(error) => error_text(error),
            };
            if began.elapsed() > READY_PATIENCE {
                return Err(Unmoved::Failed(format!("the other node is not ready for it: {why}")));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Has the data process close the VM's volumes.
    fn let_go(&self, vm: VmId, closed: &mut JoinSet<Result<(), String>>) {
        let state = self.cluster.state().borrow().clone();
        let disks = state.vms.get(&vm).into_iter().flat_map(|vm| &vm.disks);
        let volumes = disks.filter_map(|disk| state.volumes.get(disk));
        let volumes: Vec<(VolumeId, Generation)> =
            volumes.map(|volume| (volume.id, volume.generation)).collect();
        for (volume, generation) in volumes {
            let data = self.data.clone();
            closed.spawn(async move {
                let call = HandOver { volume: volume.into(), generation: generation.into() };
                data.call(&call, SLOW).await.map(drop).map_err(|error| error.to_string())
            });
        }
    }

    /// Tells the task how far it is, and waits for nobody.
    fn tell_migration(&self, vm: VmId, migration: Migration) {
        let Some(task) = migration.task else { return };
        let (cluster, socket) = (self.cluster.clone(), self.paths.vm(vm).socket());
        let mut aside = self.aside.lock();
        while aside.try_join_next().is_some() {}
        aside.spawn(async move {
            let Ok(status) = protocol::call(&socket, &Status).await else { return };
            let Some(progress) = status.migration else { return };
            let (permille, message) = (permille(&progress), sentence(&progress));
            // It is told again in a moment.
            let _ = cluster.propose(Op::UpdateTask { task, permille, message }).await;
        });
    }
}

/// Of everything that is known to be sent.
fn permille(progress: &MigrationSnapshot) -> u16 {
    let all = progress.written.saturating_add(progress.left).max(1);
    u16::try_from(progress.written.saturating_mul(1000) / all).unwrap_or(999).min(999)
}

/// For people who wait.
fn sentence(progress: &MigrationSnapshot) -> String {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let throttled = match progress.throttle_percent {
        0 => String::new(),
        percent => format!("; its guest is held {percent} % of the time"),
    };
    format!(
        "round {}: sent {} MiB, {} MiB left, {} MiB were written meanwhile{throttled}",
        progress.round,
        mib(progress.written),
        mib(progress.left),
        mib(progress.dirtied)
    )
}

/// How long so many bytes take at a rate.
fn time_of(bytes: u64, per_second: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / per_second.max(1) as f64)
}

async fn send(
    cluster: &dyn super::cluster::Cluster,
    to: crate::state::NodeId,
    call: &BringPiece,
    piece: Bytes,
) -> Sent {
    peers::call(cluster, to, call, piece).await.map(drop).map_err(error_text)
}

/// Waits for one piece to have arrived.
async fn arrived(sent: &mut JoinSet<Sent>) -> Result<(), Unmoved> {
    match sent.join_next().await {
        None | Some(Ok(Ok(()))) => Ok(()),
        Some(Ok(Err(why))) => Err(Unmoved::Failed(format!("the other node did not take it: {why}"))),
        Some(Err(error)) => Err(Unmoved::Failed(error.to_string())),
    }
}

fn not_now(error: CallError) -> Unmoved {
    match vmm(error) {
        ActionError::NotYet(why) => Unmoved::NotNow(ActionError::NotYet(why)),
        error => Unmoved::Failed(error.to_string()),
    }
}

/// What the other side says is about the guest, and needs no more words.
fn error_text(error: CallError) -> String {
    match error {
        CallError::Remote(error) if error.code == ErrorCode::Refused => error.message,
        error => error.to_string(),
    }
}
