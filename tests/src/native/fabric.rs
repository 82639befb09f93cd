//! The network between the nodes: a namespace for each, a bridge in one more, a veth pair from each node to the bridge.

use std::net::Ipv4Addr;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use super::scratch::{run, unique_name};

/// A hardware address that nobody has: frames to it vanish.
const NOBODY: &str = "02:00:00:00:00:fe";
/// The interface of a node in its namespace.
const INTERFACE: &str = "eth0";

/// See the module. Gone when dropped.
#[derive(Debug)]
pub struct Fabric {
    hub: Namespace,
    nodes: Vec<Namespace>,
}

/// A network namespace, gone when dropped.
#[derive(Debug)]
pub struct Namespace(String);

impl Namespace {
    /// Makes one.
    pub fn new() -> Result<Self> {
        let name = unique_name();
        run("ip", &["netns", "add", &name])?;
        let namespace = Self(name);
        namespace.ip(&["link", "set", "lo", "up"])?;
        namespace.enter(|| {
            // As nodes are set: that a port is closed is said to each packet.
            std::fs::write("/proc/sys/net/ipv4/icmp_ratemask", "6160").context("icmp_ratemask")
        })?;
        Ok(namespace)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Runs `ip` on it.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        run("ip", &[&["-n", &self.0], arguments].concat())
    }

    /// Does something on a thread that is in it: sockets that are made there belong to it for ever.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = format!("/run/netns/{}", self.0);
        thread::scope(|scope| {
            let entered = scope.spawn(move || {
                let file = std::fs::File::open(&path).with_context(|| path.clone())?;
                setns(file, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")?;
                work()
            });
            entered.join().map_err(|_| anyhow!("the work in the namespace panicked"))?
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = run("ip", &["netns", "delete", &self.0]) {
            eprintln!("{error:#}");
        }
    }
}

impl Fabric {
    /// Namespaces for that many nodes, and links with that MTU.
    pub fn new(nodes: usize, mtu: u16) -> Result<Self> {
        let mtu = mtu.to_string();
        let hub = Namespace::new()?;
        hub.ip(&["link", "add", "bridge", "mtu", &mtu, "type", "bridge"])?;
        hub.ip(&["link", "set", "bridge", "up"])?;
        let mut fabric = Self { hub, nodes: Vec::new() };
        for index in 0..nodes {
            let node = Namespace::new()?;
            let port = port(index);
            let pair =
                ["link", "add", &port, "mtu", &mtu, "type", "veth", "peer", "name", INTERFACE, "mtu", &mtu];
            fabric.hub.ip(&[&pair[..], &["netns", node.name()]].concat())?;
            fabric.hub.ip(&["link", "set", &port, "master", "bridge", "up"])?;
            let address = format!("{}/24", Self::address(index));
            node.ip(&["address", "add", &address, "dev", INTERFACE])?;
            node.ip(&["link", "set", INTERFACE, "up"])?;
            fabric.nodes.push(node);
        }
        Ok(fabric)
    }

    /// The address of a node. (198.18.0.0/15 is reserved for benchmarks: nothing real is hidden.)
    pub fn address(node: usize) -> Ipv4Addr {
        Ipv4Addr::new(198, 18, 0, node as u8 + 1)
    }

    /// The namespace of a node.
    pub fn node(&self, node: usize) -> &Namespace {
        &self.nodes[node]
    }

    /// Nothing gets to this node, nothing gets out of it.
    pub fn cut(&self, node: usize) -> Result<()> {
        self.hub.ip(&["link", "set", &port(node), "down"]).map(drop)
    }

    /// What the one sends to the other is lost without a sign; the other way works.
    pub fn cut_one_way(&self, from: usize, to: usize) -> Result<()> {
        let to = Self::address(to).to_string();
        let lost = ["neigh", "replace", &to, "lladdr", NOBODY, "dev", INTERFACE, "nud", "permanent"];
        self.nodes[from].ip(&lost).map(drop)
    }

    /// Mends whatever was cut.
    pub fn heal(&self) -> Result<()> {
        for (index, node) in self.nodes.iter().enumerate() {
            self.hub.ip(&["link", "set", &port(index), "up"])?;
            // Only what was cut is permanent; everything else is resolved again.
            node.ip(&["neigh", "flush", "nud", "permanent", "dev", INTERFACE])?;
        }
        Ok(())
    }
}

/// The bridge's port for a node.
fn port(node: usize) -> String {
    format!("node{node}")
}
