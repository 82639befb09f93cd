//! The virtio device that the guest sees in front of a backend.

use std::sync::Arc;
use std::time::Duration;

use super::session::Capabilities;
use super::worker::{Shared, WorkerHandle};
use crate::error::VmError;
use crate::virtio::device::{
    ActivateError, Activation, ConfigChange, DeviceType, VirtioDevice, read_config_bytes,
};

/// What the guest is offered, made from what the backend offers and what the VM's configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) features: u64,
    pub(crate) config: Vec<u8>,
    pub(crate) queue_sizes: Vec<u16>,
}

/// A kind of device: what distinguishes a disk from a NIC.
pub(crate) trait Kind: Send + Sync {
    fn device_type(&self) -> DeviceType;
    /// Features that the backend implements and the VMM passes on.
    fn features_passed_on(&self) -> u64;
    /// How much configuration the backend is asked for.
    fn config_size(&self) -> usize;
    /// Most queues that are used.
    fn max_queues(&self) -> u16;
    /// What the guest is offered.
    fn offer(&self, backend: &Capabilities) -> Offer;
}

/// The device.
pub(crate) struct VhostUser {
    worker: WorkerHandle,
    shared: Arc<Shared>,
    offer: Offer,
    backend_features: u64,
    active: bool,
}

impl VhostUser {
    /// Waits until the backend has said what it offers.
    pub(crate) fn new(worker: WorkerHandle, timeout: Duration) -> Result<Self, VmError> {
        let capabilities = worker.wait_ready(timeout)?;
        let shared = worker.shared();
        let offer = shared.kind().offer(&capabilities);
        Ok(Self { worker, shared, offer, backend_features: capabilities.features, active: false })
    }

    /// Tells where configuration changes are to be announced.
    pub(crate) fn set_change(&self, change: Arc<ConfigChange>) {
        self.shared.set_change(change);
    }
}

impl VirtioDevice for VhostUser {
    fn id(&self) -> &str {
        self.shared.id()
    }

    fn device_type(&self) -> DeviceType {
        self.shared.kind().device_type()
    }

    fn features(&self) -> u64 {
        self.offer.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.offer.queue_sizes.clone()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.shared.config().lock(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        // What the VMM itself implements (the NIC's address, say) is none of the backend's business.
        activation.features &= self.backend_features;
        self.worker.activate(activation);
        self.active = true;
        Ok(())
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.active) {
            self.worker.deactivate();
        }
    }
}
