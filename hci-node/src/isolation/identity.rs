//! Who the process is, and what that is worth: users, groups, capabilities, inherited descriptors, resource limits.

use std::io;

use nix::{
    sys::{
        prctl,
        resource::{Resource, setrlimit},
    },
    unistd::{Gid, Uid, setgroups, setresgid, setresuid, setuid},
};

/// A user without an entry in the user database that may be used by nobody else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub user: Uid,
    /// Its group.
    pub group: Gid,
    /// Other groups: what they may use, it may.
    pub groups: Vec<Gid>,
}

/// Closes what was inherited beside the standard descriptors. To be called before anything is opened.
pub fn close_inherited() -> io::Result<()> {
    // SAFETY: the process has just started; nothing in it owns a descriptor above 2.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives up root, or what makes root more than any other user, for good.
pub fn give_up_root(identity: &Identity) -> io::Result<()> {
    let Identity { user, group, groups } = identity;
    // As long as it is privileged to do so.
    empty_bounding_set()?;
    setgroups(groups)?;
    setresgid(*group, *group, *group)?;
    setresuid(*user, *user, *user)?;
    if !user.is_root() && setuid(Uid::from_raw(0)).is_ok() {
        return Err(io::Error::other("the process could become root again"));
    }
    drop_capabilities()
}

/// Programs that are started get no capabilities back.
fn empty_bounding_set() -> io::Result<()> {
    for capability in 0..MAX_CAPABILITIES {
        // SAFETY: plain numbers.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        let error = io::Error::last_os_error();
        match (dropped, error.raw_os_error()) {
            (0, _) => {}
            // That was the last one that the kernel knows.
            (_, Some(libc::EINVAL)) => break,
            _ => return Err(error),
        }
    }
    Ok(())
}

/// More than there are.
const MAX_CAPABILITIES: libc::c_ulong = 64;

/// The first argument of `capset(2)`.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

/// The version in which there are two words for each set.
const CAP_VERSION_3: u32 = 0x2008_0522;

fn drop_capabilities() -> io::Result<()> {
    let header = CapHeader { version: CAP_VERSION_3, pid: 0 };
    let none = [[0u32; 3]; 2];
    // SAFETY: both are what capset of this version reads, and live through the call.
    match unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// No program that is started gets privileges, no core is written, nobody of the same user reads the memory.
pub fn no_new_privileges() -> io::Result<()> {
    prctl::set_no_new_privs()?;
    prctl::set_dumpable(false)?;
    Ok(())
}

/// Limits for good.
pub fn limit(limits: &[(Resource, u64)]) -> io::Result<()> {
    for (resource, limit) in limits {
        setrlimit(*resource, *limit, *limit)?;
    }
    Ok(())
}
