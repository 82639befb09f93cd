//! `hci disk`: the physical disks of the nodes, those in the pool and those that could be.

use clap::Subcommand;
use serde_json::json;

use super::Context;
use crate::cli::completion::names;
use crate::cli::exit::CliError;
use crate::cli::output::{Column, Show, column};
use crate::cli::task::finish;

/// The verbs of `hci disk`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the disks of all nodes, also those that are not in the pool.
    #[command(after_help = "Examples:\n  hci disk list\n  hci disk list -o json\nAPI: GET /v1/disks")]
    List,
    /// Give a disk of a node to the pool.
    #[command(
        after_help = "Examples:\n  hci disk add n1 /dev/vdb\n  hci disk add n1 /dev/vdc --wipe\nAPI: POST /v1/disks"
    )]
    Add {
        /// The node that the disk is in.
        #[arg(add = names("/v1/nodes"))]
        node: String,
        /// The device, or a directory.
        #[arg(required = true)]
        path: Vec<String>,
        /// Destroy what is on the disk; without it a disk that holds data is refused.
        #[arg(long)]
        wipe: bool,
    },
}

const COLUMNS: &[Column] = &[
    column("NODE", "/node"),
    column("PATH", "/path"),
    column("STATE", "/state"),
    column("SIZE", "/capacity_bytes").shown(Show::Bytes),
    column("USED", "/used_bytes").shown(Show::Bytes),
    column("MODEL", "/model"),
    column("MESSAGE", "/message"),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci disk`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::List => context.list("/v1/disks", COLUMNS).await,
        Verb::Add { node, path, wipe } => {
            if wipe {
                context.confirm(
                    &path.join(" "),
                    &format!("destroys everything on {} of {node}", path.join(" ")),
                )?;
            }
            for path in path {
                let body = json!({ "node": node, "path": path, "wipe": wipe });
                let answer = context.client.post("/v1/disks", &body).await?;
                finish(&context.client, context.wait, answer).await?;
            }
            context.list("/v1/disks", COLUMNS).await
        }
    }
}
