//! The overlay switch: guests' Ethernet frames, between ports of one node and between nodes.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`config`] | what the control plane tells the overlay, declaratively |
//! | `switch` | what becomes of a frame: a pure function of that; ARP, DHCP and the gateway's ping |
//! | `frame` | headers, checksums, segmentation |
//! | `port` | vhost-user-net devices that VMMs connect to |
//! | `tunnel` | frames as datagrams between nodes |
//! | `forwarder` | the tasks that move frames |
//! | [`stats`] | counts of frames and of the reasons why one was dropped |
//!
//! # How a frame travels
//!
//! A guest puts a frame and its virtio-net header into its transmit ring and kicks. The forwarding thread copies it
//! out once, asks the switch, and either writes it into the ring of another port here, or cuts it into datagrams for
//! the node that has the address. There the pieces go into the receiver's ring as they came. Offloads pass through end
//! to end: a super-frame of 64 KiB crosses the mesh whole, and its checksum is computed only for a guest that insists.
//!
//! # Threads
//!
//! - *Forwarding*: everything that touches a frame runs as tasks on the runtime that called [`Overlay::start`]. Make
//!   that a `current_thread` runtime which also runs the mesh of class Frames, and a frame costs one wake-up on a node.
//! - For each port, three threads that sleep while frames flow: one accepts VMMs, and while one is connected the
//!   vhost-user crate has one for its messages and one for the start of rings.
//! - [`Overlay::apply`] and the rest of the handle may be called from any thread. Forwarding reads the configuration
//!   as a snapshot and takes no lock that they hold.
//!
//! # Invariants
//!
//! - Isolation and anti-spoofing: see `switch`.
//! - While fenced, no frame passes in either direction.
//! - Everything that waits is bounded: frames for a slow guest, pieces for a frame, time for a slow link. What does
//!   not fit is dropped and counted under a [`DropReason`].
//! - What guests and peers send ends in a drop of that frame or that connection, never in a panic.

pub mod config;
mod forwarder;
mod frame;
pub mod id;
mod metrics;
mod port;
pub mod stats;
mod switch;
mod tunnel;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

pub use config::{ForwardEntry, NetworkConfig, OverlayConfig, OverlayError, PortConfig, PortStanding};
pub use id::{MacAddr, PortId, Vni};
pub use stats::{DropReason, MeshFrameStats, OverlayStats, PortStats};
pub use tunnel::transport::FrameTransport;

use forwarder::{Forwarder, Snapshot};
use metrics::Metrics;
use port::device::Device;
use port::listener::PortListener;
use switch::table::Table;

/// How an overlay is set up, for the life of the process.
#[derive(Debug, Clone, Default)]
pub struct OverlayOptions {
    /// Group that may connect to ports' sockets; this process' own if none is given.
    pub socket_group: Option<u32>,
}

/// Whether frames may pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fencing {
    /// The node's lease holds.
    Open,
    /// The lease has lapsed: nothing passes, in or out.
    Fenced,
}

/// The overlay of a node. Dropping it ends its tasks and closes its ports.
pub struct Overlay {
    forwarder: Arc<Forwarder>,
    options: OverlayOptions,
    runtime: Handle,
    applied: Mutex<Applied>,
    mesh_task: AbortHandle,
}

/// What the last configuration made.
#[derive(Default)]
struct Applied {
    ports: BTreeMap<PortId, Port>,
}

/// A port with all that runs for it.
struct Port {
    device: Arc<Device>,
    /// What cannot be changed without a new device.
    made_for: (MacAddr, PathBuf),
    standing: PortStanding,
    task: AbortHandle,
    /// Closes the socket when dropped.
    _listener: PortListener,
}

impl Drop for Port {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Overlay {
    /// Starts forwarding on the current tokio runtime, which should be a single thread that also runs the mesh.
    pub fn start(transport: impl FrameTransport, options: OverlayOptions) -> Result<Self, OverlayError> {
        let metrics = Metrics::new().map_err(|error| OverlayError::Metrics(error.to_string()))?;
        let received = transport.receiver().ok_or(OverlayError::TransportTaken)?;
        let forwarder = Arc::new(Forwarder::new(Arc::new(transport), metrics));
        let runtime = Handle::current();
        let mesh_task = runtime.spawn(forwarder.clone().run_mesh(received)).abort_handle();
        Ok(Self { forwarder, options, runtime, applied: Mutex::default(), mesh_task })
    }

