//! The lab: real servers under QEMU on one machine, for the demo, the end-to-end tests and development.
//!
//! Each server has a blank system disk and two blank data disks, one network interface to this machine (SSH and API on
//! forwarded ports of the loopback) and one to a private segment that only the lab's servers share. They boot the ISO,
//! install themselves by an answer file that the firmware channel hands over, and start from their disks. A power cut
//! is a killed QEMU: what the server had not flushed to its disks is lost, as with a pulled plug.
//!
//! With KVM that can nest, guests run on it; otherwise everything is emulated, including the CPU's virtualisation, so
//! that the servers' own KVM works here too.
//!
//! Everything of a lab is in one folder, its processes' ids included: any later process can end it.
//!
//! | module | it is |
//! |---|---|
//! | [`server`] | one QEMU: its command line, power, links, console |
//! | [`ssh`] | commands on a server |

pub mod server;
pub mod ssh;

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

pub use server::{Firmware, Link, Medium, Server};

/// What a lab is made of.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Its folder.
    pub dir: PathBuf,
    /// The install ISO.
    pub iso: PathBuf,
    /// The servers: how each starts.
    pub servers: Vec<Boot>,
    /// Whether they form a cluster by themselves.
    pub forming: Forming,
    /// Memory of each, in MiB.
    pub memory_mib: u32,
    /// Size of each data disk, in MiB.
    pub data_disk_mib: u64,
}

/// How a server starts for the first time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Boot {
    /// Its firmware.
    pub firmware: Firmware,
    /// What it starts from.
    pub medium: Medium,
}

/// How the servers become a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forming {
    /// Somebody types the commands.
    ByHand,
    /// The answer file says it: the first server creates the cluster of this name, the others join it.
    ByAnswerFile(String),
}

impl LabOptions {
    /// Three servers as the demo has them.
    pub fn from_iso(dir: &Path, iso: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
            iso: iso.to_path_buf(),
            servers: vec![Boot::default(); 3],
            forming: Forming::ByHand,
            memory_mib: 1536,
            data_disk_mib: 4096,
        }
    }
}

/// What is kept in `lab.json`, so that a later process can use and end the lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct LabState {
    segment_port: u16,
    servers: Vec<server::Settings>,
}

/// A lab that is up.
#[derive(Debug)]
pub struct Lab {
    servers: Vec<Server>,
}

const STATE_FILE: &str = "lab.json";

impl Lab {
    /// Starts the servers on blank disks; they install themselves from now on. An older lab in the folder is ended.
    ///
    /// # Errors
    /// When QEMU is missing or does not start.
    pub fn up(options: &LabOptions, say: &mut dyn FnMut(&str)) -> Result<Self> {
        Self::down(&options.dir)?;
        ensure!(options.iso.is_file(), "{} is not there; build it with `make iso`", options.iso.display());
        fs::create_dir_all(&options.dir)?;
        let dir = fs::canonicalize(&options.dir)?;
        let key = ssh::generate_key(&dir)?;
        let segment_port = free_udp_port()?;
        let mut state = LabState { segment_port, servers: Vec::new() };
        for (index, boot) in options.servers.iter().enumerate() {
            let number = index + 1;
            let settings = server::Settings {
                name: format!("n{number}"),
                firmware: boot.firmware,
                medium: boot.medium,
                number,
                dir: dir.join(format!("n{number}")),
                iso: fs::canonicalize(&options.iso)?,
                memory_mib: options.memory_mib,
                segment_port,
                ssh_port: free_tcp_port()?,
                api_port: free_tcp_port()?,
                key: key.clone(),
            };
            settings.make_disks(options.data_disk_mib)?;
            fs::write(settings.answer_file(), answer(&settings, options, &key)?)?;
            state.servers.push(settings);
        }
        fs::write(dir.join(STATE_FILE), serde_json::to_string_pretty(&state)?)?;
        let servers: Vec<_> = state.servers.into_iter().map(Server::new).collect();
        for server in &servers {
            server.power_on()?;
            say(&format!("{} is on ({})", server.name(), server::accelerator()));
        }
        Ok(Self { servers })
    }

