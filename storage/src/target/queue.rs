//! One virtqueue: takes requests, gives them to the device, puts answers into the ring.
//!
//! One task of the device's runtime works a queue: it takes requests in batches and gives them to the device, which works on the same
//! thread. Answers may come on any thread; they gather and the task publishes them in its next turn, with one notification for all. While
//! the runtime polls (see [`crate::poll`]) and the guest is busy, the task looks at the ring in each turn and the guest does not kick;
//! before it sleeps it asks for a kick.
//!
//! Locks, in their order: the answers' list; the ring (the crate's lock, which also orders the record's stores). Neither is held while
//! the device is called.

use super::connection::Shared;
use super::inflight::RingState;
use super::request::{self, Action, DescriptorTable, Limits, Malformed, Reply, Status};
use crate::device::{BlockError, BlockOp};
use bytes::Bytes;
use netfabric::dirty_log::LoggedMemory;
use parking_lot::{Condvar, Mutex};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryAtomic};
use vmm_sys_util::event::EventConsumer;

/// Requests taken before answers are published.
const BATCH: usize = 32;
/// Bytes of data in the requests of one guest in flight, beyond which no more are taken.
const MAX_INFLIGHT_BYTES: u64 = 64 << 20;
/// How long a guest's queue is looked at in each turn after its last request.
const BUSY: Duration = Duration::from_micros(500);

/// A ring, as the crate has it.
pub(super) type Ring = VringMutex<GuestMemoryAtomic<LoggedMemory>>;

/// An answer that waits for its place in the ring.
struct Answer {
    head: u16,
    reply: Reply,
    status: Status,
    data: Bytes,
}

/// A ring that the front end has started, and the event by which the guest kicks it.
struct Started {
    ring: Ring,
    kick: OwnedFd,
}

/// Whether requests are taken from the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// The front end has not started the ring, or has stopped it.
    Stopped,
    /// Requests are taken.
    Running,
    /// The guest broke the rules; nothing is taken until the ring is started again.
    Broken,
}

/// See the module.
pub(super) struct Queue {
    index: usize,
    shared: Arc<Shared>,
    stage: Mutex<Stage>,
    answers: Mutex<Vec<Answer>>,
    /// Requests taken and not answered.
    unanswered: Mutex<usize>,
    answered: Condvar,
    /// No more requests are taken until one is answered.
    stalled: AtomicBool,
    /// Lets the task look again.
    waker: Notify,
    /// A ring that the task does not know of yet.
    started: Mutex<Option<Started>>,
}

impl Queue {
    pub(super) fn new(index: usize, shared: Arc<Shared>) -> Self {
        Self {
            index,
            shared,
            stage: Mutex::new(Stage::Stopped),
            answers: Mutex::default(),
            unanswered: Mutex::new(0),
            answered: Condvar::new(),
            stalled: AtomicBool::new(false),
            waker: Notify::new(),
            started: Mutex::new(None),
        }
    }

    /// Makes the task look at the queue again.
    pub(super) fn wake(&self) {
        self.waker.notify_one();
    }

    /// The connection is closed: ends the task, and whoever waits for answers.
    pub(super) fn end(&self) {
        self.wake();
        let _in_order = self.unanswered.lock();
        self.answered.notify_all();
    }

    /// The front end has started the ring: the task takes over its kicks.
    pub(super) fn adopt(&self, ring: &Ring) -> std::io::Result<()> {
        let kick = ring.get_ref().get_kick().as_ref().map(EventConsumer::try_clone).transpose()?;
        if let Some(kick) = kick {
            // SAFETY: the descriptor is open, and the event gives up its ownership here.
            let kick = unsafe { OwnedFd::from_raw_fd(kick.into_raw_fd()) };
            *self.started.lock() = Some(Started { ring: ring.clone(), kick });
        }
        self.wake();
        Ok(())
    }

    /// Works the queue until the connection is closed.
    pub(super) async fn work(self: Arc<Self>) {
        let mut current: Option<(Ring, AsyncFd<OwnedFd>)> = None;
        let mut last_taken = Instant::now();
        while !self.shared.is_closed() {
            let started = self.started.lock().take();
            if let Some(Started { ring, kick }) = started {
                // SAFETY: an `OwnedFd` is open, and the same, for as long as it lives, which is in the `AsyncFd`.
                match unsafe { AsyncFd::register(kick) } {
                    Ok(kick) => current = Some((ring, kick)),
                    Err(error) => {
                        tracing::error!(queue = self.index, %error, "a ring's kicks cannot be watched")
                    }
                }
            }
            let Some((ring, kick)) = &current else {
                self.waker.notified().await;
                continue;
            };
            if self.process(ring) {
                last_taken = Instant::now();
                self.shared.poll.note();
            }
            if self.shared.poll.is_awake() && last_taken.elapsed() < BUSY {
                tokio::task::yield_now().await;
                continue;
            }
            if self.ask_for_kick(ring) {
                continue;
            }
            tokio::select! {
                // Events of tokio come with each kick: nothing needs to be read.
                ready = kick.readable() => if let Ok(mut ready) = ready { ready.clear_ready() },
                () = self.waker.notified() => {}
            }
        }
    }

