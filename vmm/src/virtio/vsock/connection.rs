//! One connection between a program in the guest and a stream outside: a model without I/O.
//!
//! Each direction has one buffer of [`ROOM`] bytes, the credit that the guest is given and the most that is read ahead of the guest's own. What is
//! to be told to the guest is not queued but follows from where the connection stands ([`Connection::next`]).

use std::collections::VecDeque;

use super::packet::{NO_RECEIVE, NO_SEND, Op};

/// Bytes of room in each direction.
pub(super) const ROOM: usize = 64 << 10;
/// The guest is told of room at the latest when so much of it is new.
const NEWS: u32 = ROOM as u32 / 4;

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Somebody outside wants it; the guest is still to be asked.
    Wanted,
    /// The guest was asked and has not answered.
    Asked,
    /// The guest wants it; it is still to be told that it has it.
    Granted,
    /// It is there.
    Open,
    /// The guest has done with it; it is told so (`told`), and what it has sent goes out.
    Draining { told: bool },
    /// Nothing goes on any more.
    Over,
}

/// One direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Open,
    /// Nothing more comes in; what is in the buffer goes on.
    Ending,
    /// It has ended, and the other end knows.
    Ended,
}

/// What the guest is told.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) op: Op,
    pub(super) flags: u32,
    pub(super) data: Vec<u8>,
}

impl Told {
    fn plain(op: Op) -> Option<Self> {
        Some(Self { op, flags: 0, data: Vec::new() })
    }
}

/// The guest broke the rules of the protocol.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    phase: Phase,
    /// What goes out before anything of the guest's.
    greeting: Vec<u8>,
    to_host: VecDeque<u8>,
    to_guest: VecDeque<u8>,
    /// From the guest outwards.
    outward: Flow,
    /// From outside into the guest.
    inward: Flow,
    /// Bytes sent to the guest.
    sent: u32,
    /// What the guest says of its room, and of what it has taken out of there.
    guest_room: u32,
    guest_taken: u32,
    /// It was asked for news of that.
    asked_credit: bool,
    /// Bytes of the guest's that have gone out, and how many of them it was told of.
    taken: u32,
    told_taken: u32,
    /// It wants to be told.
    owes_credit: bool,
}

impl Connection {
    fn new(phase: Phase) -> Self {
        Self {
            phase,
            greeting: Vec::new(),
            to_host: VecDeque::new(),
            to_guest: VecDeque::new(),
            outward: Flow::Open,
            inward: Flow::Open,
            sent: 0,
            guest_room: 0,
            guest_taken: 0,
            asked_credit: false,
            taken: 0,
            told_taken: 0,
            owes_credit: false,
        }
    }

    /// Somebody outside wants to talk to the guest. `greeting` is what they hear once the guest has agreed, `first` what they have said already.
    pub(super) fn to_guest(greeting: Vec<u8>, first: &[u8]) -> Self {
        Self { greeting, to_guest: first.iter().copied().collect(), ..Self::new(Phase::Wanted) }
    }

    /// The guest wants to talk to somebody, who is there.
    pub(super) fn from_guest(room: u32, taken: u32) -> Self {
        Self { guest_room: room, guest_taken: taken, ..Self::new(Phase::Granted) }
    }

    /// What the guest may know of our room: bytes in all, bytes taken out.
    pub(super) fn credit(&self) -> (u32, u32) {
        (ROOM as u32, self.taken)
    }

    /// A packet of the guest's.
    pub(super) fn receive(
        &mut self,
        op: Op,
        flags: u32,
        credit: (u32, u32),
        data: &[u8],
    ) -> Result<(), Broken> {
        (self.guest_room, self.guest_taken) = credit;
        self.asked_credit &= self.guest_credit() == 0;
        match (op, self.phase) {
            (Op::Reset, Phase::Wanted | Phase::Asked) => self.phase = Phase::Over,
            (Op::Reset, _) => self.drain(true),
            (Op::Response, Phase::Asked) => self.phase = Phase::Open,
            (Op::CreditUpdate, _) => {}
            (Op::CreditRequest, Phase::Open) => self.owes_credit = true,
            (Op::Data, Phase::Open) if self.outward == Flow::Open => {
                if self.to_host.len() + data.len() > ROOM {
                    return Err(Broken);
                }
                self.to_host.extend(data);
            }
            // Nobody hears it any more.
            (Op::Data, Phase::Open) => self.taken = self.taken.wrapping_add(data.len() as u32),
            (Op::Shutdown, Phase::Open) => self.shut(flags),
            (_, Phase::Draining { .. } | Phase::Over) => {}
            _ => return Err(Broken),
        }
        Ok(())
    }

    /// The guest sends or receives no more.
    fn shut(&mut self, flags: u32) {
        if flags & NO_SEND != 0 && self.outward == Flow::Open {
            self.outward = Flow::Ending;
        }
        if flags & NO_RECEIVE != 0 {
            self.inward = Flow::Ended;
            self.to_guest.clear();
        }
        if flags & NO_SEND != 0 && flags & NO_RECEIVE != 0 {
            self.drain(false);
        }
    }

    /// The guest has done with it.
    fn drain(&mut self, told: bool) {
        self.inward = Flow::Ended;
        self.to_guest.clear();
        if self.outward == Flow::Open {
            self.outward = Flow::Ending;
        }
        self.phase = Phase::Draining { told: told || matches!(self.phase, Phase::Draining { told: true }) };
    }

