//! A lane: one stream of a link that carries all calls of one side, many of them in one packet.
//!
//! A stream for each call costs both ends several times what the call itself does; at depth it is what limits replication. So on
//! links of class Storage each side opens one stream for its calls. Frames that are made while the writer works leave together
//! in its next turn. The price is that a lost packet holds up the calls behind it, as in TCP.
//!
//! Invariants: at most [`MAX_CALLS`] calls of a side are unanswered, which bounds what queues at either end. A lane lives as long as its
//! link: whatever ends one ends the other, and fails all calls that are open on it. A frame that cannot be read is such an end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use super::peer::CloseCode;
use super::{Shared, hello};
use crate::NodeId;
use crate::rpc::frame::{Encoded, FrameError};
use crate::rpc::tagged::{self, CallNumber, Splitter};
use crate::rpc::{CallError, Caller, ErrorCode, Request, Response, RpcError};

/// Unanswered calls of one side at most; more wait at the caller.
const MAX_CALLS: usize = 1024;
/// Pieces that are taken from the stream at once.
const READ_PIECES: usize = 32;
/// How often overdue calls are looked for while there are any.
const SWEEP: Duration = Duration::from_millis(25);

/// What both tasks of an end need to write frames.
#[derive(Debug, Default)]
struct Outbox {
    frames: Mutex<Frames>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Frames {
    chunks: Vec<Bytes>,
    /// The places of answered calls, given back when their answers have been handed to QUIC.
    places: Vec<OwnedSemaphorePermit>,
}

impl Outbox {
    fn put(&self, encoded: Encoded, place: Option<OwnedSemaphorePermit>) {
        let mut frames = self.frames.lock();
        let first = frames.chunks.is_empty();
        frames.chunks.push(encoded.head);
        if !encoded.bulk.is_empty() {
            frames.chunks.push(encoded.bulk);
        }
        frames.places.extend(place);
        drop(frames);
        if first {
            self.filled.notify_one();
        }
    }

    async fn take(&self) -> Frames {
        loop {
            let frames = std::mem::take(&mut *self.frames.lock());
            if !frames.chunks.is_empty() {
                return frames;
            }
            self.filled.notified().await;
        }
    }

    /// Writes what is put in, until the stream breaks.
    async fn write_to(&self, mut stream: quinn::SendStream) -> quinn::WriteError {
        loop {
            let mut frames = self.take().await;
            if let Err(error) = stream.write_all_chunks(&mut frames.chunks).await {
                return error;
            }
        }
    }
}

/// A call that waits for its answer.
#[derive(Debug)]
struct Waiting {
    answer: oneshot::Sender<Result<Response, CallError>>,
    deadline: Instant,
}

#[derive(Debug, Default)]
struct Calls {
    next: u64,
    waiting: HashMap<u64, Waiting>,
    /// Why there can be no more calls.
    ended: Option<String>,
}

/// The calling side of a lane.
#[derive(Debug)]
pub(super) struct Lane {
    outbox: Outbox,
    calls: Mutex<Calls>,
    places: Semaphore,
    /// Told when there is a call whose deadline must be watched.
    watch: Notify,
}

impl Lane {
    /// Opens a lane on a connection; calls may be made at once.
    pub(super) fn open(shared: &Arc<Shared>, connection: &quinn::Connection) -> Arc<Self> {
        let lane = Arc::new(Self {
            outbox: Outbox::default(),
            calls: Mutex::default(),
            places: Semaphore::new(MAX_CALLS),
            watch: Notify::new(),
        });
        shared.tasks.spawn(lane.clone().run(connection.clone()));
        lane
    }

    async fn run(self: Arc<Self>, connection: quinn::Connection) {
        let ended = tokio::select! {
            ended = self.carry(&connection) => ended,
            reason = connection.closed() => reason.to_string(),
            () = self.sweep() => String::new(),
        };
        // The link is of no use without its lane; the dialler makes another.
        connection.close(CloseCode::BrokenLane.into(), b"the lane broke");
        let waiting = {
            let mut calls = self.calls.lock();
            calls.ended = Some(ended.clone());
            std::mem::take(&mut calls.waiting)
        };
        for call in waiting.into_values() {
            // A caller that has gone needs no answer.
            let _ = call.answer.send(Err(CallError::Reset(ended.clone())));
        }
    }

    /// Writes requests and reads answers until the stream breaks.
    async fn carry(&self, connection: &quinn::Connection) -> String {
        let (send, receive) = match connection.open_bi().await {
            Ok(streams) => streams,
            Err(error) => return error.to_string(),
        };
        tokio::select! {
            error = self.outbox.write_to(send) => error.to_string(),
            error = self.read(receive) => error.to_string(),
        }
    }

