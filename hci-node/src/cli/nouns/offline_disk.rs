//! `hci disk dump`, `hci disk verify` and `hci disk rebuild`: looking at a disk of this machine that no data process has open, and making its index anew.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};
use storage::store::DamagedBlocks;
use storage::store::disk::offline::{self, SegmentDump};
use storage::store::disk::rebuild::{self, Changed, Progress, Rebuilt};
use storage::store::disk::{LogStore, OpenError};
use storage::{DiskKey, KeySalt};

use super::say;
use crate::cli::exit::{CliError, Exit};
use crate::cli::output::{self, Column, Format, Show, column};
use crate::data::disks::keyring::Keyring;
use crate::paths::NodePaths;

const DUMP: &[Column] = &[
    column("VOLUME", "/volume"),
    column("SEGMENT", "/segment"),
    column("LAYER", "/layer"),
    column("DATA", "/data_bytes").shown(Show::Bytes),
    column("STORED", "/stored_bytes").shown(Show::Bytes),
];
const DAMAGE: &[Column] = &[
    column("VOLUME", "/volume"),
    column("SEGMENT", "/segment"),
    column("LAYER", "/layer"),
    column("FIRST BLOCK", "/first_block"),
    column("BLOCKS", "/blocks"),
];
/// Bytes of data without compression: of a slot.
const SLOT: u64 = 64 << 10;

/// What an encrypted disk is read with.
#[derive(Debug, Args)]
pub struct Unlock {
    /// For an encrypted disk: its salt, as `hci disk get DISK -o json` shows it.
    #[arg(long, value_name = "HEX")]
    key_salt: Option<String>,
    /// Where the node that it was encrypted on keeps its state.
    #[arg(long, value_name = "DIRECTORY", default_value = NodePaths::DEFAULT_STATE)]
    state_dir: PathBuf,
}

impl Unlock {
    fn key(&self, path: &Path) -> Result<Option<DiskKey>, CliError> {
        let Some(salt) = &self.key_salt else { return Ok(None) };
        let invalid = || {
            CliError::new(Exit::Usage, "the salt is no salt".to_owned())
                .next("it is the key_salt of the disk: hci disk get DISK -o json")
        };
        let salt = hex::decode(salt).ok().and_then(|bytes| bytes.try_into().ok()).ok_or_else(invalid)?;
        let identity = LogStore::identify(path).map_err(|error| not_readable(path, &error))?;
        let keyring = Keyring::new(NodePaths::new(&self.state_dir, NodePaths::DEFAULT_RUN).identity());
        let key = keyring.key(identity.disk, KeySalt(salt)).map_err(|error| {
            CliError::new(Exit::Failed, format!("the key of {} cannot be made", path.display()))
                .why(error.to_string())
                .next("do it on the node that the disk was encrypted on")
        })?;
        Ok(Some(key))
    }
}

fn not_readable(path: &Path, error: &OpenError) -> CliError {
    CliError::new(Exit::Failed, format!("{} cannot be looked at", path.display()))
        .why(format!("{error:#}"))
        .next("name a device or file of a pool, and stop its node first: systemctl stop hci-data")
}

/// Shows what a disk holds.
pub(super) fn dump(format: Format, path: &Path, unlock: &Unlock) -> Result<(), CliError> {
    let key = unlock.key(path)?;
    let dump = offline::dump(path, key.as_ref()).map_err(|error| not_readable(path, &error))?;
    let segment = |SegmentDump { key, positions, bytes, .. }: &SegmentDump| {
        json!({
            "volume": key.volume, "segment": key.segment, "layer": key.layer,
            "data_bytes": u64::from(*positions) * SLOT, "stored_bytes": bytes,
        })
    };
    let segments: Vec<Value> = dump.segments.iter().map(segment).collect();
    if matches!(format, Format::Table | Format::Wide) {
        say(&format!(
            "disk {}, opened {} times: {} of {} used, {} of {} of the log to be applied, {} volumes with a generation",
            dump.disk,
            dump.boot,
            output::bytes(dump.used_bytes.0),
            output::bytes(dump.capacity_bytes.0),
            output::bytes(dump.unapplied_bytes.0),
            output::bytes(dump.log_bytes.0),
            dump.generations.len(),
        ));
        return output::print(format, &Value::Array(segments), DUMP);
    }
    let generation = |(volume, generation): &(storage::ids::VolumeId, storage::ids::Generation)| json!({ "volume": volume, "generation": generation });
    let whole = json!({
        "disk": dump.disk,
        "opened": dump.boot,
        "capacity_bytes": dump.capacity_bytes,
        "used_bytes": dump.used_bytes,
        "log_bytes": dump.log_bytes,
        "unapplied_bytes": dump.unapplied_bytes,
        "generations": dump.generations.iter().map(generation).collect::<Vec<_>>(),
        "segments": segments,
    });
    output::print(format, &whole, &[])
}

