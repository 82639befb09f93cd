//! How a node is set up: flags of `hci node run`, over `/etc/hci/node.toml`, over defaults.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::{paths::NodePaths, state::NodeAddresses};

/// Where the file is unless told otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/hci/node.toml";

/// `hci node run`
#[derive(Clone, Debug, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct Args {
    /// TOML file with the same settings as these flags, keys with underscores [default: /etc/hci/node.toml if present].
    #[arg(long)]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Directory for what survives a reboot [default: /var/lib/hci].
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// Directory for sockets [default: /run/hci].
    #[arg(long)]
    pub run: Option<PathBuf>,
    /// Address under which the other nodes reach this one [default: the one that routes outwards].
    #[arg(long)]
    pub advertise: Option<IpAddr>,
    /// Name of this node [default: its host name].
    #[arg(long)]
    pub node_name: Option<String>,
    /// UDP address of the control mesh [default: 0.0.0.0:7400].
    #[arg(long)]
    pub listen_control: Option<SocketAddr>,
    /// UDP address of the storage mesh, served by the data process [default: 0.0.0.0:7401].
    #[arg(long)]
    pub listen_storage: Option<SocketAddr>,
    /// UDP address of the frames mesh, served by the data process [default: 0.0.0.0:7402].
    #[arg(long)]
    pub listen_frames: Option<SocketAddr>,
    /// TCP address of the HTTPS API [default: 0.0.0.0:7443].
    #[arg(long)]
    pub listen_api: Option<SocketAddr>,
    /// MTU of the links between nodes [default: read from the interface].
    #[arg(long)]
    pub link_mtu: Option<u16>,
}

/// What is wrong with the settings.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no TOML, or has unknown keys.
    #[error("{path} is not valid: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
}

/// A node's settings, complete.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Its directories.
    pub paths: NodePaths,
    /// The address that others reach it under, if it was set.
    pub advertise: Option<IpAddr>,
    /// Its name.
    pub node_name: String,
    /// Control mesh.
    pub listen_control: SocketAddr,
    /// Storage mesh.
    pub listen_storage: SocketAddr,
    /// Frames mesh.
    pub listen_frames: SocketAddr,
    /// HTTPS API.
    pub listen_api: SocketAddr,
    /// MTU of the links, if it was set.
    pub link_mtu: Option<u16>,
}

impl Args {
    /// Adds the file and the defaults.
    pub fn complete(self) -> Result<NodeOptions, OptionsError> {
        let file = self.file()?;
        let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
        Ok(NodeOptions {
            paths: NodePaths::new(
                self.state.or(file.state).unwrap_or_else(|| NodePaths::DEFAULT_STATE.into()),
                self.run.or(file.run).unwrap_or_else(|| NodePaths::DEFAULT_RUN.into()),
            ),
            advertise: self.advertise.or(file.advertise),
            node_name: self.node_name.or(file.node_name).unwrap_or_else(host_name),
            listen_control: self.listen_control.or(file.listen_control).unwrap_or(any(7400)),
            listen_storage: self.listen_storage.or(file.listen_storage).unwrap_or(any(7401)),
            listen_frames: self.listen_frames.or(file.listen_frames).unwrap_or(any(7402)),
            listen_api: self.listen_api.or(file.listen_api).unwrap_or(any(7443)),
            link_mtu: self.link_mtu.or(file.link_mtu),
        })
    }

    fn file(&self) -> Result<Self, OptionsError> {
        let path = self.config.clone().unwrap_or_else(|| DEFAULT_CONFIG.into());
        match std::fs::read_to_string(&path) {
            Ok(text) => parse(&text, &path),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.config.is_none() => {
                Ok(Self::default())
            }
            Err(source) => Err(OptionsError::Read { path, source }),
        }
    }
}

fn parse(text: &str, path: &Path) -> Result<Args, OptionsError> {
    let invalid = |source| OptionsError::Parse { path: path.to_owned(), source: Box::new(source) };
    toml::from_str(text).map_err(invalid)
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim().split('.').next() {
        Some(first) if !first.is_empty() => first.to_owned(),
        _ => "node".to_owned(),
    }
}

impl NodeOptions {
    /// Where the other nodes reach this one.
    pub fn addresses(&self) -> std::io::Result<NodeAddresses> {
        let at = |listen: SocketAddr| {
            let ip = match self.advertise {
                Some(ip) => ip,
                None if !listen.ip().is_unspecified() => listen.ip(),
                None => outward_address()?,
            };
            Ok::<_, std::io::Error>(SocketAddr::new(ip, listen.port()))
        };
        Ok(NodeAddresses {
            control: at(self.listen_control)?,
            storage: at(self.listen_storage)?,
            frames: at(self.listen_frames)?,
            api: at(self.listen_api)?,
        })
    }
}

/// The address that this machine would send from to the outside. Nothing is sent: connecting UDP only asks the routes.
fn outward_address() -> std::io::Result<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // TEST-NET-3: documentation addresses, routed like any other foreign address.
    socket.connect("203.0.113.1:9")?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_win_over_the_file_and_mistakes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("node.toml");
        std::fs::write(&config, "node_name = 'n7'\nadvertise = '10.0.0.7'\nlisten_api = '127.0.0.1:1'")
            .unwrap();
        let args = Args {
            config: Some(config.clone()),
            listen_api: Some(([127, 0, 0, 1], 2).into()),
            ..Args::default()
        };
        let options = args.clone().complete().unwrap();
        assert_eq!((options.node_name.as_str(), options.listen_api.port()), ("n7", 2));
        assert_eq!(options.addresses().unwrap().control, "10.0.0.7:7400".parse().unwrap());
        std::fs::write(&config, "colour = 'red'").unwrap();
        assert!(args.complete().unwrap_err().to_string().contains("colour"));
    }
}
