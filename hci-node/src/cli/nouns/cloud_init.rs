//! The options of `hci vm create` for cloud-init: files are read here, and sent as text.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use crate::cli::exit::{CliError, Exit};

/// What a public key on the command line begins with; anything else is the name of a file.
const KEY_KINDS: [&str; 3] = ["ssh-", "ecdsa-", "sk-"];
/// Larger files are not even read: the cluster takes 64 KiB together.
const MAX_FILE: u64 = 1 << 20;

/// What the guest's cloud-init is told.
#[derive(Debug, Args)]
pub(super) struct CloudInitArgs {
    /// The file with cloud-init's user data.
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// The file with cloud-init's network configuration; DHCP if not given.
    #[arg(long, value_name = "FILE")]
    network_config: Option<PathBuf>,
    /// A public key that may log in, or the file with it; may be given several times.
    #[arg(long, value_name = "FILE|KEY")]
    ssh_key: Vec<String>,
    /// The guest's hostname; the VM's name if not given.
    #[arg(long)]
    hostname: Option<String>,
}

impl CloudInitArgs {
    /// The `cloud_init` of the request; null when nothing was given.
    pub(super) fn body(&self) -> Result<Value, CliError> {
        let none = self.user_data.is_none()
            && self.network_config.is_none()
            && self.ssh_key.is_empty()
            && self.hostname.is_none();
        if none {
            return Ok(Value::Null);
        }
        let mut keys = Vec::new();
        for key in &self.ssh_key {
            keys.extend(public_keys(key)?);
        }
        Ok(json!({
            "user_data": self.user_data.as_deref().map(read).transpose()?,
            "network_config": self.network_config.as_deref().map(read).transpose()?,
            "ssh_keys": keys,
            "hostname": self.hostname,
        }))
    }
}

fn public_keys(given: &str) -> Result<Vec<String>, CliError> {
    if KEY_KINDS.iter().any(|kind| given.starts_with(kind)) && given.contains(' ') {
        return Ok(vec![given.trim().to_owned()]);
    }
    let text = read(Path::new(given))?;
    if text.contains("PRIVATE KEY") {
        return Err(CliError::new(Exit::Usage, format!("{given} is a private key"))
            .next(format!("give its public half: --ssh-key {given}.pub")));
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(lines.map(str::to_owned).collect())
}

fn read(path: &Path) -> Result<String, CliError> {
    let fail =
        |why: std::io::Error| CliError::new(Exit::Usage, format!("cannot read {}", path.display())).why(why);
    let length = std::fs::metadata(path).map_err(fail)?.len();
    if length > MAX_FILE {
        return Err(CliError::new(Exit::Usage, format!("{} has {length} bytes", path.display()))
            .next("cloud-init's data may have 64 KiB together"));
    }
    std::fs::read_to_string(path).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(ssh_key: &[&str]) -> CloudInitArgs {
        CloudInitArgs {
            user_data: None,
            network_config: None,
            ssh_key: ssh_key.iter().map(ToString::to_string).collect(),
            hostname: None,
        }
    }

    #[test]
    fn keys_come_as_text_or_from_files_with_several_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys.pub");
        std::fs::write(&file, "# mine\nssh-ed25519 AAAA a\n\n  ssh-rsa BBBB b\n").unwrap();
        let body = args(&["ssh-ed25519 CCCC c", file.to_str().unwrap()]).body().unwrap();
        assert_eq!(body["ssh_keys"], json!(["ssh-ed25519 CCCC c", "ssh-ed25519 AAAA a", "ssh-rsa BBBB b"]));
        assert_eq!(args(&[]).body().unwrap(), Value::Null);
    }

    #[test]
    fn a_private_key_stays_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("id");
        std::fs::write(&file, "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
        let refused = args(&[file.to_str().unwrap()]).body().unwrap_err();
        assert!(refused.to_string().contains("private key"), "{refused}");
        assert!(args(&["/nowhere/id.pub"]).body().is_err());
    }
}
