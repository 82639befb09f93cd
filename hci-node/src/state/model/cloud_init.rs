//! What cloud-init in a VM's guest is told.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a user gave for a VM's cloud-init. It may hold passwords and keys, so its parts are never shown, only that they are there.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudInit {
    /// User data: a `#cloud-config`, a script, or what else cloud-init takes.
    pub user_data: Option<String>,
    /// Network configuration, version 1 or 2; cloud-init uses DHCP when there is none.
    pub network_config: Option<String>,
    /// Public keys that may log in as the image's usual user.
    pub ssh_keys: Vec<String>,
    /// Hostname; the VM's name when there is none.
    pub hostname: Option<String>,
}

impl CloudInit {
    /// Size of all of it.
    pub fn bytes(&self) -> usize {
        let texts = [&self.user_data, &self.network_config, &self.hostname].into_iter().flatten();
        texts.chain(&self.ssh_keys).map(String::len).sum()
    }
}

impl fmt::Debug for CloudInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CloudInit({} bytes)", self.bytes())
    }
}
