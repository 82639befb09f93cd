//! The JSON resources of `/v1`, shared by server and command line.
//!
//! Stable: fields are added, never changed in meaning. Ids are strings, sizes are in bytes, times are RFC 3339.

mod devices;
mod guest;
mod storage;

pub use devices::*;
pub use guest::*;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
pub use storage::*;
use vmm::CpuModel;

pub use crate::state::AfterCrash;

/// A list of resources.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct List<T> {
    /// The resources.
    pub items: Vec<T>,
}

/// Health in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// All is as it should be.
    Healthy,
    /// Everything works, but less may fail now than should.
    Degraded,
    /// Something does not work.
    Critical,
}

/// `GET /v1/status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the cluster; none when the node has not joined one.
    pub cluster: Option<String>,
    /// In one word.
    pub health: Health,
    /// What is not as it should be, worst first.
    pub problems: Vec<StatusProblem>,
    /// What may be lost now without harm, as a sentence.
    pub can_lose: String,
    /// Number of nodes that may be lost now without harm.
    pub can_lose_nodes: u32,
    /// Name of the leader.
    pub leader: Option<String>,
    /// Nodes in all.
    pub nodes: u32,
    /// Nodes that are there.
    pub nodes_available: u32,
    /// Disks in all.
    pub disks: u32,
    /// Volumes in all.
    pub volumes: u32,
    /// Volumes with fewer copies than wanted.
    pub volumes_degraded: u32,
    /// Copies on their way to another disk.
    pub moves: u32,
    /// VMs in all.
    pub vms: u32,
    /// VMs that run.
    pub vms_running: u32,
    /// Capacity of all disks.
    pub raw_bytes: u64,
    /// Used on all disks.
    pub used_bytes: u64,
    /// What fits at three copies (or as many as there are nodes).
    pub usable_bytes: u64,
    /// Copies that `usable_bytes` counts with.
    pub usable_copies: u32,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusProblem {
    /// How bad it is.
    pub health: Health,
    /// `node`, `disk`, `volume` or `vm`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// What is wrong, as a sentence.
    pub message: String,
}

/// `GET /v1/cluster`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `sha256:…` of its authority's certificate.
    pub ca_fingerprint: String,
    /// Certificate of its authority.
    pub ca_pem: String,
    /// Name of the leader.
    pub leader: Option<String>,
    /// Number of commands applied here.
    pub revision: u64,
    /// When it was created.
    pub created: String,
}

/// `POST /v1/cluster`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateCluster {
    /// Its name.
    pub name: String,
    /// Name of this node; its host name when none.
    #[serde(default)]
    pub node_name: Option<String>,
}

/// Answer to `POST /v1/cluster`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterCreated {
    /// The cluster.
    pub cluster: ClusterInfo,
    /// The admin token. It is shown this once.
    pub admin_token: String,
}

/// `POST /v1/cluster/join`, on the local socket of a node that is in no cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinCluster {
    /// The token string, which carries addresses and fingerprint.
    pub token: String,
    /// Name of this node; its host name when none.
    #[serde(default)]
    pub node_name: Option<String>,
}

/// Answer to `POST /v1/cluster/join`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterJoined {
    /// Name of the cluster.
    pub cluster: String,
    /// Name of this node in it.
    pub node: String,
    /// Id of this node.
    pub node_id: String,
}

/// `POST /v1/cluster/tokens`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// What it is good for.
    #[serde(default)]
    pub kind: TokenPurpose,
    /// How many nodes may join with it; 1 when none.
    #[serde(default)]
    pub uses: Option<u32>,
    /// How long it is good; a day when none for joining, for ever for the API.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
}

/// What a token is good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenPurpose {
    /// Joining.
    #[default]
    Join,
    /// The API.
    Admin,
}

/// Answer to `POST /v1/cluster/tokens`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenCreated {
    /// The token string. It is shown this once.
    pub token: String,
    /// What is kept of it.
    pub info: Token,
}

/// Answer to `POST /v1/vms/NAME/display/tickets`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DisplayTicket {
    /// Where a browser shows the VM's screen. Good for one time: what is behind `#` is a secret.
    pub url: String,
    /// When it is not good any more, as RFC 3339.
    pub expires: String,
    /// `sha256:…` of the certificate that the node shows to browsers.
    pub certificate: Option<String>,
}

