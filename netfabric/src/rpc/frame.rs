//! The bytes of a frame.
//!
//! ```text
//! offset  size  field (little-endian)
//!      0     4  magic "hci1"
//!      4     2  request: method; response: status (0 = ok, 1 = the header is an RpcError)
//!      6     2  kind: 1 = request, 2 = response
//!      8     4  length of the header, at most MAX_HEADER
//!     12     4  length of the bulk data, at most MAX_BULK
//!     16        header, then bulk data
//! ```
//!
//! [`Assembler`] reads a frame from pieces as they arrive and does no I/O itself. It reserves memory for what has
//! arrived, not for what a peer announces.

use bytes::{Buf, Bytes, BytesMut};

use super::{MAX_BULK, MAX_HEADER, Request, Response, RpcError, codec};

/// Size of the fixed part in front of every frame.
pub const PRELUDE: usize = 16;
const MAGIC: [u8; 4] = *b"hci1";
const STATUS_OK: u16 = 0;
const STATUS_ERROR: u16 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Request = 1,
    Response = 2,
}

/// Bytes that are not a frame, or not one we accept.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol at all.
    #[error("not a frame: wrong magic")]
    Magic,
    /// A request where a response belongs, or the reverse.
    #[error("frame of kind {0} where another was expected")]
    Kind(u16),
    /// A part is over its limit.
    #[error("{part} of {length} bytes, the limit is {limit}")]
    TooLarge {
        /// Which part.
        part: &'static str,
        /// Its announced or actual length.
        length: usize,
        /// The most we accept.
        limit: usize,
    },
    /// More bytes than the frame has.
    #[error("bytes after the end of the frame")]
    Trailing,
    /// The stream ended inside the frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// A response whose status or error cannot be read.
    #[error("unreadable status of a response")]
    Status,
}

/// A frame ready to be written: prelude with header, then the bulk data untouched.
#[derive(Debug)]
pub struct Encoded {
    /// Prelude and header.
    pub head: Bytes,
    /// Bulk data; may be empty.
    pub bulk: Bytes,
}

/// Makes the bytes of a request.
pub fn encode_request(request: &Request) -> Result<Encoded, FrameError> {
    encode_behind(&[], request.into())
}

/// Makes the bytes of an answer.
pub fn encode_response(result: &Result<Response, RpcError>) -> Result<Encoded, FrameError> {
    encode_response_behind(&[], result)
}

/// The same behind some other bytes.
pub(super) fn encode_response_behind(
    front: &[u8],
    result: &Result<Response, RpcError>,
) -> Result<Encoded, FrameError> {
    match result {
        Ok(Response { header, bulk }) => {
            encode_behind(front, Parts { kind: Kind::Response, code: STATUS_OK, header, bulk })
        }
        Err(error) => {
            let header = codec::encode(error).map_err(|_| FrameError::Status)?;
            let bulk = Bytes::new();
            let parts = Parts { kind: Kind::Response, code: STATUS_ERROR, header: &header, bulk: &bulk };
            encode_behind(front, parts)
        }
    }
}

/// What a frame is made of.
pub(super) struct Parts<'a> {
    kind: Kind,
    code: u16,
    header: &'a Bytes,
    bulk: &'a Bytes,
}

impl<'a> From<&'a Request> for Parts<'a> {
    fn from(request: &'a Request) -> Self {
        Self { kind: Kind::Request, code: request.method, header: &request.header, bulk: &request.bulk }
    }
}

/// Makes the bytes of a frame behind some others, with one allocation.
pub(super) fn encode_behind(front: &[u8], parts: Parts<'_>) -> Result<Encoded, FrameError> {
    let Parts { kind, code, header, bulk } = parts;
    check_lengths(header.len(), bulk.len())?;
    let mut head = BytesMut::with_capacity(front.len() + PRELUDE + header.len());
    head.extend_from_slice(front);
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&code.to_le_bytes());
    head.extend_from_slice(&(kind as u16).to_le_bytes());
    // Both fit: they were checked against limits far below 4 GiB.
    head.extend_from_slice(&(header.len() as u32).to_le_bytes());
    head.extend_from_slice(&(bulk.len() as u32).to_le_bytes());
    head.extend_from_slice(header);
    Ok(Encoded { head: head.freeze(), bulk: bulk.clone() })
}

