//! Parts that a node gets by itself: `POST /v1/images/NAME/PART`, from a web server or from a file of its own.
//!
//! The source is in the state, so that a restarted control process goes on; what was downloaded is in the spool, so
//! that it goes on where it was. A file of the node is linked into the spool, not copied, unless it is a boot file.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{StepError, Taken, commit, invalid, limit, spool::Spool, take, told, upload::awaited};
use crate::{
    api::{
        problem::{Problem, ProblemKind},
        service::{self, ApiResponse},
        types as api,
    },
    control::member::Member,
    files,
    images::download::{self, Download, DownloadError},
    state::{
        Command, ContentHash, Image, ImageId, ImagePart, ImageSource, Op, RefusalKind, SourceLocation, TaskId,
    },
};

/// Progress reaches the state not more often than this.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// The part of the task that the download is; writing to the volume is the rest.
const SHARE_PERMILLE: u64 = 500;

/// Who asks: a file of the node may be named by root of the node only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// Through the node's own socket.
    Root,
    /// Over the network.
    Admin,
}

/// Has this node get a part.
pub async fn ask(
    member: &Arc<Member>,
    image: &str,
    part: ImagePart,
    request: api::FetchImagePart,
    asker: Asker,
) -> Result<ApiResponse, Problem> {
    let location = match (request.url, request.file) {
        (Some(url), None) => {
            download::check_url(&url).map_err(|error| invalid(error.to_string(), "give another URL"))?;
            SourceLocation::Url(url)
        }
        (None, Some(_)) if asker != Asker::Root => {
            return Err(Problem::new(
                ProblemKind::Forbidden,
                "a file of the node can be named on the node itself only",
                "log in to the node and run the command there",
            ));
        }
        (None, Some(file)) => {
            check_file(&file, part)?;
            SourceLocation::File(file)
        }
        _ => return Err(invalid("a source is either a URL or a file", "give one of them")),
    };
    let sha256 = request.sha256.map(|text| {
        let next = "give 64 hexadecimal digits";
        text.parse().map_err(|error| invalid(format!("the SHA-256 cannot be read: {error}"), next))
    });
    let source = ImageSource { location, sha256: sha256.transpose()? };
    let image = awaited(member, image, part).await?;
    // What an earlier attempt may have left is not this source.
    Spool::new(&member.paths).clear(image.id, part);
    service::ask(member, Op::FetchImagePart { image: image.id, part, node: member.id, source }).await
}

fn check_file(file: &str, part: ImagePart) -> Result<(), Problem> {
    let path = Path::new(file);
    let seen = path.is_absolute().then(|| fs::metadata(path));
    match seen {
        Some(Ok(metadata)) if metadata.is_file() && metadata.len() <= limit(part) => Ok(()),
        Some(Ok(_)) => Err(invalid(format!("{file} is no file, or too large"), "give another file")),
        Some(Err(error)) => Err(invalid(format!("{file} cannot be read: {error}"), "give another file")),
        None => Err(invalid(format!("{file} is no absolute path"), "give the whole path")),
    }
}

/// Gets a part, then takes it in. Called again until the part is no longer to be fetched.
pub(super) async fn step(
    member: &Arc<Member>,
    image: &Image,
    part: ImagePart,
    source: &ImageSource,
    task: Option<TaskId>,
) -> Result<(), StepError> {
    let spool = Spool::new(&member.paths);
    spool.ready().map_err(|error| StepError::Later(error.to_string()))?;
    // A process that ended between keeping it and telling of it has left it there.
    let kept = spool.part(image.id, part);
    let path =
        if kept.exists() { kept } else { fetched(member, image.id, part, source, task, &spool).await? };
    let length = fs::metadata(&path).map_err(|error| StepError::Later(error.to_string()))?.len();
    let hash = digest(&path, part).await?;
    let outcome = match take(member, image, Taken { part, path, length, hash }).await {
        // The task of the fetch goes on: no other one is made.
        Ok(op) => match member.replicated.propose(Command::now(op)).await {
            Ok(Ok(_)) => Ok(()),
            // The state says what this part is now.
            Ok(Err(refusal)) if refusal.kind == RefusalKind::Conflict => {
                Err(StepError::Later(refusal.to_string()))
            }
            Ok(Err(refusal)) => Err(StepError::Final(refusal.to_string())),
            Err(error) => Err(StepError::Later(error.to_string())),
        },
        Err(problem) if problem.is(ProblemKind::Conflict) => Err(StepError::Later(problem.to_string())),
        Err(problem) => Err(StepError::Final(problem.to_string())),
    };
    outcome.map(|()| told(member, image.id, part, hash))
}

