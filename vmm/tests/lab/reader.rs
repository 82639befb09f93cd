//! A client of the console of a guest that prints a letter after the other.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm::Vm;

use crate::lab::DEADLINE;
use crate::letters;

/// Reads the letters that a guest prints: each has to be the one after the last.
pub(crate) struct Letters {
    console: UnixStream,
    pub(crate) last: Option<u8>,
}

impl Letters {
    /// Those of a guest that has just begun, or goes on behind this letter.
    pub(crate) fn new(console: UnixStream, last: Option<u8>) -> Self {
        Self { console, last }
    }

    fn follow(&mut self, bytes: &[u8]) {
        for byte in bytes {
            assert_eq!(*byte as char, letters::following(self.last) as char);
            self.last = Some(*byte);
        }
    }

    pub(crate) fn read_some(&mut self) {
        let mut some = [0; 30];
        self.console.read_exact(&mut some).unwrap();
        self.follow(&some);
    }

    /// Pauses the guest after some letters and reads what is still on its way.
    pub(crate) fn read_and_pause(&mut self, vm: &Vm) {
        self.read_some();
        vm.handle().pause().unwrap();
        self.read_rest();
    }

    /// Reads what is still on its way of a guest that is held.
    pub(crate) fn read_rest(&mut self) {
        self.console.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let silent_by = Instant::now() + DEADLINE;
        let mut rest = [0; 4096];
        while let Ok(len @ 1..) = self.console.read(&mut rest) {
            assert!(Instant::now() < silent_by, "output goes on while paused");
            self.follow(&rest[..len]);
        }
        self.console.set_read_timeout(Some(DEADLINE)).unwrap();
    }
}