fn check_lengths(header: usize, bulk: usize) -> Result<(), FrameError> {
    if header > MAX_HEADER {
        return Err(FrameError::TooLarge { part: "header", length: header, limit: MAX_HEADER });
    }
    if bulk > MAX_BULK {
        return Err(FrameError::TooLarge { part: "bulk data", length: bulk, limit: MAX_BULK });
    }
    Ok(())
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Prelude {
    code: u16,
    header: usize,
    bulk: usize,
}

impl Prelude {
    pub(super) fn parse(mut bytes: &[u8], expected: Kind) -> Result<Self, FrameError> {
        if bytes.len() < PRELUDE {
            return Err(FrameError::Truncated);
        }
        if bytes[..MAGIC.len()] != MAGIC {
            return Err(FrameError::Magic);
        }
        bytes.advance(MAGIC.len());
        let code = bytes.get_u16_le();
        let kind = bytes.get_u16_le();
        if kind != expected as u16 {
            return Err(FrameError::Kind(kind));
        }
        let header = bytes.get_u32_le() as usize;
        let bulk = bytes.get_u32_le() as usize;
        check_lengths(header, bulk)?;
        Ok(Self { code, header, bulk })
    }

    fn total(&self) -> usize {
        PRELUDE + self.body()
    }

    /// Length of the header.
    pub(super) fn header_len(&self) -> usize {
        self.header
    }

    /// Length of all that follows.
    pub(super) fn body(&self) -> usize {
        self.header + self.bulk
    }

    pub(super) fn into_request(self, header: Bytes, bulk: Bytes) -> Request {
        Request { method: self.code, header, bulk }
    }

    pub(super) fn into_response(
        self,
        header: Bytes,
        bulk: Bytes,
    ) -> Result<Result<Response, RpcError>, FrameError> {
        match self.code {
            STATUS_OK => Ok(Ok(Response { header, bulk })),
            STATUS_ERROR => codec::decode(&header).map(Err).map_err(|_| FrameError::Status),
            _ => Err(FrameError::Status),
        }
    }
}

/// Reads one frame from the pieces of a stream.
#[derive(Debug)]
pub struct Assembler {
    expected: Kind,
    prelude: Option<Prelude>,
    /// A single piece is kept as it came; only a second one makes a copy.
    first: Bytes,
    joined: BytesMut,
}

impl Assembler {
    /// For the callee's side of a stream.
    pub fn request() -> Self {
        Self::new(Kind::Request)
    }

    /// For the caller's side of a stream.
    pub fn response() -> Self {
        Self::new(Kind::Response)
    }

    fn new(expected: Kind) -> Self {
        Self { expected, prelude: None, first: Bytes::new(), joined: BytesMut::new() }
    }

    fn received(&self) -> &[u8] {
        if self.joined.is_empty() { &self.first } else { &self.joined }
    }

    /// Takes the next piece; true when the frame is complete. An error is final for the stream.
    pub fn push(&mut self, piece: Bytes) -> Result<bool, FrameError> {
        if self.joined.is_empty() && self.first.is_empty() {
            self.first = piece;
        } else {
            if self.joined.is_empty() {
                self.joined.extend_from_slice(&self.first);
                self.first = Bytes::new();
            }
            self.joined.extend_from_slice(&piece);
        }
        if self.prelude.is_none() && self.received().len() >= PRELUDE {
            self.prelude = Some(Prelude::parse(self.received(), self.expected)?);
        }
        match &self.prelude {
            None => Ok(false),
            Some(prelude) if self.received().len() > prelude.total() => Err(FrameError::Trailing),
            Some(prelude) => Ok(self.received().len() == prelude.total()),
        }
    }

    fn finish(self) -> Result<(Prelude, Bytes, Bytes), FrameError> {
        let prelude = self.prelude.ok_or(FrameError::Truncated)?;
        let mut all = if self.joined.is_empty() { self.first } else { self.joined.freeze() };
        if all.len() != prelude.total() {
            return Err(FrameError::Truncated);
        }
        all.advance(PRELUDE);
        let header = all.split_to(prelude.header);
        Ok((prelude, header, all))
    }

    /// The request, once the stream has ended.
    pub fn into_request(self) -> Result<Request, FrameError> {
        let (prelude, header, bulk) = self.finish()?;
        Ok(prelude.into_request(header, bulk))
    }

    /// The answer, once the stream has ended.
    pub fn into_response(self) -> Result<Result<Response, RpcError>, FrameError> {
        let (prelude, header, bulk) = self.finish()?;
        prelude.into_response(header, bulk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::ErrorCode;
    use proptest::prelude::*;

    fn bytes_of(encoded: &Encoded) -> Vec<u8> {
        [encoded.head.as_ref(), encoded.bulk.as_ref()].concat()
    }

    /// Feeds `bytes` in pieces of `step` bytes.
    fn feed(assembler: &mut Assembler, bytes: &[u8], step: usize) -> Result<bool, FrameError> {
        let mut complete = false;
        for piece in bytes.chunks(step) {
            complete = assembler.push(Bytes::copy_from_slice(piece))?;
        }
        Ok(complete)
    }

    proptest! {
        #[test]
        fn a_request_survives_any_cut(method: u16, header in prop::collection::vec(any::<u8>(), 0..200),
                                      bulk in prop::collection::vec(any::<u8>(), 0..5000), step in 1_usize..6000) {
            let request = Request { method, header: header.into(), bulk: bulk.into() };
            let mut assembler = Assembler::request();
            let encoded = encode_request(&request).unwrap();
            prop_assert!(feed(&mut assembler, &bytes_of(&encoded), step).unwrap());
            prop_assert_eq!(assembler.into_request().unwrap(), request);
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1_usize..64) {
            let mut assembler = Assembler::response();
            if feed(&mut assembler, &bytes, step).is_ok() {
                let _ = assembler.into_response();
            }
        }

        #[test]
        fn a_truncated_frame_is_an_error(bulk in prop::collection::vec(any::<u8>(), 0..100), cut in 0_usize..120) {
            let whole = bytes_of(&encode_request(&Request { method: 1, header: Bytes::new(), bulk: bulk.into() }).unwrap());
            let cut = cut.min(whole.len() - 1);
            let mut assembler = Assembler::request();
            prop_assert!(!feed(&mut assembler, &whole[..cut], 7).unwrap());
            prop_assert!(matches!(assembler.into_request(), Err(FrameError::Truncated)));
        }
    }

    #[test]
    fn an_error_reaches_the_caller() {
        let error = RpcError::new(ErrorCode::Refused, "no");
        let mut assembler = Assembler::response();
        let encoded = encode_response(&Err(error.clone())).unwrap();
        assert!(feed(&mut assembler, &bytes_of(&encoded), 5).unwrap());
        assert_eq!(assembler.into_response().unwrap(), Err(error));
    }

    #[test]
    fn an_announced_giant_is_refused_from_its_prelude() {
        let mut prelude = bytes_of(&encode_request(&Request::default()).unwrap());
        prelude[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        let outcome = Assembler::request().push(prelude.into());
        assert!(matches!(outcome, Err(FrameError::TooLarge { part: "bulk data", .. })));
    }

    #[test]
    fn trailing_bytes_and_wrong_kinds_are_refused() {
        let mut bytes = bytes_of(&encode_request(&Request::default()).unwrap());
        assert!(matches!(Assembler::response().push(bytes.clone().into()), Err(FrameError::Kind(1))));
        bytes.push(0);
        assert!(matches!(Assembler::request().push(bytes.into()), Err(FrameError::Trailing)));
    }
}
