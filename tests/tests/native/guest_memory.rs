//! A guest with Debian's kernel under our VMM, in an emulated machine with KVM: it plugs memory, keeps it when it is written down and goes on, and unplugs it; reports
//! free pages; fills and empties a balloon; talks with its node by vsock. What is asked is in `src/bin/guest-memory.rs`, what the guest does in `src/bin/memory-in-guest.rs`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use hci_tests::emulated::{Clock, Emulated};
use hci_tests::guest;
use hci_tests::initramfs::Initramfs;

/// How long the emulated machine may run.
const PATIENCE: Duration = Duration::from_secs(600);

#[test]
fn a_guest_has_more_or_less_memory_as_it_is_asked_to_and_talks_with_its_node() -> Result<()> {
    let asking = Path::new(env!("CARGO_BIN_EXE_guest-memory"));
    let folder =
        asking.ancestors().nth(2).context("the executable is in no target directory")?.join("guest-memory");
    fs::create_dir_all(&folder)?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/memory");
    let tree = guest::fetch_kernel(&folder)?;
    let kernel = guest::kernel_of(&tree)?;

    let inside = Initramfs::new(&folder.join("guest"))?;
    inside.program(Path::new(env!("CARGO_BIN_EXE_memory-in-guest")))?;
    for module in [
        "virtio_ring",
        "virtio",
        "virtio_pci_modern_dev",
        "virtio_pci_legacy_dev",
        "virtio_pci",
        "virtio_balloon",
        "virtio_mem",
        "vsock",
        "vmw_vsock_virtio_transport_common",
        "vmw_vsock_virtio_transport",
    ] {
        inside.module(&tree, module)?;
    }
    inside.file(&sources.join("guest-init"), "init")?;
    let guest_image = folder.join("guest.img");
    inside.pack(&guest_image)?;

    let host = Initramfs::new(&folder.join("host"))?;
    host.program(asking)?;
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
        Emulated { kernel, initramfs, arguments: "", mib: 3072, clock: Clock::Time, patience: PATIENCE };
    machine.pass(&folder.join("console.txt"))
}
