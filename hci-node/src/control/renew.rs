//! Renewing this node's lease, once a second, with the report of what it sees.

use std::{
    collections::BTreeSet,
    sync::{Arc, Once, OnceLock},
    time::Duration,
};

use netfabric::rpc::{CallError, Request, codec};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, timeout},
};
use tokio_util::sync::CancellationToken;
use vmm::{CpuModel, Processor};

use super::{
    lease::{NODE_LEASE, RENEW_EVERY},
    member::Member,
    rpc::{self, Renew, Renewed},
};
use crate::reconcile::cluster::Lease;
use crate::state::{
    Timestamp,
    report::{CandidateDisk, MachineReport, NodeReport},
};

/// A renewal that takes longer is given up: the next one is due.
const DEADLINE: Duration = Duration::from_secs(2);
/// Disks are looked for this often.
const CANDIDATES_EVERY: Duration = Duration::from_secs(5);
/// Pause after a failed renewal, so that a new leader hears from everybody soon.
const RETRY: Duration = Duration::from_millis(200);

/// Renews until `shutdown`. Each lease counts from the moment the renewal was sent.
pub async fn run(member: Arc<Member>, lease: watch::Sender<Lease>, shutdown: CancellationToken) {
    let mut ticks = tokio::time::interval(RENEW_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut candidates = Candidates::default();
    let booted = booted();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let report = NodeReport {
            machine: MachineReport { booted, ..machine(candidates.get(&member).await) },
            local: member.local.report(),
            boot_files: member.local.boot_files(),
        };
        let sent = Instant::now();
        match timeout(DEADLINE, renew(&member, report)).await {
            Ok(Ok(as_of)) => {
                let _ = lease.send_replace(Lease::Until { at: sent + NODE_LEASE, as_of });
            }
            Ok(Err(error)) => {
                tracing::debug!(error, "the lease was not renewed");
                tokio::time::sleep(RETRY).await;
                ticks.reset_immediately();
            }
            Err(_) => tracing::debug!("the lease was not renewed in time"),
        }
    }
}

async fn renew(member: &Member, report: NodeReport) -> Result<u64, String> {
    let leader = member.replicated.leadership().borrow().leader.ok_or("there is no leader")?;
    if leader == member.id {
        return member.leader.renew(leader, report).await.map_err(|error| error.to_string());
    }
    let call = async {
        let bulk = codec::encode(&Renew { report }).map_err(CallError::from)?;
        let request = Request { method: rpc::RENEW, bulk, ..Request::default() };
        let answer: Renewed = member.peers.call(leader, request, DEADLINE).await?.decode()?;
        Ok::<_, CallError>(answer.as_of)
    };
    call.await.map_err(|error| error.to_string())
}

#[derive(Default)]
struct Candidates {
    known: Vec<CandidateDisk>,
    asked: Option<Instant>,
}

impl Candidates {
    async fn get(&mut self, member: &Member) -> Vec<CandidateDisk> {
        if self.asked.is_none_or(|at| at.elapsed() >= CANDIDATES_EVERY) {
            // Looking at disks may hang on a broken one; the lease must not.
            if let Ok(found) = timeout(Duration::from_millis(500), member.local.candidates()).await {
                self.known = found;
            }
            self.asked = Some(Instant::now());
        }
        self.known.clone()
    }
}

fn machine(candidates: Vec<CandidateDisk>) -> MachineReport {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| {
        let line = memory.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    MachineReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        memory_bytes: kib("MemTotal").unwrap_or(0) << 10,
        memory_available_bytes: kib("MemAvailable").unwrap_or(0) << 10,
        cpus: std::thread::available_parallelism()
            .map_or(1, |cpus| u16::try_from(cpus.get()).unwrap_or(u16::MAX)),
        cpu_models: cpu_models(),
        processor: processor(),
        booted: Timestamp(0),
        candidates,
    }
}

/// What KVM says. Nothing as long as it is not there.
fn cpu_models() -> BTreeSet<CpuModel> {
    static MODELS: Learned<BTreeSet<CpuModel>> = Learned::new();
    MODELS.get(CpuModel::supported).unwrap_or_default()
}

/// The same of what the processor is.
fn processor() -> Option<Processor> {
    static PROCESSOR: Learned<Processor> = Learned::new();
    PROCESSOR.get(Processor::of_host)
}

/// What does not change while the machine runs, once it can be told. A machine that boots loads KVM when it has found its processors, which may be after the
/// control process has started: that it is not there says nothing about later.
struct Learned<T> {
    known: OnceLock<T>,
    told: Once,
}

impl<T: Clone> Learned<T> {
    const fn new() -> Self {
        Self { known: OnceLock::new(), told: Once::new() }
    }

    /// Asks until there is an answer.
    fn get<E: std::fmt::Display>(&self, ask: impl FnOnce() -> Result<T, E>) -> Option<T> {
        if let Some(known) = self.known.get() {
            return Some(known.clone());
        }
        match ask() {
            Ok(answer) => Some(self.known.get_or_init(|| answer).clone()),
            Err(error) => {
                self.told.call_once(
                    || tracing::warn!(%error, "this node can run no VM yet: it goes on asking for KVM"),
                );
                None
            }
        }
    }
}

fn booted() -> Timestamp {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<i64>().ok());
    Timestamp(seconds.unwrap_or(0).saturating_mul(1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_told_yet_is_asked_again_and_what_was_told_is_not() {
        let learned: Learned<u32> = Learned::new();
        assert_eq!(learned.get(|| Err("no KVM yet")), None);
        assert_eq!(learned.get(|| Ok::<_, &str>(7)), Some(7));
        assert_eq!(learned.get(|| Err("nobody is asked")), Some(7));
    }
}
