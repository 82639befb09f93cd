//! A root directory of its own: an empty one, in which the files that the process needs are where they were.
//!
//! It is a small read-only tmpfs, and each thing in it is a bind mount with flags of its own, so a path means the same inside and
//! outside. With it go a network without any interface and System V IPC and host name of its own. Only root can make it.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, SFlag, mknod},
    unistd::{chdir, chown, chroot, pivot_root},
};

use super::identity::Identity;

/// What the new root holds beside mounts: directories and empty files.
const SIZE: &str = "size=256k,mode=0755";
/// What no mount allows.
const NEVER: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC);

/// How something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// A file or directory that can only be read. (Sockets in it can be connected to.)
    ReadOnly,
    /// A directory that can be written to.
    Writable,
    /// A device, which belongs to the process's user.
    Device,
}

/// Namespaces other than that of mounts, which [`enter`] makes.
pub fn alone() -> CloneFlags {
    CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS
}

/// Enters new namespaces and a new root, mounted on the empty directory `at`, that holds these paths and nothing else.
pub fn enter(at: &Path, kept: &[(PathBuf, Kept)], owner: &Identity) -> io::Result<()> {
    unshare(alone() | CloneFlags::CLONE_NEWCGROUP)?;
    let nothing = None::<&Path>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
    mount(Some("none"), at, Some("tmpfs"), NEVER, Some(SIZE))?;
    for (path, kind) in kept {
        keep(at, path, *kind, owner).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot keep {}: {error}", path.display()))
        })?;
    }
    chdir(at)?;
    match pivot_root(".", ".") {
        // The old root is on top now.
        Ok(()) => umount2(".", MntFlags::MNT_DETACH)?,
        // The root of a machine that runs from its initramfs cannot be moved away. It is covered; without capabilities nobody gets under it.
        Err(Errno::EINVAL) => {
            mount(Some("."), "/", nothing, MsFlags::MS_MOVE, nothing)?;
            chroot(".")?;
        }
        Err(error) => return Err(error.into()),
    }
    chdir("/")?;
    remount("/", MsFlags::MS_RDONLY)
}

fn keep(at: &Path, path: &Path, kind: Kept, owner: &Identity) -> io::Result<()> {
    let inside = at.join(path.strip_prefix("/").map_err(io::Error::other)?);
    let parent = inside.parent().ok_or(io::ErrorKind::InvalidInput)?;
    if !parent.exists() {
        fs::create_dir_all(parent)?;
    }
    let meta = fs::metadata(path)?;
    match kind {
        Kept::Device => {
            if !meta.file_type().is_char_device() {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "is no character device"));
            }
            mknod(&inside, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, meta.rdev())?;
            chown(&inside, Some(owner.user), Some(owner.group))?;
            return Ok(());
        }
        _ if meta.is_dir() => fs::create_dir_all(&inside)?,
        _ if inside.exists() => {}
        _ => drop(fs::File::create(&inside)?),
    }
    let nothing = None::<&Path>;
    mount(Some(path), &inside, nothing, MsFlags::MS_BIND, nothing)?;
    let read_only = if kind == Kept::ReadOnly { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    remount(&inside, read_only | MsFlags::MS_NODEV)
}

fn remount(path: impl AsRef<Path>, flags: MsFlags) -> io::Result<()> {
    let nothing = None::<&Path>;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | NEVER | flags;
    Ok(mount(nothing, path.as_ref(), nothing, flags, nothing)?)
}

/// Makes the empty directory that a root is mounted on.
pub fn make_place(at: &Path) -> io::Result<()> {
    match fs::create_dir(at) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => fs::set_permissions(at, fs::Permissions::from_mode(0o700)),
    }
}
