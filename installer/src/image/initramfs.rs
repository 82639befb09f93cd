//! The initramfs: BusyBox, the drivers of everything that a root image can be on, and one script.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::base::Kernel;
use super::{fresh, run};

const INIT: &str = include_str!("../../image/initramfs-init");

/// Modules, or folders of modules, that lead to a disk, a CD or a USB stick.
const STORAGE: [&str; 37] = [
    "kernel/drivers/block/loop.ko",
    "kernel/drivers/block/virtio_blk.ko",
    "kernel/drivers/nvme/host/nvme.ko",
    "kernel/drivers/ata/",
    "kernel/drivers/scsi/sd_mod.ko",
    "kernel/drivers/scsi/sr_mod.ko",
    "kernel/drivers/scsi/virtio_scsi.ko",
    "kernel/drivers/scsi/megaraid/",
    "kernel/drivers/scsi/mpt3sas/",
    "kernel/drivers/scsi/hpsa.ko",
    "kernel/drivers/scsi/smartpqi/",
    "kernel/drivers/scsi/aacraid/",
    "kernel/drivers/scsi/mvsas/",
    "kernel/drivers/scsi/isci/",
    "kernel/drivers/scsi/vmw_pvscsi.ko",
    "kernel/drivers/message/fusion/",
    "kernel/drivers/cdrom/cdrom.ko",
    "kernel/drivers/virtio/virtio_pci.ko",
    "kernel/drivers/usb/host/xhci-pci.ko",
    "kernel/drivers/usb/host/ehci-pci.ko",
    "kernel/drivers/usb/host/ohci-pci.ko",
    "kernel/drivers/usb/host/uhci-hcd.ko",
    "kernel/drivers/usb/storage/usb-storage.ko",
    "kernel/drivers/usb/storage/uas.ko",
    "kernel/drivers/mmc/host/sdhci-pci.ko",
    "kernel/drivers/mmc/core/mmc_block.ko",
    "kernel/drivers/firmware/qemu_fw_cfg.ko",
    "kernel/fs/squashfs/squashfs.ko",
    "kernel/fs/overlayfs/overlay.ko",
    "kernel/fs/isofs/isofs.ko",
    "kernel/fs/ext4/ext4.ko",
    "kernel/fs/fat/vfat.ko",
    "kernel/fs/nls/nls_cp437.ko",
    "kernel/fs/nls/nls_ascii.ko",
    "kernel/fs/nls/nls_iso8859-1.ko",
    "kernel/arch/x86/crypto/crc32c-intel.ko",
    "kernel/crypto/crc32c_generic.ko",
];

/// Builds the initramfs; the slow part is kept in the cache as long as kernel and script are the same.
pub fn build(kernel: &Kernel, cache: &Path, out: &Path) -> Result<()> {
    let stamp = cache.join("initramfs.stamp");
    let key = format!("{}{}{STORAGE:?}", kernel.version, blake3::hash(INIT.as_bytes()));
    if out.exists() && fs::read_to_string(&stamp).is_ok_and(|built| built == key) {
        return Ok(());
    }
    let tree = cache.join("initramfs");
    fresh(&tree)?;
    fs::create_dir_all(tree.join("bin"))?;
    install(Path::new("/bin/busybox"), &tree.join("bin/busybox"))?;
    for folder in ["dev", "proc", "sys"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    fs::write(tree.join("init"), INIT)?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;

    let modules = tree.join("lib/modules").join(&kernel.version);
    for module in closure(&kernel.modules)? {
        let to = modules.join(&module);
        fs::create_dir_all(to.parent().context("a module has a folder")?)?;
        fs::copy(kernel.modules.join(&module), &to)?;
        if module.ends_with(".xz") {
            run(Command::new("xz").arg("-d").arg(&to))?;
        }
    }
    for name in ["modules.builtin", "modules.order"] {
        fs::copy(kernel.modules.join(name), modules.join(name))?;
    }
    run(Command::new("depmod").arg("-b").arg(&tree).arg(&kernel.version))?;
    run(Command::new("sh")
        .arg("-c")
        .arg(
            "find . -exec touch -h -d @0 {} + && find . -print0 | sort -z | \
             cpio --null --quiet --reproducible -o -H newc -R 0:0 | zstd -q -f -9 -T0 -o \"$1\"",
        )
        .arg("sh")
        .arg(std::path::absolute(out)?)
        .current_dir(&tree))?;
    Ok(fs::write(stamp, key)?)
}

/// The wanted modules and all that they depend on, as paths below the modules folder.
fn closure(modules: &Path) -> Result<BTreeSet<String>> {
    let dependencies = fs::read_to_string(modules.join("modules.dep"))?;
    let dependencies: HashMap<&str, Vec<&str>> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module, needs.split_whitespace().collect()))
        .collect();
    let wanted = |module: &str| {
        STORAGE.iter().any(|path| {
            if path.ends_with('/') {
                module.starts_with(path)
            } else {
                module.starts_with(path) && !module.ends_with('/')
            }
        })
    };
    let mut found = BTreeSet::new();
    for (module, needs) in &dependencies {
        if wanted(module) {
            found.insert((*module).to_owned());
            found.extend(needs.iter().map(|need| (*need).to_owned()));
        }
    }
    Ok(found)
}

fn install(from: &Path, to: &PathBuf) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {}; install busybox-static", from.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(0o755))?)
}
