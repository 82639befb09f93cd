//! `hci vm`: virtual machines.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::{Value, json};
use vmm::CpuModel;

use super::{Context, cloud_init::CloudInitArgs, devices, exec, object_path, say, snapshot};
use crate::cli::channel;
use crate::cli::completion::names;
use crate::cli::console;
use crate::cli::exit::{CliError, Exit};
use crate::cli::output::{Column, Show, column};
use crate::cli::size::{parse_duration, parse_size};

/// The verbs of `hci vm`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the VMs.
    #[command(after_help = "Examples:\n  hci vm list\n  hci vm list -o wide\nAPI: GET /v1/vms")]
    List,
    /// Show one VM.
    #[command(after_help = "Examples:\n  hci vm get web1\n  hci vm get web1 -o json\nAPI: GET /v1/vms/NAME")]
    Get {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
    },
    /// Create a VM from an image and start it.
    #[command(
        after_help = "Examples:\n  hci vm create web1 --image debian12 --disk 40GiB --network lan\n  hci vm create web2 --image debian12 --cpu 4 --memory 8GiB --disk 40GiB --network lan --ssh-key ~/.ssh/id_ed25519.pub\nAPI: POST /v1/vms"
    )]
    Create(Box<CreateArgs>),
    /// Change a VM. One that runs gets more CPUs, and more or less memory, at once as far as it can, and the rest with its next start.
    #[command(
        after_help = "Examples:\n  hci vm set web1 --memory 16GiB --cpu 8\n  hci vm set web1 --after-crash stop\nAPI: PATCH /v1/vms/NAME"
    )]
    Set {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
        /// The number of virtual CPUs.
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=128))]
        cpu: Option<u8>,
        /// What its CPUs show it of the node's: x86-64-v2, x86-64-v3, x86-64-v4 or host.
        #[arg(long)]
        cpu_model: Option<CpuModel>,
        /// Its memory.
        #[arg(long, value_parser = parse_size)]
        memory: Option<u64>,
        /// Whether it is started again after a crash or stays off.
        #[arg(long, value_parser = ["restart", "stop"])]
        after_crash: Option<String>,
        /// The most CPUs that it can get while it runs, from its next start on.
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=128))]
        max_cpu: Option<u8>,
        /// The most memory that it can get while it runs, from its next start on.
        #[arg(long, value_parser = parse_size)]
        max_memory: Option<u64>,
    },
    /// Start a VM. A suspended one goes on where it was.
    #[command(
        after_help = "Examples:\n  hci vm start web1\n  hci vm start web1 --discard-state\nAPI: POST /v1/vms/NAME/start"
    )]
    Start {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
        /// Boot a suspended VM anew; what was in its memory is lost.
        #[arg(long)]
        discard_state: bool,
    },
    /// Stop a VM by its guest agent or its power button; it is switched off when it does not react within a minute.
    #[command(
        after_help = "Examples:\n  hci vm stop web1\n  hci vm stop web1 --force\nAPI: POST /v1/vms/NAME/stop"
    )]
    Stop {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
        /// Switch it off at once, as a pulled plug does.
        #[arg(long)]
        force: bool,
        /// Have a suspended VM off from now on; what was in its memory is lost.
        #[arg(long)]
        discard_state: bool,
    },
    /// Hold a VM's processors. It keeps its memory and its place on its node, and its clock goes on.
    #[command(
        after_help = "Examples:\n  hci vm pause web1\n  hci vm pause web1 --no-wait\nAPI: POST /v1/vms/NAME/pause"
    )]
    Pause {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
    },
    /// Write a VM's memory, processors and devices to a volume and end it: it takes no processor and no memory until it is resumed, on any node.
    #[command(
        after_help = "Examples:\n  hci vm suspend web1\n  hci vm suspend web1 --timeout 1h\nAPI: POST /v1/vms/NAME/suspend"
    )]
    Suspend {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
    },
    /// Move a VM to another node while its guest runs.
    #[command(
        after_help = "Examples:\n  hci vm migrate web1\n  hci vm migrate web1 --to n3 --rate 200MiB\n  hci vm migrate web1 --in-place\n  hci vm migrate web1 --cancel\nAPI: POST /v1/vms/NAME/migrate, DELETE /v1/vms/NAME/migration"
    )]
    Migrate {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
        /// The node to move it to; the one with the most free memory if not given.
        #[arg(long, add = names("/v1/nodes"))]
        to: Option<String>,
        /// How much may be sent in a second.
        #[arg(long, value_parser = parse_size)]
        rate: Option<u64>,
        /// The longest pause to take for a guest that writes its memory faster than it can be sent.
        #[arg(long, default_value = "500ms", value_parser = parse_duration)]
        pause: Duration,
        /// Move it into a new process of its node, made from the executable that is there now, as after an upgrade; its memory stays where it is.
        #[arg(long, conflicts_with_all = ["to", "rate", "pause"])]
        in_place: bool,
        /// Give the migration up that is under way; the VM goes on where it is.
        #[arg(long, conflicts_with_all = ["to", "rate", "pause", "in_place"])]
        cancel: bool,
    },
    /// Let a paused or suspended VM go on where it was.
    #[command(
        after_help = "Examples:\n  hci vm resume web1\n  hci vm resume web1 --no-wait\nAPI: POST /v1/vms/NAME/resume"
    )]
    Resume {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
    },
    /// Stop a VM by its guest agent or its power button and start it again; it is switched off when it does not react within a minute.
    #[command(
        after_help = "Examples:\n  hci vm restart web1\n  hci vm restart web1 --force\nAPI: POST /v1/vms/NAME/restart"
    )]
    Restart {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
        /// Switch it off at once, as a reset button does.
        #[arg(long)]
        force: bool,
    },
    /// Attach to a VM's serial console; Ctrl-] detaches.
    #[command(
        after_help = "Examples:\n  hci vm console web1\n  hci vm console web1 --log\nAPI: GET /v1/vms/NAME/console, /v1/vms/NAME/console/log"
    )]
    Console {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
        /// Print the last output and end.
        #[arg(long)]
        log: bool,
    },
    /// Show a VM's screen: serves it on this machine, for a VNC viewer; or prints a link for a browser.
    #[command(
        after_help = "Examples:\n  hci vm display web1\n  hci vm display web1 --listen 127.0.0.1:5901\n  hci vm display web1 --browser\n  xdg-open \"$(hci vm display web1 --browser)\"\nAPI: GET /v1/vms/NAME/display, POST /v1/vms/NAME/display/tickets"
    )]
    Display {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
        /// Where viewers connect; a free port of this machine if not given. Who connects there sees and types.
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: std::net::SocketAddr,
        /// Print a link instead, with which a browser shows it once, within a minute. It is a secret until then.
        #[arg(long, conflicts_with = "listen")]
        browser: bool,
    },
    /// Connect standard input and output with a program in a VM's guest that listens on AF_VSOCK; no network is needed.
    #[command(
        after_help = "Examples:\n  hci vm connect db1 --port 1024\n  hci vm connect db1 --port 1024 < request\n  ssh -o ProxyCommand='hci vm connect web1 --port 22' root@web1\nAPI: GET /v1/vms/NAME/ports/PORT"
    )]
    Connect {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
        /// The port that the program listens on.
        #[arg(long)]
        port: u32,
    },
    /// Run a program in a VM's guest by its guest agent, and end with the program's exit code.
    #[command(
        after_help = "Examples:\n  hci vm exec web1 -- /bin/uname -a\n  hci vm exec web1 --timeout 5m -- /bin/sh -c 'apt-get update && apt-get -y upgrade'\nAPI: POST /v1/vms/NAME/exec, GET /v1/vms/NAME/exec/PID"
    )]
    Exec {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
        /// The program, and its arguments; no shell is between.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Disks of a VM, which come and go while it runs.
    Disk {
        /// What to do.
        #[command(subcommand)]
        verb: devices::DiskVerb,
    },
    /// NICs of a VM, which come and go while it runs.
    Nic {
        /// What to do.
        #[command(subcommand)]
        verb: devices::NicVerb,
    },
    /// Points in time of all disks of a VM.
    Snapshot {
        /// What to do.
        #[command(subcommand)]
        verb: snapshot::VmVerb,
    },
    /// Delete a VM with its disks.
    #[command(
        after_help = "Examples:\n  hci vm delete web1\n  hci vm delete web1 --yes\nAPI: DELETE /v1/vms/NAME"
    )]
    Delete {
        /// The VM's name or id.
        #[arg(add = names("/v1/vms"))]
        name: String,
    },
}

