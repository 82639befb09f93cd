//! What a guest is made of: plain serde data, and [`VmConfig::validate`], which reports everything that is wrong with it at
//! once. Nothing here touches KVM or the file system except for the checks that name a missing file.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::layout::{CMDLINE_MAX, MIB};
use crate::memory::{Layout, PAGE};
use crate::pci::slots;
use crate::vcpu::model::CpuModel;
use crate::virtio::mem::BLOCK;

/// Disks and NICs.
const MAX_DEVICES: usize = slots::DISKS_AND_NICS.end - slots::DISKS_AND_NICS.start;
/// Most vCPUs that the (xAPIC) topology describes.
const MAX_VCPUS: u8 = 254;
/// Below this no kernel and initramfs fit beside the boot structures.
const MIN_MEMORY: u64 = 16 * MIB;
/// Bound for a guest's memory. A processor with few address bits has room for less.
const MAX_MEMORY: u64 = 4 << 40;
/// One MSI-X table has to hold a vector for each queue and one for the configuration.
const MAX_QUEUES: u16 = 64;
/// Range that virtio-net allows for the MTU.
const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=65535;

/// Addresses of guests: those below are of hypervisor, loopback and host, the last one is any.
const CIDS: std::ops::Range<u32> = 3..u32::MAX;

/// One guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name, for logs and thread names.
    pub name: String,
    /// What the guest finds as its machine's identity.
    #[serde(default)]
    pub id: Uuid,
    /// Number of virtual processors, one socket of single-threaded cores.
    pub vcpus: u8,
    /// How many it may have while it runs ([`crate::VmHandle::set_vcpus`]); as many as it begins with if nothing is said.
    #[serde(default)]
    pub max_vcpus: Option<u8>,
    /// What these show the guest of the host's.
    #[serde(default)]
    pub cpu_model: CpuModel,
    /// Guest memory in bytes; a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Bytes of memory that the guest may have at most: it can plug what is beyond `memory_bytes`, in blocks of 2 MiB, when it is asked to. None: it keeps
    /// what it boots with. A guest that was saved or moves finds the same here.
    #[serde(default)]
    pub max_memory_bytes: Option<u64>,
    /// Of what it may plug, how many bytes it is asked to plug as soon as its driver is there.
    #[serde(default)]
    pub plugged_bytes: u64,
    /// What runs first.
    pub boot: Boot,
    /// Disks, in the order in which the guest finds them.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// NICs, in the order in which the guest finds them, after the disks.
    #[serde(default)]
    pub nics: Vec<NicConfig>,
    /// Content of the seed disk, a small read-only disk behind all other devices that tells cloud-init who the guest is.
    #[serde(default)]
    pub seed: Option<PathBuf>,
    /// Unix socket on which the QEMU guest agent's port is served; made by the VMM.
    #[serde(default)]
    pub agent_socket: Option<PathBuf>,
    /// A balloon, by which a guest gives back memory that it does not need. Without one it keeps what it has ever used.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// Sockets between programs in the guest and programs of the node.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// Unix socket on which the serial console is served; made by the VMM.
    pub console_socket: PathBuf,
    /// Unix socket on which the display is served by RFB (VNC), without a password; made by the VMM. With it the guest has a frame buffer, a keyboard and
    /// a tablet. Firmware only: a kernel that is booted directly would have no picture.
    #[serde(default)]
    pub display_socket: Option<PathBuf>,
    /// How long a start waits for the vhost-user sockets to answer before it fails. A running guest waits for ever.
    #[serde(default = "default_backend_timeout_ms")]
    pub backend_timeout_ms: u64,
}

/// What a guest runs first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Boot {
    /// A kernel that the VMM loads and enters.
    Kernel {
        /// A bzImage, or an ELF file with a PVH entry note.
        kernel: PathBuf,
        /// Initial RAM file system.
        #[serde(default)]
        initramfs: Option<PathBuf>,
        /// Kernel command line.
        #[serde(default)]
        cmdline: String,
    },
    /// UEFI firmware, which looks for a boot loader on the disks.
    Firmware {
        /// The firmware's code: OVMF built for a Q35 machine, with its variables in a file of their own.
        code: PathBuf,
        /// The variable store that a new guest starts with, and one whose own is damaged.
        template: PathBuf,
        /// The guest's own variable store; made when it is not there.
        variables: PathBuf,
    },
}

