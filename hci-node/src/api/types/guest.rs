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
