//! Installing a server: everything is checked first, then the one disk that was named is written.
//!
//! The system is copied, not set up: boot sectors with their addresses in them, a FAT file system with GRUB, kernel and
//! initramfs, and the root image as it is. What is this server's own (name, network, keys) goes to the data partition,
//! from where each boot takes it.
//!
//! | module | it is |
//! |---|---|
//! | [`machine`] | what the machine is; finding the answer file |
//! | [`disks`] | choosing the disk, and refusing one that holds data |
//! | [`layout`] | the partitions |
//! | [`settings`] | the files of the installed server |
//! | [`steps`] | writing it all |

pub mod disks;
pub mod layout;
pub mod machine;
pub mod settings;
pub mod steps;

use std::path::PathBuf;

use crate::answer::{AnswerError, AnswerFile};

/// What `hci install` was told.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the install medium is mounted.
    pub medium: PathBuf,
    /// An answer file to use instead of looking for one.
    pub answer: Option<PathBuf>,
}

/// Why an install ended. Nothing was written when the error is about the answer, the disk or the medium.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// There is no answer file.
    #[error(
        "no answer file: put it on the medium as {medium} (hci-image iso --answer FILE), or on a volume labelled HCISEED as answer.toml"
    )]
    NoAnswer {
        /// Where it would be on the medium.
        medium: PathBuf,
    },
    /// The answer file is wrong.
    #[error(transparent)]
    Answer(#[from] AnswerError),
    /// The disk is missing, unclear or not blank.
    #[error(transparent)]
    Disk(#[from] disks::DiskError),
    /// A file could not be read or written.
    #[error("{what}: {source}")]
    File {
        /// What was done.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// A program failed.
    #[error("{program} failed: {message}")]
    Program {
        /// Its name.
        program: String,
        /// What it said.
        message: String,
    },
}

/// Installs this server; `say` hears of each step. Returns the server's hostname.
///
/// # Errors
/// See [`InstallError`].
pub fn install(options: &Options, say: &dyn Fn(&str)) -> Result<String, InstallError> {
    let (text, place) = match &options.answer {
        Some(file) => {
            let text = std::fs::read_to_string(file).map_err(|source| InstallError::File {
                what: format!("cannot read {}", file.display()),
                source,
            })?;
            (text, file.clone())
        }
        None => machine::find_answer(&options.medium, std::path::Path::new("/tmp/seed"))?,
    };
    say(&format!("answers: {}", place.display()));
    let answer = AnswerFile::parse(&text)?;
    let node = answer.node_for(&machine::identify())?;
    let disks = disks::list()?;
    let disk = disks::choose(&answer.install.disk, &disks)?;
    disks::check_blank(disk, &answer.install.wipe)?;
    say(&format!("server {}: system disk {} ({} MiB)", node.hostname, disk.path, disk.size >> 20));
    for other in disks.iter().filter(|other| other.path != disk.path) {
        say(&format!("left alone: {} ({} MiB)", other.path, other.size >> 20));
    }
    steps::write_system(&options.medium, disk, &settings::files(&answer, node), say)?;
    Ok(node.hostname.clone())
}
