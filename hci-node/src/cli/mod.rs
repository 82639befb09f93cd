//! The command line: a thin client of the API, and the entry points of the roles of a node.
//!
//! `hci NOUN VERB [NAME…]`. Results go to stdout, talk to stderr, the outcome into the exit code ([`exit::Exit`]).
//! The command line holds no logic of the cluster: what it shows comes from the API, what it changes is a task there.
//!
//! | module | it is |
//! |---|---|
//! | [`nouns`] | the verbs of each noun |
//! | [`client`] | the HTTP client |
//! | [`task`] | waiting for a change, with progress |
//! | [`output`] | tables, JSON, YAML |
//! | [`exit`] | exit codes and the form of errors |
//! | [`roles`] | `hci node run`, `data run`, `vmm run`, `install` |

pub mod channel;
pub mod client;
pub mod completion;
pub mod console;
pub mod exit;
pub mod nouns;
pub mod output;
pub mod roles;
pub mod size;
pub mod task;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use hyper::Method;

use client::{Client, Credentials, Endpoint};
use exit::{CliError, Exit};
use nouns::Context;
use output::Format;
use task::Wait;

/// The API of the node that this runs on.
const DEFAULT_ENDPOINT: &str = "unix:///run/hci/node.sock";

/// One executable for the whole appliance: the roles of a node, and the command line for people.
#[derive(Debug, Parser)]
#[command(
    name = "hci",
    version,
    max_term_width = 120,
    after_help = "Examples:\n  hci cluster create prod\n  hci status\n  hci vm create web1 --image debian12 --disk 40GiB --network lan"
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// The flags that every noun has.
#[derive(Debug, Args)]
struct Global {
    /// The form of the result.
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    output: Format,
    /// The node to ask: https://HOST:PORT or unix:///PATH.
    #[arg(long, global = true, env = "HCI_ENDPOINT", default_value = DEFAULT_ENDPOINT)]
    endpoint: Endpoint,
    /// The token for a remote endpoint.
    #[arg(long, global = true, env = "HCI_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// The fingerprint of the cluster's CA (sha256:…) for a remote endpoint; `hci cluster get` shows it.
    #[arg(long, global = true, env = "HCI_CA_FINGERPRINT")]
    ca_fingerprint: Option<String>,
    /// Do not wait for the change; print the task's id.
    #[arg(long, global = true)]
    no_wait: bool,
    /// How long to wait for the change; it goes on afterwards.
    #[arg(long, global = true, default_value = "10m", value_parser = size::parse_duration)]
    timeout: Duration,
    /// Do not ask before something is destroyed.
    #[arg(short, long, global = true)]
    yes: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The cluster in a few lines, and what may fail now.
    #[command(after_help = "Examples:\n  hci status\n  hci status -o json\nAPI: GET /v1/status")]
    Status,
    /// The same; the exit code is 0 when healthy, 10 when degraded, 11 when critical.
    #[command(after_help = "Examples:\n  hci health\n  hci health || echo look\nAPI: GET /v1/status")]
    Health,
    /// Form a cluster, let nodes join.
    #[command(subcommand)]
    Cluster(nouns::cluster::Verb),
    /// The servers.
    #[command(subcommand)]
    Node(NodeCommand),
    /// The physical disks.
    #[command(subcommand)]
    Disk(nouns::disk::Verb),
    /// All disks together: redundancy, reserve, rebuilding.
    #[command(subcommand)]
    Pool(nouns::pool::Verb),
    /// The replicated block devices.
    #[command(subcommand)]
    Volume(nouns::volume::Verb),
    /// What VMs are made from.
    #[command(subcommand)]
    Image(nouns::image::Verb),
    /// The overlay networks.
    #[command(subcommand)]
    Network(nouns::network::Verb),
    /// The virtual machines.
    #[command(subcommand)]
    Vm(nouns::vm::Verb),
    /// The changes under way.
    #[command(subcommand)]
    Task(nouns::task::Verb),
    /// What happened.
    #[command(subcommand)]
    Event(nouns::event::Verb),
    /// Call the API directly.
    #[command(
        after_help = "Examples:\n  hci api GET /v1/nodes\n  hci api POST /v1/networks '{\"name\":\"lan\",\"subnet\":\"10.77.0.0/24\"}'"
    )]
    Api {
        /// GET, POST, PUT or DELETE.
        method: Method,
        /// The path, from /v1 on.
        path: String,
        /// A JSON body.
        body: Option<String>,
    },
    /// Print the completion script of a shell.
    #[command(
        after_help = "Examples:\n  hci completion bash > /etc/bash_completion.d/hci\n  source <(hci completion zsh)"
    )]
    Completion {
        /// The shell.
        shell: completion::Shell,
    },
    /// The data role: storage and network of this node; started by the system.
    #[command(subcommand)]
    Data(roles::DataCommand),
    /// The VMM role: one VM; started by the system.
    #[command(subcommand)]
    Vmm(roles::VmmCommand),
    /// The image worker: reads one image in a sandbox; started by the control role.
    #[command(hide = true)]
    ImageWorker(crate::images::worker::Args),
    /// Install this server; started from the ISO.
    Install(roles::InstallArgs),
    /// Print the version.
    #[command(after_help = "Examples:\n  hci version\n  hci version -o json")]
    Version,
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    #[command(flatten)]
    Ask(nouns::node::Verb),
    /// The control role: consensus, API and reconciler of this node; started by the system.
    Run(Box<crate::control::Args>),
}

