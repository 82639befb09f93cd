//! Puts the pieces of frames together again.
//!
//! Peers are authenticated but not trusted, and datagrams may be lost, doubled or out of order. So everything is
//! bounded: the frames that wait for pieces (for each peer, oldest given up first), their bytes, and their age.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::piece::PieceHeader;
use crate::NodeId;
use crate::overlay::id::Vni;

/// Frames of one peer that may wait for pieces. Senders send the pieces of a frame in a row, so more than a few are
/// open only when datagrams are lost.
const MAX_PARTIAL: usize = 64;
/// Far longer than any reordering on a local network, shorter than TCP's first retransmission (200 ms).
const MAX_AGE: Duration = Duration::from_millis(100);

/// A frame that is complete.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Whole {
    pub(crate) vni: Vni,
    /// Virtio-net header and frame; the first piece holds at least both headers.
    pub(crate) pieces: Vec<Bytes>,
    /// Length of all pieces together.
    pub(crate) length: usize,
}

/// What became of a datagram.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// Its frame is complete.
    Whole(Whole),
    /// More pieces are needed.
    Waiting,
    /// This piece was here already.
    Duplicate,
    /// It is no piece of a frame, or contradicts one that is.
    Garbage,
}

/// Frames given up since last asked.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GivenUp {
    /// Too old.
    pub(crate) incomplete: u64,
    /// In the way of newer ones.
    pub(crate) evicted: u64,
}

struct Partial {
    frame: u32,
    vni: Vni,
    length: u32,
    /// Empty where a piece is missing.
    pieces: Vec<Bytes>,
    missing: u8,
    held: usize,
    since: Instant,
}

/// All frames of all peers that wait for pieces.
#[derive(Default)]
pub(crate) struct Reassembler {
    /// For each peer, oldest first.
    peers: HashMap<NodeId, VecDeque<Partial>>,
    given_up: GivenUp,
}

impl Reassembler {
    /// Takes one datagram.
    pub(crate) fn accept(&mut self, now: Instant, from: NodeId, mut datagram: Bytes) -> Accepted {
        let Some(header) = PieceHeader::take(&mut datagram) else { return Accepted::Garbage };
        if header.count == 1 {
            let length = datagram.len();
            return Accepted::Whole(Whole { vni: header.vni, pieces: vec![datagram], length });
        }
        let partials = self.peers.entry(from).or_default();
        Self::expire_peer(partials, now, &mut self.given_up);
        // From the newest: that is where the piece belongs nearly always.
        let place = match partials.iter().rposition(|partial| partial.frame == header.frame) {
            Some(place) => place,
            None => {
                if partials.len() == MAX_PARTIAL {
                    partials.pop_front();
                    self.given_up.evicted += 1;
                }
                partials.push_back(Partial {
                    frame: header.frame,
                    vni: header.vni,
                    length: header.length,
                    pieces: vec![Bytes::new(); usize::from(header.count)],
                    missing: header.count,
                    held: 0,
                    since: now,
                });
                partials.len() - 1
            }
        };
        match partials[place].add(&header, datagram) {
            Added::Complete => match partials.remove(place).and_then(Partial::finish) {
                Some(whole) => Accepted::Whole(whole),
                None => Accepted::Garbage,
            },
            Added::Waiting => Accepted::Waiting,
            Added::Duplicate => Accepted::Duplicate,
            Added::Contradiction => Accepted::Garbage,
        }
    }

    /// Gives up what is too old. To be called now and then, or a peer that falls silent leaves frames behind.
    pub(crate) fn expire(&mut self, now: Instant) {
        for partials in self.peers.values_mut() {
            Self::expire_peer(partials, now, &mut self.given_up);
        }
        self.peers.retain(|_, partials| !partials.is_empty());
    }

    /// True while frames wait for pieces.
    pub(crate) fn is_waiting(&self) -> bool {
        self.peers.values().any(|partials| !partials.is_empty())
    }

