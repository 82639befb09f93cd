//! Reading volumes out: `GET /v1/volumes/NAME/export`.
//!
//! The answer is a stream of the frames of [`crate::images::protocol`], zeroes left out, with a SHA-256 at its end: who
//! reads it knows that it is whole and can write it down in any format. A broken one is gone on with at any offset. The
//! volume is open on this node for the time; the state knows of it, and [`run`] ends in the state what this process
//! does not do (any more).

use std::{collections::BTreeSet, io, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt, Stream, StreamExt, stream};
use netfabric::rpc::CallError;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::member::Member;
use crate::{
    api::{
        problem::{Problem, ProblemKind},
        requests::not_found,
    },
    images::protocol::{Encoder, Format, Header, MAX_DATA},
    state::{
        Availability, BLOCK_BYTES, Command, ExportId, Generation, Op, SnapshotId, Volume, VolumeId,
        report::VolumeRunState,
    },
};

/// How long the volume may take to be open here.
const OPEN: Duration = Duration::from_secs(30);
/// How often it is looked whether it is.
const LOOK: Duration = Duration::from_millis(50);
/// Reads under way at a time.
const READS: usize = 4;
/// Pieces that wait for the client.
const AHEAD: usize = 4;
/// The longest time for which a client takes nothing.
const SILENCE: Duration = Duration::from_secs(60);
/// How often exports that nobody does are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// How often the end of one is told until it is heard.
const TELLS: u32 = 5;

/// What is to be read.
#[derive(Clone, Debug)]
pub struct Request {
    /// The volume.
    pub volume: VolumeId,
    /// A snapshot of it, by name or id.
    pub snapshot: Option<String>,
    /// Where to start.
    pub from: u64,
}

/// The exports of this process.
#[derive(Debug, Default)]
pub struct Running(Mutex<BTreeSet<ExportId>>);

/// An export of this process; when it is dropped, [`run`] ends it in the state.
struct Mine {
    member: Arc<Member>,
    id: ExportId,
}

impl Mine {
    fn new(member: &Arc<Member>) -> Self {
        let id = ExportId::random();
        member.exports.0.lock().insert(id);
        Self { member: member.clone(), id }
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        self.member.exports.0.lock().remove(&self.id);
    }
}

/// Opens what is to be read, and answers its frames. The future is what reads: it has to be spawned.
pub async fn export(
    member: &Arc<Member>,
    request: Request,
) -> Result<(impl Stream<Item = Result<Bytes, io::Error>> + use<>, impl Future<Output = ()> + use<>), Problem>
{
    if !request.from.is_multiple_of(BLOCK_BYTES) {
        let detail = format!("{} is no offset of a block", request.from);
        return Err(Problem::new(ProblemKind::Invalid, detail, "start at a multiple of 4096"));
    }
    let mine = Mine::new(member);
    let snapshot = match &request.snapshot {
        None => None,
        Some(name) => Some((find_snapshot(member, request.volume, name)?, VolumeId::random())),
    };
    let op = Op::BeginExport { export: mine.id, volume: request.volume, snapshot, node: member.id };
    member.replicated.propose(Command::now(op)).await??;
    let volume = open(member, snapshot.map_or(request.volume, |(_, clone)| clone)).await?;
    let (to, mut frames) = mpsc::channel(AHEAD);
    let member = member.clone();
    let reading = async move {
        read(&member, &volume, request.from, &to).await;
        drop(to);
        end(&member, mine).await;
    };
    Ok((stream::poll_fn(move |context| frames.poll_recv(context)).map(Ok), reading))
}

fn find_snapshot(member: &Member, volume: VolumeId, name: &str) -> Result<SnapshotId, Problem> {
    let state = member.state();
    let volume = state.volumes.get(&volume);
    let found = volume.and_then(|volume| volume.layers.find(name)).map(|snapshot| snapshot.id);
    found.ok_or_else(|| {
        let of = volume.map(|volume| volume.name.as_str()).unwrap_or_default();
        Problem::new(
            ProblemKind::NotFound,
            format!("volume {of} has no snapshot {name}"),
            format!("see what there is: hci volume snapshot list {of}"),
        )
    })
}

