//! The install ISO: boots from CD and USB, under BIOS and UEFI, with Secure Boot through Debian's signed shim and GRUB.
//!
//! It carries the root image, and what the installer copies beside it to the disk: the BIOS boot sectors with their
//! block addresses already in them (the boot partition always begins at the same place, so nothing is computed on the
//! server), and the signed UEFI programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::base::unpack_package;
use super::{IMAGE_TIME, Image, fresh, run};
use crate::install::layout::BIOS_BOOT_START;

const GRUB_ISO: &str = include_str!("../../image/grub-iso.cfg");
const GRUB_DISK: &str = include_str!("../../image/grub-disk.cfg");
const GRUB_BIOS: &str = "/usr/lib/grub/i386-pc";
const ISO_MODULES: &str = "biosdisk iso9660 fat part_gpt part_msdos linux normal configfile serial terminal echo test search loadenv";
const DISK_MODULES: &str =
    "biosdisk part_gpt part_msdos fat linux normal configfile serial terminal echo test search loadenv";
const EFI_SYSTEM: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
const BASIC_DATA: &str = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7";

/// Builds `hci.iso` in the output folder, with an answer file in it when one is given.
pub fn build(image: &Image, answer: Option<&Path>, out: &Path) -> Result<PathBuf> {
    let cache = out.join("cache");
    let tree = out.join("iso");
    fresh(&tree)?;
    for folder in ["boot/grub", "hci/disk", ".disk"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    ensure!(image.root.exists(), "{} is not there; run `hci-image image` first", image.root.display());
    hard_link(&image.root, &tree.join("hci/root.squashfs"))?;
    hard_link(&image.kernel, &tree.join("boot/vmlinuz"))?;
    hard_link(&image.initramfs, &tree.join("boot/initrd.img"))?;
    fs::copy(out.join("manifest.toml"), tree.join("hci/manifest.toml"))?;
    fs::write(tree.join("boot/grub/grub.cfg"), GRUB_ISO)?;
    fs::write(tree.join(".disk/info"), "HCI install medium\n")?;
    if let Some(answer) = answer {
        let to = tree.join("hci/answer.toml");
        fs::copy(answer, to).with_context(|| format!("cannot copy {}", answer.display()))?;
    }

    let disk = tree.join("hci/disk");
    fs::write(disk.join("grub.cfg"), GRUB_DISK)?;
    fs::write(disk.join("boot.img"), boot_sector()?)?;
    fs::write(disk.join("core.img"), core_image(&cache)?)?;
    let signed = signed_efi(&cache)?;
    fs::copy(signed.join("usr/lib/shim/shimx64.efi.signed"), disk.join("shimx64.efi"))?;
    let grub = signed.join("usr/lib/grub/x86_64-efi-signed");
    fs::copy(grub.join("grubx64.efi.signed"), disk.join("grubx64.efi"))?;

    mkimage("i386-pc-eltorito", "/boot/grub", ISO_MODULES, &tree.join("boot/grub/eltorito.img"))?;
    let efi = cache.join("efi.img");
    efi_image(&disk.join("shimx64.efi"), &grub.join("gcdx64.efi.signed"), &efi)?;
    xorriso(&tree, &efi, &out.join("hci.iso"))
}

fn hard_link(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(|_| ()))?;
    Ok(())
}

/// GRUB's boot sector: loads the core image from the start of the BIOS boot partition.
fn boot_sector() -> Result<Vec<u8>> {
    let mut sector = fs::read(format!("{GRUB_BIOS}/boot.img")).context("install grub-pc-bin")?;
    ensure!(sector.len() == 512, "GRUB's boot.img has an unknown form");
    sector[0x5c..0x64].copy_from_slice(&BIOS_BOOT_START.to_le_bytes());
    // Two NOPs in place of the jump that would trust the drive number of old BIOSes less than we do.
    sector[0x66..0x68].copy_from_slice(&[0x90, 0x90]);
    sector.truncate(440);
    Ok(sector)
}

/// GRUB's core: finds its configuration on the ESP of the disk that it was started from.
fn core_image(cache: &Path) -> Result<Vec<u8>> {
    let file = cache.join("core.img");
    mkimage("i386-pc", "(,gpt2)/grub", DISK_MODULES, &file)?;
    let mut core = fs::read(&file)?;
    ensure!(core.len() > 512 && core.len() < 1 << 20, "GRUB's core image has an unknown form");
    core[0x1f4..0x1fc].copy_from_slice(&(BIOS_BOOT_START + 1).to_le_bytes());
    Ok(core)
}

fn mkimage(format: &str, prefix: &str, modules: &str, out: &Path) -> Result<()> {
    run(Command::new("grub-mkimage")
        .args(["-O", format, "-p", prefix, "-o"])
        .arg(out)
        .args(modules.split(' ')))?;
    Ok(())
}

/// Debian's signed shim and GRUB, unpacked, not installed.
fn signed_efi(cache: &Path) -> Result<PathBuf> {
    let tree = cache.join("efi");
    if !tree.join("complete").exists() {
        fresh(&tree)?;
        unpack_package("shim-signed", &tree)?;
        unpack_package("grub-efi-amd64-signed", &tree)?;
        fs::write(tree.join("complete"), "")?;
    }
    Ok(tree)
}

/// The FAT image that UEFI starts from.
fn efi_image(shim: &Path, grub: &Path, out: &Path) -> Result<()> {
    if out.exists() {
        fs::remove_file(out)?;
    }
    run(Command::new("mkfs.vfat")
        .args(["--invariant", "-i", "48434945", "-n", "HCIEFI", "-C"])
        .arg(out)
        .arg("8192"))?;
    run(Command::new("mmd").arg("-i").arg(out).args(["::EFI", "::EFI/BOOT"]))?;
    run(Command::new("mcopy").arg("-m").arg("-i").arg(out).arg(shim).arg("::EFI/BOOT/BOOTX64.EFI"))?;
    run(Command::new("mcopy").arg("-m").arg("-i").arg(out).arg(grub).arg("::EFI/BOOT/grubx64.efi"))?;
    Ok(())
}

fn xorriso(tree: &Path, efi: &Path, out: &Path) -> Result<PathBuf> {
    run(Command::new("xorriso")
        .env("SOURCE_DATE_EPOCH", IMAGE_TIME.to_string())
        .args(["-as", "mkisofs", "-quiet", "-V", "HCI", "-o"])
        .arg(out)
        .args(["--grub2-mbr", &format!("{GRUB_BIOS}/boot_hybrid.img"), "-partition_offset", "16"])
        .args(["--mbr-force-bootable", "-append_partition", "2", EFI_SYSTEM])
        .arg(efi)
        .args(["-appended_part_as_gpt", "-iso_mbr_part_type", BASIC_DATA])
        .args(["-b", "boot/grub/eltorito.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"])
        .args(["--grub2-boot-info", "-eltorito-alt-boot", "-e", "--interval:appended_partition_2:all::"])
        .args(["-no-emul-boot", "-r", "--set_all_file_dates", "set_to_mtime"])
        .arg(tree))?;
    Ok(out.to_path_buf())
}