    /// What was given up since the last call.
    pub(crate) fn take_given_up(&mut self) -> GivenUp {
        std::mem::take(&mut self.given_up)
    }

    fn expire_peer(partials: &mut VecDeque<Partial>, now: Instant, given_up: &mut GivenUp) {
        while partials.front().is_some_and(|oldest| now.saturating_duration_since(oldest.since) > MAX_AGE) {
            partials.pop_front();
            given_up.incomplete += 1;
        }
    }
}

enum Added {
    Complete,
    Waiting,
    Duplicate,
    Contradiction,
}

impl Partial {
    fn add(&mut self, header: &PieceHeader, piece: Bytes) -> Added {
        let is_same = header.vni == self.vni
            && header.length == self.length
            && usize::from(header.count) == self.pieces.len();
        if !is_same {
            return Added::Contradiction;
        }
        let slot = &mut self.pieces[usize::from(header.index)];
        if !slot.is_empty() {
            return Added::Duplicate;
        }
        if self.held + piece.len() > self.length as usize {
            return Added::Contradiction;
        }
        self.held += piece.len();
        *slot = piece;
        self.missing -= 1;
        if self.missing == 0 { Added::Complete } else { Added::Waiting }
    }

    fn finish(self) -> Option<Whole> {
        let length = self.length as usize;
        (self.held == length).then_some(Whole { vni: self.vni, pieces: self.pieces, length })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::overlay::frame::vnet::VNET_HEADER;
    use crate::overlay::tunnel::piece::{PIECE_HEADER, split};

    const VNET: [u8; VNET_HEADER] = [7; VNET_HEADER];

    fn peer() -> NodeId {
        NodeId::new(uuid::Uuid::from_bytes([1; 16]))
    }

    fn vni(number: u32) -> Vni {
        Vni::try_from(number).unwrap()
    }

    fn cut(frame: &[u8], number: u32, max: usize) -> Vec<Bytes> {
        split(&VNET, frame, vni(5), number, max).unwrap().collect()
    }

    fn joined(whole: &Whole) -> Vec<u8> {
        assert_eq!(whole.pieces.iter().map(Bytes::len).sum::<usize>(), whole.length);
        whole.pieces.concat()
    }

    proptest! {
        #[test]
        fn pieces_in_any_order_with_duplicates_make_the_frame(
            data in proptest::collection::vec(any::<u8>(), 14..65_549),
            max in 512..9000usize,
            seed: u64,
        ) {
            let pieces = cut(&data, 1, max);
            prop_assert!(pieces.iter().all(|piece| piece.len() <= max));
            let mut order: Vec<usize> = (0..pieces.len()).chain(0..pieces.len()).collect();
            let mut state = seed | 1;
            for i in (1..order.len()).rev() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                order.swap(i, (state >> 33) as usize % (i + 1));
            }
            let (mut reassembler, now) = (Reassembler::default(), Instant::now());
            let mut wholes = Vec::new();
            for index in order {
                match reassembler.accept(now, peer(), pieces[index].clone()) {
                    Accepted::Whole(whole) => wholes.push(joined(&whole)),
                    Accepted::Garbage => prop_assert!(false, "a piece was refused"),
                    Accepted::Waiting | Accepted::Duplicate => {}
                }
            }
            let expected = [&VNET[..], &data].concat();
            // A frame of one piece is delivered each time that it comes; a longer one may come twice only whole.
            prop_assert!(!wholes.is_empty() && wholes.len() <= 2);
            prop_assert!(wholes.iter().all(|whole| *whole == expected));
        }

        #[test]
        fn a_lost_piece_loses_its_frame_and_no_other(
            lost in 0..8usize,
            first in proptest::collection::vec(any::<u8>(), 4000..4400),
            second in proptest::collection::vec(any::<u8>(), 4000..4400),
        ) {
            let (mut reassembler, now) = (Reassembler::default(), Instant::now());
            let first = cut(&first, 1, 600);
            for (index, piece) in first.iter().enumerate() {
                if index != lost % first.len() {
                    prop_assert_eq!(reassembler.accept(now, peer(), piece.clone()), Accepted::Waiting);
                }
            }
            let pieces = cut(&second, 2, 600);
            let (last, rest) = pieces.split_last().unwrap();
            for piece in rest {
                prop_assert_eq!(reassembler.accept(now, peer(), piece.clone()), Accepted::Waiting);
            }
            let Accepted::Whole(whole) = reassembler.accept(now, peer(), last.clone()) else {
                panic!("the second frame is incomplete");
            };
            prop_assert_eq!(joined(&whole), [&VNET[..], &second].concat());
            reassembler.expire(now + 2 * MAX_AGE);
            prop_assert_eq!(reassembler.take_given_up(), GivenUp { incomplete: 1, evicted: 0 });
            prop_assert!(!reassembler.is_waiting());
        }

        #[test]
        fn garbage_neither_panics_nor_piles_up(
            datagrams in proptest::collection::vec(
                (0..3u8, any::<u8>(), 0..6u8, 0..3u32, 0..40_000u32, proptest::collection::vec(any::<u8>(), 0..900)),
                0..300,
            ),
        ) {
            let (mut reassembler, now) = (Reassembler::default(), Instant::now());
            for (version, index, count, frame, length, body) in datagrams {
                let mut datagram = vec![version, index % 8, count, 0, 0, 0, 0, 5];
                datagram.extend(frame.to_be_bytes());
                datagram.extend(length.to_be_bytes());
                datagram.extend(body);
                if let Accepted::Whole(whole) = reassembler.accept(now, peer(), datagram.into()) {
                    prop_assert_eq!(joined(&whole).len(), whole.length);
                }
            }
            let open = reassembler.peers.get(&peer());
            let held: usize = open.iter().flat_map(|open| open.iter()).map(|partial| partial.held).sum();
            prop_assert!(open.is_none_or(|open| open.len() <= MAX_PARTIAL) && held <= MAX_PARTIAL * 70_000);
        }
    }

