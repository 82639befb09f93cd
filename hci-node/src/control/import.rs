//! Taking in the parts of images.
//!
//! An upload is written to a spool file of the node that got it and verified there (length, BLAKE3, format) before the
//! cluster hears of it: a broken upload leaves nothing behind. Then the part is `Importing` on this node, and
//! [`run`] does what is left from the state and the spool alone, so that it goes on after a restart: a boot file is
//! moved to its place, from where the reconcilers spread it; a disk is written to its volume. A part whose spool file is
//! gone fails.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use netfabric::rpc::CallError;
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

use super::member::Member;
use crate::{
    api::{
        problem::{Problem, ProblemKind},
        requests::{Context, not_found},
        service::{self, ApiResponse},
    },
    files::{self, Durability},
    images::{
        boot_file,
        protocol::{Extent, Mode},
        reader::{ReadError, Worker},
    },
    paths::NodePaths,
    state::{
        Availability, BLOCK_BYTES, BootFile, Command, ContentHash, Generation, Image, ImageId, ImagePart, Op,
        PartState, TaskError, TaskId, Volume, VolumeId, report::VolumeRunState,
    },
};

/// Largest kernel or initramfs.
const MAX_BOOT_FILE: u64 = 1 << 30;
/// Largest upload of a disk.
const MAX_DISK: u64 = 2 << 40;
/// Writes to a volume under way at a time.
const WRITES: usize = 8;
/// Progress is told after this much.
const PROGRESS_EVERY: u64 = 256 << 20;
/// How often the state is looked at when nothing changes.
const TICK: Duration = Duration::from_millis(500);
/// The longest silence of an uploading client.
const SILENCE: Duration = Duration::from_secs(60);

/// An upload, as announced.
#[derive(Clone, Debug)]
pub struct Upload {
    /// The image, by name or id.
    pub image: String,
    /// The part.
    pub part: ImagePart,
    /// Its length.
    pub length: Option<u64>,
    /// BLAKE3 of its content.
    pub hash: Option<ContentHash>,
}

/// Where uploads are kept until they are in.
fn spool_dir(paths: &NodePaths) -> PathBuf {
    paths.state().join("spool")
}

fn spool_file(paths: &NodePaths, file: &BootFile) -> PathBuf {
    spool_dir(paths).join(format!("file-{}", file.hash))
}

fn spool_disk(paths: &NodePaths, volume: VolumeId) -> PathBuf {
    spool_dir(paths).join(format!("disk-{volume}"))
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

/// A file that is removed unless it was kept.
struct Spooled(Option<PathBuf>);

impl Spooled {
    fn path(&self) -> &Path {
        self.0.as_deref().unwrap_or(Path::new(""))
    }

    fn keep_as(&mut self, path: &Path) -> std::io::Result<()> {
        if let Some(temporary) = &self.0 {
            fs::rename(temporary, path)?;
            self.0 = None;
        }
        Ok(())
    }
}

impl Drop for Spooled {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Swept at the next start if this fails.
            let _ = fs::remove_file(path);
        }
    }
}

