//! `hci event`: what happened in the cluster.

use clap::Subcommand;

use super::Context;
use crate::cli::exit::CliError;
use crate::cli::output::{Column, column};

/// The verbs of `hci event`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the last events, the newest last.
    #[command(after_help = "Examples:\n  hci event list\n  hci event list -o json\nAPI: GET /v1/events")]
    List,
}

const COLUMNS: &[Column] = &[
    column("TIME", "/at"),
    column("SEVERITY", "/severity"),
    column("OBJECT", "/subject"),
    column("MESSAGE", "/message"),
    column("KIND", "/kind").wide(),
];

/// Runs a verb of `hci event`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::List => context.list("/v1/events", COLUMNS).await,
    }
}
