//! Serves `data.sock`: decodes calls, hands them to the [`Engine`], encodes answers.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use netfabric::rpc::{Caller, ErrorCode, Handler, MAX_BULK, Request, Response, RpcError, codec};
use storage::status::StorageStatus;

use super::{
    disks::{inventory, keyring::Keyring, prepare},
    engine::Engine,
    protocol::{
        Apply, CopyVolume, DataCall, DataConfig, DataInstance, DeleteParts, DeleteVolume, FormatDisk,
        FormattedDisk, HandOver, LeaseState, ListDisks, LocalDisk, Metrics, Observed, Readiness, RenewLease,
        Status, VolumeFlush, VolumeRead, VolumeWrite,
    },
};
use crate::{paths::NodePaths, state};

/// How long a look at the disks, and a preparation, wait for their turn.
const LIST_PATIENCE: Duration = Duration::from_secs(2);
const FORMAT_PATIENCE: Duration = Duration::from_secs(60);

/// The handler of `data.sock`. It is there before the node has an identity; the engine comes later.
#[derive(Clone)]
pub(crate) struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    instance: DataInstance,
    paths: NodePaths,
    engine: OnceLock<Arc<Engine>>,
    /// Held while disks are prepared or looked at: both open devices for themselves alone, so that one would find a
    /// device in use only because the other one has it.
    disks: tokio::sync::Mutex<()>,
}

impl Server {
    pub(crate) fn new(instance: DataInstance, paths: NodePaths) -> Self {
        let shared = Shared { instance, paths, engine: OnceLock::new(), disks: Default::default() };
        Self { shared: Arc::new(shared) }
    }

    /// From now on calls reach this engine. Only the first call counts.
    pub(crate) fn ready(&self, engine: Arc<Engine>) {
        if self.shared.engine.set(engine).is_err() {
            tracing::warn!("the data engine was started twice");
        }
    }

    /// The running data plane.
    pub(super) fn engine(&self) -> Result<Arc<Engine>, RpcError> {
        let unjoined = || RpcError::new(ErrorCode::Unavailable, "this node is in no cluster yet");
        self.shared.engine.get().cloned().ok_or_else(unjoined)
    }

    fn observed(&self) -> Observed {
        match self.shared.engine.get() {
            Some(engine) => engine.observed(),
            None => Observed {
                instance: self.shared.instance,
                revision: None,
                lease: LeaseState::Lapsed,
                readiness: Readiness::Unjoined,
                storage: StorageStatus::default(),
                smart: BTreeMap::new(),
            },
        }
    }

    async fn dispatch(self, request: Request) -> Result<Response, RpcError> {
        match request.method {
            Apply::METHOD => answer(&request, |call: Apply| self.apply(call, request.bulk.clone())).await,
            RenewLease::METHOD => {
                answer(&request, async |call: RenewLease| {
                    self.engine()?.renew_lease(call.until);
                    Ok(())
                })
                .await
            }
            Status::METHOD => answer(&request, async |_: Status| Ok(self.observed())).await,
            Metrics::METHOD => answer(&request, async |_: Metrics| Ok(self.engine()?.metrics())).await,
            VolumeRead::METHOD => self.read(request.decode()?).await,
            VolumeWrite::METHOD => {
                answer(&request, async |call: VolumeWrite| {
                    self.engine()?.write(call.volume, call.offset, request.bulk.clone()).await
                })
                .await
            }
            VolumeFlush::METHOD => {
                answer(&request, async |call: VolumeFlush| self.engine()?.flush(call.volume).await).await
            }
            CopyVolume::METHOD => {
                answer(&request, async |call: CopyVolume| self.engine()?.copy(call).await).await
            }
            FormatDisk::METHOD => answer(&request, |call: FormatDisk| self.format(call)).await,
            ListDisks::METHOD => answer(&request, |_: ListDisks| self.list_disks()).await,
            DeleteVolume::METHOD => {
                answer(&request, async |call: DeleteVolume| self.engine()?.delete(call.volume).await).await
            }
            DeleteParts::METHOD => {
                answer(&request, async |call: DeleteParts| self.engine()?.delete_parts(&call).await).await
            }
            HandOver::METHOD => {
                answer(&request, async |call: HandOver| self.engine()?.hand_over(call).await).await
            }
            other => Err(RpcError::unknown_method(other)),
        }
    }

    async fn apply(&self, call: Apply, bulk: Bytes) -> Result<Observed, RpcError> {
        if call.instance != self.shared.instance {
            return Err(RpcError::new(ErrorCode::Refused, "the data process has been restarted"));
        }
        let config: DataConfig = codec::decode(&bulk)?;
        let engine = self.engine()?;
        engine.apply(config).await?;
        Ok(engine.observed())
    }

    async fn read(&self, call: VolumeRead) -> Result<Response, RpcError> {
        if call.length as usize > MAX_BULK {
            return Err(RpcError::new(ErrorCode::Malformed, format!("more than {MAX_BULK} bytes at once")));
        }
        let data = self.engine()?.read(call.volume, call.offset, u64::from(call.length)).await?;
        Ok(Response::new(&())?.with_bulk(data))
    }

    /// The right to open disks. A broken disk may hold up whoever has it, so nobody waits without end.
    async fn disks(&self, patience: Duration) -> Result<tokio::sync::MutexGuard<'_, ()>, RpcError> {
        let busy =
            |_| RpcError::new(ErrorCode::Unavailable, "the disks of this node are busy; it is tried again");
        tokio::time::timeout(patience, self.shared.disks.lock()).await.map_err(busy)
    }

    async fn list_disks(&self) -> Result<Vec<LocalDisk>, RpcError> {
        let _alone = self.disks(LIST_PATIENCE).await?;
        let disks = blocking(inventory::list).await?;
        disks.map_err(|error| RpcError::new(ErrorCode::Internal, format!("cannot list the disks: {error}")))
    }

    async fn format(&self, call: FormatDisk) -> Result<FormattedDisk, RpcError> {
        let _alone = self.disks(FORMAT_PATIENCE).await?;
        let link = self.shared.paths.disk(state::DiskId(call.disk.0));
        let keyring = Keyring::new(self.shared.paths.identity());
        let prepare = move || {
            let key = call.key_salt.map(|salt| keyring.key_for_new(call.disk, salt, call.secret)).transpose();
            let key = key.map_err(prepare::PrepareError::Key)?;
            prepare::prepare(call.disk, &call.path, call.wipe, key.as_ref(), &link)
        };
        blocking(prepare).await?.map_err(|error| RpcError::new(ErrorCode::Refused, chain(&error)))
    }
}

impl Handler for Server {
    fn handle(&self, from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        let server = self.clone();
        Box::pin(async move {
            match from {
                Caller::Local => server.dispatch(request).await,
                Caller::Node(_) => Err(RpcError::new(ErrorCode::Refused, "only local processes may call")),
            }
        })
    }
}

async fn answer<C, F>(request: &Request, serve: impl FnOnce(C) -> F) -> Result<Response, RpcError>
where
    C: DataCall,
    F: Future<Output = Result<C::Reply, RpcError>>,
{
    let reply = serve(request.decode()?).await?;
    Ok(Response::new(&reply)?)
}

/// Runs what blocks on a thread where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RpcError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| RpcError::new(ErrorCode::Internal, format!("the work was not finished: {error}")))
}

/// An error with all its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut said = BTreeSet::from([text.clone()]);
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if said.insert(cause_text.clone()) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