/// What a new VM is made of.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The VM's name.
    name: String,
    /// The image that it boots.
    #[arg(long, add = names("/v1/images"))]
    image: String,
    /// The number of virtual CPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=128))]
    cpu: u8,
    /// What its CPUs show it of the node's: x86-64-v2, x86-64-v3, x86-64-v4 or host. The highest level that all nodes have if not given.
    #[arg(long)]
    cpu_model: Option<CpuModel>,
    /// Its memory.
    #[arg(long, default_value = "1GiB", value_parser = parse_size)]
    memory: u64,
    /// The size of its disk; the image's if not given.
    #[arg(long, value_parser = parse_size)]
    disk: Option<u64>,
    /// The network of its NIC; may be given several times.
    #[arg(long, add = names("/v1/networks"))]
    network: Vec<String>,
    /// How many copies of its disk on different nodes; 3 if there are as many nodes with disks.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=3))]
    replicas: Option<u8>,
    /// The node to start it on; the one with the most free memory if not given.
    #[arg(long, add = names("/v1/nodes"))]
    node: Option<String>,
    /// The kernel command line; the image's if not given.
    #[arg(long)]
    cmdline: Option<String>,
    /// Whether it is started again after a crash or stays off.
    #[arg(long, default_value = "restart", value_parser = ["restart", "stop"])]
    after_crash: String,
    /// The most CPUs that it can get while it runs; four times as many as it starts with if not given.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=128))]
    max_cpu: Option<u8>,
    /// The most memory that it can get while it runs; four times as much as it starts with, 64 GiB more at most, if not given.
    #[arg(long, value_parser = parse_size)]
    max_memory: Option<u64>,
    /// Create it only.
    #[arg(long)]
    no_start: bool,
    /// What the guest's cloud-init is told.
    #[command(flatten)]
    cloud_init: CloudInitArgs,
}

