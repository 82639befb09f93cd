//! Where parts of images are kept on the node that takes them in, until they are in.
//!
//! | file | it is |
//! |---|---|
//! | `IMAGE.PART` | a verified part; a link when it is a file of the node |
//! | `IMAGE.PART.progress` | how far a disk is written to its volume and flushed |
//! | `IMAGE.PART.upload` | an upload that may be continued |
//! | `IMAGE.PART.fetch`, `….fetch.source` | a download, and of what |
//! | `upload-UUID` | an upload that is not continued |
//!
//! A file belongs to whoever made it; it takes its final name in one step, and only if nobody has it.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::{
    files,
    images::download,
    paths::NodePaths,
    state::{BLOCK_BYTES, ClusterState, ImageId, ImagePart, NodeId, PartState},
};

/// What nobody wants is kept for so long: a change of the state may still be on its way here.
const UNWANTED: Duration = Duration::from_secs(600);
/// An upload may be continued for so long.
const CONTINUABLE: Duration = Duration::from_secs(24 * 3600);

/// The spool of a node.
#[derive(Clone, Debug)]
pub(super) struct Spool {
    dir: PathBuf,
}

impl Spool {
    pub(super) fn new(paths: &NodePaths) -> Self {
        Self { dir: paths.state().join("spool") }
    }

    /// The directory, made if it is not there. People's disks are in it: nobody else looks in.
    pub(super) fn ready(&self) -> io::Result<&Path> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        Ok(&self.dir)
    }

    fn named(&self, image: ImageId, part: ImagePart, suffix: &str) -> PathBuf {
        self.dir.join(format!("{image}.{}{suffix}", part.name()))
    }

    /// A verified part.
    pub(super) fn part(&self, image: ImageId, part: ImagePart) -> PathBuf {
        self.named(image, part, "")
    }

    /// An upload that may be continued.
    pub(super) fn upload(&self, image: ImageId, part: ImagePart) -> PathBuf {
        self.named(image, part, ".upload")
    }

    /// A download.
    pub(super) fn fetch(&self, image: ImageId, part: ImagePart) -> PathBuf {
        self.named(image, part, ".fetch")
    }

    /// An upload that is not continued.
    pub(super) fn once(&self) -> PathBuf {
        self.dir.join(format!("upload-{}", uuid::Uuid::new_v4()))
    }

    /// Gives a verified part its name; answers false if there is one.
    pub(super) fn keep(&self, from: &Path, image: ImageId, part: ImagePart) -> io::Result<bool> {
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        let to = self.part(image, part);
        match renameat2(AT_FDCWD, from, AT_FDCWD, &to, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => Ok(true),
            Err(nix::errno::Errno::EEXIST) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn progress(&self, image: ImageId, part: ImagePart) -> PathBuf {
        self.named(image, part, ".progress")
    }

    /// How far a disk is written and flushed.
    pub(super) fn flushed(&self, image: ImageId, part: ImagePart) -> u64 {
        let text = fs::read_to_string(self.progress(image, part)).unwrap_or_default();
        // What is no offset of a block was not written by us: from the start.
        text.trim().parse().ok().filter(|offset: &u64| offset.is_multiple_of(BLOCK_BYTES)).unwrap_or(0)
    }

    /// Notes how far a disk is written and flushed.
    pub(super) fn set_flushed(&self, image: ImageId, part: ImagePart, offset: u64) -> io::Result<()> {
        let path = self.progress(image, part);
        files::replace(&path, offset.to_string().as_bytes(), 0o600, files::Durability::Durable)
    }

    /// Removes everything of a part: it is in, or will not come in.
    pub(super) fn clear(&self, image: ImageId, part: ImagePart) {
        let fetch = self.fetch(image, part);
        for path in [self.part(image, part), self.progress(image, part), download::origin_file(&fetch), fetch]
        {
            // What stays is swept later.
            let _ = files::remove_if_there(&path);
        }
    }

    /// Removes uploads that a restart has cut off and nobody can continue.
    pub(super) fn sweep_at_start(&self) {
        self.remove_where(|name, _| name.starts_with("upload-"));
    }

    /// Removes what nobody wants any more.
    pub(super) fn sweep(&self, state: &ClusterState, me: NodeId) {
        let wanted = |name: &str| {
            state.images.values().find_map(|image| {
                let rest = name.strip_prefix(&image.id.to_string())?.strip_prefix('.')?;
                let word = rest.split('.').next()?;
                image.parts.iter().find(|(part, _)| part.name() == word).map(|(_, state)| state)
            })
        };
        self.remove_where(|name, age| {
            let patience = match wanted(name) {
                Some(PartState::Importing { node, .. } | PartState::Fetching { node, .. }) if *node == me => {
                    return false;
                }
                // It is in; a boot file that was on the node already is in at once.
                Some(PartState::File(_) | PartState::Volume(_)) => Duration::ZERO,
                Some(PartState::Awaiting) if name.ends_with(".upload") => CONTINUABLE,
                _ if name.starts_with("upload-") => CONTINUABLE,
                _ => UNWANTED,
            };
            age >= patience
        });
    }

    fn remove_where(&self, is_meant: impl Fn(&str, Duration) -> bool) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            // The last change of its name or content.
            let changed = Duration::from_secs(u64::try_from(metadata.ctime()).unwrap_or(0));
            if is_meant(&entry.file_name().to_string_lossy(), now.saturating_sub(changed)) {
                // What stays only takes space.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_kept_once_and_goes_with_all_that_belongs_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool { dir: dir.path().join("spool") };
        spool.ready().unwrap();
        let (image, part) = (ImageId::random(), ImagePart::Disk);
        for content in ["first", "second"] {
            let once = spool.once();
            fs::write(&once, content).unwrap();
            assert_eq!(spool.keep(&once, image, part).unwrap(), content == "first");
        }
        assert_eq!(fs::read(spool.part(image, part)).unwrap(), b"first");
        assert_eq!(spool.flushed(image, part), 0);
        spool.set_flushed(image, part, 8192).unwrap();
        assert_eq!(spool.flushed(image, part), 8192);
        fs::write(spool.progress(image, part), "17").unwrap();
        assert_eq!(spool.flushed(image, part), 0);
        spool.clear(image, part);
        spool.sweep_at_start();
        assert_eq!(fs::read_dir(&spool.dir).unwrap().count(), 0);
    }

    #[test]
    fn only_what_is_old_and_unwanted_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool { dir: dir.path().to_owned() };
        fs::write(spool.upload(ImageId::random(), ImagePart::Disk), "").unwrap();
        spool.sweep(&ClusterState::default(), NodeId::random());
        assert_eq!(fs::read_dir(&spool.dir).unwrap().count(), 1, "it came a moment ago");
    }
}
