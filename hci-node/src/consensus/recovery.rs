//! A node whose metadata store was lost gets a snapshot from a peer.
//!
//! The log begins where a snapshot ended. When that snapshot is gone, the log and the vote are still good, and must be
//! kept: entries in it count for majorities. So before Raft starts, a snapshot that covers the purged part is
//! pulled. The members were in the lost snapshot, but that does not matter: they dial this node.

use std::time::Duration;

use bytes::BytesMut;
use netfabric::NodeId;
use netfabric::mesh::Mesh;
use netfabric::rpc::{CallError, Request};
use tokio::time::{Instant, sleep, timeout_at};

use super::protocol::{self, MAX_SNAPSHOT, SnapshotPart, SnapshotPull};
use super::snapshot::SnapshotStore;
use super::types::{LogId, Snapshot};

/// Pause before peers are asked again.
const RETRY: Duration = Duration::from_millis(200);
/// How long one piece may take.
const PIECE_DEADLINE: Duration = Duration::from_secs(10);

/// No peer gave a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// None in time.
    #[error(
        "the snapshot of the cluster's state is lost on this node and no peer gave one within {waited:?} ({last}); \
         start the other nodes, or remove this node and join it again"
    )]
    NoPeer {
        /// How long was waited.
        waited: Duration,
        /// What the last peer said.
        last: String,
    },
    /// It came and cannot be stored.
    #[error("cannot store the snapshot that a peer gave")]
    Store(#[source] std::io::Error),
}

/// Makes sure that there is a snapshot that covers `purged`.
pub(super) async fn ensure_snapshot(
    mesh: &Mesh,
    snapshots: &SnapshotStore,
    purged: LogId,
    patience: Duration,
) -> Result<(), RecoveryError> {
    let present = snapshots.current().and_then(|snapshot| snapshot.meta.last_log_id);
    if present.is_some_and(|last| last.index >= purged.index) {
        return Ok(());
    }
    tracing::warn!(covers = purged.index, "the Raft snapshot is lost, asking the peers for one");
    let deadline = Instant::now() + patience;
    let mut last = "no peer has connected".to_owned();
    let pulled = timeout_at(deadline, async {
        loop {
            for peer in mesh.stats().peers.iter().filter(|peer| peer.rtt.is_some()) {
                match pull(mesh, peer.node, purged.index).await {
                    Ok(snapshot) => return snapshot,
                    Err(error) => last = format!("{}: {error}", peer.node),
                }
            }
            sleep(RETRY).await;
        }
    });
    let Ok(snapshot) = pulled.await else { return Err(RecoveryError::NoPeer { waited: patience, last }) };
    tracing::info!(bytes = snapshot.snapshot.len(), "reinstalled the Raft snapshot from a peer");
    snapshots.save(snapshot).await.map_err(RecoveryError::Store)
}

async fn pull(mesh: &Mesh, peer: NodeId, covers: u64) -> Result<Snapshot, CallError> {
    let mut data = BytesMut::new();
    let mut meta = None;
    loop {
        let header = SnapshotPull { covers, offset: data.len() as u64 };
        let response =
            mesh.call(peer, Request::new(protocol::SNAPSHOT_PULL, &header)?, PIECE_DEADLINE).await?;
        let part: SnapshotPart = response.decode()?;
        let changed = meta.as_ref().is_some_and(|meta| *meta != part.meta);
        if changed
            || part.total > MAX_SNAPSHOT
            || (response.bulk.is_empty() && part.total > data.len() as u64)
        {
            // The peer made a newer one meanwhile: begin again.
            return Err(CallError::Reset("the peer's snapshot changed".to_owned()));
        }
        data.extend_from_slice(&response.bulk);
        if data.len() as u64 >= part.total {
            return Ok(Snapshot { meta: part.meta, snapshot: data.freeze() });
        }
        meta = Some(part.meta);
    }
}
