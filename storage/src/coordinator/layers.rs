//! The layers of an open volume: where reads look, where writes go, and the door that lets a point in time be held.
//!
//! A volume's blocks lie in a **chain** of layers; a block is that of the first layer that has it. Writes go to the top. A snapshot is the
//! chain below a top that was put on it: the control plane puts a new, empty layer on the chain first (which changes no content), and the
//! coordinator goes over to it in a moment when no write is under way ([`super::freeze`]). So whichever of the two it
//! writes to when it fails, a later opening reads everything, and writes to the top.
//!
//! Rules that the data rest on:
//! - A write stays in the layer that was the right one when it began, however often it is sent again.
//! - Once something was written to a layer, nothing that begins later is written to one below it.
//! - Layers are taken over from newer configurations only, by their revision.

use crate::config::{Freeze, LayersConfig};
use crate::ids::{FreezeId, LayerRef, SegmentIndex};
use crate::signal::Signal;
use crate::store::Keep;
use parking_lot::Mutex;
use std::sync::Arc;

/// A segment in one layer: what is compared, copied and repaired.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    /// The segment.
    pub(crate) segment: SegmentIndex,
    /// The layer.
    pub(crate) layer: LayerRef,
    /// Whether zeroes in it hide something below.
    pub(crate) keep: Keep,
}

/// The layers as they are at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct View {
    revision: u64,
    /// What reads go through, top first.
    pub(crate) chain: Arc<[LayerRef]>,
    /// The same without the top.
    pub(crate) below: Arc<[LayerRef]>,
    /// Everything that a replica in sync holds: the chain, and layers that only snapshots have.
    pub(crate) all: Arc<[LayerRef]>,
    /// How many layers from the top on replicas may differ in after a crash.
    unsettled: usize,
    /// Where writes go: the top, but for the time until a pending freeze.
    write: LayerRef,
    /// What is to be frozen.
    pub(crate) freeze: Option<Freeze>,
    /// The layer that is merged into the one above it.
    pub(crate) merge: Option<LayerRef>,
}

impl View {
    fn new(config: &LayersConfig) -> Self {
        let write = config.chain.first().copied().unwrap_or_default();
        Self {
            revision: config.revision,
            chain: config.chain.as_slice().into(),
            below: config.chain.get(1..).unwrap_or_default().into(),
            all: config.chain.iter().chain(&config.kept).copied().collect(),
            unsettled: config.unsettled as usize,
            write,
            freeze: config.freeze,
            merge: config.merge,
        }
    }

    /// The top of the chain.
    pub(crate) fn first(&self) -> LayerRef {
        self.chain.first().copied().unwrap_or_default()
    }

    /// Where a write that begins now goes in a segment.
    pub(crate) fn top(&self, segment: SegmentIndex) -> Part {
        self.part(segment, self.write)
    }

    /// A segment in a layer.
    pub(crate) fn part(&self, segment: SegmentIndex, layer: LayerRef) -> Part {
        let keep = if self.chain.last() == Some(&layer) { Keep::WhereStored } else { Keep::Always };
        Part { segment, layer, keep }
    }

    /// Layers in which replicas may differ after a crash.
    pub(crate) fn unsettled(&self) -> &[LayerRef] {
        &self.chain[..self.unsettled.min(self.chain.len())]
    }

    /// The layer above another one.
    pub(crate) fn above(&self, layer: LayerRef) -> Option<LayerRef> {
        let at = self.chain.iter().position(|there| *there == layer)?;
        self.chain.get(at.checked_sub(1)?).copied()
    }
}

/// The layers of an open volume.
#[derive(Debug)]
pub(crate) struct Layers {
    view: Mutex<Arc<View>>,
    /// Tells of changes of the view.
    pub(crate) changed: Signal<()>,
    /// Every write holds it shared from the choice of its layer to its end; who holds it alone holds a point in time.
    pub(crate) door: tokio::sync::RwLock<()>,
}

impl Layers {
    /// The layers as an opening finds them. It writes to the top, also when a freeze is pending: whoever had the volume
    /// before may have gone over already.
    pub(crate) fn new(config: &LayersConfig) -> Self {
        Self {
            view: Mutex::new(Arc::new(View::new(config))),
            changed: Signal::new(()),
            door: tokio::sync::RwLock::new(()),
        }
    }

