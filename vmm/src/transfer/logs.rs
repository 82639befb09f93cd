//! The records of all who write to guest memory while the guest moves: KVM for the vCPUs, this process for the devices that it serves, the
//! backends for theirs. They are kept from [`Logs::begin`] until it is dropped, on whatever way that happens.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::dirty::DirtyPages;
use super::{TransferError, kvm, pages};
use crate::error::VmError;
use crate::kvm::{self as kvm_guest, DirtyLog as KvmLog};
use crate::memory::{self, Memory};
use crate::virtio::vhost_user::SessionError;
use crate::virtio::vhost_user::log::{DirtyLog, Marked};
use crate::virtio::vhost_user::worker::Shared as Backend;

/// The records.
pub(crate) struct Logs {
    vm: Arc<VmFd>,
    memory: Memory,
    backends: Vec<Arc<Backend>>,
    log: Arc<DirtyLog>,
}

impl Logs {
    /// Begins to record. Whatever is written after this has returned is recorded.
    pub(super) fn begin(
        vm: Arc<VmFd>,
        memory: Memory,
        backends: Vec<Arc<Backend>>,
    ) -> Result<Self, TransferError> {
        let end = pages::ranges(&memory).last().map_or(0, |(start, len)| start + len);
        let log = Arc::new(DirtyLog::new(end)?);
        // From here on, what was begun is ended by the drop.
        let logs = Self { vm, memory, backends, log };
        for backend in &logs.backends {
            backend.start_log(logs.log.clone()).map_err(|error| match error {
                SessionError::Lacks(why) => TransferError::CannotLog { device: backend.id().to_owned(), why },
                error => {
                    tracing::warn!(device = backend.id(), %error, "backend does not mark what it writes");
                    TransferError::BackendAway(backend.id().to_owned())
                }
            })?;
        }
        memory::begin_marks(&logs.memory);
        kvm_guest::map_memory(&logs.vm, &logs.memory, KvmLog::On).map_err(slots)?;
        Ok(logs)
    }

    /// Adds what was written since the last time.
    pub(super) fn take(&self, pages: &mut DirtyPages) -> Result<(), TransferError> {
        match self.log.take() {
            Marked::Pages(bits) => pages.add(0, &bits),
            Marked::Any => pages::add_present(&self.memory, pages)?,
            Marked::Unknown(device) => {
                return Err(TransferError::CannotLog { device, why: "what its predecessor offered" });
            }
        }
        for (first, bits) in memory::take_marks(&self.memory) {
            pages.add(first, &bits);
        }
        for (first, bits) in
            kvm_guest::take_dirty(&self.vm, &self.memory).map_err(kvm("KVM_GET_DIRTY_LOG"))?
        {
            pages.add(first, &bits);
        }
        Ok(())
    }
}

fn slots(error: VmError) -> TransferError {
    match error {
        VmError::Kvm { what, source } => TransferError::Kvm { what, source },
        error => TransferError::Unfit(error.to_string()),
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        self.backends.iter().for_each(|backend| backend.stop_log());
        if let Err(error) = kvm_guest::map_memory(&self.vm, &self.memory, KvmLog::Off) {
            // The guest runs on, only more slowly.
            tracing::warn!(%error, "KVM goes on to record what the guest writes");
        }
    }
}
