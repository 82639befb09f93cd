//! What is told of the inside of a VM.

use super::api;
use crate::state::CloudInit;

/// What of cloud-init's data a VM of this name has.
pub(super) fn cloud_init(given: &CloudInit, vm: &str) -> api::CloudInitGiven {
    let size = |text: &Option<String>| text.as_ref().map(|text| text.len() as u64);
    api::CloudInitGiven {
        user_data_bytes: size(&given.user_data),
        network_config_bytes: size(&given.network_config),
        ssh_keys: given.ssh_keys.len() as u64,
        hostname: given.hostname.clone().unwrap_or_else(|| vm.to_owned()),
    }
}
