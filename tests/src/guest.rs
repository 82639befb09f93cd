//! Builds the image that the test VMs boot: a stock Debian cloud kernel, an initramfs that finds the disk, and a small
//! root file system with BusyBox and the workload of `tests/guest/`.
//!
//! Everything is built without privileges beyond what `apt-get download` needs, and kept in a folder: a second build
//! with the same inputs does nothing.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// The modules of the guest, in the order in which they depend on each other.
const MODULES: [&str; 12] = [
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
    "core/failover",
    "net/net_failover",
    "net/virtio_net",
    "hw_random/virtio-rng",
    "acpi/button",
    "input/evdev",
];

/// The BusyBox applets that the guest's scripts call.
const APPLETS: [&str; 25] = [
    "sh",
    "mount",
    "insmod",
    "sleep",
    "poweroff",
    "switch_root",
    "ip",
    "udhcpc",
    "acpid",
    "cat",
    "uname",
    "nproc",
    "hostname",
    "sync",
    "echo",
    "ls",
    "dmesg",
    "ping",
    "ps",
    "kill",
    "mkdir",
    "wget",
    "losetup",
    "ln",
    "date",
];

const ROOT_SIZE_MIB: u32 = 16;

/// The three files that `hci image import` takes.
#[derive(Debug, Clone)]
pub struct GuestImage {
    /// The stock Debian kernel, a bzImage.
    pub kernel: PathBuf,
    /// Loads the virtio modules and mounts the root file system.
    pub initramfs: PathBuf,
    /// The root file system, ext4, [`ROOT_SIZE_MIB`] MiB.
    pub disk: PathBuf,
}

/// Builds the image in `folder`, or returns the one that an earlier build left there.
pub fn build(sources: &Path, folder: &Path) -> Result<GuestImage> {
    let image = GuestImage {
        kernel: folder.join("vmlinuz"),
        initramfs: folder.join("initramfs.img"),
        disk: folder.join("root.img"),
    };
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let stamp = folder.join("stamp");
    let inputs = inputs_digest(sources)?;
    if fs::read_to_string(&stamp).is_ok_and(|built| built == inputs) {
        return Ok(image);
    }
    let kernel_tree = fetch_kernel(folder)?;
    build_initramfs(sources, &kernel_tree, folder, &image)?;
    build_disk(sources, folder, &image)?;
    fs::write(&stamp, inputs)?;
    Ok(image)
}

/// Changes whenever one of the guest's own files or lists changes.
fn inputs_digest(sources: &Path) -> Result<String> {
    let mut digest = format!("{MODULES:?}{APPLETS:?}{ROOT_SIZE_MIB}");
    for name in ["workload.rs", "init", "initramfs-init", "udhcpc.script", "power-button"] {
        let path = sources.join(name);
        digest += &fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(digest)
}

/// Downloads and unpacks the newest Debian cloud kernel; returns the unpacked tree.
pub fn fetch_kernel(folder: &Path) -> Result<PathBuf> {
    let tree = folder.join("kernel");
    if tree.join("boot").is_dir() {
        return Ok(tree);
    }
    let depends = output(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]))?;
    let package = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .context("Debian's package lists name no cloud kernel; run `apt-get update` and try again")?;
    for old in find(folder, &|path| path.extension().is_some_and(|kind| kind == "deb"))? {
        fs::remove_file(old)?;
    }
    run(Command::new("apt-get").args(["download", "-q", package]).current_dir(folder))?;
    let package = find(folder, &|path| path.extension().is_some_and(|kind| kind == "deb"))?
        .pop()
        .context("apt-get download left no package")?;
    run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&tree))?;
    Ok(tree)
}

/// The kernel in an unpacked tree.
pub fn kernel_of(tree: &Path) -> Result<PathBuf> {
    find(&tree.join("boot"), &|path| file_name(path).starts_with("vmlinuz-"))?
        .pop()
        .context("the kernel package holds no vmlinuz")
}

fn build_initramfs(sources: &Path, kernel_tree: &Path, folder: &Path, image: &GuestImage) -> Result<()> {
    fs::copy(kernel_of(kernel_tree)?, &image.kernel)?;

    let root = fresh(&folder.join("initramfs"))?;
    install_busybox(&root)?;
    for name in ["dev", "proc", "sys", "root", "modules"] {
        fs::create_dir_all(root.join(name))?;
    }
    for module in MODULES {
        let file = format!("{module}.ko");
        let found = find(&kernel_tree.join("lib/modules"), &|path| path.ends_with(&file))?
            .pop()
            .with_context(|| format!("the kernel package holds no module {file}"))?;
        fs::copy(&found, root.join("modules").join(file_name(&found)))?;
    }
    install(&sources.join("initramfs-init"), &root.join("init"))?;
    run(Command::new("sh")
        .arg("-c")
        .arg("find . -print0 | sort -z | cpio --null --quiet -o -H newc -R 0:0 | gzip -n -6 > \"$1\"")
        .arg("sh")
        .arg(fs::canonicalize(folder)?.join("initramfs.img"))
        .current_dir(&root))
}

fn build_disk(sources: &Path, folder: &Path, image: &GuestImage) -> Result<()> {
    let root = fresh(&folder.join("root"))?;
    install_busybox(&root)?;
    for name in ["dev", "proc", "sys", "run", "tmp", "sbin", "etc/acpi/PWRF"] {
        fs::create_dir_all(root.join(name))?;
    }
    install(&sources.join("init"), &root.join("sbin/init"))?;
    install(&sources.join("udhcpc.script"), &root.join("etc/udhcpc.script"))?;
    install(&sources.join("power-button"), &root.join("etc/acpi/PWRF/00000080"))?;
    run(Command::new("rustc")
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "panic=abort"])
        .args(["-C", "strip=symbols", "-o"])
        .arg(root.join("bin/workload"))
        .arg(sources.join("workload.rs")))?;
    if image.disk.exists() {
        fs::remove_file(&image.disk)?;
    }
    run(Command::new("mke2fs")
        .args([
            "-q",
            "-t",
            "ext4",
            "-L",
            "root",
            "-O",
            "^has_journal,^resize_inode",
            "-E",
            "root_owner=0:0",
            "-d",
        ])
        .arg(&root)
        .arg(&image.disk)
        .arg(format!("{ROOT_SIZE_MIB}M")))
}

pub(crate) fn install_busybox(root: &Path) -> Result<()> {
    let bin = root.join("bin");
    fs::create_dir_all(&bin)?;
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .context("no busybox here; install the Debian package busybox-static")?;
    install(Path::new(busybox), &bin.join("busybox"))?;
    for applet in APPLETS {
        symlink("busybox", bin.join(applet))?;
    }
    Ok(())
}

pub(crate) fn install(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

pub(crate) fn fresh(folder: &Path) -> Result<PathBuf> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    Ok(folder.to_path_buf())
}

/// Files in a folder and those below it.
pub fn find(folder: &Path, wanted: &dyn Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(find(&entry.path(), wanted)?);
        } else if wanted(&entry.path()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Runs a command; its output is shown when it fails.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(|_| ())
}

pub(crate) fn output(command: &mut Command) -> Result<String> {
    let done = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !done.status.success() {
        bail!("{command:?} failed with {}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim());
    }
    ensure!(done.stdout.len() < 64 << 20, "{command:?} printed too much");
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}
