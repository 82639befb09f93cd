//! What a node sees of its own processes: the input of the planner beside the cluster state.

use std::{collections::BTreeMap, collections::BTreeSet, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    data::protocol::{DataConfig, DataInstance, Observed as DataStatus},
    reconcile::plan::data::Leftover,
    state::{ContentHash, Generation, RunEpoch, VmId, VolumeId},
    vmm_role::record::Ended,
};

/// Everything that the planner looks at besides the cluster state.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Whether guests may run.
    pub standing: Standing,
    /// The data process; none while it does not answer or has no identity.
    pub data: Option<DataView>,
    /// VMM processes, running or ended and not yet forgotten.
    pub runs: BTreeMap<VmId, Run>,
    /// Kernels and initramfs that are complete on this node.
    pub boot_files: BTreeSet<ContentHash>,
    /// For how long data on this node's disks have been free to be removed.
    pub purgeable_for: BTreeMap<Leftover, Duration>,
}

/// Whether this node may run guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// The lease holds and the copy of the state is recent enough to act on.
    Leased,
    /// The lease holds, but the copy of the state is older than the lease: nothing is started yet.
    CatchingUp,
    /// No lease was seen since the control process started, but the one before may still hold: guests go on.
    #[default]
    Unknown,
    /// The lease ran out: no guest may run.
    Lapsed,
}

/// The data process, as it answered last.
#[derive(Clone, Debug)]
pub struct DataView {
    /// What it said.
    pub status: DataStatus,
    /// The configuration that this instance took last.
    pub applied: Option<Arc<DataConfig>>,
    /// Generations that were opened for this instance. Only what this instance opened itself may it serve: its
    /// predecessor may have had writes under way that it knows nothing of.
    pub grants: BTreeMap<VolumeId, Generation>,
}

impl DataView {
    /// Which run of the data process it is.
    pub fn instance(&self) -> DataInstance {
        self.status.instance
    }
}

/// A run of a VM on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which.
    pub epoch: RunEpoch,
    /// How far it is.
    pub phase: RunPhase,
}

/// How far a run is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunPhase {
    /// Its process is there.
    Alive {
        /// How long ago its power button was pressed by us.
        button_pressed: Option<Duration>,
        /// What was done with its processors by us; none when nobody knows: another control process did it, or it was cut off.
        vcpus: Option<Vcpus>,
    },
    /// Its process has ended.
    Ended(Ended),
}

/// What was done with a run's processors last, or is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vcpus {
    /// They run.
    Running,
    /// They are held.
    Held,
}
