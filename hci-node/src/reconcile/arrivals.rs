//! Runs that come from another node while their guests run: the node that they come to.
//!
//! The planner has started a VMM that waits for its guest, beside volumes and ports in standby. Pieces arrive on streams of their own, in any
//! order, and wait here for their turn. [`TakeOver`] is the switch: once the guest is made of what came, it is committed that the VM is here, and
//! the guest runs.
//!
//! # Invariants
//! - A guest that came runs only when it is committed that its VM is here.
//! - Pieces are taken from the node that the VM is on, for the run that is to arrive, in order, once.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use netfabric::rpc::{Caller, ErrorCode, RpcError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::{
    cluster::{Cluster, ProposeError},
    observed::Vcpus,
};
use crate::{
    paths::NodePaths,
    state::{NodeId, Op, RunEpoch, VmId},
    vmm_role::protocol::{self, AwaitGuest, BringFlow, BringState, GuestState, Resume, Status},
};

/// How long a piece waits for those before it.
const TURN_PATIENCE: Duration = Duration::from_secs(10);

/// Asks whether a run can take pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ArrivalStatus {
    /// The VM.
    pub vm: VmId,
    /// The run that is to arrive.
    pub epoch: RunEpoch,
}

/// Whether it can.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Arrival {
    /// It can.
    Ready,
    /// Not yet, for this reason.
    NotYet(String),
}

/// Brings a piece of a guest, as bulk data. Answered when its VMM has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BringPiece {
    /// The VM.
    pub vm: VmId,
    /// The run that is to arrive.
    pub epoch: RunEpoch,
    /// How much comes before it.
    pub at: u64,
}

/// All pieces were brought, and the guest does not run where they came from: it goes on here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TakeOver {
    /// The VM.
    pub vm: VmId,
    /// The run that has arrived.
    pub epoch: RunEpoch,
    /// Whether its processors run from now on.
    pub vcpus: Vcpus,
}

/// How much of an arriving run was taken.
struct Arriving {
    epoch: RunEpoch,
    taken: Arc<watch::Sender<u64>>,
}

/// The runs on their way here.
#[derive(Clone)]
pub(super) struct Arrivals {
    me: NodeId,
    paths: NodePaths,
    cluster: Arc<dyn Cluster>,
    arriving: Arc<Mutex<BTreeMap<VmId, Arriving>>>,
}

fn refused(why: impl Into<String>) -> RpcError {
    RpcError::new(ErrorCode::Refused, why)
}

fn internal(error: impl std::fmt::Display) -> RpcError {
    RpcError::new(ErrorCode::Internal, error.to_string())
}

impl Arrivals {
    pub(super) fn new(me: NodeId, paths: NodePaths, cluster: Arc<dyn Cluster>) -> Self {
        Self { me, paths, cluster, arriving: Arc::default() }
    }

    /// Only the node that a VM is on may bring it.
    fn check(&self, from: Caller, vm: VmId, epoch: RunEpoch) -> Result<PathBuf, RpcError> {
        let state = self.cluster.state().borrow().clone();
        let known = state.vms.get(&vm).filter(|vm| {
            vm.arriving(self.me).is_some_and(|migration| migration.epoch == epoch)
                && vm.assignment.is_some_and(|run| from == Caller::Node(run.node))
        });
        known.map(|_| self.paths.vm(vm).socket()).ok_or_else(|| refused("the VM is not expected here"))
    }

    pub(super) async fn status(&self, from: Caller, call: ArrivalStatus) -> Arrival {
        // This node's copy of the state may be a little behind.
        let socket = match self.check(from, call.vm, call.epoch) {
            Ok(socket) => socket,
            Err(error) => return Arrival::NotYet(error.message),
        };
        match protocol::call(&socket, &Status).await {
            Ok(status) if status.epoch == call.epoch => match status.guest {
                GuestState::Restoring(_) => Arrival::Ready,
                _ => Arrival::NotYet("its VMM has a guest already".to_owned()),
            },
            Ok(_) => Arrival::NotYet("another run of it is there".to_owned()),
            Err(error) => Arrival::NotYet(format!("its VMM does not answer: {error}")),
        }
    }

    fn taken(&self, vm: VmId, epoch: RunEpoch) -> Arc<watch::Sender<u64>> {
        let mut arriving = self.arriving.lock();
        let anew = || Arriving { epoch, taken: Arc::new(watch::Sender::new(0)) };
        let entry = arriving.entry(vm).or_insert_with(anew);
        if entry.epoch != epoch {
            *entry = anew();
        }
        entry.taken.clone()
    }

    pub(super) async fn bring(&self, from: Caller, call: BringPiece, piece: Bytes) -> Result<(), RpcError> {
        let BringPiece { vm, epoch, at } = call;
        let socket = self.check(from, vm, epoch)?;
        let taken = self.taken(vm, epoch);
        let mut turn = taken.subscribe();
        let its_turn = async { turn.wait_for(|taken| *taken >= at).await.is_ok_and(|taken| *taken == at) };
        match tokio::time::timeout(TURN_PATIENCE, its_turn).await {
            Ok(true) => {}
            Ok(false) => return Err(refused("this piece was brought before")),
            Err(_) => return Err(refused("the pieces before this one did not come")),
        }
        let length = piece.len() as u64;
        let order = BringState { at, flow: BringFlow::More };
        protocol::exchange(&socket, &order, piece)
            .await
            .map_err(|error| refused(format!("its VMM took no more of it: {error}")))?;
        taken.send_replace(at + length);
        Ok(())
    }

    pub(super) async fn take_over(&self, from: Caller, call: TakeOver) -> Result<(), RpcError> {
        let TakeOver { vm, epoch, vcpus } = call;
        let socket = self.check(from, vm, epoch)?;
        protocol::call(&socket, &AwaitGuest)
            .await
            .map_err(|error| refused(format!("its guest could not be made: {error}")))?;
        self.arriving.lock().remove(&vm);
        match self.cluster.propose(Op::VmArrived { vm, epoch }).await {
            Ok(_) => {}
            Err(ProposeError::Refused(refusal)) => return Err(refused(refusal.to_string())),
            // Should it have been committed all the same, the planner lets the guest run.
            Err(error) => return Err(internal(error)),
        }
        if vcpus == Vcpus::Running {
            // The planner sees to it once more if this fails.
            if let Err(error) = protocol::call(&socket, &Resume).await {
                tracing::warn!(%vm, epoch = epoch.0, %error, "a guest that arrived does not run yet");
            }
        }
        tracing::info!(%vm, epoch = epoch.0, "a VM has arrived");
        Ok(())
    }
}
