//! Builds what a server boots: the root image, its initramfs, and the install ISO.
//!
//! Everything is made from Debian packages and our one executable, without mounts, loop devices or a running systemd.
//! What is slow (the Debian base, the kernel) is cached by its package list, so that a new executable alone costs
//! seconds. Files are written in a fixed order with a fixed time; identities are never in the image but made by each
//! server at its first boot.
//!
//! | module | it makes |
//! |---|---|
//! | [`base`] | the Debian base, and the kernel with a server's drivers |
//! | [`initramfs`] | what finds the root image |
//! | [`root`] | the squashfs root image |
//! | [`iso`] | the hybrid install ISO |

pub mod base;
pub mod initramfs;
pub mod iso;
pub mod root;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// All files in images carry this time (2026-01-01), so that equal inputs make equal images.
pub const IMAGE_TIME: u64 = 1_767_225_600;

/// The files of one built image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The root file system.
    pub root: PathBuf,
    /// Debian's signed kernel.
    pub kernel: PathBuf,
    /// The initramfs that finds the root.
    pub initramfs: PathBuf,
}

impl Image {
    /// The image in an output folder; whether it was built is not looked at.
    pub fn in_folder(out: &Path) -> Self {
        Self {
            root: out.join("root.squashfs"),
            kernel: out.join("vmlinuz"),
            initramfs: out.join("initrd.img"),
        }
    }
}

/// Builds the root image with that executable in it.
pub fn build(hci: &Path, out: &Path, say: &dyn Fn(&str)) -> Result<Image> {
    let cache = out.join("cache");
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let image = Image::in_folder(out);
    let base = base::debian(&cache, say)?;
    let kernel = base::kernel(&cache, say)?;
    fs::copy(&kernel.vmlinuz, &image.kernel)?;
    say("initramfs");
    initramfs::build(&kernel, &cache, &image.initramfs)?;
    say("root image");
    root::build(&base, &kernel, hci, &image.root)?;
    write_manifest(&image, hci, &kernel, out)?;
    Ok(image)
}

/// Names the version and the BLAKE3 hash of each part.
fn write_manifest(image: &Image, hci: &Path, kernel: &base::Kernel, out: &Path) -> Result<()> {
    let mut lines = vec![
        format!("version = {:?}", env!("CARGO_PKG_VERSION")),
        format!("kernel = {:?}", kernel.version),
        "[blake3]".to_owned(),
    ];
    for (name, path) in
        [("hci", hci), ("root", &image.root), ("kernel", &image.kernel), ("initramfs", &image.initramfs)]
    {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(
            fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?,
        )?;
        lines.push(format!("{name} = {:?}", hasher.finalize().to_hex().as_str()));
    }
    Ok(fs::write(out.join("manifest.toml"), lines.join("\n") + "\n")?)
}

/// Runs a program to its end; what it printed is in the error when it fails.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).output().with_context(|| {
        format!("cannot start {name}; `make setup` installs the Debian packages that are needed")
    })?;
    if !done.status.success() {
        let error = String::from_utf8_lossy(&done.stderr);
        let tail: Vec<_> = error.lines().rev().take(8).collect();
        let tail: Vec<_> = tail.into_iter().rev().collect();
        bail!("{name} failed with {}: {}", done.status, tail.join("\n"));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// An empty folder, whatever was there.
pub(crate) fn fresh(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}

/// The names in a packages file.
pub(crate) fn package_names(file: &str) -> Vec<&str> {
    file.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}
