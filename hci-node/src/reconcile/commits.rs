//! Serves `control.sock`: what the data process asks the cluster to commit.
//!
//! Each call becomes one command, and its answer comes from the state after that command. All are idempotent: the
//! data process repeats a call whose answer was lost.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use netfabric::rpc::{Caller, ErrorCode, Handler, Request, Response, RpcError};
use storage::config::{Access, VolumeConfig};
use tokio::sync::mpsc;

use super::{
    cluster::{Cluster, ProposeError},
    plan::convert,
};
use crate::{
    data::protocol::{
        ClosedClean, CommitRefusal, ControlCall, DataInstance, FreezeProgress, Hello, LayerMerged, Opened,
        ReplicaIn, ReplicaLeft, ReplicasOut,
    },
    paths::NodePaths,
    state::{Cleanliness, FreezeId, Op, Outcome, RefusalKind, SegmentIndex, Volume, VolumeUse},
};

/// Turns the data process' calls into commands.
pub struct CommitServer {
    cluster: Arc<dyn Cluster>,
    paths: NodePaths,
    /// Told when an instance of the data process has started.
    started: mpsc::Sender<DataInstance>,
}

impl CommitServer {
    /// A server that proposes to `cluster` and passes greetings on.
    pub fn new(cluster: Arc<dyn Cluster>, paths: NodePaths, started: mpsc::Sender<DataInstance>) -> Self {
        Self { cluster, paths, started }
    }

    fn commit(&self, op: Op) -> BoxFuture<'static, Result<Outcome, CommitRefusal>> {
        let proposed = self.cluster.propose(op);
        Box::pin(async move { proposed.await.map_err(refusal) })
    }

    async fn volume(&self, op: Op) -> Result<VolumeConfig, CommitRefusal> {
        match self.commit(op).await? {
            Outcome::Volume(volume) => Ok(convert::volume_config(&volume, self.access(&volume))),
            other => Err(CommitRefusal::Unavailable(format!("the answer makes no sense: {other:?}"))),
        }
    }

    /// How the volume is used here. The local copy of the state may be a step behind, but not in this: the use of an
    /// open volume changes only with its generation or through this node.
    fn access(&self, volume: &Volume) -> Access {
        let state = self.cluster.state().borrow().clone();
        match state.volume_use(volume) {
            VolumeUse::Guest(vm) => Access::VhostUser { socket: self.paths.block_socket(vm, volume.id) },
            VolumeUse::Internal | VolumeUse::Nothing => Access::Internal,
        }
    }

    async fn dispatch(&self, request: Request) -> Result<Response, RpcError> {
        match request.method {
            Hello::METHOD => {
                let Hello { instance } = request.decode()?;
                // When the queue is full, the reconciler is about to look anyway.
                let _ = self.started.try_send(instance);
                answer::<Hello>(&())
            }
            ReplicasOut::METHOD => {
                let ReplicasOut { volume, generation, disk, reason } = request.decode()?;
                let (volume, generation, disk) = (volume.into(), generation.into(), disk.into());
                let op = Op::ReplicasOut { volume, generation, disk, reason };
                answer::<ReplicasOut>(&self.volume(op).await)
            }
            ReplicaIn::METHOD => {
                let ReplicaIn { volume, generation, segment, disk } = request.decode()?;
                let id = volume.into();
                // Read before anything is proposed: a departure that is committed meanwhile refuses this return.
                let departures =
                    self.cluster.state().borrow().volumes.get(&id).map_or(0, |volume| volume.departures);
                let op = Op::ReplicaIn {
                    volume: id,
                    generation: generation.into(),
                    segment: SegmentIndex(segment.0),
                    disk: disk.into(),
                    departures,
                };
                answer::<ReplicaIn>(&self.volume(op).await)
            }
            ReplicaLeft::METHOD => {
                let ReplicaLeft { volume, generation, segment, disk } = request.decode()?;
                let op = Op::ReplicaLeft {
                    volume: volume.into(),
                    generation: generation.into(),
                    segment: SegmentIndex(segment.0),
                    disk: disk.into(),
                };
                answer::<ReplicaLeft>(&self.volume(op).await)
            }
            Opened::METHOD => {
                let Opened { volume, generation } = request.decode()?;
                let op = Op::VolumeOpened { volume: volume.into(), generation: generation.into() };
                answer::<Opened>(&self.commit(op).await.map(drop))
            }
            ClosedClean::METHOD => {
                let ClosedClean { volume, generation } = request.decode()?;
                let op = Op::CloseVolume {
                    volume: volume.into(),
                    generation: generation.into(),
                    cleanliness: Cleanliness::Clean,
                };
                answer::<ClosedClean>(&self.commit(op).await.map(drop))
            }
            FreezeProgress::METHOD => {
                let FreezeProgress { volume, generation, freeze, step } = request.decode()?;
                let op = Op::FreezeProgress {
                    volume: volume.into(),
                    generation: generation.into(),
                    freeze: FreezeId(freeze.0),
                    step: step.into(),
                };
                answer::<FreezeProgress>(&self.volume(op).await)
            }
            LayerMerged::METHOD => {
                let LayerMerged { volume, generation, layer } = request.decode()?;
                let op = Op::LayerMerged {
                    volume: volume.into(),
                    generation: generation.into(),
                    layer: layer.into(),
                };
                answer::<LayerMerged>(&self.volume(op).await)
            }
            other => Err(RpcError::unknown_method(other)),
        }
    }
}

fn answer<C: ControlCall>(reply: &C::Reply) -> Result<Response, RpcError> {
    Ok(Response::new(reply)?)
}

fn refusal(error: ProposeError) -> CommitRefusal {
    match error {
        // A volume that is gone has no current generation either.
        ProposeError::Refused(refusal)
            if matches!(refusal.kind, RefusalKind::Fenced | RefusalKind::NotFound) =>
        {
            CommitRefusal::Fenced
        }
        ProposeError::Refused(refusal) => CommitRefusal::Refused(refusal.detail),
        ProposeError::Unavailable(reason) => CommitRefusal::Unavailable(reason),
    }
}

/// The handler of `control.sock`.
pub struct CommitHandler(pub Arc<CommitServer>);

impl Handler for CommitHandler {
    fn handle(&self, from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
        let server = self.0.clone();
        Box::pin(async move {
            match from {
                Caller::Local => server.dispatch(request).await,
                Caller::Node(_) => Err(RpcError::new(ErrorCode::Refused, "only local processes may call")),
            }
        })
    }
}
