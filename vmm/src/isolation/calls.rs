//! The tables: which system calls which kind of thread may make, and why.
//!
//! A line names a call, if need be what its arguments must be, and the reason. Of several lines with the same call one has to match.
//! The tables are groups by purpose; [`of`] says which groups a kind of thread gets.

use super::ThreadKind;

/// What an argument has to be for a call to be allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Only {
    /// This argument (from 0) has this value.
    Is(u8, u64),
    /// This argument has none of these bits.
    Without(u8, u64),
    /// Of these bits, this argument has exactly those: argument, bits, value.
    Masked(u8, u64, u64),
    /// This argument is the id of this process.
    OwnProcess(u8),
}

/// A line of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// Its name.
    pub name: &'static str,
    /// Conditions, all of which have to hold.
    pub only: &'static [Only],
    /// What it is needed for.
    pub why: &'static str,
}

/// Makes a table of lines `SYS_name [conditions]: "why";`.
#[macro_export]
macro_rules! calls {
    ($($call:ident $([$($only:expr),+])? : $why:literal;)*) => {
        &[$($crate::isolation::Call {
            number: ::libc::$call,
            name: stringify!($call),
            only: &[$($($only),+)?],
            why: $why,
        }),*]
    };
}

use Only::{Is, Masked, OwnProcess, Without};

const EXECUTABLE: u64 = libc::PROT_EXEC.unsigned_abs() as u64;
/// How the C library starts a thread, and no process.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID)
    .unsigned_abs() as u64;
/// The byte that all requests to KVM have in common.
const KVM: u64 = 0xae00;
/// The signal that kicks a vCPU out of its guest: the first that the C library leaves to programs.
const KICK: u64 = 34;
/// The signal by which the C library changes the user of all threads.
const SETXID: u64 = 33;
/// Makes a hole in a file, whose size stays.
const HOLE: u64 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).unsigned_abs() as u64;
const UNIX: u64 = libc::AF_UNIX.unsigned_abs() as u64;

/// Every thread: memory, locks, time, its end.
const COMMON: &[Call] = calls! {
    SYS_mmap [Without(2, EXECUTABLE)]: "memory, never executable";
    SYS_mprotect [Without(2, EXECUTABLE)]: "guard pages of stacks, memory of the allocator";
    SYS_munmap: "memory given back";
    SYS_mremap: "a buffer that grows";
    SYS_madvise: "memory given back by the allocator, a thread's stack at its end";
    SYS_brk: "memory for the C library";
    SYS_prctl [Is(0, libc::PR_SET_VMA as u64)]: "names that the allocator gives its memory";
    SYS_access: "how many NUMA nodes there are, for the allocator: once, in whichever thread comes first";
    SYS_getcpu: "on which of them the thread is, for the allocator";
    SYS_futex: "locks and waiting";
    SYS_sched_yield: "locks under contention";
    SYS_restart_syscall: "a wait goes on after a signal";
    SYS_clock_gettime: "time, where the kernel does not lend it";
    SYS_gettimeofday: "time, where the kernel does not lend it";
    SYS_clock_nanosleep: "pauses";
    SYS_nanosleep: "pauses";
    SYS_getrandom: "seeds of hash tables; what the guest's random number generator gives";
    SYS_read: "event descriptors and streams";
    SYS_write: "event descriptors, streams, the log";
    SYS_writev: "streams, the log";
    SYS_close: "descriptors given back";
    SYS_gettid: "who it is, for locks and panics";
    SYS_getpid: "who it is";
    SYS_rt_sigprocmask: "start and end of threads";
    SYS_rt_sigreturn: "the end of a signal's handler";
    SYS_sigaltstack: "the stack for signals, at start and end of a thread";
    SYS_exit: "the end of a thread";
    SYS_exit_group: "the end of the process";
};

