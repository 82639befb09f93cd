//! `hci cluster`: forming a cluster, letting nodes in, looking at it.

use std::time::Duration;

use clap::Subcommand;
use serde_json::json;

use super::{Context, object_path, say};
use crate::cli::exit::CliError;
use crate::cli::output::{self, Column, Format, column};
use crate::cli::size::parse_duration;
use crate::cli::task::finish;

/// The verbs of `hci cluster`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make this node the first one of a new cluster.
    #[command(
        after_help = "Examples:\n  hci cluster create prod\n  hci cluster create prod --node-name n1\nAPI: POST /v1/cluster"
    )]
    Create {
        /// The cluster's name.
        name: String,
        /// The name of this node; its hostname if not given.
        #[arg(long)]
        node_name: Option<String>,
    },
    /// Let this node join the cluster that made the token.
    #[command(
        after_help = "Examples:\n  hci cluster join hci1.eyJ…\n  hci cluster join hci1.eyJ… --node-name n2\nAPI: POST /v1/cluster/join"
    )]
    Join {
        /// What `hci cluster token create` printed on another node.
        token: String,
        /// The name of this node; its hostname if not given.
        #[arg(long)]
        node_name: Option<String>,
    },
    /// Show the cluster.
    #[command(after_help = "Examples:\n  hci cluster get\n  hci cluster get -o json\nAPI: GET /v1/cluster")]
    Get,
    /// The tokens that let nodes join.
    #[command(subcommand)]
    Token(TokenVerb),
}

/// The verbs of `hci cluster token`.
#[derive(Debug, Subcommand)]
pub enum TokenVerb {
    /// Make a token that lets nodes join.
    #[command(
        after_help = "Examples:\n  hci cluster token create\n  hci cluster token create --uses 2 --expires 24h\n  hci cluster token create --admin --expires 7d\nAPI: POST /v1/cluster/tokens"
    )]
    Create {
        /// How many nodes may join with it.
        #[arg(long, default_value_t = 1)]
        uses: u32,
        /// How long it can be used.
        #[arg(long, default_value = "1h", value_parser = parse_duration)]
        expires: Duration,
        /// Make a token for the API instead, with all rights.
        #[arg(long, conflicts_with = "uses")]
        admin: bool,
    },
    /// List the tokens; their secrets are not kept and cannot be shown.
    #[command(
        after_help = "Examples:\n  hci cluster token list\n  hci cluster token list -o json\nAPI: GET /v1/cluster/tokens"
    )]
    List,
    /// Make a token useless.
    #[command(
        after_help = "Examples:\n  hci cluster token revoke 0192f0c4-…\n  hci cluster token revoke ID --yes\nAPI: DELETE /v1/cluster/tokens/ID"
    )]
    Revoke {
        /// The token's id, from the list.
        id: String,
    },
}

const TOKEN_COLUMNS: &[Column] = &[
    column("ID", "/id"),
    column("KIND", "/kind"),
    column("USES LEFT", "/uses_left"),
    column("EXPIRES", "/expires"),
    column("CREATED", "/created"),
];

/// Runs a verb of `hci cluster`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::Create { name, node_name } => {
            let body = json!({ "name": name, "node_name": node_name });
            let created = context.client.post("/v1/cluster", &body).await?;
            if context.format == Format::Table {
                say("  identity ✓  raft ✓  ca ✓");
                output::line(&format!("{name} is up, 1 node, redundancy none yet"));
                if let Some(token) = created.get("admin_token").and_then(|token| token.as_str()) {
                    output::line(&format!("admin token (shown once): {token}"));
                }
                say("next: hci cluster token create, and on each further node: hci cluster join TOKEN");
                return Ok(());
            }
            output::print(context.format, &created, &[])
        }
        Verb::Join { token, node_name } => {
            let body = json!({ "token": token, "node_name": node_name });
            let joined = context.client.post("/v1/cluster/join", &body).await?;
            if context.format == Format::Table {
                let cluster = joined.get("cluster").and_then(|name| name.as_str()).unwrap_or("the cluster");
                output::line(&format!("joined {cluster}"));
                say("next: hci disk list, hci disk add");
                return Ok(());
            }
            output::print(context.format, &joined, &[])
        }
        Verb::Get => {
            let cluster = context.client.get("/v1/cluster").await?;
            output::print(
                if context.format == Format::Table { Format::Yaml } else { context.format },
                &cluster,
                &[],
            )
        }
        Verb::Token(TokenVerb::Create { uses, expires, admin }) => {
            let ttl = expires.as_secs();
            let body = if admin {
                json!({ "kind": "admin", "ttl_seconds": ttl })
            } else {
                json!({ "kind": "join", "uses": uses, "ttl_seconds": ttl })
            };
            let token = context.client.post("/v1/cluster/tokens", &body).await?;
            if !matches!(context.format, Format::Table | Format::Wide | Format::Name) {
                return output::print(context.format, &token, &[]);
            }
            output::line(token.get("token").and_then(|text| text.as_str()).unwrap_or_default());
            if admin {
                say(&format!("  opens the API for {ttl} s; give it as HCI_TOKEN"));
            } else {
                say(&format!("  lets {uses} node(s) join within {ttl} s; on each: hci cluster join TOKEN"));
            }
            Ok(())
        }
        Verb::Token(TokenVerb::List) => context.list("/v1/cluster/tokens", TOKEN_COLUMNS).await,
        Verb::Token(TokenVerb::Revoke { id }) => {
            let answer = context.client.delete(&object_path("/v1/cluster/tokens", &id)).await?;
            finish(&context.client, context.wait, answer).await?;
            say(&format!("token {id} is revoked"));
            Ok(())
        }
    }
}
