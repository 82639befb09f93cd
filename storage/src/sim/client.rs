//! Users of the volume: read, write, discard and flush at random around the boundary of two segments, and record what happens.

use super::dice::Dice;
use super::history::{History, Value};
use crate::coordinator::VolumeDevice;
use crate::device::{BlockDevice, BlockError, BlockOp};
use crate::ids::{SECTOR_SIZE, SEGMENT_SIZE};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Sectors that the workload touches: four blocks on each side of the boundary.
pub(super) const HOT: Range<u64> = SEGMENT_SIZE / SECTOR_SIZE - 32..SEGMENT_SIZE / SECTOR_SIZE + 32;

/// Submits one request and waits.
pub(super) async fn request(device: &VolumeDevice, op: BlockOp) -> Result<Bytes, BlockError> {
    let (sender, receiver) = oneshot::channel();
    device.submit(
        op,
        Box::new(move |result| {
            let _ = sender.send(result);
        }),
    );
    receiver.await.unwrap_or(Err(BlockError::Closed))
}

/// A value for each sector of a range.
pub(super) fn fill(value: Value, sectors: u64) -> Bytes {
    let mut data = BytesMut::new();
    for _ in 0..sectors * SECTOR_SIZE / 8 {
        data.extend_from_slice(&value.to_le_bytes());
    }
    data.freeze()
}

/// The value in a sector; none when it is torn.
pub(super) fn value_of(sector: &[u8]) -> Option<Value> {
    let first: [u8; 8] = sector[..8].try_into().ok()?;
    sector.chunks_exact(8).all(|c| c == first).then(|| Value::from_le_bytes(first))
}

/// Checks all sectors of a range against the history.
pub(super) async fn read_and_check(
    device: &VolumeDevice,
    opening: u64,
    history: &Mutex<History>,
    sectors: Range<u64>,
) -> Result<(), BlockError> {
    let submitted = history.lock().tick();
    let len = (sectors.end - sectors.start) * SECTOR_SIZE;
    let data = request(device, BlockOp::Read { offset: sectors.start * SECTOR_SIZE, len }).await?;
    let mut history = history.lock();
    for (sector, bytes) in sectors.zip(data.chunks_exact(SECTOR_SIZE as usize)) {
        match value_of(bytes) {
            Some(value) => history.check_read(opening, sector, submitted, value),
            None => history.violation(format!("sector {sector} is torn")),
        }
    }
    Ok(())
}

/// Works on one device until it is closed.
pub(super) async fn work(device: VolumeDevice, opening: u64, history: Arc<Mutex<History>>, dice: Dice) {
    loop {
        tokio::time::sleep(dice.micros(16_000)).await;
        let result = step(&device, opening, &history, &dice).await;
        match result {
            Ok(()) => {}
            Err(BlockError::Closed) => return,
            Err(error) => history.lock().violation(format!("a request failed: {error}")),
        }
    }
}

/// Only reads, little at a time: goes on where writes wait, on a coordinator that is cut off for example.
pub(super) async fn watch(device: VolumeDevice, opening: u64, history: Arc<Mutex<History>>, dice: Dice) {
    loop {
        tokio::time::sleep(dice.micros(100_000)).await;
        let first = HOT.start + dice.below(HOT.end - HOT.start);
        // A read may wait for ever behind a write; another sector is as good.
        let read = read_and_check(&device, opening, &history, first..first + 1);
        if let Ok(Err(_)) = tokio::time::timeout(Duration::from_millis(200), read).await {
            return;
        }
    }
}

async fn step(
    device: &VolumeDevice,
    opening: u64,
    history: &Mutex<History>,
    dice: &Dice,
) -> Result<(), BlockError> {
    let first = HOT.start + dice.below(HOT.end - HOT.start);
    let count = (1 + dice.below(20)).min(HOT.end - first);
    let sectors = first..first + count;
    let (offset, len) = (first * SECTOR_SIZE, count * SECTOR_SIZE);
    match dice.below(100) {
        0..45 => {
            let (value, submitted) = {
                let mut history = history.lock();
                let value = history.new_value();
                (value, history.submit_write(opening, sectors.clone(), value))
            };
            request(device, BlockOp::Write { offset, data: fill(value, count) }).await?;
            tracing::trace!(submitted, ?sectors, "write acknowledged");
            history.lock().acknowledge_write(opening, sectors, submitted);
        }
        45..50 => {
            let submitted = history.lock().submit_write(opening, sectors.clone(), 0);
            let op = if dice.percent(50) {
                BlockOp::Discard { offset, len }
            } else {
                BlockOp::WriteZeroes { offset, len }
            };
            request(device, op).await?;
            tracing::trace!(submitted, ?sectors, "write acknowledged");
            history.lock().acknowledge_write(opening, sectors, submitted);
        }
        50..60 => {
            let submitted = history.lock().tick();
            match request(device, BlockOp::Flush).await {
                // It says that something was lost; whether that can be, the reads will tell.
                Err(BlockError::Io(_)) => history.lock().fail_flush(opening),
                done => {
                    done?;
                    history.lock().acknowledge_flush(opening, submitted);
                    tracing::trace!(submitted, "flush acknowledged");
                }
            }
        }
        _ => read_and_check(device, opening, history, sectors).await?,
    }
    Ok(())
}
