//! Channels into guests, wherever the guest runs: the serial console, the screen, and sockets that programs in the guest listen on.
//!
//! A VMM serves each on a socket of its own. Of the console a client gets the last output first and then what follows; the screen speaks RFB; of the
//! guest's sockets (vsock) the wanted port is named first. On the guest's node [`open`] is a connection to that socket; elsewhere it is a session there
//! ([`super::peers`]), pumped by a task that lives as long as the stream that is handed out.

use std::{
    collections::BTreeMap,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use netfabric::rpc::{ErrorCode, RpcError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
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
        CHANNEL_WAIT, ChannelFlow, ChannelId, CloseChannel, OpenChannel, ReadChannel, WriteChannel, call,
    },
};
use crate::{
    paths::{NodePaths, VmPaths},
    state::{NodeId, VmId},
};

/// A session that nobody reads from ends after this.
const SESSION_IDLE: Duration = Duration::from_secs(60);
/// Sessions at a time.
const MAX_SESSIONS: usize = 64;
/// Output handed over at a time.
const READ_SIZE: usize = 64 << 10;
/// Writing to a guest that does not read fails after this.
const WRITE_DEADLINE: Duration = Duration::from_secs(5);
/// How long the guest may take to say whether somebody listens on a port.
const GREETING_DEADLINE: Duration = Duration::from_secs(10);
/// Longer than the answer to that.
const LONGEST_ANSWER: usize = 32;
/// How long the first piece of another node's guest may take: a few calls.
const LOG_FIRST: Duration = Duration::from_secs(2);
/// When nothing came for this long, the last output has been sent whole.
const LOG_QUIET: Duration = Duration::from_millis(200);
/// More than a VMM keeps of a guest's output.
const LOG_LIMIT: usize = 1 << 20;
/// How long a log is read: a guest that prints all the time has no last output.
const LOG_LONGEST: Duration = Duration::from_secs(1);

/// Where a channel leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChannelKind {
    /// The guest's serial console.
    Console,
    /// Its screen, keyboard and pointer, by RFB (RFC 6143).
    Display,
    /// The program in the guest that listens on this port of `AF_VSOCK`.
    Port(u32),
}

impl std::fmt::Display for ChannelKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Console => f.write_str("console"),
            Self::Display => f.write_str("display"),
            Self::Port(port) => write!(f, "port {port}"),
        }
    }
}

