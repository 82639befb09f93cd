//! The entry points of the node's roles: what the system starts, and the installer on the ISO.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use installer::install::{InstallError, Options};

use super::exit::{CliError, Exit};
use super::nouns::say;

/// The arguments of `hci install`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  hci install --unattended\n  hci install --unattended --answer /tmp/answer.toml")]
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