/// A token without its secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Token {
    /// Its id.
    pub id: String,
    /// What it is good for.
    pub kind: TokenPurpose,
    /// Uses left, for joining.
    pub uses_left: Option<u32>,
    /// When it ends.
    pub expires: Option<String>,
    /// When it was created.
    pub created: String,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Whether it is there.
    pub state: NodeState,
    /// Its part in consensus: `leader`, `voter`, `learner` or `joining`.
    pub role: String,
    /// Since when it is lost.
    pub lost_since: Option<String>,
    /// Its address in the control mesh.
    pub address: String,
    /// Its API.
    pub api: String,
    /// Version of its executable.
    pub version: Option<String>,
    /// Its CPUs.
    pub cpus: Option<u16>,
    /// The CPU models that VMs on it can have; none when it has no KVM.
    pub cpu_models: Option<BTreeSet<CpuModel>>,
    /// Its memory.
    pub memory_bytes: Option<u64>,
    /// Its memory that is available.
    pub memory_available_bytes: Option<u64>,
    /// VMs assigned to it.
    pub vms: u32,
    /// Disks of the pool in it.
    pub disks: u32,
    /// Whether it is meant to carry anything.
    pub service: NodeService,
    /// The failure domain that it shares with others.
    pub rack: Option<String>,
    /// Whether its data process answers.
    pub data_process_up: Option<bool>,
    /// When it joined.
    pub joined: String,
}

/// `PATCH /v1/nodes/NAME`: what is given is changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetNode {
    /// The failure domain that it shares with others; empty takes the label away.
    #[serde(default)]
    pub rack: Option<String>,
}

/// Whether a node is meant to carry anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeService {
    /// It is.
    InService,
    /// It is emptied of VMs.
    Draining,
    /// It is emptied and leaves the cluster.
    Leaving,
}

/// Whether a node is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// It renews its lease.
    Available,
    /// Its lease ran out.
    Lost,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// How far it is.
    pub state: ImageState,
    /// Kernel command line of its VMs.
    pub cmdline: String,
    /// Its parts.
    pub parts: Vec<ImagePart>,
    /// When it was created.
    pub created: String,
}

/// How far an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageState {
    /// Some parts are not there yet.
    Incomplete,
    /// VMs can be made from it.
    Ready,
}

/// A part of an image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImagePart {
    /// `kernel`, `initramfs` or `disk`.
    pub part: String,
    /// `awaiting`, `fetching`, `importing` or `ready`.
    pub state: String,
    /// Its size.
    pub size_bytes: Option<u64>,
    /// BLAKE3 of its content, for a kernel or initramfs.
    pub blake3: Option<String>,
    /// Where a node fetches it from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// `POST /v1/images/NAME/PART`: the node that answers fetches the part by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchImagePart {
    /// A URL, http or https; or
    pub url: Option<String>,
    /// a file of the node, by its absolute path. Only over the node's own socket.
    pub file: Option<String>,
    /// What the SHA-256 of the source must be.
    pub sha256: Option<String>,
}

/// `GET /v1/images/NAME/PART`: how much of an upload that broke off this node has.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct UploadOffset {
    /// Where to go on.
    pub offset: u64,
}

/// `GET /v1/volumes/NAME/export`, `GET /v1/images/NAME/export`: the query.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportQuery {
    /// A snapshot of the volume, by name or id.
    pub snapshot: Option<String>,
    /// Where to start, in bytes; a multiple of 4096.
    #[serde(default)]
    pub from: u64,
}

/// `POST /v1/images`: which parts will come. Each is then sent with `PUT /v1/images/NAME/PART`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateImage {
    /// Its name.
    pub name: String,
    /// Whether a kernel will come.
    #[serde(default)]
    pub kernel: bool,
    /// Whether an initramfs will come.
    #[serde(default)]
    pub initramfs: bool,
    /// Whether a disk will come.
    #[serde(default)]
    pub disk: bool,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Network {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its number on the wire.
    pub vni: u32,
    /// Its addresses.
    pub subnet: String,
    /// Its gateway.
    pub gateway: String,
    /// MTU of its guests.
    pub mtu: u16,
    /// Name servers.
    pub dns: Vec<String>,
    /// Domain.
    pub domain: String,
    /// NICs on it.
    pub ports: u32,
    /// When it was created.
    pub created: String,
}