    /// The lab that another process started in that folder.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(dir: &Path) -> Result<Self> {
        let file = dir.join(STATE_FILE);
        let text = fs::read_to_string(&file).with_context(|| format!("no lab in {}", dir.display()))?;
        let state: LabState =
            serde_json::from_str(&text).with_context(|| format!("{} is damaged", file.display()))?;
        Ok(Self { servers: state.servers.into_iter().map(Server::new).collect() })
    }

    /// A server, counted from 0.
    ///
    /// # Panics
    /// When there is no such server.
    pub fn node(&self, index: usize) -> &Server {
        &self.servers[index]
    }

    /// All servers.
    pub fn nodes(&self) -> &[Server] {
        &self.servers
    }

    /// Ends the lab in that folder and frees its disks; logs stay. No lab there is no error.
    ///
    /// # Errors
    /// When a disk cannot be removed.
    pub fn down(dir: &Path) -> Result<()> {
        if !dir.join(STATE_FILE).exists() {
            return Ok(());
        }
        for server in &Self::open(dir)?.servers {
            server.power_cut()?;
            server.remove_disks()?;
        }
        Ok(fs::remove_file(dir.join(STATE_FILE))?)
    }
}

/// The answer file of one server: its system disk, the lab's key, an address on the private segment, and the cluster.
fn answer(settings: &server::Settings, options: &LabOptions, key: &Path) -> Result<String> {
    let public = fs::read_to_string(key.with_extension("pub"))?;
    let mut text = format!(
        "[install]\ndisk = {{ serial = \"{}-system\" }}\n\n[access]\nssh_keys = [{:?}]\n",
        settings.name,
        public.trim()
    );
    if let Forming::ByAnswerFile(cluster) = &options.forming {
        text += &format!(
            "\n[cluster]\nname = {cluster:?}\nfounder = \"n1\"\nfounder_address = \"10.10.0.1:7443\"\n\
             secret = \"only this lab knows it, {}\"\n",
            settings.segment_port
        );
    }
    for number in 1..=options.servers.len() {
        text += &format!(
            "\n[[node]]\nmatch = {{ mac = \"{mac}\" }}\nhostname = \"n{number}\"\naddress = \"10.10.0.{number}\"\n\
             [[node.interface]]\nmac = \"{mac}\"\naddress = \"10.10.0.{number}/24\"\n\
             [[node.interface]]\nmac = \"{}\"\ndhcp = true\n",
            server::mac(number, server::Nic::Outside),
            mac = server::mac(number, server::Nic::Segment),
        );
    }
    Ok(text)
}

fn free_tcp_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn free_udp_port() -> Result<u16> {
    Ok(UdpSocket::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{AnswerFile, Machine};

    #[test]
    fn the_labs_answers_are_valid_and_each_server_finds_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        fs::write(key.with_extension("pub"), "ssh-ed25519 AAAA lab\n").unwrap();
        let settings = server::Settings {
            name: "n2".to_owned(),
            firmware: Firmware::Bios,
            medium: Medium::Cd,
            number: 2,
            dir: dir.path().to_path_buf(),
            iso: PathBuf::new(),
            memory_mib: 512,
            segment_port: 1,
            ssh_port: 2,
            api_port: 3,
            key: key.clone(),
        };
        let mut options = LabOptions::from_iso(dir.path(), Path::new("hci.iso"));
        for forming in [Forming::ByHand, Forming::ByAnswerFile("prod".to_owned())] {
            options.forming = forming;
            let parsed = AnswerFile::parse(&answer(&settings, &options, &key).unwrap()).unwrap();
            let machine = Machine { serial: String::new(), macs: vec![server::mac(2, server::Nic::Segment)] };
            assert_eq!(parsed.node_for(&machine).unwrap().hostname, "n2");
            assert_eq!(parsed.cluster.is_some(), options.forming != Forming::ByHand);
        }
    }

    #[test]
    fn ending_no_lab_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        Lab::down(dir.path()).unwrap();
        assert!(Lab::open(dir.path()).is_err());
    }
}
