//! The replicated state machine behind openraft's interface.
//!
//! The state lives in memory. It is persisted at snapshots only; after a restart the log, which is retained from the
//! latest snapshot on, is applied again. That is correct because a snapshot is durable before openraft is told of it,
//! and openraft purges the log only behind a snapshot. It is cheap because no entry costs more than its place in
//! the journal.
//!
//! Retried proposals are applied once: the replies to the latest requests are remembered, as part of the replicated
//! state, so that every node decides alike and a new leader remembers too.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use netfabric::rpc::codec;
use openraft::EntryPayload;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::StateMachine;
use super::snapshot::SnapshotStore;
use super::types::{
    LogId, Opaque, Proposal, Reply, RequestId, Snapshot, SnapshotMeta, StoredMembership, TypeConfig,
};

/// Replies remembered. A retry comes within seconds; this many proposals take longer.
const REMEMBERED: usize = 1024;

/// The replies to the latest requests, oldest first.
#[derive(Clone, Debug, Default)]
struct Recent {
    order: VecDeque<RequestId>,
    replies: HashMap<RequestId, Reply>,
}

impl Recent {
    fn insert(&mut self, id: RequestId, reply: Reply) {
        if self.order.len() >= REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.replies.remove(&oldest);
        }
        self.order.push_back(id);
        self.replies.insert(id, reply);
    }

    fn to_list(&self) -> Vec<(RequestId, Reply)> {
        self.order.iter().filter_map(|id| Some((*id, self.replies.get(id)?.clone()))).collect()
    }

    fn from_list(list: Vec<(RequestId, Reply)>) -> Self {
        let mut recent = Self::default();
        for (id, reply) in list {
            recent.insert(id, reply);
        }
        recent
    }
}

/// The content of a snapshot.
#[derive(Serialize, Deserialize)]
struct Body {
    recent: Vec<(RequestId, Reply)>,
    state: Opaque,
}

/// Everything that applying entries changes.
#[derive(Clone, Debug)]
struct Applied<S> {
    state: Arc<S>,
    recent: Recent,
    last: Option<LogId>,
    membership: StoredMembership,
}

impl<S: StateMachine> Applied<S> {
    fn propose(&mut self, proposal: &Proposal) -> io::Result<Reply> {
        if let Some(reply) = self.recent.replies.get(&proposal.id) {
            return Ok(reply.clone());
        }
        // A command of a later version: stopping is the only way not to diverge.
        let command = codec::decode(&proposal.command.0).map_err(io::Error::other)?;
        let output = Arc::make_mut(&mut self.state).apply(command);
        let reply = Reply(Opaque(codec::encode(&output).map_err(io::Error::other)?));
        self.recent.insert(proposal.id, reply.clone());
        Ok(reply)
    }

    fn to_snapshot(&self) -> io::Result<Snapshot> {
        let state = codec::encode(self.state.as_ref()).map_err(io::Error::other)?;
        let body = Body { recent: self.recent.to_list(), state: Opaque(state) };
        let meta = SnapshotMeta { last_log_id: self.last, last_membership: self.membership.clone() };
        Ok(Snapshot { meta, snapshot: codec::encode(&body).map_err(io::Error::other)? })
    }

    fn from_snapshot(meta: &SnapshotMeta, data: &[u8]) -> io::Result<Self> {
        let damaged = |error: codec::DecodeError| {
            io::Error::new(io::ErrorKind::InvalidData, format!("unreadable snapshot: {error}"))
        };
        let body: Body = codec::decode(data).map_err(damaged)?;
        Ok(Self {
            state: Arc::new(codec::decode(&body.state.0).map_err(damaged)?),
            recent: Recent::from_list(body.recent),
            last: meta.last_log_id,
            membership: meta.last_membership.clone(),
        })
    }
}

/// openraft's view of the state machine.
#[derive(Debug)]
pub(super) struct Machine<S> {
    applied: Applied<S>,
    publish: watch::Sender<Arc<S>>,
    snapshots: SnapshotStore,
}

impl<S: StateMachine> Machine<S> {
    /// Starts from the latest snapshot, or from `initial`. What is applied is published to the receiver.
    pub(super) fn open(initial: S, snapshots: SnapshotStore) -> io::Result<(Self, watch::Receiver<Arc<S>>)> {
        let applied = match snapshots.current() {
            Some(snapshot) => Applied::from_snapshot(&snapshot.meta, &snapshot.snapshot)?,
            None => Applied {
                state: Arc::new(initial),
                recent: Recent::default(),
                last: None,
                membership: StoredMembership::default(),
            },
        };
        let (publish, published) = watch::channel(applied.state.clone());
        Ok((Self { applied, publish, snapshots }, published))
    }
}

impl<S: StateMachine> RaftStateMachine<TypeConfig> for Machine<S> {
    type SnapshotData = Bytes;
    type SnapshotBuilder = Builder<S>;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied.last, self.applied.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        let mut answers = Vec::new();
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let reply = match entry.payload {
                EntryPayload::Blank => Reply::default(),
                EntryPayload::Normal(proposal) => self.applied.propose(&proposal)?,
                EntryPayload::Membership(membership) => {
                    self.applied.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Reply::default()
                }
            };
            self.applied.last = Some(entry.log_id);
            answers.extend(responder.map(|responder| (responder, reply)));
        }
        // Published before anyone is answered, so that who proposed reads its own write.
        self.publish.send_if_modified(|published| {
            let modified = !Arc::ptr_eq(published, &self.applied.state);
            *published = self.applied.state.clone();
            modified
        });
        for (responder, reply) in answers {
            responder.send(reply);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder<S> {
        Builder { applied: self.applied.clone(), snapshots: self.snapshots.clone() }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Bytes) -> Result<(), io::Error> {
        let applied = Applied::from_snapshot(meta, &snapshot)?;
        self.snapshots.save(Snapshot { meta: meta.clone(), snapshot }).await?;
        self.applied = applied;
        self.publish.send_replace(self.applied.state.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        Ok(self.snapshots.current())
    }
}

/// Serializes the state as it was when the builder was made, while more is applied.
#[derive(Debug)]
pub(super) struct Builder<S> {
    applied: Applied<S>,
    snapshots: SnapshotStore,
}

impl<S: StateMachine> RaftSnapshotBuilder<TypeConfig> for Builder<S> {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let applied = self.applied.clone();
        let built = tokio::task::spawn_blocking(move || applied.to_snapshot());
        let snapshot = built.await.map_err(io::Error::other)??;
        self.snapshots.save(snapshot.clone()).await?;
        Ok(snapshot)
    }
}
