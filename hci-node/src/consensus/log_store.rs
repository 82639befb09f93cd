//! Raft's log and vote: an image in memory over the write-ahead journal.
//!
//! All that is retained of the log is in memory (a few thousand entries), so reads touch no disk. Every change is
//! applied to the [`Image`] at once, under its lock, and sent in the same order to the one writer thread, which
//! appends what has queued up as one group and only then acknowledges. So vote, append, truncate and purge reach
//! the disk in the order in which they were made, and what is read back after a crash is a state that existed.
//!
//! The committed position is only a hint for a faster restart: it goes along with the next group, or alone after
//! [`COMMITTED_DELAY`].

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::types::{Entry, LogId, TypeConfig, Vote};
use super::wal::{Journal, SegmentId, WalError};

/// Jobs waiting for the writer; more make Raft wait.
const QUEUE: usize = 1024;
/// Bytes of records written as one group, at most. One record may be larger.
const GROUP_BYTES: usize = 4 << 20;
/// Size at which a new segment is started.
const SEGMENT_BYTES: u64 = 8 << 20;
/// How long the committed position may stay unwritten.
const COMMITTED_DELAY: Duration = Duration::from_millis(200);
/// Bytes of entries sent to a follower at a time; one may exceed it. Small enough to cross a slow link and reach a slow
/// disk within the deadline, and far below the limit of a call.
const READ_BYTES: usize = 1 << 20;
/// Version of the records; the first byte of each.
const RECORD_VERSION: u8 = 1;

/// One change of the log, as the journal stores it. Append only: the order is the format.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Record {
    Vote(Vote),
    Append(Entry),
    /// Removes what follows this entry; without one, everything.
    TruncateAfter(Option<LogId>),
    /// Removes everything up to and with this entry: a snapshot holds it.
    Purge(LogId),
    Committed(Option<LogId>),
    /// Starts a segment: what is known besides the entries.
    Checkpoint(Positions),
}

impl Record {
    fn encode(&self) -> io::Result<Vec<u8>> {
        postcard::to_extend(self, vec![RECORD_VERSION]).map_err(io::Error::other)
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        match bytes.split_first() {
            Some((&RECORD_VERSION, body)) => postcard::from_bytes(body).map_err(|e| e.to_string()),
            Some((version, _)) => Err(format!("unknown record version {version}")),
            None => Err("an empty record".to_owned()),
        }
    }
}

/// All but the entries.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Positions {
    vote: Option<Vote>,
    purged: Option<LogId>,
    committed: Option<LogId>,
}

/// The log as it stands. Pure: the same records give the same image, live or replayed.
#[derive(Clone, Debug, Default)]
struct Image {
    positions: Positions,
    entries: BTreeMap<u64, Entry>,
}

impl Image {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Vote(vote) => self.positions.vote = Some(vote),
            Record::Append(entry) => {
                self.entries.insert(entry.log_id.index, entry);
            }
            Record::TruncateAfter(kept) => {
                let first_removed = kept.map_or(0, |id| id.index + 1);
                self.entries.split_off(&first_removed);
            }
            Record::Purge(upto) => {
                self.entries = self.entries.split_off(&(upto.index + 1));
                self.positions.purged = Some(upto);
            }
            Record::Committed(committed) => self.positions.committed = committed,
            Record::Checkpoint(positions) => self.positions = positions,
        }
    }

    fn last(&self) -> Option<LogId> {
        self.entries.last_key_value().map(|(_, entry)| entry.log_id).or(self.positions.purged)
    }

    /// The retained entries must follow the purged ones without a gap.
    fn check(&self) -> Result<(), String> {
        let mut expected = self.positions.purged.map(|id| id.index + 1);
        for index in self.entries.keys() {
            if *index != expected.unwrap_or(*index) {
                return Err(format!("entry {index} where {} should be", expected.unwrap_or(0)));
            }
            expected = Some(index + 1);
        }
        Ok(())
    }
}

