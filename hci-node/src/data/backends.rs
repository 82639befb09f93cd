//! What storage is built on in this process: stores on the disks' file systems, vhost-user-blk targets for VMs.

use std::sync::Arc;

use storage::{
    StoreOpener, TargetStarter,
    store::{DiskStore, StoreError, plain::PlainStore},
};

use crate::paths::NodePaths;

/// Opens the plain store in a disk's directory. Replaying its log blocks, so that happens on a thread that may.
pub(crate) fn store_opener() -> StoreOpener {
    Arc::new(|disk| {
        Box::pin(async move {
            let opened = tokio::task::spawn_blocking(move || PlainStore::open(&disk.path, disk.id)).await;
            match opened {
                Ok(Ok(store)) => Ok(Arc::new(store) as Arc<dyn DiskStore>),
                Ok(Err(error)) => Err(StoreError::Io(super::server::chain(&error))),
                Err(error) => Err(StoreError::Io(format!("opening the store did not end: {error}"))),
            }
        })
    })
}

/// Serves a volume to a VM on a socket, with a record of requests in flight beside it.
pub(crate) fn target_starter(_paths: &NodePaths) -> TargetStarter {
    Arc::new(|volume, _socket, _device| {
        Err(format!("volume {volume} cannot be served to a VM by this build"))
    })
}
