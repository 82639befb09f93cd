//! A verified disk on its way from the spool to its volume.
//!
//! The worker reads the image; its extents are written as they come, without what is zero, for the volume is new. Now
//! and then all is flushed, and noted beside the spool file: a control process that was restarted, or a volume that was
//! opened anew, goes on from the last note.

use std::{fs, io, sync::Arc};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use netfabric::rpc::CallError;

use super::{StepError, commit, spool::Spool};
use crate::{
    control::member::Member,
    images::{
        protocol::{Extent, Mode},
        reader::{ReadError, Worker},
    },
    state::{Generation, ImageId, ImagePart, Op, TaskId, Volume, VolumeId, report::VolumeRunState},
};

/// Writes to a volume under way at a time.
const WRITES: usize = 8;
/// All is flushed and noted, and progress told, after this much.
const FLUSH_EVERY: u64 = 256 << 20;

type Writes = FuturesUnordered<BoxFuture<'static, Result<(), CallError>>>;

/// Writes a disk to its volume, and tells the cluster that it is in.
pub(super) async fn disk(
    member: &Arc<Member>,
    image: ImageId,
    id: VolumeId,
    task: Option<TaskId>,
) -> Result<(), StepError> {
    let state = member.state();
    let Some(volume) = state.volumes.get(&id) else { return Err(StepError::Later("no volume".to_owned())) };
    let spool = Spool::new(&member.paths);
    if !volume.is_filled() {
        wait_open(member, volume)?;
        fill(member, image, volume, &spool, task).await?;
        let op = Op::VolumeFilled { volume: id, generation: volume.generation };
        commit(member, op).await?;
    }
    commit(member, Op::CompleteImagePart { image, part: ImagePart::Disk, node: member.id }).await?;
    spool.clear(image, ImagePart::Disk);
    Ok(())
}

fn wait_open(member: &Member, volume: &Volume) -> Result<(), StepError> {
    let report = member.local.report();
    let open = report.volumes.iter().any(|seen| {
        seen.volume == volume.id && seen.generation == volume.generation && seen.state == VolumeRunState::Open
    });
    if open { Ok(()) } else { Err(StepError::Later("the volume is not open yet".to_owned())) }
}

fn later(error: CallError) -> StepError {
    StepError::Later(error.to_string())
}

fn unreadable(error: ReadError) -> StepError {
    match error {
        ReadError::Start(_) => StepError::Later(error.to_string()),
        error => StepError::Final(format!("the disk cannot be read: {error}")),
    }
}

/// Whether the volume is still open as it was: what was not flushed before it was opened anew may be lost.
fn is_ours(member: &Member, volume: &Volume) -> Result<(), StepError> {
    let now = member.state().volumes.get(&volume.id).map(|now| now.generation);
    if now == Some(volume.generation) && volume.generation > Generation(0) {
        return Ok(());
    }
    Err(StepError::Later("the volume was opened anew".to_owned()))
}

/// Waits for the writes under way, and makes them durable.
async fn flush(member: &Member, volume: &Volume, writes: &mut Writes) -> Result<(), StepError> {
    while let Some(written) = writes.next().await {
        written.map_err(later)?;
    }
    member.local.flush_volume(volume.id).await.map_err(later)?;
    is_ours(member, volume)
}

async fn fill(
    member: &Arc<Member>,
    image: ImageId,
    volume: &Volume,
    spool: &Spool,
    task: Option<TaskId>,
) -> Result<(), StepError> {
    let part = ImagePart::Disk;
    let file = fs::File::open(spool.part(image, part)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => StepError::Final("the node lost the disk before it was in".to_owned()),
        _ => StepError::Later(error.to_string()),
    })?;
    let mut flushed = spool.flushed(image, part);
    let mut reading = Worker::default().open(file, Mode::Read, flushed).await.map_err(unreadable)?;
    let size = reading.header().map_err(unreadable)?.size_bytes;
    if size > volume.size_bytes {
        return Err(StepError::Final("the disk is larger than it was when it came".to_owned()));
    }
    let mut writes = Writes::new();
    while let Some(extent) = reading.next().await.map_err(unreadable)? {
        is_ours(member, volume)?;
        let end = extent.end();
        if let Extent::Data { offset, data } = extent {
            if writes.len() == WRITES
                && let Some(written) = writes.next().await
            {
                written.map_err(later)?;
            }
            writes.push(member.local.write_volume(volume.id, offset, data));
        }
        if end - flushed >= FLUSH_EVERY {
            flush(member, volume, &mut writes).await?;
            flushed = end;
            let noted = spool.set_flushed(image, part, end);
            noted.map_err(|error| StepError::Later(error.to_string()))?;
            if let Some(task) = task {
                let permille = u16::try_from(end.saturating_mul(1000) / size.max(1)).unwrap_or(999);
                let message = "writes the disk to the pool".to_owned();
                commit(member, Op::UpdateTask { task, permille, message }).await?;
            }
        }
    }
    flush(member, volume, &mut writes).await
}
