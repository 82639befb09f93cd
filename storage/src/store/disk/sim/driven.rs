//! The store in the simulated cluster: its I/O and its checkpoints take their time by the simulation's clock.
//!
//! One task for each opening of the store carries out what was started, in any order, and lets the applier go on I/O by I/O. It ends with the process.

use super::{Sim, SimStore, Size};
use crate::ids::{DiskId, LayerRef, SegmentIndex, SegmentKey};
use crate::sim::dice::Dice;
use crate::store::disk::{LogStore, OpenError};
use crate::store::{BlockVersion, DiskStore, ReadReply, StoreError};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;

/// Room for the layers of a volume of two segments; a log that goes around every few seconds.
const SIZE: Size = Size { bytes: 32 << 20, log: 512 << 10 };
/// Longest time that one I/O takes, in microseconds.
const SLOWEST_MICROS: u64 = 300;
/// What was logged is applied after this time, when nothing happens.
const REST: Duration = Duration::from_millis(50);
/// Segments that a volume of the simulation has.
const SEGMENTS: u32 = 2;

/// A process that has the disk open.
struct Running {
    store: Arc<Mutex<SimStore>>,
    handle: Arc<LogStore>,
    driver: AbortOnDropHandle<()>,
}

/// A disk with the real store on a simulated medium.
pub(crate) struct DrivenDisk {
    sim: Arc<Sim>,
    running: Mutex<Option<Running>>,
    /// Layers that are given up: removed at each opening, for the removal before may have been lost.
    forgotten: Mutex<Vec<LayerRef>>,
    dice: Dice,
}

impl DrivenDisk {
    /// A formatted disk that nobody has open.
    pub(crate) fn new(disk: DiskId, dice: Dice) -> Self {
        let sim = Arc::new(Sim::new(dice.clone(), disk, SIZE, None));
        Self { sim, running: Mutex::new(None), forgotten: Mutex::default(), dice }
    }

    /// Opens it for a new process.
    pub(crate) fn open(&self) -> Result<Arc<dyn DiskStore>, OpenError> {
        self.end();
        let store = self.sim.open(None)?;
        let handle = Arc::new(LogStore::driven(store.shared.clone()));
        let store = Arc::new(Mutex::new(store));
        let driver =
            AbortOnDropHandle::new(tokio::spawn(drive(self.sim.clone(), store.clone(), self.dice.clone())));
        *self.running.lock() = Some(Running { store, handle: handle.clone(), driver });
        let forgotten = self.forgotten.lock().clone();
        forgotten.into_iter().for_each(|layer| self.remove(layer));
        Ok(handle)
    }

    /// Ends the process that has it open, if there is one.
    pub(crate) fn end(&self) {
        let Some(Running { store, driver, .. }) = self.running.lock().take() else { return };
        driver.abort();
        // The task holds the other reference until it is polled again; it never is in the middle of something.
        self.sim.end_process(&mut store.lock());
    }

    /// Loses what was not synced. Nobody has it open.
    pub(crate) fn lose_unsynced(&self) {
        self.sim.lose_unsynced();
    }

    /// Removes a layer now, if it is open, and at each opening.
    pub(crate) fn forget(&self, layer: LayerRef) {
        self.forgotten.lock().push(layer);
        self.remove(layer);
    }

    fn remove(&self, layer: LayerRef) {
        let Some(handle) = self.handle() else { return };
        tokio::spawn(async move {
            for segment in (0..SEGMENTS).map(SegmentIndex) {
                // It is tried again at the next opening.
                let _ = handle.remove(layer.key(segment)).await;
            }
        });
    }

    /// What a block reads through layers, the top first, at this moment; nothing while it is not open.
    pub(crate) fn look(&self, chain: &[SegmentKey], block: u32) -> Option<Result<ReadReply, StoreError>> {
        let store = self.handle()?;
        Some(self.at_once(store.read_layers(chain, block, 1)))
    }

    /// Versions of blocks at this moment; nothing while it is not open.
    pub(crate) fn versions(
        &self,
        at: SegmentKey,
        blocks: Range<u32>,
    ) -> Option<Result<Vec<BlockVersion>, StoreError>> {
        let store = self.handle()?;
        Some(self.at_once(store.versions(at, blocks)))
    }

    fn handle(&self) -> Option<Arc<LogStore>> {
        self.running.lock().as_ref().map(|running| running.handle.clone())
    }

    /// Runs a request that only reads, without letting time pass.
    fn at_once<T>(&self, request: BoxFuture<'_, T>) -> T {
        // It may take more turns than tokio lets one task have.
        let mut request = std::pin::pin!(tokio::task::unconstrained(request));
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(result) = request.as_mut().poll(&mut cx) {
                return result;
            }
            self.sim.carry_out_reads();
        }
    }
}

/// Carries out what was started, and has what was logged applied.
async fn drive(sim: Arc<Sim>, store: Arc<Mutex<SimStore>>, dice: Dice) {
    let news = sim.news();
    loop {
        let applies = {
            let store = store.lock();
            store.in_checkpoint || store.shared.core.lock().wants_checkpoint()
        };
        if !applies && !sim.is_busy() {
            tokio::select! {
                biased;
                () = news.notified() => {}
                () = tokio::time::sleep(REST) => {
                    let mut store = store.lock();
                    let any = store.shared.core.lock().has_unapplied();
                    if any {
                        store.step_applier();
                    }
                }
            }
            continue;
        }
        tokio::time::sleep(dice.micros(SLOWEST_MICROS)).await;
        if applies && (dice.percent(40) || !sim.is_busy()) {
            store.lock().step_applier();
        } else {
            sim.carry_out_one();
        }
    }
}