/// Parses the arguments, runs the command and turns its outcome into an exit code.
pub fn main() -> ExitCode {
    completion::answer_shell();
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            nouns::say(&error.to_string());
            error.exit.into()
        }
    }
}

/// The whole tree of nouns, verbs and flags.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

fn run(cli: Cli) -> Result<ExitCode, CliError> {
    match cli.command {
        Command::Completion { shell } => completion::print(shell),
        Command::Version => version(cli.global.output)?,
        Command::Node(NodeCommand::Run(args)) => return roles::node(*args),
        Command::Data(command) => return roles::data(command),
        Command::Vmm(command) => return roles::vmm(command),
        Command::Install(args) => return roles::install(args),
        Command::ImageWorker(args) => return Ok(crate::images::worker::run(&args)),
        command => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| CliError::new(Exit::Failed, "cannot start").why(error))?;
            let outcome = runtime.block_on(ask(cli.global, command));
            // A terminal's read cannot be cancelled: do not wait for the next key.
            runtime.shutdown_background();
            return outcome;
        }
    }
    Ok(Exit::Ok.into())
}

fn version(format: Format) -> Result<(), CliError> {
    match format {
        Format::Json | Format::Yaml => {
            output::print(format, &serde_json::json!({ "version": env!("CARGO_PKG_VERSION") }), &[])?;
        }
        _ => output::line(concat!("hci ", env!("CARGO_PKG_VERSION"))),
    }
    Ok(())
}

async fn ask(global: Global, command: Command) -> Result<ExitCode, CliError> {
    let credentials = Credentials { token: global.token, ca_fingerprint: global.ca_fingerprint };
    let context = Context {
        client: Client::new(global.endpoint, credentials),
        format: global.output,
        wait: if global.no_wait { Wait::No } else { Wait::Upto(global.timeout) },
        yes: global.yes,
    };
    match command {
        Command::Status => return nouns::status::run(&context, false).await.map(ExitCode::from),
        Command::Health => return nouns::status::run(&context, true).await.map(ExitCode::from),
        Command::Cluster(verb) => nouns::cluster::run(&context, verb).await?,
        Command::Node(NodeCommand::Ask(verb)) => nouns::node::run(&context, verb).await?,
        Command::Disk(verb) => nouns::disk::run(&context, verb).await?,
        Command::Pool(verb) => nouns::pool::run(&context, verb).await?,
        Command::Volume(verb) => nouns::volume::run(&context, verb).await?,
        Command::Image(verb) => nouns::image::run(&context, verb).await?,
        Command::Network(verb) => nouns::network::run(&context, verb).await?,
        Command::Vm(verb) => return nouns::vm::run(&context, verb).await,
        Command::Task(verb) => nouns::task::run(&context, verb).await?,
        Command::Event(verb) => nouns::event::run(&context, verb).await?,
        Command::Api { method, path, body } => {
            let body = body
                .map(|text| serde_json::from_str(&text))
                .transpose()
                .map_err(|error| CliError::new(Exit::Usage, "the body is not JSON").why(error))?;
            let answer = context.client.json(method, &path, body.as_ref()).await?;
            match answer {
                serde_json::Value::String(text) => output::line(text.trim_end()),
                answer => output::print(
                    if context.format == Format::Table { Format::Json } else { context.format },
                    &answer,
                    &[],
                )?,
            }
        }
        Command::Node(NodeCommand::Run(_))
        | Command::Data(_)
        | Command::Vmm(_)
        | Command::Install(_)
        | Command::ImageWorker(_)
        | Command::Completion { .. }
        | Command::Version => {
            return Err(CliError::new(Exit::Usage, "this is not a question to the API"));
        }
    }
    Ok(Exit::Ok.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn every_verb_that_asks_the_api_has_examples_and_names_the_call() {
        fn check(command: &clap::Command, path: &str, missing: &mut Vec<String>) {
            let path = format!("{path} {}", command.get_name());
            let roles = ["run", "install", "image-worker", "completion", "version", "api", "help"];
            let role = roles.contains(&command.get_name());
            if !command.has_subcommands() && !role {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                // What looks at a device of this machine says that it asks nobody.
                let says = help.contains("API: ") || help.contains("Needs no cluster.");
                if help.matches("\n  hci ").count() < 2 || !says {
                    missing.push(path.clone());
                }
            }
            command.get_subcommands().for_each(|inner| check(inner, &path, missing));
        }
        let mut missing = Vec::new();
        check(&command(), "", &mut missing);
        assert_eq!(missing, Vec::<String>::new());
    }
}
