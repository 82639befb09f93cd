//! What peers start: connections, calls and datagrams.
//!
//! Everything here is outside input. A connection that fails its handshake, a stream that is not a request, a peer
//! that is too slow: each ends in an error for that stream or connection.

use std::sync::Arc;

use tokio::time::timeout;

use super::config::{Admission, Class, HANDSHAKE_TIMEOUT, TRANSFER_DEADLINE};
use super::hello::{self, Hello, HelloError, ReadFrameError};
use super::lane;
use super::peer::{self, CloseCode, Link};
use super::{Shared, tls};
use crate::NodeId;
use crate::rpc::Caller;
use crate::rpc::frame::{self, Assembler, FrameError};

/// Handshakes at the same time; more are refused, so that a flood costs the attacker and not our memory.
const MAX_HANDSHAKES: usize = 256;
/// Sent when a stream is given up because it is not a valid request.
const MALFORMED: quinn::VarInt = quinn::VarInt::from_u32(1);
/// Sent when a stream is given up because this process ends.
const ENDING: quinn::VarInt = quinn::VarInt::from_u32(2);

/// Accepts connections until the mesh closes.
pub(super) async fn accept_connections(shared: Arc<Shared>) {
    let handshakes = Arc::new(tokio::sync::Semaphore::new(MAX_HANDSHAKES));
    loop {
        let incoming = tokio::select! {
            () = shared.shutdown.cancelled() => return,
            incoming = shared.endpoint.accept() => incoming,
        };
        let Some(incoming) = incoming else { return };
        let Ok(slot) = handshakes.clone().try_acquire_owned() else {
            shared.counters.refused.count();
            incoming.refuse();
            continue;
        };
        let shared = shared.clone();
        shared.tasks.clone().spawn(async move {
            let from = incoming.remote_address();
            let accepted = timeout(HANDSHAKE_TIMEOUT, accept_one(&shared, incoming)).await;
            if let Err(reason) = accepted.unwrap_or_else(|_| Err("handshake took too long".to_owned())) {
                shared.counters.refused.count();
                tracing::debug!(class = %shared.config.class, %from, reason, "refused a connection");
            }
            drop(slot);
        });
    }
}

async fn accept_one(shared: &Arc<Shared>, incoming: quinn::Incoming) -> Result<(), String> {
    let connection = incoming.await.map_err(|e| e.to_string())?;
    let refuse = |code: CloseCode, reason: String| {
        connection.close(code.into(), reason.as_bytes());
        reason
    };
    let node = match tls::peer_of(&connection) {
        Some(node) if node != shared.node => node,
        _ => return Err(refuse(CloseCode::NotAPeer, "the certificate names no other node".to_owned())),
    };
    if shared.config.admission == Admission::Peers && !shared.peers.read().contains_key(&node) {
        return Err(refuse(CloseCode::NotAPeer, format!("{node} is not a peer")));
    }
    let greeted = async {
        let (theirs, stream) = Hello::listen(&connection).await?;
        shared.hello.answer(stream).await?;
        Ok::<_, HelloError>(theirs)
    };
    let hello = greeted.await.map_err(|e| refuse(CloseCode::BadHello, e.to_string()))?;
    let link = Link { connection: connection.clone(), dialer: node, instance: hello.instance, lane: None };
    peer::adopt_incoming(shared, node, link);
    Ok(())
}

/// Starts to serve what the peer sends on a connection.
pub(super) fn start(shared: &Arc<Shared>, node: NodeId, connection: &quinn::Connection) {
    shared.tasks.spawn(serve_calls(shared.clone(), node, connection.clone()));
    if shared.config.class == Class::Frames {
        shared.tasks.spawn(receive_datagrams(shared.clone(), node, connection.clone()));
    }
}

async fn serve_calls(shared: Arc<Shared>, node: NodeId, connection: quinn::Connection) {
    // Ends with the connection; how many streams are open at a time is bounded by the transport settings.
    while let Ok((send, receive)) = connection.accept_bi().await {
        let shared = shared.clone();
        if shared.config.class.has_lanes() {
            shared.tasks.clone().spawn(lane::serve(shared, node, connection.clone(), (send, receive)));
            continue;
        }
        shared.tasks.clone().spawn(async move {
            if let Err(error) = serve_call(&shared, node, send, receive).await {
                tracing::debug!(class = %shared.config.class, peer = %node, %error, "dropped a call");
            }
        });
    }
}

#[derive(Debug, thiserror::Error)]
enum CallFailure {
    #[error("not a request: {0}")]
    Malformed(#[from] FrameError),
    #[error("the request did not arrive: {0}")]
    Read(quinn::ReadError),
    #[error("the answer was not taken: {0}")]
    Write(#[from] quinn::WriteError),
    #[error("the peer was too slow")]
    Slow(#[from] tokio::time::error::Elapsed),
    #[error("this process is ending")]
    Ending,
}

impl From<ReadFrameError> for CallFailure {
    fn from(error: ReadFrameError) -> Self {
        match error {
            ReadFrameError::Frame(error) => Self::Malformed(error),
            ReadFrameError::Stream(error) => Self::Read(error),
        }
    }
}

async fn serve_call(
    shared: &Shared,
    node: NodeId,
    mut send: quinn::SendStream,
    mut receive: quinn::RecvStream,
) -> Result<(), CallFailure> {
    let read = async {
        let assembler = hello::read_frame(&mut receive, Assembler::request()).await?;
        let request = assembler.into_request()?;
        if request.method == hello::METHOD { Err(FrameError::Status.into()) } else { Ok(request) }
    };
    let request = match timeout(TRANSFER_DEADLINE, read).await.map_err(CallFailure::from).flatten() {
        Ok(request) => request,
        Err(error) => {
            if matches!(error, CallFailure::Malformed(_)) {
                shared.counters.malformed.count();
            }
            // Without this, dropping the stream would end it in order, as if that were an answer.
            let _ = send.reset(MALFORMED);
            let _ = receive.stop(MALFORMED);
            return Err(error);
        }
    };
    let answer = tokio::select! {
        answer = shared.handler.handle(Caller::Node(node), request) => answer,
        () = shared.shutdown.cancelled() => {
            let _ = send.reset(ENDING);
            return Err(CallFailure::Ending);
        }
    };
    let encoded = frame::encode_response(&answer)?;
    timeout(TRANSFER_DEADLINE, send.write_all_chunks(&mut [encoded.head, encoded.bulk])).await??;
    // Fails only if the peer reset the stream meanwhile: it no longer wants the answer.
    let _ = send.finish();
    Ok(())
}

async fn receive_datagrams(shared: Arc<Shared>, node: NodeId, connection: quinn::Connection) {
    while let Ok(data) = connection.read_datagram().await {
        // A consumer that is too slow loses frames, as behind any switch; waiting here would only move the loss.
        if shared.datagrams.try_send((node, data)).is_err() {
            shared.counters.dropped_datagrams.count();
        }
    }
}
