//! From the cluster state's types to those of the libraries, which know nothing of the cluster.

use netfabric::overlay;
use storage::{config, control::FreezeStep, ids};

use crate::state::{
    self, Cleanliness, Compression, DiskId, Durability, FreezeStage, Generation, LayerRef, MacAddr, PortId,
    Replica, ReplicaState, Tenure, Volume, VolumeId,
};

impl From<DiskId> for ids::DiskId {
    fn from(id: DiskId) -> Self {
        Self(id.0)
    }
}

impl From<ids::DiskId> for DiskId {
    fn from(id: ids::DiskId) -> Self {
        Self(id.0)
    }
}

impl From<VolumeId> for ids::VolumeId {
    fn from(id: VolumeId) -> Self {
        Self(id.0)
    }
}

impl From<ids::VolumeId> for VolumeId {
    fn from(id: ids::VolumeId) -> Self {
        Self(id.0)
    }
}

impl From<Generation> for ids::Generation {
    fn from(generation: Generation) -> Self {
        Self(generation.0)
    }
}

impl From<ids::Generation> for Generation {
    fn from(generation: ids::Generation) -> Self {
        Self(generation.0)
    }
}

impl From<LayerRef> for ids::LayerRef {
    fn from(layer: LayerRef) -> Self {
        Self { volume: layer.volume.into(), layer: ids::LayerId(layer.number) }
    }
}

impl From<ids::LayerRef> for LayerRef {
    fn from(layer: ids::LayerRef) -> Self {
        Self { volume: layer.volume.into(), number: layer.layer.0 }
    }
}

impl From<FreezeStep> for state::FreezeStep {
    fn from(step: FreezeStep) -> Self {
        match step {
            FreezeStep::Held => Self::Held,
            FreezeStep::Switched => Self::Switched,
            FreezeStep::Abandoned => Self::Abandoned,
        }
    }
}

impl From<PortId> for overlay::PortId {
    fn from(id: PortId) -> Self {
        Self::new(id.0)
    }
}

impl From<MacAddr> for overlay::MacAddr {
    fn from(mac: MacAddr) -> Self {
        Self::new(mac.0)
    }
}

/// A volume as its coordinator is told.
pub fn volume_config(volume: &Volume, access: config::Access) -> config::VolumeConfig {
    let segments = volume.segments.iter().zip(0..).map(|(segment, index)| config::SegmentConfig {
        index: ids::SegmentIndex(index),
        replicas: segment.replicas.iter().map(replica_config).collect(),
    });
    config::VolumeConfig {
        id: volume.id.into(),
        size: ids::ByteSize(volume.size_bytes),
        generation: volume.generation.into(),
        min_in_sync: volume.min_in_sync,
        durability: match volume.durability {
            Durability::WriteBack => config::Durability::WriteBack,
            Durability::WriteThrough => config::Durability::WriteThrough,
        },
        compression: match volume.compression {
            Compression::Off => storage::store::Compression::Off,
            Compression::Lz4 => storage::store::Compression::Lz4,
        },
        clean: match volume.cleanliness {
            Cleanliness::Clean => config::CleanState::Clean,
            Cleanliness::Unclean => config::CleanState::Unclean,
        },
        segments: segments.collect(),
        access,
        limits: config::Limits {
            operations_per_second: volume.limits.operations_per_second,
            bytes_per_second: volume.limits.bytes_per_second,
        },
        layers: layers_config(volume),
    }
}

fn layers_config(volume: &Volume) -> config::LayersConfig {
    let layers = &volume.layers;
    config::LayersConfig {
        revision: layers.revision,
        chain: layers.chain.iter().map(|layer| (*layer).into()).collect(),
        kept: layers.kept().into_iter().map(Into::into).collect(),
        unsettled: u32::try_from(layers.unsettled(volume.id)).unwrap_or(u32::MAX),
        freeze: layers.freeze.map(|pending| config::Freeze {
            id: ids::FreezeId(pending.id.0),
            stage: match pending.stage {
                FreezeStage::Hold => config::FreezeStage::Hold,
                FreezeStage::Switch => config::FreezeStage::Switch,
            },
        }),
        merge: layers.merge.map(Into::into),
    }
}

fn replica_config(replica: &Replica) -> config::ReplicaConfig {
    config::ReplicaConfig {
        disk: replica.disk.into(),
        node: replica.node,
        state: match replica.state {
            ReplicaState::InSync => config::ReplicaState::InSync,
            ReplicaState::OutOfSync => config::ReplicaState::OutOfSync,
        },
        tenure: match replica.tenure {
            Tenure::Stays => config::Tenure::Stays,
            Tenure::Leaves => config::Tenure::Leaves,
        },
    }
}
