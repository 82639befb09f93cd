//! Taking in the parts of images.
//!
//! A part comes in an upload ([`upload`]), or a node gets it by itself ([`fetch`]). It is kept in the node's spool and
//! verified there (length, digests, and a disk by the worker of [`crate::images`]) before the cluster gives it a
//! volume: a broken source leaves nothing behind. Then the part is `Importing` on this node, and [`run`] does what is
//! left from the state and the spool alone, so that it goes on after a restart: a boot file is moved to its place, from
//! where the reconcilers spread it; a disk is written to its volume ([`fill`]). A part whose file is gone fails.

mod fetch;
mod fill;
mod spool;
mod upload;

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc, time::Duration};

use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use super::member::Member;
use crate::{
    api::{
        problem::{Problem, ProblemKind},
        requests::Context,
    },
    images::{
        boot_file,
        reader::{ReadError, Worker},
    },
    state::{
        Availability, BootFile, Command, ContentHash, Image, ImageId, ImagePart, Op, PartState, TaskError,
    },
};
use spool::Spool;

pub use fetch::{Asker, ask as fetch_part};
pub use upload::{Piece, Upload, offset, upload};

/// Largest kernel or initramfs.
const MAX_BOOT_FILE: u64 = 1 << 30;
/// Largest file of a disk.
const MAX_DISK: u64 = 2 << 40;
/// How often the state is looked at when nothing changes.
const TICK: Duration = Duration::from_millis(500);
/// How often the spool is swept.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// Parts that are taken in at a time; the others wait.
const AT_A_TIME: usize = 4;

/// The largest file of a part.
const fn limit(part: ImagePart) -> u64 {
    match part {
        ImagePart::Disk => MAX_DISK,
        ImagePart::Kernel | ImagePart::Initramfs => MAX_BOOT_FILE,
    }
}

fn invalid(detail: impl Into<String>, next: &str) -> Problem {
    Problem::new(ProblemKind::Invalid, detail, next)
}

fn local(what: &str, error: &std::io::Error) -> Problem {
    let kind = match error.kind() {
        std::io::ErrorKind::StorageFull => ProblemKind::Capacity,
        _ => ProblemKind::Internal,
    };
    Problem::new(kind, format!("{what}: {error}"), "free space on the node's system disk, then import again")
}

/// A part that has come, in a file of the spool.
struct Taken {
    part: ImagePart,
    path: PathBuf,
    length: u64,
    /// Its BLAKE3, for a boot file.
    hash: ContentHash,
}

/// Verifies a part that has come and keeps it, unless it is kept already; answers what the cluster is to be told.
async fn take(member: &Member, image: &Image, taken: Taken) -> Result<Op, Problem> {
    let Taken { part, ref path, length, hash } = taken;
    let content_bytes = check(&taken).await?;
    let state = member.state();
    let lost = |node: &&crate::state::Node| node.availability != Availability::Available;
    let unreachable: Vec<_> = state.nodes.values().filter(lost).map(|node| node.id).collect();
    let context = Context { state: &state, reports: &Default::default(), silent: unreachable.clone() };
    let (volume, file) = match part {
        ImagePart::Disk => (Some(context.image_volume(&image.name, content_bytes)), None),
        ImagePart::Kernel | ImagePart::Initramfs => (None, Some(BootFile { hash, size_bytes: length })),
    };
    let spool = Spool::new(&member.paths);
    if *path != spool.part(image.id, part)
        && !spool.keep(path, image.id, part).map_err(|error| local("cannot keep the source", &error))?
    {
        return Err(Problem::new(
            ProblemKind::Conflict,
            format!("the {} of image {} has just come from elsewhere", part.name(), image.name),
            format!("see it: hci image get {}", image.name),
        ));
    }
    Ok(Op::BeginImagePart { image: image.id, part, node: member.id, volume, file, unreachable })
}

/// The cluster knows of a part now. One that was on the node already, for another image, is not needed twice.
fn told(member: &Member, image: ImageId, part: ImagePart, hash: ContentHash) {
    if part != ImagePart::Disk && member.paths.boot_file(hash).exists() {
        Spool::new(&member.paths).clear(image, part);
    }
}

/// Whether a change that was asked for may still be made.
fn may_still_be(problem: &Problem) -> bool {
    problem.is(ProblemKind::Unavailable) || problem.is(ProblemKind::Timeout)
}

/// Checks what has come before the cluster hears of it; answers how large it is as the guest sees it.
async fn check(taken: &Taken) -> Result<u64, Problem> {
    let part = taken.part;
    let unusable = |error: String| {
        invalid(format!("the {} cannot be used: {error}", part.name()), "import another file")
    };
    if part != ImagePart::Disk {
        boot_file::check(part, &taken.path).map_err(|error| unusable(error.to_string()))?;
        return Ok(taken.length);
    }
    let file = fs::File::open(&taken.path).map_err(|error| local("cannot read the source", &error))?;
    match Worker::default().probe(file).await {
        Ok((header, _)) => Ok(header.size_bytes),
        Err(ReadError::Start(error)) => Err(local("cannot start the image worker", &error)),
        Err(error) => Err(unusable(error.to_string())),
    }
}

