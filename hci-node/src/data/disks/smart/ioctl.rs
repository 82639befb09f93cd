//! Asks a device for its pages. It blocks, for as long as a broken device likes: only [`super::watch`] calls it.
//!
//! Only two kinds of devices are asked: NVMe by the driver's command for administration, and ATA behind the kernel's
//! translation to SCSI, by a command that is passed through. Everything else has no SMART data as far as we know.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::Path,
};

use super::{PAGE_BYTES, Smart, ata, nvme};

/// What a device has to answer a command; the kernel gives up then.
const COMMAND_TIMEOUT_MS: u32 = 5_000;

/// Why a device gives no SMART data.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// It cannot be opened or does not take the command.
    #[error("the device cannot be asked")]
    Io(#[from] io::Error),
    /// It is no disk that we know how to ask.
    #[error("this kind of device has no SMART data")]
    NotSupported,
    /// It refused the command.
    #[error("the device refused: status {status:#04x}, host {host:#06x}, driver {driver:#06x}")]
    Refused {
        /// Status of the command.
        status: u16,
        /// What the controller says.
        host: u16,
        /// What the driver says.
        driver: u16,
    },
    /// Its pages are damaged.
    #[error(transparent)]
    Page(#[from] ata::PageError),
}

/// How a disk is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nvme,
    Ata,
}

/// Asks a disk.
pub(super) fn read(device: &Path) -> Result<Smart, ReadError> {
    let device = fs::canonicalize(device)?;
    let name = device.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let vendor =
        fs::read_to_string(Path::new("/sys/block").join(name).join("device/vendor")).unwrap_or_default();
    let kind = kind(name, vendor.trim()).ok_or(ReadError::NotSupported)?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&device)?;
    if !file.metadata()?.file_type().is_block_device() {
        return Err(ReadError::NotSupported);
    }
    match kind {
        Kind::Nvme => Ok(nvme::decode(&nvme_health(&file)?)),
        Kind::Ata => {
            let data = ata_smart(&file, ATA_READ_DATA)?;
            Ok(ata::decode(&data, &ata_smart(&file, ATA_READ_THRESHOLDS)?)?)
        }
    }
}

/// The kernel's translation gives all ATA disks this vendor. A SCSI disk proper must not get the command.
fn kind(name: &str, scsi_vendor: &str) -> Option<Kind> {
    if name.starts_with("nvme") {
        Some(Kind::Nvme)
    } else if name.starts_with("sd") && scsi_vendor == "ATA" {
        Some(Kind::Ata)
    } else {
        None
    }
}

/// `struct nvme_passthru_cmd` of `linux/nvme_ioctl.h`.
#[repr(C)]
#[derive(Default)]
struct NvmeCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    dword2: u32,
    dword3: u32,
    metadata: u64,
    address: u64,
    metadata_length: u32,
    data_length: u32,
    dword10: u32,
    dwords_11_to_15: [u32; 5],
    timeout_ms: u32,
    result: u32,
}

nix::ioctl_readwrite!(
    /// `NVME_IOCTL_ADMIN_CMD`.
    nvme_admin_command, b'N', 0x41, NvmeCommand
);

const NVME_GET_LOG_PAGE: u8 = 0x02;
const NVME_HEALTH_LOG: u32 = 0x02;
const NVME_ALL_NAMESPACES: u32 = u32::MAX;

fn nvme_health(file: &File) -> Result<[u8; PAGE_BYTES], ReadError> {
    let mut page = [0; PAGE_BYTES];
    let dwords = (PAGE_BYTES / 4) as u32;
    let mut command = NvmeCommand {
        opcode: NVME_GET_LOG_PAGE,
        namespace: NVME_ALL_NAMESPACES,
        address: page.as_mut_ptr().expose_provenance() as u64,
        data_length: PAGE_BYTES as u32,
        dword10: NVME_HEALTH_LOG | ((dwords - 1) << 16),
        timeout_ms: COMMAND_TIMEOUT_MS,
        ..NvmeCommand::default()
    };
    // SAFETY: the command has the kernel's layout, and its address and length are those of `page`, which outlives the
    // call: the kernel has ended the command, or copies nothing any more, when the call returns.
    let status =
        unsafe { nvme_admin_command(file.as_raw_fd(), &raw mut command) }.map_err(io::Error::from)?;
    match u16::try_from(status).unwrap_or(u16::MAX) {
        0 => Ok(page),
        status => Err(ReadError::Refused { status, host: 0, driver: 0 }),
    }
}

