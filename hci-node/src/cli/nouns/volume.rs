//! `hci volume`: the replicated block devices of the pool.

use clap::Subcommand;
use serde_json::json;

use super::Context;
use crate::cli::completion::names;
use crate::cli::exit::CliError;
use crate::cli::output::{Column, Show, column};
use crate::cli::size::parse_size;

/// The verbs of `hci volume`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the volumes.
    #[command(after_help = "Examples:\n  hci volume list\n  hci volume list -o wide\nAPI: GET /v1/volumes")]
    List,
    /// Show one volume with its segments and replicas.
    #[command(
        after_help = "Examples:\n  hci volume get data1\n  hci volume get data1 -o json\nAPI: GET /v1/volumes/NAME"
    )]
    Get {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        name: String,
    },
    /// Create a thin volume.
    #[command(
        after_help = "Examples:\n  hci volume create data1 --size 100GiB\n  hci volume create scratch --size 10GiB --replicas 1\nAPI: POST /v1/volumes"
    )]
    Create {
        /// The volume's name.
        name: String,
        /// Its size.
        #[arg(long, value_parser = parse_size)]
        size: u64,
        /// How many copies on different nodes; 3 if there are as many nodes with disks.
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
        replicas: Option<u8>,
    },
    /// Delete a volume and its data; refused while something uses it.
    #[command(
        after_help = "Examples:\n  hci volume delete data1\n  hci volume delete data1 --yes\nAPI: DELETE /v1/volumes/NAME"
    )]
    Delete {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        name: String,
    },
}

const COLUMNS: &[Column] = &[
    column("NAME", "/name"),
    column("STATE", "/state"),
    column("SIZE", "/size_bytes").shown(Show::Bytes),
    column("REPLICAS", "/replicas"),
    column("IN SYNC", "/in_sync"),
    column("OPEN ON", "/coordinator"),
    column("USED BY", "/used_by"),
    column("RESYNC LEFT", "/resync_blocks_left").wide(),
    column("GENERATION", "/generation").wide(),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci volume`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::List => context.list("/v1/volumes", COLUMNS).await,
        Verb::Get { name } => context.show("/v1/volumes", &name).await,
        Verb::Create { name, size, replicas } => {
            let body = json!({ "name": name, "size_bytes": size, "replicas": replicas });
            let answer = context.client.post("/v1/volumes", &body).await?;
            context.change(answer, "/v1/volumes", &name, COLUMNS).await
        }
        Verb::Delete { name } => {
            context.delete("/v1/volumes", &name, &format!("destroys volume {name} with all its data")).await
        }
    }
}
