//! Completion for the shells, with the live names of the cluster's objects.
//!
//! The script that a shell loads calls `hci` itself, with `COMPLETE` set, for every completion. The names come from the
//! node's API; no answer within a moment means no names, never an error in the user's prompt.

use std::ffi::OsStr;
use std::time::Duration;

use clap::ValueEnum;
use clap_complete::CompleteEnv;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate};

use super::client::{Client, Credentials, Endpoint};
use super::output;

/// The shells that are supported.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Shell {
    /// GNU Bash.
    Bash,
    /// Z shell.
    Zsh,
    /// The friendly interactive shell.
    Fish,
}

/// A completion is typed at: longer than this the user has typed the name.
const PATIENCE: Duration = Duration::from_millis(700);

/// Answers a shell that asks for completions, and ends the process then; otherwise does nothing.
pub fn answer_shell() {
    CompleteEnv::with_factory(super::command).complete();
}

/// Prints what the shell has to load.
pub fn print(shell: Shell) {
    output::line(match shell {
        Shell::Bash => "source <(COMPLETE=bash hci)",
        Shell::Zsh => "source <(COMPLETE=zsh hci)",
        Shell::Fish => "COMPLETE=fish hci | source",
    });
}

/// Completes an argument with the names in a collection of the API.
pub fn names(collection: &'static str) -> ArgValueCompleter {
    ArgValueCompleter::new(move |typed: &OsStr| {
        let typed = typed.to_string_lossy();
        live_names(collection)
            .into_iter()
            .filter(|name| name.starts_with(typed.as_ref()))
            .map(CompletionCandidate::new)
            .collect()
    })
}

fn live_names(collection: &str) -> Vec<String> {
    let variable = |name: &str| std::env::var(name).ok();
    let endpoint = variable("HCI_ENDPOINT").unwrap_or_else(|| super::DEFAULT_ENDPOINT.to_owned());
    let Ok(endpoint) = endpoint.parse::<Endpoint>() else { return Vec::new() };
    let credentials =
        Credentials { token: variable("HCI_TOKEN"), ca_fingerprint: variable("HCI_CA_FINGERPRINT") };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return Vec::new();
    };
    let answer = runtime.block_on(async {
        tokio::time::timeout(PATIENCE, Client::new(endpoint, credentials).get(collection)).await
    });
    let Ok(Ok(list)) = answer else { return Vec::new() };
    let items = list.get("items").and_then(|items| items.as_array()).cloned().unwrap_or_default();
    items
        .iter()
        .filter_map(|item| item.get("name").or_else(|| item.get("id"))?.as_str().map(str::to_owned))
        .collect()
}
