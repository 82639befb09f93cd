//! `hci network`: the overlay networks that VMs are connected to.

use std::net::Ipv4Addr;

use clap::Subcommand;
use ipnet::Ipv4Net;
use serde_json::json;

use super::Context;
use crate::cli::completion::names;
use crate::cli::exit::CliError;
use crate::cli::output::{Column, column};

/// The verbs of `hci network`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the networks.
    #[command(
        after_help = "Examples:\n  hci network list\n  hci network list -o json\nAPI: GET /v1/networks"
    )]
    List,
    /// Show one network with its ports.
    #[command(
        after_help = "Examples:\n  hci network get lan\n  hci network get lan -o json\nAPI: GET /v1/networks/NAME"
    )]
    Get {
        /// The network's name or id.
        #[arg(add = names("/v1/networks"))]
        name: String,
    },
    /// Create an overlay network that spans all nodes.
    #[command(
        after_help = "Examples:\n  hci network create lan --subnet 10.77.0.0/24\n  hci network create fast --subnet 10.78.0.0/16 --mtu 8900\nAPI: POST /v1/networks"
    )]
    Create {
        /// The network's name.
        name: String,
        /// The addresses that its ports get.
        #[arg(long)]
        subnet: Ipv4Net,
        /// The MTU inside the guests; any value works over any underlay.
        #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u16).range(576..=9000))]
        mtu: u16,
        /// The name servers that the guests are told of.
        #[arg(long)]
        dns: Vec<Ipv4Addr>,
    },
    /// Delete a network; refused while a VM has a port in it.
    #[command(
        after_help = "Examples:\n  hci network delete lan\n  hci network delete lan --yes\nAPI: DELETE /v1/networks/NAME"
    )]
    Delete {
        /// The network's name or id.
        #[arg(add = names("/v1/networks"))]
        name: String,
    },
}

const COLUMNS: &[Column] = &[
    column("NAME", "/name"),
    column("SUBNET", "/subnet"),
    column("GATEWAY", "/gateway"),
    column("MTU", "/mtu"),
    column("PORTS", "/ports"),
    column("VNI", "/vni").wide(),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci network`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::List => context.list("/v1/networks", COLUMNS).await,
        Verb::Get { name } => context.show("/v1/networks", &name).await,
        Verb::Create { name, subnet, mtu, dns } => {
            let body = json!({ "name": name, "subnet": subnet, "mtu": mtu, "dns": dns });
            let answer = context.client.post("/v1/networks", &body).await?;
            context.change(answer, "/v1/networks", &name, COLUMNS).await
        }
        Verb::Delete { name } => {
            context.delete("/v1/networks", &name, &format!("deletes network {name}")).await
        }
    }
}
