//! One connection to a backend: negotiation, and setting queues up and down. Any error here ends the connection; the worker makes
//! the next one.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::device::Kind;
use super::log::DirtyLog;
use crate::memory::Memory;
use crate::virtio::device::{Activation, ActiveQueue, Start, used_index};

/// Features of the rings themselves, passed on for every kind of device.
const RING_FEATURES: u64 =
    1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_F_VERSION_1;

/// What can go wrong with a backend.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Nobody listens on the socket.
    #[error("connect: {0}")]
    Connect(#[from] io::Error),
    /// A request failed.
    #[error("{request}: {source}")]
    Request {
        /// Which.
        request: &'static str,
        /// How.
        source: vhost::Error,
    },
    /// The backend is too old for modern virtio, or lacks a protocol feature that is needed.
    #[error("the backend does not offer {0}")]
    Lacks(&'static str),
    /// The backend offers less than the guest's driver has been promised.
    #[error("the backend now lacks features {0:#x} or queues that the guest uses")]
    LostFeatures(u64),
    /// No answer yet.
    #[error("no answer")]
    NoAnswer,
    /// A ring could not be read.
    #[error("ring: {0}")]
    Ring(#[from] GuestMemoryError),
}

fn request(request: &'static str) -> impl FnOnce(vhost::Error) -> SessionError {
    move |source| SessionError::Request { request, source }
}

/// What a backend offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// Features, of those that the VMM passes on.
    pub(crate) features: u64,
    /// Device configuration, as long as the kind of device asked for.
    pub(crate) config: Vec<u8>,
    pub(crate) max_queues: u16,
}

/// A connection.
pub(crate) struct Session {
    frontend: Frontend,
    offered: u64,
    protocol: VhostUserProtocolFeatures,
    capabilities: Capabilities,
}

impl Session {
    /// Negotiates on a fresh connection.
    pub(crate) fn negotiate(stream: UnixStream, kind: &dyn Kind) -> Result<Self, SessionError> {
        let mut frontend = Frontend::from_stream(stream, kind.max_queues().into());
        frontend.set_owner().map_err(request("SET_OWNER"))?;
        let offered = frontend.get_features().map_err(request("GET_FEATURES"))?;
        if offered & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(SessionError::Lacks("VIRTIO_F_VERSION_1"));
        }
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(SessionError::Lacks("VHOST_USER_F_PROTOCOL_FEATURES"));
        }
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD;
        let protocol = wanted & frontend.get_protocol_features().map_err(request("GET_PROTOCOL_FEATURES"))?;
        frontend.set_protocol_features(protocol).map_err(request("SET_PROTOCOL_FEATURES"))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let max_queues = if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let queues = frontend.get_queue_num().map_err(request("GET_QUEUE_NUM"))?;
            u16::try_from(queues).unwrap_or(u16::MAX)
        } else {
            kind.max_queues()
        };
        let config = read_config(&mut frontend, protocol, kind.config_size())?;
        let features = offered & (kind.features_passed_on() | RING_FEATURES);
        let capabilities = Capabilities { features, config, max_queues };
        Ok(Self { frontend, offered, protocol, capabilities })
    }

    pub(crate) fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Whether the backend can mark what it writes.
    pub(crate) fn check_log(&self) -> Result<(), SessionError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD) {
            return Err(SessionError::Lacks("VHOST_USER_PROTOCOL_F_LOG_SHMFD"));
        }
        if self.offered & VhostUserVirtioFeatures::LOG_ALL.bits() == 0 {
            return Err(SessionError::Lacks("VHOST_F_LOG_ALL"));
        }
        Ok(())
    }

    /// Has the backend mark what it writes from now on, or no more. It knows the guest's memory.
    pub(crate) fn set_log(&mut self, features: u64, log: Option<&DirtyLog>) -> Result<(), SessionError> {
        let mut features = features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if let Some(log) = log {
            self.frontend.set_log_base(0, Some(log.region())).map_err(request("SET_LOG_BASE"))?;
            features |= VhostUserVirtioFeatures::LOG_ALL.bits();
        }
        self.frontend.set_features(features).map_err(request("SET_FEATURES"))
    }

    /// Sets all queues up and lets the backend work on them.
    pub(crate) fn start(
        &mut self,
        activation: &Activation,
        start: Start,
        log: Option<&DirtyLog>,
    ) -> Result<(), SessionError> {
        let lost = activation.features & !self.offered;
        let queues = activation.queues.len();
        if lost != 0 || queues > usize::from(self.capabilities.max_queues) {
            return Err(SessionError::LostFeatures(lost));
        }
        let features = activation.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(features).map_err(request("SET_FEATURES"))?;
        let regions: Result<Vec<_>, _> =
            activation.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        let regions = regions.map_err(request("memory regions"))?;
        self.frontend.set_mem_table(&regions).map_err(request("SET_MEM_TABLE"))?;
        if log.is_some() {
            self.set_log(activation.features, log)?;
        }
        if start == Start::Fresh {
            self.stop(activation)?;
        }
        for queue in &activation.queues {
            self.start_queue(queue, &activation.memory, start)?;
        }
        Ok(())
    }

    fn start_queue(
        &mut self,
        queue: &ActiveQueue,
        memory: &Memory,
        start: Start,
    ) -> Result<(), SessionError> {
        let index = usize::from(queue.index);
        let base = match start {
            Start::Fresh => 0,
            Start::Resumed => used_index(memory, queue.used)?,
        };
        let host = |address: GuestAddress| memory.get_host_address(address).map(|pointer| pointer as u64);
        // Where writes to the used ring are to be marked, should it come to that: some backends take this address and no other.
        let (flags, log_addr) = match self.check_log() {
            Ok(()) => (VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits(), Some(queue.used.0)),
            Err(_) => (0, None),
        };
        let rings = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags,
            desc_table_addr: host(queue.descriptors)?,
            used_ring_addr: host(queue.used)?,
            avail_ring_addr: host(queue.available)?,
            log_addr,
        };
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.size).map_err(request("SET_VRING_NUM"))?;
        frontend.set_vring_addr(index, &rings).map_err(request("SET_VRING_ADDR"))?;
        frontend.set_vring_base(index, base).map_err(request("SET_VRING_BASE"))?;
        frontend.set_vring_call(index, &queue.call).map_err(request("SET_VRING_CALL"))?;
        frontend.set_vring_kick(index, &queue.kick).map_err(request("SET_VRING_KICK"))?;
        frontend.set_vring_enable(index, true).map_err(request("SET_VRING_ENABLE"))?;
        queue.kick.write(1)?;
        if start == Start::Resumed {
            queue.call.write(1)?;
        }
        Ok(())
    }

    /// Stops all queues. The backend's answer means that it does not touch them any more.
    pub(crate) fn stop(&mut self, activation: &Activation) -> Result<(), SessionError> {
        for queue in &activation.queues {
            self.frontend.get_vring_base(queue.index.into()).map_err(request("GET_VRING_BASE"))?;
        }
        Ok(())
    }
}

impl AsRawFd for Session {
    fn as_raw_fd(&self) -> RawFd {
        self.frontend.as_raw_fd()
    }
}

fn read_config(
    frontend: &mut Frontend,
    protocol: VhostUserProtocolFeatures,
    len: usize,
) -> Result<Vec<u8>, SessionError> {
    if len == 0 {
        return Ok(Vec::new());
    }
    if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
        return Err(SessionError::Lacks("VHOST_USER_PROTOCOL_F_CONFIG"));
    }
    let (_, config) = frontend
        .get_config(0, len as u32, VhostUserConfigFlags::empty(), &vec![0; len])
        .map_err(request("GET_CONFIG"))?;
    Ok(config)
}