    /// How much may be read outside.
    pub(super) fn room(&self) -> usize {
        match (self.phase, self.inward) {
            (Phase::Draining { .. } | Phase::Over, _) | (_, Flow::Ending | Flow::Ended) => 0,
            _ => ROOM.saturating_sub(self.to_guest.len()),
        }
    }

    /// Something was read outside, no more than there was room for; nothing at all is the end of what comes.
    pub(super) fn read(&mut self, data: &[u8]) {
        self.to_guest.extend(data);
        if data.is_empty() && self.inward == Flow::Open {
            self.inward = Flow::Ending;
        }
    }

    /// Whether nothing more comes from outside.
    pub(super) fn heard_all(&self) -> bool {
        self.inward != Flow::Open
    }

    /// What is to be written outside now.
    pub(super) fn pending(&self) -> &[u8] {
        if self.greeting.is_empty() {
            self.to_host.as_slices().0
        } else if matches!(self.phase, Phase::Open | Phase::Draining { .. }) {
            &self.greeting
        } else {
            &[]
        }
    }

    /// So much of it was written.
    pub(super) fn wrote(&mut self, len: usize) {
        if self.greeting.is_empty() {
            self.to_host.drain(..len);
            self.taken = self.taken.wrapping_add(len as u32);
        } else {
            self.greeting.drain(..len);
        }
    }

    /// Whether the stream outside is to be told, now and once, that nothing more comes.
    pub(super) fn ends_outward(&mut self) -> bool {
        let now = self.outward == Flow::Ending && self.to_host.is_empty() && self.greeting.is_empty();
        if now {
            self.outward = Flow::Ended;
        }
        now
    }

    /// Nobody is outside any more. What they said before still goes to the guest.
    pub(super) fn gone(&mut self) {
        if self.inward == Flow::Open {
            self.inward = Flow::Ending;
        }
        self.greeting.clear();
        self.taken = self.taken.wrapping_add(self.to_host.len() as u32);
        self.to_host.clear();
        self.outward = Flow::Ended;
    }

    /// Whether nothing more happens here.
    pub(super) fn is_over(&self) -> bool {
        match self.phase {
            Phase::Over => true,
            Phase::Draining { told } => told && self.outward == Flow::Ended,
            _ => false,
        }
    }

    /// Bytes that the guest has room for.
    fn guest_credit(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.guest_taken);
        self.guest_room.saturating_sub(under_way) as usize
    }

    /// Whether there is anything to tell the guest.
    pub(super) fn has_news(&self) -> bool {
        match self.phase {
            Phase::Wanted | Phase::Granted => true,
            Phase::Asked => self.inward != Flow::Open && self.outward == Flow::Ended,
            Phase::Open => self.owes_credit() || self.has_data() || self.ends(),
            // What it has sent goes out first: it learns of the end when nothing can be lost any more.
            Phase::Draining { told } => !told && self.outward == Flow::Ended,
            Phase::Over => false,
        }
    }

    fn owes_credit(&self) -> bool {
        self.owes_credit || self.taken.wrapping_sub(self.told_taken) >= NEWS
    }

    fn has_data(&self) -> bool {
        !self.to_guest.is_empty() && (self.guest_credit() > 0 || !self.asked_credit)
    }

    /// Nothing more comes from outside, or nothing more goes either way.
    fn ends(&self) -> bool {
        match self.inward {
            Flow::Open => false,
            Flow::Ending => self.to_guest.is_empty(),
            Flow::Ended => self.outward == Flow::Ended,
        }
    }

    /// What the guest is to be told next, with at most so much data.
    pub(super) fn next(&mut self, most: usize) -> Option<Told> {
        if !self.has_news() {
            return None;
        }
        let told = match self.phase {
            Phase::Wanted => {
                self.phase = Phase::Asked;
                Told::plain(Op::Request)
            }
            Phase::Granted => {
                self.phase = Phase::Open;
                Told::plain(Op::Response)
            }
            Phase::Asked => {
                self.phase = Phase::Over;
                Told::plain(Op::Reset)
            }
            Phase::Draining { .. } => {
                self.phase = Phase::Draining { told: true };
                Told::plain(Op::Reset)
            }
            Phase::Open if self.has_data() => self.next_data(most),
            Phase::Open if self.ends() => Some(self.end()),
            _ => Told::plain(Op::CreditUpdate),
        };
        // Each packet says it.
        self.told_taken = self.taken;
        self.owes_credit = false;
        told
    }

    fn next_data(&mut self, most: usize) -> Option<Told> {
        let len = most.min(self.guest_credit()).min(self.to_guest.len());
        if len == 0 {
            self.asked_credit = true;
            return Told::plain(Op::CreditRequest);
        }
        let data: Vec<u8> = self.to_guest.drain(..len).collect();
        self.sent = self.sent.wrapping_add(len as u32);
        Some(Told { op: Op::Data, flags: 0, data })
    }

    fn end(&mut self) -> Told {
        self.inward = Flow::Ended;
        let mut flags = NO_SEND;
        if self.outward == Flow::Ended {
            flags |= NO_RECEIVE;
            // The guest's answer changes nothing.
            self.phase = Phase::Over;
        }
        Told { op: Op::Shutdown, flags, data: Vec::new() }
    }
}
