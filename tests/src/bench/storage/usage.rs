//! CPU time and memory of processes, as the kernel tells them.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// CPU time that these processes and their threads have used so far, to 10 ms each.
pub fn cpu(pids: &[u32]) -> Result<Duration> {
    let tick = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock ticks")?;
    let mut ticks = 0;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
            .with_context(|| format!("process {pid} has ended"))?;
        // The name in parentheses may hold anything; user and system time are the 12th and 13th field behind it.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        for field in fields.split_whitespace().skip(11).take(2) {
            ticks += field.parse::<u64>()?;
        }
    }
    Ok(Duration::from_secs_f64(ticks as f64 / tick as f64))
}

/// Resident memory of the largest of these processes, bytes.
pub fn resident(pids: &[u32]) -> Result<u64> {
    let mut largest = 0;
    for pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))
            .with_context(|| format!("process {pid} has ended"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib: u64 = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no VmRSS")?.parse()?;
        largest = largest.max(kib << 10);
    }
    Ok(largest)
}