    /// Takes what the guest made available and publishes what was answered. Tells whether there was anything.
    fn process(self: &Arc<Self>, ring: &Ring) -> bool {
        let mut any = self.publish(ring);
        self.shared.outstanding.enter();
        while self.take_batch(ring) {
            any = true;
            // Those that the device answered at once.
            self.publish(ring);
        }
        self.shared.outstanding.leave();
        any
    }

    /// Asks the guest to kick for its next request. True if there is one already.
    fn ask_for_kick(&self, ring: &Ring) -> bool {
        let mut state = ring.get_mut();
        if !state.get_queue().ready() || !state.is_enabled() || *self.stage.lock() != Stage::Running {
            return false;
        }
        if self.over_budget() {
            return false;
        }
        match state.enable_notification() {
            Ok(more) => more,
            Err(error) => {
                self.broken(&mut self.stage.lock(), &error.to_string());
                false
            }
        }
    }

    /// Takes some requests and gives them to the device; false when there was none.
    fn take_batch(self: &Arc<Self>, ring: &Ring) -> bool {
        let memory = self.shared.memory();
        let mut heads = Vec::new();
        let table;
        {
            let mut state = ring.get_mut();
            if !state.get_queue().ready() || !state.is_enabled() || self.shared.is_closed() {
                return false;
            }
            let mut stage = self.stage.lock();
            match *stage {
                Stage::Broken => return false,
                Stage::Running => {}
                Stage::Stopped => match self.start(&mut state, &memory) {
                    Ok(unfinished) => {
                        *stage = Stage::Running;
                        heads = unfinished;
                        self.stalled.store(false, Ordering::SeqCst);
                    }
                    Err(why) => {
                        *stage = Stage::Broken;
                        tracing::warn!(queue = self.index, why, "ring cannot be used");
                        return false;
                    }
                },
            }
            table = DescriptorTable {
                address: GuestAddress(state.get_queue().desc_table()),
                size: state.get_queue().size(),
            };
            let resumed = heads.len();
            while heads.len() - resumed < BATCH {
                if self.over_budget() {
                    break;
                }
                // Looked up anew each time: the ring's lock is held, and so nobody else takes from it.
                let next = state.get_queue_mut().iter(&*memory).map(|mut chains| chains.next());
                match next {
                    Ok(Some(chain)) if self.shared.record.taken(self.index, chain.head_index()) => {
                        heads.push(chain.head_index());
                    }
                    Ok(Some(chain)) => {
                        self.broken(
                            &mut stage,
                            &format!("head {} is no free descriptor", chain.head_index()),
                        );
                        break;
                    }
                    Ok(None) => break,
                    Err(error) => {
                        self.broken(&mut stage, &error.to_string());
                        break;
                    }
                }
            }
            *self.unanswered.lock() += heads.len();
        }
        let any = !heads.is_empty();
        for head in heads {
            self.submit(&memory, table, head);
        }
        any
    }

    fn broken(&self, stage: &mut Stage, why: &str) {
        tracing::warn!(queue = self.index, why, "the guest broke the ring; it is stopped");
        *stage = Stage::Broken;
    }

    /// Whether to wait for answers before more is taken; if so, the next answer wakes the task.
    fn over_budget(&self) -> bool {
        if self.shared.inflight_bytes.load(Ordering::SeqCst) < MAX_INFLIGHT_BYTES {
            return false;
        }
        self.stalled.store(true, Ordering::SeqCst);
        // An answer between the two looks may have missed the flag. Without any to come the queue must go on.
        *self.unanswered.lock() > 0
    }

    /// Finds out where the ring stands; returns what is to be submitted again.
    fn start(
        &self,
        state: &mut VringState<GuestMemoryAtomic<LoggedMemory>>,
        memory: &LoggedMemory,
    ) -> Result<Vec<u16>, String> {
        use std::sync::atomic::Ordering::Acquire;
        if !state.get_queue().is_valid(memory) {
            return Err("the rings lie outside of memory".to_owned());
        }
        let queue = state.get_queue_mut();
        let used = queue.used_idx(memory, Acquire).map_err(|e| e.to_string())?.0;
        let avail = queue.avail_idx(memory, Acquire).map_err(|e| e.to_string())?.0;
        let ring = RingState { size: queue.size(), used, avail };
        self.shared.check_memory_identity();
        queue.set_next_used(used);
        match self.shared.record.recover(self.index, ring) {
            Some(unfinished) => {
                queue.set_next_avail(used.wrapping_add(unfinished.len() as u16));
                if !unfinished.is_empty() {
                    tracing::info!(
                        queue = self.index,
                        requests = unfinished.len(),
                        "submitting unfinished requests again"
                    );
                }
                // The last interrupt may have been lost with the process that owed it.
                state.signal_used_queue().map_err(|e| e.to_string())?;
                Ok(unfinished)
            }
            None => {
                // The front end knows where a ring that is new to us stands.
                self.shared.record.activate(self.index, ring);
                Ok(Vec::new())
            }
        }
    }

