//! A guest's state on its way out of and into this process, in pieces.
//!
//! The process does no file or network I/O of its own: the control process fetches the state over the socket of the orders, piece by piece, or
//! brings it. The main thread writes and reads; a few pieces wait in between, so that whoever is slower holds the other one up. An end that is
//! dropped ends what the other one does.

use std::io::{self, Read, Write};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use vmm::Destination;

/// Size of all pieces but the last.
pub const PIECE: usize = 1 << 20;
/// Pieces that wait to be fetched or taken.
const WAITING: usize = 2;

/// What the main thread says.
#[derive(Debug)]
pub(super) enum Said {
    /// The next piece.
    Piece(Bytes),
    /// All pieces so far are to arrive before the next one comes. Dropped or told, that is what is waited for.
    Settle(oneshot::Sender<()>),
    /// The guest is held.
    Held,
    /// Its devices are, too.
    Quiet,
    /// That was all.
    End,
    /// It will not come, for this reason.
    Failed(String),
}

/// The main thread's end of a state that goes out. Blocks; not to be used where futures run.
pub(super) struct Outgoing {
    to: mpsc::Sender<Said>,
    piece: Vec<u8>,
}

/// The other end.
pub(super) struct Fetched {
    from: mpsc::Receiver<Said>,
    at: u64,
    /// Somebody waits for what was fetched to have arrived.
    settling: Option<oneshot::Sender<()>>,
}

/// What comes next of a state that goes out.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This.
    Piece(Bytes),
    /// Nothing before all of it has arrived.
    Settle,
    /// Nothing; the guest is held from now on.
    Held,
    /// Nothing; its devices are, too.
    Quiet,
    /// Nothing more.
    End,
    /// Nothing more, for this reason.
    Failed(String),
}

/// Both ends of a state that goes out.
pub(super) fn outgoing() -> (Outgoing, Fetched) {
    let (to, from) = mpsc::channel(WAITING);
    (Outgoing { to, piece: Vec::with_capacity(PIECE) }, Fetched { from, at: 0, settling: None })
}

fn nobody() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "nobody wants it any more")
}

impl Outgoing {
    fn say(&mut self, said: Said) -> io::Result<()> {
        self.to.blocking_send(said).map_err(|_| nobody())
    }

    fn send_piece(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        self.say(Said::Piece(piece.into()))
    }

    /// What was written but is no whole piece goes, too.
    fn send_rest(&mut self) -> io::Result<()> {
        if self.piece.is_empty() { Ok(()) } else { self.send_piece() }
    }

    /// Says how it ended. Who does not want it any more need not know.
    pub(super) fn finish(mut self, outcome: Result<(), String>) {
        let told = match outcome {
            Err(why) => self.say(Said::Failed(why)),
            Ok(()) => self.send_rest().and_then(|()| self.say(Said::End)),
        };
        if let Err(error) = told {
            tracing::info!(%error, "the guest's state was not fetched");
        }
    }
}

impl Write for Outgoing {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let taken = data.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&data[..taken]);
        if self.piece.len() == PIECE {
            self.send_piece()?;
        }
        Ok(taken)
    }

    /// Pieces are full or the last: nothing is sent before.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Destination for Outgoing {
    fn settle(&mut self) -> io::Result<()> {
        self.send_rest()?;
        let (told, settled) = oneshot::channel();
        self.say(Said::Settle(told))?;
        settled.blocking_recv().map_err(|_| nobody())
    }

    fn held(&mut self) -> io::Result<()> {
        self.send_rest()?;
        self.say(Said::Held)
    }

    fn quiet(&mut self) -> io::Result<()> {
        self.say(Said::Quiet)
    }
}

impl Fetched {
    /// How much was fetched.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// What comes next; none when the guest has ended. Whoever asks says by it that all that came before has arrived, if that is waited for.
    pub(super) async fn next(&mut self) -> Option<Next> {
        if let Some(told) = self.settling.take() {
            // Who does not wait any more has given up, which comes next.
            let _ = told.send(());
        }
        Some(match self.from.recv().await? {
            Said::Piece(piece) => {
                self.at += piece.len() as u64;
                Next::Piece(piece)
            }
            Said::Settle(told) => {
                self.settling = Some(told);
                Next::Settle
            }
            Said::Held => Next::Held,
            Said::Quiet => Next::Quiet,
            Said::End => Next::End,
            Said::Failed(why) => Next::Failed(why),
        })
    }
}

