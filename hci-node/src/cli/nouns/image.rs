//! `hci image`: what VMs are made from.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{Context, object_path};
use crate::cli::completion::names;
use crate::cli::exit::{CliError, Exit};
use crate::cli::output::{Column, Show, column};
use crate::cli::task::finish;

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
    /// Import an image into the pool: a disk (raw or qcow2), and the kernel that boots it.
    #[command(
        after_help = "Examples:\n  hci image import debian12 --kernel vmlinuz --initramfs initrd.img --disk root.img --cmdline 'root=/dev/vda console=ttyS0'\n  hci image import rescue --kernel vmlinuz --initramfs rescue.cpio\nAPI: POST /v1/images, then PUT /v1/images/NAME/{kernel,initramfs,disk}"
    )]
    Import {
        /// The image's name.
        name: String,
        /// The kernel: a bzImage, or an ELF file with a PVH entry.
        #[arg(long)]
        kernel: PathBuf,
        /// The initramfs.
        #[arg(long)]
        initramfs: Option<PathBuf>,
        /// The disk, raw or qcow2.
        #[arg(long)]
        disk: Option<PathBuf>,
        /// The kernel's command line.
        #[arg(long, default_value = "console=ttyS0")]
        cmdline: String,
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
        Verb::Import { name, kernel, initramfs, disk, cmdline } => {
            let parts: Vec<_> = [("kernel", Some(kernel)), ("initramfs", initramfs), ("disk", disk)]
                .into_iter()
                .filter_map(|(part, file)| Some((part, file?)))
                .collect();
            import(context, &name, &cmdline, &parts).await
        }
        Verb::Delete { name } => context.delete("/v1/images", &name, &format!("deletes image {name}")).await,
    }
}

/// Announces the image with its parts, then sends the parts; a failure takes it back.
async fn import(
    context: &Context,
    name: &str,
    cmdline: &str,
    parts: &[(&str, PathBuf)],
) -> Result<(), CliError> {
    let mut body = json!({ "name": name, "cmdline": cmdline });
    let mut digests = Vec::new();
    for (part, file) in parts {
        let (size, digest) = measure(file).await?;
        body[*part] = json!(true);
        digests.push((*part, file, size, digest));
    }
    context.client.post("/v1/images", &body).await?;
    for (part, file, size, digest) in digests {
        let bar = progress_bar(size, part);
        let path = format!("{}/{part}", object_path("/v1/images", name));
        let reporter = bar.clone();
        let sent = context.client.upload(&path, file, &digest, move |bytes| reporter.inc(bytes)).await;
        bar.finish_and_clear();
        let outcome = match sent {
            Ok(answer) => finish(&context.client, context.wait, answer).await.map(|_| ()),
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            // Best effort: the import's own error is what the user needs, and an image left over can be deleted by hand.
            let _ = context.client.delete(&object_path("/v1/images", name)).await;
            return Err(error);
        }
    }
    let object = context.client.get(&object_path("/v1/images", name)).await?;
    crate::cli::output::print(context.format, &object, COLUMNS)
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

fn progress_bar(size: u64, part: &str) -> ProgressBar {
    let bar = ProgressBar::new(size);
    if let Ok(style) =
        ProgressStyle::with_template("  {msg:10} {bar:24} {bytes}/{total_bytes} {bytes_per_sec}")
    {
        bar.set_style(style);
    }
    bar.set_message(part.to_owned());
    bar
}
