//! The parts that come from Debian: the base system and the kernel, fetched once and cached by what was asked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{IMAGE_TIME, package_names, run};

const BASE_PACKAGES: &str = include_str!("../../image/base-packages.txt");
/// The newest kernel of this series that Debian signs.
const KERNEL_SERIES: &str = "linux-image-6.12-amd64";

/// Drivers that no server needs: without them the image is half as large.
const NOT_FOR_SERVERS: [&str; 26] = [
    "kernel/sound",
    "kernel/drivers/media",
    "kernel/drivers/bluetooth",
    "kernel/drivers/gpu/drm/amd",
    "kernel/drivers/gpu/drm/i915",
    "kernel/drivers/gpu/drm/xe",
    "kernel/drivers/gpu/drm/nouveau",
    "kernel/drivers/gpu/drm/radeon",
    "kernel/drivers/gpu/drm/vmwgfx",
    "kernel/drivers/gpu/drm/gma500",
    "kernel/drivers/iio",
    "kernel/drivers/isdn",
    "kernel/drivers/staging",
    "kernel/drivers/net/wireless",
    "kernel/drivers/net/can",
    "kernel/drivers/net/wwan",
    "kernel/drivers/net/ieee802154",
    "kernel/drivers/input/touchscreen",
    "kernel/drivers/input/joystick",
    "kernel/drivers/infiniband",
    "kernel/drivers/comedi",
    "kernel/drivers/mtd",
    "kernel/net/bluetooth",
    "kernel/net/wireless",
    "kernel/net/mac80211",
    "kernel/fs/ocfs2",
];

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// As `uname -r` tells it.
    pub version: String,
    /// The signed kernel.
    pub vmlinuz: PathBuf,
    /// `lib/modules/VERSION`, a server's subset, with `modules.dep`.
    pub modules: PathBuf,
}

/// The Debian base as a tar file.
pub fn debian(cache: &Path, say: &dyn Fn(&str)) -> Result<PathBuf> {
    let key = blake3::hash(BASE_PACKAGES.as_bytes()).to_hex();
    let tar = cache.join(format!("base-{}.tar", &key.as_str()[..12]));
    if tar.exists() {
        return Ok(tar);
    }
    say("Debian base (once)");
    let partial = cache.join("base.partial.tar");
    let mode = if nix::unistd::geteuid().is_root() { "root" } else { "unshare" };
    let mut command = Command::new("mmdebstrap");
    command
        .arg(format!("--mode={mode}"))
        .arg("--variant=essential")
        .arg(format!("--include={}", package_names(BASE_PACKAGES).join(",")))
        .env("SOURCE_DATE_EPOCH", IMAGE_TIME.to_string());
    for excluded in ["doc", "man", "locale", "info", "lintian", "bug"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{excluded}/*"));
    }
    run(command.arg("bookworm").arg(&partial))?;
    fs::rename(&partial, &tar)?;
    Ok(tar)
}

/// The kernel and a server's modules.
pub fn kernel(cache: &Path, say: &dyn Fn(&str)) -> Result<Kernel> {
    let tree = cache.join("kernel");
    if !tree.join("complete").exists() {
        say("kernel (once)");
        super::fresh(&tree)?;
        let depends = run(Command::new("apt-cache").args(["depends", KERNEL_SERIES]))?;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .with_context(|| format!("Debian's lists have no {KERNEL_SERIES}; run `apt-get update`"))?;
        unpack_package(package, &tree)?;
        let version = module_version(&tree)?;
        let modules = tree.join("lib/modules").join(&version);
        for folder in NOT_FOR_SERVERS {
            let folder = modules.join(folder);
            if folder.exists() {
                fs::remove_dir_all(folder)?;
            }
        }
        run(Command::new("depmod").arg("-b").arg(&tree).arg(&version))?;
        fs::write(tree.join("complete"), &version)?;
    }
    let version = module_version(&tree)?;
    Ok(Kernel {
        vmlinuz: tree.join(format!("boot/vmlinuz-{version}")),
        modules: tree.join("lib/modules").join(&version),
        version,
    })
}

/// Downloads a Debian package and unpacks it without installing it.
pub fn unpack_package(package: &str, tree: &Path) -> Result<()> {
    let downloads = tree.join("download");
    super::fresh(&downloads)?;
    run(Command::new("apt-get").args(["download", "-q", package]).current_dir(&downloads))?;
    let file = fs::read_dir(&downloads)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|kind| kind == "deb"))
        .with_context(|| format!("apt-get download {package} left no file"))?;
    run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(tree))?;
    Ok(fs::remove_dir_all(&downloads)?)
}

fn module_version(tree: &Path) -> Result<String> {
    let modules = tree.join("lib/modules");
    let entry =
        fs::read_dir(&modules)?.next().with_context(|| format!("{} is empty", modules.display()))??;
    Ok(entry.file_name().to_string_lossy().into_owned())
}
