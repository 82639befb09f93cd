//! The socket of a port, and the thread that serves one VMM after the other on it.
//!
//! A connection that ends, for whatever reason, leaves nothing behind: the next one negotiates from the start with a
//! fresh backend. So VMMs and this process restart independently of each other.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;
use vhost::vhost_user::Listener;
use vhost_user_backend::{ShutdownHandle, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;

use super::backend::Backend;
use super::device::Device;
use crate::dirty_log::LoggedMemory;

/// Read and write for the owner (this process) and the group (VMMs).
const SOCKET_MODE: u32 = 0o660;
/// Pause after an error that is not the VMM's, so that a lasting one does not fill the log.
const RETRY: Duration = Duration::from_millis(100);

/// Serves a port until dropped.
pub(crate) struct PortListener {
    shared: Arc<Shared>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    stop: EventFd,
    stopping: AtomicBool,
    connection: Mutex<Option<ShutdownHandle>>,
}

impl PortListener {
    /// Makes the socket and starts its thread.
    pub(crate) fn start(device: Arc<Device>, path: &Path, group: Option<u32>) -> io::Result<Self> {
        let listener = bind(path, group)?;
        let shared = Arc::new(Shared {
            stop: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            stopping: AtomicBool::new(false),
            connection: Mutex::new(None),
        });
        let thread = std::thread::Builder::new().name("vhost-net".to_owned()).spawn({
            let shared = shared.clone();
            move || serve(&listener, &shared, &device)
        })?;
        Ok(Self { shared, path: path.to_owned(), thread: Some(thread) })
    }
}

impl Drop for PortListener {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // The counter of a fresh event cannot overflow.
        let _ = self.shared.stop.write(1);
        if let Some(connection) = self.shared.connection.lock().take() {
            connection.shutdown();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(socket = %self.path.display(), "the port's thread panicked");
        }
        // A successor may have taken the path already only after this returns.
        let _ = fs::remove_file(&self.path);
    }
}

/// Listens at `path`, where the socket appears with its final permissions.
fn bind(path: &Path, group: Option<u32>) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(SOCKET_MODE))?;
    if group.is_some() {
        chown(&new, None, group)?;
    }
    fs::rename(&new, path)?;
    Ok(listener)
}

fn serve(listener: &UnixListener, shared: &Shared, device: &Arc<Device>) {
    while wait_for_connection(listener, shared) {
        if let Err(error) = serve_connection(listener, shared, device) {
            tracing::warn!(port = %device.id(), error, "VMM's connection failed");
            std::thread::sleep(RETRY);
        }
        device.detach();
    }
}

/// True when a VMM connects, false when it is time to end.
fn wait_for_connection(listener: &UnixListener, shared: &Shared) -> bool {
    while !shared.stopping.load(Ordering::SeqCst) {
        let mut fds = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(shared.stop.as_fd(), PollFlags::POLLIN),
        ];
        if poll(&mut fds, PollTimeout::NONE).is_ok() && fds[0].any().unwrap_or(false) {
            return !shared.stopping.load(Ordering::SeqCst);
        }
    }
    false
}

/// The crate's errors are neither `Sync` nor `std::error::Error`, so they become text here.
fn serve_connection(listener: &UnixListener, shared: &Shared, device: &Arc<Device>) -> Result<(), String> {
    let memory = GuestMemoryAtomic::new(LoggedMemory::new());
    let backend = Arc::new(Backend::new(device.clone(), memory.clone()));
    let mut daemon =
        VhostUserDaemon::new("vhost-net-conn".to_owned(), backend, memory).map_err(|e| e.to_string())?;
    let listener = listener.try_clone().map_err(|e| e.to_string())?;
    tracing::debug!(port = %device.id(), "VMM connects");
    daemon.start(&mut Listener::from(listener)).map_err(|e| e.to_string())?;
    *shared.connection.lock() = daemon.shutdown_handle();
    if shared.stopping.load(Ordering::SeqCst) {
        daemon.request_shutdown();
    }
    let ended = daemon.wait();
    *shared.connection.lock() = None;
    // A VMM that hangs up, in whatever state, is normal. A message that makes no sense ends here as well.
    if let Err(error) = ended {
        tracing::debug!(port = %device.id(), error = %error, "VMM's connection ended");
    }
    Ok(())
}