/// Starting a thread, up to its filter. It inherits that of its starter.
const THREADS: &[Call] = calls! {
    SYS_clone [Is(0, THREAD)]: "a thread; processes have other flags";
    SYS_clone3: "its flags cannot be looked at: another filter says that there is no such call, and the C library takes clone";
    SYS_rt_sigaction [Is(0, SETXID)]: "the C library's own signal, at the first thread";
    SYS_set_robust_list: "locks of a thread that ends";
    SYS_rseq: "where the thread runs";
    SYS_sched_getaffinity: "the size of a new thread's stack";
    SYS_prctl [Is(0, libc::PR_SET_NAME as u64)]: "its name";
    SYS_prctl [Is(0, libc::PR_SET_NO_NEW_PRIVS as u64)]: "before its filter";
    SYS_seccomp [Is(0, 1), Is(1, 0)]: "its filter";
};

/// KVM. Only descriptors that the VMM has made answer to it.
const KVM_REQUESTS: &[Call] = calls! {
    SYS_ioctl [Masked(1, 0xff00, KVM)]: "running vCPUs, their state, memory slots, interrupts, kicks";
};

/// Waiting for several things at once.
const EVENTS: &[Call] = calls! {
    SYS_epoll_create1: "a set of descriptors to wait for";
    SYS_epoll_ctl: "what is in it";
    SYS_epoll_wait: "waiting for one of them";
    SYS_epoll_pwait: "waiting for one of them";
    SYS_eventfd2: "an event to wait for";
    SYS_dup: "a second owner of an event descriptor";
    SYS_fcntl: "a second owner of a stream; streams that do not wait";
    SYS_poll: "waiting for one stream";
    SYS_ppoll: "waiting for one stream";
};

/// Talking to who has connected.
const STREAMS: &[Call] = calls! {
    SYS_accept4: "a client of the console, of the display, of the guest agent's port, of the orders";
    SYS_ioctl [Is(1, libc::FIONBIO)]: "streams that do not wait";
    SYS_recvfrom: "what the other end says";
    SYS_sendto: "what it is told";
    SYS_recvmsg: "what the other end says, with descriptors";
    SYS_sendmsg: "what it is told, with descriptors";
    SYS_shutdown: "the end of a conversation";
    SYS_getsockopt: "why a connection failed";
    SYS_setsockopt: "deadlines";
};

/// Connecting to a backend, again and again, or to who listens for the guest.
const DIAL: &[Call] = calls! {
    SYS_socket [Is(0, UNIX)]: "a connection to a backend; one that the guest wants";
    SYS_connect: "a connection to a backend; one that the guest wants";
};

/// What firmware keeps, into a file that is open.
const VARIABLES: &[Call] = calls! {
    SYS_pwrite64: "a variable";
    SYS_fdatasync: "before the guest is told that it is stored";
};

/// Serving a socket.
const SERVE: &[Call] = calls! {
    SYS_socket [Is(0, UNIX)]: "a socket to be served";
    SYS_bind: "its place in the VM's directory";
    SYS_listen: "serving it";
    SYS_unlink: "one that an earlier run has left";
    SYS_chmod: "who may connect";
    SYS_getsockname: "its place";
};

/// Taking the place of another process.
const SUCCESSION: &[Call] = calls! {
    SYS_pread64: "whether the record of who runs the VM names this process";
};

/// Kicking vCPUs out of their guest.
const KICKS: &[Call] = calls! {
    SYS_tgkill [OwnProcess(0), Is(2, KICK)]: "a vCPU out of its guest";
};

/// Giving guest memory back to the node, in the file that is the guest's memory.
const HOLES: &[Call] = calls! {
    SYS_fallocate [Is(1, HOLE)]: "pages that the guest gives back; those of one that moves here which have become zeroes";
};

