//! `hci status`: the cluster in a few lines, and what may fail now.

use serde_json::Value;

use super::Context;
use crate::cli::exit::{CliError, Exit};
use crate::cli::output::{self, Format, bytes};

/// Prints the status; with `as_health` the exit code tells degraded (10) and critical (11) apart from healthy.
pub async fn run(context: &Context, as_health: bool) -> Result<Exit, CliError> {
    let status = context.client.get("/v1/status").await?;
    match context.format {
        Format::Table | Format::Wide | Format::Name => output::line(&summary(&status)),
        other => output::print(other, &status, &[])?,
    }
    Ok(match (as_health, status.get("health").and_then(Value::as_str)) {
        (true, Some("degraded")) => Exit::Degraded,
        (true, Some("critical")) => Exit::Critical,
        _ => Exit::Ok,
    })
}

fn summary(status: &Value) -> String {
    let text = |pointer: &str| status.pointer(pointer).and_then(Value::as_str).unwrap_or("-").to_owned();
    let number = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    let (raw, used) = (number("/capacity/raw"), number("/capacity/used"));
    let percent = if raw == 0 { 0 } else { used.saturating_mul(100) / raw };
    let mut lines = vec![format!(
        "{}   {}   {} nodes   {} disks   {} raw, {} usable at 3 copies, {percent} % used   {} VMs running",
        text("/cluster"),
        text("/health").to_uppercase(),
        number("/nodes/total"),
        number("/disks/total"),
        bytes(raw),
        bytes(raw / 3),
        number("/vms/running"),
    )];
    for problem in status.get("problems").and_then(Value::as_array).into_iter().flatten() {
        let problem = problem.as_str().map_or_else(|| problem.to_string(), str::to_owned);
        lines.push(format!("problem: {problem}"));
    }
    lines.push(format!("can lose now: {}", text("/can_lose")));
    lines.join("\n")
}
