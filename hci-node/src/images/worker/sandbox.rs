//! What the worker gives up before it reads the first byte of an image.
//!
//! It keeps three things: to read the image, to write to the pipe, to use some memory and CPU time. One layer would do;
//! there are several so that a gap in one of them is not one of the sandbox:
//!
//! - descriptors: only the image, the pipe and standard error, and no room for another one;
//! - namespaces: a network without any interface, mounts, IPC and host name of its own;
//! - its own user without groups and capabilities, for good (`no_new_privs`);
//! - limits: memory, CPU time, no file may grow, no process may be started, no core is dumped;
//! - Landlock: no file, no TCP port, no abstract socket, as far as the kernel knows these;
//! - seccomp: the system calls listed in [`CALLS`]; any other one ends the process.
//!
//! Without root (a developer's test) the user stays and the namespaces are only tried. Everything else is the same.

use std::{collections::BTreeMap, fs, io};

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, Scope};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        resource::{Resource, setrlimit},
    },
    unistd::{Gid, Uid, setgroups, setresgid, setresuid, setuid},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// The worker's user. It owns nothing and has no entry in the user database.
const USER: u32 = 64_720;
/// What it may use beside what it has from its start: tables, one cluster, one grain.
const MEMORY: u64 = 512 << 20;
/// All mappings: the executable too, and what the allocator only reserves.
const ADDRESS_SPACE: u64 = 8 << 30;
/// CPU seconds for any image.
const CPU_BASE: u64 = 600;
/// And one more for so many bytes of the file.
const CPU_BYTES: u64 = 2 << 20;
/// Standard input, output and error, and the copies of two of them.
const DESCRIPTORS: u64 = 5;
/// The newest Landlock that we know; older kernels enforce what they know of it.
const LANDLOCK: ABI = ABI::V6;

/// What reading an image needs.
const CALLS: [i64; 23] = [
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_fcntl,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Closes what was inherited beside the standard descriptors. To be called before anything is opened.
pub(super) fn close_inherited() -> io::Result<()> {
    // SAFETY: the process has just started; nothing in it owns a descriptor above 2.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives everything up, for reading an image of this length.
pub(super) fn enter(length: u64) -> io::Result<()> {
    // The parent may be protected from the OOM killer, which we inherit. If this fails the limits are left.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    let alone = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    if Uid::effective().is_root() {
        unshare(alone)?;
        become_nobody()?;
    } else {
        // Not every kernel lets users do this; seccomp refuses sockets all the same.
        let _ = unshare(alone | CloneFlags::CLONE_NEWUSER);
    }
    prctl::set_no_new_privs()?;
    prctl::set_dumpable(false)?;
    // The allocator has reserved its arena by now, which the limit counts.
    let present = present_data()?;
    no_files()?;
    let seconds = CPU_BASE + length / CPU_BYTES;
    // The signal of the soft limit says what the end was for.
    setrlimit(Resource::RLIMIT_CPU, seconds, seconds + 1)?;
    for (resource, limit) in [
        (Resource::RLIMIT_DATA, present + MEMORY),
        (Resource::RLIMIT_AS, ADDRESS_SPACE),
        (Resource::RLIMIT_FSIZE, 0),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_NPROC, 0),
        (Resource::RLIMIT_NOFILE, DESCRIPTORS),
    ] {
        setrlimit(resource, limit, limit)?;
    }
    let filter = filter(SeccompAction::KillProcess).map_err(io::Error::other)?;
    seccompiler::apply_filter(&filter).map_err(io::Error::other)
}

/// Bytes of data and stack that are mapped now.
fn present_data() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/statm")?;
    let pages = text.split_whitespace().nth(5).and_then(|field| field.parse::<u64>().ok());
    let pages = pages.ok_or_else(|| io::Error::other("/proc/self/statm cannot be read"))?;
    let page =
        nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.and_then(|page| page.try_into().ok());
    Ok(pages * page.unwrap_or(4096))
}

fn become_nobody() -> io::Result<()> {
    let (user, group) = (Uid::from_raw(USER), Gid::from_raw(USER));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    if setuid(Uid::from_raw(0)).is_ok() {
        return Err(io::Error::other("the process could become root again"));
    }
    Ok(())
}

/// Landlock without any rule: what is handled is refused.
fn no_files() -> io::Result<()> {
    let closed = || {
        Ruleset::default()
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::from_all(LANDLOCK))?
            .create()?
            .restrict_self()
    };
    closed().map(|_| ()).map_err(io::Error::other)
}

/// Allows what reading an image needs; `otherwise` happens for the rest.
fn filter(otherwise: SeccompAction) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, vec![])).collect();
    // The protection is the third argument of both: never executable.
    let data_only = SeccompCondition::new(
        2,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(u64::from(libc::PROT_EXEC.unsigned_abs())),
        0,
    )?;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![SeccompRule::new(vec![data_only.clone()])?]);
    }
    let target = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, target)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::{fs::File, net::UdpSocket, num::NonZeroUsize, process::Command};

    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

    use super::*;

    /// Both layers hold for a thread, and what it starts; the rest of the test goes on as before.
    fn in_thread<T: Send + 'static>(inside: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(inside).join().unwrap()
    }

    fn denied<T>(outcome: io::Result<T>) -> bool {
        outcome.err().is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn only_reading_and_memory_are_left() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut file, b"image").unwrap();
        let (image, path) = (file.reopen().unwrap(), file.path().to_owned());
        let result = in_thread(move || {
            prctl::set_no_new_privs().unwrap();
            let map = |protection| {
                // SAFETY: a new mapping, of which nothing else knows and which is never used.
                let mapped =
                    unsafe { mmap_anonymous(None, NonZeroUsize::MIN, protection, MapFlags::MAP_PRIVATE) };
                mapped.map_err(io::Error::from).map(|_| ())
            };
            // The test has to live on: what would end the worker is refused here.
            let filter = filter(SeccompAction::Errno(libc::EPERM as u32)).unwrap();
            seccompiler::apply_filter(&filter).unwrap();
            let mut read = [0; 5];
            std::os::unix::fs::FileExt::read_exact_at(&image, &mut read, 0).unwrap();
            assert_eq!(&read, b"image");
            (
                map(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE).is_ok(),
                denied(map(ProtFlags::PROT_READ | ProtFlags::PROT_EXEC)),
                denied(File::open(&path)),
                denied(UdpSocket::bind("127.0.0.1:0")),
                denied(nix::sys::signal::kill(nix::unistd::Pid::this(), None).map_err(io::Error::from)),
                denied(setuid(Uid::effective()).map_err(io::Error::from)),
            )
        });
        assert_eq!(result, (true, true, true, true, true, true));
    }

    #[test]
    fn landlock_closes_files_by_itself() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (path, dir) = (file.path().to_owned(), file.path().with_file_name("never"));
        let result = in_thread(move || {
            no_files().unwrap();
            (
                denied(File::open(&path)),
                denied(fs::create_dir(&dir)),
                denied(fs::remove_file(&path)),
                denied(Command::new("/bin/true").status()),
            )
        });
        assert_eq!(result, (true, true, true, true));
        assert!(file.path().exists());
    }
}
