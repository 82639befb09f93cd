//! Writes the system to the disk. Each step says what it does; the first one that fails ends the install.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::InstallError;
use super::disks::Disk;
use super::layout::{BIOS_BOOT_START, Partition, SECTOR, partition_device, sfdisk_script};
use super::settings::SettingsFile;

const PIECE: usize = 1 << 20;
/// The kernel shows new partitions at once; this is for slow controllers.
const DEVICE_LIMIT: Duration = Duration::from_secs(20);
/// On the ESP; `grub-iso.cfg` looks for it.
const INSTALLED_MARK: &str = "grub/installed";
const MOUNT_POINT: &str = "/tmp/install";

/// Partitions the disk and fills it from the medium.
pub(super) fn write_system(
    medium: &Path,
    disk: &Disk,
    settings: &[SettingsFile],
    say: &dyn Fn(&str),
) -> Result<(), InstallError> {
    let device = |partition| partition_device(&disk.path, partition);
    let parts = medium.join("hci/disk");

    say("partitions");
    run(Command::new("wipefs").args(["-q", "-a", &disk.path]))?;
    run_with_input(Command::new("sfdisk").args(["-q", "--wipe", "always", &disk.path]), &sfdisk_script())?;
    for partition in [Partition::Esp, Partition::RootA, Partition::Data] {
        wait_for(&device(partition))?;
    }

    say("boot sectors");
    let boot_sector = read(&parts.join("boot.img"))?;
    let core = read(&parts.join("core.img"))?;
    write_at(&disk.path, 0, &boot_sector)?;
    write_at(&disk.path, BIOS_BOOT_START * SECTOR, &core)?;

    say("boot files");
    run(Command::new("mkfs.vfat").args(["-F", "32", "-n", "HCIESP", &device(Partition::Esp)]))?;
    with_mounted(&device(Partition::Esp), "rw", |esp| write_esp(medium, &parts, esp))?;

    let root = medium.join("hci/root.squashfs");
    copy_image(&root, &device(Partition::RootA), say)?;

    say("data partition");
    run(Command::new("mkfs.ext4").args([
        "-q",
        "-F",
        "-L",
        "hci-data",
        "-E",
        "lazy_itable_init=1,lazy_journal_init=1",
        &device(Partition::Data),
    ]))?;
    with_mounted(&device(Partition::Data), "rw", |data| write_settings(data, settings))?;
    // Last of all: the medium, should it stay in, starts a system with this mark instead of installing again.
    with_mounted(&device(Partition::Esp), "rw", |esp| {
        let mark = esp.join(INSTALLED_MARK);
        fs::write(&mark, "").map_err(|source| file_error("cannot write", &mark, source))
    })?;
    say("installed");
    Ok(())
}

fn write_esp(medium: &Path, parts: &Path, esp: &Path) -> Result<(), InstallError> {
    for folder in ["EFI/BOOT", "EFI/debian", "grub", "a", "b"] {
        let folder = esp.join(folder);
        fs::create_dir_all(&folder).map_err(|source| file_error("cannot create", &folder, source))?;
    }
    for (from, to) in [
        (parts.join("shimx64.efi"), "EFI/BOOT/BOOTX64.EFI"),
        (parts.join("grubx64.efi"), "EFI/BOOT/grubx64.efi"),
        (parts.join("grub.cfg"), "EFI/debian/grub.cfg"),
        (parts.join("grub.cfg"), "grub/grub.cfg"),
        (medium.join("boot/vmlinuz"), "a/vmlinuz"),
        (medium.join("boot/initrd.img"), "a/initrd.img"),
    ] {
        fs::copy(&from, esp.join(to)).map_err(|source| file_error("cannot copy", &from, source))?;
    }
    let environment = esp.join("grub/grubenv");
    fs::write(&environment, environment_block("slot=a\n"))
        .map_err(|source| file_error("cannot write", &environment, source))
}

/// GRUB's environment block: always 1024 bytes, so that GRUB itself can change it in place.
fn environment_block(variables: &str) -> String {
    format!("{:#<1024}", format!("# GRUB Environment Block\n{variables}"))
}

