//! Guests' serial consoles, wherever the guest runs.
//!
//! A VMM serves its guest's console on a socket: a client gets the last output first and then what follows. On the
//! guest's node [`attach`] is a connection to that socket; elsewhere it is a session there ([`super::peers`]), pumped
//! by a task that lives as long as the stream that is handed out.

use std::{
    collections::BTreeMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use netfabric::rpc::{ErrorCode, RpcError};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};
use uuid::Uuid;

use super::{
    cluster::Cluster,
    peers::{
        CONSOLE_WAIT, CloseConsole, ConsoleFlow, ConsoleId, OpenConsole, ReadConsole, WriteConsole, call,
    },
};
use crate::{
    paths::NodePaths,
    state::{NodeId, VmId},
};

/// A session that nobody reads from ends after this.
const SESSION_IDLE: Duration = Duration::from_secs(60);
/// Sessions at a time.
const MAX_SESSIONS: usize = 64;
/// Output handed over at a time.
const READ_SIZE: usize = 64 << 10;
/// Typing into a guest that does not read fails after this.
const WRITE_DEADLINE: Duration = Duration::from_secs(5);
/// How long the first piece of another node's guest may take: a few calls.
const LOG_FIRST: Duration = Duration::from_secs(2);
/// When nothing came for this long, the last output has been sent whole.
const LOG_QUIET: Duration = Duration::from_millis(200);
/// More than a VMM keeps of a guest's output.
const LOG_LIMIT: usize = 1 << 20;
/// How long a log is read: a guest that prints all the time has no last output.
const LOG_LONGEST: Duration = Duration::from_secs(1);

