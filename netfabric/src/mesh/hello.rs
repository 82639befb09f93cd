//! The first exchange on a connection.
//!
//! The dialler calls method [`METHOD`] on the first stream, the other side answers, then the connection is a link. It
//! tells which *process* is at the other end: a link to a predecessor of that process is dead and can be dropped
//! without waiting for a timeout. And the dialler learns that it was admitted.

use serde::{Deserialize, Serialize};

use super::Class;
use crate::rpc::frame::{self, Assembler, FrameError};
use crate::rpc::{DecodeError, EncodeError, Request, Response};

/// Reserved; no handler sees it.
pub(super) const METHOD: u16 = 0;

/// Identifies one start of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Instance(u64);

/// What each side says about itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) instance: Instance,
    class: String,
}

/// Why the first exchange failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum HelloError {
    #[error("the connection was closed: {0}")]
    Closed(#[from] quinn::ConnectionError),
    #[error(transparent)]
    Write(#[from] quinn::WriteError),
    #[error(transparent)]
    Read(#[from] quinn::ReadError),
    #[error(transparent)]
    Stopped(#[from] quinn::ClosedStream),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Encode(#[from] EncodeError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("the peer did not begin with a hello")]
    Unexpected,
}

impl Hello {
    pub(super) fn new(class: Class) -> Self {
        Self { instance: Instance(rand::random()), class: class.to_string() }
    }

    /// The dialler's part.
    pub(super) async fn greet(&self, connection: &quinn::Connection) -> Result<Self, HelloError> {
        let (mut send, mut receive) = connection.open_bi().await?;
        let encoded = frame::encode_request(&Request::new(METHOD, self)?)?;
        send.write_all_chunks(&mut [encoded.head]).await?;
        send.finish()?;
        let assembler = read_frame(&mut receive, Assembler::response()).await?;
        let response = assembler.into_response()?.map_err(|_| HelloError::Unexpected)?;
        Ok(response.decode()?)
    }

    /// The accepting side's part: reads the dialler's hello and leaves the stream for [`Self::answer`].
    pub(super) async fn listen(
        connection: &quinn::Connection,
    ) -> Result<(Self, quinn::SendStream), HelloError> {
        let (send, mut receive) = connection.accept_bi().await?;
        let request = read_frame(&mut receive, Assembler::request()).await?.into_request()?;
        if request.method != METHOD {
            return Err(HelloError::Unexpected);
        }
        Ok((request.decode()?, send))
    }

    /// Admits the dialler.
    pub(super) async fn answer(&self, mut send: quinn::SendStream) -> Result<(), HelloError> {
        let encoded = frame::encode_response(&Ok(Response::new(self)?))?;
        send.write_all_chunks(&mut [encoded.head]).await?;
        send.finish()?;
        Ok(())
    }
}

/// Reads a stream to its end as one frame.
pub(super) async fn read_frame(
    receive: &mut quinn::RecvStream,
    mut assembler: Assembler,
) -> Result<Assembler, ReadFrameError> {
    while let Some(chunk) = receive.read_chunk(usize::MAX, true).await? {
        assembler.push(chunk.bytes)?;
    }
    Ok(assembler)
}

/// Why no frame came.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadFrameError {
    #[error(transparent)]
    Stream(#[from] quinn::ReadError),
    #[error(transparent)]
    Frame(#[from] FrameError),
}

impl From<ReadFrameError> for HelloError {
    fn from(error: ReadFrameError) -> Self {
        match error {
            ReadFrameError::Stream(error) => Self::Read(error),
            ReadFrameError::Frame(error) => Self::Frame(error),
        }
    }
}
