//! Counters behind [`OverlayStats`](super::OverlayStats) and the Prometheus metrics, which are the same numbers.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use prometheus::core::{AtomicU64 as Count, GenericCounter, GenericCounterVec};
use prometheus::{Opts, Registry};

use super::id::PortId;
use super::stats::{DropReason, MeshFrameStats, PortStats};

type Counter = GenericCounter<Count>;
type CounterVec = GenericCounterVec<Count>;

/// All metrics of an overlay.
pub(crate) struct Metrics {
    registry: Registry,
    frames: CounterVec,
    bytes: CounterVec,
    drops: CounterVec,
    pub(crate) mesh: MeshCounters,
}

impl Metrics {
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let family = |name: &str, help: &str, labels: &[&str]| {
            let family = CounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(family.clone()))?;
            Ok::<_, prometheus::Error>(family)
        };
        let frames = family(
            "hci_overlay_port_frames_total",
            "Frames through a port; rx and tx as the guest sees them.",
            &["port", "direction"],
        )?;
        let bytes = family("hci_overlay_port_bytes_total", "Bytes through a port.", &["port", "direction"])?;
        let drops = family("hci_overlay_port_drops_total", "Frames dropped at a port.", &["port", "reason"])?;
        let mesh_drops = family(
            "hci_overlay_mesh_drops_total",
            "Frames from other nodes that no port took.",
            &["reason"],
        )?;
        let pieces = family(
            "hci_overlay_mesh_datagrams_total",
            "Datagrams from other nodes, by what became of them.",
            &["outcome"],
        )?;
        let wholes = family(
            "hci_overlay_mesh_frames_total",
            "Frames from other nodes, by what became of them.",
            &["outcome"],
        )?;
        let mesh = MeshCounters {
            datagrams: pieces.with_label_values(&["received"]),
            garbage: pieces.with_label_values(&["garbage"]),
            duplicates: pieces.with_label_values(&["duplicate"]),
            frames: wholes.with_label_values(&["complete"]),
            incomplete: wholes.with_label_values(&["incomplete"]),
            evicted: wholes.with_label_values(&["evicted"]),
            drops: Drops::new(mesh_drops, Vec::new()),
        };
        Ok(Self { registry, frames, bytes, drops, mesh })
    }

    /// For `/metrics`.
    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The counters of a port, from zero.
    pub(crate) fn port(&self, id: PortId) -> PortCounters {
        let port = id.to_string();
        let of = |family: &CounterVec, direction: &str| family.with_label_values(&[port.as_str(), direction]);
        PortCounters {
            rx_frames: of(&self.frames, "rx"),
            rx_bytes: of(&self.bytes, "rx"),
            tx_frames: of(&self.frames, "tx"),
            tx_bytes: of(&self.bytes, "tx"),
            drops: Drops::new(self.drops.clone(), vec![port]),
        }
    }

    /// Forgets a port that is gone.
    pub(crate) fn forget(&self, id: PortId) {
        let port = id.to_string();
        for direction in ["rx", "tx"] {
            // Not being there is fine.
            let _ = self.frames.remove_label_values(&[port.as_str(), direction]);
            let _ = self.bytes.remove_label_values(&[port.as_str(), direction]);
        }
        for reason in DropReason::ALL {
            let _ = self.drops.remove_label_values(&[port.as_str(), reason.as_str()]);
        }
    }
}

/// Drops by reason; a reason has a metric only once it has happened.
pub(crate) struct Drops {
    family: CounterVec,
    labels: Vec<String>,
    counters: [OnceLock<Counter>; DropReason::ALL.len()],
}

impl Drops {
    fn new(family: CounterVec, labels: Vec<String>) -> Self {
        Self { family, labels, counters: std::array::from_fn(|_| OnceLock::new()) }
    }

    pub(crate) fn count(&self, reason: DropReason) {
        let counter = self.counters[reason as usize].get_or_init(|| {
            let mut labels: Vec<&str> = self.labels.iter().map(String::as_str).collect();
            labels.push(reason.as_str());
            self.family.with_label_values(&labels)
        });
        counter.inc();
    }

    fn read(&self) -> BTreeMap<DropReason, u64> {
        DropReason::ALL
            .into_iter()
            .filter_map(|reason| Some((reason, self.counters[reason as usize].get()?.get())))
            .collect()
    }
}

/// Counters of one port.
pub(crate) struct PortCounters {
    rx_frames: Counter,
    rx_bytes: Counter,
    tx_frames: Counter,
    tx_bytes: Counter,
    drops: Drops,
}

impl PortCounters {
    /// The guest got a frame.
    pub(crate) fn received(&self, bytes: usize) {
        self.rx_frames.inc();
        self.rx_bytes.inc_by(bytes as u64);
    }

    /// The guest sent a frame.
    pub(crate) fn sent(&self, bytes: usize) {
        self.tx_frames.inc();
        self.tx_bytes.inc_by(bytes as u64);
    }

    /// A frame from or to the guest was dropped.
    pub(crate) fn dropped(&self, reason: DropReason) {
        self.drops.count(reason);
    }

    pub(crate) fn read(&self, connected: bool) -> PortStats {
        PortStats {
            connected,
            rx_frames: self.rx_frames.get(),
            rx_bytes: self.rx_bytes.get(),
            tx_frames: self.tx_frames.get(),
            tx_bytes: self.tx_bytes.get(),
            drops: self.drops.read(),
        }
    }
}

/// Counters of what comes from other nodes.
pub(crate) struct MeshCounters {
    pub(crate) datagrams: Counter,
    pub(crate) garbage: Counter,
    pub(crate) duplicates: Counter,
    pub(crate) frames: Counter,
    pub(crate) incomplete: Counter,
    pub(crate) evicted: Counter,
    pub(crate) drops: Drops,
}

impl MeshCounters {
    pub(crate) fn read(&self) -> MeshFrameStats {
        MeshFrameStats {
            datagrams: self.datagrams.get(),
            garbage: self.garbage.get(),
            duplicates: self.duplicates.get(),
            frames: self.frames.get(),
            incomplete: self.incomplete.get(),
            evicted: self.evicted.get(),
            drops: self.drops.read(),
        }
    }
}
