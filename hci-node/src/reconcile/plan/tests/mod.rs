//! Tests of the planner: single decisions, and a small world in which every crash point is tried.

mod decisions;
mod moving;
mod world;

use std::{collections::BTreeMap, net::SocketAddr};

use storage::status::{
    DiskHealth, DiskStatus, DiskUsage, ScrubStatus, StorageStatus, VolumeState, VolumeStatus,
};
use uuid::Uuid;

use super::*;
use crate::{
    data::protocol::{DataInstance, LeaseState, Observed as DataStatus, Readiness},
    reconcile::observed::{DataView, Observed, Run, RunPhase, Standing, Vcpus},
    state::*,
};

/// The node that plans.
pub(super) fn me() -> NodeId {
    node(1)
}

pub(super) fn node(number: u128) -> NodeId {
    NodeId::from(Uuid::from_u128(number))
}

pub(super) fn disk(number: u128) -> DiskId {
    DiskId(Uuid::from_u128(0x10 + number))
}

pub(super) fn vm() -> VmId {
    VmId(Uuid::from_u128(0x20))
}

pub(super) fn volume() -> VolumeId {
    VolumeId(Uuid::from_u128(0x30))
}

fn port() -> PortId {
    PortId(Uuid::from_u128(0x40))
}

fn network() -> NetworkId {
    NetworkId(Uuid::from_u128(0x50))
}

pub(super) fn image() -> ImageId {
    ImageId(Uuid::from_u128(0x60))
}

pub(super) fn kernel() -> BootFile {
    BootFile { hash: ContentHash([7; 32]), size_bytes: 1000 }
}

fn instance(number: u128) -> DataInstance {
    DataInstance(Uuid::from_u128(0x70 + number))
}

pub(super) fn paths() -> NodePaths {
    NodePaths::new("/state", "/run")
}

fn member(number: u128) -> Node {
    let at = |port| SocketAddr::from(([10, 0, 0, u8::try_from(number).unwrap()], port));
    Node {
        id: node(number),
        name: format!("n{number}"),
        addresses: NodeAddresses { control: at(7400), storage: at(7401), frames: at(7402), api: at(7443) },
        public_key_pem: String::new(),
        certificate_pem: String::new(),
        joined: Timestamp(0),
        availability: Availability::Available,
        rack: None,
        service: NodeService::InService,
    }
}

fn pool_disk(number: u128) -> Disk {
    Disk {
        id: disk(number),
        node: node(number),
        path: format!("/dev/vd{number}"),
        store: Some(format!("/state/disks/{number}/store")),
        capacity_bytes: 100 << 30,
        state: DiskState::Ready,
        wipe: WipePolicy::Refuse,
        added: Timestamp(0),
        service: DiskService::InService,
        room: DiskRoom::Free,
        scrubs: 0,
        verified: Verified::default(),
        key_salt: None,
    }
}

/// Three nodes with a disk each, an image, a network, and a VM with a disk and a NIC that is meant to run.
pub(super) fn cluster() -> ClusterState {
    let mut state = ClusterState {
        cluster: Some(Cluster {
            id: ClusterId(Uuid::from_u128(1)),
            name: "test".to_owned(),
            ca_cert_pem: String::new(),
            ca_key_pem: CaKey(String::new()),
            ca_fingerprint: String::new(),
            created: Timestamp(0),
        }),
        nodes: (1..=3).map(|number| (node(number), member(number))).collect(),
        disks: (1..=3).map(|number| (disk(number), pool_disk(number))).collect(),
        images: BTreeMap::from([(
            image(),
            Image {
                id: image(),
                name: "linux".to_owned(),
                cmdline: "console=ttyS0".to_owned(),
                parts: BTreeMap::from([(ImagePart::Kernel, PartState::File(kernel()))]),
                created: Timestamp(0),
            },
        )]),
        next_vni: 100,
        ..ClusterState::default()
    };
    apply(
        &mut state,
        Op::CreateNetwork {
            network: network(),
            name: "lan".to_owned(),
            subnet: "10.1.0.0/24".parse().unwrap(),
            gateway: None,
            mtu: 1500,
            dns: Vec::new(),
            domain: String::new(),
        },
    );
    let volume = command::NewVolume {
        id: volume(),
        name: "v".to_owned(),
        size_bytes: 1 << 30,
        replicas: 3,
        min_in_sync: None,
        durability: Durability::WriteBack,
        compression: Compression::Off,
    };
    apply(
        &mut state,
        Op::CreateVm {
            vm: command::NewVm {
                id: vm(),
                name: "web".to_owned(),
                vcpus: 2,
                cpu_model: vmm::CpuModel::Host,
                memory_bytes: 1 << 30,
                image: image(),
                cmdline: None,
                disks: vec![volume],
                ports: vec![command::NewPort { id: port(), network: network() }],
                preferred_node: None,
                near: Some(me()),
                after_crash: AfterCrash::Restart,
                desired: DesiredRun::Running,
                cloud_init: Some(CloudInit { hostname: Some("front".to_owned()), ..Default::default() }),
                growth: Default::default(),
            },
            unreachable: Vec::new(),
        },
    );
    state
}

pub(super) fn apply(state: &mut ClusterState, op: Op) -> Outcome {
    let shown = format!("{op:?}");
    state.apply(&Command { at: Timestamp(1), task: None, op }).unwrap_or_else(|why| panic!("{shown}: {why}"))
}

/// Assigns the VM to a node, as the leader does.
pub(super) fn assign(state: &mut ClusterState, to: NodeId) {
    let expected = state.vms[&vm()].epoch;
    let op = Op::AssignVm {
        vm: vm(),
        node: to,
        expected,
        reason: command::AssignReason::Start,
        unreachable: Vec::new(),
    };
    apply(state, op);
}

/// A data process that has just started.
pub(super) fn fresh_data(number: u128) -> DataView {
    let disks = vec![DiskStatus {
        id: disk(1).into(),
        usage: DiskUsage { used: storage::ids::ByteSize(0), total: storage::ids::ByteSize(1 << 30) },
        health: DiskHealth::Ok,
        scrub: ScrubStatus::default(),
        volumes: Vec::new(),
    }];
    DataView {
        status: DataStatus {
            instance: instance(number),
            revision: None,
            lease: LeaseState::Held,
            readiness: Readiness::Ready,
            storage: StorageStatus { volumes: Vec::new(), disks },
            smart: BTreeMap::new(),
        },
        applied: None,
        grants: BTreeMap::new(),
    }
}

pub(super) fn volume_status(state: &ClusterState, now: VolumeState) -> VolumeStatus {
    VolumeStatus {
        id: volume().into(),
        generation: state.volumes[&volume()].generation.into(),
        state: now,
        replicas: Vec::new(),
    }
}

pub(super) fn observed(data: Option<DataView>) -> Observed {
    Observed {
        standing: Standing::Leased,
        data,
        runs: BTreeMap::new(),
        boot_files: [kernel().hash].into_iter().collect(),
        purgeable_for: BTreeMap::new(),
    }
}

pub(super) fn plan_for(state: &ClusterState, observed: &Observed) -> Plan {
    plan(View { me: me(), paths: &paths(), state, observed })
}

pub(super) fn alive(epoch: u64) -> Run {
    with_vcpus(epoch, Some(Vcpus::Running))
}

/// A run whose processors are known to be so.
pub(super) fn with_vcpus(epoch: u64, vcpus: Option<Vcpus>) -> Run {
    Run { epoch: RunEpoch(epoch), phase: RunPhase::Alive { button_pressed: None, vcpus } }
}
