//! The overlay beside the bare link that it runs on: TCP rate (iperf3) and round trip (64 bytes there and back over TCP).
//!
//! Two nodes, joined by veth pairs; each has one port of the overlay, with a TAP device as its guest, in a namespace of its
//! own, so that the kernel's network stack takes the place of a VM, offloads included.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netfabric::overlay::{
    ForwardEntry, MacAddr, NetworkConfig, OverlayConfig, PortConfig, PortId, PortStanding, Vni,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Row, micros};
use crate::native::cluster::{self, DataCluster, Disks};
use crate::native::fabric::{Fabric, Namespace};
use crate::tap;

const SECONDS: u32 = 3;
const ROUND_TRIPS: usize = 10_000;
const ECHO_PORT: u16 = 7;
const PATIENCE: Duration = Duration::from_secs(20);
/// MTU of the link and of the guests: a guest's packet may be as large as the link's.
const MTUS: [(u16, u16); 2] = [(1500, 1500), (9000, 8900)];
const GUESTS: [Ipv4Addr; 2] = [Ipv4Addr::new(198, 19, 0, 10), Ipv4Addr::new(198, 19, 0, 20)];

/// Measures with ordinary and with large frames.
pub fn measure(hci: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (link, guest) in MTUS {
        let options = cluster::Options {
            hci: Some(hci.to_owned()),
            nodes: 2,
            mtu: link,
            disks: Disks::Memory(vec![16 << 20; 2]),
            volume_bytes: 1 << 20,
            ..cluster::Options::default()
        };
        let mut cluster = DataCluster::start(&options)?;
        let bare = [0, 1].map(|node| cluster.fabric().node(node).name().to_owned());
        eprintln!("network: the bare link, MTU {link}");
        rows.extend(target("veth", link, [&bare[0], &bare[1]], Fabric::address(1))?);
        let guests = [Namespace::new()?, Namespace::new()?];
        let _taps = attach_guests(&mut cluster, &guests, guest)?;
        eprintln!("network: the overlay on it, MTU {link}");
        let measured = target("overlay", link, [guests[0].name(), guests[1].name()], GUESTS[1]);
        rows.extend(measured.with_context(|| cluster.logs())?);
    }
    Ok(rows)
}

/// A program that is ended when dropped.
struct Helper(Child);

