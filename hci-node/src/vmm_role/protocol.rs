//! What a VMM process takes on `vmm.sock`, with the framing of [`netfabric::rpc`].

use std::{path::Path, time::Duration};

use bytes::Bytes;
use netfabric::rpc::{CallError, Request, call_unix};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use vmm::{DeviceConfig, MigrationOptions, MigrationSnapshot};

use super::{record::ProcessRecord, succession::Descriptors};
use crate::state::{RunEpoch, Shape, VmId};

/// A VMM on the same machine answers at once or not at all.
const DEADLINE: Duration = Duration::from_secs(2);
/// Holding processors, and a piece of a guest's state, take longer on a machine that is busy.
const SLOW: Duration = Duration::from_secs(30);

/// An order to a VMM.
pub trait VmmCall: Serialize + DeserializeOwned + Send + Sync {
    /// Its number.
    const METHOD: u16;
    /// What it answers.
    type Reply: Serialize + DeserializeOwned + Send;
    /// How long it may take.
    const DEADLINE: Duration = DEADLINE;
}

/// Asks for [`VmmStatus`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status;

/// Presses the power button; the guest decides what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerButton;

/// Resets the guest as its reset button would.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reset;

/// Ends the guest at once. The process ends soon after the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kill;

/// Holds the guest's processors. What is being saved is saved no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause;

/// Lets the guest run, also for the first time after its state was brought. What is being saved is saved no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume;

/// Holds the guest's processors and begins to write its state, from the start if that was begun before. [`FetchState`] gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Save;

/// Begins to write the guest's state while it runs, for another VMM to go on with it. [`FetchState`] gets it. Any order that lets the guest run
/// or holds it ends that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migrate {
    /// How.
    pub options: MigrationOptions,
}

/// Asks where in the process the descriptors are that a successor needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GetDescriptors;

/// Holds the guest and begins to write all of its state but its memory, for another process of this node that has that; its backends are left. Until
/// the guest is handed over, [`Resume`] lets it go on here. [`FetchState`] gets the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveForSuccessor;

/// Leaves the guest, which was written for it, to a successor that has made it. The process ends soon after the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// The successor.
    pub to: ProcessRecord,
}

/// Answers when there is a guest: at once, or when it was made from the state that was brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwaitGuest;

/// Adds a disk or NIC to the guest that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plug {
    /// Which.
    pub device: DeviceConfig,
}

/// Asks the guest to let go of a disk or NIC; [`VmmStatus`] has it no more when it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unplug {
    /// What it is called.
    pub id: String,
}

/// Makes the guest's machine that large: processors at once, memory as its guest takes it or gives it back ([`VmmStatus`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reshape {
    /// How large.
    pub shape: Shape,
}

/// Fetches the next piece of the state, which comes as bulk data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchState {
    /// How much was fetched before.
    pub at: u64,
}

/// What comes of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StateFlow {
    /// This is a piece, and more may follow.
    Piece,
    /// No piece; to be fetched on when everything that was fetched has arrived.
    Settle,
    /// No piece; the guest is held from now on.
    Held,
    /// No piece; its devices are, too: its volumes can be closed.
    Quiet,
    /// That was all; this is no piece.
    End,
}

/// Brings the next piece of the state that the guest is to go on from, as bulk data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BringState {
    /// How much was brought before.
    pub at: u64,
    /// Whether more follows.
    pub flow: BringFlow,
}

/// Whether more of the state is brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BringFlow {
    /// More follows.
    More,
    /// This is the last piece.
    Last,
}

impl VmmCall for Pause {
    const METHOD: u16 = 0x0305;
    type Reply = ();
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for Resume {
    const METHOD: u16 = 0x0306;
    type Reply = ();
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for Save {
    const METHOD: u16 = 0x0307;
    type Reply = ();
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for GetDescriptors {
    const METHOD: u16 = 0x030f;
    type Reply = Descriptors;
}

impl VmmCall for SaveForSuccessor {
    const METHOD: u16 = 0x0310;
    type Reply = ();
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for HandOver {
    const METHOD: u16 = 0x0311;
    type Reply = ();
}

impl VmmCall for Migrate {
    const METHOD: u16 = 0x030a;
    type Reply = ();
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for AwaitGuest {
    const METHOD: u16 = 0x030b;
    type Reply = ();
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for Plug {
    const METHOD: u16 = 0x030c;
    type Reply = ();
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for Unplug {
    const METHOD: u16 = 0x030d;
    type Reply = ();
}

impl VmmCall for Reshape {
    const METHOD: u16 = 0x030e;
    type Reply = ();
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for FetchState {
    const METHOD: u16 = 0x0308;
    type Reply = StateFlow;
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for BringState {
    const METHOD: u16 = 0x0309;
    type Reply = ();
    const DEADLINE: Duration = SLOW;
}

impl VmmCall for Status {
    const METHOD: u16 = 0x0301;
    type Reply = VmmStatus;
}

impl VmmCall for PowerButton {
    const METHOD: u16 = 0x0302;
    type Reply = ();
}

impl VmmCall for Reset {
    const METHOD: u16 = 0x0303;
    type Reply = ();
}

impl VmmCall for Kill {
    const METHOD: u16 = 0x0304;
    type Reply = ();
}

/// What a VMM does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmStatus {
    /// The VM.
    pub vm: VmId,
    /// Which run of it.
    pub epoch: RunEpoch,
    /// Whether there is a guest at the moment.
    pub guest: GuestState,
    /// How often the guest was reset in this run.
    pub resets: u32,
    /// How far the guest's last migration is, or came.
    pub migration: Option<MigrationSnapshot>,
    /// What its machine has, when there is one.
    pub machine: Option<MachineStatus>,
}

/// What a guest's machine has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// How large it is.
    pub shape: Shape,
    /// What its disks and NICs are called.
    pub devices: Vec<String>,
}

/// Whether there is a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestState {
    /// It is being made, at first or after a reset.
    Starting,
    /// It is being made from a saved state, of which so much was brought.
    Restoring(u64),
    /// Its processors run.
    Running,
    /// Its processors are held, or it was restored and has not run yet.
    Paused,
}

/// Calls the VMM that serves this socket.
pub async fn call<C: VmmCall>(socket: &Path, call: &C) -> Result<C::Reply, CallError> {
    Ok(exchange(socket, call, Bytes::new()).await?.0)
}

/// The same with bulk data, both ways.
pub async fn exchange<C: VmmCall>(
    socket: &Path,
    call: &C,
    bulk: Bytes,
) -> Result<(C::Reply, Bytes), CallError> {
    let request = Request::new(C::METHOD, call)?.with_bulk(bulk);
    let response = call_unix(socket, request, C::DEADLINE).await?;
    Ok((response.decode()?, response.bulk))
}
