//! Why a guest could not be started or controlled.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::boot::BootError;
use crate::config::ConfigError;
use crate::state::StateError;
use crate::transfer::TransferError;
use crate::vcpu::model::Missing;
use crate::virtio::vhost_user::SessionError;

/// Why a guest could not be started or controlled.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration is not acceptable; everything that is wrong with it.
    #[error("bad configuration: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<ConfigError>),
    /// A call to KVM failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// This host's KVM lacks something the VMM is built on.
    #[error("KVM on this host lacks {0}")]
    MissingCapability(&'static str),
    /// This host's processor cannot show the guest what its model has.
    #[error(transparent)]
    CpuModel(#[from] Missing),
    /// The guest's memory and the PCI windows above it are more than this host's processor can address.
    #[error("{memory} bytes of memory need more than the {bits} address bits of this node's processor")]
    AddressWidth {
        /// Bytes of the guest's memory.
        memory: u64,
        /// What the processor has.
        bits: u32,
    },
    /// Guest memory could not be made.
    #[error("guest memory: {what}: {source}")]
    Memory {
        /// The step that failed.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The firmware or its variables could not be read.
    #[error("firmware {path}: {source}")]
    Firmware {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The kernel could not be loaded.
    #[error("boot")]
    Boot(#[from] BootError),
    /// The console socket could not be served.
    #[error("console socket {path}")]
    Console {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The display's socket could not be served.
    #[error("display socket {path}")]
    Display {
        /// The socket.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A device's backend did not answer in time, or not in a usable way.
    #[error("device {id:?}: backend {socket} not usable within {waited:?}")]
    Backend {
        /// The device.
        id: String,
        /// Its socket.
        socket: PathBuf,
        /// For how long it was tried.
        waited: Duration,
        /// The last failure.
        source: SessionError,
    },
    /// A thread, event descriptor or the like could not be had.
    #[error("{what}: {source}")]
    Resource {
        /// What was wanted.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The vCPUs did not reach the wanted state in time.
    #[error("vCPUs did not {what} within {waited:?}")]
    VcpuTimeout {
        /// The transition.
        what: &'static str,
        /// For how long it was waited.
        waited: Duration,
    },
    /// The guest has ended.
    #[error("the guest has ended")]
    Ended,
    /// The guest could not be made from what was saved.
    #[error(transparent)]
    Saved(#[from] TransferError),
    /// A device does not go on.
    #[error("a device does not go on: {0}")]
    Device(#[source] StateError),
}

/// Adds what was asked of KVM to its answer.
pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

/// Adds what was wanted to an I/O error.
pub(crate) fn resource(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Resource { what, source }
}
