//! The root image: the Debian base without what a node does not need, the modules, our files and our executable,
//! streamed as one tar into squashfs.

use std::fs::{self, File};
use std::io::{BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use tar::{Archive, Builder, EntryType, Header};

use super::IMAGE_TIME;
use super::base::Kernel;

/// Our own files: path, mode, content.
const FILES: [(&str, u32, &str); 13] = [
    ("usr/lib/hci/install-init", 0o755, include_str!("../../image/install-init")),
    ("etc/tmpfiles.d/hci.conf", 0o644, include_str!("../../image/tmpfiles.conf")),
    ("etc/systemd/system/hci-node.service", 0o644, include_str!("../../image/hci-node.service")),
    ("etc/systemd/system/hci-data.service", 0o644, include_str!("../../image/hci-data.service")),
    ("etc/systemd/system/hci-firstboot.service", 0o644, include_str!("../../image/hci-firstboot.service")),
    (
        "etc/ssh/sshd_config.d/hci.conf",
        0o644,
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUseDNS no\nAuthorizedKeysFile /etc/ssh/authorized_keys\n",
    ),
    ("etc/modules-load.d/hci.conf", 0o644, "tun\n"),
    ("etc/udev/rules.d/60-hci-kvm.rules", 0o644, "KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\"\n"),
    // That a port is closed is said to each packet and not once a second (bit 3 of the mask): peers of a killed process learn of it at once.
    (
        "etc/sysctl.d/60-hci.conf",
        0o644,
        "net.core.rmem_max=16777216\nnet.core.wmem_max=16777216\nkernel.panic=10\nnet.ipv4.icmp_ratemask=6160\n",
    ),
    (
        "etc/systemd/journald.conf.d/hci.conf",
        0o644,
        "[Journal]\nStorage=volatile\nRuntimeMaxUse=64M\nForwardToConsole=no\n",
    ),
    (
        "etc/systemd/system.conf.d/hci.conf",
        0o644,
        "[Manager]\nRuntimeWatchdogSec=0\nDefaultTimeoutStopSec=20s\n",
    ),
    ("etc/fstab", 0o644, "# The root and the data partition are mounted by the initramfs.\n"),
    ("etc/hostname", 0o644, "hci\n"),
];

/// Symbolic links: units that start at boot, and those that must not.
const LINKS: [(&str, &str); 24] = [
    ("etc/systemd/system/multi-user.target.wants/hci-node.service", "/etc/systemd/system/hci-node.service"),
    ("etc/systemd/system/multi-user.target.wants/hci-data.service", "/etc/systemd/system/hci-data.service"),
    (
        "etc/systemd/system/multi-user.target.wants/hci-firstboot.service",
        "/etc/systemd/system/hci-firstboot.service",
    ),
    ("etc/systemd/system/multi-user.target.wants/ssh.service", "/lib/systemd/system/ssh.service"),
    (
        "etc/systemd/system/multi-user.target.wants/systemd-networkd.service",
        "/lib/systemd/system/systemd-networkd.service",
    ),
    ("etc/systemd/system/default.target", "/lib/systemd/system/multi-user.target"),
    ("etc/systemd/system/getty.target", "/dev/null"),
    ("etc/systemd/system/systemd-udev-settle.service", "/dev/null"),
    ("etc/systemd/system/ldconfig.service", "/dev/null"),
    ("etc/systemd/system/systemd-journal-catalog-update.service", "/dev/null"),
    ("etc/systemd/system/systemd-update-done.service", "/dev/null"),
    ("etc/systemd/system/systemd-update-utmp.service", "/dev/null"),
    ("etc/systemd/system/systemd-update-utmp-runlevel.service", "/dev/null"),
    ("etc/systemd/system/systemd-networkd-wait-online.service", "/dev/null"),
    ("etc/systemd/system/systemd-binfmt.service", "/dev/null"),
    ("etc/systemd/system/systemd-hwdb-update.service", "/dev/null"),
    ("etc/systemd/system/systemd-machine-id-commit.service", "/dev/null"),
    ("etc/systemd/system/systemd-firstboot.service", "/dev/null"),
    ("etc/systemd/system/systemd-pstore.service", "/dev/null"),
    ("etc/systemd/system/e2scrub_reap.service", "/dev/null"),
    ("etc/systemd/system/e2scrub_all.timer", "/dev/null"),
    ("etc/systemd/system/apt-daily.timer", "/dev/null"),
    ("etc/systemd/system/apt-daily-upgrade.timer", "/dev/null"),
    ("etc/systemd/system/dpkg-db-backup.timer", "/dev/null"),
];

/// Folders that must be there to be mounted on or written to.
const FOLDERS: [&str; 3] = ["medium", "var/lib/hci", "etc/hci"];

/// Paths of the base that a node does not need, or that would be the same on every server although they must not be.
const LEFT_OUT: [&str; 17] = [
    "dev/",
    "boot/",
    "etc/machine-id",
    "etc/hostname",
    "etc/fstab",
    "etc/ssh/ssh_host_",
    "etc/nvme/host",
    "var/lib/systemd/random-seed",
    "var/cache/",
    "var/lib/apt/",
    "var/log/",
    "usr/share/doc/",
    "usr/share/locale/",
    "usr/lib/x86_64-linux-gnu/gconv/",
    "usr/lib/udev/hwdb.d/",
    "usr/share/perl/",
    "usr/lib/x86_64-linux-gnu/perl/",
];

/// The user that VMs run as, added to the base's account files.
const VMM_USER: &str = "hci-vmm:x:900:900::/nonexistent:/usr/sbin/nologin\n";
const VMM_GROUP: &str = "hci-vmm:x:900:\n";
const KVM_GROUP: &str = "kvm:x:901:hci-vmm\n";

/// Streams everything into the squashfs file.
pub fn build(base: &Path, kernel: &Kernel, hci: &Path, out: &Path) -> Result<()> {
    let mut packer = Command::new("tar2sqfs")
        .args(["-q", "-f", "-c", "zstd", "-X", "level=3"])
        .arg(out)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start tar2sqfs; install squashfs-tools-ng")?;
    let pipe = packer.stdin.take().context("tar2sqfs has no input")?;
    let streamed = stream(base, kernel, hci, pipe);
    let status = packer.wait()?;
    streamed?;
    ensure!(status.success(), "tar2sqfs failed with {status}");
    Ok(())
}

fn stream(base: &Path, kernel: &Kernel, hci: &Path, pipe: impl Write) -> Result<()> {
    let mut out = Builder::new(std::io::BufWriter::with_capacity(1 << 20, pipe));
    copy_base(base, &mut out)?;
    for folder in FOLDERS {
        add(&mut out, folder, EntryType::Directory, 0o755, b"")?;
    }
    for (path, mode, content) in FILES {
        add(&mut out, path, EntryType::Regular, mode, content.as_bytes())?;
    }
    for (path, target) in LINKS {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        out.append_link(&mut header, path, target)?;
    }
    let version = kernel.version.as_str();
    add_tree(&mut out, &kernel.modules, &format!("usr/lib/modules/{version}"))?;
    let program = fs::read(hci).with_context(|| format!("cannot read {}", hci.display()))?;
    add(&mut out, "usr/bin/hci", EntryType::Regular, 0o755, &program)?;
    out.into_inner()?.flush()?;
    Ok(())
}

fn copy_base(base: &Path, out: &mut Builder<impl Write>) -> Result<()> {
    let mut archive = Archive::new(BufReader::with_capacity(1 << 20, File::open(base)?));
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
        if path.is_empty() || is_left_out(&path) || is_ours(&path) {
            continue;
        }
        let addition = match path.as_str() {
            "etc/passwd" => VMM_USER.to_owned(),
            "etc/group" => {
                let mut content = String::new();
                std::io::Read::read_to_string(&mut entry, &mut content)?;
                let kept: Vec<_> = content.lines().filter(|line| !line.starts_with("kvm:")).collect();
                let group = format!("{}\n{VMM_GROUP}{KVM_GROUP}", kept.join("\n"));
                add(out, &path, EntryType::Regular, 0o644, group.as_bytes())?;
                continue;
            }
            _ => String::new(),
        };
        if !addition.is_empty() {
            let mut content = String::new();
            std::io::Read::read_to_string(&mut entry, &mut content)?;
            add(out, &path, EntryType::Regular, 0o644, (content + &addition).as_bytes())?;
            continue;
        }
        let mut header = entry.header().clone();
        header.set_mtime(IMAGE_TIME);
        match entry.header().entry_type() {
            EntryType::Symlink | EntryType::Link => {
                let target = entry.link_name()?.context("a link without a target")?.into_owned();
                let target = match entry.header().entry_type() {
                    EntryType::Link => target.strip_prefix("./").map(Path::to_path_buf).unwrap_or(target),
                    _ => target,
                };
                out.append_link(&mut header, &path, target)?;
            }
            _ => out.append_data(&mut header, &path, &mut entry)?,
        }
    }
    Ok(())
}

