//! Load by fio: on one file with O_DIRECT (one copy without network, checksums or a log), or on a Ceph image.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::usage;
use super::workload::{AREA, DURATION, Kind, SMALL, Workload};
use crate::bench::Row;

/// When a command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// When its time is over.
    WholeTime,
    /// When it has been everywhere once.
    Once,
}

/// The workload on a file.
pub fn on_file(target: &str, workload: Workload, file: &Path) -> Result<Row> {
    let mut fio = command(workload, DURATION, Length::WholeTime);
    fio.arg("--filename").arg(file).arg("--direct=1");
    if workload.kind == Kind::WriteFlush {
        fio.arg("--fdatasync=1");
    }
    // One request at a time needs no queue: it would only add a wake-up.
    fio.arg(if workload.depth == 1 { "--ioengine=psync" } else { "--ioengine=libaio" });
    run(fio, target, workload, &[])
}

/// The workload on an image of the pool `rbd`; `servers` are the processes of the cluster.
pub fn on_rbd(target: &str, workload: Workload, image: &str, config: &Path, servers: &[u32]) -> Result<Row> {
    run(rbd(workload, DURATION, Length::WholeTime, image, config), target, workload, servers)
}

/// A command that works on an image for that long at most.
pub fn rbd(workload: Workload, duration: Duration, length: Length, image: &str, config: &Path) -> Command {
    let mut fio = command(workload, duration, length);
    fio.env("CEPH_CONF", config).args(["--ioengine=rbd", "--clientname=admin", "--pool=rbd"]);
    fio.arg(format!("--rbdname={image}"));
    if workload.kind == Kind::WriteFlush {
        // The engine knows no other flush.
        fio.arg("--fsync=1");
    }
    fio
}

fn command(workload: Workload, duration: Duration, length: Length) -> Command {
    let kind = match (workload.kind, workload.size) {
        (Kind::Read, SMALL) => "randread",
        (Kind::Read, _) => "read",
        (Kind::Write | Kind::WriteFlush, SMALL) => "randwrite",
        (Kind::Write | Kind::WriteFlush, _) => "write",
    };
    let mut fio = Command::new("timeout");
    fio.args(["120", "fio", "--name=bench", "--output-format=json", "--refill_buffers"]);
    fio.arg(format!("--size={AREA}")).arg(format!("--runtime={}", duration.as_secs()));
    if length == Length::WholeTime {
        fio.arg("--time_based");
    }
    fio.arg(format!("--rw={kind}")).arg(format!("--bs={}", workload.size));
    fio.arg(format!("--iodepth={}", workload.depth));
    fio
}

fn run(mut fio: Command, target: &str, workload: Workload, servers: &[u32]) -> Result<Row> {
    let cpu = usage::cpu(servers)?;
    let output = fio.output().context("cannot run fio; is it installed?")?;
    let cpu = usage::cpu(servers)?.saturating_sub(cpu).as_secs_f64() * 1e6;
    check(&output)?;
    let text = String::from_utf8(output.stdout)?;
    let json: Value = serde_json::from_str(text.get(text.find('{').unwrap_or(0)..).unwrap_or_default())?;
    let job = &json["jobs"][0];
    let side = &job[if workload.kind == Kind::Read { "read" } else { "write" }];
    let number = |value: &Value| value.as_f64().context("fio left out a figure");
    let latency = &side["clat_ns"];
    let sync = &job["sync"]["lat_ns"];
    // fio counts the sync apart; its percentiles do not add up, but they bound the sum well enough to compare.
    let with_sync = |name: &[&str]| {
        let of = |latency: &Value| number(name.iter().fold(latency, |value, key| &value[*key]));
        let own = of(latency)? / 1e3;
        Ok::<_, anyhow::Error>(if workload.kind == Kind::WriteFlush { own + of(sync)? / 1e3 } else { own })
    };
    let (iops, requests) = (number(&side["iops"])?, number(&side["total_ios"])?.max(1.0));
    let runtime_us = number(&side["runtime"])? * 1e3;
    let own = (number(&job["usr_cpu"])? + number(&job["sys_cpu"])?) / 100.0 * runtime_us;
    let mut figures = vec![
        ("iops", iops),
        ("mb_s", number(&side["bw_bytes"])? / 1e6),
        ("mean_us", with_sync(&["mean"])?),
        ("p50_us", with_sync(&["percentile", "50.000000"])?),
        ("p99_us", with_sync(&["percentile", "99.000000"])?),
        ("cpu_us_per_io", (own + cpu) / requests),
    ];
    if !servers.is_empty() {
        figures.push(("rss_mib", usage::resident(servers)? as f64 / f64::from(1 << 20)));
    }
    Ok(Row::new(target, workload.name, figures))
}

/// Fails with what fio said.
pub fn check(output: &std::process::Output) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stdout);
    // Its complaint may stand before its report.
    let complaint = said.lines().find(|line| line.starts_with("fio:")).unwrap_or_default();
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "fio failed ({}): {complaint} {}", output.status, error.trim());
    Ok(())
}
