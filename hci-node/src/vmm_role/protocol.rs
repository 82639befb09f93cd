//! What a VMM process takes on `vmm.sock`, with the framing of [`netfabric::rpc`].

use std::{path::Path, time::Duration};

use netfabric::rpc::{CallError, Request, call_unix};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::state::{RunEpoch, VmId};

/// A VMM on the same machine answers at once or not at all.
const DEADLINE: Duration = Duration::from_secs(2);

/// An order to a VMM.
pub trait VmmCall: Serialize + DeserializeOwned + Send + Sync {
    /// Its number.
    const METHOD: u16;
    /// What it answers.
    type Reply: Serialize + DeserializeOwned + Send;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmStatus {
    /// The VM.
    pub vm: VmId,
    /// Which run of it.
    pub epoch: RunEpoch,
    /// Whether there is a guest at the moment.
    pub guest: GuestState,
    /// How often the guest was reset in this run.
    pub resets: u32,
}

/// Whether there is a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestState {
    /// It is being made, at first or after a reset.
    Starting,
    /// Its processors run.
    Running,
}

/// Calls the VMM that serves this socket.
pub async fn call<C: VmmCall>(socket: &Path, call: &C) -> Result<C::Reply, CallError> {
    Ok(call_unix(socket, Request::new(C::METHOD, call)?, DEADLINE).await?.decode()?)
}
