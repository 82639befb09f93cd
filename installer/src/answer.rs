//! The answer file: all that an unattended install has to know, for one server or for many.
//!
//! ```toml
//! [install]
//! disk = "/dev/vda"            # or { serial = "S4EV…" }, or { smallest = true }
//! wipe = ["/dev/vda"]          # disks that may be overwritten although they hold data
//!
//! [access]
//! ssh_keys = ["ssh-ed25519 AAAA… admin"]
//!
//! [cluster]                    # optional: the install ends in a formed cluster
//! name = "prod"
//! founder = "n1"
//! founder_address = "10.0.0.1:7443"
//! secret = "at least 16 characters that nobody guesses"
//!
//! [[node]]                     # what differs; the first one that matches is used
//! match = { mac = "52:54:00:00:00:01" }   # or { serial = "…" }; without it every server matches
//! hostname = "n1"
//! address = "10.0.0.1"         # the address for the cluster; it must be on one of the interfaces below
//! [[node.interface]]
//! mac = "52:54:00:00:00:01"
//! address = "10.0.0.1/24"      # or dhcp = true
//! gateway = "10.0.0.254"
//! ```
//!
//! Unknown keys are errors: a misspelt `wipe` must not become a refused or, worse, a wrong install. The same parser runs
//! in the installer and in `hci-image validate-answer`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::Ipv4Net;
use serde::Deserialize;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnswerFile {
    /// What is installed where.
    pub install: Install,
    /// Who may log in.
    pub access: Access,
    /// The cluster that forms itself.
    pub cluster: Option<Cluster>,
    /// What differs between servers.
    pub node: Vec<Node>,
}

/// `[install]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Install {
    /// The system disk.
    pub disk: DiskChoice,
    /// Disks that may be overwritten although they hold data.
    #[serde(default)]
    pub wipe: Vec<String>,
}

/// Which disk the system goes to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum DiskChoice {
    /// By its device name.
    Path(String),
    /// By what it is.
    Match(DiskMatch),
}

/// Properties of a disk; all that are given must fit, and exactly one disk must.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskMatch {
    /// Its serial number.
    pub serial: Option<String>,
    /// A part of its model name.
    pub model: Option<String>,
    /// The smallest of those that fit.
    #[serde(default)]
    pub smallest: bool,
}

/// `[access]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// Public keys that may log in as root.
    pub ssh_keys: Vec<String>,
}

/// `[cluster]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// The hostname of the node that creates it.
    pub founder: String,
    /// Where the others find the founder's API.
    pub founder_address: SocketAddr,
    /// What founder and joining nodes prove to each other that they know.
    pub secret: String,
}

/// `[[node]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Which server this is for.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// Its name.
    pub hostname: String,
    /// Its address for the cluster.
    pub address: IpAddr,
    /// Its interfaces.
    pub interface: Vec<Interface>,
}

/// How a server is recognised; empty fits all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Match {
    /// The MAC address of any of its interfaces.
    pub mac: Option<String>,
    /// The serial number of the machine.
    pub serial: Option<String>,
}

/// `[[node.interface]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// Its MAC address.
    pub mac: String,
    /// Its address with the length of the prefix.
    pub address: Option<Ipv4Net>,
    /// The address comes from DHCP.
    #[serde(default)]
    pub dhcp: bool,
    /// The router.
    pub gateway: Option<Ipv4Addr>,
    /// Name servers.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// The MTU of the link.
    pub mtu: Option<u16>,
}

/// What is wrong with an answer file.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// Not TOML, an unknown key, or a value of the wrong form.
    #[error("the answer file cannot be read: {0}")]
    Form(#[from] Box<toml::de::Error>),
    /// The values contradict each other.
    #[error("the answer file is wrong: {0}")]
    Value(String),
    /// No `[[node]]` is for this server.
    #[error(
        "no [[node]] of the answer file matches this server (serial {serial:?}, MACs {macs}); add one, or a [[node]] without match"
    )]
    NoMatch {
        /// The machine's serial number.
        serial: String,
        /// Its MAC addresses.
        macs: String,
    },
}

/// What a server knows of itself before it is installed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// The serial number that the firmware tells.
    pub serial: String,
    /// The MAC addresses of its interfaces, in lower case.
    pub macs: Vec<String>,
}

impl AnswerFile {
    /// Parses and checks a file.
    ///
    /// # Errors
    /// With the line and key, and what is allowed there.
    pub fn parse(text: &str) -> Result<Self, AnswerError> {
        let answer: Self = toml::from_str(text).map_err(Box::new)?;
        answer.check()?;
        Ok(answer)
    }

    /// The node table for a server.
    ///
    /// # Errors
    /// When none matches.
    pub fn node_for(&self, machine: &Machine) -> Result<&Node, AnswerError> {
        let fits = |node: &&Node| {
            let serial = node.matches.serial.as_ref().is_none_or(|serial| *serial == machine.serial);
            let mac = node.matches.mac.as_ref().is_none_or(|mac| machine.macs.contains(&mac.to_lowercase()));
            serial && mac
        };
        self.node.iter().find(fits).ok_or_else(|| AnswerError::NoMatch {
            serial: machine.serial.clone(),
            macs: machine.macs.join(" "),
        })
    }