    fn submit(self: &Arc<Self>, memory: &LoggedMemory, table: DescriptorTable, head: u16) {
        let limits = Limits { size: self.shared.device.size(), access: self.shared.access };
        let (action, reply) = match request::parse(memory, table, head, limits) {
            Ok(parsed) => parsed,
            Err(malformed) => return self.malformed(head, malformed),
        };
        let answer = |status, data| Answer { head, reply: reply.clone(), status, data };
        match action {
            Action::Refuse(status) => self.answer(answer(status, Bytes::new())),
            Action::Serial => self.answer(answer(Status::Ok, Bytes::copy_from_slice(&self.shared.serial))),
            Action::Submit(op) => {
                let bytes = match &op {
                    BlockOp::Write { data, .. } => data.len() as u64,
                    _ => reply.capacity(),
                };
                let ticket = Ticket::new(Arc::clone(self), bytes);
                let done = move |result| ticket.finish(head, reply, result);
                self.shared.device.submit(op, Box::new(done));
            }
        }
    }

    fn malformed(&self, head: u16, malformed: Malformed) {
        self.broken(&mut self.stage.lock(), &format!("head {head}: {malformed}"));
        // It will never be answered. In the record it stays, as it stays with the guest, until the guest resets the ring.
        *self.unanswered.lock() -= 1;
        self.answered.notify_all();
    }

    /// Adds an answer to those that wait; the task publishes them in its next turn.
    fn answer(&self, answer: Answer) {
        let mut answers = self.answers.lock();
        answers.push(answer);
        let first = answers.len() == 1;
        drop(answers);
        if first {
            self.wake();
        }
    }

    /// Puts answers into the ring. Tells whether there were any.
    fn publish(&self, ring: &Ring) -> bool {
        let batch = std::mem::take(&mut *self.answers.lock());
        let count = batch.len();
        if count == 0 {
            return false;
        }
        if let Err(error) = self.publish_batch(ring, batch) {
            self.broken(&mut self.stage.lock(), &error.to_string());
        }
        *self.unanswered.lock() -= count;
        self.answered.notify_all();
        if self.stalled.swap(false, Ordering::SeqCst) {
            self.wake();
        }
        true
    }

    fn publish_batch(&self, ring: &Ring, batch: Vec<Answer>) -> Result<(), virtio_queue::Error> {
        if self.shared.is_closed() {
            // The rings may belong to another connection by now; the record still has these requests.
            return Ok(());
        }
        let memory = self.shared.memory();
        let lengths: Vec<(u16, u32)> = batch
            .into_iter()
            .map(|answer| (answer.head, answer.reply.write(&*memory, answer.status, &answer.data)))
            .collect();
        let mut state = ring.get_mut();
        for (head, length) in lengths {
            self.shared.record.complete(self.index, head, || {
                state.add_used(head, length)?;
                Ok::<_, virtio_queue::Error>(state.get_queue().next_used())
            })?;
        }
        if state.needs_notification()?
            && let Err(error) = state.signal_used_queue()
        {
            tracing::debug!(queue = self.index, %error, "the guest could not be notified");
        }
        Ok(())
    }

    /// Waits until all requests taken are answered, then forgets the ring. The front end has stopped it.
    pub(super) fn drain(&self, limit: Duration) -> Result<(), Duration> {
        let deadline = Instant::now() + limit;
        let mut unanswered = self.unanswered.lock();
        while *unanswered > 0 && !self.shared.is_closed() {
            if self.answered.wait_until(&mut unanswered, deadline).timed_out() && *unanswered > 0 {
                return Err(limit);
            }
        }
        drop(unanswered);
        *self.stage.lock() = Stage::Stopped;
        self.shared.record.clear(self.index);
        Ok(())
    }
}

/// A request in the device's hands. Dropped without a result (the device was closed), the request stays in flight in the
/// record, for the next one to submit.
struct Ticket {
    queue: Arc<Queue>,
    bytes: u64,
}

impl Ticket {
    fn new(queue: Arc<Queue>, bytes: u64) -> Self {
        queue.shared.inflight_bytes.fetch_add(bytes, Ordering::SeqCst);
        queue.shared.outstanding.enter();
        Self { queue, bytes }
    }

    fn finish(self, head: u16, reply: Reply, result: Result<Bytes, BlockError>) {
        let (status, data) = match result {
            Err(BlockError::Closed) => return,
            Ok(data) => (Status::Ok, data),
            Err(error) => {
                tracing::warn!(queue = self.queue.index, %error, "a guest's request failed");
                (Status::from(&error), Bytes::new())
            }
        };
        self.queue.answer(Answer { head, reply, status, data });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.queue.shared.inflight_bytes.fetch_sub(self.bytes, Ordering::SeqCst);
        self.queue.shared.outstanding.leave();
    }
}