/// The main thread's end of a state that comes in. Blocks, as [`Outgoing`].
pub(super) struct Incoming {
    from: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

/// The other end.
pub(super) struct Brought {
    /// Dropped with the last piece.
    to: Option<mpsc::Sender<Bytes>>,
    taken: u64,
}

/// Both ends of a state that comes in.
pub(super) fn incoming() -> (Incoming, Brought) {
    let (to, from) = mpsc::channel(WAITING);
    (Incoming { from, piece: Bytes::new() }, Brought { to: Some(to), taken: 0 })
}

impl Incoming {
    /// Waits for the first piece, or for the end.
    pub(super) fn await_first(&mut self) {
        if self.piece.is_empty() {
            self.piece = self.from.blocking_recv().unwrap_or_default();
        }
    }
}

impl Read for Incoming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.from.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let taken = into.len().min(self.piece.len());
        into[..taken].copy_from_slice(&self.piece.split_to(taken));
        Ok(taken)
    }
}

impl Brought {
    /// How much was taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Takes the next piece; false when the main thread takes no more.
    pub(super) async fn push(&mut self, piece: Bytes) -> bool {
        let length = piece.len() as u64;
        let Some(to) = &self.to else { return false };
        let taken = to.send(piece).await.is_ok();
        if taken {
            self.taken += length;
        }
        taken
    }

    /// That was all.
    pub(super) fn end(&mut self) {
        self.to = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_state_goes_out_and_comes_in_in_pieces() {
        let content: Vec<u8> = (0..2 * PIECE + 77).map(|byte| (byte % 251) as u8).collect();
        let (mut out, mut fetched) = outgoing();
        let sent = content.clone();
        let writer = std::thread::spawn(move || {
            let outcome = sent.chunks(1000).try_for_each(|part| out.write_all(part));
            out.finish(outcome.map_err(|error| error.to_string()));
        });
        let (mut reader, mut brought) = incoming();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all)
        });
        let mut sizes = Vec::new();
        while let Some(Next::Piece(piece)) = fetched.next().await {
            sizes.push(piece.len());
            assert!(brought.push(piece).await);
        }
        brought.end();
        assert_eq!(sizes, [PIECE, PIECE, 77]);
        assert_eq!((fetched.at(), brought.taken()), (content.len() as u64, content.len() as u64));
        writer.join().unwrap();
        assert!(reader.join().unwrap().unwrap() == content);
        assert!(!brought.push(Bytes::from_static(b"late")).await);
    }

    #[tokio::test]
    async fn what_is_to_settle_waits_until_it_is_fetched_on() {
        let (mut out, mut fetched) = outgoing();
        let (settled, order) = std::sync::mpsc::channel();
        let writer = std::thread::spawn(move || {
            out.write_all(b"first").unwrap();
            out.settle().unwrap();
            settled.send(()).unwrap();
            out.held().unwrap();
            out.write_all(b"last").unwrap();
            out.finish(Ok(()));
        });
        assert_eq!(fetched.next().await, Some(Next::Piece(Bytes::from_static(b"first"))));
        assert_eq!(fetched.next().await, Some(Next::Settle));
        assert!(order.try_recv().is_err(), "it is not said yet that all has arrived");
        assert_eq!(fetched.next().await, Some(Next::Held));
        order.recv().unwrap();
        assert_eq!(fetched.next().await, Some(Next::Piece(Bytes::from_static(b"last"))));
        assert_eq!(fetched.next().await, Some(Next::End));
        writer.join().unwrap();

        let (mut out, mut fetched) = outgoing();
        let writer = std::thread::spawn(move || out.settle());
        assert_eq!(fetched.next().await, Some(Next::Settle));
        drop(fetched);
        assert!(writer.join().unwrap().is_err());
    }

    #[tokio::test]
    async fn an_end_that_goes_away_ends_the_other() {
        let (mut out, fetched) = outgoing();
        drop(fetched);
        let writer = std::thread::spawn(move || out.write_all(&vec![1; PIECE]));
        assert_eq!(writer.join().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);

        let (mut reader, brought) = incoming();
        drop(brought);
        let mut head = [0; 4];
        let read = std::thread::spawn(move || reader.read_exact(&mut head)).join().unwrap();
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);

        let (out, mut fetched) = outgoing();
        std::thread::spawn(move || out.finish(Err("no reason".to_owned())));
        assert_eq!(fetched.next().await, Some(Next::Failed("no reason".to_owned())));
        assert!(fetched.next().await.is_none());
    }
}