/// `POST /v1/networks`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateNetwork {
    /// Its name.
    pub name: String,
    /// Its addresses, as `10.9.0.0/24`.
    pub subnet: String,
    /// Its gateway; the first address when none.
    #[serde(default)]
    pub gateway: Option<String>,
    /// MTU of its guests; 1500 when none.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Name servers.
    #[serde(default)]
    pub dns: Vec<String>,
    /// Domain; `NAME.internal` when none.
    #[serde(default)]
    pub domain: Option<String>,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: VmState,
    /// What it waits for, or how it ended.
    pub message: Option<String>,
    /// Whether it is meant to run.
    pub desired: VmDesired,
    /// What becomes of it after a crash.
    pub after_crash: AfterCrash,
    /// Name of its node.
    pub node: Option<String>,
    /// How often it was assigned to a node.
    pub epoch: u64,
    /// Its CPUs.
    pub vcpus: u8,
    /// What these show its guest of the node's.
    pub cpu_model: CpuModel,
    /// Its memory.
    pub memory_bytes: u64,
    /// Name of its image.
    pub image: String,
    /// Its kernel command line.
    pub cmdline: String,
    /// Its disks: names of volumes.
    pub disks: Vec<VmDisk>,
    /// Its NICs.
    pub nics: Vec<VmNic>,
    /// When it was created.
    pub created: String,
    /// What its guest's cloud-init is told, if anything.
    pub cloud_init: Option<CloudInitGiven>,
    /// By which addresses it is reached: its guest's, if its agent tells them, or else those of its NICs.
    pub addresses: Vec<String>,
    /// What the agent in its guest says, if one answers.
    pub agent: Option<GuestAgent>,
    /// Its present machine, if it runs.
    pub machine: Option<Machine>,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmDisk {
    /// Name of the volume.
    pub volume: String,
    /// Its size.
    pub size_bytes: u64,
    /// How far it is.
    pub state: DeviceState,
}

/// A NIC of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmNic {
    /// Name of the network.
    pub network: String,
    /// Its Ethernet address.
    pub mac: String,
    /// Its address.
    pub ip: String,
    /// How far it is.
    pub state: DeviceState,
}

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// It does not run and is not meant to.
    Stopped,
    /// It has no node yet, and is meant to run.
    Pending,
    /// Its node brings it up.
    Starting,
    /// It runs.
    Running,
    /// It runs, and is being moved to another node meanwhile.
    Migrating,
    /// Its processors are held.
    Paused,
    /// It is being written to a volume.
    Suspending,
    /// It does not run, and goes on where it was when it does again.
    Suspended,
    /// It is on its way down.
    Stopping,
    /// Its node does not answer.
    Unknown,
}

/// Whether a VM is meant to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmDesired {
    /// It is.
    Running,
    /// It is there, but its processors are to be held.
    Paused,
    /// It is to be kept in a volume, to go on later.
    Suspended,
    /// It is not.
    Stopped,
}

/// `POST /v1/vms`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// Its name.
    pub name: String,
    /// The image that it boots, by name or id.
    pub image: String,
    /// Its CPUs; 1 when none.
    #[serde(default)]
    pub vcpus: Option<u8>,
    /// Its CPU model; when none, the highest level that all nodes have.
    #[serde(default)]
    pub cpu_model: Option<CpuModel>,
    /// Its memory; 1 GiB when none.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Its disks.
    #[serde(default)]
    pub disks: Vec<CreateVmDisk>,
    /// The networks of its NICs, by name or id.
    #[serde(default)]
    pub networks: Vec<String>,
    /// The node that it should run on, by name or id.
    #[serde(default)]
    pub node: Option<String>,
    /// Kernel command line; the image's when none.
    #[serde(default)]
    pub cmdline: Option<String>,
    /// What becomes of it after a crash; it is started again when none.
    #[serde(default)]
    pub after_crash: Option<AfterCrash>,
    /// Whether it is only created, not started.
    #[serde(default)]
    pub stopped: bool,
    /// What its guest's cloud-init is told.
    #[serde(default)]
    pub cloud_init: Option<CloudInit>,
    /// The most CPUs that it can get while it runs; four times as many as it starts with when none.
    #[serde(default)]
    pub max_vcpus: Option<u8>,
    /// The most memory that it can get while it runs; four times as much as it starts with, or 64 GiB more, when none.
    #[serde(default)]
    pub max_memory_bytes: Option<u64>,
}

