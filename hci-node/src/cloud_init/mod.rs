//! The NoCloud disk: how a guest's cloud-init learns who the guest is.
//!
//! What the user gave ([`crate::state::CloudInit`]) becomes the three files that cloud-init's NoCloud source reads, on a
//! disk labelled `CIDATA` ([`iso9660`]). The VMM shows it to the guest as a read-only disk. It is made anew from the state at each start,
//! on whatever node, so that there is no second copy to keep. The instance's id is the VM's: cloud-init does its work once in
//! the life of a VM, and again for a VM that was made from another one's disk.

mod iso9660;

use crate::state::{CloudInit, VmId};

use iso9660::File;

/// Name of the disk by which cloud-init finds it.
const LABEL: &str = "CIDATA";
/// cloud-init does not take a source without user data.
const EMPTY_USER_DATA: &str = "#cloud-config\n{}\n";

/// The content of a VM's disk. `name` is its hostname when none was given.
pub fn disk(vm: VmId, name: &str, given: &CloudInit) -> Vec<u8> {
    let hostname = given.hostname.as_deref().unwrap_or(name);
    let meta_data = meta_data(vm, hostname, &given.ssh_keys);
    let user_data = given.user_data.as_deref().unwrap_or(EMPTY_USER_DATA);
    let mut files = vec![
        File { name: "meta-data", short_name: "META_DAT", content: meta_data.as_bytes() },
        File { name: "user-data", short_name: "USER_DAT", content: user_data.as_bytes() },
    ];
    if let Some(network) = &given.network_config {
        let content = network.as_bytes();
        files.push(File { name: "network-config", short_name: "NETWORK", content });
    }
    // In the order of their short names, as the format wants it.
    files.sort_by_key(|file| file.short_name);
    iso9660::image(LABEL, &files)
}

/// JSON is YAML, and leaves nothing to escape.
fn meta_data(vm: VmId, hostname: &str, ssh_keys: &[String]) -> String {
    let mut values = serde_json::json!({ "instance-id": vm.to_string(), "local-hostname": hostname });
    if !ssh_keys.is_empty() {
        values["public-keys"] = ssh_keys.into();
    }
    format!("{values:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_data_names_the_instance_and_its_keys_whatever_they_hold() {
        let vm = VmId::random();
        let text = meta_data(vm, "web", &["ssh-ed25519 AAAA \"quoted\": #x".to_owned()]);
        let values: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(values["instance-id"], vm.to_string());
        assert_eq!(values["local-hostname"], "web");
        assert_eq!(values["public-keys"][0], "ssh-ed25519 AAAA \"quoted\": #x");
        assert!(!meta_data(vm, "web", &[]).contains("public-keys"));
    }
}