/// Has the volume opened on this node, and waits until it is.
async fn open(member: &Arc<Member>, id: VolumeId) -> Result<Volume, Problem> {
    let begun = tokio::time::Instant::now();
    let mut last = None;
    while begun.elapsed() < OPEN {
        let state = member.state();
        if let Some(volume) = state.volumes.get(&id) {
            if volume.coordinator == Some(member.id) {
                if is_open(member, volume) {
                    return Ok(volume.clone());
                }
            } else if volume.coordinator.is_none() {
                let lost = |node: &&crate::state::Node| node.availability != Availability::Available;
                let op = Op::OpenVolume {
                    volume: id,
                    node: member.id,
                    expected: volume.generation,
                    unreachable: state.nodes.values().filter(lost).map(|node| node.id).collect(),
                };
                if let Err(refusal) = member.replicated.propose(Command::now(op)).await? {
                    last = Some(refusal.detail);
                }
            } else {
                last = Some("another node has it open".to_owned());
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    let why = last.unwrap_or_else(|| "the data process of this node has not opened it".to_owned());
    Err(Problem::new(
        ProblemKind::Conflict,
        format!("the volume cannot be read now: {why}"),
        "see who uses it: hci volume get; then try again",
    ))
}

fn is_open(member: &Member, volume: &Volume) -> bool {
    volume.generation > Generation(0)
        && member.local.report().volumes.iter().any(|seen| {
            seen.volume == volume.id
                && seen.generation == volume.generation
                && seen.state == VolumeRunState::Open
        })
}

/// Reads from `from` to the end and sends the frames; in the middle the client is told in words if that fails.
async fn read(member: &Arc<Member>, volume: &Volume, from: u64, to: &mpsc::Sender<Bytes>) {
    let mut encoder = Encoder::new(Vec::new());
    let start = from.min(volume.size_bytes);
    let header = Header { format: Format::Raw, size_bytes: volume.size_bytes, start };
    let outcome = match encoder.header(&header) {
        Ok(()) => read_all(member, volume, start, &mut encoder, to).await,
        Err(error) => Err(Stop::Failed(error.to_string())),
    };
    let last = match outcome {
        Ok(()) => encoder.end(),
        Err(Stop::Failed(reason)) => {
            tracing::warn!(volume = volume.name, reason, "an export ended early");
            encoder.refuse(&reason)
        }
        Err(Stop::Gone) => return,
    };
    // Into memory, which does not fail. A client that has gone needs no end.
    let _ = send(to, last.unwrap_or_default()).await;
}

/// Why an export ended early.
enum Stop {
    /// The client has gone, or takes nothing.
    Gone,
    /// For this reason.
    Failed(String),
}

/// Reads on, also when the volume was closed and opened again in between: by a reconciler that had not heard of the
/// export yet, or by a data process that was restarted.
async fn read_all(
    member: &Arc<Member>,
    volume: &Volume,
    start: u64,
    encoder: &mut Encoder<Vec<u8>>,
    to: &mpsc::Sender<Bytes>,
) -> Result<(), Stop> {
    let (mut at, mut generation, mut last) = (start, volume.generation, tokio::time::Instant::now());
    'opened: loop {
        let mut pieces = pieces(member, volume, at);
        while let Some((offset, piece)) = pieces.next().await {
            match piece {
                Ok(piece) => {
                    let encoded = encoder.sparse(offset, &piece);
                    encoded.map_err(|error| Stop::Failed(error.to_string()))?;
                    send(to, std::mem::take(encoder.writer())).await?;
                    (at, last) = (offset + piece.len() as u64, tokio::time::Instant::now());
                }
                Err(error) if last.elapsed() > OPEN => {
                    return Err(Stop::Failed(format!("the volume cannot be read: {error}")));
                }
                Err(_) => {
                    tokio::time::sleep(LOOK).await;
                    let again = open(member, volume.id).await;
                    let again = again.map_err(|problem| Stop::Failed(problem.to_string()))?.generation;
                    if again.0 > generation.0 + 1 {
                        return Err(Stop::Failed(
                            "the volume was used by somebody else meanwhile".to_owned(),
                        ));
                    }
                    generation = again;
                    continue 'opened;
                }
            }
        }
        // Nobody can have written to it since it was opened, unless it was opened once more.
        let now = member.state().volumes.get(&volume.id).map(|now| now.generation);
        return match now == Some(generation) {
            true => Ok(()),
            false => Err(Stop::Failed("the volume was used by somebody else meanwhile".to_owned())),
        };
    }
}

/// The content of a volume, read ahead.
fn pieces(
    member: &Arc<Member>,
    volume: &Volume,
    from: u64,
) -> impl Stream<Item = (u64, Result<Bytes, CallError>)> + Unpin + use<> {
    let (local, id, size) = (member.local.clone(), volume.id, volume.size_bytes);
    stream::iter((from..size).step_by(MAX_DATA as usize))
        .map(move |offset| {
            let length = u32::try_from(size - offset).unwrap_or(MAX_DATA).min(MAX_DATA);
            let piece = local.read_volume(id, offset, length);
            async move { (offset, piece.await) }.boxed()
        })
        .buffered(READS)
}

async fn send(to: &mpsc::Sender<Bytes>, frames: Vec<u8>) -> Result<(), Stop> {
    match tokio::time::timeout(SILENCE, to.send(frames.into())).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Stop::Gone),
    }
}

/// Tells that an export has ended. If nobody hears it, [`run`] does it later.
async fn end(member: &Member, mine: Mine) {
    for _ in 0..TELLS {
        if let Ok(Ok(_)) = member.replicated.propose(Command::now(Op::EndExport(mine.id))).await {
            return;
        }
        tokio::time::sleep(SWEEP / TELLS).await;
    }
}

/// Ends the exports of this node that this process does not do: those of an earlier one, and those that broke off.
pub async fn run(member: Arc<Member>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(SWEEP) => {}
        }
        let state = member.state();
        let mine = state.exports.iter().filter(|(_, export)| export.node == member.id);
        for (id, _) in mine.filter(|(id, _)| !member.exports.0.lock().contains(id)) {
            if let Err(error) = member.replicated.propose(Command::now(Op::EndExport(*id))).await {
                tracing::debug!(%error, "cannot tell that an export ended");
            }
        }
    }
}

/// The volume of an image's disk, or of a volume, by name.
pub fn find(member: &Member, noun: &str, name: &str) -> Result<VolumeId, Problem> {
    let state = member.state();
    let found = match noun {
        "image" => state.find_image(name).ok_or_else(|| not_found(noun, name))?.disk().ok_or_else(|| {
            Problem::new(
                ProblemKind::Conflict,
                format!("image {name} has no disk (yet)"),
                format!("see it: hci image get {name}"),
            )
        })?,
        _ => state.find_volume(name).ok_or_else(|| not_found(noun, name))?.id,
    };
    Ok(found)
}
