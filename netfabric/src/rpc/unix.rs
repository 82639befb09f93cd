//! Calls between the processes of one node, over unix sockets.
//!
//! Who may call is decided by the socket's file permissions (0600: root and the owner).

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frame::{self, Assembler, Encoded, FrameError};
use super::{CallError, Caller, Handler, Request, Response};

/// Calls served at the same time on one socket; more wait in the listen queue.
const MAX_CONCURRENT_CALLS: usize = 256;
/// How long a caller may take to send its request, and to take its answer.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(30);
/// Bytes asked from the socket at a time.
const READ_SIZE: usize = 256 << 10;
/// Pause after a failed `accept` (out of file descriptors), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {path}")]
pub struct ServeError {
    path: String,
    source: std::io::Error,
}

#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the peer was too slow")]
    Slow(#[from] tokio::time::error::Elapsed),
}

/// Calls the process that serves the socket at `path`.
pub async fn call_unix(path: &Path, request: Request, deadline: Duration) -> Result<Response, CallError> {
    let encoded = frame::encode_request(&request).map_err(|e| CallError::Invalid(e.to_string()))?;
    let call = async {
        let mut stream = UnixStream::connect(path)
            .await
            .map_err(|e| CallError::Unreachable(format!("{} ({e})", path.display())))?;
        let exchange = async {
            write(&mut stream, &encoded).await?;
            let assembler = read(&mut stream, Assembler::response()).await?;
            Ok::<_, StreamError>(assembler.into_response()?)
        };
        exchange.await.map_err(|e| CallError::Reset(e.to_string()))?.map_err(CallError::Remote)
    };
    timeout(deadline, call).await.map_err(|_| CallError::Timeout)?
}

/// Serves calls on the socket at `path` until `shutdown`. Replaces a socket file that a killed process left behind.
pub async fn serve_unix(
    path: &Path,
    handler: Arc<dyn Handler>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let listener = bind(path).map_err(|source| ServeError { path: path.display().to_string(), source })?;
    let slots = Arc::new(Semaphore::new(MAX_CONCURRENT_CALLS));
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = async {
                // Closed never: this function owns the semaphore.
                let slot = slots.clone().acquire_owned().await.ok();
                (slot, listener.accept().await)
            } => accepted,
        };
        match accepted {
            (slot, Ok((stream, _))) => {
                let (handler, shutdown) = (handler.clone(), shutdown.clone());
                tasks.spawn(async move {
                    let _slot = slot;
                    let served = tokio::select! {
                        () = shutdown.cancelled() => return,
                        served = serve_one(stream, handler.as_ref()) => served,
                    };
                    if let Err(error) = served {
                        tracing::debug!(%error, "dropped a local call");
                    }
                });
            }
            (_, Err(error)) => {
                tracing::warn!(%error, path = %path.display(), "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
    // The socket's file stays: a successor may have put its own in this place already, and replaces ours in any case.
    Ok(())
}

fn bind(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn serve_one(mut stream: UnixStream, handler: &dyn Handler) -> Result<(), StreamError> {
    let request =
        timeout(TRANSFER_DEADLINE, read(&mut stream, Assembler::request())).await??.into_request()?;
    let answer = handler.handle(Caller::Local, request).await;
    let encoded = frame::encode_response(&answer)?;
    timeout(TRANSFER_DEADLINE, write(&mut stream, &encoded)).await??;
    Ok(())
}

async fn write(stream: &mut UnixStream, encoded: &Encoded) -> Result<(), StreamError> {
    stream.write_all(&encoded.head).await?;
    stream.write_all(&encoded.bulk).await?;
    Ok(())
}

/// Reads until one frame is complete. Unlike a QUIC stream the connection stays open for the answer, so the frame's
/// own lengths end it.
async fn read(stream: &mut UnixStream, mut assembler: Assembler) -> Result<Assembler, StreamError> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(READ_SIZE);
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(FrameError::Truncated.into());
        }
        let piece: Bytes = buffer.split().freeze();
        if assembler.push(piece)? {
            return Ok(assembler);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::{ErrorCode, MAX_BULK, RpcError};
    use futures_util::future::BoxFuture;

    /// Method 1 echoes, 2 never answers, anything else is unknown.
    struct Echo;

    impl Handler for Echo {
        fn handle(&self, from: Caller, request: Request) -> BoxFuture<'static, Result<Response, RpcError>> {
            assert_eq!(from, Caller::Local);
            Box::pin(async move {
                match request.method {
                    1 => Ok(Response { header: request.header, bulk: request.bulk }),
                    2 => std::future::pending().await,
                    other => Err(RpcError::unknown_method(other)),
                }
            })
        }
    }

    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(20);

    struct Server {
        path: std::path::PathBuf,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<Result<(), ServeError>>,
        _dir: tempfile::TempDir,
    }

    async fn server() -> Server {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.sock");
        // A socket file of a killed process must not be in the way.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let (path, stop) = (path.clone(), stop.clone());
            async move { serve_unix(&path, Arc::new(Echo), stop).await }
        });
        while call_unix(&path, Request { method: 1, ..Request::default() }, LONG).await.is_err() {
            tokio::task::yield_now().await;
        }
        Server { path, stop, task, _dir: dir }
    }

    #[tokio::test]
    async fn answers_errors_and_deadlines_reach_the_caller() {
        let server = server().await;
        let bulk = Bytes::from(vec![7; MAX_BULK]);
        let request = Request::new(1, &"hello").unwrap().with_bulk(bulk.clone());
        let response = call_unix(&server.path, request, LONG).await.unwrap();
        assert_eq!(response.decode::<String>().unwrap(), "hello");
        assert_eq!(response.bulk, bulk);

        let unknown = call_unix(&server.path, Request { method: 9, ..Request::default() }, LONG).await;
        assert!(matches!(unknown, Err(CallError::Remote(RpcError { code: ErrorCode::UnknownMethod, .. }))));
        let stuck = call_unix(&server.path, Request { method: 2, ..Request::default() }, SOON).await;
        assert_eq!(stuck, Err(CallError::Timeout));
        let too_large = Request::default().with_bulk(vec![0; MAX_BULK + 1].into());
        assert!(matches!(call_unix(&server.path, too_large, LONG).await, Err(CallError::Invalid(_))));

        server.stop.cancel();
        server.task.await.unwrap().unwrap();
        let gone = call_unix(&server.path, Request::default(), LONG).await;
        assert!(matches!(gone, Err(CallError::Unreachable(_))));
    }

    #[tokio::test]
    async fn garbage_ends_its_connection_only() {
        let server = server().await;
        for garbage in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            &[0xff; 64],
            b"hci1\x01\x00\x01\x00\xff\xff\xff\xff\xff\xff\xff\xff",
        ] {
            let mut stream = UnixStream::connect(&server.path).await.unwrap();
            stream.write_all(garbage).await.unwrap();
            let mut answer = Vec::new();
            let read = timeout(LONG, stream.read_to_end(&mut answer)).await.unwrap();
            assert!(answer.is_empty(), "{read:?}: {answer:?}");
        }
        let next = call_unix(&server.path, Request { method: 1, ..Request::default() }, LONG).await;
        assert_eq!(next, Ok(Response::default()));
        server.stop.cancel();
        server.task.await.unwrap().unwrap();
    }
}
