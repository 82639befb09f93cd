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
    let (raw, used) = (number("/raw_bytes"), number("/used_bytes"));
    let percent = used.saturating_mul(100).checked_div(raw).unwrap_or(0);
    let mut lines = vec![format!(
        "{}   {}   {} of {} nodes   {} disks   {} raw, {} usable at {} copies, {percent} % used   {} of {} VMs run",
        text("/cluster"),
        text("/health").to_uppercase(),
        number("/nodes_available"),
        number("/nodes"),
        number("/disks"),
        bytes(raw),
        bytes(number("/usable_bytes")),
        number("/usable_copies"),
        number("/vms_running"),
        number("/vms"),
    )];
    for problem in status.get("problems").and_then(Value::as_array).into_iter().flatten() {
        let text = |key: &str| problem.get(key).and_then(Value::as_str).unwrap_or("-");
        lines.push(format!("{}: {} {}: {}", text("health"), text("kind"), text("name"), text("message")));
    }
    match number("/moves") {
        0 => {}
        moves => lines.push(format!("{moves} segments are on their way to other disks")),
    }
    lines.push(format!("can lose now: {}", text("/can_lose")));
    lines.join("\n")
}