    fn check(&self) -> Result<(), AnswerError> {
        let wrong = |text: String| Err(AnswerError::Value(text));
        if self.node.is_empty() {
            return wrong("there is no [[node]]".to_owned());
        }
        if self.access.ssh_keys.is_empty() {
            return wrong("access.ssh_keys is empty: nobody could log in".to_owned());
        }
        for key in &self.access.ssh_keys {
            if key.split_whitespace().count() < 2 || key.contains('\n') {
                return wrong(format!("access.ssh_keys has {key:?}, which is not a public key of one line"));
            }
        }
        if let DiskChoice::Match(choice) = &self.install.disk
            && *choice == DiskMatch::default()
        {
            return wrong("install.disk is empty: name a path, serial, model or smallest = true".to_owned());
        }
        for node in &self.node {
            check_hostname(&node.hostname)?;
            check_interfaces(node)?;
        }
        if let Some(cluster) = &self.cluster {
            check_hostname(&cluster.name)?;
            if cluster.secret.len() < 16 {
                return wrong("cluster.secret needs at least 16 characters".to_owned());
            }
            if !self.node.iter().any(|node| node.hostname == cluster.founder) {
                return wrong(format!(
                    "cluster.founder is {:?}, but no [[node]] has that hostname",
                    cluster.founder
                ));
            }
        }
        Ok(())
    }
}

fn check_hostname(name: &str) -> Result<(), AnswerError> {
    let good = !name.is_empty()
        && name.len() <= 63
        && name.chars().all(|each| each.is_ascii_lowercase() || each.is_ascii_digit() || each == '-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good {
        Ok(())
    } else {
        Err(AnswerError::Value(format!("{name:?} is no name: use a-z, 0-9 and - , at most 63")))
    }
}

fn check_interfaces(node: &Node) -> Result<(), AnswerError> {
    let wrong = |text: String| Err(AnswerError::Value(format!("node {}: {text}", node.hostname)));
    for interface in &node.interface {
        let mac = &interface.mac;
        let parts: Vec<_> = mac.split(':').collect();
        if parts.len() != 6
            || parts.iter().any(|part| part.len() != 2 || u8::from_str_radix(part, 16).is_err())
        {
            return wrong(format!("interface.mac {mac:?} is not of the form 52:54:00:00:00:01"));
        }
        if interface.address.is_some() == interface.dhcp {
            return wrong(format!("interface {mac} needs either an address or dhcp = true"));
        }
        if let (Some(gateway), Some(net)) = (interface.gateway, interface.address)
            && !net.contains(&gateway)
        {
            return wrong(format!("interface {mac}: the gateway {gateway} is not in {net}"));
        }
    }
    let given =
        |interface: &Interface| interface.address.map(|net| IpAddr::V4(net.addr())) == Some(node.address);
    if !node.interface.iter().any(|interface| interface.dhcp || given(interface)) {
        return wrong(format!("the address {} is on none of its interfaces", node.address));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"
        [install]
        disk = "/dev/vda"
        [access]
        ssh_keys = ["ssh-ed25519 AAAA admin"]
        [[node]]
        match = { mac = "52:54:00:00:00:01" }
        hostname = "n1"
        address = "10.0.0.1"
        [[node.interface]]
        mac = "52:54:00:00:00:01"
        address = "10.0.0.1/24"
        [[node]]
        match = { serial = "S2" }
        hostname = "n2"
        address = "10.0.0.2"
        [[node.interface]]
        mac = "52:54:00:00:00:02"
        dhcp = true
    "#;

    #[test]
    fn the_example_in_the_documentation_is_valid() {
        let answer = AnswerFile::parse(include_str!("../../docs/answer-example.toml")).unwrap();
        assert_eq!(answer.node.len(), 3);
    }

    fn error(text: &str) -> String {
        AnswerFile::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn each_server_finds_its_own_table() {
        let answer = AnswerFile::parse(GOOD).unwrap();
        let machine =
            |serial: &str, mac: &str| Machine { serial: serial.to_owned(), macs: vec![mac.to_owned()] };
        assert_eq!(answer.node_for(&machine("x", "52:54:00:00:00:01")).unwrap().hostname, "n1");
        assert_eq!(answer.node_for(&machine("S2", "00:00:00:00:00:09")).unwrap().hostname, "n2");
        let none = answer.node_for(&machine("x", "00:00:00:00:00:09")).unwrap_err().to_string();
        assert!(none.contains("no [[node]]") && none.contains("00:00:00:00:00:09"), "{none}");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let message = error(&GOOD.replace("hostname = \"n1\"", "hostnme = \"n1\""));
        assert!(
            message.contains("hostnme") && message.contains("hostname") && message.contains("line"),
            "{message}"
        );
    }

    #[test]
    fn contradictions_are_explained() {
        assert!(error(&GOOD.replace("disk = \"/dev/vda\"", "")).contains("disk"));
        assert!(error(&GOOD.replace("dhcp = true", "")).contains("either an address or dhcp"));
        assert!(
            error(&GOOD.replace("\"10.0.0.1/24\"", "\"10.0.0.9/24\"")).contains("on none of its interfaces")
        );
        assert!(error(&GOOD.replace("ssh-ed25519 AAAA admin", "")).contains("public key"));
        let cluster = "[cluster]\nname=\"prod\"\nfounder=\"n9\"\nfounder_address=\"10.0.0.1:7443\"\nsecret=\"0123456789abcdef\"\n";
        assert!(error(&format!("{cluster}{GOOD}")).contains("n9"));
    }

    proptest! {
        #[test]
        fn no_input_makes_it_panic(text in "\\PC{0,200}") {
            let _ = AnswerFile::parse(&text);
        }
    }
}
