//! `hci image`: what VMs are made from.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::export::{self, ExportArgs};
use super::{Context, object_path, say};
use crate::cli::client::Upload;
use crate::cli::completion::names;
use crate::cli::exit::{CliError, Exit};
use crate::cli::output::{Column, Show, column};
use crate::cli::task::finish;

/// Attempts in a row to go on with an upload that bring nothing.
const TRIES: u32 = 5;
/// The pause before the first of them; the others are longer.
const PAUSE: Duration = Duration::from_secs(1);

/// The verbs of `hci image`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the images.
    #[command(after_help = "Examples:\n  hci image list\n  hci image list -o json\nAPI: GET /v1/images")]
    List,
    /// Show one image.
    #[command(
        after_help = "Examples:\n  hci image get debian12\n  hci image get debian12 -o json\nAPI: GET /v1/images/NAME"
    )]
    Get {
        /// The image's name or id.
        #[arg(add = names("/v1/images"))]
        name: String,
    },
    /// Import an image into the pool: a disk (raw, qcow2 or vmdk) that UEFI firmware boots, or one and the kernel that boots it. A source is a file of
    /// this machine, `https://…` or `node:/PATH`, a file of the node. Run it again to go on with an upload that broke off.
    #[command(
        after_help = "Examples:\n  hci image import debian12 --disk https://example.org/debian-12-generic-amd64.qcow2 --sha256 HEX\n  hci image import tiny --kernel vmlinuz --initramfs initrd.img --disk root.img --cmdline 'root=/dev/vda console=ttyS0'\nAPI: POST /v1/images, then PUT (upload) or POST (fetch) /v1/images/NAME/{kernel,initramfs,disk}"
    )]
    Import {
        /// The image's name.
        name: String,
        /// The kernel: a bzImage, or an ELF file with a PVH entry. Without one VMs boot from the disk, by UEFI firmware.
        #[arg(long)]
        kernel: Option<Source>,
        /// The initramfs.
        #[arg(long)]
        initramfs: Option<Source>,
        /// The disk: raw, qcow2 or vmdk, as it is (not compressed around it).
        #[arg(long)]
        disk: Option<Source>,
        /// What the SHA-256 of the disk's source must be.
        #[arg(long, requires = "disk", value_parser = sha256)]
        sha256: Option<String>,
        /// The kernel's command line.
        #[arg(long, default_value = "console=ttyS0")]
        cmdline: String,
    },
    /// Write an image's disk into a file of this machine.
    #[command(
        after_help = "Examples:\n  hci image export debian12 debian12.qcow2\n  hci image export debian12 debian12.img --format raw\nAPI: GET /v1/images/NAME/export"
    )]
    Export {
        /// The image's name or id.
        #[arg(add = names("/v1/images"))]
        name: String,
        /// Where to.
        #[command(flatten)]
        to: ExportArgs,
    },
    /// Delete an image; VMs made from it keep their volumes.
    #[command(
        after_help = "Examples:\n  hci image delete debian12\n  hci image delete debian12 --yes\nAPI: DELETE /v1/images/NAME"
    )]
    Delete {
        /// The image's name or id.
        #[arg(add = names("/v1/images"))]
        name: String,
    },
}

const COLUMNS: &[Column] = &[
    column("NAME", "/name"),
    column("STATE", "/state"),
    column("PARTS", "/parts").shown(Show::Count),
    column("CMDLINE", "/cmdline"),
    column("ID", "/id").wide(),
];

/// Runs a verb of `hci image`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::List => context.list("/v1/images", COLUMNS).await,
        Verb::Get { name } => context.show("/v1/images", &name).await,
        Verb::Import { name, kernel, initramfs, disk, sha256, cmdline } => {
            let parts: Vec<_> = [("kernel", kernel), ("initramfs", initramfs), ("disk", disk)]
                .into_iter()
                .filter_map(|(part, source)| {
                    let sha256 = sha256.clone().filter(|_| part == "disk");
                    Some(Part { name: part, source: source?, sha256 })
                })
                .collect();
            import(context, &name, &cmdline, &parts).await
        }
        Verb::Export { name, to } => export::export(context, "/v1/images", &name, None, &to).await,
        Verb::Delete { name } => context.delete("/v1/images", &name, &format!("deletes image {name}")).await,
    }
}

/// Where a part comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file of this machine.
    File(PathBuf),
    /// A file of the node.
    NodeFile(String),
    /// A web server.
    Url(String),
}

impl FromStr for Source {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.strip_prefix("node:") {
            Some(path) => Self::NodeFile(path.to_owned()),
            None if text.starts_with("https://") || text.starts_with("http://") => Self::Url(text.to_owned()),
            None => Self::File(text.into()),
        })
    }
}

fn sha256(text: &str) -> Result<String, String> {
    let is_sum = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_sum { Ok(text.to_ascii_lowercase()) } else { Err("a SHA-256 has 64 hexadecimal digits".to_owned()) }
}

/// A part to import.
struct Part {
    name: &'static str,
    source: Source,
    sha256: Option<String>,
}

