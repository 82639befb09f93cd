//! Guests under our VMM that stock UEFI firmware boots, in an emulated machine with KVM: a disk with Debian's own GRUB and kernel, one
//! without a boot loader, variables that are kept and such that are damaged. What is looked at is in `src/bin/firmware-guest.rs`.
//!
//! The machine counts instructions instead of time (`-icount`): QEMU before version 11 fails when a nested guest writes to CR8 while an
//! interrupt is pending, which OVMF's interrupt handlers do. At that clock timer interrupts never get so close to each other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hci_tests::guest::{self, run};
use hci_tests::initramfs::Initramfs;
use hci_tests::native::process::executable;

/// How long the emulated machine may run.
const PATIENCE: Duration = Duration::from_secs(1500);
const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// Debian's GRUB, as its package signs it: it looks for its configuration in `/EFI/debian`.
const GRUB_PACKAGE: &str = "grub-efi-amd64-signed";
const GRUB: &str = "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed";
const GRUB_CONFIG: &str =
    "set timeout=0\nmenuentry debian {\n linux /vmlinuz console=ttyS0 quiet panic=-1\n initrd /initrd\n}\n";
/// Where the EFI system partition begins, and its length, in sectors of 512 bytes.
const ESP: (u64, u64) = (2048, 69_632);

#[test]
fn firmware_boots_disks_and_keeps_its_variables() -> Result<()> {
    let hci = executable()?;
    let folder = hci.ancestors().nth(2).context("the executable is in no target directory")?.join("firmware");
    fs::create_dir_all(&folder)?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest/firmware");
    let tree = guest::fetch_kernel(&folder)?;
    let kernel = guest::kernel_of(&tree)?;

    let host = Initramfs::new(&folder.join("host"))?;
    for program in
        [&hci, Path::new(env!("CARGO_BIN_EXE_firmware-guest")), Path::new(env!("CARGO_BIN_EXE_blk-target"))]
    {
        host.program(program)?;
    }
    for module in ["irqbypass", "kvm", "kvm-amd"] {
        host.module(&tree, module)?;
    }
    host.file(Path::new(CODE), "firmware-code").context("install the Debian package ovmf")?;
    host.file(Path::new(VARIABLES), "firmware-variables")?;
    host.file(&disk(&folder, &sources, &tree, &kernel)?, "disk.img")?;
    host.file(&sources.join("host-init"), "init")?;
    let image = folder.join("host.img");
    host.pack(&image)?;

    let console = folder.join("console.txt");
    let status = Command::new("timeout")
        .arg(PATIENCE.as_secs().to_string())
        .args(["qemu-system-x86_64", "-accel", "tcg", "-icount", "shift=0,sleep=off", "-M", "q35"])
        .args(["-cpu", "EPYC-Milan,+svm,+npt", "-smp", "1", "-m", "2560"])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-append", "console=ttyS0 quiet panic=-1", "-kernel"])
        .arg(&kernel)
        .arg("-initrd")
        .arg(&image)
        .status()?;
    let said = String::from_utf8_lossy(&fs::read(&console)?).into_owned();
    ensure!(status.success(), "the machine ended with {status}:\n{said}");
    ensure!(said.lines().any(|line| line.trim() == "PASS"), "{said}");
    Ok(())
}

/// A disk as an installer leaves it, as far as booting goes: GPT, EFI system partition, GRUB, kernel, initramfs.
fn disk(folder: &Path, sources: &Path, tree: &Path, kernel: &Path) -> Result<PathBuf> {
    let grub = folder.join("grub");
    if !grub.join(GRUB).exists() {
        fs::create_dir_all(&grub)?;
        run(Command::new("apt-get").args(["download", "-q", GRUB_PACKAGE]).current_dir(&grub))?;
        let package = guest::find(&grub, &|path| path.extension().is_some_and(|kind| kind == "deb"))?
            .pop()
            .context("apt-get download left no package")?;
        run(Command::new("dpkg-deb").arg("-x").arg(package).arg(&grub))?;
    }
    let guest = Initramfs::new(&folder.join("guest"))?;
    guest.module(tree, "efivarfs")?;
    guest.file(&sources.join("guest-init"), "init")?;
    let initrd = folder.join("initrd");
    guest.pack(&initrd)?;
    let config = folder.join("grub.cfg");
    fs::write(&config, GRUB_CONFIG)?;

    let (start, sectors) = ESP;
    let image = folder.join("disk.img");
    let file = fs::File::create(&image)?;
    file.set_len((start + sectors + 2048) * 512)?;
    let table = format!("label: gpt\nstart={start}, size={sectors}, type=U\n");
    run(Command::new("sh").args(["-c", "printf '%s' \"$1\" | sfdisk -q \"$2\"", "sh", &table]).arg(&image))?;
    let esp = format!("{}@@{}", image.display(), start * 512);
    run(Command::new("mformat").args(["-i", &esp, "-T", &sectors.to_string(), "::"]))?;
    run(Command::new("mmd").args(["-i", &esp, "::EFI", "::EFI/BOOT", "::EFI/debian"]))?;
    for (from, to) in [
        (grub.join(GRUB), "::EFI/BOOT/BOOTX64.EFI"),
        (config, "::EFI/debian/grub.cfg"),
        (kernel.to_owned(), "::vmlinuz"),
        (initrd, "::initrd"),
    ] {
        run(Command::new("mcopy").args(["-i", &esp]).arg(from).arg(to))?;
    }
    Ok(image)
}