pub(super) const COLUMNS: &[Column] = &[
    column("NAME", "/name"),
    column("STATE", "/state"),
    column("NODE", "/node"),
    column("ADDRESS", "/addresses"),
    column("CPU", "/vcpus"),
    column("MEMORY", "/memory_bytes").shown(Show::Bytes),
    column("IMAGE", "/image").wide(),
    column("CPU MODEL", "/cpu_model").wide(),
    column("RUN EPOCH", "/epoch").wide(),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci vm`.
pub async fn run(context: &Context, verb: Verb) -> Result<ExitCode, CliError> {
    match verb {
        Verb::Exec { name, command } => return exec::run(context, &name, &command).await,
        Verb::List => context.list("/v1/vms", COLUMNS).await,
        Verb::Get { name } => context.show("/v1/vms", &name).await,
        Verb::Create(args) => {
            let CreateArgs {
                name,
                image,
                cpu,
                cpu_model,
                memory,
                disk,
                network,
                replicas,
                node,
                cmdline,
                after_crash,
                max_cpu,
                max_memory,
                no_start,
                cloud_init,
            } = *args;
            let disk = match disk {
                Some(size) => Some(size),
                None => image_disk(context, &image).await?,
            };
            let disks: Vec<_> =
                disk.iter().map(|size| json!({ "size_bytes": size, "replicas": replicas })).collect();
            let body = json!({
                "name": name, "image": image, "vcpus": cpu, "cpu_model": cpu_model, "memory_bytes": memory, "disks": disks,
                "networks": network, "node": node, "cmdline": cmdline, "after_crash": after_crash, "stopped": no_start,
                "cloud_init": cloud_init.body()?, "max_vcpus": max_cpu, "max_memory_bytes": max_memory,
            });
            let answer = context.client.post("/v1/vms", &body).await?;
            context.change(answer, "/v1/vms", &name, COLUMNS).await
        }
        Verb::Set { name, cpu, cpu_model, memory, after_crash, max_cpu, max_memory } => {
            let body = json!({
                "vcpus": cpu, "cpu_model": cpu_model, "memory_bytes": memory, "after_crash": after_crash,
                "max_vcpus": max_cpu, "max_memory_bytes": max_memory,
            });
            let answer =
                context.client.json(Method::PATCH, &object_path("/v1/vms", &name), Some(&body)).await?;
            context.change(answer, "/v1/vms", &name, COLUMNS).await
        }
        Verb::Start { name, discard_state } => {
            if discard_state {
                context.confirm(&name, &discards(&name))?;
            }
            act(context, &name, "start", json!({ "discard_state": discard_state })).await
        }
        Verb::Stop { name, force, discard_state } => {
            if discard_state {
                context.confirm(&name, &discards(&name))?;
            }
            act(context, &name, "stop", json!({ "force": force, "discard_state": discard_state })).await
        }
        Verb::Pause { name } => act(context, &name, "pause", json!({})).await,
        Verb::Suspend { name } => act(context, &name, "suspend", json!({})).await,
        Verb::Migrate { name, cancel: true, .. } => {
            let path = format!("{}/migration", object_path("/v1/vms", &name));
            let answer = context.client.json(Method::DELETE, &path, None).await?;
            context.change(answer, "/v1/vms", &name, COLUMNS).await
        }
        Verb::Migrate { name, in_place: true, .. } => {
            act(context, &name, "migrate", json!({ "in_place": true })).await
        }
        Verb::Migrate { name, to, rate, pause, .. } => {
            let pause = u32::try_from(pause.as_millis()).unwrap_or(u32::MAX);
            let body = json!({ "node": to, "bytes_per_second": rate, "longest_pause_ms": pause });
            act(context, &name, "migrate", body).await
        }
        Verb::Resume { name } => act(context, &name, "resume", json!({})).await,
        Verb::Restart { name, force } => act(context, &name, "restart", json!({ "force": force })).await,
        Verb::Console { name, log } => {
            let path = format!("{}/console", object_path("/v1/vms", &name));
            if log {
                console::log(&context.client, &path).await?;
                return Ok(Exit::Ok.into());
            }
            say(&format!("attached to {name}; Ctrl-] detaches"));
            console::attach(&context.client, &path).await
        }
        Verb::Display { name, listen, browser } => {
            let path = format!("{}/display", object_path("/v1/vms", &name));
            match browser {
                true => channel::link(context, &path).await,
                false => channel::serve(&context.client, &name, &path, listen).await,
            }
        }
        Verb::Connect { name, port } => {
            let path = format!("{}/ports/{port}", object_path("/v1/vms", &name));
            channel::pipe(&context.client, &path).await
        }
        Verb::Disk { verb } => devices::run_disk(context, verb).await,
        Verb::Nic { verb } => devices::run_nic(context, verb).await,
        Verb::Snapshot { verb } => snapshot::run_vm(context, verb).await,
        Verb::Delete { name } => {
            context
                .delete("/v1/vms", &name, &format!("destroys VM {name} with its disks and their snapshots"))
                .await
        }
    }?;
    Ok(Exit::Ok.into())
}

fn discards(name: &str) -> String {
    format!("loses what was in the memory of VM {name} when it was suspended")
}

/// The size of an image's disk, when it has one.
async fn image_disk(context: &Context, image: &str) -> Result<Option<u64>, CliError> {
    let image = context.client.get(&object_path("/v1/images", image)).await?;
    let parts = image.get("parts").and_then(Value::as_array).into_iter().flatten();
    let disk = parts.into_iter().find(|part| part.get("part").and_then(Value::as_str) == Some("disk"));
    Ok(disk.and_then(|part| part.get("size_bytes")?.as_u64()))
}

async fn act(context: &Context, name: &str, action: &str, body: Value) -> Result<(), CliError> {
    let path = format!("{}/{action}", object_path("/v1/vms", name));
    let answer = context.client.post(&path, &body).await?;
    context.change(answer, "/v1/vms", name, COLUMNS).await
}