/// Gets a part into the spool; answers where.
async fn fetched(
    member: &Arc<Member>,
    image: ImageId,
    part: ImagePart,
    source: &ImageSource,
    task: Option<TaskId>,
    spool: &Spool,
) -> Result<PathBuf, StepError> {
    let path = spool.fetch(image, part);
    match &source.location {
        SourceLocation::Url(url) => {
            let download =
                Download { url: url.clone(), to: path.clone(), limit: limit(part), sha256: source.sha256 };
            get(member, &download, task).await?;
        }
        SourceLocation::File(file) => {
            let (file, to, source) = (file.clone(), path.clone(), source.clone());
            let linked = tokio::task::spawn_blocking(move || link(Path::new(&file), &to, part, &source));
            linked.await.map_err(|error| StepError::Later(error.to_string()))?.map_err(final_error)?;
        }
    }
    Ok(path)
}

fn final_error(error: DownloadError) -> StepError {
    StepError::Final(error.to_string())
}

/// Downloads, and tells the task how far it is.
async fn get(member: &Arc<Member>, download: &Download, task: Option<TaskId>) -> Result<(), StepError> {
    let (tell, mut told) = tokio::sync::watch::channel((0, None));
    let reporter = async {
        let mut last: Option<Instant> = None;
        while told.changed().await.is_ok() {
            let (there, total): (u64, Option<u64>) = *told.borrow_and_update();
            let Some(task) = task.filter(|_| last.is_none_or(|last| last.elapsed() > TELL_EVERY)) else {
                continue;
            };
            last = Some(Instant::now());
            let share = total.map_or(0, |total| there.saturating_mul(SHARE_PERMILLE) / total.max(1));
            let permille = u16::try_from(share).unwrap_or(0);
            let message = match total {
                Some(total) => format!("downloads: {} of {} MiB", there >> 20, total >> 20),
                None => format!("downloads: {} MiB", there >> 20),
            };
            // The next one tells again.
            let _ = commit(member, Op::UpdateTask { task, permille, message }).await;
        }
    };
    let fetched = async {
        // Dropped at the end, which ends the reporter.
        let tell = tell;
        download
            .run(|there, total| {
                tell.send_replace((there, total));
            })
            .await
    };
    let (fetched, ()) = tokio::join!(fetched, reporter);
    fetched.map(|_| ()).map_err(final_error)
}

/// Makes a file of the node the fetched part.
fn link(file: &Path, to: &Path, part: ImagePart, source: &ImageSource) -> Result<(), DownloadError> {
    download::check_sum(file, source.sha256)?;
    files::remove_if_there(to)?;
    match part {
        ImagePart::Disk => {
            std::os::unix::fs::symlink(file, to)?;
            Ok(())
        }
        // They are moved to their place.
        ImagePart::Kernel | ImagePart::Initramfs => {
            fs::copy(file, to)?;
            Ok(())
        }
    }
}

/// BLAKE3 of a boot file: its name. Disks have none.
async fn digest(path: &Path, part: ImagePart) -> Result<ContentHash, StepError> {
    if part == ImagePart::Disk {
        return Ok(ContentHash([0; 32]));
    }
    let path = path.to_owned();
    let digest = tokio::task::spawn_blocking(move || {
        let mut hasher = blake3::Hasher::new();
        io::copy(&mut fs::File::open(path)?.take(limit(part)), &mut hasher)?;
        Ok::<_, io::Error>(ContentHash(*hasher.finalize().as_bytes()))
    });
    let digest = digest.await.map_err(io::Error::other).and_then(|digest| digest);
    digest.map_err(|error| StepError::Later(error.to_string()))
}
