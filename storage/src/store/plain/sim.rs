//! A simulated disk for crash tests: files in memory behind a volatile cache.
//!
//! What was written and not synced is, after a power cut, kept or lost sector by sector, as the seed says; directory changes
//! that were not synced survive as a prefix of their order, directory by directory. Errors and a lack of room can be set.

use super::media::{Media, MediaFile, OpenMode, Space};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const SECTOR: usize = 512;

/// Changes of the content of a file.
#[derive(Clone)]
enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Truncate(usize),
}

#[derive(Clone, Default)]
struct Inode {
    /// What a reader sees.
    cached: Vec<u8>,
    /// What is on the medium.
    durable: Vec<u8>,
    /// What lies between.
    pending: Vec<Change>,
}

fn apply(content: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Truncate(len) => content.resize(*len, 0),
        Change::Write { offset, bytes } => {
            if content.len() < offset + bytes.len() {
                content.resize(offset + bytes.len(), 0);
            }
            content[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Node {
    Dir,
    File(usize),
}

type Tree = BTreeMap<PathBuf, Node>;

/// A change of a directory.
#[derive(Clone)]
enum Entry {
    Add(PathBuf, Node),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

impl Entry {
    fn in_dir(&self, dir: &Path) -> bool {
        match self {
            Self::Add(path, _) | Self::Remove(path) => path.parent() == Some(dir),
            Self::Rename(from, to) => from.parent() == Some(dir) || to.parent() == Some(dir),
        }
    }

    fn apply(&self, tree: &mut Tree) {
        match self {
            Self::Add(path, node) => drop(tree.insert(path.clone(), *node)),
            Self::Remove(path) => tree.retain(|p, _| !p.starts_with(path)),
            Self::Rename(from, to) => {
                let moved: Vec<_> =
                    tree.iter().filter(|(p, _)| p.starts_with(from)).map(|(p, n)| (p.clone(), *n)).collect();
                for (path, node) in moved {
                    tree.remove(&path);
                    let rest = path.strip_prefix(from).unwrap();
                    tree.insert(if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) }, node);
                }
            }
        }
    }
}

/// What a disk may be told to fail at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fault {
    /// Every read is an I/O error.
    Read,
    /// Every write is an I/O error.
    Write,
    /// Every sync is an I/O error, which drops what was to be synced.
    Sync,
}

struct Disk {
    inodes: Vec<Inode>,
    tree: Tree,
    durable_tree: Tree,
    entries: Vec<Entry>,
    capacity: u64,
    fault: Option<Fault>,
    /// Operations until the power fails.
    fuse: Option<u64>,
    dead: bool,
}

/// See the module. Clones are the same disk.
#[derive(Clone)]
pub(super) struct SimMedia(Arc<Mutex<Disk>>);

impl SimMedia {
    pub(super) fn new(capacity: u64) -> Self {
        let root = Tree::from([(PathBuf::new(), Node::Dir)]);
        Self(Arc::new(Mutex::new(Disk {
            inodes: Vec::new(),
            tree: root.clone(),
            durable_tree: root,
            entries: Vec::new(),
            capacity,
            fault: None,
            fuse: None,
            dead: false,
        })))
    }

    /// Lets the power fail after some more changes.
    pub(super) fn set_fuse(&self, operations: u64) {
        self.0.lock().fuse = Some(operations);
    }

    pub(super) fn set_fault(&self, fault: Option<Fault>) {
        self.0.lock().fault = fault;
    }

    pub(super) fn set_capacity(&self, capacity: u64) {
        self.0.lock().capacity = capacity;
    }

    /// Damages one byte on the medium.
    pub(super) fn damage(&self, path: &Path, offset: usize) {
        let mut disk = self.0.lock();
        let Some(Node::File(inode)) = disk.tree.get(path).copied() else { panic!("no file {path:?}") };
        disk.inodes[inode].cached[offset] ^= 1;
    }

    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.0.lock().tree.keys().cloned().collect()
    }

    /// The disk as it is after the power came back.
    pub(super) fn power_cut(&self, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let disk = self.0.lock();
        let mut inodes = disk.inodes.clone();
        for inode in &mut inodes {
            let keep = rng.random_range(0.0..1.0);
            for change in std::mem::take(&mut inode.pending) {
                match &change {
                    Change::Truncate(_) if rng.random_bool(keep) => apply(&mut inode.durable, &change),
                    Change::Truncate(_) => {}
                    Change::Write { offset, bytes } => {
                        let mut at = 0;
                        while at < bytes.len() {
                            let end = bytes.len().min(at + SECTOR - (offset + at) % SECTOR);
                            if rng.random_bool(keep) {
                                let part =
                                    Change::Write { offset: offset + at, bytes: bytes[at..end].to_vec() };
                                apply(&mut inode.durable, &part);
                            }
                            at = end;
                        }
                    }
                }
            }
            inode.cached = inode.durable.clone();
        }
        let mut tree = disk.durable_tree.clone();
        let mut stopped: Vec<PathBuf> = Vec::new();
        for entry in &disk.entries {
            let dirs: Vec<PathBuf> =
                disk.tree.keys().chain(tree.keys()).filter(|d| entry.in_dir(d)).cloned().collect();
            if dirs.iter().any(|dir| stopped.contains(dir)) || rng.random_bool(0.5) {
                stopped.extend(dirs);
            } else {
                entry.apply(&mut tree);
            }
        }
        let known = tree.clone();
        tree.retain(|path, _| path.ancestors().skip(1).all(|dir| known.contains_key(dir)));
        Self(Arc::new(Mutex::new(Disk {
            inodes,
            tree: tree.clone(),
            durable_tree: tree,
            entries: Vec::new(),
            capacity: disk.capacity,
            fault: None,
            fuse: None,
            dead: false,
        })))
    }
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::EIO)
}

