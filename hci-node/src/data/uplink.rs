//! The data process' side of `control.sock`: what storage asks of the control plane.

use std::{path::PathBuf, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use netfabric::rpc::{CallError, ErrorCode, Request, call_unix};
use storage::{
    config::VolumeConfig,
    control::{CommitError, ControlPlane, FreezeStep},
    ids::{DiskId, FreezeId, Generation, LayerRef, SegmentIndex, VolumeId},
};

use super::protocol::{
    ClosedClean, CommitRefusal, ControlCall, DataInstance, FreezeProgress, Hello, LayerMerged, Opened,
    ReplicaIn, ReplicaLeft, ReplicasOut,
};

/// How long a commit may take before storage is told to try again. A new leader is there within two seconds.
const COMMIT_DEADLINE: Duration = Duration::from_secs(5);
/// Greeting the control process needs no commit.
const HELLO_DEADLINE: Duration = Duration::from_secs(1);

/// Calls the control process of this node.
#[derive(Clone, Debug)]
pub(crate) struct Uplink {
    socket: Arc<PathBuf>,
}

impl Uplink {
    /// For the control process that serves this socket.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket: Arc::new(socket) }
    }

    /// Tells the control process that this instance has started, so that it configures it at once. When nobody is
    /// there to be told, the control process finds out by itself later.
    pub(crate) async fn hello(&self, instance: DataInstance) {
        if let Err(error) = exchange(&self.socket, &Hello { instance }, HELLO_DEADLINE).await {
            tracing::info!(%error, "the control process is not there yet");
        }
    }

    fn commit<C, T>(&self, call: C) -> BoxFuture<'static, Result<T, CommitError>>
    where
        C: ControlCall<Reply = Result<T, CommitRefusal>> + 'static,
        T: Send + 'static,
    {
        let socket = self.socket.clone();
        Box::pin(async move {
            match exchange(&socket, &call, COMMIT_DEADLINE).await {
                Ok(Ok(done)) => Ok(done),
                Ok(Err(refusal)) => Err(refusal.into()),
                Err(CallError::Remote(error)) if error.code == ErrorCode::Refused => {
                    Err(CommitError::Refused(error.message))
                }
                Err(error) => Err(CommitError::Unavailable(error.to_string())),
            }
        })
    }
}

async fn exchange<C: ControlCall>(
    socket: &std::path::Path,
    call: &C,
    deadline: Duration,
) -> Result<C::Reply, CallError> {
    Ok(call_unix(socket, Request::new(C::METHOD, call)?, deadline).await?.decode()?)
}

impl From<CommitRefusal> for CommitError {
    fn from(refusal: CommitRefusal) -> Self {
        match refusal {
            CommitRefusal::Fenced => Self::Fenced,
            CommitRefusal::Refused(reason) => Self::Refused(reason),
            CommitRefusal::Unavailable(reason) => Self::Unavailable(reason),
        }
    }
}

impl ControlPlane for Uplink {
    fn replicas_out(
        &self,
        volume: VolumeId,
        generation: Generation,
        disk: DiskId,
        reason: String,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.commit(ReplicasOut { volume, generation, disk, reason })
    }

    fn replica_in(
        &self,
        volume: VolumeId,
        generation: Generation,
        segment: SegmentIndex,
        disk: DiskId,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.commit(ReplicaIn { volume, generation, segment, disk })
    }

    fn replica_left(
        &self,
        volume: VolumeId,
        generation: Generation,
        segment: SegmentIndex,
        disk: DiskId,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.commit(ReplicaLeft { volume, generation, segment, disk })
    }

    fn opened(
        &self,
        volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'static, Result<(), CommitError>> {
        self.commit(Opened { volume, generation })
    }

    fn closed_clean(
        &self,
        volume: VolumeId,
        generation: Generation,
    ) -> BoxFuture<'static, Result<(), CommitError>> {
        self.commit(ClosedClean { volume, generation })
    }

    fn freeze_step(
        &self,
        volume: VolumeId,
        generation: Generation,
        freeze: FreezeId,
        step: FreezeStep,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.commit(FreezeProgress { volume, generation, freeze, step })
    }

    fn merged(
        &self,
        volume: VolumeId,
        generation: Generation,
        layer: LayerRef,
    ) -> BoxFuture<'static, Result<VolumeConfig, CommitError>> {
        self.commit(LayerMerged { volume, generation, layer })
    }
}
