//! Parts that a client sends: `PUT /v1/images/NAME/PART`.
//!
//! An upload that gives its offset and whole length (`Upload-Offset`, `Upload-Length`) is kept when it breaks off; the
//! client asks how far it came and goes on from there. Without them it is taken whole or not at all.

use std::{
    fs,
    io::{self, Read, Seek, SeekFrom},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use nix::fcntl::{Flock, FlockArg};
use tokio::io::AsyncWriteExt;

use super::{Taken, invalid, limit, local, may_still_be, spool::Spool, take, told};
use crate::{
    api::{
        problem::{Problem, ProblemKind},
        requests::not_found,
        service::{self, ApiResponse},
        types::UploadOffset,
    },
    control::member::Member,
    files,
    images::{room, sha256::Sha256},
    state::{ContentHash, Image, ImagePart, PartState, Sha256Sum},
};

/// The longest silence of an uploading client.
const SILENCE: Duration = Duration::from_secs(60);
/// Room is looked for, and what came is synced, after this much.
const STEP: u64 = 64 << 20;

/// An upload, as announced.
#[derive(Clone, Debug)]
pub struct Upload {
    /// The image, by name or id.
    pub image: String,
    /// The part.
    pub part: ImagePart,
    /// The length of this body.
    pub length: Option<u64>,
    /// Which piece of which whole it is, if it may be continued.
    pub piece: Option<Piece>,
    /// BLAKE3 of the whole.
    pub hash: Option<ContentHash>,
    /// SHA-256 of the whole.
    pub sha256: Option<Sha256Sum>,
}

/// A piece of an upload that may be continued.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Where it starts.
    pub offset: u64,
    /// How long the whole is.
    pub total: u64,
}

/// The file that an upload goes to.
struct Target {
    file: Flock<fs::File>,
    path: PathBuf,
    /// Kept when the upload breaks off.
    continued: bool,
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.continued {
            // Swept at the next start if this fails. After it got its final name there is nothing of this name.
            let _ = files::remove_if_there(&self.path);
        }
    }
}

/// Both digests of what came.
#[derive(Default)]
struct Digests {
    blake3: blake3::Hasher,
    sha256: Sha256,
}

impl Digests {
    fn update(&mut self, bytes: &[u8]) {
        self.blake3.update(bytes);
        self.sha256.update(bytes);
    }
}

/// Takes an upload.
pub async fn upload<S, E>(member: &Arc<Member>, upload: Upload, body: S) -> Result<ApiResponse, Problem>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::fmt::Display,
{
    let image = awaited(member, &upload.image, upload.part).await?;
    let spool = Spool::new(&member.paths);
    let dir = spool.ready().map_err(|error| local("cannot spool the upload", &error))?;
    let total = upload.piece.map(|piece| piece.total).or(upload.length);
    let most = limit(upload.part);
    if total.is_some_and(|total| total > most) {
        return Err(too_large(upload.part));
    }
    let mut target = open(&spool, &image, &upload)?;
    let offset = upload.piece.map_or(0, |piece| piece.offset);
    room::check(dir, total.unwrap_or(0).saturating_sub(offset)).map_err(|error| no_room(&error))?;
    let digests = digests_of(&target, offset).await?;
    let (length, digests) = receive(&upload, &target, dir, offset, digests, body).await?;
    // Whatever is wrong with the whole would be wrong with it tomorrow.
    target.continued = false;
    let hash = ContentHash(*digests.blake3.finalize().as_bytes());
    let sha256 = Sha256Sum(digests.sha256.finish());
    if upload.hash.is_some_and(|expected| expected != hash) {
        return Err(invalid("the upload is corrupt: its BLAKE3 is not the one announced", "import again"));
    }
    if let Some(expected) = upload.sha256.filter(|expected| *expected != sha256) {
        let detail = format!("the SHA-256 of the upload is {sha256}, not {expected}");
        return Err(invalid(detail, "get the file again, then import it"));
    }
    if length == 0 {
        return Err(invalid("the upload is empty", "import a file with content"));
    }
    let taken = Taken { part: upload.part, path: target.path.clone(), length, hash };
    let op = take(member, &image, taken).await?;
    let asked = service::ask(member, op).await;
    match &asked {
        Ok(_) => told(member, image.id, upload.part, hash),
        Err(problem) if problem.is(ProblemKind::Conflict) || may_still_be(problem) => {}
        // Refused for certain: nobody will come back for it.
        Err(_) => spool.clear(image.id, upload.part),
    }
    asked
}

/// How much of an upload is here: `GET /v1/images/NAME/PART`.
pub async fn offset(member: &Arc<Member>, image: &str, part: ImagePart) -> Result<ApiResponse, Problem> {
    let image = awaited(member, image, part).await?;
    let path = Spool::new(&member.paths).upload(image.id, part);
    let offset = fs::metadata(path).map_or(0, |metadata| metadata.len());
    ApiResponse::json(200, &UploadOffset { offset })
}

