//! The graphics console: a frame buffer ([`ramfb`]), a PS/2 keyboard ([`i8042`], [`keyboard`]) and a tablet ([`tablet`], [`pointer`]), which the clients
//! of a unix socket see and use by RFB, the protocol of VNC ([`rfb`], [`server`], [`screen`]).
//!
//! These are the devices that stock firmware, GRUB, Linux and Windows have drivers for without anything being installed. A guest has
//! them only if its configuration names a socket, and only with firmware, which drives the frame buffer until the guest's system does. Who may
//! open the socket may use the display: its folder's permissions protect it.

mod i8042;
mod keyboard;
mod pointer;
mod ramfb;
mod rfb;
mod screen;
mod server;
mod tablet;

use std::io;
use std::path::Path;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub(crate) use i8042::{I8042, PORTS_LEN};
pub(crate) use ramfb::{FILE as RAMFB_FILE, Ramfb};
pub(crate) use server::DisplayServer;
pub(crate) use tablet::Tablet;

use crate::lifecycle::Lifecycle;
use crate::memory::Memory;
use tablet::PointerInput;

/// The devices of a display, to be put on their buses.
#[derive(Clone)]
pub(crate) struct Devices {
    pub(crate) ramfb: Arc<Ramfb>,
    pub(crate) keyboard: Arc<I8042>,
    pointer: Arc<PointerInput>,
}

impl Devices {
    /// `interrupt` is the keyboard's.
    pub(crate) fn new(interrupt: EventFd, lifecycle: Arc<Lifecycle>) -> io::Result<Self> {
        Ok(Self {
            ramfb: Arc::default(),
            keyboard: Arc::new(I8042::new(interrupt, lifecycle)),
            pointer: Arc::new(PointerInput::new()?),
        })
    }

    /// The tablet. There is one.
    pub(crate) fn tablet(&self) -> Tablet {
        Tablet::new(self.pointer.clone())
    }

    /// Serves the display on the socket at `path`.
    pub(crate) fn serve(self, path: &Path, memory: Memory) -> io::Result<DisplayServer> {
        DisplayServer::start(path, self, memory)
    }
}
