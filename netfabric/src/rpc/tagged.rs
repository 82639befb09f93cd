//! Frames of many calls on one stream: each frame behind the number of its call.
//!
//! ```text
//! offset  size  field (little-endian)
//!      0     8  number of the call: chosen by the caller, repeated in the answer
//!      8        a frame, see [`super::frame`]
//! ```
//!
//! [`Splitter`] cuts a stream into such frames and does no I/O itself. What arrives in one piece is passed on as it came; only what
//! a packet's end cuts in two is copied, once. Memory is held for what has arrived, not for what a peer announces.

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::frame::{self, Encoded, FrameError, Kind, PRELUDE, Prelude};
use super::{Request, Response, RpcError};

/// Size of the call's number.
const TAG: usize = 8;

/// Number of a call on its stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct CallNumber(pub(crate) u64);

/// Makes the bytes of a request.
pub(crate) fn encode_request(number: CallNumber, request: &Request) -> Result<Encoded, FrameError> {
    frame::encode_behind(&number.0.to_le_bytes(), request.into())
}

/// Makes the bytes of an answer.
pub(crate) fn encode_response(number: CallNumber, result: &Answer) -> Result<Encoded, FrameError> {
    frame::encode_response_behind(&number.0.to_le_bytes(), result)
}

/// What came back.
pub(crate) type Answer = Result<Response, RpcError>;

/// Cuts a stream into frames.
#[derive(Debug)]
pub(crate) struct Splitter {
    expected: Kind,
    pieces: VecDeque<Bytes>,
    /// Bytes in `pieces`.
    available: usize,
    /// The frame whose rest is still to come.
    current: Option<(CallNumber, Prelude)>,
}

impl Splitter {
    /// For the callee's side of a stream.
    pub(crate) fn requests() -> Self {
        Self::new(Kind::Request)
    }

    /// For the caller's side of a stream.
    pub(crate) fn responses() -> Self {
        Self::new(Kind::Response)
    }

    fn new(expected: Kind) -> Self {
        Self { expected, pieces: VecDeque::new(), available: 0, current: None }
    }

    /// Adds what has arrived.
    pub(crate) fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.available += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// The next request, once all of it is there. An error is final for the stream.
    pub(crate) fn next_request(&mut self) -> Result<Option<(CallNumber, Request)>, FrameError> {
        let frame = self.next_frame()?;
        Ok(frame.map(|(number, prelude, header, bulk)| (number, prelude.into_request(header, bulk))))
    }

    /// The next answer, once all of it is there. An error is final for the stream.
    pub(crate) fn next_response(&mut self) -> Result<Option<(CallNumber, Answer)>, FrameError> {
        let Some((number, prelude, header, bulk)) = self.next_frame()? else { return Ok(None) };
        Ok(Some((number, prelude.into_response(header, bulk)?)))
    }

    fn next_frame(&mut self) -> Result<Option<(CallNumber, Prelude, Bytes, Bytes)>, FrameError> {
        if self.current.is_none() {
            if self.available < TAG + PRELUDE {
                return Ok(None);
            }
            let mut fixed = self.take(TAG + PRELUDE);
            let number = CallNumber(fixed.get_u64_le());
            self.current = Some((number, Prelude::parse(&fixed, self.expected)?));
        }
        match self.current {
            Some((number, prelude)) if self.available >= prelude.body() => {
                self.current = None;
                let header = self.take(prelude.header_len());
                let bulk = self.take(prelude.body() - header.len());
                Ok(Some((number, prelude, header, bulk)))
            }
            _ => Ok(None),
        }
    }

    /// The next `n` bytes, which have arrived.
    fn take(&mut self, n: usize) -> Bytes {
        self.available -= n;
        match self.pieces.front_mut() {
            Some(first) if first.len() > n => return first.split_to(n),
            Some(first) if first.len() == n => return self.pieces.pop_front().unwrap_or_default(),
            _ => {}
        }
        let mut joined = BytesMut::with_capacity(n);
        while joined.len() < n {
            let Some(mut piece) = self.pieces.pop_front() else { break };
            let part = piece.split_to(piece.len().min(n - joined.len()));
            joined.put_slice(&part);
            if !piece.is_empty() {
                self.pieces.push_front(piece);
            }
        }
        joined.freeze()
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

    proptest! {
        #[test]
        fn requests_survive_any_cut(
            calls in prop::collection::vec((any::<u64>(), any::<u16>(), prop::collection::vec(any::<u8>(), 0..60),
                                            prop::collection::vec(any::<u8>(), 0..900)), 1..8),
            step in 1_usize..2000,
        ) {
            let sent: Vec<(CallNumber, Request)> = calls.into_iter()
                .map(|(n, method, header, bulk)| (CallNumber(n), Request { method, header: header.into(), bulk: bulk.into() }))
                .collect();
            let stream: Vec<u8> = sent.iter().flat_map(|(n, r)| bytes_of(&encode_request(*n, r).unwrap())).collect();
            let mut splitter = Splitter::requests();
            let mut received = Vec::new();
            for piece in stream.chunks(step) {
                splitter.push(Bytes::copy_from_slice(piece));
                while let Some(frame) = splitter.next_request().unwrap() {
                    received.push(frame);
                }
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn any_bytes_are_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300), step in 1_usize..64) {
            let mut splitter = Splitter::responses();
            for piece in bytes.chunks(step) {
                splitter.push(Bytes::copy_from_slice(piece));
                while let Ok(Some(_)) = splitter.next_response() {}
            }
        }
    }

    #[test]
    fn answers_keep_their_numbers_and_errors() {
        let error = RpcError::new(ErrorCode::Refused, "no");
        let mut splitter = Splitter::responses();
        splitter.push(bytes_of(&encode_response(CallNumber(7), &Err(error.clone())).unwrap()).into());
        assert_eq!(splitter.next_response().unwrap(), Some((CallNumber(7), Err(error))));
        assert_eq!(splitter.next_response().unwrap(), None);
    }

    #[test]
    fn an_announced_giant_and_a_wrong_kind_are_refused() {
        let mut bytes = bytes_of(&encode_request(CallNumber(1), &Request::default()).unwrap());
        let mut splitter = Splitter::responses();
        splitter.push(bytes.clone().into());
        assert!(matches!(splitter.next_response(), Err(FrameError::Kind(1))));
        bytes[TAG + 12..TAG + 16].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut splitter = Splitter::requests();
        splitter.push(bytes.into());
        assert!(matches!(splitter.next_request(), Err(FrameError::TooLarge { part: "bulk data", .. })));
    }
}
