//! Resources around what runs inside a VM.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What cloud-init in the guest is told, in `POST /v1/vms`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloudInit {
    /// User data.
    #[serde(default)]
    pub user_data: Option<String>,
    /// Network configuration; cloud-init uses DHCP when none.
    #[serde(default)]
    pub network_config: Option<String>,
    /// Public keys, each in one line.
    #[serde(default)]
    pub ssh_keys: Vec<String>,
    /// Hostname; the VM's name when none.
    #[serde(default)]
    pub hostname: Option<String>,
}

impl fmt::Debug for CloudInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CloudInit(..)")
    }
}

/// What of cloud-init's data a VM has. The data may hold secrets, and are not shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudInitGiven {
    /// Size of the user data, if there are any.
    pub user_data_bytes: Option<u64>,
    /// Size of the network configuration, if there is one.
    pub network_config_bytes: Option<u64>,
    /// Number of public keys.
    pub ssh_keys: u64,
    /// Hostname.
    pub hostname: String,
}

/// What the agent in a guest says. It is the guest's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAgent {
    /// Its version.
    pub version: String,
    /// The guest's network interfaces.
    pub interfaces: Vec<GuestInterface>,
}

/// A network interface of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInterface {
    /// The guest's name for it.
    pub name: String,
    /// Its Ethernet address.
    pub mac: Option<String>,
    /// Its addresses.
    pub addresses: Vec<String>,
}

/// `POST /v1/vms/NAME/exec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The program, and its arguments. No shell is between.
    pub command: Vec<String>,
}

/// Answer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecStarted {
    /// By which it is asked for again: `GET /v1/vms/NAME/exec/PID`.
    pub pid: i64,
}

/// How a program in a guest is. That it has ended is told once, and its output with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum ExecProgress {
    /// It runs.
    Running,
    /// It has ended.
    Ended {
        /// Its exit code; none when a signal ended it.
        exit_code: Option<i32>,
        /// The signal.
        signal: Option<i32>,
        /// Its standard output, in Base64.
        stdout: String,
        /// Its standard error, in Base64.
        stderr: String,
        /// Whether the guest's agent kept all of it.
        output: ExecOutput,
    },
}

/// Whether a program's output is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ExecOutput {
    /// It is.
    Whole,
    /// The end is missing.
    Cut,
}

/// Answer to `POST /v1/vms/NAME/snapshots`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotAccepted {
    /// The task.
    pub task: super::Task,
    /// What the snapshot is good for.
    pub consistency: Consistency,
    /// Why it is no better.
    pub why: Option<String>,
}

/// What a snapshot is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// The guest's file systems were frozen: nothing has to be repaired.
    FileSystems,
    /// As after a power cut.
    Crash,
    /// The VM did not run: its disks are as it left them.
    AtRest,
}