/// Making a machine, and the end of the process.
const MACHINES: &[Call] = calls! {
    SYS_openat: "KVM, kernel, firmware, its variables: Landlock and the private root leave no other files";
    SYS_open: "the same, from older libraries";
    SYS_fstat: "sizes of files";
    SYS_statx: "sizes of files, sockets that an earlier run has left";
    SYS_newfstatat: "the same, from older libraries";
    SYS_lseek: "reading kernels; which parts of the guest's memory hold anything, when it is saved";
    SYS_pread64: "reading kernels and variables";
    SYS_readv: "reading kernels";
    SYS_memfd_create: "the guest's memory; the record of what backends write to it";
    SYS_ftruncate: "the size of the guest's memory, of that record, of a new store of variables";
    SYS_socketpair: "how the runtime of the orders hears of signals";
    SYS_rt_sigaction [Is(0, KICK)]: "what a kick does: nothing";
    SYS_flock: "the VM's directory is free again";
    SYS_fsync: "records";
};

/// The groups of a kind of thread.
pub(super) fn of(kind: ThreadKind) -> Vec<Call> {
    let groups: &[&[Call]] = match kind {
        ThreadKind::Main => &[
            COMMON,
            THREADS,
            KVM_REQUESTS,
            EVENTS,
            STREAMS,
            DIAL,
            VARIABLES,
            SERVE,
            KICKS,
            HOLES,
            MACHINES,
            SUCCESSION,
        ],
        // It starts the devices' threads, which inherit its filter.
        ThreadKind::Vcpu => &[COMMON, THREADS, KVM_REQUESTS, EVENTS, STREAMS, VARIABLES, HOLES],
        ThreadKind::Device => &[COMMON, KVM_REQUESTS, EVENTS, STREAMS, HOLES],
        ThreadKind::Backend => &[COMMON, KVM_REQUESTS, EVENTS, STREAMS, DIAL],
        ThreadKind::Vsock => &[COMMON, EVENTS, STREAMS, DIAL],
        ThreadKind::Console | ThreadKind::Display => &[COMMON, EVENTS, STREAMS],
        ThreadKind::Watchdog => &[COMMON],
        ThreadKind::Throttle => &[COMMON, KICKS],
        ThreadKind::Orders => &[COMMON, KVM_REQUESTS, EVENTS, STREAMS, SERVE, KICKS, SUCCESSION],
    };
    groups.iter().flat_map(|group| group.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [ThreadKind; 10] = [
        ThreadKind::Main,
        ThreadKind::Vcpu,
        ThreadKind::Device,
        ThreadKind::Backend,
        ThreadKind::Vsock,
        ThreadKind::Console,
        ThreadKind::Display,
        ThreadKind::Watchdog,
        ThreadKind::Throttle,
        ThreadKind::Orders,
    ];

    #[test]
    fn a_thread_may_do_nothing_that_its_starter_may_not() {
        let holds = |starter, started| of(started).iter().all(|call| of(starter).contains(call));
        assert!(ALL.into_iter().all(|kind| holds(ThreadKind::Main, kind)));
        assert!(holds(ThreadKind::Vcpu, ThreadKind::Device));
    }

    #[test]
    fn no_table_lists_what_leads_out() {
        let out = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_pidfd_send_signal,
            libc::SYS_pidfd_getfd,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_chroot,
            libc::SYS_pivot_root,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_perf_event_open,
            libc::SYS_keyctl,
            libc::SYS_symlink,
            libc::SYS_link,
            libc::SYS_rename,
            libc::SYS_mknod,
            libc::SYS_setuid,
            libc::SYS_init_module,
            libc::SYS_kexec_load,
        ];
        for kind in ALL {
            let listed: Vec<_> = of(kind).into_iter().filter(|call| out.contains(&call.number)).collect();
            assert!(listed.is_empty(), "{kind:?}: {listed:?}");
        }
    }

    #[test]
    fn only_making_machines_opens_files() {
        for kind in ALL.into_iter().filter(|kind| *kind != ThreadKind::Main) {
            assert!(of(kind).iter().all(|call| call.number != libc::SYS_openat), "{kind:?}");
        }
    }
}