impl Disk {
    /// Counts down to the power cut.
    fn change(&mut self) -> io::Result<()> {
        if let Some(fuse) = &mut self.fuse {
            self.dead |= *fuse == 0;
            *fuse = fuse.saturating_sub(1);
        }
        if self.dead { Err(eio()) } else { Ok(()) }
    }

    fn used(&self) -> u64 {
        let live = self.tree.values().filter_map(|node| match node {
            Node::File(inode) => Some(*inode),
            Node::Dir => None,
        });
        let blocks =
            |content: &[u8]| content.chunks(4096).filter(|c| c.iter().any(|b| *b != 0)).count() as u64;
        live.map(|inode| blocks(&self.inodes[inode].cached) * 4096).sum()
    }

    fn entry(&mut self, entry: Entry) {
        entry.apply(&mut self.tree);
        self.entries.push(entry);
    }

    fn parent_exists(&self, path: &Path) -> io::Result<()> {
        match path.parent().and_then(|dir| self.tree.get(dir)) {
            Some(Node::Dir) => Ok(()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

impl Media for SimMedia {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn MediaFile>> {
        let mut disk = self.0.lock();
        let inode = match disk.tree.get(path) {
            Some(Node::File(inode)) => *inode,
            Some(Node::Dir) => return Err(io::ErrorKind::IsADirectory.into()),
            None if mode == OpenMode::Existing => return Err(io::ErrorKind::NotFound.into()),
            None => {
                disk.change()?;
                disk.parent_exists(path)?;
                disk.inodes.push(Inode::default());
                let inode = disk.inodes.len() - 1;
                disk.entry(Entry::Add(path.to_owned(), Node::File(inode)));
                inode
            }
        };
        Ok(Arc::new(SimFile { media: self.clone(), inode }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.0.lock();
        if disk.tree.contains_key(path) {
            return Ok(());
        }
        disk.change()?;
        disk.parent_exists(path)?;
        disk.entry(Entry::Add(path.to_owned(), Node::Dir));
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let disk = self.0.lock();
        let children = disk.tree.keys().filter(|path| path.parent() == Some(dir));
        Ok(children.filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.0.lock();
        if !disk.tree.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        disk.change()?;
        disk.parent_exists(to)?;
        disk.entry(Entry::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.0.lock();
        if !disk.tree.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        disk.change()?;
        disk.entry(Entry::Remove(path.to_owned()));
        Ok(())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut disk = self.0.lock();
        disk.change()?;
        if disk.fault == Some(Fault::Sync) {
            return Err(eio());
        }
        let (synced, rest) = std::mem::take(&mut disk.entries).into_iter().partition(|e| e.in_dir(dir));
        let synced: Vec<Entry> = synced;
        for entry in synced {
            entry.apply(&mut disk.durable_tree);
        }
        disk.entries = rest;
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        let disk = self.0.lock();
        if disk.dead {
            return Err(eio());
        }
        Ok(Space { total: disk.capacity, available: disk.capacity.saturating_sub(disk.used()) })
    }
}

struct SimFile {
    media: SimMedia,
    inode: usize,
}

impl SimFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut disk = self.media.0.lock();
        // A write that the power cut interrupts may be there in part.
        let result = disk.change();
        if disk.fault == Some(Fault::Write) {
            return Err(eio());
        }
        // Zeroes are holes here.
        if let Change::Write { bytes, .. } = &change
            && bytes.iter().any(|b| *b != 0)
            && disk.used() + bytes.len() as u64 > disk.capacity
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let inode = &mut disk.inodes[self.inode];
        apply(&mut inode.cached, &change);
        inode.pending.push(change);
        result
    }
}

impl MediaFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let disk = self.media.0.lock();
        if disk.dead || disk.fault == Some(Fault::Read) {
            return Err(eio());
        }
        let content = &disk.inodes[self.inode].cached;
        let from = content.len().min(offset as usize);
        let n = buf.len().min(content.len() - from);
        buf[..n].copy_from_slice(&content[from..from + n]);
        Ok(n)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(Change::Write { offset: offset as usize, bytes: buf.to_vec() })
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.media.0.lock();
        disk.change()?;
        let fault = disk.fault;
        let inode = &mut disk.inodes[self.inode];
        let pending = std::mem::take(&mut inode.pending);
        if fault == Some(Fault::Sync) {
            // As kernels do: the pages are clean now, and not on the disk.
            return Err(eio());
        }
        pending.iter().for_each(|change| apply(&mut inode.durable, change));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.media.0.lock().inodes[self.inode].cached.len() as u64)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.change(Change::Truncate(len as usize))
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = self.len()?;
        let len = len.min(end.saturating_sub(offset));
        if len == 0 {
            return Ok(());
        }
        self.change(Change::Write { offset: offset as usize, bytes: vec![0; len as usize] })
    }
}
