//! What of cloud-init's data is taken: no more than the state can carry, and nothing that would only fail in the guest.

use super::invalid;
use crate::state::{CloudInit, Refusal};

/// Most bytes for one VM. They are in every copy of the state.
const MAX_BYTES: usize = 64 << 10;
/// Longest hostname.
const MAX_HOSTNAME: usize = 253;
/// Longest part of a hostname between dots.
const MAX_LABEL: usize = 63;
/// What public keys begin with.
const KEY_KINDS: [&str; 4] = ["ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-"];

pub(super) fn check(given: &CloudInit) -> Result<(), Refusal> {
    if given.bytes() > MAX_BYTES {
        return Err(invalid(
            format!("cloud-init's data are {} bytes, and a VM has at most {MAX_BYTES}", given.bytes()),
            "let the user data fetch what is large: #include URL",
        ));
    }
    if let Some(hostname) = &given.hostname
        && !is_hostname(hostname)
    {
        return Err(invalid(
            format!("{hostname:?} is no hostname"),
            "use letters, digits and hyphens, and dots between the parts",
        ));
    }
    if !given.ssh_keys.iter().all(|key| is_public_key(key)) {
        return Err(invalid("one of the SSH keys is no public key", "use --ssh-key ~/.ssh/id_ed25519.pub"));
    }
    Ok(())
}

fn is_hostname(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= MAX_HOSTNAME && text.split('.').all(is_label)
}

/// A kind and its data in one line, perhaps with a comment.
fn is_public_key(text: &str) -> bool {
    let mut words = text.split(' ');
    let (kind, data) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    KEY_KINDS.iter().any(|known| kind.starts_with(known))
        && !data.is_empty()
        && !text.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(given: CloudInit) -> bool {
        check(&given).is_ok()
    }

    #[test]
    fn what_would_only_fail_in_the_guest_is_refused() {
        let host = |name: &str| CloudInit { hostname: Some(name.to_owned()), ..CloudInit::default() };
        for fine in ["web", "web-1.example.org", "1"] {
            assert!(taken(host(fine)), "{fine}");
        }
        for bad in
            ["", "-web", "web-", "web..org", "web_1", "web 1", "web\n", &"a".repeat(64), &"a.".repeat(127)]
        {
            assert!(!taken(host(bad)), "{bad:?}");
        }
        let key = |key: &str| CloudInit { ssh_keys: vec![key.to_owned()], ..CloudInit::default() };
        for fine in
            ["ssh-ed25519 AAAA", "ecdsa-sha2-nistp256 AAAA me@here", "sk-ssh-ed25519@openssh.com AAAA"]
        {
            assert!(taken(key(fine)), "{fine}");
        }
        for bad in
            ["", "ssh-ed25519", "ssh-ed25519 AAAA\nssh-rsa BBBB", "-----BEGIN OPENSSH PRIVATE KEY-----"]
        {
            assert!(!taken(key(bad)), "{bad:?}");
        }
        let sized = |bytes| CloudInit { user_data: Some("x".repeat(bytes)), ..CloudInit::default() };
        assert!(taken(sized(MAX_BYTES)) && !taken(sized(MAX_BYTES + 1)));
    }

    #[test]
    fn its_content_is_not_in_what_is_logged() {
        let given = CloudInit { user_data: Some("password: tulip".to_owned()), ..CloudInit::default() };
        assert_eq!(format!("{given:?}"), "CloudInit(15 bytes)");
    }
}
