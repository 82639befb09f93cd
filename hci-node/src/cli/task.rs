//! Waiting for the task that a change started: shows its progress on stderr, ends with its outcome.
//!
//! The task lives in the cluster. Ctrl-C, a time limit or a lost node end the wait only, and the message says how to
//! find the task again.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::client::{Client, segment};
use super::exit::{CliError, Exit};

const POLL: Duration = Duration::from_millis(250);
/// The node that is asked may be the one that goes down: its silence ends the wait only after this long.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// How long to wait for a change.
#[derive(Debug, Clone, Copy)]
pub enum Wait {
    /// Not at all: print the task's id.
    No,
    /// Until it is done or the limit is reached.
    Upto(Duration),
}

/// Waits for the task in `answer` (`{"task": {...}}` or a task itself); returns it when it is done.
pub async fn finish(client: &Client, wait: Wait, answer: Value) -> Result<Value, CliError> {
    let id = answer
        .pointer("/task/id")
        .or_else(|| answer.get("task"))
        .or_else(|| answer.get("id"))
        .and_then(Value::as_str)
        .map(str::to_owned);
    let Some(id) = id else { return Ok(answer) };
    let Wait::Upto(limit) = wait else {
        super::output::line(&id);
        return Ok(answer);
    };
    let bar = ProgressBar::new(100);
    if let Ok(style) = ProgressStyle::with_template("  {bar:24} {percent:>3} %  {msg}") {
        bar.set_style(style);
    }
    let outcome = tokio::select! {
        outcome = poll(client, &id, limit, &bar) => outcome,
        _ = tokio::signal::ctrl_c() => Err(CliError::new(Exit::TimedOut, format!("stopped waiting; task {id} goes on"))
            .next(format!("hci task wait {id}"))),
    };
    bar.finish_and_clear();
    outcome
}

async fn poll(client: &Client, id: &str, limit: Duration, bar: &ProgressBar) -> Result<Value, CliError> {
    let started = Instant::now();
    let mut answered = Instant::now();
    loop {
        match client.get(&format!("/v1/tasks/{}", segment(id))).await {
            Ok(task) => {
                answered = Instant::now();
                let message = task.get("message").and_then(Value::as_str).unwrap_or_default();
                bar.set_message(message.to_owned());
                bar.set_position(
                    (task.get("progress").and_then(Value::as_f64).unwrap_or(0.0) * 100.0) as u64,
                );
                match task.get("state").and_then(Value::as_str) {
                    Some("done") => return Ok(task),
                    Some("failed") => return Err(failure(id, &task)),
                    _ => {}
                }
            }
            Err(error) if error.exit == Exit::Unreachable && answered.elapsed() < SILENCE_LIMIT => {}
            Err(error) => return Err(error),
        }
        if started.elapsed() > limit {
            return Err(CliError::new(
                Exit::TimedOut,
                format!("task {id} is not done after {} s; it goes on", limit.as_secs()),
            )
            .next(format!("hci task wait {id}")));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn failure(id: &str, task: &Value) -> CliError {
    let text = |key: &str| task.get(key).and_then(Value::as_str).map(str::to_owned);
    let mut error = CliError::new(
        Exit::Failed,
        format!("{} failed", text("kind").unwrap_or_else(|| "the task".to_owned())),
    );
    let detail =
        |key: &str| task.pointer(&format!("/error/{key}")).and_then(Value::as_str).map(str::to_owned);
    error.why = detail("detail");
    error.evidence = Some(format!("task {id}"));
    error.next = detail("next");
    error
}