/// Announces the image with its parts, then sends the parts or has them fetched; a failure takes it back, unless it can
/// be gone on with.
async fn import(context: &Context, name: &str, cmdline: &str, parts: &[Part]) -> Result<(), CliError> {
    let mut body = json!({ "name": name, "cmdline": cmdline });
    let mut files = Vec::new();
    for part in parts {
        body[part.name] = json!(true);
        files.push(match &part.source {
            Source::File(file) => Some(measure(file).await?),
            Source::NodeFile(_) | Source::Url(_) => None,
        });
    }
    let path = object_path("/v1/images", name);
    let ready = match context.client.post("/v1/images", &body).await {
        Ok(_) => Vec::new(),
        Err(error) if error.exit == Exit::Conflict => begun(context, &path, parts).await.ok_or(error)?,
        Err(error) => return Err(error),
    };
    for (part, measured) in parts.iter().zip(&files) {
        if ready.iter().any(|ready| ready == part.name) {
            continue;
        }
        let path = format!("{path}/{}", part.name);
        let answer = match (&part.source, measured) {
            (Source::File(file), Some((size, blake3))) => {
                let upload = Upload { file, size: *size, blake3, sha256: part.sha256.as_deref() };
                send(context, &path, part.name, &upload).await
            }
            (Source::Url(url), _) => {
                context.client.post(&path, &json!({ "url": url, "sha256": part.sha256 })).await
            }
            (Source::NodeFile(file), _) => {
                context.client.post(&path, &json!({ "file": file, "sha256": part.sha256 })).await
            }
            // Every file was measured.
            (Source::File(_), None) => continue,
        };
        let outcome = match answer {
            Ok(answer) => finish(&context.client, context.wait, answer).await.map(|_| ()),
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            if !matches!(error.exit, Exit::Unreachable | Exit::TimedOut) {
                // Best effort: the import's own error is what the user needs, and an image left over can be deleted by hand.
                let _ = context.client.delete(&object_path("/v1/images", name)).await;
            }
            return Err(error);
        }
    }
    let object = context.client.get(&path).await?;
    crate::cli::output::print(context.format, &object, COLUMNS)
}

/// An import that was begun earlier with the same parts: those that are no longer awaited. None if it is another one.
async fn begun(context: &Context, path: &str, parts: &[Part]) -> Option<Vec<String>> {
    let image = context.client.get(path).await.ok()?;
    let known = image["parts"].as_array()?;
    let is_declared = |part: &Part| known.iter().any(|known| known["part"] == part.name);
    if image["state"] != "incomplete" || known.len() != parts.len() || !parts.iter().all(is_declared) {
        return None;
    }
    say("goes on with the import that was begun");
    let taken = known.iter().filter(|part| part["state"] != "awaiting");
    taken.map(|part| part["part"].as_str().map(str::to_owned)).collect()
}

/// Sends a file, and goes on where it was when the connection breaks.
async fn send(
    context: &Context,
    path: &str,
    part: &str,
    upload: &Upload<'_>,
) -> Result<serde_json::Value, CliError> {
    let bar = progress_bar(upload.size, part);
    let (mut tries, mut furthest) = (0, 0);
    loop {
        let offset = match context.client.get(path).await {
            Ok(answer) => answer["offset"].as_u64().unwrap_or(0),
            Err(error) if error.exit == Exit::Unreachable && tries < TRIES => {
                tries += 1;
                tokio::time::sleep(PAUSE * tries).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        // What is there of another file would only be found at the end; a whole one is not there without having been taken.
        let offset = if offset < upload.size { offset } else { 0 };
        if offset > furthest {
            (tries, furthest) = (0, offset);
        }
        bar.set_position(offset);
        let reporter = bar.clone();
        let sent = context.client.upload(path, upload, offset, move |bytes| reporter.inc(bytes)).await;
        match sent {
            Err(error) if error.exit == Exit::Unreachable && tries < TRIES => {
                tries += 1;
                tokio::time::sleep(PAUSE * tries).await;
            }
            sent => {
                bar.finish_and_clear();
                return sent;
            }
        }
    }
}

/// The size and BLAKE3 digest of a file.
async fn measure(file: &Path) -> Result<(u64, String), CliError> {
    let path = file.to_path_buf();
    let measured = tokio::task::spawn_blocking(move || {
        let mut hasher = blake3::Hasher::new();
        let size = std::io::copy(&mut std::fs::File::open(&path)?, &mut hasher)?;
        Ok::<_, std::io::Error>((size, hasher.finalize().to_hex().to_string()))
    })
    .await;
    match measured {
        Ok(Ok((0, _))) => Err(CliError::new(Exit::Usage, format!("{} is empty", file.display()))),
        Ok(Ok(measured)) => Ok(measured),
        Ok(Err(error)) => {
            Err(CliError::new(Exit::Usage, format!("cannot read {}", file.display())).why(error))
        }
        Err(error) => Err(CliError::new(Exit::Failed, format!("cannot read {}", file.display())).why(error)),
    }
}

/// A bar of bytes.
pub(super) fn progress_bar(size: u64, part: &str) -> ProgressBar {
    let bar = ProgressBar::new(size);
    if let Ok(style) =
        ProgressStyle::with_template("  {msg:10} {bar:24} {bytes}/{total_bytes} {bytes_per_sec}")
    {
        bar.set_style(style);
    }
    bar.set_message(part.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        let source = |text: &str| Source::from_str(text).unwrap();
        assert_eq!(source("root.img"), Source::File("root.img".into()));
        assert_eq!(source("node:/var/tmp/root.img"), Source::NodeFile("/var/tmp/root.img".into()));
        assert_eq!(source("https://a/b"), Source::Url("https://a/b".into()));
        assert!(sha256("abc").is_err());
    }
}
