//! `hci node`: the servers of the cluster.

use clap::Subcommand;
use hyper::Method;
use serde_json::json;

use super::{Context, object_path, say};
use crate::cli::completion::names;
use crate::cli::exit::CliError;
use crate::cli::output::{Column, Show, column};
use crate::cli::task::finish;

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
    /// Change a node.
    #[command(
        after_help = "Examples:\n  hci node set n1 --rack r1\n  hci node set n1 --rack ''\nAPI: PATCH /v1/nodes/NAME"
    )]
    Set {
        /// The node's name or id.
        #[arg(add = names("/v1/nodes"))]
        name: String,
        /// The rack (or room, or power feed) that it shares with others: copies go to distinct ones when there are
        /// enough; an empty one takes the label away.
        #[arg(long, required = true)]
        rack: Option<String>,
    },
    /// Empty a node of VMs for maintenance: they are shut down and started elsewhere. Its disks stay.
    #[command(
        after_help = "Examples:\n  hci node drain n1\n  hci node drain n1 --timeout 30m\nAPI: POST /v1/nodes/NAME/drain"
    )]
    Drain {
        /// The node's name or id.
        #[arg(add = names("/v1/nodes"))]
        name: String,
    },
    /// Put a node in service again that was drained, or that was to leave.
    #[command(
        after_help = "Examples:\n  hci node resume n1\n  hci node resume n1 --no-wait\nAPI: POST /v1/nodes/NAME/resume"
    )]
    Resume {
        /// The node's name or id.
        #[arg(add = names("/v1/nodes"))]
        name: String,
    },
    /// Move VMs and data off a node, then take it out of the cluster for good. A lost node's data are rebuilt from the
    /// other copies.
    #[command(
        alias = "remove",
        after_help = "Examples:\n  hci node evict n4\n  hci node evict n4 --yes --timeout 12h\nAPI: POST /v1/nodes/NAME/evict"
    )]
    Evict {
        /// The node's name or id.
        #[arg(add = names("/v1/nodes"))]
        name: String,
    },
}

const COLUMNS: &[Column] = &[
    column("NAME", "/name"),
    column("STATE", "/state"),
    column("SERVICE", "/service"),
    column("ROLE", "/role"),
    column("ADDRESS", "/address"),
    column("VMS", "/vms"),
    column("MEMORY", "/memory_bytes").shown(Show::Bytes),
    column("FREE", "/memory_available_bytes").shown(Show::Bytes),
    column("RACK", "/rack"),
    column("CPUS", "/cpus").wide(),
    column("CPU MODELS", "/cpu_models").wide(),
    column("VERSION", "/version").wide(),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci node`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::List => context.list("/v1/nodes", COLUMNS).await,
        Verb::Get { name } => context.show("/v1/nodes", &name).await,
        Verb::Set { name, rack } => {
            let path = object_path("/v1/nodes", &name);
            let answer = context.client.json(Method::PATCH, &path, Some(&json!({ "rack": rack }))).await?;
            context.change(answer, "/v1/nodes", &name, COLUMNS).await
        }
        Verb::Drain { name } => act(context, &name, "drain").await,
        Verb::Resume { name } => act(context, &name, "resume").await,
        Verb::Evict { name } => {
            context.confirm(&name, &format!("takes node {name} out of the cluster for good"))?;
            let path = format!("{}/evict", object_path("/v1/nodes", &name));
            let answer = context.client.post(&path, &json!({})).await?;
            finish(&context.client, context.wait, answer).await?;
            say(&format!("{name} has left the cluster"));
            Ok(())
        }
    }
}

async fn act(context: &Context, name: &str, action: &str) -> Result<(), CliError> {
    let path = format!("{}/{action}", object_path("/v1/nodes", name));
    let answer = context.client.post(&path, &json!({})).await?;
    context.change(answer, "/v1/nodes", name, COLUMNS).await
}
