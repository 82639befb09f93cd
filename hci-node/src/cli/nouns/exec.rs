//! `hci vm exec`: a program in a guest, by the guest's agent. What it writes comes when it has ended, and its exit code is passed on.

use std::{
    io::Write,
    process::ExitCode,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{Context, object_path, say};
use crate::cli::{
    exit::{CliError, Exit},
    task::Wait,
};

/// How often the guest is asked whether it has ended: soon at first, less often later.
const POLL: std::ops::RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(1);
/// Added to the number of the signal that ended a program, as shells do.
const SIGNALLED: i64 = 128;

/// Runs a program in the guest and waits for its end.
pub(super) async fn run(context: &Context, vm: &str, command: &[String]) -> Result<ExitCode, CliError> {
    let path = format!("{}/exec", object_path("/v1/vms", vm));
    let started = context.client.post(&path, &json!({ "command": command })).await?;
    let pid = started.get("pid").and_then(Value::as_i64).ok_or_else(|| no_sense(&started))?;
    let Wait::Upto(limit) = context.wait else {
        say(&format!("process {pid} runs in {vm}; what becomes of it: hci api GET {path}/{pid}"));
        return Ok(Exit::Ok.into());
    };
    let (began, mut pause) = (Instant::now(), *POLL.start());
    loop {
        let progress = context.client.get(&format!("{path}/{pid}")).await?;
        match progress.get("state").and_then(Value::as_str) {
            Some("ended") => return ended(&progress),
            Some("running") => {}
            _ => return Err(no_sense(&progress)),
        }
        if began.elapsed() > limit {
            return Err(CliError::new(
                Exit::TimedOut,
                format!("the program runs for more than {} s; it goes on in the guest", limit.as_secs()),
            )
            .next("wait longer: --timeout 1h"));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(*POLL.end());
    }
}

fn ended(progress: &Value) -> Result<ExitCode, CliError> {
    let bytes = |name: &str| {
        let text = progress.get(name).and_then(Value::as_str).unwrap_or_default();
        STANDARD.decode(text).map_err(|_| no_sense(progress))
    };
    let (stdout, stderr) = (bytes("stdout")?, bytes("stderr")?);
    // A reader that went away has what it wanted; the exit code counts.
    let _ = std::io::stdout().lock().write_all(&stdout);
    let _ = std::io::stderr().lock().write_all(&stderr);
    if progress.get("output").and_then(Value::as_str) == Some("cut") {
        say("the output was too long for the guest agent; its end is missing");
    }
    Ok(code(progress).ok_or_else(|| no_sense(progress))?.into())
}

/// The program's exit code, or what a shell says of one that a signal ended.
fn code(progress: &Value) -> Option<u8> {
    let number = |name: &str| progress.get(name).and_then(Value::as_i64);
    let code = number("exit_code").or_else(|| number("signal").map(|signal| SIGNALLED + signal))?;
    // What is no exit code in this system must not look like success.
    Some(u8::try_from(code).unwrap_or(u8::MAX))
}

fn no_sense(answer: &Value) -> CliError {
    CliError::new(Exit::Failed, "the node's answer makes no sense").why(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_never_looks_like_success() {
        let codes =
            [(json!({ "exit_code": 0 }), 0), (json!({ "exit_code": 7 }), 7), (json!({ "signal": 9 }), 137)];
        let odd = [(json!({ "exit_code": 256 }), 255), (json!({ "exit_code": -1_073_741_819 }), 255)];
        for (progress, expected) in codes.into_iter().chain(odd) {
            assert_eq!(code(&progress), Some(expected), "{progress}");
        }
        assert_eq!(code(&json!({ "exit_code": null })), None);
    }
}
