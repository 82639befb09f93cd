//! Where things are on the system disk.
//!
//! A GPT with a BIOS boot partition, the EFI system partition, two root slots and the data partition. Slots are raw
//! squashfs images; which one starts is in GRUB's environment block on the ESP. Both slots exist from the first day, so
//! that an upgrade never has to move a partition.

/// First sector of the BIOS boot partition; GRUB's boot sectors are built with it.
pub const BIOS_BOOT_START: u64 = 2048;
/// Bytes in a logical sector of the disks that are supported.
pub const SECTOR: u64 = 512;
/// The smallest system disk: both slots, and room for the node's own state.
pub const MIN_DISK: u64 = 6 << 30;

const MIB: u64 = (1 << 20) / SECTOR;

/// The partitions, in the order of their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Partition {
    /// GRUB's core image, for BIOS.
    BiosBoot = 1,
    /// The EFI system partition: GRUB, its configuration, kernel and initramfs of each slot.
    Esp = 2,
    /// The first root image.
    RootA = 3,
    /// The second root image.
    RootB = 4,
    /// Everything that lasts.
    Data = 5,
}

/// The device of a partition: `/dev/vda` has `/dev/vda2`, `/dev/nvme0n1` has `/dev/nvme0n1p2`.
pub fn partition_device(disk: &str, partition: Partition) -> String {
    let separator = if disk.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
    format!("{disk}{separator}{}", partition as u8)
}

/// The input of `sfdisk` that makes the layout.
pub fn sfdisk_script() -> String {
    let esp = 512 * MIB;
    let root = 2048 * MIB;
    format!(
        "label: gpt\nunit: sectors\nfirst-lba: {BIOS_BOOT_START}\n\
         start={BIOS_BOOT_START}, size={}, type=21686148-6449-6E6F-744E-656564454649, name=hci-bios\n\
         size={esp}, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name=hci-esp\n\
         size={root}, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=hci-root-a\n\
         size={root}, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name=hci-root-b\n\
         type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name=hci-data\n",
        MIB
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_named_as_the_kernel_does() {
        assert_eq!(partition_device("/dev/vda", Partition::Esp), "/dev/vda2");
        assert_eq!(partition_device("/dev/nvme0n1", Partition::Data), "/dev/nvme0n1p5");
    }

    #[test]
    fn sfdisk_makes_this_layout() {
        use std::io::Write;
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(MIN_DISK).unwrap();
        let mut child = std::process::Command::new("sfdisk")
            .arg("-q")
            .arg(disk.path())
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("sfdisk, of the Debian package fdisk");
        child.stdin.take().unwrap().write_all(sfdisk_script().as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        let shown = std::process::Command::new("sfdisk").arg("-d").arg(disk.path()).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let names: Vec<_> =
            shown.lines().filter_map(|line| line.split("name=\"").nth(1)?.strip_suffix('"')).collect();
        assert_eq!(names, ["hci-bios", "hci-esp", "hci-root-a", "hci-root-b", "hci-data"]);
        assert!(shown.contains(&format!("start={BIOS_BOOT_START:>12}")), "{shown}");
    }
}
