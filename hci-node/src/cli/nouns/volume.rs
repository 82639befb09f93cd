//! `hci volume`: the replicated block devices of the pool.

use clap::Subcommand;
use hyper::Method;
use serde_json::{Value, json};

use super::export::{self, ExportArgs};
use super::{Context, devices, object_path, snapshot};
use crate::cli::client::segment;
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
        after_help = "Examples:\n  hci volume create data1 --size 100GiB\n  hci volume create scratch --size 10GiB --replicas 1\n  hci volume create logs --size 1TiB --compression lz4\nAPI: POST /v1/volumes"
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
        /// When a write counts as complete: write-back (a flush makes it durable) or write-through (durable at once).
        #[arg(long, default_value = "write-back", value_parser = ["write-back", "write-through"])]
        durability: String,
        /// Whether its data are compressed on the disks: takes less room, and more time for small reads.
        #[arg(long, default_value = "off", value_parser = ["off", "lz4"])]
        compression: String,
    },
    /// Change how many copies a volume has, or what it may take, while it is in use.
    #[command(
        after_help = "Examples:\n  hci volume set data1 --replicas 3\n  hci volume set scratch --iops 2000 --bandwidth 100MiB\n  hci volume set logs --compression lz4\nAPI: PATCH /v1/volumes/NAME"
    )]
    Set {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        name: String,
        /// How many copies on different nodes.
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
        replicas: Option<u8>,
        /// Writes wait while fewer copies than this are complete.
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
        min_in_sync: Option<u8>,
        /// When a write counts as complete.
        #[arg(long, value_parser = ["write-back", "write-through"])]
        durability: Option<String>,
        /// Whether what is written from now on is compressed on the disks; what is there already stays as it is.
        #[arg(long, value_parser = ["off", "lz4"])]
        compression: Option<String>,
        /// Most operations in a second, reads and writes together; 0 takes the limit away.
        #[arg(long)]
        iops: Option<u64>,
        /// Most bytes in a second, reads and writes together; 0 takes the limit away.
        #[arg(long, value_parser = parse_limit)]
        bandwidth: Option<u64>,
    },
    /// Make a volume larger, while it is in use.
    #[command(
        alias = "resize",
        after_help = "Examples:\n  hci volume grow data1 --size 200GiB\n  hci volume grow data1 --size 1TiB -o json\nAPI: POST /v1/volumes/NAME/grow"
    )]
    Grow {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        name: String,
        /// Its new size.
        #[arg(long, value_parser = parse_size)]
        size: u64,
    },
    /// Make a new volume with the content of a snapshot; nothing is copied, and each goes its own way from then on.
    #[command(
        after_help = "Examples:\n  hci volume clone data1 data1-test --snapshot before-upgrade\n  hci volume clone golden web5 --snapshot v3 -o json\nAPI: POST /v1/volumes/NAME/snapshots/SNAPSHOT/clone"
    )]
    Clone {
        /// The name or id of the volume that the snapshot is of.
        #[arg(add = names("/v1/volumes"))]
        source: String,
        /// The new volume's name.
        name: String,
        /// The snapshot's name or id.
        #[arg(long)]
        snapshot: String,
    },
    /// Give a volume that nobody has to a VM as a further disk, also while the VM runs.
    #[command(
        after_help = "Examples:\n  hci volume attach data1 web1\n  hci volume attach data1 web1 -o json\nAPI: POST /v1/vms/NAME/disks"
    )]
    Attach {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        name: String,
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        vm: String,
    },
    /// Take a volume back from a VM; it keeps its data. While the VM runs, its guest lets go of it first.
    #[command(
        after_help = "Examples:\n  hci volume detach data1 web1\n  hci volume detach data1 web1 --no-wait\nAPI: POST /v1/vms/NAME/disks/VOLUME/detach"
    )]
    Detach {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        name: String,
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        vm: String,
    },
    /// Points in time that a volume can go back to, or be cloned from.
    Snapshot {
        /// What to do.
        #[command(subcommand)]
        verb: snapshot::VolumeVerb,
    },
    /// Write a volume that nobody uses, or a snapshot of any volume, into a file of this machine.
    #[command(
        after_help = "Examples:\n  hci volume export data1 data1.qcow2\n  hci volume export data1 data1.img --format raw --snapshot before-upgrade\nAPI: GET /v1/volumes/NAME/export"
    )]
    Export {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        name: String,
        /// A snapshot of it, by name or id.
        #[arg(long)]
        snapshot: Option<String>,
        /// Where to.
        #[command(flatten)]
        to: ExportArgs,
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

/// A size, or 0.
fn parse_limit(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { parse_size(text) }
}

const COLUMNS: &[Column] = &[
    column("NAME", "/name"),
    column("STATE", "/state"),
    column("SIZE", "/size_bytes").shown(Show::Bytes),
    column("REPLICAS", "/replicas"),
    column("IN SYNC", "/in_sync"),
    column("PROGRESS", "/progress").shown(Show::Percent).wide(),
    column("TOLERATES", "/tolerates").wide(),
    column("OPEN ON", "/coordinator"),
    column("USED BY", "/used_by"),
    column("RESYNC LEFT", "/resync_blocks_left").wide(),
    column("COMPRESSION", "/compression").wide(),
    column("DATA", "/data_bytes").shown(Show::Bytes).wide(),
    column("STORED", "/stored_bytes").shown(Show::Bytes).wide(),
    column("GENERATION", "/generation").wide(),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci volume`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::Attach { name, vm } => devices::attach(context, &name, &vm).await,
        Verb::Detach { name, vm } => devices::detach(context, &name, &vm, false).await,
        Verb::List => context.list("/v1/volumes", COLUMNS).await,
        Verb::Get { name } => context.show("/v1/volumes", &name).await,
        Verb::Export { name, snapshot, to } => {
            export::export(context, "/v1/volumes", &name, snapshot.as_deref(), &to).await
        }
        Verb::Set { name, replicas, min_in_sync, durability, compression, iops, bandwidth } => {
            let body = json!({
                "replicas": replicas, "min_in_sync": min_in_sync, "durability": durability,
                "compression": compression, "operations_per_second": iops, "bytes_per_second": bandwidth,
            });
            let path = object_path("/v1/volumes", &name);
            let answer = context.client.json(Method::PATCH, &path, Some(&body)).await?;
            context.change(answer, "/v1/volumes", &name, COLUMNS).await
        }
        Verb::Grow { name, size } => {
            let path = format!("{}/grow", object_path("/v1/volumes", &name));
            let answer = context.client.post(&path, &json!({ "size_bytes": size })).await?;
            context.change(answer, "/v1/volumes", &name, COLUMNS).await
        }
        Verb::Create { name, size, replicas, durability, compression } => {
            let body = json!({
                "name": name, "size_bytes": size, "replicas": replicas, "durability": durability,
                "compression": compression,
            });
            let answer = context.client.post("/v1/volumes", &body).await?;
            context.change(answer, "/v1/volumes", &name, COLUMNS).await
        }
        Verb::Clone { source, name, snapshot } => {
            let path = object_path("/v1/volumes", &source);
            let path = format!("{path}/snapshots/{}/clone", segment(&snapshot));
            let answer = context.client.post(&path, &json!({ "name": name })).await?;
            context.change(answer, "/v1/volumes", &name, COLUMNS).await
        }
        Verb::Snapshot { verb } => snapshot::run_volume(context, verb).await,
        Verb::Delete { name } => {
            let loss = match context.yes {
                true => String::new(),
                false => loss(context, &name).await?,
            };
            context.delete("/v1/volumes", &name, &loss).await
        }
    }
}

/// What is lost with a volume.
async fn loss(context: &Context, name: &str) -> Result<String, CliError> {
    let volume = context.client.get(&object_path("/v1/volumes", name)).await?;
    let snapshots = volume.get("snapshots").and_then(Value::as_array).map_or(0, Vec::len);
    Ok(match snapshots {
        0 => format!("destroys volume {name} with all its data"),
        1 => format!("destroys volume {name} with all its data and 1 snapshot"),
        many => format!("destroys volume {name} with all its data and {many} snapshots"),
    })
}