/// Takes an upload: `PUT /v1/images/NAME/PART`.
pub async fn upload<S, E>(member: &Arc<Member>, upload: Upload, body: S) -> Result<ApiResponse, Problem>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::fmt::Display,
{
    let image = find_image(member, &upload.image).await?;
    match image.parts.get(&upload.part) {
        Some(PartState::Awaiting) => {}
        Some(_) => {
            return Err(Problem::new(
                ProblemKind::Conflict,
                format!("image {} has its {} already, or gets it now", image.name, upload.part.name()),
                format!("see it: hci image get {}", image.name),
            ));
        }
        None => {
            return Err(invalid(
                format!("image {} was declared without a {}", image.name, upload.part.name()),
                "delete the image and create it with this part",
            ));
        }
    }
    let dir = spool_dir(&member.paths);
    tokio::fs::create_dir_all(&dir).await.map_err(|error| local("cannot spool the upload", &error))?;
    let mut spooled = Spooled(Some(dir.join(format!("upload-{}", uuid::Uuid::new_v4()))));
    let (length, hash) = receive(&upload, spooled.path(), body).await?;
    let part = upload.part;
    let content_bytes = check(part, spooled.path(), length).await?;

    let state = member.state();
    let lost = |node: &&crate::state::Node| node.availability != Availability::Available;
    let unreachable: Vec<_> = state.nodes.values().filter(lost).map(|node| node.id).collect();
    let context = Context { state: &state, reports: &Default::default(), silent: unreachable.clone() };
    let keep = |spooled: &mut Spooled, to: &Path| {
        spooled.keep_as(to).map_err(|error| local("cannot keep the upload", &error))
    };
    let (volume, file, kept) = if part == ImagePart::Disk {
        let volume = context.image_volume(&image.name, content_bytes);
        let kept = spool_disk(&member.paths, volume.id);
        keep(&mut spooled, &kept)?;
        (Some(volume), None, kept)
    } else {
        let file = BootFile { hash, size_bytes: length };
        let kept = spool_file(&member.paths, &file);
        keep(&mut spooled, &kept)?;
        (None, Some(file), kept)
    };
    let op = Op::BeginImagePart { image: image.id, part, node: member.id, volume, file, unreachable };
    let asked = service::ask(member, op).await;
    if let Err(problem) = &asked
        && !problem.is(ProblemKind::Unavailable)
        && !problem.is(ProblemKind::Timeout)
    {
        // Refused for certain: nobody will come back for it.
        let _ = tokio::fs::remove_file(kept).await;
    }
    asked
}

/// Checks what was uploaded before the cluster hears of it; answers how large it is as the guest sees it.
async fn check(part: ImagePart, path: &Path, length: u64) -> Result<u64, Problem> {
    let unusable = |error: String| {
        invalid(format!("the {} cannot be used: {error}", part.name()), "import another file")
    };
    if part != ImagePart::Disk {
        boot_file::check(part, path).map_err(|error| unusable(error.to_string()))?;
        return Ok(length);
    }
    let file = fs::File::open(path).map_err(|error| local("cannot read the upload", &error))?;
    match Worker::default().probe(file).await {
        Ok((header, _)) => Ok(header.size_bytes),
        Err(ReadError::Start(error)) => Err(local("cannot start the image worker", &error)),
        Err(error) => Err(unusable(error.to_string())),
    }
}

/// The image as this node knows it; it may have been declared a moment ago through another node.
async fn find_image(member: &Member, name: &str) -> Result<Image, Problem> {
    let mut state = member.replicated.state();
    let seen = tokio::time::timeout(
        Duration::from_secs(2),
        state.wait_for(|state| state.find_image(name).is_some()),
    );
    match seen.await {
        Ok(Ok(state)) => state.find_image(name).cloned().ok_or_else(|| not_found("image", name)),
        _ => Err(not_found("image", name)),
    }
}

