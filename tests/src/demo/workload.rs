//! Reads what the workload in a VM said on its console, and judges it.
//!
//! The rule: what the workload called flushed is there whenever the VM starts again, wherever that is.

use anyhow::{Result, ensure};

/// What one VM's console says, in the order of its last boot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The address that the VM got.
    pub address: Option<String>,
    /// The newest record that the workload called flushed.
    pub flushed: Option<u64>,
    /// Up to where the records were there when it last started; set when they were all there.
    pub verified: Option<u64>,
    /// The peers that sent their data right, since the last boot.
    pub peers: Vec<String>,
    /// What went wrong, since the last boot.
    pub errors: Vec<String>,
}

impl Report {
    /// Parses a console log; only what follows the last boot counts.
    pub fn parse(log: &str) -> Self {
        let mut report = Self::default();
        for line in log.lines() {
            let Some(said) = line.trim_end().find("WL ").map(|at| &line.trim_end()[at + 3..]) else {
                continue;
            };
            let mut words = said.split(' ');
            match words.next() {
                Some("boot") => report = Self::default(),
                Some("address") => {
                    report.address = words.next().filter(|word| *word != "none").map(str::to_owned)
                }
                Some("flushed") => {
                    report.flushed = words.next().and_then(|word| word.parse().ok()).or(report.flushed)
                }
                Some("verify") if words.next() == Some("ok") => report.verified = field(said, "last="),
                Some("peer") => {
                    let peer = words.next().unwrap_or_default().to_owned();
                    if !report.peers.contains(&peer) {
                        report.peers.push(peer);
                    }
                }
                Some("verify" | "error") => report.errors.push(said.to_owned()),
                _ => {}
            }
        }
        report
    }

    /// Fails when the VM reported anything wrong.
    pub fn check(&self, vm: &str) -> Result<()> {
        ensure!(self.errors.is_empty(), "{vm} reports: {}", self.errors.join("; "));
        Ok(())
    }
}

fn field(said: &str, name: &str) -> Option<u64> {
    said.split(' ').find_map(|word| word.strip_prefix(name))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "WL boot kernel=6.1 cpus=1\nWL address 10.77.0.3 mtu=1500\nWL verify ok last=0 flushed=0 records=0\n\
        WL flushed 8\n[  12.3] noise WL flushed 16\r\nWL peer 10.77.0.4 ok bytes=5 ms=1\nWL flu";

    #[test]
    fn a_log_is_read_to_its_last_whole_line() {
        let report = Report::parse(LOG);
        assert_eq!(report.address.as_deref(), Some("10.77.0.3"));
        assert_eq!((report.flushed, report.verified), (Some(16), Some(0)));
        assert_eq!(report.peers, ["10.77.0.4"]);
        assert!(report.check("web1").is_ok());
    }

    #[test]
    fn a_new_boot_starts_afresh_and_its_errors_count() {
        let report =
            Report::parse(&format!("{LOG}\nWL boot kernel=6.1\nWL verify FAILED 2 problems, the first: x"));
        assert_eq!(report.flushed, None);
        assert!(report.check("web1").unwrap_err().to_string().contains("FAILED"));
    }
}