    #[test]
    fn many_open_frames_push_out_the_oldest() {
        let (mut reassembler, now) = (Reassembler::default(), Instant::now());
        let frame = [0; 2000];
        for number in 0..=MAX_PARTIAL as u32 {
            let first = cut(&frame, number, 1500).remove(0);
            assert_eq!(reassembler.accept(now, peer(), first), Accepted::Waiting);
        }
        assert_eq!(reassembler.take_given_up(), GivenUp { incomplete: 0, evicted: 1 });
        // The second oldest is still there.
        let last = cut(&frame, 1, 1500).remove(1);
        assert!(matches!(reassembler.accept(now, peer(), last), Accepted::Whole(_)));
    }

    #[test]
    fn pieces_that_contradict_each_other_are_refused() {
        let (mut reassembler, now) = (Reassembler::default(), Instant::now());
        let pieces = cut(&[1; 3000], 9, 1500);
        assert_eq!(reassembler.accept(now, peer(), pieces[0].clone()), Accepted::Waiting);
        for (at, value) in [(2, 4), (7, 6), (15, 0)] {
            let mut changed = pieces[1].to_vec();
            assert_ne!(changed[at], value);
            changed[at] = value;
            assert_eq!(reassembler.accept(now, peer(), changed.into()), Accepted::Garbage, "byte {at}");
        }
        assert_eq!(reassembler.accept(now, peer(), pieces[0].clone()), Accepted::Duplicate);
        // Another peer's pieces are another frame's.
        let other = NodeId::new(uuid::Uuid::from_bytes([2; 16]));
        assert_eq!(reassembler.accept(now, other, pieces[1].clone()), Accepted::Waiting);
        assert_eq!(
            reassembler.accept(now, peer(), Bytes::from_static(&[1; PIECE_HEADER])),
            Accepted::Garbage
        );
    }
}
