//! Tickets: what lets a browser, which has no token, open one WebSocket to one VM's screen. Pure.
//!
//! A ticket is a random text. Who has asked for it with a token gets it once; kept is only its hash, in this process's memory, until it
//! is shown or its time is over. So a ticket is worth nothing on another node, after a restart, or a second time.

use std::time::{Duration, Instant};

use aws_lc_rs::{constant_time, digest};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use parking_lot::Mutex;

use crate::{
    control::join::token::{NoRandom, random},
    state::{SecretHash, VmId},
};

/// How long a ticket is good: for a browser to start and load the page.
pub(super) const LIFE: Duration = Duration::from_secs(60);
/// Tickets that wait at a time.
const MAX_WAITING: usize = 256;
/// Bytes of a secret.
const SECRET_LEN: usize = 32;

/// Why there is no ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoTicket {
    /// Too many were asked for and not used.
    #[error("{MAX_WAITING} tickets wait for their browsers already")]
    Full,
    /// See [`NoRandom`].
    #[error(transparent)]
    NoRandom(#[from] NoRandom),
}

struct Ticket {
    secret: SecretHash,
    vm: VmId,
    expires: Instant,
}

/// The tickets that wait for their browsers.
#[derive(Default)]
pub(crate) struct Tickets(Mutex<Vec<Ticket>>);

impl Tickets {
    /// Makes a ticket for the screen of a VM, and returns its secret.
    pub(super) fn issue(&self, vm: VmId, now: Instant) -> Result<String, NoTicket> {
        let secret = URL_SAFE_NO_PAD.encode(random::<SECRET_LEN>()?);
        let mut waiting = self.0.lock();
        waiting.retain(|ticket| now < ticket.expires);
        if waiting.len() >= MAX_WAITING {
            return Err(NoTicket::Full);
        }
        waiting.push(Ticket { secret: hash(&secret), vm, expires: now + LIFE });
        Ok(secret)
    }

    /// Whether this is the secret of a ticket for that VM. It is spent by this, also when it was shown for another VM. How long it takes
    /// does not depend on how much of it is right.
    pub(super) fn redeem(&self, secret: &str, vm: VmId, now: Instant) -> bool {
        let shown = hash(secret);
        let mut waiting = self.0.lock();
        waiting.retain(|ticket| now < ticket.expires);
        let is_it =
            |ticket: &Ticket| constant_time::verify_slices_are_equal(&ticket.secret.0, &shown.0).is_ok();
        // All are compared, whichever it is.
        let found = waiting.iter().enumerate().fold(None, |found, (at, ticket)| match is_it(ticket) {
            true => Some(at),
            false => found,
        });
        found.is_some_and(|at| waiting.swap_remove(at).vm == vm)
    }
}

fn hash(secret: &str) -> SecretHash {
    let digest = digest::digest(&digest::SHA256, secret.as_bytes());
    let mut hash = SecretHash([0; 32]);
    hash.0.copy_from_slice(digest.as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_good_once_for_one_vm_and_a_minute() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let (web, db) = (VmId::random(), VmId::random());
        let late = now + LIFE;

        let secret = tickets.issue(web, now).unwrap();
        assert!(secret.len() * 6 >= 128, "{secret}");
        assert!(!tickets.redeem("", web, now) && !tickets.redeem(&secret[1..], web, now));
        assert!(tickets.redeem(&secret, web, late - Duration::from_millis(1)));
        assert!(!tickets.redeem(&secret, web, now), "it was used");

        let secret = tickets.issue(web, now).unwrap();
        assert!(!tickets.redeem(&secret, web, late), "it is too late");

        let secret = tickets.issue(web, now).unwrap();
        assert!(!tickets.redeem(&secret, db, now), "it is for another VM");
        assert!(!tickets.redeem(&secret, web, now), "it was shown to somebody");
    }

    #[test]
    fn tickets_do_not_pile_up() {
        let (tickets, now, vm) = (Tickets::default(), Instant::now(), VmId::random());
        let first = tickets.issue(vm, now).unwrap();
        for _ in 1..MAX_WAITING {
            assert_ne!(tickets.issue(vm, now).unwrap(), first);
        }
        assert_eq!(tickets.issue(vm, now), Err(NoTicket::Full));
        assert!(tickets.redeem(&first, vm, now));
        let last = tickets.issue(vm, now).unwrap();
        assert_eq!(tickets.issue(vm, now), Err(NoTicket::Full));
        // Those that nobody came for make room.
        let later = now + LIFE;
        assert!(tickets.issue(vm, later).is_ok());
        assert!(!tickets.redeem(&last, vm, later));
    }

    #[test]
    fn the_secret_is_not_kept() {
        let (tickets, vm) = (Tickets::default(), VmId::random());
        let secret = tickets.issue(vm, Instant::now()).unwrap();
        assert_eq!(tickets.0.lock()[0].secret, hash(&secret));
        assert_ne!(&tickets.0.lock()[0].secret.0[..], URL_SAFE_NO_PAD.decode(secret).unwrap());
    }
}