    /// The layers at this moment.
    pub(crate) fn view(&self) -> Arc<View> {
        self.view.lock().clone()
    }

    /// Takes over newer layers.
    pub(crate) fn configure(&self, config: &LayersConfig) {
        {
            let mut view = self.view.lock();
            if config.revision <= view.revision {
                return;
            }
            let mut new = View::new(config);
            // A freeze is carried out in its own time; until then writes stay where they are, unless that layer was left out.
            let is_new =
                new.freeze.is_some_and(|freeze| view.freeze.is_none_or(|known| known.id != freeze.id));
            let is_pending = new.freeze.is_some() && view.write != new.write;
            if (is_new || is_pending) && new.chain.contains(&view.write) {
                new.write = view.write;
            }
            *view = Arc::new(new);
        }
        self.changed.set(());
    }

    /// Has all writes that begin from now on go to the top.
    pub(crate) fn switch(&self) {
        let mut view = self.view.lock();
        let top = view.first();
        if view.write != top {
            let mut new = View::clone(&view);
            new.write = top;
            *view = Arc::new(new);
        }
    }

    /// The freeze with this id, if it is still pending.
    pub(crate) fn pending(&self, id: FreezeId) -> Option<Freeze> {
        self.view.lock().freeze.filter(|freeze| freeze.id == id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FreezeStage;
    use crate::ids::{LayerId, VolumeId};

    fn layer(n: u32) -> LayerRef {
        LayerRef { volume: VolumeId::default(), layer: LayerId(n) }
    }

    fn config(revision: u64, chain: &[u32], freeze: Option<FreezeStage>) -> LayersConfig {
        LayersConfig {
            revision,
            chain: chain.iter().map(|n| layer(*n)).collect(),
            kept: Vec::new(),
            unsettled: 1,
            freeze: freeze.map(|stage| Freeze { id: FreezeId::default(), stage }),
            merge: None,
        }
    }

    fn written(layers: &Layers) -> u32 {
        layers.view().top(SegmentIndex(0)).layer.layer.0
    }

    #[test]
    fn writes_stay_in_their_layer_until_the_freeze_and_never_go_back() {
        let layers = Layers::new(&config(1, &[0], None));
        layers.configure(&config(2, &[1, 0], Some(FreezeStage::Hold)));
        assert_eq!(written(&layers), 0);
        layers.configure(&config(3, &[1, 0], Some(FreezeStage::Switch)));
        assert_eq!(written(&layers), 0, "the coordinator goes over in its own time");
        layers.switch();
        layers.configure(&config(2, &[1, 0], Some(FreezeStage::Hold)));
        assert_eq!(written(&layers), 1, "an older configuration changes nothing");
        layers.configure(&config(4, &[1, 0], None));
        assert_eq!(written(&layers), 1);
        layers.configure(&config(5, &[2, 1, 0], Some(FreezeStage::Hold)));
        assert_eq!(written(&layers), 1, "the next one");
        layers.configure(&config(6, &[2, 1, 0], None));
        assert_eq!(written(&layers), 2, "without a freeze there is nothing to wait for");
    }

    #[test]
    fn an_opening_that_finds_a_freeze_pending_writes_to_the_top() {
        let layers = Layers::new(&config(1, &[1, 0], Some(FreezeStage::Switch)));
        assert_eq!(written(&layers), 1);
        layers.configure(&config(2, &[1, 0], Some(FreezeStage::Switch)));
        assert_eq!(written(&layers), 1);
    }

    #[test]
    fn zeroes_are_kept_where_they_hide_something() {
        let view = View::new(&config(1, &[2, 1, 0], None));
        let keep = |n| view.part(SegmentIndex(0), layer(n)).keep;
        assert_eq!(
            (keep(2), keep(1), keep(0), keep(9)),
            (Keep::Always, Keep::Always, Keep::WhereStored, Keep::Always)
        );
        assert_eq!((view.above(layer(0)), view.above(layer(2))), (Some(layer(1)), None));
        assert_eq!(view.unsettled(), [layer(2)]);
    }
}
