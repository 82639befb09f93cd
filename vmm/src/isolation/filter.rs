//! Tables become programs that the kernel runs at every system call.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::calls::{Call, Only};

/// What becomes of a call that the table does not list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// The process ends at once.
    Kill,
    /// The process ends and says on standard error what it was.
    Report,
    /// The call fails with this error.
    Fail(u32),
}

impl From<Denied> for SeccompAction {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Kill => Self::KillProcess,
            Denied::Report => Self::Trap,
            Denied::Fail(error) => Self::Errno(error),
        }
    }
}

/// The program for a table.
pub(super) fn program(table: &[Call], denied: Denied) -> io::Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let unconditional = |call: &Call| call.only.is_empty();
    for call in table {
        let lines = rules.entry(call.number).or_default();
        // No rule means any arguments: a line without conditions makes the others of this call void.
        if !table.iter().any(|other| other.number == call.number && unconditional(other)) {
            let conditions = call.only.iter().map(condition).collect::<Result<_, _>>().map_err(invalid)?;
            lines.push(SeccompRule::new(conditions).map_err(invalid)?);
        }
    }
    compile(rules, denied.into(), SeccompAction::Allow)
}

/// Says that there is no `clone3`: the C library then starts threads in the old way, whose flags can be looked at.
pub(super) fn old_thread_start() -> io::Result<BpfProgram> {
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    compile(BTreeMap::from([(libc::SYS_clone3, vec![])]), SeccompAction::Allow, missing)
}

/// Binds the calling thread, and what it starts from now on.
pub(super) fn install(program: &BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(program).map_err(io::Error::other)
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> io::Result<BpfProgram> {
    let target = std::env::consts::ARCH.try_into().map_err(invalid)?;
    let filter = SeccompFilter::new(rules, otherwise, listed, target).map_err(invalid)?;
    filter.try_into().map_err(invalid)
}

fn condition(only: &Only) -> Result<SeccompCondition, seccompiler::BackendError> {
    let (argument, how, value) = match *only {
        Only::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
        Only::Without(argument, bits) => (argument, SeccompCmpOp::MaskedEq(bits), 0),
        Only::Masked(argument, bits, value) => (argument, SeccompCmpOp::MaskedEq(bits), value),
        Only::OwnProcess(argument) => (argument, SeccompCmpOp::Eq, std::process::id().into()),
    };
    // The kernel itself looks at the lower half only of those that the tables name.
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)
}

fn invalid(error: seccompiler::BackendError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::super::{ThreadKind, calls};
    use super::*;

    /// Runs in a thread of its own whose filter refuses instead of ending the test.
    fn confined<T: Send + 'static>(kind: ThreadKind, inside: impl FnOnce() -> T + Send + 'static) -> T {
        let inside = move || {
            let refuse = Denied::Fail(libc::EXDEV.unsigned_abs());
            install(&program(&calls::of(kind), refuse).unwrap()).unwrap();
            inside()
        };
        std::thread::spawn(inside).join().unwrap()
    }

    fn refused<T>(outcome: io::Result<T>) -> bool {
        outcome.err().is_some_and(|error| error.raw_os_error() == Some(libc::EXDEV))
    }

    #[test]
    fn a_vcpu_may_start_a_thread_but_opens_nothing() {
        let (opens, connects, locks) = confined(ThreadKind::Vcpu, || {
            (
                refused(std::fs::File::open("/dev/null")),
                refused(std::os::unix::net::UnixStream::connect("/nowhere")),
                std::sync::Mutex::new(1).lock().is_ok(),
            )
        });
        assert!(opens && connects && locks);
    }

    #[test]
    fn a_backend_dials_sockets_of_files_only() {
        let (network, file) = confined(ThreadKind::Backend, || {
            let file = std::os::unix::net::UnixStream::connect("/nowhere");
            (refused(std::net::TcpStream::connect("127.0.0.1:1")), file.err().map(|error| error.kind()))
        });
        assert_eq!((network, file), (true, Some(io::ErrorKind::NotFound)));
    }

    #[test]
    fn holes_may_be_made_in_a_file_and_not_filled() {
        for kind in [ThreadKind::Main, ThreadKind::Vcpu, ThreadKind::Device] {
            holes_may_be_made_in_a_file(kind);
        }
    }

    fn holes_may_be_made_in_a_file(kind: ThreadKind) {
        let file = tempfile::tempfile().unwrap();
        let (hole, fill) = confined(kind, move || {
            let refused = |mode| {
                // SAFETY: takes plain numbers; the descriptor is that of `file`.
                let outcome = unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, 4096) };
                refused(if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) })
            };
            (refused(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE), refused(0))
        });
        assert_eq!((hole, fill), (false, true));
    }

    #[test]
    fn one_of_several_lines_has_to_match() {
        let table = crate::calls! {
            SYS_getpriority [Only::Is(0, 1)]: "a test";
            SYS_getpriority [Only::Is(0, 2), Only::Is(1, 0)]: "a test";
        };
        let table: Vec<Call> =
            calls::of(ThreadKind::Device).into_iter().chain(table.iter().copied()).collect();
        let inside = move || {
            install(&program(&table, Denied::Fail(libc::EXDEV.unsigned_abs())).unwrap()).unwrap();
            let denied = |which: i32, who: i32| {
                // SAFETY: takes plain numbers and changes nothing.
                let outcome = unsafe { libc::syscall(libc::SYS_getpriority, which, who) };
                refused(if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) })
            };
            [denied(0, 0), denied(1, 0), denied(2, 0), denied(2, 1)]
        };
        assert_eq!(std::thread::spawn(inside).join().unwrap(), [true, false, false, true]);
    }
}
