//! Measures the overlay beside the bare link that it runs on: TCP rate (iperf3) and round trip (64 bytes there and
//! back over TCP) between two network namespaces that are joined by a veth pair, without VMs. Prints a table; writes
//! `overlay.json` into the folder that is its argument (default `target/bench`). Needs root, iproute2 and iperf3.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hci_tests::overlay_node::{OverlayNode, identity};
use hci_tests::tap;
use netfabric::NodeId;
use netfabric::overlay::{ForwardEntry, MacAddr, NetworkConfig, OverlayConfig, PortConfig, PortId, Vni};
use netfabric::pki::{ClusterCa, Identity};
use serde_json::{Value, json};

const SECONDS: u32 = 5;
const ROUND_TRIPS: usize = 10_000;
const ECHO_PORT: u16 = 7;
/// Inner MTU by outer MTU: a guest's packet may be as large as the link's.
const MTUS: [u16; 2] = [1500, 8900];
const SIDES: [Side; 2] = [
    Side {
        namespace: "hci-bench-a",
        link: Ipv4Addr::new(198, 18, 0, 1),
        guest: Ipv4Addr::new(198, 19, 0, 10),
    },
    Side {
        namespace: "hci-bench-b",
        link: Ipv4Addr::new(198, 18, 0, 2),
        guest: Ipv4Addr::new(198, 19, 0, 20),
    },
];

/// One end of the link.
struct Side {
    namespace: &'static str,
    link: Ipv4Addr,
    guest: Ipv4Addr,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [role, folder, index] if role == "node" => run_node(Path::new(folder), index.parse()?),
        [role, address] if role == "echo" => echo(address.parse()?),
        [role, address] if role == "round-trips" => round_trips(address.parse()?),
        [] => measure(Path::new("target/bench")),
        [folder] => measure(Path::new(folder)),
        _ => bail!("usage: overlay-bench [folder for the results]"),
    }
}

