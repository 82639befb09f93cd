//! What a VMM keeps, and that it gives up everything else before it makes its guest.
//!
//! A guest that takes its VMM over finds a process that
//! - runs as a user of its own, which no other VM has, without capabilities;
//! - sees a root directory with nothing but the VM's directory, the files that the guest boots from, the directories of its backends' sockets,
//!   and `/dev/kvm`; a network without any interface;
//! - may, in the VM's directory, make sockets and write to the firmware's variables: records, log and configuration belong to root, and what the
//!   node believes of a VMM it has not from files that the VMM could have written;
//! - has a bound on memory, CPU time and threads;
//! - asks the kernel for what [`vmm::isolation`] lists for its kind of thread.
//!
//! Started without root (a developer's machine), the user and the root directory stay; the rest is the same. Started by root without a
//! user to become (a test's machine), it stays root without capabilities.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::Context;
use nix::{
    sys::{
        resource::Resource,
        stat::{Mode, umask},
    },
    unistd::{Gid, Uid, User, chown, geteuid},
};
use vmm::{Boot, VmConfig};

use super::record::RunFile;
use crate::{
    isolation::{
        cgroup::{self, Limits},
        files::{self, Enforced, Use},
        identity::{self, Identity},
        root::{self, Kept},
    },
    paths::VmPaths,
    state::{Shape, VmId},
};

const KVM: &str = "/dev/kvm";
/// The first of the users that VMMs run as, and how many there are. systemd leaves them to containers, of which a node has none.
const USERS: (u32, u32) = (0x4000_0000, 1 << 28);
/// Memory of a VMM beside its guest's.
const OWN_MEMORY: u64 = 64 << 20;
/// Page tables, the guest's and the VMM's own, are less than one part in so many of the memory that they map.
const TABLES_PART: u64 = 128;
/// Threads beside those of vCPUs, disks and NICs: main, orders, console, display, watchdog, devices; and some that are about to end.
const OWN_THREADS: u64 = 20;
/// Descriptors: a few for each queue and interrupt.
const DESCRIPTORS: u64 = 16_384;

/// What the VM's size makes of the limits.
pub fn limits(config: &VmConfig) -> Limits {
    let memory_bytes = config.memory_bytes + config.plugged_bytes;
    limits_of(Shape { vcpus: config.vcpus, memory_bytes }, config.max_vcpus.unwrap_or(config.vcpus))
}

/// The limits of a machine of this size, which may get so many vCPUs.
pub fn limits_of(shape: Shape, most_vcpus: u8) -> Limits {
    Limits {
        memory: shape.memory_bytes + shape.memory_bytes / TABLES_PART + OWN_MEMORY,
        // One more, for the threads that are none of vCPUs.
        cpus: u64::from(shape.vcpus) + 1,
        // Not raised later: a limit of the process itself, too.
        // Twice: a successor has as many for the moment in which there are both.
        threads: 2 * (u64::from(most_vcpus) + vmm::DEVICE_SLOTS.len() as u64 + OWN_THREADS),
    }
}

/// Who the VMM of a VM is. The group of the user of that name may connect to backends.
pub fn identity(vm: VmId, user: &User) -> Identity {
    let (first, count) = USERS;
    // The remainder fits.
    let own = first + (vm.0.as_u128() % u128::from(count)) as u32;
    Identity { user: Uid::from_raw(own), group: Gid::from_raw(own), groups: vec![user.gid] }
}

/// Gives up everything but what this VM needs, and leaves the last layer, the filter of system calls, to the caller. `user` is the name of whose group may connect to backends.
///
/// To be called by the process's only thread, and before the guest is there.
pub fn enter(paths: &VmPaths, run: &RunFile, user: Option<&str>) -> anyhow::Result<()> {
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    let config = &run.config;
    let limits = limits(config);
    if geteuid().is_root() {
        for (controller, error) in cgroup::join(Path::new(cgroup::TREE), &run.cgroup(), limits) {
            tracing::warn!(vm = %run.vm, controller, %error, "this host does not limit what a VMM uses of it");
        }
        let owner = match user {
            Some(name) => {
                let user = User::from_name(name)?.with_context(|| format!("there is no user {name}"))?;
                identity(run.vm, &user)
            }
            None => {
                tracing::warn!(vm = %run.vm, "there is no user for VMMs: this one stays root, without capabilities");
                Identity { user: Uid::from_raw(0), group: Gid::from_raw(0), groups: vec![] }
            }
        };
        give(paths, config, &owner).context("cannot give the VM's directory to its VMM")?;
        root::make_place(&paths.root()).context("cannot make a place for a root directory")?;
        root::enter(&paths.root(), &kept(paths, config), &owner)
            .context("cannot enter a root directory of its own")?;
        if !owner.user.is_root() {
            // Counts the threads of this user, so it is none for root.
            identity::limit(&[(Resource::RLIMIT_NPROC, limits.threads)]).context("cannot limit threads")?;
        }
        identity::give_up_root(&owner).context("cannot give up root")?;
    } else {
        make_variables(config).context("cannot make the store of the firmware's variables")?;
    }
    identity::limit(&[(Resource::RLIMIT_CORE, 0), (Resource::RLIMIT_NOFILE, descriptors()?)])
        .context("cannot limit descriptors")?;
    identity::no_new_privileges().context("cannot refuse new privileges")?;
    match files::leave(&uses(paths, config)).context("Landlock")? {
        Enforced::Fully => {}
        Enforced::Partly => tracing::info!(vm = %run.vm, "this kernel knows a part of the Landlock rules"),
        Enforced::Not => tracing::warn!(vm = %run.vm, "this kernel has no Landlock"),
    }
    Ok(())
}