/// `struct sg_io_hdr` of `scsi/sg.h`.
#[repr(C)]
struct ScsiCommand {
    interface: libc::c_int,
    direction: libc::c_int,
    command_length: u8,
    sense_length: u8,
    vector_length: u16,
    data_length: u32,
    data: *mut u8,
    command: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack_id: libc::c_int,
    user: *mut libc::c_void,
    status: u8,
    masked_status: u8,
    message_status: u8,
    sense_written: u8,
    host_status: u16,
    driver_status: u16,
    residual: libc::c_int,
    duration_ms: u32,
    info: u32,
}

nix::ioctl_readwrite_bad!(
    /// `SG_IO`.
    scsi_command, 0x2285, ScsiCommand
);

const SCSI_FROM_DEVICE: libc::c_int = -3;
const SENSE_BYTES: usize = 32;
const ATA_PASS_THROUGH_16: u8 = 0x85;
const ATA_PIO_IN: u8 = 4 << 1;
/// From the device, in blocks, as many as the sector count says.
const ATA_TRANSFER: u8 = 0x08 | 0x04 | 0x02;
const ATA_SMART: u8 = 0xb0;
const ATA_READ_DATA: u8 = 0xd0;
const ATA_READ_THRESHOLDS: u8 = 0xd1;

/// The ATA command in its SCSI wrapping. Without the two bytes in the middle and high part of the address no disk takes it
/// for SMART.
fn ata_pass_through(feature: u8) -> [u8; 16] {
    let mut command = [0; 16];
    command[0] = ATA_PASS_THROUGH_16;
    command[1] = ATA_PIO_IN;
    command[2] = ATA_TRANSFER;
    command[4] = feature;
    command[6] = 1;
    command[10] = 0x4f;
    command[12] = 0xc2;
    command[14] = ATA_SMART;
    command
}

fn ata_smart(file: &File, feature: u8) -> Result<[u8; PAGE_BYTES], ReadError> {
    let mut page = [0; PAGE_BYTES];
    let mut sense = [0; SENSE_BYTES];
    let bytes = ata_pass_through(feature);
    let mut command = ScsiCommand {
        interface: libc::c_int::from(b'S'),
        direction: SCSI_FROM_DEVICE,
        command_length: bytes.len() as u8,
        sense_length: SENSE_BYTES as u8,
        vector_length: 0,
        data_length: PAGE_BYTES as u32,
        data: page.as_mut_ptr(),
        command: bytes.as_ptr(),
        sense: sense.as_mut_ptr(),
        timeout_ms: COMMAND_TIMEOUT_MS,
        flags: 0,
        pack_id: 0,
        user: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        message_status: 0,
        sense_written: 0,
        host_status: 0,
        driver_status: 0,
        residual: 0,
        duration_ms: 0,
        info: 0,
    };
    // SAFETY: the command has the kernel's layout; its pointers and lengths are those of `page`, `bytes` and `sense`,
    // which outlive the call, and the kernel has let go of them when it returns.
    unsafe { scsi_command(file.as_raw_fd(), &raw mut command) }.map_err(io::Error::from)?;
    let ScsiCommand { status, host_status, driver_status, residual, .. } = command;
    if (status, host_status, driver_status, residual) != (0, 0, 0, 0) {
        let status = u16::from(status);
        return Err(ReadError::Refused { status, host: host_status, driver: driver_status });
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_have_the_kernels_layout() {
        assert_eq!(size_of::<NvmeCommand>(), 72);
        assert_eq!(std::mem::offset_of!(NvmeCommand, dword10), 40);
        assert_eq!(std::mem::offset_of!(NvmeCommand, timeout_ms), 64);
        #[cfg(target_pointer_width = "64")]
        assert_eq!((size_of::<ScsiCommand>(), std::mem::offset_of!(ScsiCommand, timeout_ms)), (88, 40));
    }

    #[test]
    fn only_disks_that_understand_the_question_are_asked() {
        assert_eq!(kind("nvme0n1", ""), Some(Kind::Nvme));
        assert_eq!(kind("sda", "ATA"), Some(Kind::Ata));
        assert_eq!(kind("sda", "QEMU"), None);
        assert_eq!(kind("vdb", "0x1af4"), None);
    }

    #[test]
    fn a_file_and_a_missing_device_have_no_smart_data() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("nvme0n1");
        fs::write(&file, [0; 4096]).unwrap();
        assert!(matches!(read(&file), Err(ReadError::NotSupported)));
        assert!(matches!(read(&dir.path().join("away")), Err(ReadError::Io(_))));
    }
}