/// Child process: one node in its namespace, with a TAP device as its guest. Serves until its input is closed.
fn run_node(folder: &Path, index: usize) -> Result<()> {
    let side = SIDES.get(index).context("no such side")?;
    let folder = folder.join(index.to_string());
    let identity = Identity::load(&folder)?.context("no identity")?;
    let peer: BTreeMap<NodeId, SocketAddr> = serde_json::from_slice(&fs::read(folder.join("peer.json"))?)?;
    let config: OverlayConfig = serde_json::from_slice(&fs::read(folder.join("overlay.json"))?)?;
    let node = OverlayNode::start(identity, SocketAddr::from((side.link, 7402)))?;
    node.overlay.apply(&config)?;
    node.link(peer)?;
    let port = config.ports.first().context("no port")?;
    let tap = tap::open("guest")?;
    let mtu = config.networks.first().context("no network")?.mtu;
    run("ip", &["link", "set", "guest", "address", &port.mac.to_string(), "mtu", &mtu.to_string(), "up"])?;
    run("ip", &["address", "add", &format!("{}/24", port.ip), "dev", "guest"])?;
    std::thread::spawn(|| {
        // The parent went away, or is done.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    tap::bridge(&tap, &port.socket)
}

/// Child process: sends back what it receives on one connection.
fn echo(address: Ipv4Addr) -> Result<()> {
    let (mut stream, _) = TcpListener::bind((address, ECHO_PORT))?.accept()?;
    stream.set_nodelay(true)?;
    let mut message = [0; 64];
    while stream.read_exact(&mut message).is_ok() {
        stream.write_all(&message)?;
    }
    Ok(())
}

/// Child process: prints the median and the 99th percentile of round trips in microseconds.
fn round_trips(address: Ipv4Addr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&(address, ECHO_PORT).into(), Duration::from_secs(1))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut message = [0; 64];
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let at = |share: usize| times[ROUND_TRIPS * share / 100].as_secs_f64() * 1e6;
    println!("{} {}", at(50), at(99));
    Ok(())
}

fn measure(results: &Path) -> Result<()> {
    let mut rows = Vec::new();
    for mtu in MTUS {
        let outer = if mtu == 1500 { 1500 } else { 9000 };
        let _link = Link::new(outer)?;
        rows.extend(measure_target("veth", outer, SIDES[1].link)?);
        let folder = std::env::temp_dir().join(format!("hci-overlay-bench-{}", std::process::id()));
        let _nodes = start_nodes(&folder, mtu)?;
        rows.extend(measure_target("overlay", outer, SIDES[1].guest)?);
        fs::remove_dir_all(&folder)?;
    }
    println!("{:<8} {:>5}  {:<12} {:>12}  unit", "target", "mtu", "workload", "value");
    for row in &rows {
        for (name, value) in row.as_object().into_iter().flatten() {
            if let Some(value) = value.as_f64().filter(|_| name != "mtu_bytes") {
                let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
                println!(
                    "{:<8} {:>5}  {:<12} {value:>12.2}  {name}",
                    text("target"),
                    row["mtu_bytes"],
                    text("workload")
                );
            }
        }
    }
    fs::create_dir_all(results)?;
    fs::write(results.join("overlay.json"), serde_json::to_vec_pretty(&rows)?)?;
    Ok(())
}

/// Two namespaces and the pair between them; gone when dropped.
struct Link;

impl Link {
    fn new(mtu: u16) -> Result<Self> {
        Self::remove();
        let link = Self;
        for side in &SIDES {
            run("ip", &["netns", "add", side.namespace])?;
            run("ip", &["-n", side.namespace, "link", "set", "lo", "up"])?;
        }
        let [a, b] = &SIDES;
        run(
            "ip",
            &[
                "-n",
                a.namespace,
                "link",
                "add",
                "wire",
                "type",
                "veth",
                "peer",
                "name",
                "wire",
                "netns",
                b.namespace,
            ],
        )?;
        for side in &SIDES {
            let address = format!("{}/24", side.link);
            run("ip", &["-n", side.namespace, "address", "add", &address, "dev", "wire"])?;
            run("ip", &["-n", side.namespace, "link", "set", "wire", "mtu", &mtu.to_string(), "up"])?;
        }
        Ok(link)
    }

    fn remove() {
        for side in &SIDES {
            // Not being there is fine.
            let _ =
                Command::new("ip").args(["netns", "delete", side.namespace]).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        Self::remove();
    }
}

/// The two node processes; ended when dropped.
struct Nodes(Vec<Child>);

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            drop(child.stdin.take());
            // It may have ended already; then there is nothing to end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start_nodes(folder: &Path, mtu: u16) -> Result<Nodes> {
    let ca = ClusterCa::create("bench")?;
    let names = [NodeId::random(), NodeId::random()];
    let vni = Vni::try_from(1)?;
    let mac = |index: usize| MacAddr::new([2, 0, 0, 0, 0, index as u8 + 1]);
    let entry =
        |index: usize| ForwardEntry { vni, mac: mac(index), ip: SIDES[index].guest, node: names[index] };
    let mut nodes = Nodes(Vec::new());
    for index in 0..SIDES.len() {
        let own = folder.join(index.to_string());
        fs::create_dir_all(&own)?;
        identity(&ca, names[index])?.store(&own)?;
        let other = 1 - index;
        let peer = BTreeMap::from([(names[other], SocketAddr::from((SIDES[other].link, 7402)))]);
        fs::write(own.join("peer.json"), serde_json::to_vec(&peer)?)?;
        let network = NetworkConfig {
            vni,
            subnet: "198.19.0.0/24".parse()?,
            gateway: Ipv4Addr::new(198, 19, 0, 1),
            mtu,
            dns: Vec::new(),
            domain: String::new(),
        };
        let port = PortConfig {
            id: PortId::random(),
            vni,
            mac: mac(index),
            ip: SIDES[index].guest,
            hostname: String::new(),
            socket: own.join("port.sock"),
        };
        let config = OverlayConfig {
            networks: vec![network],
            ports: vec![port],
            forwarding: vec![entry(0), entry(1)],
        };
        fs::write(own.join("overlay.json"), serde_json::to_vec(&config)?)?;
        let program: PathBuf = std::env::current_exe()?;
        let child = Command::new("ip")
            .args(["netns", "exec", SIDES[index].namespace])
            .arg(program)
            .arg("node")
            .arg(folder)
            .arg(index.to_string())
            .stdin(Stdio::piped())
            .spawn()?;
        nodes.0.push(child);
    }
    Ok(nodes)
}

fn measure_target(target: &str, mtu: u16, address: Ipv4Addr) -> Result<Vec<Value>> {
    let address = address.to_string();
    let row = |workload: &str| json!({ "target": target, "mtu_bytes": mtu, "workload": workload });
    let in_a = |program: &str, arguments: &[&str]| {
        let command = [&["netns", "exec", SIDES[0].namespace, program], arguments].concat();
        run("ip", &command)
    };
    let mut rows = Vec::new();

    let (median, tail) = measure_round_trips(&address)?;
    let mut times = row("round trip");
    times["p50_us"] = json!(median);
    times["p99_us"] = json!(tail);
    rows.push(times);

    for (workload, streams) in [("tcp", "1"), ("tcp-4", "4")] {
        let mut server = Command::new("ip")
            .args(["netns", "exec", SIDES[1].namespace, "iperf3", "-s", "-1", "-B", &address])
            .stdout(Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_millis(500));
        let seconds = SECONDS.to_string();
        let report = in_a("iperf3", &["-c", &address, "-J", "-t", &seconds, "-P", streams]);
        // It ends after one client; if that failed, here.
        let _ = server.kill();
        server.wait()?;
        let report: Value = serde_json::from_str(&report?)?;
        let bits =
            report["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 says no rate")?;
        let mut tcp = row(workload);
        tcp["rate_gbit_s"] = json!(bits / 1e9);
        rows.push(tcp);
    }
    Ok(rows)
}

/// Also waits until the address can be reached.
fn measure_round_trips(address: &str) -> Result<(f64, f64)> {
    let program = std::env::current_exe()?;
    let role = |side: &Side, role: &str| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", side.namespace]).arg(&program).args([role, address]);
        command
    };
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        // Fails while the address is not there yet.
        let mut server = role(&SIDES[1], "echo").stderr(Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_millis(200));
        let output = role(&SIDES[0], "round-trips").output()?;
        let _ = server.kill();
        server.wait()?;
        if output.status.success() {
            let text = String::from_utf8(output.stdout)?;
            let (median, tail) = text.trim().split_once(' ').context("no times")?;
            return Ok((median.parse()?, tail.parse()?));
        }
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(Instant::now() < deadline, "{address} cannot be reached: {error}");
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}; is it installed?"))?;
    ensure!(
        output.status.success(),
        "{program} {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}
