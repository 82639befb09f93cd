//! `hci node`: the servers of the cluster.

use clap::Subcommand;

use super::Context;
use crate::cli::completion::names;
use crate::cli::exit::CliError;
use crate::cli::output::{Column, Show, column};

/// The verbs of `hci node` that ask the API.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the nodes.
    #[command(after_help = "Examples:\n  hci node list\n  hci node list -o wide\nAPI: GET /v1/nodes")]
    List,
    /// Show one node.
    #[command(
        after_help = "Examples:\n  hci node get n1\n  hci node get n1 -o json\nAPI: GET /v1/nodes/NAME"
    )]
    Get {
        /// The node's name or id.
        #[arg(add = names("/v1/nodes"))]
        name: String,
    },
}

const COLUMNS: &[Column] = &[
    column("NAME", "/name"),
    column("STATE", "/state"),
    column("ROLE", "/role"),
    column("ADDRESS", "/address"),
    column("VMS", "/vms"),
    column("MEMORY", "/memory_bytes").shown(Show::Bytes),
    column("FREE", "/memory_available_bytes").shown(Show::Bytes),
    column("VERSION", "/version").wide(),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci node`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::List => context.list("/v1/nodes", COLUMNS).await,
        Verb::Get { name } => context.show("/v1/nodes", &name).await,
    }
}
