//! The entry points of the node's roles: what the system starts, and the installer on the ISO.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use installer::install::{InstallError, Options};

use super::exit::{CliError, Exit};
use super::nouns::say;
use crate::{control, data, vmm_role};

/// The verbs of `hci data`.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Serve storage and network of this node until SIGTERM.
    Run(data::Args),
}

/// The verbs of `hci vmm`.
#[derive(Debug, Subcommand)]
pub enum VmmCommand {
    /// Run one VM until its guest has ended; the exit code tells how.
    Run(vmm_role::Args),
}

/// Runs the control role.
pub fn node(args: control::Args) -> Result<ExitCode, CliError> {
    log_to_stderr();
    ended("the node service", control::run(args))
}

/// Runs the data role.
pub fn data(command: DataCommand) -> Result<ExitCode, CliError> {
    let DataCommand::Run(args) = command;
    log_to_stderr();
    ended("the data service", data::run(args))
}

/// Runs the VMM role.
pub fn vmm(command: VmmCommand) -> Result<ExitCode, CliError> {
    let VmmCommand::Run(args) = command;
    log_to_stderr();
    Ok(vmm_role::run(&args))
}

/// Logs go to the journal through stderr; `HCI_LOG` sets the levels.
fn log_to_stderr() {
    let levels = tracing_subscriber::EnvFilter::try_from_env("HCI_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,openraft=warn,quinn=warn"));
    tracing_subscriber::fmt().with_env_filter(levels).with_writer(std::io::stderr).with_ansi(false).init();
}

fn ended(what: &str, outcome: anyhow::Result<()>) -> Result<ExitCode, CliError> {
    match outcome {
        Ok(()) => Ok(Exit::Ok.into()),
        Err(error) => Err(CliError::new(Exit::Failed, format!("{what} ended")).why(format!("{error:#}"))),
    }
}

/// The arguments of `hci install`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hci install --unattended\n  hci install --unattended --answer /tmp/answer.toml"
)]
pub struct InstallArgs {
    /// Take everything from an answer file and ask nothing.
    #[arg(long, required = true)]
    unattended: bool,
    /// Where the install medium is mounted.
    #[arg(long, default_value = "/medium")]
    medium: PathBuf,
    /// The answer file; looked for in the firmware channel, on the medium and on a volume labelled HCISEED if not given.
    #[arg(long)]
    answer: Option<PathBuf>,
}

/// Installs this server.
pub fn install(args: InstallArgs) -> Result<ExitCode, CliError> {
    let options = Options { medium: args.medium, answer: args.answer };
    match installer::install::install(&options, &|step| say(&format!("hci install: {step}"))) {
        Ok(hostname) => {
            say(&format!("hci install: {hostname} is ready to start from its disk"));
            Ok(Exit::Ok.into())
        }
        Err(error) => {
            let exit = match &error {
                InstallError::NoAnswer { .. } | InstallError::Answer(_) => Exit::Usage,
                InstallError::Disk(_) => Exit::Refused,
                InstallError::File { .. } | InstallError::Program { .. } => Exit::Failed,
            };
            Err(CliError::new(exit, "this server was not installed")
                .why(error)
                .next("correct the answer file (hci-image validate-answer FILE checks it) and start again"))
        }
    }
}
