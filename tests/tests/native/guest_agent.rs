//! A guest under our VMM, with Debian's kernel and Debian's QEMU guest agent, in an emulated machine with KVM: the seed disk is read, programs
//! run, a file system is frozen and thawed, the guest is paused, written down and goes on in another VMM, and is shut down; another one panics, which is
//! noticed. What is asked is in `src/bin/guest-agent.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hci_tests::emulated::{Clock, Emulated};
use hci_tests::guest;
use hci_tests::initramfs::Initramfs;
use hci_tests::native::process::executable;

/// How long the emulated machine may run.
const PATIENCE: Duration = Duration::from_secs(900);

#[test]
fn a_guests_agent_does_what_a_node_asks_it_for() -> Result<()> {
    let hci = executable()?;
    let folder =
        hci.ancestors().nth(2).context("the executable is in no target directory")?.join("guest-agent");
    fs::create_dir_all(&folder)?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/agent");
    let tree = guest::fetch_kernel(&folder)?;
    let kernel = guest::kernel_of(&tree)?;
    let guest_image = guest_image(&folder, &sources, &tree)?;

    let host = Initramfs::new(&folder.join("host"))?;
    host.program(&hci)?;
    host.program(Path::new(env!("CARGO_BIN_EXE_guest-agent")))?;
    for module in ["irqbypass", "kvm", "kvm-amd"] {
        host.module(&tree, module)?;
    }
    host.file(&kernel, "kernel")?;
    host.file(&guest_image, "guest.img")?;
    host.file(&sources.join("host-init"), "init")?;
    let image = folder.join("host.img");
    host.pack(&image)?;

    let (kernel, initramfs) = (kernel.as_path(), image.as_path());
    let machine =
        Emulated { kernel, initramfs, arguments: "", mib: 2048, clock: Clock::Time, patience: PATIENCE };
    machine.pass(&folder.join("console.txt"))
}

fn guest_image(folder: &Path, sources: &Path, tree: &Path) -> Result<PathBuf> {
    let guest = Initramfs::new(&folder.join("guest"))?;
    guest.program(Path::new("/usr/sbin/qemu-ga")).context("install the Debian package qemu-guest-agent")?;
    for module in [
        "virtio_ring",
        "virtio",
        "virtio_pci_modern_dev",
        "virtio_pci_legacy_dev",
        "virtio_pci",
        "virtio_blk",
        "virtio_console",
        "cdrom",
        "isofs",
        "loop",
        "pvpanic",
        "pvpanic-mmio",
    ] {
        guest.module(tree, module)?;
    }
    let data = folder.join("data.img");
    fs::File::create(&data)?.set_len(4 << 20)?;
    let made =
        Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-O", "^has_journal"]).arg(&data).status()?;
    ensure!(made.success(), "mke2fs: {made}");
    guest.file(&data, "data.img")?;
    guest.file(&sources.join("guest-init"), "init")?;
    guest.file(&sources.join("shutdown"), "sbin/shutdown")?;
    guest.file(&sources.join("hwclock"), "sbin/hwclock")?;
    let image = folder.join("guest.img");
    guest.pack(&image)?;
    Ok(image)
}
