//! `captured-vmm WHERE CONFIG USER ATTEMPT [TARGET]`: plays a VMM that its guest has taken over, and tries to get out.
//!
//! WHERE is `free` (as root, the way a process is that nothing holds), `unfiltered` (in the jail of a VMM, without the filter of system calls) or
//! `jailed` (as a VMM is). The way into the jail is that of `hci vmm run`. Ends with 0 if the attempt succeeded and with 1 if it was refused.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hci_node::vmm_role::{Args, confine, prepare};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, Uid};

/// More than a small VM's VMM may have.
const THREADS: usize = 200;
const MEMORY: usize = 400 << 20;
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(10);

fn main() -> ExitCode {
    match attempt() {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(refused)) => {
            println!("refused: {refused}");
            ExitCode::from(1)
        }
        Err(error) => {
            println!("{error:#}");
            ExitCode::from(2)
        }
    }
}

fn attempt() -> Result<io::Result<()>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [place, config, user, attempt, target @ ..] = &arguments[..] else {
        bail!("captured-vmm WHERE CONFIG USER ATTEMPT [TARGET]")
    };
    let target = target.first().map_or("", String::as_str);
    let config = PathBuf::from(config);
    let own = config.parent().context("the configuration is in no directory")?.to_owned();
    let jail = || prepare(&Args { config, user: Some(user.clone()) });
    // Held until the end, as a VMM does.
    let _inside = match place.as_str() {
        "free" => None,
        "unfiltered" => Some(jail()?),
        "jailed" => Some(jail().and_then(confine)?),
        other => bail!("{other}: free, unfiltered or jailed"),
    };
    Ok(match attempt.as_str() {
        "read" => File::open(target).map(drop),
        "write" => OpenOptions::new().write(true).open(target).map(drop),
        "create" => File::create(target).map(drop),
        "remove" => fs::remove_file(target),
        "link" => symlink("/etc/shadow", own.join("link")),
        "node" => node(&own.join("node")),
        "tcp" => TcpStream::connect(target).map(drop),
        "unix" => UnixStream::connect(target).map(drop),
        "abstract" => SocketAddr::from_abstract_name(target)
            .and_then(|address| UnixStream::connect_addr(&address))
            .map(drop),
        "return" => dial_until_it_comes(&own, Path::new(target)),
        "serve" => UnixListener::bind(own.join("console.sock")).map(drop),
        "signal" => kill(process(target)?, Signal::SIGCONT).map_err(Into::into),
        "trace" => trace(process(target)?),
        "look-into" => look_into(process(target)?),
        "mount" => mount_something(&own),
        "user-namespace" => unshare(CloneFlags::CLONE_NEWUSER).map_err(Into::into),
        "fork" => fork(),
        "exec" => exec(target),
        "root" => become_root(),
        "bpf" => bpf(),
        "io-uring" => io_uring(),
        "threads" => threads(),
        "memory" => memory(),
        "kvm" => OpenOptions::new().read(true).write(true).open("/dev/kvm").map(drop),
        other => bail!("{other} is no attempt"),
    })
}

/// Connects to a backend that is not there yet when the jail is entered. That it has been is said by a socket.
fn dial_until_it_comes(own: &Path, backend: &Path) -> io::Result<()> {
    let _inside = UnixListener::bind(own.join("console.sock"))?;
    let began = Instant::now();
    loop {
        match UnixStream::connect(backend) {
            Err(_) if began.elapsed() < PATIENCE => std::thread::sleep(LOOK),
            outcome => return outcome.map(drop),
        }
    }
}

fn process(target: &str) -> Result<Pid> {
    Ok(Pid::from_raw(target.parse().context("no process")?))
}

/// What a call said that answers with a negative number when it fails.
fn answered(answer: libc::c_long) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A copy of the first disk.
fn node(at: &Path) -> io::Result<()> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    mknod(at, SFlag::S_IFBLK, Mode::S_IRWXU, makedev(7, 0))?;
    let is_there = fs::metadata(at)?.file_type().is_block_device();
    fs::remove_file(at)?;
    if is_there { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn trace(process: Pid) -> io::Result<()> {
    // SAFETY: plain numbers; the traced process is one that the test has made for this.
    answered(unsafe { libc::ptrace(libc::PTRACE_SEIZE, process.as_raw(), 0usize, 0usize) })
}

fn look_into(process: Pid) -> io::Result<()> {
    let here = MaybeUninit::<u8>::uninit();
    let local = libc::iovec { iov_base: here.as_ptr().cast_mut().cast(), iov_len: 1 };
    // Nothing is there, which only who may look is told.
    let remote = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 };
    // SAFETY: both vectors live through the call; one byte is read into `here` at most, which nobody reads.
    let read = unsafe { libc::process_vm_readv(process.as_raw(), &local, 1, &remote, 1, 0) };
    match answered(read as libc::c_long) {
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        answer => answer,
    }
}

fn mount_something(at: &Path) -> io::Result<()> {
    let nothing = None::<&str>;
    // So that it ends with this process where it succeeds. Who is refused this may have been in a namespace of its own already.
    let private = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing));
    let mounted = mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), nothing);
    Ok(private.and(mounted)?)
}

fn fork() -> io::Result<()> {
    // SAFETY: this process has one thread, and the child ends at once.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => std::process::exit(0),
        ForkResult::Parent { child } => Ok(nix::sys::wait::waitpid(child, None).map(drop)?),
    }
}

fn exec(program: &str) -> io::Result<()> {
    let program = CString::new(program)?;
    Err(match nix::unistd::execv(&program, &[&program]) {
        Ok(never) => match never {},
        Err(error) => error.into(),
    })
}

fn become_root() -> io::Result<()> {
    nix::unistd::setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))?;
    // That it can be root is not enough where root has no capabilities.
    Ok(nix::unistd::sethostname(nix::unistd::gethostname()?)?)
}

fn bpf() -> io::Result<()> {
    // BPF_MAP_CREATE: an array of one word.
    let attributes: [u32; 18] = [2, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: the attributes are as long as is said.
    answered(unsafe { libc::syscall(libc::SYS_bpf, 0, attributes.as_ptr(), size_of_val(&attributes)) })
}

fn io_uring() -> io::Result<()> {
    let mut parameters = [0u32; 30];
    // SAFETY: `struct io_uring_params` has 120 bytes.
    answered(unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) })
}

/// So many threads at the same time.
fn threads() -> io::Result<()> {
    let all: Vec<_> = (0..THREADS)
        .map(|_| {
            std::thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(|| std::thread::sleep(Duration::from_secs(2)))
        })
        .collect();
    all.into_iter().try_for_each(|thread| thread.map(drop))
}

fn memory() -> io::Result<()> {
    let all = vec![1u8; MEMORY];
    if std::hint::black_box(&all).iter().all(|byte| *byte == 1) {
        Ok(())
    } else {
        Err(io::ErrorKind::Other.into())
    }
}
