//! A small cluster for tests.

use std::net::SocketAddr;

use super::{command::*, *};

/// The n-th id of any kind.
pub(crate) fn id(n: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(0x4000_0000_0000_0000_8000_0000_0000 | (n << 96) | n)
}

pub(crate) fn node_id(n: u128) -> NodeId {
    NodeId::new(id(n))
}

pub(crate) fn disk_id(n: u128) -> DiskId {
    DiskId(id(100 + n))
}

pub(crate) fn command(op: Op) -> Command {
    Command { at: Timestamp(1_000_000), task: None, op }
}

pub(crate) fn new_node(n: u128) -> NewNode {
    let at = |port| SocketAddr::from(([192, 168, 1, n as u8], port));
    NewNode {
        id: node_id(n),
        name: format!("n{n}"),
        addresses: NodeAddresses { control: at(7400), storage: at(7401), frames: at(7402), api: at(7443) },
        public_key_pem: format!("key {n}"),
        certificate_pem: format!("certificate {n}"),
    }
}

pub(crate) fn token(n: u128, kind: TokenKind) -> Token {
    Token {
        id: TokenId(id(500 + n)),
        kind,
        secret: SecretHash([n as u8; 32]),
        created: Timestamp(0),
        expires: None,
        used_by: Default::default(),
    }
}

pub(crate) fn create_cluster() -> Command {
    command(Op::CreateCluster {
        cluster: Box::new(Cluster {
            id: ClusterId(id(1)),
            name: "prod".into(),
            ca_cert_pem: String::new(),
            ca_key_pem: CaKey(String::new()),
            ca_fingerprint: "sha256:00".into(),
            created: Timestamp(0),
        }),
        node: new_node(1),
        admin: token(1, TokenKind::Admin),
        join: Some(token(2, TokenKind::Join { uses_left: 100 })),
    })
}

/// A cluster of some nodes with a disk of 100 GiB each, an image with a kernel, and a network.
pub(crate) fn cluster(nodes: u128) -> ClusterState {
    let mut state = ClusterState::default();
    let mut run = |op| state.apply(&command(op)).map(|_| ()).unwrap();
    run(create_cluster().op);
    for n in 2..=nodes {
        run(Op::AddNode { node: new_node(n), token: TokenId(id(502)) });
    }
    for n in 1..=nodes {
        let disk = disk_id(n);
        run(Op::AddDisk {
            disk,
            node: node_id(n),
            path: "/dev/vdb".into(),
            wipe: WipePolicy::Refuse,
            key_salt: None,
        });
        run(Op::DiskReady { disk, store: "/store".into(), capacity_bytes: 100 << 30 });
    }
    let image = ImageId(id(200));
    run(Op::CreateImage {
        image,
        name: "debian".into(),
        cmdline: "console=ttyS0".into(),
        parts: vec![ImagePart::Kernel],
    });
    run(Op::BeginImagePart {
        image,
        part: ImagePart::Kernel,
        node: node_id(1),
        volume: None,
        file: Some(BootFile { hash: ContentHash([1; 32]), size_bytes: 1000 }),
        unreachable: vec![],
    });
    run(Op::CompleteImagePart { image, part: ImagePart::Kernel, node: node_id(1) });
    run(Op::CreateNetwork {
        network: NetworkId(id(300)),
        name: "lan".into(),
        subnet: "10.9.0.0/28".parse().unwrap(),
        gateway: None,
        mtu: 1500,
        dns: vec![],
        domain: "lan.internal".into(),
    });
    state
}

pub(crate) fn new_volume(n: u128, replicas: u8) -> NewVolume {
    NewVolume {
        id: VolumeId(id(1000 + n)),
        name: format!("v{n}"),
        size_bytes: 3 << 30,
        replicas,
        min_in_sync: None,
        durability: Durability::WriteBack,
        compression: Compression::Off,
    }
}

pub(crate) fn new_vm(n: u128, disks: Vec<NewVolume>) -> NewVm {
    NewVm {
        id: VmId(id(2000 + n)),
        name: format!("vm{n}"),
        vcpus: 1,
        cpu_model: vmm::CpuModel::Host,
        memory_bytes: 1 << 30,
        image: ImageId(id(200)),
        cmdline: None,
        disks,
        ports: vec![NewPort { id: PortId(id(3000 + n)), network: NetworkId(id(300)) }],
        preferred_node: None,
        near: None,
        desired: DesiredRun::Running,
        after_crash: AfterCrash::Restart,
        cloud_init: None,
        growth: Growth::default(),
    }
}
