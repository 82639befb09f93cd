//! `hci vm disk`, `hci vm nic`, and the two verbs of `hci volume` that give a volume to a VM and take it back.

use clap::Subcommand;
use hyper::Method;
use serde_json::json;

use super::{Context, object_path, vm};
use crate::cli::client::segment;
use crate::cli::completion::names;
use crate::cli::exit::CliError;
use crate::cli::size::parse_size;

/// The verbs of `hci vm disk`.
#[derive(Debug, Subcommand)]
pub enum DiskVerb {
    /// Give a VM a new, empty disk, also while it runs.
    #[command(
        after_help = "Examples:\n  hci vm disk add web1 --size 100GiB\n  hci vm disk add web1 --size 1TiB --name web1-data --replicas 2\nAPI: POST /v1/vms/NAME/disks"
    )]
    Add {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        vm: String,
        /// The disk's size.
        #[arg(long, value_parser = parse_size)]
        size: u64,
        /// The name of its volume; made from the VM's if not given.
        #[arg(long)]
        name: Option<String>,
        /// How many copies on different nodes; 3 if there are as many nodes with disks.
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
        replicas: Option<u8>,
    },
    /// Take a disk away from a VM and delete it with its data. While the VM runs, its guest lets go of it first.
    #[command(
        after_help = "Examples:\n  hci vm disk remove web1 web1-disk1\n  hci vm disk remove web1 web1-disk1 --yes\nto keep the data: hci volume detach VOLUME VM\nAPI: POST /v1/vms/NAME/disks/VOLUME/detach"
    )]
    Remove {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        vm: String,
        /// The disk's volume, by name or id.
        #[arg(add = names("/v1/volumes"))]
        volume: String,
    },
}

/// The verbs of `hci vm nic`.
#[derive(Debug, Subcommand)]
pub enum NicVerb {
    /// Give a VM a NIC on a network, also while it runs.
    #[command(
        after_help = "Examples:\n  hci vm nic add web1 --network backup\n  hci vm nic add web1 --network lan -o json\nAPI: POST /v1/vms/NAME/nics"
    )]
    Add {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        vm: String,
        /// The network's name or id.
        #[arg(long, add = names("/v1/networks"))]
        network: String,
    },
    /// Take a NIC away from a VM. While the VM runs, its guest lets go of it first.
    #[command(
        after_help = "Examples:\n  hci vm nic remove web1 backup\n  hci vm nic remove web1 02:1f:6a:00:00:07\nAPI: DELETE /v1/vms/NAME/nics/NIC"
    )]
    Remove {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        vm: String,
        /// Its Ethernet address, or its network if it is the only one there.
        nic: String,
    },
}

/// Runs a verb of `hci vm disk`.
pub async fn run_disk(context: &Context, verb: DiskVerb) -> Result<(), CliError> {
    match verb {
        DiskVerb::Add { vm, size, name, replicas } => {
            let body = json!({ "size_bytes": size, "name": name, "replicas": replicas });
            add(context, &vm, "disks", &body).await
        }
        DiskVerb::Remove { vm, volume } => {
            context.confirm(&volume, &format!("destroys volume {volume} with its data and snapshots"))?;
            detach(context, &volume, &vm, true).await
        }
    }
}

/// Runs a verb of `hci vm nic`.
pub async fn run_nic(context: &Context, verb: NicVerb) -> Result<(), CliError> {
    match verb {
        NicVerb::Add { vm, network } => add(context, &vm, "nics", &json!({ "network": network })).await,
        NicVerb::Remove { vm, nic } => {
            let path = format!("{}/nics/{}", object_path("/v1/vms", &vm), segment(&nic));
            let answer = context.client.json(Method::DELETE, &path, None).await?;
            context.change(answer, "/v1/vms", &vm, vm::COLUMNS).await
        }
    }
}

/// `hci volume attach`.
pub async fn attach(context: &Context, volume: &str, vm: &str) -> Result<(), CliError> {
    add(context, vm, "disks", &json!({ "volume": volume })).await
}

/// `hci volume detach`, and what `hci vm disk remove` does.
pub async fn detach(context: &Context, volume: &str, vm: &str, delete: bool) -> Result<(), CliError> {
    let path = format!("{}/disks/{}/detach", object_path("/v1/vms", vm), segment(volume));
    let answer = context.client.post(&path, &json!({ "delete": delete })).await?;
    context.change(answer, "/v1/vms", vm, vm::COLUMNS).await
}

async fn add(context: &Context, vm: &str, what: &str, body: &serde_json::Value) -> Result<(), CliError> {
    let answer = context.client.post(&format!("{}/{what}", object_path("/v1/vms", vm)), body).await?;
    context.change(answer, "/v1/vms", vm, vm::COLUMNS).await
}
