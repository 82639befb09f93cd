//! `hci-image`: the developers' tool: builds image and ISO, checks answer files, runs the lab.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use installer::answer::AnswerFile;
use installer::image::{self, Image};
use installer::lab::{Boot, Firmware, Lab, LabOptions, Link, Medium};

/// Builds the appliance's image and ISO, and runs servers of it under QEMU.
#[derive(Debug, Parser)]
#[command(name = "hci-image", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build the root image.
    Image {
        /// The `hci` executable.
        #[arg(long)]
        hci: PathBuf,
        /// The output folder.
        #[arg(long, default_value = "target/image")]
        out: PathBuf,
    },
    /// Build the install ISO from the root image.
    Iso {
        /// An answer file to put on it: the ISO then installs unattended.
        #[arg(long)]
        answer: Option<PathBuf>,
        /// The output folder.
        #[arg(long, default_value = "target/image")]
        out: PathBuf,
    },
    /// Check an answer file as the installer will.
    ValidateAnswer {
        /// The file.
        file: PathBuf,
    },
    /// Servers under QEMU.
    Lab {
        /// The lab's folder.
        #[arg(long, default_value = "target/lab", global = true)]
        dir: PathBuf,
        #[command(subcommand)]
        command: LabCommand,
    },
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Start servers on blank disks and let them install themselves.
    Up {
        /// The install ISO.
        #[arg(long, default_value = "target/image/hci.iso")]
        iso: PathBuf,
        /// What they start with.
        #[arg(long, value_enum, default_value_t)]
        firmware: Firmware,
        /// What holds the ISO.
        #[arg(long, value_enum, default_value_t)]
        medium: Medium,
    },
    /// End the lab and free its disks.
    Down,
    /// Show the servers.
    Status,
    /// Show the end of a server's console.
    Console {
        /// The server, from 1.
        server: usize,
    },
    /// Pull a server's cable to the others.
    Cut {
        /// The server, from 1.
        server: usize,
    },
    /// Plug it in again.
    Mend {
        /// The server, from 1.
        server: usize,
    },
    /// Switch a server.
    Power {
        /// The server, from 1.
        server: usize,
        /// What to do: on, cut or button.
        action: Power,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Power {
    /// Switch it on.
    On,
    /// Pull the plug.
    Cut,
    /// Press the button.
    Button,
}

const INSTALL_LIMIT: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Image { hci, out } => {
            let image = image::build(&hci, &out, &|step| println!("  {step}"))?;
            print_size(&image.root)
        }
        Command::Iso { answer, out } => {
            if let Some(answer) = &answer {
                validate(answer)?;
            }
            print_size(&image::iso::build(&Image::in_folder(&out), answer.as_deref(), &out)?)
        }
        Command::ValidateAnswer { file } => {
            let answer = validate(&file)?;
            println!("{}: good, {} node(s)", file.display(), answer.node.len());
            Ok(())
        }
        Command::Lab { dir, command } => lab(&dir, command),
    }
}

fn validate(file: &Path) -> Result<AnswerFile> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    AnswerFile::parse(&text).with_context(|| file.display().to_string())
}

fn print_size(file: &Path) -> Result<()> {
    println!("{} ({} MiB)", file.display(), file.metadata()?.len() >> 20);
    Ok(())
}

fn lab(dir: &Path, command: LabCommand) -> Result<()> {
    let server = |number: usize| -> Result<(Lab, usize)> {
        let lab = Lab::open(dir)?;
        if number == 0 || number > lab.nodes().len() {
            bail!("the lab has servers 1 to {}", lab.nodes().len());
        }
        Ok((lab, number - 1))
    };
    match command {
        LabCommand::Up { iso, firmware, medium } => {
            let mut options = LabOptions::from_iso(dir, &iso);
            options.servers.fill(Boot { firmware, medium });
            let lab = Lab::up(&options, &mut |line| println!("  {line}"))?;
            for server in lab.nodes() {
                server.wait_ssh(INSTALL_LIMIT)?;
                println!("{} is installed: {}", server.name(), server.ssh_command_line());
            }
        }
        LabCommand::Down => Lab::down(dir)?,
        LabCommand::Status => {
            for server in Lab::open(dir)?.nodes() {
                let power = if server.is_on() { "on" } else { "off" };
                println!(
                    "{}  {power}  https://127.0.0.1:{}  {}",
                    server.name(),
                    server.api_port(),
                    server.ssh_command_line()
                );
            }
        }
        LabCommand::Console { server: number } => {
            let (lab, index) = server(number)?;
            println!("{}", lab.node(index).console_tail(60));
        }
        LabCommand::Cut { server: number } => {
            let (lab, index) = server(number)?;
            lab.node(index).link(Link::Down)?;
        }
        LabCommand::Mend { server: number } => {
            let (lab, index) = server(number)?;
            lab.node(index).link(Link::Up)?;
        }
        LabCommand::Power { server: number, action } => {
            let (lab, index) = server(number)?;
            match action {
                Power::On => lab.node(index).power_on()?,
                Power::Cut => lab.node(index).power_cut()?,
                Power::Button => lab.node(index).power_button()?,
            }
        }
    }
    Ok(())
}
