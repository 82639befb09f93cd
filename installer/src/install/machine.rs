//! What the machine is, and where its answer file comes from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::InstallError;
use crate::answer::Machine;

/// The firmware channel that a virtual machine's owner can put an answer file in.
const FW_CFG: &str = "/sys/firmware/qemu_fw_cfg/by_name/opt/org.hci/answer/raw";
/// A volume with this label holds `answer.toml`.
const SEED_LABEL: &str = "HCISEED";

/// Reads serial number and MAC addresses.
pub fn identify() -> Machine {
    let serial = fs::read_to_string("/sys/class/dmi/id/product_serial").unwrap_or_default().trim().to_owned();
    let interfaces = fs::read_dir("/sys/class/net").into_iter().flatten().filter_map(Result::ok);
    let mut macs: Vec<_> = interfaces
        .filter(|entry| entry.file_name() != "lo")
        .filter_map(|entry| fs::read_to_string(entry.path().join("address")).ok())
        .map(|mac| mac.trim().to_lowercase())
        .collect();
    macs.sort();
    Machine { serial, macs }
}

/// The answer file's text, and where it was found: the firmware channel, a labelled volume, or the medium.
///
/// # Errors
/// When there is none.
pub fn find_answer(medium: &Path, mount_point: &Path) -> Result<(String, PathBuf), InstallError> {
    let on_medium = medium.join("hci/answer.toml");
    for place in [Path::new(FW_CFG), on_medium.as_path()] {
        if let Ok(text) = fs::read_to_string(place) {
            return Ok((text, place.to_path_buf()));
        }
    }
    let found =
        Command::new("blkid").args(["-L", SEED_LABEL]).output().ok().filter(|found| found.status.success());
    if let Some(found) = found {
        let device = String::from_utf8_lossy(&found.stdout).trim().to_owned();
        super::steps::mount(&device, mount_point, "ro")?;
        let place = mount_point.join("answer.toml");
        let text = fs::read_to_string(&place);
        super::steps::unmount(mount_point)?;
        if let Ok(text) = text {
            return Ok((text, PathBuf::from(device)));
        }
    }
    Err(InstallError::NoAnswer { medium: on_medium })
}
