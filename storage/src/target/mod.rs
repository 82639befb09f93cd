//! The vhost-user-blk target: offers a volume to a VM.
//!
//! A [`Target`] listens on a socket for one front end at a time (the VMM) and serves its virtqueues over shared guest memory:
//!
//! | module | it is |
//! |---|---|
//! | [`connection`] | one front end's connection, as the vhost-user crate sees it |
//! | [`queue`] | taking requests from a ring, putting answers into it |
//! | [`request`] | descriptor chains, which are hostile input |
//! | [`inflight`] | the record that lets a restarted process continue where a killed one stopped |
//! | [`geometry`] | features and configuration space |
//!
//! Queues are tasks of the device's runtime ([`TargetOptions::runtime`]): on the way from a ring to the device and back no request changes
//! threads. Threads of a target's own: the listener, and for each connection the crate's two, for the socket and for rings that start.
//!
//! Rules:
//! - A request taken from a ring is in the record until it is answered. A request that the device does not complete (the lease lapsed, the
//!   volume waits) stays in flight; one that the device hands back as closed stays in the record for the next target.
//! - A connection starts only when nothing of the former one is in the device's hands any more: a late write must not come behind
//!   a newer one to the same place.
//! - When the device has grown the connection ends: the front end makes another, finds the larger size and tells its guest. (The
//!   protocol's own message for it, `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, is one that the vhost crate does not send.)
//! - A malformed message ends its connection, a malformed chain its request or its ring. Neither ends the process.

mod connection;
mod geometry;
mod inflight;
mod queue;
mod request;

use self::connection::{Connection, Shared};
use self::inflight::InflightRecord;
use self::request::SERIAL_LEN;
use crate::device::BlockDevice;
use crate::poll::BusyPoll;
use futures_util::future::BoxFuture;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use parking_lot::Mutex;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use thiserror::Error;
use tokio::runtime::Handle;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;

/// Queues of a target at most.
pub const MAX_QUEUES: u16 = 16;
/// How often a wait for the device's last requests is reported.
const WAIT_REPORT: Duration = Duration::from_secs(5);
/// How often a wait for the device's last requests looks whether the target ends.
const WAIT_POLL: Duration = Duration::from_millis(100);
/// A pause after an error of the listener, which may be for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Whether a guest may write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Access {
    /// Reads and writes.
    #[default]
    ReadWrite,
    /// Reads.
    ReadOnly,
}

/// How a volume is offered.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// The socket to listen on; what is there is replaced.
    pub socket: PathBuf,
    /// Group that may connect besides the owner; `None` leaves the process' own.
    pub socket_group: Option<u32>,
    /// File of the in-flight record.
    pub inflight: PathBuf,
    /// Queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Serial number that the guest sees (its first 20 bytes).
    pub serial: String,
    /// Whether the guest may write.
    pub access: Access,
    /// The runtime that works the queues: that of the device, so that a request changes no thread.
    pub runtime: Handle,
    /// Polling of that runtime.
    pub poll: Arc<BusyPoll>,
}

