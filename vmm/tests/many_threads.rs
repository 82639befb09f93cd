//! A VMM has as many threads as its guest has parts, and a guest with many of them goes on.
//!
//! The only test of this process: what is looked at is that of a whole process.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::sync::{Arc, Barrier};
use std::thread;

use vmm::isolation::{ThreadKind, confine_process, confine_thread};

/// More than a guest has devices in the VMM, and than the C library gives a heap each before it counts processors.
const DEVICES: usize = 24;

/// A vCPU whose guest's drivers set up devices starts their threads, and may open no file. A call that it may not make ends this process.
#[test]
fn a_vcpu_may_start_the_threads_of_many_devices() {
    confine_process().unwrap();
    let vcpu = thread::spawn(|| {
        confine_thread(ThreadKind::Vcpu);
        // All are there at once.
        let met = Arc::new(Barrier::new(DEVICES));
        let device = || {
            let met = met.clone();
            thread::spawn(move || {
                confine_thread(ThreadKind::Device);
                met.wait();
            })
        };
        let devices: Vec<_> = (0..DEVICES).map(|_| device()).collect();
        devices.into_iter().all(|device| device.join().is_ok())
    });
    assert!(vcpu.join().unwrap());
}