/// A vhost-user-blk disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name, for logs and status.
    pub id: String,
    /// The backend's socket.
    pub socket: PathBuf,
    /// Request queues wanted; the backend may offer fewer.
    #[serde(default = "default_queues")]
    pub queues: u16,
    /// Whether the guest is told not to write. The backend has to enforce it.
    #[serde(default)]
    pub readonly: bool,
    /// PCI slot, from 2 to 23; the lowest free one if nothing is said: disks first, in their order, then NICs.
    #[serde(default)]
    pub slot: Option<u8>,
}

/// A vhost-user-net NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// Name, for logs and status.
    pub id: String,
    /// The backend's socket.
    pub socket: PathBuf,
    /// Address given to the guest.
    pub mac: MacAddr,
    /// MTU given to the guest.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// PCI slot, from 2 to 23; the lowest free one if nothing is said: disks first, in their order, then NICs.
    #[serde(default)]
    pub slot: Option<u8>,
}

/// A disk or a NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceConfig {
    /// A disk.
    Disk(DiskConfig),
    /// A NIC.
    Nic(NicConfig),
}

impl DeviceConfig {
    /// Its name.
    pub fn id(&self) -> &str {
        match self {
            Self::Disk(disk) => &disk.id,
            Self::Nic(nic) => &nic.id,
        }
    }

    /// Its backend's socket.
    pub fn socket(&self) -> &Path {
        match self {
            Self::Disk(disk) => &disk.socket,
            Self::Nic(nic) => &nic.socket,
        }
    }

    /// The PCI slot that it is to be in.
    pub fn slot(&self) -> Option<u8> {
        match self {
            Self::Disk(disk) => disk.slot,
            Self::Nic(nic) => nic.slot,
        }
    }

    /// Checks everything that can be known without the guest and returns all that is wrong.
    pub fn validate(&self) -> Result<(), Vec<ConfigError>> {
        let mut errors = Vec::new();
        self.check(&mut errors);
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn check(&self, errors: &mut Vec<ConfigError>) {
        match self {
            Self::Disk(disk) if disk.queues == 0 || disk.queues > MAX_QUEUES => {
                errors.push(ConfigError::Queues { id: disk.id.clone(), queues: disk.queues });
            }
            Self::Disk(_) => {}
            Self::Nic(nic) => {
                if nic.mac.0[0] & 1 == 1 || nic.mac.0 == [0; 6] {
                    errors.push(ConfigError::Mac { id: nic.id.clone(), mac: nic.mac });
                }
                if let Some(mtu) = nic.mtu.filter(|mtu| !MTU_RANGE.contains(mtu)) {
                    errors.push(ConfigError::Mtu { id: nic.id.clone(), mtu });
                }
            }
        }
        if let Some(slot) = self.slot().filter(|slot| !slots::DISKS_AND_NICS.contains(&usize::from(*slot))) {
            errors.push(ConfigError::Slot { id: self.id().to_owned(), slot });
        }
    }
}

/// A balloon.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Bytes that it takes from the start: whole pages of 4 KiB, at most `memory_bytes`.
    #[serde(default)]
    pub bytes: u64,
}

/// Sockets between programs in the guest and programs of the node (`AF_VSOCK`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address: 3 or more.
    pub cid: u32,
    /// Unix socket by which programs of the node connect to the guest; made by the VMM. They write `CONNECT <port>` and a line feed, and read `OK <number>` and a
    /// line feed. Where the guest connects to port P of its host, it gets who listens on this path with `_P` behind it.
    pub socket: PathBuf,
}

fn default_queues() -> u16 {
    1
}

fn default_backend_timeout_ms() -> u64 {
    30_000
}

/// An Ethernet address, written `02:00:00:00:00:01`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not an Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address like 02:00:00:00:00:01")]
pub struct ParseMacError(String);

impl FromStr for MacAddr {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || ParseMacError(text.to_owned());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(fail)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(fail());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| fail())?;
        }
        if parts.next().is_some() { Err(fail()) } else { Ok(Self(octets)) }
    }
}

