//! Ceph as Debian has it: one monitor, one manager, three OSDs, an image with three copies; everything on loopback, without
//! authentication and encryption, which is in its favour. The client is fio's rbd engine, its cache off.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::Medium;
use super::fio;
use super::qsd::Server;
use super::workload::{AREA, Kind, LARGE, UNDER_LOSS, WORKLOADS, Workload};
use crate::bench::Row;
use crate::native::process::tail;
use crate::native::scratch::{self, Directory};

const OSDS: usize = 3;
/// Room of an OSD: the data and its database.
const OSD_BYTES: u64 = AREA + (4 << 30);
const COMMAND_LIMIT: &str = "60";
const CLEAN_LIMIT: Duration = Duration::from_secs(90);
/// A silent OSD is given up after some 20 s; the load has to outlast that.
const KILLED: Duration = Duration::from_secs(15);
const STOPPED: Duration = Duration::from_secs(50);
const IMAGE: &str = "bench";

struct Cluster {
    osds: Vec<Server>,
    others: Vec<Server>,
    config: PathBuf,
    // Last: the processes work in it.
    directory: Directory,
}

/// Measures one.
pub fn measure(medium: Medium) -> Result<Vec<Row>> {
    let mut cluster = Cluster::start(medium)?;
    let target = format!("ceph, {}", medium.name());
    on_cluster(&target, &mut cluster).with_context(|| format!("its processes say: {}", tail(&cluster.log())))
}

fn on_cluster(target: &str, cluster: &mut Cluster) -> Result<Vec<Row>> {
    cluster.fill()?;
    let mut rows = Vec::new();
    for workload in WORKLOADS {
        eprintln!("  {target}: {}", workload.name);
        cluster.check_osds()?;
        rows.push(fio::on_rbd(target, workload, IMAGE, &cluster.config, &cluster.pids())?);
    }
    let name = "4 KiB random write, depth 8, a replica is stopped";
    rows.push(Row::new(target, name, vec![("gap_s", cluster.gap(STOPPED, Signal::SIGSTOP)?.as_secs_f64())]));
    kill(cluster.victim()?, Signal::SIGCONT)?;
    cluster.wait_until_clean()?;
    let name = "4 KiB random write, depth 8, a replica is killed";
    rows.push(Row::new(target, name, vec![("gap_s", cluster.gap(KILLED, Signal::SIGKILL)?.as_secs_f64())]));
    Ok(rows)
}

impl Cluster {
    fn start(medium: Medium) -> Result<Self> {
        let directory = Directory::new()?;
        let place = medium.place(&directory, OSD_BYTES * OSDS as u64 + (1 << 30))?;
        let config = place.join("ceph.conf");
        let id = uuid::Uuid::new_v4();
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        fs::write(&config, settings(&place, &id.to_string(), port))?;
        let mut cluster = Self { osds: Vec::new(), others: Vec::new(), config, directory };
        cluster.start_monitor(&place, &id.to_string(), port)?;
        for number in 0..OSDS {
            cluster.start_osd(&place, number)?;
        }
        cluster.ceph(&["osd", "pool", "create", "rbd", "32"])?;
        cluster.ceph(&["osd", "pool", "application", "enable", "rbd", "rbd"])?;
        cluster.wait_until_clean()?;
        let size = format!("{}M", AREA >> 20);
        cluster.run("rbd", &["create", IMAGE, "--size", &size, "--image-feature", "layering"])?;
        Ok(cluster)
    }

    fn start_monitor(&mut self, place: &Path, id: &str, port: u16) -> Result<()> {
        let map = place.join("monmap").display().to_string();
        let address = format!("[v2:127.0.0.1:{port}]");
        scratch::run("monmaptool", &["--create", "--clobber", "--fsid", id, "--addv", "a", &address, &map])
            .context("Ceph is missing; `make bench-storage` installs it")?;
        for folder in ["mon", "mgr"] {
            fs::create_dir_all(place.join(folder))?;
        }
        self.run("ceph-mon", &["--mkfs", "-i", "a", "--monmap", &map])?;
        self.others.push(self.daemon("ceph-mon", "a")?);
        self.others.push(self.daemon("ceph-mgr", "a")?);
        let deadline = Instant::now() + CLEAN_LIMIT;
        while self.ceph(&["mon", "stat"]).is_err() {
            ensure!(Instant::now() < deadline, "the monitor does not answer within {CLEAN_LIMIT:?}");
        }
        Ok(())
    }

