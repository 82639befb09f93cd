//! Kernels and initramfs on this node: files named by the hash of their content.
//!
//! Every node holds those of all images, so a VM can be started on any node whichever other one is down, and starting
//! one waits for no transfer. A file is complete when it has its name: it is written under another one, checked
//! against its hash, made durable and renamed.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::io::AsyncWriteExt;

use super::{cluster::Cluster, peers};
use crate::{
    files::remove_if_there,
    paths::NodePaths,
    state::{BootFile, ContentHash, NodeId},
};

/// How much is asked for at a time.
const PIECE: u32 = 4 << 20;
/// A file that no image has is kept this long: an upload may be about to name it.
const KEEP_UNNAMED: Duration = Duration::from_secs(3600);

/// Why a file did not come.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No node gave it.
    #[error("no node could give {file}: {last}")]
    Nowhere {
        /// Which file.
        file: ContentHash,
        /// What the last one asked said.
        last: String,
    },
    /// It cannot be stored here.
    #[error("cannot store {file}")]
    Store {
        /// Which file.
        file: ContentHash,
        /// What the system said.
        source: io::Error,
    },
}

/// The files that are complete here.
pub fn held(paths: &NodePaths) -> io::Result<BTreeSet<ContentHash>> {
    let entries = match fs::read_dir(paths.boot_files()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(error),
    };
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// A piece of a file that is complete here; none when it is not here.
pub fn read(paths: &NodePaths, file: ContentHash, offset: u64, length: u32) -> io::Result<Option<Bytes>> {
    let mut open = match fs::File::open(paths.boot_file(file)) {
        Ok(open) => open,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    open.seek(SeekFrom::Start(offset))?;
    let mut piece = Vec::new();
    open.take(u64::from(length.min(PIECE))).read_to_end(&mut piece)?;
    Ok(Some(piece.into()))
}

/// Removes a file that no image has, unless it is new.
pub fn remove(paths: &NodePaths, file: ContentHash) -> io::Result<()> {
    let path = paths.boot_file(file);
    let written = match fs::metadata(&path) {
        Ok(meta) => meta.modified()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let old = SystemTime::now().duration_since(written).is_ok_and(|age| age > KEEP_UNNAMED);
    if old { remove_if_there(&path) } else { Ok(()) }
}

/// Gets a file from the first of these nodes that gives it whole and right.
pub async fn fetch(
    cluster: &dyn Cluster,
    paths: &NodePaths,
    file: BootFile,
    from: &[NodeId],
) -> Result<(), FetchError> {
    let store = |source| FetchError::Store { file: file.hash, source };
    let directory = paths.boot_files();
    fs::create_dir_all(&directory).map_err(store)?;
    let incoming = directory.join(format!(".{}.incoming", file.hash));
    let mut last = "no other node is there".to_owned();
    for node in from {
        match fetch_from(cluster, &incoming, file, *node).await {
            Ok(()) => return publish(&directory, &incoming, &paths.boot_file(file.hash)).map_err(store),
            Err(error) => last = format!("node {node}: {error}"),
        }
    }
    // Best effort: the next attempt overwrites it.
    let _ = fs::remove_file(&incoming);
    Err(FetchError::Nowhere { file: file.hash, last })
}

async fn fetch_from(
    cluster: &dyn Cluster,
    incoming: &Path,
    file: BootFile,
    node: NodeId,
) -> Result<(), String> {
    let text = |error: io::Error| error.to_string();
    let options = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(incoming);
    let mut out = tokio::fs::File::from_std(options.map_err(text)?);
    let mut hasher = blake3::Hasher::new();
    let mut offset = 0;
    while offset < file.size_bytes {
        let call = peers::ReadBootFile { file: file.hash, offset, length: PIECE };
        let piece =
            peers::call(cluster, node, &call, Bytes::new()).await.map_err(|error| error.to_string())?.1;
        if piece.is_empty() {
            return Err(format!("the file ends after {offset} of {} bytes", file.size_bytes));
        }
        hasher.update(&piece);
        out.write_all(&piece).await.map_err(text)?;
        offset += piece.len() as u64;
    }
    out.sync_all().await.map_err(text)?;
    if offset != file.size_bytes || *hasher.finalize().as_bytes() != file.hash.0 {
        return Err("what came is not what was asked for".to_owned());
    }
    Ok(())
}

fn publish(directory: &Path, incoming: &Path, path: &Path) -> io::Result<()> {
    fs::set_permissions(incoming, fs::Permissions::from_mode(0o644))?;
    fs::rename(incoming, path)?;
    fs::File::open(directory)?.sync_all()
}
