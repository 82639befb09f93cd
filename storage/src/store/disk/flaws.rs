//! Planted bugs: the crash tests must find each of them, or they prove nothing.

/// What is done wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flaw {
    /// A write is acknowledged before it is in the log.
    EarlyAcknowledgement,
    /// A flush returns without a sync.
    DroppedFlush,
    /// The log is applied before it is durable.
    EarlyApply,
    /// A checkpoint leaves some pages unwritten.
    ForgottenPage,
    /// A batch of an earlier opening, behind the end of the log that was found then, is taken for the next one.
    StaleBatch,
    /// A slot is given out again before the checkpoint that freed it is durable.
    EarlyReuse,
    /// What was written before its record, and no sync covered, is believed to be there.
    TrustedPlaces,
    /// Compressed data are given to their position before they are durable.
    EarlyClaim,
    /// What a position had before loses its owner while that of its new place may not be durable.
    EarlyGift,
}

/// All of them.
pub(super) const FLAWS: [Flaw; 9] = [
    Flaw::EarlyAcknowledgement,
    Flaw::DroppedFlush,
    Flaw::EarlyApply,
    Flaw::ForgottenPage,
    Flaw::StaleBatch,
    Flaw::EarlyReuse,
    Flaw::TrustedPlaces,
    Flaw::EarlyClaim,
    Flaw::EarlyGift,
];
