//! The QEMU guest agent in guests on this node: what runs in them, what they say of themselves, and how they are asked to do something.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`protocol`] | the agent's JSON, pure: commands out, answers in |
//! | [`connection`] | one connection to an agent: a call at a time, each with a deadline |
//! | [`keeper`] | the task that owns the connection of one VM |
//! | [`Agents`] | the keepers of all VMs here |
//!
//! **The guest is not trusted.** An answer is limited in size and in what of it is kept, text of it is stripped of what a terminal would act
//! on, and a guest that answers late, never, or with nonsense costs its own VM's task some time and nobody else any.
//!
//! **What was frozen is thawed.** A keeper that froze a guest's file systems thaws them after [`FREEZE_LIMIT`] by itself, and one that
//! finds them frozen when it connects, by a predecessor of this process, thaws them at once.

mod connection;
mod keeper;
mod protocol;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use self::keeper::Keeper;
use crate::{
    paths::NodePaths,
    state::{RunEpoch, VmId, report::AgentReport},
};

/// Longest that file systems stay frozen.
pub const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// Longest that any request takes; a freeze has to write everything out.
pub const LONGEST: Duration = Duration::from_secs(14);

/// A program that runs in a guest, by the agent's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestPid(pub i64);

/// What an agent can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Freeze all file systems.
    Freeze,
    /// Thaw them.
    Thaw,
    /// Shut the guest down.
    Shutdown,
    /// Set the guest's clock to this node's.
    SetTime,
    /// Start a program.
    Start {
        /// The program, and its arguments.
        command: Vec<String>,
    },
    /// How a program is. The one answer that says that it has ended has its output too, and the agent forgets it.
    Progress(GuestPid),
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// So many file systems are frozen.
    Frozen(u64),
    /// They are not any more.
    Thawed(Hold),
    /// The guest is about to shut down.
    ShuttingDown,
    /// The guest's clock is set.
    TimeSet,
    /// The program runs.
    Started(GuestPid),
    /// How it is.
    Progress(Progress),
}

/// Whether file systems were frozen all the time from the freeze to the thaw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hold {
    /// They were.
    Held,
    /// They were thawed before, or it is not known.
    Lapsed,
}

/// How a program is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Progress {
    /// It runs.
    Running,
    /// It has ended.
    Ended(Box<Ended>),
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// By what.
    pub how: HowEnded,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
    /// Whether that is all.
    pub output: Output,
}

/// What ended a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HowEnded {
    /// It did, with this code.
    Exit(i32),
    /// A signal.
    Signal(i32),
}

/// Whether a program's output is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// It is.
    Whole,
    /// The agent kept the beginning only.
    Cut,
}

/// Why an agent did not do it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum AgentFailure {
    /// There is none: it is not installed, does not run yet, or the VM does not run here.
    #[error("no guest agent answers; is qemu-guest-agent installed and running in the guest?")]
    Away,
    /// It took too long.
    #[error("the guest agent did not answer in time")]
    Silent,
    /// It said no.
    #[error("the guest agent refused: {0}")]
    Refused(String),
    /// What it said makes no sense.
    #[error("the guest agent answered what makes no sense: {0}")]
    Nonsense(String),
}

/// The agents in the guests on this node. Cheap to clone.
#[derive(Clone)]
pub struct Agents {
    paths: NodePaths,
    keepers: Arc<Mutex<BTreeMap<VmId, (RunEpoch, Keeper)>>>,
}

impl Agents {
    /// None yet.
    pub fn new(paths: NodePaths) -> Self {
        Self { paths, keepers: Arc::default() }
    }

    /// Keeps a connection to the agent of each of these runs, and no other.
    pub fn attend(&self, runs: &BTreeMap<VmId, RunEpoch>) {
        let mut keepers = self.keepers.lock();
        keepers.retain(|vm, (epoch, _)| runs.get(vm) == Some(epoch));
        for (vm, epoch) in runs {
            keepers.entry(*vm).or_insert_with(|| (*epoch, Keeper::start(*vm, self.paths.vm(*vm).agent())));
        }
    }

    /// What the agent of a VM says of its guest; none while it does not answer.
    pub fn seen(&self, vm: VmId) -> Option<AgentReport> {
        self.keepers.lock().get(&vm).and_then(|(_, keeper)| keeper.seen())
    }

    /// Asks the agent of a VM on this node.
    pub async fn ask(&self, vm: VmId, request: Request) -> Result<Answer, AgentFailure> {
        let asked = {
            let keepers = self.keepers.lock();
            let (_, keeper) = keepers.get(&vm).ok_or(AgentFailure::Away)?;
            keeper.ask(request)?
        };
        match tokio::time::timeout(LONGEST, asked).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(AgentFailure::Away),
            Err(_) => Err(AgentFailure::Silent),
        }
    }

    /// Ends all connections.
    pub fn dismiss(&self) {
        self.keepers.lock().clear();
    }
}
