//! What comes in from outside by itself, and what goes out: sources of images, exports of volumes.

use serde::{Deserialize, Serialize};

use super::{
    ids::*,
    model::{Volume, VolumeOwner},
};

/// What a node gets a part of an image from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSource {
    /// Where it is.
    pub location: SourceLocation,
    /// What its SHA-256 must be.
    pub sha256: Option<Sha256Sum>,
}

/// Where a source is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SourceLocation {
    /// On a web server: http or https.
    Url(String),
    /// In a file of the node.
    File(String),
}

impl SourceLocation {
    /// As people wrote it.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Url(text) | Self::File(text) => text,
        }
    }
}

/// A volume that a node reads out for somebody. It is open on that node for the time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The node.
    pub node: NodeId,
    /// The volume that is read.
    pub volume: VolumeId,
    /// What becomes of it afterwards.
    pub after: AfterExport,
    /// When it began.
    pub begun: Timestamp,
}

impl Export {
    /// Whether this export may be of that volume: only one that nobody owns goes with it.
    pub fn is_of(&self, volume: &Volume) -> bool {
        self.after == AfterExport::Keep || volume.owner == VolumeOwner::None
    }
}

/// What becomes of a volume when its export ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AfterExport {
    /// It stays.
    Keep,
    /// It is a clone of a snapshot, made for the export only.
    Drop,
}