/// A disk in `POST /v1/vms`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVmDisk {
    /// Its size.
    pub size_bytes: u64,
    /// How many copies; 3 when none, or as many as there are nodes with disks.
    #[serde(default)]
    pub replicas: Option<u8>,
}

/// `PATCH /v1/vms/NAME`: what is given is changed. A VM that runs grows and shrinks as far as it can, and has the rest from its next run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetVm {
    /// Its CPUs.
    #[serde(default)]
    pub vcpus: Option<u8>,
    /// Its CPU model.
    #[serde(default)]
    pub cpu_model: Option<CpuModel>,
    /// Its memory.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// What becomes of it after a crash.
    #[serde(default)]
    pub after_crash: Option<AfterCrash>,
    /// The most CPUs that its runs can get, from the next one on; four times as many as it starts with when none.
    #[serde(default)]
    pub max_vcpus: Option<u8>,
    /// The most memory that its runs can get, from the next one on; four times as much as it starts with, or 64 GiB more, when none.
    #[serde(default)]
    pub max_memory_bytes: Option<u64>,
}

/// `POST /v1/vms/NAME/start`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartVm {
    /// Whether a suspended VM is started anew: what it would go on with is lost.
    #[serde(default)]
    pub discard_state: bool,
}

/// `POST /v1/vms/NAME/stop`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopVm {
    /// Whether it is killed instead of asked.
    #[serde(default)]
    pub force: bool,
    /// Whether a suspended VM is off from now on: what it would go on with is lost.
    #[serde(default)]
    pub discard_state: bool,
}

/// `POST /v1/vms/NAME/migrate`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateVm {
    /// The node that it goes to, by name or id; one that has room when none.
    #[serde(default)]
    pub node: Option<String>,
    /// Whether it stays on its node and goes on in a new process there. Then nothing else is said.
    #[serde(default)]
    pub in_place: bool,
    /// Bytes that may be sent in a second; no limit when none.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
    /// The longest pause that is taken for a guest that writes fast; 500 when none.
    #[serde(default)]
    pub longest_pause_ms: Option<u32>,
}

/// `POST /v1/vms/NAME/restart`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestartVm {
    /// Whether it is killed instead of asked.
    #[serde(default)]
    pub force: bool,
}

/// Answer to every change: 202 with the task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accepted {
    /// The task.
    pub task: Task,
}

/// A task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    /// Its id.
    pub id: String,
    /// What is done: `vm create`.
    pub kind: String,
    /// Name of what it is done to.
    pub target: String,
    /// Id of what it is done to.
    pub target_id: String,
    /// How far it is.
    pub state: TaskState,
    /// 0 to 1.
    pub progress: f64,
    /// What it is doing or waiting for.
    pub message: String,
    /// Why it failed.
    pub error: Option<TaskError>,
    /// When it was asked for.
    pub created: String,
    /// When it ended.
    pub finished: Option<String>,
}

/// How far a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// It is worked on.
    Running,
    /// It is done.
    Done,
    /// It failed.
    Failed,
}

/// Why a task failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskError {
    /// What happened.
    pub detail: String,
    /// What to do next.
    pub next: String,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its number.
    pub sequence: u64,
    /// When.
    pub at: String,
    /// `info`, `warning` or `critical`.
    pub severity: String,
    /// What, as one word: `node-lost`.
    pub kind: String,
    /// Name of what it is about.
    pub subject: String,
    /// Id of what it is about.
    pub subject_id: String,
    /// The sentence for people.
    pub message: String,
}