/// A step that did not get to its end.
#[derive(Debug, thiserror::Error)]
enum StepError {
    /// It never will.
    #[error("{0}")]
    Final(String),
    /// Later perhaps.
    #[error("{0}")]
    Later(String),
}

type Key = (ImageId, ImagePart);

/// The parts that this node is to take in now.
fn wanted(member: &Member) -> BTreeMap<Key, (Image, PartState)> {
    let state = member.state();
    let is_mine = |state: &PartState| match state {
        PartState::Importing { node, .. } | PartState::Fetching { node, .. } => *node == member.id,
        PartState::Awaiting | PartState::File(_) | PartState::Volume(_) => false,
    };
    let parts = state.images.values().flat_map(|image| image.parts.iter().map(move |part| (image, part)));
    parts
        .filter(|(_, (_, state))| is_mine(state))
        .map(|(image, (part, state))| ((image.id, *part), (image.clone(), state.clone())))
        .collect()
}

/// Does what is left of imports on this node, until `shutdown`.
pub async fn run(member: Arc<Member>, shutdown: CancellationToken) {
    let spool = Spool::new(&member.paths);
    spool.sweep_at_start();
    let mut states = member.replicated.state();
    let mut sweep = tokio::time::interval(SWEEP_EVERY);
    // Dropping the set ends the steps, and with them their workers.
    let mut steps = JoinSet::new();
    let mut busy: BTreeMap<Key, AbortHandle> = BTreeMap::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = states.changed() => {}
            _ = sweep.tick() => spool.sweep(&member.state(), member.id),
            Some(_) = steps.join_next(), if !steps.is_empty() => {
                // What waits is tried again a little later.
                busy.retain(|_, step| !step.is_finished());
                tokio::time::sleep(TICK / 5).await;
            }
            () = tokio::time::sleep(TICK) => {}
        }
        let wanted = wanted(&member);
        for (key, step) in &busy {
            if !wanted.contains_key(key) {
                // Deleted, or given up by the leader.
                step.abort();
            }
        }
        for (key, (image, part_state)) in wanted {
            if busy.len() < AT_A_TIME && !busy.contains_key(&key) {
                let member = member.clone();
                let step = async move { step(&member, &image, key.1, &part_state).await };
                busy.insert(key, steps.spawn(step));
            }
        }
    }
}

/// Brings a part forward, as far as it can be now.
async fn step(member: &Arc<Member>, image: &Image, part: ImagePart, state: &PartState) {
    let outcome = match state {
        PartState::Importing { volume: Some(volume), task, .. } => {
            fill::disk(member, image.id, *volume, *task).await
        }
        PartState::Importing { file: Some(file), .. } => boot_file(member, image.id, part, file),
        PartState::Importing { .. } => Err(StepError::Final("nothing was declared".to_owned())),
        PartState::Fetching { source, task, .. } => fetch::step(member, image, part, source, *task).await,
        PartState::Awaiting | PartState::File(_) | PartState::Volume(_) => Ok(()),
    };
    match outcome {
        Ok(()) => {}
        Err(StepError::Later(why)) => tracing::debug!(image = image.name, why, "an import waits"),
        Err(StepError::Final(detail)) => {
            fail(member, image, part, detail).await;
            Spool::new(&member.paths).clear(image.id, part);
        }
    }
}

async fn fail(member: &Member, image: &Image, part: ImagePart, detail: String) {
    tracing::warn!(image = image.name, part = part.name(), detail, "an import failed");
    let error = TaskError {
        detail,
        next: format!("delete the image and import it again: hci image delete {}", image.name),
    };
    let op = Op::FailImagePart { image: image.id, part, node: member.id, error };
    if let Err(error) = member.replicated.propose(Command::now(op)).await {
        tracing::debug!(%error, "cannot tell that an import failed");
    }
}

/// Moves a boot file to its place, if it is not there already for another image; the reconcilers do the rest.
fn boot_file(member: &Member, image: ImageId, part: ImagePart, file: &BootFile) -> Result<(), StepError> {
    let (paths, spool) = (&member.paths, Spool::new(&member.paths));
    let to = paths.boot_file(file.hash);
    if !to.exists() {
        let moved =
            fs::create_dir_all(paths.boot_files()).and_then(|()| fs::rename(spool.part(image, part), &to));
        moved.map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                StepError::Final("the node lost the file before it was in".to_owned())
            }
            _ => StepError::Later(error.to_string()),
        })?;
    }
    spool.clear(image, part);
    Ok(())
}

async fn commit(member: &Member, op: Op) -> Result<(), StepError> {
    match member.replicated.propose(Command::now(op)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(refusal)) => Err(StepError::Later(refusal.to_string())),
        Err(error) => Err(StepError::Later(error.to_string())),
    }
}
