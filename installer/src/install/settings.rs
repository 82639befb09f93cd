//! The files that make an installed server this server: they lie on the data partition, below `system/`, and each boot
//! copies `system/etc` over `/etc`.

use std::fmt::Write;

use crate::answer::{AnswerFile, Node};

/// A file below the root of the data partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingsFile {
    /// Its path on the data partition.
    pub path: String,
    /// Its content.
    pub content: String,
    /// Its permission bits.
    pub mode: u32,
}

/// All files of one server.
pub fn files(answer: &AnswerFile, node: &Node) -> Vec<SettingsFile> {
    let file = |path: &str, mode: u32, content: String| SettingsFile { path: path.to_owned(), content, mode };
    let mut hosts = "127.0.0.1 localhost\n".to_owned();
    for other in &answer.node {
        // Writing to a string cannot fail.
        let _ = writeln!(hosts, "{} {}", other.address, other.hostname);
    }
    let mut files = vec![
        file("system/etc/hostname", 0o644, format!("{}\n", node.hostname)),
        file("system/etc/hosts", 0o644, hosts),
        file("system/etc/ssh/authorized_keys", 0o600, answer.access.ssh_keys.join("\n") + "\n"),
        file("system/etc/hci/node.toml", 0o644, format!("advertise = \"{}\"\n", node.address)),
    ];
    for (number, interface) in node.interface.iter().enumerate() {
        let mut content = format!("[Match]\nMACAddress={}\n", interface.mac.to_lowercase());
        if let Some(mtu) = interface.mtu {
            let _ = write!(content, "\n[Link]\nMTUBytes={mtu}\n");
        }
        content.push_str("\n[Network]\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n");
        match interface.address {
            Some(address) => {
                let _ = writeln!(content, "Address={address}");
            }
            None => content.push_str("DHCP=ipv4\n"),
        }
        for (key, values) in
            [("Gateway", interface.gateway.into_iter().collect::<Vec<_>>()), ("DNS", interface.dns.clone())]
        {
            for value in values {
                let _ = writeln!(content, "{key}={value}");
            }
        }
        files.push(file(&format!("system/etc/systemd/network/{}-hci.network", 10 + number), 0o644, content));
    }
    if let Some(cluster) = &answer.cluster {
        let content = if cluster.founder == node.hostname {
            format!("[create]\nname = {:?}\njoin_secret = {:?}\n", cluster.name, cluster.secret)
        } else {
            format!("[join]\naddress = \"{}\"\nsecret = {:?}\n", cluster.founder_address, cluster.secret)
        };
        files.push(file("firstboot.toml", 0o600, format!("node_name = {:?}\n{content}", node.hostname)));
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = r#"
        [install]
        disk = "/dev/vda"
        [access]
        ssh_keys = ["ssh-ed25519 AAAA admin"]
        [cluster]
        name = "prod"
        founder = "n1"
        founder_address = "10.0.0.1:7443"
        secret = "0123456789abcdef"
        [[node]]
        hostname = "n1"
        address = "10.0.0.1"
        interface = [{ mac = "52:54:00:00:00:01", address = "10.0.0.1/24", gateway = "10.0.0.254", mtu = 9000 }]
        [[node]]
        hostname = "n2"
        address = "10.0.0.2"
        interface = [{ mac = "52:54:00:00:00:02", dhcp = true }]
    "#;

    fn content(files: &[SettingsFile], path: &str) -> String {
        files.iter().find(|file| file.path == path).expect(path).content.clone()
    }

    #[test]
    fn founder_creates_and_the_others_join() {
        let answer = AnswerFile::parse(ANSWER).unwrap();
        let founder = files(&answer, &answer.node[0]);
        let other = files(&answer, &answer.node[1]);
        assert!(content(&founder, "firstboot.toml").contains("[create]\nname = \"prod\""));
        assert!(content(&other, "firstboot.toml").contains("[join]\naddress = \"10.0.0.1:7443\""));
        assert_eq!(content(&other, "system/etc/hostname"), "n2\n");
        assert!(content(&other, "system/etc/systemd/network/10-hci.network").contains("DHCP=ipv4"));
        let network = content(&founder, "system/etc/systemd/network/10-hci.network");
        assert!(network.contains("MTUBytes=9000") && network.contains("Gateway=10.0.0.254"), "{network}");
    }
}