    fn start_osd(&mut self, place: &Path, number: usize) -> Result<()> {
        let id = uuid::Uuid::new_v4().to_string();
        let given = self.ceph(&["osd", "new", &id])?;
        ensure!(given.trim() == number.to_string(), "OSD {number} was called {given}");
        fs::create_dir_all(place.join(format!("osd{number}")))?;
        let name = number.to_string();
        self.run("ceph-osd", &["-i", &name, "--mkfs", "--osd-uuid", &id])?;
        self.osds.push(self.daemon("ceph-osd", &name)?);
        Ok(())
    }

    fn daemon(&self, program: &str, id: &str) -> Result<Server> {
        let mut command = Command::new(program);
        command.args(["-f", "-i", id, "-c"]).arg(&self.config);
        Server::start(command, &self.log())
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let config = self.config.display().to_string();
        let all: Vec<&str> =
            [COMMAND_LIMIT, program, "-c", &config].into_iter().chain(arguments.iter().copied()).collect();
        scratch::run("timeout", &all)
    }

    fn ceph(&self, arguments: &[&str]) -> Result<String> {
        let all: Vec<&str> =
            ["--connect-timeout", "20"].into_iter().chain(arguments.iter().copied()).collect();
        self.run("ceph", &all)
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("ceph.log")
    }

    fn check_osds(&mut self) -> Result<()> {
        for (number, osd) in self.osds.iter_mut().enumerate() {
            ensure!(osd.runs()?, "OSD {number} has ended");
        }
        Ok(())
    }

    fn pids(&self) -> Vec<u32> {
        self.osds.iter().chain(&self.others).map(Server::pid).collect()
    }

    fn wait_until_clean(&self) -> Result<()> {
        let deadline = Instant::now() + CLEAN_LIMIT;
        loop {
            let text = self.ceph(&["status", "-f", "json"])?;
            let status: Value = serde_json::from_str(&text)?;
            let states = status["pgmap"]["pgs_by_state"].as_array().cloned().unwrap_or_default();
            let clean = |state: &Value| state["state_name"].as_str() == Some("active+clean");
            if !states.is_empty() && states.iter().all(clean) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "Ceph is not clean within {CLEAN_LIMIT:?}: {states:?}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn fill(&self) -> Result<()> {
        let fill = Workload { name: "fill", kind: Kind::Write, size: LARGE, depth: 8 };
        let mut fio = fio::rbd(fill, Duration::from_secs(100), fio::Length::Once, IMAGE, &self.config);
        fio::check(&fio.output().context("cannot run fio; is it installed?")?)
    }

    fn victim(&self) -> Result<Pid> {
        let last = self.osds.last().context("no OSD")?;
        Ok(Pid::from_raw(i32::try_from(last.pid())?))
    }

    /// The longest time without an answer while the last OSD gets a signal.
    fn gap(&mut self, duration: Duration, signal: Signal) -> Result<Duration> {
        let log = self.directory.path().join("gap");
        let mut fio = fio::rbd(UNDER_LOSS, duration, fio::Length::WholeTime, IMAGE, &self.config);
        fio.arg(format!("--write_lat_log={}", log.display()));
        let load = std::thread::spawn(move || fio.output());
        std::thread::sleep(Duration::from_secs(5));
        kill(self.victim()?, signal)?;
        let output = match load.join() {
            Ok(output) => output.context("cannot run fio; is it installed?")?,
            Err(_) => bail!("the load panicked"),
        };
        fio::check(&output)?;
        // One line an answer: milliseconds since the start first.
        let lines = fs::read_to_string(self.directory.path().join("gap_clat.1.log"))?;
        let times = lines.lines().filter_map(|line| line.split(',').next()?.trim().parse::<u64>().ok());
        let mut times: Vec<u64> = times.chain([0]).collect();
        times.sort_unstable();
        let longest = times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
        Ok(Duration::from_millis(longest))
    }
}

fn settings(place: &Path, id: &str, port: u16) -> String {
    let place = place.display();
    format!(
        "[global]
fsid = {id}
mon host = [v2:127.0.0.1:{port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv4 = true
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 3
osd pool default min size = 2
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon osd min down reporters = 1
run dir = {place}
admin socket =
log to stderr = true
err to stderr = true
log file =
pid file =
crash dir = {place}
mon data = {place}/mon
mgr data = {place}/mgr
osd data = {place}/osd$id
osd objectstore = bluestore
bluestore block create = true
bluestore block size = {OSD_BYTES}
rbd cache = false
"
    )
}