impl Helper {
    /// Starts it; it ends with this program.
    fn start(mut command: Command) -> Result<Self> {
        // SAFETY: between fork and exec only an async-signal-safe call is made: prctl.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        Ok(Self(child))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command in a namespace.
fn inside(namespace: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).arg(program);
    command
}

/// This program, in a role, in a namespace.
fn role(namespace: &str, role: &str, argument: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
    let mut command = inside(namespace, std::env::current_exe()?);
    command.arg(role).arg(argument);
    Ok(command)
}

fn attach_guests(cluster: &mut DataCluster, guests: &[Namespace; 2], mtu: u16) -> Result<Vec<Helper>> {
    let vni = Vni::try_from(1)?;
    let mac = |index: usize| MacAddr::new([2, 0, 0, 0, 0, index as u8 + 1]);
    let nodes: Vec<_> = cluster.record().lock().nodes.iter().map(|node| node.id).collect();
    let forwarding: Vec<_> = (0..2)
        .map(|index| ForwardEntry { vni, mac: mac(index), ip: GUESTS[index], node: nodes[index] })
        .collect();
    let mut taps = Vec::new();
    for (index, guest) in guests.iter().enumerate() {
        let id = PortId::random();
        let socket = cluster.paths(index).run().join(format!("{id}.sock"));
        let network = NetworkConfig {
            vni,
            subnet: "198.19.0.0/24".parse()?,
            gateway: Ipv4Addr::new(198, 19, 0, 1),
            mtu,
            dns: Vec::new(),
            domain: String::new(),
        };
        let port = PortConfig {
            id,
            vni,
            mac: mac(index),
            ip: GUESTS[index],
            hostname: String::new(),
            socket: socket.clone(),
            standing: PortStanding::Active,
        };
        let config =
            OverlayConfig { networks: vec![network], ports: vec![port], forwarding: forwarding.clone() };
        cluster.set_overlay(index, config);
        cluster.wait("the port is there", PATIENCE, |_| socket.exists())?;
        taps.push(Helper::start(role(guest.name(), "tap", &socket)?)?);
        let deadline = Instant::now() + PATIENCE;
        while guest.ip(&["link", "show", "guest"]).is_err() {
            ensure!(Instant::now() < deadline, "no TAP device within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let (address, mtu) = (format!("{}/24", GUESTS[index]), mtu.to_string());
        guest.ip(&["link", "set", "guest", "address", &mac(index).to_string(), "mtu", &mtu, "up"])?;
        guest.ip(&["address", "add", &address, "dev", "guest"])?;
    }
    Ok(taps)
}

/// Child process: a TAP device in this namespace as the guest of a port.
pub fn run_tap(socket: &Path) -> Result<()> {
    tap::bridge(&tap::open("guest")?, socket)
}

/// Child process: sends back what it receives on one connection.
pub fn run_echo(address: Ipv4Addr) -> Result<()> {
    let (mut stream, _) = TcpListener::bind((address, ECHO_PORT))?.accept()?;
    stream.set_nodelay(true)?;
    let mut message = [0; 64];
    while stream.read_exact(&mut message).is_ok() {
        stream.write_all(&message)?;
    }
    Ok(())
}

/// Child process: prints the mean, the median and the 99th percentile of round trips in microseconds.
pub fn run_round_trips(address: Ipv4Addr) -> Result<()> {
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
    let mean = times.iter().sum::<Duration>() / ROUND_TRIPS as u32;
    let at = |share: usize| micros(times[ROUND_TRIPS * share / 100]);
    println!("{} {} {}", micros(mean), at(50), at(99));
    Ok(())
}

fn target(name: &str, mtu: u16, [from, to]: [&str; 2], address: Ipv4Addr) -> Result<Vec<Row>> {
    let workload = |what: &str| format!("{what}, MTU {mtu}");
    let [mean, median, tail] = round_trips(from, to, address)?;
    let figures = vec![("mean_us", mean), ("p50_us", median), ("p99_us", tail)];
    let mut rows = vec![Row::new(name, &workload("TCP round trip of 64 bytes"), figures)];
    for (what, streams) in [("TCP, 1 stream", 1), ("TCP, 4 streams", 4)] {
        let rate = tcp_rate(from, to, address, streams)?;
        rows.push(Row::new(name, &workload(what), vec![("gbit_per_s", rate)]));
    }
    Ok(rows)
}

fn tcp_rate(from: &str, to: &str, address: Ipv4Addr, streams: u32) -> Result<f64> {
    let address = address.to_string();
    let mut server = inside(to, "iperf3");
    server.args(["-s", "-1", "-B", &address]);
    let _server = Helper::start(server)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut client = inside(from, "timeout");
        client.args(["30", "iperf3", "-J", "-c", &address, "--connect-timeout", "2000"]);
        client.args(["-t", &SECONDS.to_string(), "-P", &streams.to_string()]);
        let output = client.output().context("cannot run iperf3; is it installed?")?;
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if let Some(bits) = report["end"]["sum_received"]["bits_per_second"].as_f64() {
            return Ok(bits / 1e9);
        }
        // The server may not listen yet.
        ensure!(Instant::now() < deadline, "iperf3 to {address}: {}", report["error"]);
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Also waits until the address can be reached.
fn round_trips(from: &str, to: &str, address: Ipv4Addr) -> Result<[f64; 3]> {
    let text = address.to_string();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let _server = Helper::start(role(to, "echo", &text)?)?;
        std::thread::sleep(Duration::from_millis(200));
        let output = role(from, "round-trips", &text)?.output()?;
        if output.status.success() {
            let text = String::from_utf8(output.stdout)?;
            let figures = text.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>()?;
            return <[f64; 3]>::try_from(figures).ok().context("three figures were expected");
        }
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(Instant::now() < deadline, "{address} cannot be reached: {error}");
    }
}