/// The image, if it awaits this part.
pub(super) async fn awaited(member: &Member, name: &str, part: ImagePart) -> Result<Image, Problem> {
    let image = find_image(member, name).await?;
    match image.parts.get(&part) {
        Some(PartState::Awaiting) => Ok(image),
        Some(_) => Err(Problem::new(
            ProblemKind::Conflict,
            format!("image {} has its {} already, or gets it now", image.name, part.name()),
            format!("see it: hci image get {}", image.name),
        )),
        None => Err(invalid(
            format!("image {} was declared without a {}", image.name, part.name()),
            "delete the image and create it with this part",
        )),
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

fn too_large(part: ImagePart) -> Problem {
    let detail = format!("a {} has at most {} bytes", part.name(), limit(part));
    Problem::new(ProblemKind::TooLarge, detail, "use a smaller file")
}

fn no_room(error: &room::RoomError) -> Problem {
    let next = "free space on the node's system disk, or import through another node";
    Problem::new(ProblemKind::Capacity, error.to_string(), next)
}

fn open(spool: &Spool, image: &Image, upload: &Upload) -> Result<Target, Problem> {
    let cannot = |error: io::Error| local("cannot spool the upload", &error);
    let path = match upload.piece {
        Some(_) => spool.upload(image.id, upload.part),
        None => spool.once(),
    };
    let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let file = Flock::lock(file.map_err(cannot)?, FlockArg::LockExclusiveNonblock).map_err(|_| {
        Problem::new(
            ProblemKind::Conflict,
            format!("the {} of image {} is being uploaded by somebody else", upload.part.name(), image.name),
            "wait for that upload to end",
        )
    })?;
    let there = file.metadata().map_err(cannot)?.len();
    match upload.piece {
        Some(Piece { offset: 0, .. }) => file.set_len(0).map_err(cannot)?,
        Some(Piece { offset, .. }) if offset != there => {
            return Err(Problem::new(
                ProblemKind::Conflict,
                format!("the upload cannot go on at {offset}: {there} bytes are here"),
                format!("ask where to go on: hci api GET /v1/images/{}/{}", image.name, upload.part.name()),
            ));
        }
        _ => {}
    }
    Ok(Target { file, path, continued: upload.piece.is_some() })
}

/// A second descriptor of the file, at this offset.
fn at(target: &Target, offset: u64) -> io::Result<fs::File> {
    let mut file = fs::File::from(target.file.as_fd().try_clone_to_owned()?);
    file.seek(SeekFrom::Start(offset))?;
    Ok(file)
}

/// The digests of what is there already.
async fn digests_of(target: &Target, length: u64) -> Result<Digests, Problem> {
    let cannot = |error: io::Error| local("cannot go on with the upload", &error);
    let file = at(target, 0).map_err(cannot)?;
    let read = tokio::task::spawn_blocking(move || {
        let (mut file, mut buffer) = (file.take(length), vec![0; 1 << 20]);
        let mut digests = Digests::default();
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(digests),
                read => digests.update(&buffer[..read]),
            }
        }
    });
    read.await.map_err(io::Error::other).and_then(|read| read).map_err(cannot)
}

async fn receive<S, E>(
    upload: &Upload,
    target: &Target,
    dir: &Path,
    offset: u64,
    mut digests: Digests,
    mut body: S,
) -> Result<(u64, Digests), Problem>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::fmt::Display,
{
    let cannot = |error: io::Error| local("cannot spool the upload", &error);
    let mut file = tokio::fs::File::from_std(at(target, offset).map_err(cannot)?);
    let expected = upload.piece.map(|piece| piece.total).or(upload.length);
    let most = expected.unwrap_or(u64::MAX).min(limit(upload.part));
    let (mut length, mut step) = (offset, offset);
    let broke_off = loop {
        let piece = match tokio::time::timeout(SILENCE, body.next()).await {
            Err(_) => break Some("the upload stalled".to_owned()),
            Ok(None) => break None,
            Ok(Some(Err(error))) => break Some(format!("the upload broke off: {error}")),
            Ok(Some(Ok(piece))) => piece,
        };
        length += piece.len() as u64;
        if length > most {
            return Err(too_large(upload.part));
        }
        digests.update(&piece);
        file.write_all(&piece).await.map_err(cannot)?;
        if length - step >= STEP {
            step = length;
            file.sync_data().await.map_err(cannot)?;
            room::check(dir, STEP.min(most - length)).map_err(|error| no_room(&error))?;
        }
    };
    file.sync_all().await.map_err(cannot)?;
    let truncated = expected.filter(|expected| *expected != length);
    let broke_off = broke_off.or_else(|| {
        truncated.map(|expected| format!("the upload is truncated: {length} of {expected} bytes came"))
    });
    match broke_off {
        Some(detail) => Err(invalid(detail, "import again")),
        None => Ok((length, digests)),
    }
}