/// A console as a stream of bytes, both ways.
pub trait Console: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Console for T {}

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The VM's VMM does not serve it.
    #[error("the VM does not run")]
    NotRunning(#[source] io::Error),
    /// The VM's node does not answer or refuses.
    #[error("the console cannot be reached")]
    Remote(#[from] netfabric::rpc::CallError),
}

/// Attaches to the console of a VM that runs on `node`.
pub async fn attach(
    cluster: Arc<dyn Cluster>,
    paths: &NodePaths,
    me: NodeId,
    node: NodeId,
    vm: VmId,
) -> Result<Box<dyn Console>, ConsoleError> {
    if node == me {
        let stream = UnixStream::connect(paths.vm(vm).console()).await.map_err(ConsoleError::NotRunning)?;
        return Ok(Box::new(stream));
    }
    let (console, _) = call(cluster.as_ref(), node, &OpenConsole { vm }, Bytes::new()).await?;
    let (ours, theirs) = tokio::io::duplex(READ_SIZE);
    tokio::spawn(pump(cluster, node, console, theirs));
    Ok(Box::new(ours))
}

/// The last output of a VM that runs on `node`.
pub async fn log(
    cluster: Arc<dyn Cluster>,
    paths: &NodePaths,
    me: NodeId,
    node: NodeId,
    vm: VmId,
) -> Result<Bytes, ConsoleError> {
    let mut console = attach(cluster, paths, me, node, vm).await?;
    let mut output = Vec::new();
    let mut piece = vec![0; READ_SIZE];
    // The first piece may have to come from another node; a guest that was silent so far sends none.
    let mut patience = if node == me { LOG_QUIET } else { LOG_FIRST };
    let mut ends = None;
    while output.len() < LOG_LIMIT && ends.is_none_or(|ends| Instant::now() < ends) {
        match timeout(patience, console.read(&mut piece)).await {
            Ok(Ok(read @ 1..)) => output.extend_from_slice(&piece[..read]),
            Ok(_) | Err(_) => break,
        }
        patience = LOG_QUIET;
        ends.get_or_insert_with(|| Instant::now() + LOG_LONGEST);
    }
    Ok(output.into())
}

/// Moves bytes between a stream and a session on another node until one of them ends.
async fn pump(cluster: Arc<dyn Cluster>, node: NodeId, console: ConsoleId, stream: DuplexStream) {
    let (from_client, to_client) = tokio::io::split(stream);
    tokio::select! {
        () = pump_output(cluster.as_ref(), node, console, to_client) => {}
        () = pump_input(cluster.as_ref(), node, console, from_client) => {}
    }
    // Best effort: a session that nobody reads from ends by itself.
    let _ = call(cluster.as_ref(), node, &CloseConsole { console }, Bytes::new()).await;
}

async fn pump_output(
    cluster: &dyn Cluster,
    node: NodeId,
    console: ConsoleId,
    mut to_client: WriteHalf<DuplexStream>,
) {
    while let Ok((flow, output)) = call(cluster, node, &ReadConsole { console }, Bytes::new()).await {
        if to_client.write_all(&output).await.is_err() || flow == ConsoleFlow::Ended {
            return;
        }
    }
}

async fn pump_input(
    cluster: &dyn Cluster,
    node: NodeId,
    console: ConsoleId,
    mut from_client: ReadHalf<DuplexStream>,
) {
    let mut typed = vec![0; READ_SIZE];
    while let Ok(read @ 1..) = from_client.read(&mut typed).await {
        let input = Bytes::copy_from_slice(&typed[..read]);
        if call(cluster, node, &WriteConsole { console }, input).await.is_err() {
            return;
        }
    }
}

/// Consoles of VMs here that are attached from other nodes.
pub(super) struct Sessions {
    paths: NodePaths,
    open: Mutex<BTreeMap<ConsoleId, Arc<Session>>>,
}

struct Session {
    output: tokio::sync::Mutex<OwnedReadHalf>,
    input: tokio::sync::Mutex<OwnedWriteHalf>,
    used: Mutex<Instant>,
}

impl Sessions {
    pub(super) fn new(paths: NodePaths) -> Self {
        Self { paths, open: Mutex::default() }
    }

    pub(super) async fn open(&self, vm: VmId) -> Result<ConsoleId, RpcError> {
        let stream = UnixStream::connect(self.paths.vm(vm).console()).await;
        let stream = stream.map_err(|error| {
            RpcError::new(ErrorCode::NotFound, format!("VM {vm} does not run on this node: {error}"))
        })?;
        let (output, input) = stream.into_split();
        let session = Session {
            output: tokio::sync::Mutex::new(output),
            input: tokio::sync::Mutex::new(input),
            used: Mutex::new(Instant::now()),
        };
        let mut open = self.open.lock();
        open.retain(|_, session| session.used.lock().elapsed() < SESSION_IDLE);
        if open.len() >= MAX_SESSIONS {
            return Err(RpcError::new(ErrorCode::Unavailable, "too many consoles are attached"));
        }
        let id = ConsoleId(Uuid::new_v4());
        open.insert(id, Arc::new(session));
        Ok(id)
    }

    fn session(&self, console: ConsoleId) -> Result<Arc<Session>, RpcError> {
        let session = self.open.lock().get(&console).cloned();
        let session =
            session.ok_or_else(|| RpcError::new(ErrorCode::NotFound, "this console was detached"))?;
        *session.used.lock() = Instant::now();
        Ok(session)
    }

    pub(super) async fn read(&self, console: ConsoleId) -> Result<(ConsoleFlow, Bytes), RpcError> {
        let session = self.session(console)?;
        let mut output = session.output.lock().await;
        let mut piece = vec![0; READ_SIZE];
        match timeout(CONSOLE_WAIT, output.read(&mut piece)).await {
            Err(_) => Ok((ConsoleFlow::Open, Bytes::new())),
            Ok(Ok(read @ 1..)) => {
                piece.truncate(read);
                Ok((ConsoleFlow::Open, piece.into()))
            }
            Ok(_) => {
                self.close(console);
                Ok((ConsoleFlow::Ended, Bytes::new()))
            }
        }
    }

    pub(super) async fn write(&self, console: ConsoleId, input: &[u8]) -> Result<(), RpcError> {
        let session = self.session(console)?;
        let mut sink = session.input.lock().await;
        match timeout(WRITE_DEADLINE, sink.write_all(input)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(RpcError::new(ErrorCode::Internal, error.to_string())),
            Err(_) => Err(RpcError::new(ErrorCode::Unavailable, "the guest does not read its console")),
        }
    }

    pub(super) fn close(&self, console: ConsoleId) {
        self.open.lock().remove(&console);
    }
}