impl Serialize for MacAddr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// One thing that is wrong with a [`VmConfig`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The number of vCPUs is out of range.
    #[error("vcpus is {0}; it must be 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// Fewer than it begins with, or too many.
    #[error("max_vcpus is {most}; it must be {vcpus}, as it begins with that many, to {MAX_VCPUS}")]
    MaxVcpus {
        /// What was asked for.
        most: u8,
        /// What it begins with.
        vcpus: u8,
    },
    /// The memory size is out of range or not aligned.
    #[error("memory_bytes is {0}; it must be a multiple of 1 MiB from 16 MiB to 4 TiB")]
    Memory(u64),
    /// The most memory is less than the memory, too much, or not so many blocks more.
    #[error("max_memory_bytes is {0}; it must be memory_bytes or a multiple of 2 MiB more, up to 4 TiB")]
    MaxMemory(u64),
    /// More is to be plugged than there can be, or no whole blocks.
    #[error(
        "plugged_bytes is {0}; it must be a multiple of 2 MiB, at most what max_memory_bytes is beyond memory_bytes"
    )]
    Plugged(u64),
    /// The balloon is larger than the guest's memory, or no whole pages.
    #[error("the balloon has {0} bytes; it must be a multiple of 4 KiB, at most memory_bytes")]
    Balloon(u64),
    /// The guest's address is one that is kept for others.
    #[error("vsock cid is {0}; it must be 3 to 4294967294")]
    Cid(u32),
    /// A file that the guest needs cannot be read.
    #[error("{what} {path}: {error}")]
    File {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        error: String,
    },
    /// The command line is too long or holds a NUL.
    #[error("the kernel command line must be shorter than {CMDLINE_MAX} bytes and hold no NUL")]
    Cmdline,
    /// A display without firmware to drive it.
    #[error("display_socket: a kernel that is booted directly has no display")]
    Display,
    /// More devices than the bus takes.
    #[error("{0} disks and NICs; at most {MAX_DEVICES} fit on the bus")]
    TooManyDevices(usize),
    /// Two devices have the same name.
    #[error("device id {0:?} is used twice")]
    DuplicateId(String),
    /// Two devices use the same socket.
    #[error("socket {0} is used twice")]
    DuplicateSocket(PathBuf),
    /// Not a slot for disks and NICs.
    #[error("device {id:?}: slot {slot} is not in 2 to 23")]
    Slot {
        /// The device.
        id: String,
        /// What was asked for.
        slot: u8,
    },
    /// Two devices are to be in the same slot.
    #[error("slot {0} is used twice")]
    DuplicateSlot(u8),
    /// The number of queues is out of range.
    #[error("disk {id:?} has {queues} queues; it must be 1 to {MAX_QUEUES}")]
    Queues {
        /// The disk.
        id: String,
        /// What was asked for.
        queues: u16,
    },
    /// A multicast or zero address.
    #[error("NIC {id:?}: {mac} is not a unicast address")]
    Mac {
        /// The NIC.
        id: String,
        /// Its address.
        mac: MacAddr,
    },
    /// The MTU is out of range.
    #[error("NIC {id:?}: MTU {mtu} is not in 68 to 65535")]
    Mtu {
        /// The NIC.
        id: String,
        /// Its MTU.
        mtu: u16,
    },
}