/// Why a target could not start.
#[derive(Debug, Error)]
pub enum TargetError {
    /// The number of queues is out of range.
    #[error("{0} queues: there can be 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// The socket could not be made.
    #[error("socket {path}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The in-flight record could not be used.
    #[error("in-flight record {path}")]
    Inflight {
        /// Its path.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// A thread or an event could not be made.
    #[error("starting the target")]
    Start(#[source] io::Error),
}

/// A running target; dropping it ends it. What is in flight then stays in the record.
pub struct Target {
    socket: PathBuf,
    /// The inode of our socket: a successor may have put another one in its place.
    inode: Option<u64>,
    control: Arc<Control>,
    /// Closing it wakes the listener.
    stopper: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

/// How the target's owner reaches its listener.
struct Control {
    stop_event: UnixStream,
    /// Whether the target ends, and the connection being served.
    state: Mutex<(Stop, Option<Arc<Connection>>)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    No,
    Wanted,
}

impl Target {
    /// Starts to offer a device.
    pub fn start(options: TargetOptions, device: Arc<dyn BlockDevice>) -> Result<Self, TargetError> {
        if !(1..=MAX_QUEUES).contains(&options.queues) {
            return Err(TargetError::Queues(options.queues));
        }
        let record = InflightRecord::open(&options.inflight, options.queues.into(), geometry::QUEUE_SIZE)?;
        let listener = listen(&options.socket, options.socket_group)
            .map_err(|source| TargetError::Socket { path: options.socket.clone(), source })?;
        let inode = inode(&options.socket);
        let (stop_event, stopper) = UnixStream::pair().map_err(TargetError::Start)?;
        let control = Arc::new(Control { stop_event, state: Mutex::new((Stop::No, None)) });
        let mut serial = [0; SERIAL_LEN];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let server = Server {
            control: Arc::clone(&control),
            device,
            record: Arc::new(record),
            serial,
            access: options.access,
            queues: options.queues,
            runtime: options.runtime,
            poll: options.poll,
        };
        let thread = thread::Builder::new()
            .name("blk-target".to_owned())
            .spawn(move || server.run(listener))
            .map_err(TargetError::Start)?;
        Ok(Self { socket: options.socket, inode, control, stopper: Some(stopper), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        {
            let mut state = self.control.state.lock();
            state.0 = Stop::Wanted;
            if let Some(connection) = &state.1 {
                connection.close();
                connection.shut_down();
            }
        }
        drop(self.stopper.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(socket = %self.socket.display(), "the thread of a target panicked");
        }
        if self.inode.is_some() && inode(&self.socket) == self.inode {
            // Left behind it would be replaced by the next target.
            let _ = fs::remove_file(&self.socket);
        }
    }
}

fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).map(|metadata| metadata.ino()).ok()
}

/// Makes the socket. It appears under its name only when it can be connected to, with its permissions set.
fn listen(path: &Path, group: Option<u32>) -> io::Result<UnixListener> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, Permissions::from_mode(0o660))?;
    if let Some(group) = group {
        std::os::unix::fs::chown(&temporary, None, Some(group))?;
    }
    fs::rename(&temporary, path)?;
    Ok(listener)
}

/// Ends a connection whose front end knows a size that is not that of the device any more.
async fn end_when_grown(grown: BoxFuture<'static, ()>, connection: Weak<Connection>) {
    grown.await;
    if let Some(connection) = connection.upgrade() {
        tracing::info!("the device has grown: the front end is to connect again");
        connection.shut_down();
    }
}

/// What the listener's thread works with.
struct Server {
    control: Arc<Control>,
    device: Arc<dyn BlockDevice>,
    record: Arc<InflightRecord>,
    serial: [u8; SERIAL_LEN],
    access: Access,
    queues: u16,
    runtime: Handle,
    poll: Arc<BusyPoll>,
}

impl Server {
    fn run(self, listener: UnixListener) {
        while self.wait_for_front_end(&listener) {
            let serving = listener.try_clone().map(Listener::from);
            if let Err(error) =
                serving.map_err(vhost_user_backend::Error::StartDaemon).and_then(|l| self.serve(l))
            {
                tracing::warn!(%error, "front end's connection");
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }

    fn stopping(&self) -> bool {
        self.control.state.lock().0 == Stop::Wanted
    }

    /// Waits for a front end; false when the target ends.
    fn wait_for_front_end(&self, listener: &UnixListener) -> bool {
        loop {
            let mut fds = [
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.control.stop_event.as_fd(), PollFlags::POLLIN),
            ];
            let polled = poll(&mut fds, PollTimeout::NONE);
            if self.stopping() {
                return false;
            }
            match polled {
                Ok(_) => return true,
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "waiting for front ends");
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Serves one connection to its end.
    fn serve(&self, mut listener: Listener) -> Result<(), vhost_user_backend::Error> {
        let shared = Shared::new(
            Arc::clone(&self.device),
            self.access,
            self.serial,
            Arc::clone(&self.record),
            Arc::clone(&self.poll),
        );
        let size = self.device.size();
        let connection = Connection::new(shared, self.queues, &self.runtime)
            .map_err(vhost_user_backend::Error::StartDaemon)?;
        let mut daemon = connection.daemon()?;
        let started = daemon.start(&mut listener);
        if started.is_ok() {
            let growth =
                self.runtime.spawn(end_when_grown(self.device.grown_from(size), Arc::downgrade(&connection)));
            self.watch(&connection, &mut daemon);
            growth.abort();
        }
        connection.close();
        connection.set_shutdown(None);
        self.control.state.lock().1 = None;
        self.device.recall();
        self.wait_for_device(&connection);
        started
    }

    /// Waits for the end of a connection.
    fn watch(&self, connection: &Arc<Connection>, daemon: &mut VhostUserDaemon<Arc<Connection>>) {
        connection.set_shutdown(daemon.shutdown_handle());
        let stop = {
            let mut state = self.control.state.lock();
            state.1 = Some(Arc::clone(connection));
            state.0
        };
        if stop == Stop::Wanted {
            connection.shut_down();
        }
        tracing::debug!("front end connected");
        match daemon.wait() {
            Err(error) => tracing::info!(%error, "front end disconnected"),
            Ok(()) => tracing::info!("front end disconnected"),
        }
    }

    /// Waits until the device has given back all requests of a connection, or the target ends.
    fn wait_for_device(&self, connection: &Connection) {
        let mut waited = Duration::ZERO;
        loop {
            let left = connection.wait_outstanding(WAIT_POLL);
            if left == 0 || self.stopping() {
                return;
            }
            waited += WAIT_POLL;
            if waited.as_millis().is_multiple_of(WAIT_REPORT.as_millis()) {
                tracing::warn!(requests = left, ?waited, "waiting for the requests of the last connection");
            }
        }
    }
}
