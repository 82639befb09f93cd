//! `hci disk`: the physical disks of the nodes, those in the pool and those that could be.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;
use storage::store::disk::Encryption;

use super::offline_disk::Unlock;
use super::{Context, object_path, offline_disk, say};
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
        after_help = "Examples:\n  hci disk add n1 /dev/vdb\n  hci disk add n1 /dev/vdc --wipe\n  hci disk add n1 /dev/vdd --encrypt\nAPI: POST /v1/disks"
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
        /// Encrypt what will be on it: out of its node it cannot be read.
        #[arg(long)]
        encrypt: bool,
    },
    /// Show one disk.
    #[command(
        after_help = "Examples:\n  hci disk get n1:/dev/vdb\n  hci disk get n1:/dev/vdb -o json\nAPI: GET /v1/disks/DISK"
    )]
    Get {
        /// The disk, as NODE:PATH or by its id.
        disk: String,
    },
    /// Move everything off a disk, then take it out of the pool.
    #[command(
        alias = "remove",
        after_help = "Examples:\n  hci disk evict n1:/dev/vdb\n  hci disk evict n1:/dev/vdb --force --yes\nAPI: POST /v1/disks/DISK/evict"
    )]
    Evict {
        /// The disk, as NODE:PATH or by its id.
        disk: String,
        /// Declare it dead: its copies are rebuilt from the others at once.
        #[arg(long)]
        force: bool,
    },
    /// Verify now what a disk holds; damaged blocks are repaired from other copies. Each disk has its turn every two weeks anyway.
    #[command(
        after_help = "Examples:\n  hci disk scrub n1:/dev/vdb\n  hci disk scrub n1:/dev/vdb && hci disk get n1:/dev/vdb\nAPI: POST /v1/disks/DISK/scrub"
    )]
    Scrub {
        /// The disk, as NODE:PATH or by its id.
        disk: String,
    },
    /// Keep a disk that is being emptied.
    #[command(
        after_help = "Examples:\n  hci disk resume n1:/dev/vdb\n  hci disk resume n1:/dev/vdb --no-wait\nAPI: POST /v1/disks/DISK/resume"
    )]
    Resume {
        /// The disk, as NODE:PATH or by its id.
        disk: String,
    },
    /// Show what a disk of this machine holds, without any service: it must not be open.
    #[command(
        after_help = "Examples:\n  hci disk dump /dev/vdb\n  hci disk dump /var/lib/hci/disk1/store -o json\n  hci disk dump /dev/vdb --key-salt SALT\nNeeds no cluster."
    )]
    Dump {
        /// The device or file.
        path: PathBuf,
        /// For an encrypted disk.
        #[command(flatten)]
        unlock: Unlock,
    },
    /// Compare everything on a disk of this machine with its checksums, without any service: it must not be open.
    #[command(
        after_help = "Examples:\n  hci disk verify /dev/vdb\n  hci disk verify /dev/vdb -o json\nNeeds no cluster. Writes nothing."
    )]
    Verify {
        /// The device or file.
        path: PathBuf,
        /// For an encrypted disk.
        #[command(flatten)]
        unlock: Unlock,
    },
    /// Make the damaged index of a disk of this machine anew from what is stored beside its data: it must not be open.
    #[command(
        after_help = "Examples:\n  systemctl stop hci-data && hci disk rebuild /dev/vdb && systemctl start hci-data\n  hci disk rebuild /dev/vdb -o json\n  hci disk rebuild /dev/vdb --key-salt SALT\nNeeds no cluster. Writes nothing where nothing is damaged, or where too little is left: then the disk is to be evicted. Cut short, it can be run again."
    )]
    Rebuild {
        /// The device or file.
        path: PathBuf,
        /// For an encrypted disk.
        #[command(flatten)]
        unlock: Unlock,
    },
}

const COLUMNS: &[Column] = &[
    column("NODE", "/node"),
    column("PATH", "/path"),
    column("STATE", "/state"),
    column("SIZE", "/capacity_bytes").shown(Show::Bytes),
    column("USED", "/used_bytes").shown(Show::Bytes),
    column("SEGMENTS", "/segments"),
    column("MODEL", "/model"),
    column("MESSAGE", "/message"),
    column("ENCRYPTION", "/encryption").wide(),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci disk`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::Dump { path, unlock } => offline_disk::dump(context.format, &path, &unlock),
        Verb::Verify { path, unlock } => offline_disk::verify(context.format, &path, &unlock),
        Verb::Rebuild { path, unlock } => offline_disk::rebuild(context.format, &path, &unlock),
        Verb::List => context.list("/v1/disks", COLUMNS).await,
        Verb::Add { node, path, wipe, encrypt } => {
            if wipe {
                context.confirm(
                    &path.join(" "),
                    &format!("destroys everything on {} of {node}", path.join(" ")),
                )?;
            }
            for path in path {
                let encryption = if encrypt { Encryption::Aes256Xts } else { Encryption::None };
                let body = json!({ "node": node, "path": path, "wipe": wipe, "encryption": encryption });
                let answer = context.client.post("/v1/disks", &body).await?;
                finish(&context.client, context.wait, answer).await?;
            }
            context.list("/v1/disks", COLUMNS).await
        }
        Verb::Get { disk } => context.show("/v1/disks", &disk).await,
        Verb::Evict { disk, force } => {
            if force {
                context.confirm(&disk, &format!("gives up everything on {disk}"))?;
            }
            let path = format!("{}/evict", object_path("/v1/disks", &disk));
            let answer = context.client.post(&path, &json!({ "force": force })).await?;
            finish(&context.client, context.wait, answer).await?;
            say(&format!("{disk} has left the pool"));
            Ok(())
        }
        Verb::Scrub { disk } => {
            let path = format!("{}/scrub", object_path("/v1/disks", &disk));
            let answer = context.client.post(&path, &json!({})).await?;
            finish(&context.client, context.wait, answer).await?;
            say(&format!("{disk} is being verified; see how far it is: hci disk get {disk}"));
            Ok(())
        }
        Verb::Resume { disk } => {
            let path = format!("{}/resume", object_path("/v1/disks", &disk));
            let answer = context.client.post(&path, &json!({})).await?;
            finish(&context.client, context.wait, answer).await?;
            context.list("/v1/disks", COLUMNS).await
        }
    }
}