impl VmConfig {
    /// Checks everything that can be known before the start and returns all that is wrong.
    pub fn validate(&self) -> Result<(), Vec<ConfigError>> {
        let mut errors = Vec::new();
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            errors.push(ConfigError::Vcpus(self.vcpus));
        }
        if let Some(most) = self.max_vcpus.filter(|most| !(self.vcpus..=MAX_VCPUS).contains(most)) {
            errors.push(ConfigError::MaxVcpus { most, vcpus: self.vcpus });
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&self.memory_bytes) || !self.memory_bytes.is_multiple_of(MIB) {
            errors.push(ConfigError::Memory(self.memory_bytes));
        }
        let layout = self.memory_layout();
        if let Some(most) = self.max_memory_bytes
            && (most > MAX_MEMORY || most < self.memory_bytes || !layout.pluggable.is_multiple_of(BLOCK))
        {
            errors.push(ConfigError::MaxMemory(most));
        }
        if self.plugged_bytes > layout.pluggable || !self.plugged_bytes.is_multiple_of(BLOCK) {
            errors.push(ConfigError::Plugged(self.plugged_bytes));
        }
        if let Some(balloon) = &self.balloon
            && (balloon.bytes > self.memory_bytes || !balloon.bytes.is_multiple_of(PAGE))
        {
            errors.push(ConfigError::Balloon(balloon.bytes));
        }
        if let Some(vsock) = self.vsock.as_ref().filter(|vsock| !CIDS.contains(&vsock.cid)) {
            errors.push(ConfigError::Cid(vsock.cid));
        }
        let mut files = vec![("seed", self.seed.as_ref())];
        match &self.boot {
            Boot::Kernel { kernel, initramfs, cmdline } => {
                files.extend([("kernel", Some(kernel)), ("initramfs", initramfs.as_ref())]);
                if self.display_socket.is_some() {
                    errors.push(ConfigError::Display);
                }
                if cmdline.len() >= CMDLINE_MAX || cmdline.contains('\0') {
                    errors.push(ConfigError::Cmdline);
                }
            }
            Boot::Firmware { code, template, .. } => {
                files.extend([("firmware", Some(code)), ("variable store template", Some(template))]);
            }
        }
        for (what, path) in files.into_iter().filter_map(|(what, path)| Some((what, path?))) {
            if let Err(error) = std::fs::File::open(path) {
                errors.push(ConfigError::File { what, path: path.clone(), error: error.to_string() });
            }
        }
        self.validate_devices(&mut errors);
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    fn validate_devices(&self, errors: &mut Vec<ConfigError>) {
        let count = self.disks.len() + self.nics.len();
        if count > MAX_DEVICES {
            errors.push(ConfigError::TooManyDevices(count));
        }
        let mut ids = BTreeSet::new();
        let mut sockets = BTreeSet::new();
        let disks = self.disks.iter().map(|disk| (&disk.id, &disk.socket));
        let nics = self.nics.iter().map(|nic| (&nic.id, &nic.socket));
        for (id, socket) in disks.chain(nics) {
            if !ids.insert(id) {
                errors.push(ConfigError::DuplicateId(id.clone()));
            }
            if !sockets.insert(socket) {
                errors.push(ConfigError::DuplicateSocket(socket.clone()));
            }
        }
        let mut taken = BTreeSet::new();
        for device in self.devices() {
            device.check(errors);
            if let Some(slot) = device.slot().filter(|slot| !taken.insert(*slot)) {
                errors.push(ConfigError::DuplicateSlot(slot));
            }
        }
    }

    /// Disks, then NICs.
    fn devices(&self) -> impl Iterator<Item = DeviceConfig> {
        let disks = self.disks.iter().cloned().map(DeviceConfig::Disk);
        disks.chain(self.nics.iter().cloned().map(DeviceConfig::Nic))
    }

    /// Disks, then NICs, with their slots. Valid ones all have one.
    pub(crate) fn placed_devices(&self) -> Vec<(u8, DeviceConfig)> {
        let named: BTreeSet<u8> = self.devices().filter_map(|device| device.slot()).collect();
        let mut free = slots::DISKS_AND_NICS.map(|slot| slot as u8).filter(|slot| !named.contains(slot));
        self.devices().filter_map(|device| Some((device.slot().or_else(|| free.next())?, device))).collect()
    }

    /// How many vCPUs it may have while it runs.
    pub(crate) fn most_vcpus(&self) -> u8 {
        self.max_vcpus.unwrap_or(self.vcpus)
    }

    /// How much memory it has, and may have.
    pub(crate) fn memory_layout(&self) -> Layout {
        let most = self.max_memory_bytes.unwrap_or(self.memory_bytes);
        Layout { boot: self.memory_bytes, pluggable: most.saturating_sub(self.memory_bytes) }
    }