async fn receive<S, E>(upload: &Upload, path: &Path, mut body: S) -> Result<(u64, ContentHash), Problem>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::fmt::Display,
{
    let limit = if upload.part == ImagePart::Disk { MAX_DISK } else { MAX_BOOT_FILE };
    let too_large = || {
        Problem::new(
            ProblemKind::TooLarge,
            format!("a {} has at most {limit} bytes", upload.part.name()),
            "use a smaller file",
        )
    };
    if upload.length.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let cannot = |error: std::io::Error| local("cannot spool the upload", &error);
    let mut file = tokio::fs::File::create(path).await.map_err(cannot)?;
    let mut hasher = blake3::Hasher::new();
    let mut length = 0u64;
    loop {
        let piece = match tokio::time::timeout(SILENCE, body.next()).await {
            Err(_) => return Err(invalid("the upload stalled", "import again")),
            Ok(None) => break,
            Ok(Some(Err(error))) => {
                return Err(invalid(format!("the upload broke off: {error}"), "import again"));
            }
            Ok(Some(Ok(piece))) => piece,
        };
        length += piece.len() as u64;
        if length > limit {
            return Err(too_large());
        }
        hasher.update(&piece);
        file.write_all(&piece).await.map_err(cannot)?;
    }
    file.sync_all().await.map_err(cannot)?;
    let hash = ContentHash(*hasher.finalize().as_bytes());
    if let Some(expected) = upload.length.filter(|expected| *expected != length) {
        return Err(invalid(
            format!("the upload is truncated: {length} of {expected} bytes came"),
            "import again",
        ));
    }
    if upload.hash.is_some_and(|expected| expected != hash) {
        return Err(invalid("the upload is corrupt: its BLAKE3 is not the one announced", "import again"));
    }
    if length == 0 {
        return Err(invalid("the upload is empty", "import a file with content"));
    }
    Ok((length, hash))
}

/// An import that cannot go on.
#[derive(Debug, thiserror::Error)]
enum StepError {
    /// It never will.
    #[error("{0}")]
    Final(String),
    /// Later perhaps.
    #[error("{0}")]
    Later(String),
}

