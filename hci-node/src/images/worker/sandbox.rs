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
//! - seccomp: the system calls listed in [`TABLE`]; any other one ends the process.
//!
//! Without root (a developer's test) the user stays and the namespaces are only tried. Everything else is the same.

use std::{fs, io};

use nix::{
    sched::{CloneFlags, unshare},
    sys::resource::Resource,
    unistd::{Gid, Uid},
};
use vmm::isolation::{Call, Denied, Only};

use crate::isolation::{
    files,
    identity::{self, Identity},
    root,
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
const EXECUTABLE: u64 = libc::PROT_EXEC.unsigned_abs() as u64;

/// What reading an image needs.
const TABLE: &[Call] = vmm::calls! {
    SYS_read: "the image";
    SYS_pread64: "the image";
    SYS_preadv: "the image";
    SYS_lseek: "where the image has data";
    SYS_fstat: "the image's length";
    SYS_statx: "the image's length";
    SYS_fcntl: "second owners of descriptors";
    SYS_write: "the pipe, standard error";
    SYS_writev: "the pipe, standard error";
    SYS_close: "the end";
    SYS_mmap [Only::Without(2, EXECUTABLE)]: "memory, never executable";
    SYS_mprotect [Only::Without(2, EXECUTABLE)]: "memory, never executable";
    SYS_munmap: "memory given back";
    SYS_mremap: "a buffer that grows";
    SYS_madvise: "memory given back";
    SYS_brk: "memory";
    SYS_futex: "locks";
    SYS_sched_yield: "locks under contention";
    SYS_clock_gettime: "time, where the kernel does not lend it";
    SYS_getrandom: "seeds of hash tables";
    SYS_rt_sigprocmask: "a panic";
    SYS_rt_sigreturn: "the end of a signal's handler";
    SYS_sigaltstack: "the end of a thread";
    SYS_exit: "the end";
    SYS_exit_group: "the end";
};

/// Gives everything up, for reading an image of this length.
pub(super) fn enter(length: u64) -> io::Result<()> {
    // The parent may be protected from the OOM killer, which we inherit. If this fails the limits are left.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    if Uid::effective().is_root() {
        unshare(root::alone())?;
        let (user, group) = (Uid::from_raw(USER), Gid::from_raw(USER));
        identity::give_up_root(&Identity { user, group, groups: vec![] })?;
    } else {
        // Not every kernel lets users do this; seccomp refuses sockets all the same.
        let _ = unshare(root::alone() | CloneFlags::CLONE_NEWUSER);
    }
    identity::no_new_privileges()?;
    // The allocator has reserved its arena by now, which the limit counts.
    let present = present_data()?;
    files::leave(&[])?;
    let seconds = CPU_BASE + length / CPU_BYTES;
    // The signal of the soft limit says what the end was for.
    nix::sys::resource::setrlimit(Resource::RLIMIT_CPU, seconds, seconds + 1)?;
    identity::limit(&[
        (Resource::RLIMIT_DATA, present + MEMORY),
        (Resource::RLIMIT_AS, ADDRESS_SPACE),
        (Resource::RLIMIT_FSIZE, 0),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_NPROC, 0),
        (Resource::RLIMIT_NOFILE, DESCRIPTORS),
    ])?;
    vmm::isolation::confine(TABLE, Denied::Kill)
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

#[cfg(test)]
mod tests {
    use std::{fs::File, net::UdpSocket, num::NonZeroUsize};

    use nix::{
        sys::mman::{MapFlags, ProtFlags, mmap_anonymous},
        unistd::setuid,
    };

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
            let map = |protection| {
                // SAFETY: a new mapping, of which nothing else knows and which is never used.
                let mapped =
                    unsafe { mmap_anonymous(None, NonZeroUsize::MIN, protection, MapFlags::MAP_PRIVATE) };
                mapped.map_err(io::Error::from).map(|_| ())
            };
            // The test has to live on: what would end the worker is refused here.
            vmm::isolation::confine(TABLE, Denied::Fail(libc::EPERM.unsigned_abs())).unwrap();
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
}