    /// How long a start waits for backends.
    pub(crate) fn backend_timeout(&self) -> Duration {
        Duration::from_millis(self.backend_timeout_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id: &str, slot: Option<u8>) -> DiskConfig {
        DiskConfig { id: id.into(), socket: format!("/{id}").into(), queues: 2, readonly: false, slot }
    }

    fn config() -> VmConfig {
        VmConfig {
            name: "web".into(),
            id: Uuid::from_u128(1),
            cpu_model: CpuModel::Host,
            vcpus: 2,
            max_vcpus: None,
            memory_bytes: 256 * MIB,
            max_memory_bytes: Some(1024 * MIB),
            plugged_bytes: 768 * MIB,
            boot: Boot::Kernel {
                kernel: "/proc/self/exe".into(),
                initramfs: None,
                cmdline: "console=ttyS0".into(),
            },
            disks: vec![disk("d0", None)],
            nics: vec![NicConfig {
                id: "n0".into(),
                socket: "/n0".into(),
                mac: MacAddr([2, 0, 0, 0, 0, 1]),
                mtu: Some(1450),
                slot: None,
            }],
            seed: None,
            agent_socket: None,
            balloon: Some(BalloonConfig { bytes: MIB }),
            vsock: Some(VsockConfig { cid: 3, socket: "/v".into() }),
            console_socket: "/c".into(),
            display_socket: None,
            backend_timeout_ms: 1000,
        }
    }

    #[test]
    fn a_sound_configuration_passes_and_survives_json() {
        let config = config();
        assert_eq!(config.validate(), Ok(()));
        let text = serde_json::to_string(&config).unwrap();
        assert!(text.contains("\"02:00:00:00:00:01\""));
        assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
    }

    #[test]
    fn all_faults_are_reported_at_once() {
        let mut bad = config();
        bad.vcpus = 0;
        bad.memory_bytes = MIB + 1;
        bad.boot = Boot::Kernel {
            kernel: "/proc/self/exe".into(),
            initramfs: Some("/nonexistent/initramfs".into()),
            cmdline: "x".repeat(CMDLINE_MAX),
        };
        bad.disks.push(bad.disks[0].clone());
        bad.disks[0].queues = 0;
        bad.nics[0].mac = MacAddr([1, 0, 0, 0, 0, 1]);
        bad.nics[0].mtu = Some(10);
        bad.max_memory_bytes = Some(4 * MIB);
        bad.vsock = Some(VsockConfig { cid: 2, socket: "/v".into() });
        bad.balloon = Some(BalloonConfig { bytes: PAGE / 2 });
        bad.nics[0].slot = Some(24);
        bad.max_vcpus = Some(255);
        bad.display_socket = Some("/d".into());
        let errors = bad.validate().unwrap_err();
        assert_eq!(errors.len(), 16, "{errors:?}");
    }

    #[test]
    fn devices_without_a_slot_get_the_lowest_free_ones_in_order() {
        let mut config = config();
        config.disks = vec![disk("a", None), disk("b", Some(2)), disk("c", None)];
        config.nics[0].slot = Some(4);
        let slots = |config: &VmConfig| -> Vec<(u8, String)> {
            config.placed_devices().into_iter().map(|(slot, device)| (slot, device.id().to_owned())).collect()
        };
        let at = |slot: u8, id: &str| (slot, id.to_owned());
        assert_eq!(slots(&config), [at(3, "a"), at(2, "b"), at(5, "c"), at(4, "n0")]);
        assert_eq!(config.validate(), Ok(()));
        config.disks[0].slot = Some(4);
        assert_eq!(config.validate(), Err(vec![ConfigError::DuplicateSlot(4)]));
        config.disks[0].slot = Some(1);
        assert_eq!(config.validate(), Err(vec![ConfigError::Slot { id: "a".into(), slot: 1 }]));
    }

    #[test]
    fn no_fewer_vcpus_than_at_the_start_are_the_most() {
        let mut config = config();
        config.max_vcpus = Some(1);
        assert_eq!(config.validate(), Err(vec![ConfigError::MaxVcpus { most: 1, vcpus: 2 }]));
        config.max_vcpus = Some(254);
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn unknown_keys_are_refused() {
        let mut value = serde_json::to_value(config()).unwrap();
        value["memroy_bytes"] = 1.into();
        assert!(serde_json::from_value::<VmConfig>(value).is_err());
    }

    #[test]
    fn mac_addresses_are_parsed_strictly() {
        assert_eq!("02:00:00:00:00:ff".parse(), Ok(MacAddr([2, 0, 0, 0, 0, 255])));
        for text in ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "+2:00:00:00:00:01", "2:0:0:0:0:1"] {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }
}