/// A channel as a stream of bytes, both ways.
pub trait Channel: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Channel for T {}

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The VM's VMM does not serve it.
    #[error("the VM does not run, or has no {0}")]
    NotServed(ChannelKind, #[source] io::Error),
    /// Nobody in the guest listens.
    #[error("nobody listens on port {0} of the guest's AF_VSOCK")]
    NobodyListens(u32),
    /// The VM's node does not answer or refuses.
    #[error("the VM's node does not open it: {0}")]
    Remote(#[from] netfabric::rpc::CallError),
}

/// Opens a channel into the guest of a VM that runs here.
async fn open_here(paths: &VmPaths, kind: ChannelKind) -> Result<UnixStream, ChannelError> {
    let socket = match kind {
        ChannelKind::Console => paths.console(),
        ChannelKind::Display => paths.display(),
        ChannelKind::Port(_) => paths.vsock(),
    };
    let connected = UnixStream::connect(socket).await;
    let mut stream = connected.map_err(|error| ChannelError::NotServed(kind, error))?;
    if let ChannelKind::Port(port) = kind {
        let greeted = timeout(GREETING_DEADLINE, greet(&mut stream, port)).await;
        if !matches!(greeted, Ok(Ok(()))) {
            return Err(ChannelError::NobodyListens(port));
        }
    }
    Ok(stream)
}

/// Names the port that is meant, and waits for the answer; not a byte more is taken than that.
async fn greet(stream: &mut UnixStream, port: u32) -> io::Result<()> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') && answer.len() < LONGEST_ANSWER {
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK ") { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Opens a channel into the guest of a VM that runs on `node`.
pub async fn open(
    cluster: Arc<dyn Cluster>,
    paths: &NodePaths,
    me: NodeId,
    node: NodeId,
    vm: VmId,
    kind: ChannelKind,
) -> Result<Box<dyn Channel>, ChannelError> {
    if node == me {
        return Ok(Box::new(open_here(&paths.vm(vm), kind).await?));
    }
    let (channel, _) = call(cluster.as_ref(), node, &OpenChannel { vm, kind }, Bytes::new()).await?;
    let (ours, theirs) = tokio::io::duplex(READ_SIZE);
    tokio::spawn(pump(cluster, node, channel, theirs));
    Ok(Box::new(ours))
}

/// The last output on the console of a VM that runs on `node`.
pub async fn log(
    cluster: Arc<dyn Cluster>,
    paths: &NodePaths,
    me: NodeId,
    node: NodeId,
    vm: VmId,
) -> Result<Bytes, ChannelError> {
    let mut console = open(cluster, paths, me, node, vm, ChannelKind::Console).await?;
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
async fn pump(cluster: Arc<dyn Cluster>, node: NodeId, channel: ChannelId, stream: DuplexStream) {
    let (from_client, to_client) = tokio::io::split(stream);
    tokio::select! {
        () = pump_output(cluster.as_ref(), node, channel, to_client) => {}
        () = pump_input(cluster.as_ref(), node, channel, from_client) => {}
    }
    // Best effort: a session that nobody reads from ends by itself.
    let _ = call(cluster.as_ref(), node, &CloseChannel { channel }, Bytes::new()).await;
}

async fn pump_output(
    cluster: &dyn Cluster,
    node: NodeId,
    channel: ChannelId,
    mut to_client: WriteHalf<DuplexStream>,
) {
    while let Ok((flow, output)) = call(cluster, node, &ReadChannel { channel }, Bytes::new()).await {
        if to_client.write_all(&output).await.is_err() || flow == ChannelFlow::Ended {
            return;
        }
    }
}

async fn pump_input(
    cluster: &dyn Cluster,
    node: NodeId,
    channel: ChannelId,
    mut from_client: ReadHalf<DuplexStream>,
) {
    let mut typed = vec![0; READ_SIZE];
    while let Ok(read @ 1..) = from_client.read(&mut typed).await {
        let input = Bytes::copy_from_slice(&typed[..read]);
        if call(cluster, node, &WriteChannel { channel }, input).await.is_err() {
            return;
        }
    }
}

/// Channels into guests here that are open from other nodes.
pub(super) struct Sessions {
    paths: NodePaths,
    open: Mutex<BTreeMap<ChannelId, Arc<Session>>>,
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

    pub(super) async fn open(&self, vm: VmId, kind: ChannelKind) -> Result<ChannelId, RpcError> {
        let stream = open_here(&self.paths.vm(vm), kind).await;
        let stream = stream.map_err(|error| RpcError::new(ErrorCode::NotFound, error.to_string()))?;
        let (output, input) = stream.into_split();
        let session = Session {
            output: tokio::sync::Mutex::new(output),
            input: tokio::sync::Mutex::new(input),
            used: Mutex::new(Instant::now()),
        };
        let mut open = self.open.lock();
        open.retain(|_, session| session.used.lock().elapsed() < SESSION_IDLE);
        if open.len() >= MAX_SESSIONS {
            return Err(RpcError::new(ErrorCode::Unavailable, "too many channels are open"));
        }
        let id = ChannelId(Uuid::new_v4());
        open.insert(id, Arc::new(session));
        Ok(id)
    }

    fn session(&self, channel: ChannelId) -> Result<Arc<Session>, RpcError> {
        let session = self.open.lock().get(&channel).cloned();
        let session = session.ok_or_else(|| RpcError::new(ErrorCode::NotFound, "this channel was closed"))?;
        *session.used.lock() = Instant::now();
        Ok(session)
    }

    pub(super) async fn read(&self, channel: ChannelId) -> Result<(ChannelFlow, Bytes), RpcError> {
        let session = self.session(channel)?;
        let mut output = session.output.lock().await;
        let mut piece = vec![0; READ_SIZE];
        match timeout(CHANNEL_WAIT, output.read(&mut piece)).await {
            Err(_) => Ok((ChannelFlow::Open, Bytes::new())),
            Ok(Ok(read @ 1..)) => {
                piece.truncate(read);
                Ok((ChannelFlow::Open, piece.into()))
            }
            Ok(_) => {
                self.close(channel);
                Ok((ChannelFlow::Ended, Bytes::new()))
            }
        }
    }

    pub(super) async fn write(&self, channel: ChannelId, input: &[u8]) -> Result<(), RpcError> {
        let session = self.session(channel)?;
        let mut sink = session.input.lock().await;
        match timeout(WRITE_DEADLINE, sink.write_all(input)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(RpcError::new(ErrorCode::Internal, error.to_string())),
            Err(_) => Err(RpcError::new(ErrorCode::Unavailable, "the guest does not read")),
        }
    }

    pub(super) fn close(&self, channel: ChannelId) {
        self.open.lock().remove(&channel);
    }
}