/// The limit may be lowered only.
fn descriptors() -> io::Result<u64> {
    let (_, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(hard.min(DESCRIPTORS))
}

/// The VMM may make sockets in the VM's directory and remove its own; the sticky bit keeps it from the records of root.
fn give(paths: &VmPaths, config: &VmConfig, owner: &Identity) -> io::Result<()> {
    chown(paths.dir(), Some(Uid::from_raw(0)), Some(owner.group))?;
    fs::set_permissions(paths.dir(), Permissions::from_mode(0o1770))?;
    if let Some(variables) = make_variables(config)? {
        // Not what a link points to.
        std::os::unix::fs::lchown(variables, Some(owner.user.as_raw()), Some(owner.group.as_raw()))?;
    }
    Ok(())
}

/// Inside, files can be written to but not made.
fn make_variables(config: &VmConfig) -> io::Result<Option<&Path>> {
    let Boot::Firmware { variables, .. } = &config.boot else { return Ok(None) };
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(variables) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(Some(variables)),
    }
}

/// Files that the guest boots from.
fn boot_files(config: &VmConfig) -> Vec<&Path> {
    match &config.boot {
        Boot::Kernel { kernel, initramfs, .. } => {
            std::iter::once(kernel.as_path()).chain(initramfs.as_deref()).collect()
        }
        Boot::Firmware { code, template, .. } => vec![code, template],
    }
}

/// Directories in which backends make their sockets, anew whenever they are restarted.
fn socket_directories(config: &VmConfig) -> BTreeSet<&Path> {
    let disks = config.disks.iter().map(|disk| disk.socket.as_path());
    let nics = config.nics.iter().map(|nic| nic.socket.as_path());
    disks.chain(nics).filter_map(Path::parent).collect()
}

/// What the root directory holds.
fn kept(paths: &VmPaths, config: &VmConfig) -> Vec<(PathBuf, Kept)> {
    let mut kept = vec![(paths.dir().to_owned(), Kept::Writable)];
    // What is not there is missed, and named, when the guest is made.
    if Path::new(KVM).exists() {
        kept.push((PathBuf::from(KVM), Kept::Device));
    }
    let sockets = socket_directories(config);
    for path in sockets.into_iter().chain(boot_files(config)).chain(config.seed.as_deref()) {
        if !path.starts_with(paths.dir()) && path.exists() {
            kept.push((path.to_owned(), Kept::ReadOnly));
        }
    }
    kept
}

/// What may be done with it.
fn uses(paths: &VmPaths, config: &VmConfig) -> Vec<(PathBuf, Use)> {
    let mut uses = vec![(paths.dir().to_owned(), Use::Sockets), (PathBuf::from(KVM), Use::Device)];
    uses.extend(boot_files(config).into_iter().map(|path| (path.to_owned(), Use::Read)));
    uses.extend(config.seed.iter().map(|path| (path.clone(), Use::Read)));
    if let Boot::Firmware { variables, .. } = &config.boot {
        uses.push((variables.clone(), Use::Write));
    }
    uses
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(memory_bytes: u64) -> VmConfig {
        serde_json::from_value(serde_json::json!({
            "name": "web", "vcpus": 2, "memory_bytes": memory_bytes, "boot": { "kernel": { "kernel": "/k" } },
            "disks": [{ "id": "a", "socket": "/run/hci/blk/a/blk.sock" }], "console_socket": "/c"
        }))
        .unwrap()
    }

    #[test]
    fn limits_follow_the_size() {
        let small = limits(&config(1 << 30));
        assert_eq!((small.cpus, small.threads), (3, 88));
        assert_eq!(small.memory, (1 << 30) + (72 << 20));
        assert!(limits(&config(2 << 30)).memory - small.memory >= 1 << 30);
    }

    #[test]
    fn no_two_vms_are_the_same_user_nor_one_of_the_system() {
        let user = User::from_uid(Uid::from_raw(0)).unwrap().unwrap();
        let (one, other) = (identity(VmId::random(), &user), identity(VmId::random(), &user));
        assert_ne!(one.user, other.user);
        assert!(one.user.as_raw() >= 0x4000_0000 && one.user.as_raw() < 0x5000_0000);
    }

    #[test]
    fn nothing_but_the_vms_own_is_kept() {
        let paths = VmPaths::in_dir("/run/hci/vm/x");
        let kept: Vec<_> = kept(&paths, &config(1 << 30)).into_iter().map(|(path, _)| path).collect();
        let own = [Path::new("/run/hci/vm/x"), Path::new(KVM)];
        assert!(kept.iter().all(|path| own.contains(&path.as_path())), "{kept:?}");
        let uses = uses(&paths, &config(1 << 30));
        let written: Vec<_> = uses.iter().filter(|(_, usage)| *usage == Use::Write).collect();
        assert!(written.is_empty(), "{written:?}");
    }
}
