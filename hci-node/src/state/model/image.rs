//! Images: what VMs are made from, and how far each of their parts is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::state::{ids::*, transfers::ImageSource};

/// A kernel or initramfs: a file that every node holds under `images/<hash>` in its state directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFile {
    /// BLAKE3 of the content.
    pub hash: ContentHash,
    /// Its length.
    pub size_bytes: u64,
}

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ImagePart {
    /// Kernel (bzImage or PVH ELF).
    Kernel,
    /// Initial RAM file system.
    Initramfs,
    /// Contents for the first disk of a VM.
    Disk,
}

impl ImagePart {
    /// Its name in paths of the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::Disk => "disk",
        }
    }
}

/// How far a part of an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PartState {
    /// Declared; nothing came yet.
    Awaiting,
    /// A node has the verified upload and takes it in.
    Importing {
        /// That node.
        node: NodeId,
        /// The volume it fills, for a disk.
        volume: Option<VolumeId>,
        /// The file it spreads, for a kernel or initramfs.
        file: Option<BootFile>,
        /// The task that shows its progress.
        task: Option<TaskId>,
    },
    /// A kernel or initramfs that is on the nodes.
    File(BootFile),
    /// A disk that is in the pool.
    Volume(VolumeId),
    /// A node gets it by itself.
    Fetching {
        /// That node.
        node: NodeId,
        /// From where.
        source: ImageSource,
        /// The task that shows its progress.
        task: Option<TaskId>,
    },
}

/// What VMs are made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// Its name, unique.
    pub name: String,
    /// Kernel command line that its VMs get unless they bring their own.
    pub cmdline: String,
    /// The parts that it was declared with.
    pub parts: BTreeMap<ImagePart, PartState>,
    /// When it was created.
    pub created: Timestamp,
}

impl Image {
    /// Whether every declared part is there.
    pub fn is_ready(&self) -> bool {
        self.parts.values().all(|part| matches!(part, PartState::File(_) | PartState::Volume(_)))
    }

    /// A boot file that is there.
    pub fn boot_file(&self, part: ImagePart) -> Option<BootFile> {
        match self.parts.get(&part) {
            Some(PartState::File(file)) => Some(*file),
            _ => None,
        }
    }

    /// The disk, if it has one that is there.
    pub fn disk(&self) -> Option<VolumeId> {
        match self.parts.get(&ImagePart::Disk) {
            Some(PartState::Volume(volume)) => Some(*volume),
            _ => None,
        }
    }
}