    async fn read(&self, mut stream: quinn::RecvStream) -> LaneError {
        let mut splitter = Splitter::responses();
        loop {
            if let Err(error) = receive(&mut stream, &mut splitter).await {
                return error;
            }
            loop {
                match splitter.next_response() {
                    Ok(Some((number, answer))) => {
                        let waiting = self.calls.lock().waiting.remove(&number.0);
                        // The caller of a number that is not waiting has given up.
                        if let Some(call) = waiting {
                            let _ = call.answer.send(answer.map_err(CallError::Remote));
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return error.into(),
                }
            }
        }
    }

    /// Fails calls that are overdue: one timer for all.
    async fn sweep(&self) {
        loop {
            if self.calls.lock().waiting.is_empty() {
                self.watch.notified().await;
            }
            tokio::time::sleep(SWEEP).await;
            let now = Instant::now();
            let overdue: Vec<Waiting> = {
                let mut calls = self.calls.lock();
                calls.waiting.extract_if(|_, call| call.deadline <= now).map(|(_, call)| call).collect()
            };
            for call in overdue {
                let _ = call.answer.send(Err(CallError::Timeout));
            }
        }
    }

    /// Calls the other end.
    pub(super) async fn call(&self, request: &Request, deadline: Duration) -> Result<Response, CallError> {
        let deadline = Instant::now() + deadline;
        let place = match self.places.try_acquire() {
            Ok(place) => place,
            Err(_) => tokio::time::timeout_at(deadline.into(), self.places.acquire())
                .await
                .map_err(|_| CallError::Timeout)?
                .map_err(|_| CallError::Reset("the lane ended".to_owned()))?,
        };
        let (answer, answered) = oneshot::channel();
        let number = {
            let mut calls = self.calls.lock();
            if let Some(reason) = &calls.ended {
                return Err(CallError::Reset(reason.clone()));
            }
            let number = calls.next;
            let encoded = tagged::encode_request(CallNumber(number), request)
                .map_err(|e| CallError::Invalid(e.to_string()))?;
            calls.next += 1;
            if calls.waiting.is_empty() {
                self.watch.notify_one();
            }
            calls.waiting.insert(number, Waiting { answer, deadline });
            // Under the lock, so that frames leave in the order of their numbers.
            self.outbox.put(encoded, None);
            number
        };
        let forgotten = Forget { lane: self, number };
        let answer = answered.await;
        drop(forgotten);
        drop(place);
        answer.unwrap_or_else(|_| Err(CallError::Reset("the lane ended".to_owned())))
    }
}

/// Forgets a call whose caller gave up.
struct Forget<'a> {
    lane: &'a Lane,
    number: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.lane.calls.lock().waiting.remove(&self.number);
    }
}

/// Why a lane ended.
#[derive(Debug, thiserror::Error)]
enum LaneError {
    #[error("the other side ended the lane")]
    Ended,
    #[error(transparent)]
    Read(#[from] quinn::ReadError),
    #[error(transparent)]
    Write(#[from] quinn::WriteError),
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Waits for more of a stream.
async fn receive(stream: &mut quinn::RecvStream, splitter: &mut Splitter) -> Result<(), LaneError> {
    let mut pieces = [const { Bytes::new() }; READ_PIECES];
    let count = stream.read_chunks(&mut pieces).await?.ok_or(LaneError::Ended)?;
    pieces.into_iter().take(count).for_each(|piece| splitter.push(piece));
    Ok(())
}

/// Serves the calls that a peer makes on its lane.
pub(super) async fn serve(
    shared: Arc<Shared>,
    node: NodeId,
    connection: quinn::Connection,
    (send, receive): (quinn::SendStream, quinn::RecvStream),
) {
    let outbox = Arc::new(Outbox::default());
    let ended = tokio::select! {
        error = outbox.write_to(send) => LaneError::from(error),
        error = serve_requests(&shared, node, receive, &outbox) => error,
        () = shared.shutdown.cancelled() => return,
    };
    if matches!(ended, LaneError::Frame(_)) {
        shared.counters.malformed.count();
    }
    tracing::debug!(class = %shared.config.class, peer = %node, error = %ended, "a peer's lane ended");
    connection.close(CloseCode::BrokenLane.into(), b"the lane broke");
}

async fn serve_requests(
    shared: &Arc<Shared>,
    node: NodeId,
    mut stream: quinn::RecvStream,
    outbox: &Arc<Outbox>,
) -> LaneError {
    let places = Arc::new(Semaphore::new(MAX_CALLS));
    let mut splitter = Splitter::requests();
    loop {
        if let Err(error) = receive(&mut stream, &mut splitter).await {
            return error;
        }
        loop {
            let (number, request) = match splitter.next_request() {
                Ok(Some(call)) => call,
                Ok(None) => break,
                Err(error) => return error.into(),
            };
            if request.method == hello::METHOD {
                return FrameError::Status.into();
            }
            let Ok(place) = places.clone().acquire_owned().await else { return LaneError::Ended };
            // A task of its own: what the handler has begun it must finish, whatever becomes of the lane.
            shared.tasks.spawn(answer(shared.clone(), node, number, request, outbox.clone(), place));
        }
    }
}

async fn answer(
    shared: Arc<Shared>,
    node: NodeId,
    number: CallNumber,
    request: Request,
    outbox: Arc<Outbox>,
    place: OwnedSemaphorePermit,
) {
    let mut pending = Pending { number, outbox, place: Some(place) };
    let result = tokio::select! {
        biased;
        result = shared.handler.handle(Caller::Node(node), request) => result,
        () = shared.shutdown.cancelled() => Err(RpcError::new(ErrorCode::Unavailable, "this process is ending")),
    };
    pending.answer(&result);
}

/// A call that is being handled. A handler that panics answers with an error.
struct Pending {
    number: CallNumber,
    outbox: Arc<Outbox>,
    place: Option<OwnedSemaphorePermit>,
}

impl Pending {
    fn answer(&mut self, result: &Result<Response, RpcError>) {
        let Some(place) = self.place.take() else { return };
        let too_large = |e: FrameError| {
            let error = RpcError::new(ErrorCode::Internal, format!("the answer cannot be sent: {e}"));
            tagged::encode_response(self.number, &Err(error))
        };
        match tagged::encode_response(self.number, result).or_else(too_large) {
            Ok(encoded) => self.outbox.put(encoded, Some(place)),
            Err(error) => tracing::warn!(%error, "an answer cannot be sent"),
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.answer(&Err(RpcError::new(ErrorCode::Internal, "the call's handler failed")));
    }
}