fn run_of_blocks(DamagedBlocks { at, blocks }: &DamagedBlocks) -> Value {
    json!({
        "volume": at.volume, "segment": at.segment, "layer": at.layer,
        "first_block": blocks.start, "blocks": blocks.len(),
    })
}

/// Makes the index of a disk anew.
pub(super) fn rebuild(format: Format, path: &Path, unlock: &Unlock) -> Result<(), CliError> {
    let key = unlock.key(path)?;
    let mut told = 0;
    let progress = |progress: Progress| {
        let (what, done, count) = match progress {
            Progress::Slots(done, count) => ("slots without a known owner", done, count),
            Progress::Segments(done, count) => ("segments", done, count),
            Progress::Writing => return say("writing the index"),
        };
        // Some twenty lines for each.
        let part = done * 20 / count.max(1);
        if done == 0 || part != told {
            told = part;
            say(&format!("looking at {what}: {done} of {count}"));
        }
    };
    let rebuilt = rebuild::rebuild(path, key.as_ref(), progress).map_err(|error| {
        let failed = CliError::new(Exit::Failed, format!("{} is not rebuilt", path.display()))
            .why(format!("{error:#}"));
        match error {
            OpenError::NotRebuilt(_) | OpenError::Damaged(_) => {
                failed.next("its replicas are on other disks: hci disk evict NODE:PATH --force")
            }
            _ => failed
                .next("name a device or file of a pool, and stop its node first: systemctl stop hci-data"),
        }
    })?;
    let lost: Vec<Value> = rebuilt.lost.iter().map(run_of_blocks).collect();
    if matches!(format, Format::Table | Format::Wide) {
        say(&summary(&rebuilt));
        return if lost.is_empty() { Ok(()) } else { output::print(format, &Value::Array(lost), DAMAGE) };
    }
    let generation = |(volume, generation): &(storage::ids::VolumeId, storage::ids::Generation)| json!({ "volume": volume, "generation": generation });
    let whole = json!({
        "disk": rebuilt.disk,
        "changed": rebuilt.changed,
        "segments": rebuilt.segments,
        "directory_pages": rebuilt.directory_pages,
        "owner_pages": rebuilt.owner_pages,
        "lost": lost,
        "generations": rebuilt.generations.iter().map(generation).collect::<Vec<_>>(),
    });
    output::print(format, &whole, &[])
}

fn summary(rebuilt: &Rebuilt) -> String {
    match rebuilt.changed {
        Changed::Nothing => format!("disk {}: the index is sound, nothing was written", rebuilt.disk),
        Changed::Rebuilt => {
            let blocks: usize = rebuilt.lost.iter().map(|run| run.blocks.len()).sum();
            format!(
                "disk {}: {} pages of the directory and {} of the list of slots made anew, {} segments, {blocks} blocks lost (they are read from other replicas)",
                rebuilt.disk, rebuilt.directory_pages, rebuilt.owner_pages, rebuilt.segments
            )
        }
    }
}

/// Compares everything on a disk with its checksums.
pub(super) fn verify(format: Format, path: &Path, unlock: &Unlock) -> Result<(), CliError> {
    let key = unlock.key(path)?;
    let progress = |done: usize, count: usize| {
        if done.is_multiple_of(16) {
            say(&format!("segment {done} of {count}"));
        }
    };
    let verified =
        offline::verify(path, key.as_ref(), progress).map_err(|error| not_readable(path, &error))?;
    let damaged: Vec<Value> = verified.damaged.iter().map(run_of_blocks).collect();
    let sound = damaged.is_empty() && verified.lost_pages.is_empty();
    if matches!(format, Format::Table | Format::Wide) {
        say(&format!(
            "{} compared with their checksums, {} runs of blocks damaged, checksums lost in {} segments",
            output::bytes(verified.checked_bytes),
            damaged.len(),
            verified.lost_pages.len(),
        ));
        if !damaged.is_empty() {
            output::print(format, &Value::Array(damaged), DAMAGE)?;
        }
    } else {
        let lost: Vec<Value> = verified
            .lost_pages
            .iter()
            .map(|key| json!({ "volume": key.volume, "segment": key.segment, "layer": key.layer }))
            .collect();
        let whole =
            json!({ "checked_bytes": verified.checked_bytes, "damaged": damaged, "checksums_lost": lost });
        output::print(format, &whole, &[])?;
    }
    if sound {
        return Ok(());
    }
    Err(CliError::new(Exit::Failed, format!("{} is damaged", path.display()))
        .why("blocks are not what was written".to_owned())
        .next("start the node: what is read is repaired from other replicas, all else by hci disk scrub; replace the disk if it happens again"))
}