fn write_settings(data: &Path, settings: &[SettingsFile]) -> Result<(), InstallError> {
    for file in settings {
        let path = data.join(&file.path);
        let written = path
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&path, &file.content))
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(file.mode)));
        written.map_err(|source| file_error("cannot write", &path, source))?;
    }
    Ok(())
}

/// Copies a file to a device and reads it back.
fn copy_image(from: &Path, device: &str, say: &dyn Fn(&str)) -> Result<(), InstallError> {
    let failed = |source| file_error("cannot copy to", Path::new(device), source);
    let mut source = File::open(from).map_err(|source| file_error("cannot open", from, source))?;
    let size = source.metadata().map_err(failed)?.len();
    let mut target = OpenOptions::new().write(true).open(device).map_err(failed)?;
    let mut piece = vec![0; PIECE];
    let (mut copied, mut said) = (0, 0);
    let mut hash = blake3::Hasher::new();
    loop {
        let count = source.read(&mut piece).map_err(failed)?;
        if count == 0 {
            break;
        }
        hash.update(&piece[..count]);
        target.write_all(&piece[..count]).map_err(failed)?;
        copied += count as u64;
        let percent = copied * 100 / size.max(1);
        if percent >= said + 25 {
            said = percent;
            say(&format!("root image: {percent} %"));
        }
    }
    target.sync_all().map_err(failed)?;
    let mut written = blake3::Hasher::new();
    let readback = File::open(device).map_err(failed)?;
    written.update_reader(readback.take(copied)).map_err(failed)?;
    if written.finalize() != hash.finalize() {
        let message = "what was written reads back different; the disk is not reliable".to_owned();
        return Err(InstallError::Program { program: "root image".to_owned(), message });
    }
    Ok(())
}

fn with_mounted(
    device: &str,
    options: &str,
    work: impl FnOnce(&Path) -> Result<(), InstallError>,
) -> Result<(), InstallError> {
    let point = Path::new(MOUNT_POINT);
    mount(device, point, options)?;
    let done = work(point);
    let unmounted = unmount(point);
    done.and(unmounted)
}

pub(super) fn mount(device: &str, point: &Path, options: &str) -> Result<(), InstallError> {
    fs::create_dir_all(point).map_err(|source| file_error("cannot create", point, source))?;
    run(Command::new("mount").args(["-o", options, device]).arg(point))
}

pub(super) fn unmount(point: &Path) -> Result<(), InstallError> {
    run(Command::new("umount").arg(point))
}

fn wait_for(device: &str) -> Result<(), InstallError> {
    let started = Instant::now();
    while !Path::new(device).exists() {
        if started.elapsed() > DEVICE_LIMIT {
            let message = format!("the kernel does not show {device}");
            return Err(InstallError::Program { program: "sfdisk".to_owned(), message });
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn write_at(device: &str, offset: u64, bytes: &[u8]) -> Result<(), InstallError> {
    let written = OpenOptions::new().write(true).open(device).and_then(|mut file| {
        file.seek(SeekFrom::Start(offset))?;
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|source| file_error("cannot write to", Path::new(device), source))
}

fn read(path: &Path) -> Result<Vec<u8>, InstallError> {
    fs::read(path).map_err(|source| file_error("cannot read", path, source))
}

fn run(command: &mut Command) -> Result<(), InstallError> {
    run_with_input(command, "")
}

fn run_with_input(command: &mut Command, input: &str) -> Result<(), InstallError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |message: String| InstallError::Program { program: program.clone(), message };
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read its input says with its status what it thinks of it.
        let _ = stdin.write_all(input.as_bytes());
    }
    let done = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    if done.status.success() {
        return Ok(());
    }
    Err(failed(format!("{} {}", done.status, String::from_utf8_lossy(&done.stderr).trim())))
}

fn file_error(what: &str, path: &Path, source: std::io::Error) -> InstallError {
    InstallError::File { what: format!("{what} {}", path.display()), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grub_can_change_its_environment_block_in_place() {
        let block = environment_block("slot=a\n");
        assert_eq!(block.len(), 1024);
        assert!(block.starts_with("# GRUB Environment Block\nslot=a\n###"));
    }
}
