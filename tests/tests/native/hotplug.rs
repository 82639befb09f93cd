//! A guest under our VMM, with Debian's kernel, in an emulated machine with KVM: a disk comes, is written, grows, goes and comes back, a NIC comes and goes,
//! vCPUs are added, and all that goes on after the guest was written down and restored. What is done is in `src/bin/hotplug-guest.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use hci_tests::emulated::{Clock, Emulated};
use hci_tests::guest;
use hci_tests::initramfs::Initramfs;

/// How long the emulated machine may run.
const PATIENCE: Duration = Duration::from_secs(600);

#[test]
fn parts_come_and_go_while_a_guest_runs() -> Result<()> {
    let program = Path::new(env!("CARGO_BIN_EXE_hotplug-guest"));
    let folder = program.ancestors().nth(2).context("the program is in no target directory")?.join("hotplug");
    fs::create_dir_all(&folder)?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/hotplug");
    let tree = guest::fetch_kernel(&folder)?;
    let kernel = guest::kernel_of(&tree)?;
    let guest_image = guest_image(&folder, &sources, &tree)?;

    let host = Initramfs::new(&folder.join("host"))?;
    host.program(program)?;
    host.program(Path::new(env!("CARGO_BIN_EXE_blk-target")))?;
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
    for module in [
        "virtio_ring",
        "virtio",
        "virtio_pci_modern_dev",
        "virtio_pci_legacy_dev",
        "virtio_pci",
        "virtio_blk",
        "failover",
        "net_failover",
        "virtio_net",
    ] {
        guest.module(tree, module)?;
    }
    guest.file(&sources.join("guest-init"), "init")?;
    let image = folder.join("guest.img");
    guest.pack(&image)?;
    Ok(image)
}
