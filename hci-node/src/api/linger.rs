//! A refused request's body is read on for a while, so that the client gets to read why it was refused.
//!
//! An answer may be complete long before the request is: what is too large or of the wrong kind is refused after its
//! first bytes. A server that then closes with bytes unread resets the connection, and the client, still writing, sees
//! "broken pipe" instead of the answer. Therefore what a handler leaves of a body is read and thrown away, up to
//! [`MOST`] bytes and for [`LONGEST`]; by then a client that reads its answers has stopped sending.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Buf;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, SizeHint};

/// Bytes read for nothing: many times what sockets on both sides buffer.
const MOST: usize = 64 << 20;
/// Time that the reading may take.
const LONGEST: Duration = Duration::from_secs(5);

/// A request's body whose rest is read when it is dropped.
pub(super) struct Lingering<B: Body + Send + Unpin + 'static>(Option<B>);

impl<B: Body + Send + Unpin> Lingering<B> {
    pub(super) fn new(body: B) -> Self {
        Self(Some(body))
    }
}

impl<B: Body + Send + Unpin> Body for Lingering<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match &mut self.0 {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}

impl<B: Body + Send + Unpin + 'static> Drop for Lingering<B> {
    fn drop(&mut self) {
        let Some(body) = self.0.take().filter(|body| !body.is_end_stream()) else { return };
        // Outside a runtime nothing is served any more, either.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(LONGEST, read_off(body)));
        }
    }
}

async fn read_off<B: Body + Unpin>(mut body: B) {
    let mut left = MOST;
    while let Some(Ok(frame)) = body.frame().await {
        let read = frame.data_ref().map_or(0, Buf::remaining);
        let Some(rest) = left.checked_sub(read) else { return };
        left = rest;
    }
}
