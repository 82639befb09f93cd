//! The task that owns the connection to one VM's agent: connects again and again, looks at the guest's addresses now and then, and does
//! what it is asked for, one thing after the other.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    AgentFailure, Answer, FREEZE_LIMIT, Hold, Request,
    connection::Connection,
    protocol::{self, Command},
};
use crate::state::{VmId, report::AgentReport};

/// Between attempts to reach an agent that is not there. A guest takes a while to start its own.
const RETRY: Duration = Duration::from_secs(2);
/// How often the guest's addresses are looked at: often until there are any.
const LOOK_EVERY: Duration = Duration::from_secs(10);
const LOOK_EVERY_AT_FIRST: Duration = Duration::from_secs(1);
/// Deadline of what an agent answers from memory.
const QUICK: Duration = Duration::from_secs(3);
/// Deadline of a freeze.
const FREEZE_DEADLINE: Duration = Duration::from_secs(8);
/// A guest that shuts down says nothing; one that refuses does so at once.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(1);
/// Between attempts to thaw.
const THAW_RETRY: Duration = Duration::from_secs(1);
/// Requests that wait; more are refused.
const WAITING: usize = 16;

type Reply = oneshot::Sender<Result<Answer, AgentFailure>>;

/// A running keeper. Dropping it ends the task.
pub(super) struct Keeper {
    requests: mpsc::Sender<(Request, Reply)>,
    seen: Arc<Mutex<Option<AgentReport>>>,
    _task: AbortOnDropHandle<()>,
}

impl Keeper {
    /// Starts a keeper for the agent behind the socket at `path`, on the current runtime.
    pub(super) fn start(vm: VmId, path: PathBuf) -> Self {
        let (requests, asked) = mpsc::channel(WAITING);
        let seen = Arc::new(Mutex::new(None));
        let task = Task { vm, path, asked, seen: seen.clone(), thaw_at: None };
        Self { requests, seen, _task: AbortOnDropHandle::new(tokio::spawn(task.run())) }
    }

    /// What the agent says of its guest; none while it does not answer.
    pub(super) fn seen(&self) -> Option<AgentReport> {
        self.seen.lock().clone()
    }

    /// Asks for something; the answer comes by itself. While no agent answers nobody waits for one: whether there will be one cannot be
    /// known.
    pub(super) fn ask(
        &self,
        request: Request,
    ) -> Result<oneshot::Receiver<Result<Answer, AgentFailure>>, AgentFailure> {
        if self.seen.lock().is_none() {
            return Err(AgentFailure::Away);
        }
        let (reply, answered) = oneshot::channel();
        self.requests.try_send((request, reply)).map_err(|_| AgentFailure::Silent)?;
        Ok(answered)
    }
}

struct Task {
    vm: VmId,
    path: PathBuf,
    asked: mpsc::Receiver<(Request, Reply)>,
    seen: Arc<Mutex<Option<AgentReport>>>,
    /// When file systems that were, or may have been, frozen are thawed at the latest.
    thaw_at: Option<Instant>,
}

/// What woke the task.
enum Wake {
    Asked(Request, Reply),
    Thaw,
    Look,
    Dismissed,
}

impl Task {
    /// Runs until the keeper is dropped.
    async fn run(mut self) {
        loop {
            if let Ok(mut agent) = Connection::open(&self.path).await {
                let ended = self.attend(&mut agent).await;
                tracing::debug!(vm = %self.vm, ?ended, "the guest agent is away");
            }
            *self.seen.lock() = None;
            let again = Instant::now() + RETRY;
            loop {
                tokio::select! {
                    asked = self.asked.recv() => match asked {
                        // Whoever asked may have gone meanwhile.
                        Some((_, reply)) => drop(reply.send(Err(AgentFailure::Away))),
                        None => return,
                    },
                    () = sleep_until(again) => break,
                }
            }
        }
    }