    /// Makes the overlay what the configuration says: ports open and close, addresses appear and go. Ports that stay
    /// as they are do not notice, and one that leaves standby keeps its VMM. A configuration that contradicts itself changes nothing; if a port's socket cannot
    /// be made, the others are served, and applying again tries again.
    pub fn apply(&self, config: &OverlayConfig) -> Result<(), OverlayError> {
        config.validate()?;
        let mut applied = self.applied.lock();
        let mtus: HashMap<Vni, u16> =
            config.networks.iter().map(|network| (network.vni, network.mtu)).collect();
        let made_for = |port: &PortConfig| (port.mac, port.socket.clone());
        let wanted: HashMap<_, _> = config.ports.iter().map(|port| (port.id, made_for(port))).collect();
        let (kept, gone): (BTreeMap<_, _>, BTreeMap<_, _>) = std::mem::take(&mut applied.ports)
            .into_iter()
            .partition(|(id, port)| wanted.get(id) == Some(&port.made_for));
        applied.ports = kept;
        for (id, port) in gone {
            drop(port);
            self.forwarder.metrics.forget(id);
        }

        let mut usable = config.clone();
        let mut activated = Vec::new();
        let mut failed = None;
        usable.ports.retain(|port| {
            let mtu = mtus.get(&port.vni).copied().unwrap_or_default();
            if let Some(there) = applied.ports.get_mut(&port.id) {
                there.device.set_mtu(mtu);
                let before = std::mem::replace(&mut there.standing, port.standing);
                if (before, port.standing) == (PortStanding::Standby, PortStanding::Active) {
                    activated.push(there.device.clone());
                }
                return true;
            }
            match self.open(port, mtu) {
                Ok(made) => {
                    applied.ports.insert(port.id, made);
                    true
                }
                Err(error) => {
                    failed = Some(error);
                    false
                }
            }
        });
        let ports = usable
            .ports
            .iter()
            .filter_map(|port| applied.ports.get(&port.id))
            .map(|port| port.device.clone())
            .collect();
        self.forwarder.snapshot.store(Arc::new(Snapshot { table: Table::new(&usable), ports }));
        activated.iter().for_each(|device| device.wake());
        failed.map_or(Ok(()), Err)
    }

    fn open(&self, config: &PortConfig, mtu: u16) -> Result<Port, OverlayError> {
        let counters = self.forwarder.metrics.port(config.id);
        let device = Arc::new(Device::new(config.id, config.mac, mtu, counters));
        let listener = PortListener::start(device.clone(), &config.socket, self.options.socket_group)
            .map_err(|source| OverlayError::Listen { path: config.socket.clone(), source })?;
        let task = self.runtime.spawn(self.forwarder.clone().run_port(device.clone())).abort_handle();
        Ok(Port {
            device,
            made_for: (config.mac, config.socket.clone()),
            standing: config.standing,
            task,
            _listener: listener,
        })
    }

    /// Stops all frames, or lets them pass again. From the return on, no frame is begun.
    pub fn set_fenced(&self, fencing: Fencing) {
        self.forwarder.fenced.store(fencing == Fencing::Fenced, Ordering::Release);
    }

    /// What happened so far.
    pub fn stats(&self) -> OverlayStats {
        let ports = self
            .applied
            .lock()
            .ports
            .iter()
            .map(|(&id, port)| (id, port.device.counters.read(port.device.session().is_some())))
            .collect();
        OverlayStats { ports, mesh: self.forwarder.metrics.mesh.read() }
    }

    /// The same numbers for Prometheus.
    pub fn metrics(&self) -> &prometheus::Registry {
        self.forwarder.metrics.registry()
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        self.mesh_task.abort();
    }
}