/// A folder that is left out stays as an empty one, as it may be mounted on.
fn is_left_out(path: &str) -> bool {
    LEFT_OUT
        .iter()
        .any(|left_out| path.starts_with(left_out) && !(left_out.ends_with('/') && path == *left_out))
}

fn is_ours(path: &str) -> bool {
    let path = path.trim_end_matches('/');
    FILES.iter().any(|(ours, ..)| *ours == path)
        || LINKS.iter().any(|(ours, _)| *ours == path)
        || FOLDERS.contains(&path)
}

fn add_tree(out: &mut Builder<impl Write>, from: &Path, to: &str) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(from)?.collect::<std::io::Result<_>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    add(out, to, EntryType::Directory, 0o755, b"")?;
    for entry in entries {
        let path = format!("{to}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            add_tree(out, &entry.path(), &path)?;
        } else if entry.file_type()?.is_file() {
            add(out, &path, EntryType::Regular, 0o644, &fs::read(entry.path())?)?;
        }
    }
    Ok(())
}

fn add(out: &mut Builder<impl Write>, path: &str, kind: EntryType, mode: u32, content: &[u8]) -> Result<()> {
    let mut header = header(kind, mode, content.len() as u64);
    Ok(out.append_data(&mut header, path, content)?)
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(IMAGE_TIME);
    header.set_size(size);
    header
}
