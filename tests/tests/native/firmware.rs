//! Guests under our VMM that stock UEFI firmware boots, in an emulated machine with KVM: a disk with Debian's own GRUB and kernel, one
//! without a boot loader, variables that are kept and such that are damaged; and disks that nobody here made anything for: memtest86+, iPXE, Debian's
//! installer. They are seen and used at their displays, too. What is looked at is in `src/bin/firmware-guest.rs`.
//!
//! The machine counts instructions instead of time (`-icount`): QEMU before version 11 fails when a nested guest writes to CR8 while an
//! interrupt is pending, which OVMF's interrupt handlers do. At that clock timer interrupts get so close to each other rarely, and the machine is
//! started again if they did.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hci_tests::emulated::{Clock, Emulated};
use hci_tests::guest::{self, run};
use hci_tests::initramfs::Initramfs;
use hci_tests::native::process::executable;

/// How long an emulated machine may run.
const PATIENCE: Duration = Duration::from_secs(1200);
/// What `src/bin/firmware-guest.rs` looks at, one after the other.
const STAGES: [&str; 5] = ["shell", "debian", "memtest", "ipxe", "installer"];
const CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// Modules that the guest's `init` loads, in this order: variables of firmware, the tablet, what keyboard and tablet send.
const GUEST_MODULES: [&str; 8] = [
    "efivarfs",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_input",
    "evdev",
];
/// Debian's GRUB, as its package signs it: it looks for its configuration in `/EFI/debian`.
const GRUB_PACKAGE: &str = "grub-efi-amd64-signed";
const GRUB: &str = "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed";
const GRUB_CONFIG: &str =
    "set timeout=0\nmenuentry debian {\n linux /vmlinuz console=ttyS0 quiet panic=-1\n initrd /initrd\n}\n";
/// Debian's installer, as it is booted over the network.
const INSTALLER_PACKAGE: &str = "debian-installer-12-netboot-amd64";
const INSTALLER: &str = "usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64";
/// What firmware starts from a disk that it knows nothing of.
const BOOT_LOADER: &str = "::EFI/BOOT/BOOTX64.EFI";
/// Where the EFI system partition begins, in sectors of 512 bytes.
const ESP_START: u64 = 2048;
/// Its length, in bytes, beside that of the files: FAT's tables, and enough clusters for FAT16.
const ESP_LEAST: u64 = 8 << 20;

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
    let disks = Disks { folder: &folder };
    for disk in [
        disks.debian(&sources, &tree, &kernel)?,
        disks.program("memtest", "memtest86+", "boot/memtest86+x64.efi")?,
        disks.program("ipxe", "ipxe", "boot/ipxe.efi")?,
        disks.installer()?,
    ] {
        let name = disk.file_name().context("a disk without a name")?;
        host.file(&disk, &format!("data/{}", name.display()))?;
        // It is in the machine's memory, and large.
        fs::remove_file(&disk)?;
    }
    host.file(&sources.join("host-init"), "init")?;
    let image = folder.join("host.img");
    host.pack(&image)?;

    let (kernel, initramfs) = (kernel.as_path(), image.as_path());
    // A machine for each, as it may have to be started again.
    for stage in STAGES {
        let began = Instant::now();
        let arguments = format!("stage={stage}");
        let (arguments, clock, patience) = (arguments.as_str(), Clock::Instructions, PATIENCE);
        let machine = Emulated { kernel, initramfs, arguments, mib: 2560, clock, patience };
        machine.pass(&folder.join(format!("console-{stage}.txt")))?;
        println!("{stage}: {:.0} s", began.elapsed().as_secs_f64());
    }
    Ok(())
}

/// A disk to boot from, and what there is to fetch for it.
struct Disks<'a> {
    /// Where all of it goes.
    folder: &'a Path,
}

impl Disks<'_> {
    /// A disk as an installer leaves it, as far as booting goes: GRUB, kernel, initramfs.
    fn debian(&self, sources: &Path, tree: &Path, kernel: &Path) -> Result<PathBuf> {
        let guest = Initramfs::new(&self.folder.join("guest"))?;
        for module in GUEST_MODULES {
            guest.module(tree, module)?;
        }
        guest.file(&sources.join("guest-init"), "init")?;
        let initrd = self.folder.join("initrd");
        guest.pack(&initrd)?;
        self.grub("debian", kernel, &initrd)
    }

    /// Debian's installer, with the kernel and initramfs that are meant for the network.
    fn installer(&self) -> Result<PathBuf> {
        let files = self.package(INSTALLER_PACKAGE)?.join(INSTALLER);
        self.grub("installer", &files.join("linux"), &files.join("initrd.gz"))
    }

    /// GRUB with a kernel.
    fn grub(&self, name: &str, kernel: &Path, initrd: &Path) -> Result<PathBuf> {
        let config = self.folder.join("grub.cfg");
        fs::write(&config, GRUB_CONFIG)?;
        let grub = self.package(GRUB_PACKAGE)?.join(GRUB);
        let files = [
            (grub.as_path(), BOOT_LOADER),
            (&config, "::EFI/debian/grub.cfg"),
            (kernel, "::vmlinuz"),
            (initrd, "::initrd"),
        ];
        self.image(name, &files)
    }

    /// A program of a package's as the boot loader.
    fn program(&self, name: &str, package: &str, program: &str) -> Result<PathBuf> {
        let program = self.package(package)?.join(program);
        self.image(name, &[(program.as_path(), BOOT_LOADER)])
    }

    /// The files of a Debian package.
    fn package(&self, name: &str) -> Result<PathBuf> {
        let tree = self.folder.join("packages").join(name);
        if !tree.join("usr").exists() {
            fs::create_dir_all(&tree)?;
            run(Command::new("apt-get").args(["download", "-q", name]).current_dir(&tree))?;
            let package = guest::find(&tree, &|path| path.extension().is_some_and(|kind| kind == "deb"))?
                .pop()
                .context("apt-get download left no package")?;
            run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&tree))?;
            fs::remove_file(package)?;
        }
        Ok(tree)
    }

    /// GPT, EFI system partition, files.
    fn image(&self, name: &str, files: &[(&Path, &str)]) -> Result<PathBuf> {
        let mut bytes = ESP_LEAST;
        for (from, _) in files {
            bytes += fs::metadata(from).with_context(|| format!("no {}", from.display()))?.len();
        }
        // In sectors of 512 bytes, rounded to what FAT's clusters need.
        let sectors = (bytes / 512).next_multiple_of(2048);
        let image = self.folder.join(format!("{name}.img"));
        let file = fs::File::create(&image)?;
        file.set_len((ESP_START + sectors + 2048) * 512)?;
        let table = format!("label: gpt\nstart={ESP_START}, size={sectors}, type=U\n");
        run(Command::new("sh")
            .args(["-c", "printf '%s' \"$1\" | sfdisk -q \"$2\"", "sh", &table])
            .arg(&image))?;
        let esp = format!("{}@@{}", image.display(), ESP_START * 512);
        run(Command::new("mformat").args(["-i", &esp, "-T", &sectors.to_string(), "::"]))?;
        run(Command::new("mmd").args(["-i", &esp, "::EFI", "::EFI/BOOT", "::EFI/debian"]))?;
        for (from, to) in files {
            run(Command::new("mcopy").args(["-i", &esp]).arg(from).arg(to))?;
        }
        Ok(image)
    }
}