    /// Serves requests until the agent is lost.
    async fn attend(&mut self, agent: &mut Connection) -> Result<(), AgentFailure> {
        let version = protocol::version(agent.call(&Command::Info, QUICK).await?)?;
        // Nobody but this task freezes; what is frozen now, a predecessor left behind.
        if let Ok(status) = agent.call(&Command::FreezeStatus, QUICK).await
            && protocol::is_frozen(&status)
        {
            self.thaw_at = Some(Instant::now());
        }
        tracing::info!(vm = %self.vm, version, "the guest agent answers");
        let mut report = AgentReport { version, interfaces: Vec::new() };
        *self.seen.lock() = Some(report.clone());
        let mut look_at = Instant::now();
        loop {
            match self.wake(look_at).await {
                Wake::Dismissed => return Ok(()),
                Wake::Asked(request, reply) => {
                    let answer = self.perform(agent, request).await;
                    let lost = matches!(answer, Err(AgentFailure::Away));
                    // Whoever asked may have gone meanwhile.
                    let _ = reply.send(answer);
                    if lost {
                        return Err(AgentFailure::Away);
                    }
                }
                Wake::Thaw => drop(self.thaw(agent).await?),
                Wake::Look => {
                    match agent.call(&Command::Interfaces, QUICK).await.and_then(protocol::interfaces) {
                        Ok(interfaces) => report.interfaces = interfaces,
                        // An agent that may not tell its addresses may do other things.
                        Err(AgentFailure::Refused(_)) => {}
                        Err(lost) => return Err(lost),
                    }
                    *self.seen.lock() = Some(report.clone());
                    let none = report.interfaces.iter().all(|interface| interface.addresses.is_empty());
                    look_at = Instant::now() + if none { LOOK_EVERY_AT_FIRST } else { LOOK_EVERY };
                }
            }
        }
    }

    /// What comes first. While anything is frozen the agent is not asked for addresses: it would refuse.
    async fn wake(&mut self, look_at: Instant) -> Wake {
        let timer = self.thaw_at.unwrap_or(look_at);
        tokio::select! {
            biased;
            () = sleep_until(timer) => if self.thaw_at.is_some() { Wake::Thaw } else { Wake::Look },
            asked = self.asked.recv() => match asked {
                Some((request, reply)) => Wake::Asked(request, reply),
                None => Wake::Dismissed,
            },
        }
    }

    async fn perform(&mut self, agent: &mut Connection, request: Request) -> Result<Answer, AgentFailure> {
        match request {
            Request::Freeze => {
                // From now on: an answer that is lost does not say that nothing is frozen.
                self.thaw_at = Some(Instant::now() + FREEZE_LIMIT);
                let frozen = agent.call(&Command::Freeze, FREEZE_DEADLINE).await;
                match frozen.as_ref().map(protocol::count) {
                    Ok(Ok(count)) => Ok(Answer::Frozen(count)),
                    Ok(Err(nonsense)) => self.thaw_now(nonsense),
                    Err(AgentFailure::Refused(why)) => {
                        self.thaw_at = None;
                        Err(AgentFailure::Refused(why.clone()))
                    }
                    Err(failure) => self.thaw_now(failure.clone()),
                }
            }
            Request::Thaw => self.thaw(agent).await.map(Answer::Thawed),
            Request::Shutdown => match agent.call(&Command::Shutdown, REFUSAL_PATIENCE).await {
                // It was there a moment ago: what ends it is the shutdown.
                Ok(_) | Err(AgentFailure::Silent | AgentFailure::Away) => Ok(Answer::ShuttingDown),
                Err(failure) => Err(failure),
            },
            Request::SetTime => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
                let now = i64::try_from(now).unwrap_or(i64::MAX);
                agent.call(&Command::SetTime(now), QUICK).await.map(|_| Answer::TimeSet)
            }
            Request::Start { command } => {
                agent.call(&Command::Exec(&command), QUICK).await.and_then(protocol::pid).map(Answer::Started)
            }
            Request::Progress(pid) => {
                let status = agent.call(&Command::ExecStatus(pid), QUICK).await?;
                protocol::progress(status).map(Answer::Progress)
            }
        }
    }

    fn thaw_now(&mut self, failure: AgentFailure) -> Result<Answer, AgentFailure> {
        self.thaw_at = Some(Instant::now());
        Err(failure)
    }

    /// Thaws; when that does not work, it is tried again later, over a new connection if need be.
    async fn thaw(&mut self, agent: &mut Connection) -> Result<Hold, AgentFailure> {
        let in_time = self.thaw_at.is_some_and(|latest| Instant::now() < latest);
        match agent.call(&Command::Thaw, QUICK).await {
            Ok(_) => {
                self.thaw_at = None;
                Ok(if in_time { Hold::Held } else { Hold::Lapsed })
            }
            // Nothing to thaw, or nothing that can be done about it.
            Err(AgentFailure::Refused(why)) => {
                self.thaw_at = None;
                Err(AgentFailure::Refused(why))
            }
            Err(failure) => {
                tracing::warn!(vm = %self.vm, %failure, "file systems of a guest cannot be thawed yet");
                self.thaw_at = Some(Instant::now() + THAW_RETRY);
                Err(failure)
            }
        }
    }
}