/// Does what is left of imports on this node, until `shutdown`.
pub async fn run(member: Arc<Member>, shutdown: CancellationToken) {
    let mut states = member.replicated.state();
    sweep(&member.paths);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = states.changed() => {}
            () = tokio::time::sleep(TICK) => {}
        }
        let state = states.borrow_and_update().clone();
        for image in state.images.values() {
            for (part, step) in &image.parts {
                let PartState::Importing { node, volume, file, task } = step else { continue };
                if *node != member.id {
                    continue;
                }
                let outcome = match (volume, file) {
                    (Some(volume), _) => disk(&member, image.id, *volume, *task).await,
                    (None, Some(file)) => boot_file(&member.paths, file),
                    (None, None) => Err(StepError::Final("nothing was declared".to_owned())),
                };
                match outcome {
                    Ok(()) => {}
                    Err(StepError::Later(why)) => tracing::debug!(image = image.name, why, "an import waits"),
                    Err(StepError::Final(detail)) => fail(&member, image, *part, detail).await,
                }
            }
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

/// Removes uploads that were cut off by a restart.
fn sweep(paths: &NodePaths) {
    let Ok(entries) = fs::read_dir(spool_dir(paths)) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("upload-") {
            // What stays only takes space.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Moves a boot file to its place; the reconcilers do the rest.
fn boot_file(paths: &NodePaths, file: &BootFile) -> Result<(), StepError> {
    let (from, to) = (spool_file(paths, file), paths.boot_file(file.hash));
    if to.exists() {
        return Ok(());
    }
    let moved = fs::create_dir_all(paths.boot_files()).and_then(|()| fs::rename(&from, &to));
    match moved {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(StepError::Final("the node lost the upload".to_owned()))
        }
        Err(error) => Err(StepError::Later(error.to_string())),
    }
}

/// Writes a disk to its volume.
async fn disk(
    member: &Arc<Member>,
    image: ImageId,
    id: VolumeId,
    task: Option<TaskId>,
) -> Result<(), StepError> {
    let state = member.state();
    let Some(volume) = state.volumes.get(&id) else { return Err(StepError::Later("no volume".to_owned())) };
    let path = spool_disk(&member.paths, id);
    if !volume.is_filled() {
        wait_open(member, volume)?;
        fill(member, volume, &path, task).await?;
        let op = Op::VolumeFilled { volume: id, generation: volume.generation };
        commit(member, op).await?;
    }
    commit(member, Op::CompleteImagePart { image, part: ImagePart::Disk, node: member.id }).await?;
    // What stays only takes space.
    let _ = fs::remove_file(progress_file(&path));
    let _ = fs::remove_file(path);
    Ok(())
}

async fn commit(member: &Member, op: Op) -> Result<(), StepError> {
    match member.replicated.propose(Command::now(op)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(refusal)) => Err(StepError::Later(refusal.to_string())),
        Err(error) => Err(StepError::Later(error.to_string())),
    }
}

fn wait_open(member: &Member, volume: &Volume) -> Result<(), StepError> {
    let report = member.local.report();
    let open = report.volumes.iter().any(|seen| {
        seen.volume == volume.id && seen.generation == volume.generation && seen.state == VolumeRunState::Open
    });
    if open { Ok(()) } else { Err(StepError::Later("the volume is not open yet".to_owned())) }
}

/// How far a disk is written and flushed, beside its spool file: a restart goes on from there.
fn progress_file(path: &Path) -> PathBuf {
    path.with_extension("progress")
}

fn read_progress(path: &Path) -> u64 {
    // Anything but a whole block's offset was not written by us: from the start.
    let text = fs::read_to_string(progress_file(path)).unwrap_or_default();
    text.trim().parse().ok().filter(|offset: &u64| offset.is_multiple_of(BLOCK_BYTES)).unwrap_or(0)
}

/// Writes what the worker reads from the spool file. Zeroes are left out: the volume is new.
async fn fill(
    member: &Arc<Member>,
    volume: &Volume,
    path: &Path,
    task: Option<TaskId>,
) -> Result<(), StepError> {
    let unreadable = |error: ReadError| match error {
        ReadError::Start(_) => StepError::Later(error.to_string()),
        error => StepError::Final(format!("the disk cannot be read: {error}")),
    };
    let image = fs::File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => StepError::Final("the node lost the upload".to_owned()),
        _ => StepError::Later(error.to_string()),
    })?;
    let mut flushed = read_progress(path);
    let mut reading = Worker::default().open(image, Mode::Read, flushed).await.map_err(unreadable)?;
    let size = reading.header().map_err(unreadable)?.size_bytes;
    if size > volume.size_bytes {
        return Err(StepError::Final("the disk is larger than it was when it came".to_owned()));
    }
    let is_ours = || {
        let now = member.state().volumes.get(&volume.id).map(|now| now.generation);
        match now == Some(volume.generation) && volume.generation > Generation(0) {
            true => Ok(()),
            // What was not flushed may be lost: again from the last flush.
            false => Err(StepError::Later("the volume was opened anew".to_owned())),
        }
    };
    let later = |error: CallError| StepError::Later(error.to_string());
    let mut writes = FuturesUnordered::<BoxFuture<'static, Result<(), CallError>>>::new();
    while let Some(extent) = reading.next().await.map_err(unreadable)? {
        is_ours()?;
        let end = extent.end();
        if let Extent::Data { offset, data } = extent {
            if writes.len() == WRITES
                && let Some(written) = writes.next().await
            {
                written.map_err(later)?;
            }
            writes.push(member.local.write_volume(volume.id, offset, data));
        }
        if end - flushed >= PROGRESS_EVERY {
            while let Some(written) = writes.next().await {
                written.map_err(later)?;
            }
            member.local.flush_volume(volume.id).await.map_err(later)?;
            is_ours()?;
            flushed = end;
            let text = end.to_string();
            files::replace(&progress_file(path), text.as_bytes(), 0o600, Durability::Durable)
                .map_err(|error| StepError::Later(error.to_string()))?;
            if let Some(task) = task {
                let permille = u16::try_from(end.saturating_mul(1000) / size.max(1)).unwrap_or(999);
                let message = "writes the disk to the pool".to_owned();
                commit(member, Op::UpdateTask { task, permille, message }).await?;
            }
        }
    }
    while let Some(written) = writes.next().await {
        written.map_err(later)?;
    }
    member.local.flush_volume(volume.id).await.map_err(later)?;
    is_ours()
}
