//! `hci volume snapshot` and `hci vm snapshot`: points in time that volumes can go back to, or be cloned from.

use clap::Subcommand;
use serde_json::{Value, json};

use super::{Context, object_path, say};
use crate::cli::{
    client::segment,
    completion::names,
    exit::CliError,
    output::{Column, Show, column},
    task::finish,
};

/// The verbs of `hci volume snapshot`.
#[derive(Debug, Subcommand)]
pub enum VolumeVerb {
    /// Take a snapshot of one volume, or of several at one point in time; whatever uses them goes on.
    #[command(
        after_help = "Examples:\n  hci volume snapshot create data1 --name before-upgrade\n  hci volume snapshot create db-data db-log --name nightly\nAPI: POST /v1/snapshots"
    )]
    Create {
        /// The volumes' names or ids.
        #[arg(required = true, add = names("/v1/volumes"))]
        volumes: Vec<String>,
        /// What the snapshot is called.
        #[arg(long)]
        name: String,
    },
    /// List the snapshots of a volume.
    #[command(
        after_help = "Examples:\n  hci volume snapshot list data1\n  hci volume snapshot list data1 -o json\nAPI: GET /v1/volumes/NAME/snapshots"
    )]
    List {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        volume: String,
    },
    /// Put a volume back to a snapshot; what was written since is lost. Nothing may use the volume meanwhile.
    #[command(
        after_help = "Examples:\n  hci volume snapshot restore data1 --name before-upgrade\n  hci volume snapshot restore data1 --name before-upgrade --yes\nAPI: POST /v1/volumes/NAME/snapshots/SNAPSHOT/restore"
    )]
    Restore {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        volume: String,
        /// The snapshot's name or id.
        #[arg(long)]
        name: String,
    },
    /// Delete a snapshot; the room that only it needs is given back in the background.
    #[command(
        after_help = "Examples:\n  hci volume snapshot delete data1 --name before-upgrade\n  hci volume snapshot delete data1 --name before-upgrade --yes\nAPI: DELETE /v1/volumes/NAME/snapshots/SNAPSHOT"
    )]
    Delete {
        /// The volume's name or id.
        #[arg(add = names("/v1/volumes"))]
        volume: String,
        /// The snapshot's name or id.
        #[arg(long)]
        name: String,
    },
}

/// The verbs of `hci vm snapshot`.
#[derive(Debug, Subcommand)]
pub enum VmVerb {
    /// Take a snapshot of all disks of a VM at one point in time; it goes on running. Its file systems are frozen meanwhile if its guest agent
    /// answers.
    #[command(
        after_help = "Examples:\n  hci vm snapshot create web1 --name before-upgrade\n  hci vm snapshot create web1 --name nightly --no-wait\nAPI: POST /v1/vms/NAME/snapshots"
    )]
    Create {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        vm: String,
        /// What the snapshots of its disks are called.
        #[arg(long)]
        name: String,
    },
}

const COLUMNS: &[Column] = &[
    column("NAME", "/name"),
    column("CREATED", "/created"),
    column("SIZE", "/size_bytes").shown(Show::Bytes),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci volume snapshot`.
pub async fn run_volume(context: &Context, verb: VolumeVerb) -> Result<(), CliError> {
    let snapshots = |volume: &str| format!("{}/snapshots", object_path("/v1/volumes", volume));
    let one = |volume: &str, name: &str| format!("{}/{}", snapshots(volume), segment(name));
    match verb {
        VolumeVerb::Create { volumes, name } => {
            let body = json!({ "name": name, "volumes": volumes });
            let answer = context.client.post("/v1/snapshots", &body).await?;
            finish(&context.client, context.wait, answer).await?;
            say(&format!("snapshot {name} of {}", volumes.join(", ")));
            Ok(())
        }
        VolumeVerb::List { volume } => context.list(&snapshots(&volume), COLUMNS).await,
        VolumeVerb::Restore { volume, name } => {
            context.confirm(&volume, &format!("loses all that was written to {volume} since {name}"))?;
            let path = format!("{}/restore", one(&volume, &name));
            let answer = context.client.post(&path, &json!({})).await?;
            finish(&context.client, context.wait, answer).await?;
            say(&format!("{volume} is as it was at {name}"));
            Ok(())
        }
        VolumeVerb::Delete { volume, name } => {
            context.delete(&snapshots(&volume), &name, &format!("deletes snapshot {name} of {volume}")).await
        }
    }
}

/// Runs a verb of `hci vm snapshot`.
pub async fn run_vm(context: &Context, verb: VmVerb) -> Result<(), CliError> {
    let VmVerb::Create { vm, name } = verb;
    let path = format!("{}/snapshots", object_path("/v1/vms", &vm));
    let answer = context.client.post(&path, &json!({ "name": name })).await?;
    let consistency = consistency(&answer);
    finish(&context.client, context.wait, answer).await?;
    say(&format!("snapshot {name} of the disks of {vm}; {consistency}"));
    Ok(())
}

/// What a VM's snapshot is good for, in the node's answer to its order.
fn consistency(answer: &Value) -> String {
    let text = |key: &str| answer.get(key).and_then(Value::as_str);
    match (text("consistency"), text("why")) {
        (Some("file-systems"), _) => "consistent: file systems frozen".to_owned(),
        (Some("crash"), Some(why)) => format!("crash-consistent: {why}"),
        (Some("at-rest"), _) => "the VM does not run".to_owned(),
        _ => "crash-consistent".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_told_what_a_snapshot_is_good_for() {
        assert_eq!(
            consistency(&json!({ "consistency": "file-systems", "why": null })),
            "consistent: file systems frozen"
        );
        assert_eq!(
            consistency(&json!({ "consistency": "crash", "why": "no guest agent answers" })),
            "crash-consistent: no guest agent answers"
        );
    }
}
