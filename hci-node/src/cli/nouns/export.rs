//! `hci volume export` and `hci image export`: a disk of the pool into a file of this machine.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use http_body_util::BodyExt;
use indicatif::ProgressBar;

use super::{Context, object_path, say};
use crate::cli::client::segment;
use crate::cli::exit::{CliError, Exit};
use crate::images::protocol::{Decoder, Event, Extent, Mode};
use crate::images::writer::{DiskWriter, ExportFormat};

/// Attempts in a row to go on that bring nothing.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);
/// The longest silence of the node.
const SILENCE: Duration = Duration::from_secs(60);

/// Where to, and how.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The file to write; it may not be there yet.
    file: PathBuf,
    /// How the disk is written down.
    #[arg(long, value_enum, default_value = "qcow2")]
    format: ExportFormat,
}

/// How an attempt ended early.
enum Broken {
    /// The connection broke; it may be gone on with.
    Connection(CliError),
    /// It is of no use to go on.
    Final(CliError),
}

/// A disk that is being written, and how far it is.
struct Progress {
    writer: Option<DiskWriter>,
    at: u64,
    bar: ProgressBar,
}

/// Reads the disk of an object out of the pool, and goes on where it was when the connection breaks.
pub async fn export(
    context: &Context,
    collection: &str,
    name: &str,
    snapshot: Option<&str>,
    args: &ExportArgs,
) -> Result<(), CliError> {
    let mut path = format!("{}/export?from=", object_path(collection, name));
    if let Some(snapshot) = snapshot {
        path = path.replace("?from=", &format!("?snapshot={}&from=", segment(snapshot)));
    }
    let mut progress = Progress { writer: None, at: 0, bar: super::image::progress_bar(0, "export") };
    let (mut tries, mut furthest) = (0, 0);
    loop {
        let outcome = attempt(context, &format!("{path}{}", progress.at), args, &mut progress).await;
        if progress.at > furthest {
            (tries, furthest) = (0, progress.at);
        }
        match outcome {
            Ok(()) => break,
            Err(Broken::Connection(error)) if tries < TRIES && furthest > 0 => {
                say(&format!("{error}\ngoes on at {furthest}"));
                tries += 1;
                tokio::time::sleep(PAUSE * tries).await;
            }
            Err(Broken::Connection(error) | Broken::Final(error)) => return Err(error),
        }
    }
    progress.bar.finish_and_clear();
    if let Some(writer) = progress.writer {
        writer.finish().map_err(|error| cannot_write(args, error))?;
    }
    say(&format!("{name} is in {}", args.file.display()));
    Ok(())
}

fn cannot_write(args: &ExportArgs, error: std::io::Error) -> CliError {
    CliError::new(Exit::Failed, format!("cannot write {}", args.file.display())).why(error)
}

async fn attempt(
    context: &Context,
    path: &str,
    args: &ExportArgs,
    progress: &mut Progress,
) -> Result<(), Broken> {
    let response = context.client.stream(path).await.map_err(|error| match error.exit {
        Exit::Unreachable => Broken::Connection(error),
        _ => Broken::Final(error),
    })?;
    let lost =
        |why: String| Broken::Connection(CliError::new(Exit::Unreachable, "the export broke off").why(why));
    let garbage = |error| {
        Broken::Final(CliError::new(Exit::Failed, "the node sent something else than a disk").why(error))
    };
    let mut body = response.into_body();
    let mut decoder = Decoder::new(Mode::Read);
    loop {
        match decoder.decode().map_err(garbage)? {
            Some(Event::Header(header)) => {
                progress.bar.set_length(header.size_bytes);
                if progress.writer.is_none() {
                    let writer = DiskWriter::create(&args.file, args.format, header.size_bytes);
                    progress.writer = Some(writer.map_err(|error| Broken::Final(cannot_write(args, error)))?);
                }
            }
            Some(Event::Extent(extent)) => {
                if let (Extent::Data { offset, data }, Some(writer)) = (&extent, &progress.writer) {
                    let written = writer.write(*offset, data);
                    written.map_err(|error| Broken::Final(cannot_write(args, error)))?;
                }
                progress.at = extent.end();
                progress.bar.set_position(progress.at);
            }
            Some(Event::End) => return Ok(()),
            Some(Event::Refused(reason)) => {
                let error = CliError::new(Exit::Failed, "the export ended early").why(reason);
                return Err(Broken::Final(error.next("hci volume get NAME shows who uses it; try again")));
            }
            None => match tokio::time::timeout(SILENCE, body.frame()).await {
                Err(_) => return Err(lost("the node says nothing".to_owned())),
                Ok(None) => return Err(lost("the stream ended".to_owned())),
                Ok(Some(Err(error))) => return Err(lost(error.to_string())),
                Ok(Some(Ok(frame))) => {
                    if let Some(bytes) = frame.data_ref() {
                        decoder.buffer().extend_from_slice(bytes);
                    }
                }
            },
        }
    }
}