/// Why the log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The journal cannot be opened.
    #[error(transparent)]
    Wal(#[from] WalError),
    /// The journal is sound and its content is not.
    #[error("the Raft log in the write-ahead log cannot be used: {0}")]
    Content(String),
    /// The writer thread cannot start.
    #[error("cannot start the thread that writes the Raft log")]
    Thread(#[source] io::Error),
}

/// Changes on their way to the disk, and whom to tell.
struct Job {
    records: Vec<Record>,
    done: Done,
}

enum Done {
    Waiting(oneshot::Sender<io::Result<()>>),
    Raft(IOFlushed<TypeConfig>),
    Nobody,
}

impl Done {
    fn tell(self, result: io::Result<()>) {
        match self {
            // Whoever waited may be gone.
            Self::Waiting(sender) => drop(sender.send(result)),
            Self::Raft(callback) => callback.io_completed(result),
            Self::Nobody => {}
        }
    }
}

#[derive(Debug)]
struct Shared {
    image: RwLock<Image>,
    /// Held while an image is changed and its job queued, so that both see the same order.
    queue: Mutex<SyncSender<Job>>,
}

/// The log and vote of one node. Clones share it; the writer thread ends with the last one.
#[derive(Clone, Debug)]
pub(crate) struct LogStore {
    shared: Arc<Shared>,
}

impl LogStore {
    /// Opens the log in `dir` and starts its writer.
    pub(crate) fn open(dir: &Path) -> Result<Self, LogError> {
        let (journal, replayed) = Journal::open(dir)?;
        let mut image = Image::default();
        let mut segments = Vec::with_capacity(replayed.len());
        for segment in replayed {
            let mut last_index = None;
            for record in &segment.records {
                let record = Record::decode(record).map_err(LogError::Content)?;
                if let Record::Append(entry) = &record {
                    last_index = last_index.max(Some(entry.log_id.index));
                }
                image.apply(record);
            }
            segments.push(Segment { id: segment.segment, last_index });
        }
        image.check().map_err(LogError::Content)?;
        let writer =
            Writer { journal, segments, positions: image.positions.clone(), unwritten_committed: false };
        let (queue, jobs) = sync_channel(QUEUE);
        std::thread::Builder::new()
            .name("hci-raft-wal".to_owned())
            .spawn(move || writer.run(&jobs))
            .map_err(LogError::Thread)?;
        Ok(Self { shared: Arc::new(Shared { image: RwLock::new(image), queue: Mutex::new(queue) }) })
    }

    /// The last entry that was purged: the state must come from a snapshot that covers it.
    pub(crate) fn purged(&self) -> Option<LogId> {
        self.shared.image.read().positions.purged
    }

    /// Changes the image and queues the same change for the disk.
    async fn submit(&self, records: Vec<Record>, done: Done) -> io::Result<()> {
        let mut job = Job { records, done };
        loop {
            {
                let queue = self.shared.queue.lock();
                // Cloned before it is known that there is room; the queue is almost never full.
                let records = job.records.clone();
                match queue.try_send(job) {
                    Ok(()) => {
                        let mut image = self.shared.image.write();
                        records.into_iter().for_each(|record| image.apply(record));
                        return Ok(());
                    }
                    Err(TrySendError::Full(back)) => job = back,
                    Err(TrySendError::Disconnected(_)) => {
                        return Err(io::Error::other("the writer of the Raft log has ended"));
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn submit_and_wait(&self, record: Record) -> io::Result<()> {
        let (done, outcome) = oneshot::channel();
        self.submit(vec![record], Done::Waiting(done)).await?;
        outcome.await.unwrap_or_else(|_| Err(io::Error::other("the writer of the Raft log has ended")))
    }
}

#[derive(Debug)]
struct Segment {
    id: SegmentId,
    /// Highest entry in it; none if it has no entries.
    last_index: Option<u64>,
}

/// What the writer thread owns.
struct Writer {
    journal: Journal,
    segments: Vec<Segment>,
    positions: Positions,
    unwritten_committed: bool,
}

impl Writer {
    fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            let received = if self.unwritten_committed {
                jobs.recv_timeout(COMMITTED_DELAY)
            } else {
                jobs.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            let first = match received {
                Ok(job) => job,
                Err(RecvTimeoutError::Timeout) => {
                    self.write_group(Vec::new());
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let mut size = size_of(&first);
            let mut group = vec![first];
            while size < GROUP_BYTES {
                let Ok(job) = jobs.try_recv() else { break };
                size += size_of(&job);
                group.push(job);
            }
            self.write_group(group);
        }
        if self.unwritten_committed {
            self.write_group(Vec::new());
        }
    }

    /// Writes all jobs as one group, together with the committed position, and tells each.
    fn write_group(&mut self, jobs: Vec<Job>) {
        let result = self.write(&jobs);
        if let Err(error) = &result {
            tracing::error!(%error, "the Raft log cannot be written; this node must be restarted");
        }
        for job in jobs {
            job.done.tell(result.as_ref().copied().map_err(|e| io::Error::new(e.kind(), e.to_string())));
        }
    }

    fn write(&mut self, jobs: &[Job]) -> io::Result<()> {
        let mut encoded = Vec::new();
        let mut last_index = None;
        let mut purged = None;
        for record in jobs.iter().flat_map(|job| &job.records) {
            match record {
                Record::Vote(vote) => self.positions.vote = Some(*vote),
                Record::Append(entry) => last_index = last_index.max(Some(entry.log_id.index)),
                Record::Purge(upto) => {
                    self.positions.purged = Some(*upto);
                    purged = Some(*upto);
                }
                Record::Committed(committed) => {
                    self.positions.committed = *committed;
                    self.unwritten_committed = true;
                    continue;
                }
                Record::TruncateAfter(_) | Record::Checkpoint(_) => {}
            }
            encoded.push(record.encode()?);
        }
        let only_committed = encoded.is_empty();
        if only_committed && !jobs.is_empty() {
            // Waits for company.
            return Ok(());
        }
        if self.unwritten_committed {
            encoded.push(Record::Committed(self.positions.committed).encode()?);
        }
        self.journal.append(&encoded)?;
        self.unwritten_committed = false;
        if let Some(segment) = self.segments.last_mut() {
            segment.last_index = segment.last_index.max(last_index);
        }
        if self.journal.active_length() >= SEGMENT_BYTES {
            self.journal.rotate(&[Record::Checkpoint(self.positions.clone()).encode()?])?;
            self.segments.push(Segment { id: self.journal.active(), last_index: None });
        }
        if let Some(purged) = purged {
            self.remove_purged(purged.index)?;
        }
        Ok(())
    }

    /// Removes the oldest segments as long as they hold nothing but purged entries. The purge itself is durable by now.
    fn remove_purged(&mut self, purged: u64) -> io::Result<()> {
        let active = self.journal.active();
        let count = self
            .segments
            .iter()
            .take_while(|segment| {
                segment.id != active && segment.last_index.is_none_or(|last| last <= purged)
            })
            .count();
        let removed: Vec<SegmentId> = self.segments.drain(..count).map(|segment| segment.id).collect();
        self.journal.remove(&removed)
    }
}

fn size_of(job: &Job) -> usize {
    job.records.iter().map(size_of_record).sum()
}

fn size_of_record(record: &Record) -> usize {
    match record {
        Record::Append(entry) => size_of_entry(entry),
        _ => 0,
    }
}

fn size_of_entry(entry: &Entry) -> usize {
    /// Ids and positions of an entry, roughly.
    const OVERHEAD: usize = 64;
    match &entry.payload {
        openraft::EntryPayload::Normal(proposal) => OVERHEAD + proposal.command.0.len(),
        openraft::EntryPayload::Blank | openraft::EntryPayload::Membership(_) => OVERHEAD,
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        Ok(self.shared.image.read().entries.range(range).map(|(_, entry)| entry.clone()).collect())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        let mut left = READ_BYTES;
        let image = self.shared.image.read();
        let entries = image.entries.range(start..end).map(|(_, entry)| entry).take_while(|entry| {
            let fits = left > 0;
            left = left.saturating_sub(size_of_entry(entry));
            fits
        });
        Ok(entries.cloned().collect())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.shared.image.read().positions.vote)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let image = self.shared.image.read();
        Ok(LogState { last_purged_log_id: image.positions.purged, last_log_id: image.last() })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.submit_and_wait(Record::Vote(*vote)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.submit(vec![Record::Committed(committed)], Done::Nobody).await
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.shared.image.read().positions.committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let records = entries.into_iter().map(Record::Append).collect();
        self.submit(records, Done::Raft(callback)).await
    }

    async fn truncate_after(&mut self, last_kept: Option<LogId>) -> Result<(), io::Error> {
        self.submit_and_wait(Record::TruncateAfter(last_kept)).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.submit_and_wait(Record::Purge(upto)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::types::{Opaque, Proposal, RequestId};
    use openraft::EntryPayload;
    use openraft::alias::{CommittedLeaderIdOf, LeaderIdOf};
    use openraft::vote::RaftLeaderId;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Vote(u8),
        Append(u8),
        Truncate(u8),
        Purge(u8),
        Commit,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            any::<u8>().prop_map(Step::Vote),
            (1..5_u8).prop_map(Step::Append),
            any::<u8>().prop_map(Step::Truncate),
            any::<u8>().prop_map(Step::Purge),
            Just(Step::Commit),
        ]
    }

    fn leader(term: u64) -> LeaderIdOf<TypeConfig> {
        LeaderIdOf::<TypeConfig>::new(term, 7.into())
    }

    fn log_id(index: u64) -> LogId {
        let leader: CommittedLeaderIdOf<TypeConfig> = leader(1).to_committed();
        LogId::new(leader, index)
    }

    /// What Raft may ask of a log in this state.
    fn records(image: &Image, step: Step) -> Vec<Record> {
        let first = image.positions.purged.map_or(0, |id| id.index + 1);
        let next = image.last().map_or(0, |id| id.index + 1);
        let pick = |by: u8| (next > first).then(|| log_id(first + u64::from(by) % (next - first)));
        let entry = |index| {
            let command = Opaque(vec![index as u8; index as usize % 50].into());
            let payload = EntryPayload::Normal(Proposal { id: RequestId::random(), command });
            Entry { log_id: log_id(index), payload }
        };
        match step {
            Step::Vote(term) => vec![Record::Vote(Vote { leader_id: leader(term.into()), committed: true })],
            Step::Append(count) => {
                (next..next + u64::from(count)).map(|i| Record::Append(entry(i))).collect()
            }
            Step::Truncate(by) => {
                pick(by).map(|kept| Record::TruncateAfter(Some(kept))).into_iter().collect()
            }
            Step::Purge(by) => pick(by).map(Record::Purge).into_iter().collect(),
            Step::Commit => vec![Record::Committed(image.last())],
        }
    }

    /// Opens the log; waits for the writer of a predecessor to end.
    fn open(dir: &Path) -> LogStore {
        loop {
            match LogStore::open(dir) {
                Err(LogError::Wal(WalError::Locked(_))) => std::thread::sleep(Duration::from_millis(1)),
                opened => return opened.unwrap(),
            }
        }
    }

    fn content(store: &LogStore) -> (Positions, Vec<u8>) {
        let image = store.shared.image.read();
        let entries: Vec<&Entry> = image.entries.values().collect();
        (image.positions.clone(), postcard::to_stdvec(&entries).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_reopened_log_is_what_it_was(steps in prop::collection::vec(step(), 0..40)) {
            let dir = tempfile::tempdir().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let store = open(dir.path());
            for step in steps {
                let records = records(&store.shared.image.read(), step);
                runtime.block_on(store.submit(records, Done::Nobody)).unwrap();
            }
            let before = content(&store);
            drop(store);
            let store = open(dir.path());
            prop_assert_eq!(content(&store), before);
            prop_assert!(store.shared.image.read().check().is_ok());
        }
    }

    #[test]
    fn purged_segments_are_removed_and_what_is_left_suffices() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let files = || std::fs::read_dir(dir.path()).unwrap().count();
        let store = open(dir.path());
        let vote = Vote { leader_id: leader(3), committed: true };
        runtime.block_on(store.submit_and_wait(Record::Vote(vote))).unwrap();
        let count = 4 * SEGMENT_BYTES / (1 << 20);
        for index in 0..count {
            let command = Opaque(vec![0; 1 << 20].into());
            let payload = EntryPayload::Normal(Proposal { id: RequestId::random(), command });
            runtime
                .block_on(store.submit_and_wait(Record::Append(Entry { log_id: log_id(index), payload })))
                .unwrap();
        }
        let before = files();
        runtime.block_on(store.submit_and_wait(Record::Purge(log_id(count - 2)))).unwrap();
        assert!(before >= 5 && files() <= 3, "{before} files, then {}", files());
        let content_before = content(&store);
        drop(store);
        let store = open(dir.path());
        assert_eq!(content(&store), content_before);
        assert_eq!(store.shared.image.read().positions.vote, Some(vote));
    }
}
