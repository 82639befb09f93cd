//! One virtqueue: takes requests, gives them to the device, puts answers into the ring.
//!
//! The queue's worker thread takes requests. Answers come on any thread: whoever completes first publishes for all who complete
//! meanwhile, with one notification. While the worker takes a batch, answers gather and are published at its end.
//!
//! Locks, in their order: the answers' list; the ring (the crate's lock, which also orders the record's stores). Neither is held while
//! the device is called.

use super::connection::Shared;
use super::inflight::RingState;
use super::request::{self, Action, DescriptorTable, Limits, Malformed, Reply, Status};
use crate::device::{BlockError, BlockOp};
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// Requests taken before answers are published.
const BATCH: usize = 32;
/// Bytes of data in the requests of one guest in flight, beyond which no more are taken.
const MAX_INFLIGHT_BYTES: u64 = 64 << 20;

/// An answer that waits for its place in the ring.
struct Answer {
    head: u16,
    reply: Reply,
    status: Status,
    data: Bytes,
}

#[derive(Default)]
struct Answers {
    waiting: Vec<Answer>,
    /// Somebody is publishing, or will be.
    busy: bool,
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
    answers: Mutex<Answers>,
    /// Requests taken and not answered.
    unanswered: Mutex<usize>,
    answered: Condvar,
    /// No more requests are taken until one is answered.
    stalled: AtomicBool,
    /// Ends the worker or lets it look again.
    waker: EventNotifier,
    wake_event: EventConsumer,
    ring: Mutex<Option<VringMutex>>,
}

impl Queue {
    pub(super) fn new(index: usize, shared: Arc<Shared>) -> std::io::Result<Self> {
        let (wake_event, waker) = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        Ok(Self {
            index,
            shared,
            stage: Mutex::new(Stage::Stopped),
            answers: Mutex::default(),
            unanswered: Mutex::new(0),
            answered: Condvar::new(),
            stalled: AtomicBool::new(false),
            waker,
            wake_event,
            ring: Mutex::new(None),
        })
    }

    /// The event on which the worker looks at the queue again.
    pub(super) fn wake_event(&self) -> &EventConsumer {
        &self.wake_event
    }

    /// Makes the worker look at the queue again.
    pub(super) fn wake(&self) {
        // The counter is full only if it is awake anyway.
        let _ = self.waker.notify();
    }

    /// Takes what the guest made available. Called by the worker only.
    pub(super) fn process(self: &Arc<Self>, ring: &VringMutex) {
        self.ring.lock().get_or_insert_with(|| ring.clone());
        self.shared.outstanding.enter();
        loop {
            self.answers.lock().busy = true;
            let taken = self.take_batch(ring);
            self.publish(ring);
            match taken {
                Taken::All => break,
                Taken::Some => {}
            }
        }
        self.shared.outstanding.leave();
    }

    fn take_batch(self: &Arc<Self>, ring: &VringMutex) -> Taken {
        let memory = self.shared.memory();
        let mut heads = Vec::with_capacity(BATCH);
        let table;
        let mut taken = Taken::Some;
        {
            let mut state = ring.get_mut();
            if !state.get_queue().ready() || !state.is_enabled() || self.shared.is_closed() {
                return Taken::All;
            }
            let mut stage = self.stage.lock();
            match *stage {
                Stage::Broken => return Taken::All,
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
                        return Taken::All;
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
                    taken = Taken::All;
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
                    Ok(None) => match state.enable_notification() {
                        Ok(true) => {}
                        Ok(false) => {
                            taken = Taken::All;
                            break;
                        }
                        Err(error) => {
                            self.broken(&mut stage, &error.to_string());
                            break;
                        }
                    },
                    Err(error) => {
                        self.broken(&mut stage, &error.to_string());
                        break;
                    }
                }
            }
            *self.unanswered.lock() += heads.len();
        }
        for head in heads {
            self.submit(&memory, table, head);
        }
        taken
    }

    fn broken(&self, stage: &mut Stage, why: &str) {
        tracing::warn!(queue = self.index, why, "the guest broke the ring; it is stopped");
        *stage = Stage::Broken;
    }

    /// Whether to wait for answers before more is taken; if so, the next answer wakes the worker.
    fn over_budget(&self) -> bool {
        if self.shared.inflight_bytes.load(Ordering::SeqCst) < MAX_INFLIGHT_BYTES {
            return false;
        }
        self.stalled.store(true, Ordering::SeqCst);
        // An answer between the two looks may have missed the flag. Without any to come the queue must go on.
        *self.unanswered.lock() > 0
    }

    /// Finds out where the ring stands; returns what is to be submitted again.
    fn start(&self, state: &mut VringState, memory: &GuestMemoryMmap) -> Result<Vec<u16>, String> {
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

    fn submit(self: &Arc<Self>, memory: &GuestMemoryMmap, table: DescriptorTable, head: u16) {
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

    /// Adds an answer to those that wait.
    fn answer(&self, answer: Answer) {
        self.answers.lock().waiting.push(answer);
    }

    /// Puts answers into the ring until none waits. The caller has set `busy`.
    fn publish(&self, ring: &VringMutex) {
        loop {
            let batch = {
                let mut answers = self.answers.lock();
                if answers.waiting.is_empty() {
                    answers.busy = false;
                    return;
                }
                std::mem::take(&mut answers.waiting)
            };
            let count = batch.len();
            if let Err(error) = self.publish_batch(ring, batch) {
                self.broken(&mut self.stage.lock(), &error.to_string());
            }
            *self.unanswered.lock() -= count;
            self.answered.notify_all();
            if self.stalled.swap(false, Ordering::SeqCst) {
                self.wake();
            }
        }
    }

    fn publish_batch(&self, ring: &VringMutex, batch: Vec<Answer>) -> Result<(), virtio_queue::Error> {
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
        while *unanswered > 0 {
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

enum Taken {
    /// There may be more.
    Some,
    /// There is nothing more to do now.
    All,
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
        let queue = Arc::clone(&self.queue);
        let publish = {
            let mut answers = queue.answers.lock();
            answers.waiting.push(Answer { head, reply, status, data });
            !std::mem::replace(&mut answers.busy, true)
        };
        if publish {
            let ring = queue.ring.lock().clone();
            if let Some(ring) = ring {
                queue.publish(&ring);
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.queue.shared.inflight_bytes.fetch_sub(self.bytes, Ordering::SeqCst);
        self.queue.shared.outstanding.leave();
    }
}
