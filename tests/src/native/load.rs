//! I/O on a thread of its own, checked, while the test breaks things.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use parking_lot::Mutex;

use super::checker::Checker;
use crate::blkclient::{BlkClient, Options};

/// Requests in flight.
const DEPTH: u16 = 16;
/// How long a request may take: longer than everything that is done to the cluster under I/O.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the thread looks for orders while nothing is answered.
const LOOK: Duration = Duration::from_millis(20);

const RUN: u8 = 0;
const FINISH: u8 = 1;
const ABANDON: u8 = 2;

/// How it went so far.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Requests that were answered.
    pub answers: u64,
    /// The longest time without an answer since the last [`Load::measure_gaps`].
    pub longest_gap: Duration,
    /// How often the client had to connect again.
    pub reconnects: u32,
    last: Instant,
}

/// A running load.
pub struct Load {
    /// What the load knows about the volume.
    pub checker: Arc<Mutex<Checker>>,
    progress: Arc<Mutex<Progress>>,
    order: Arc<AtomicU8>,
    thread: JoinHandle<Result<BlkClient>>,
}

/// A client as tests use it, which waits for its target as long as any test needs.
pub fn connect(socket: &Path) -> Result<BlkClient> {
    connect_with_patience(socket, PATIENCE)
}

/// A client that waits for so long until it takes its target for lost.
pub fn connect_with_patience(socket: &Path, patience: Duration) -> Result<BlkClient> {
    BlkClient::connect(socket, Options { depth: DEPTH, patience, ..Options::default() })
}

impl Load {
    /// Starts it on a client that has nothing in flight.
    pub fn start(client: BlkClient, checker: Checker) -> Result<Self> {
        let checker = Arc::new(Mutex::new(checker));
        let progress = Progress {
            answers: 0,
            longest_gap: Duration::ZERO,
            reconnects: client.reconnects(),
            last: Instant::now(),
        };
        let progress = Arc::new(Mutex::new(progress));
        let order = Arc::new(AtomicU8::new(RUN));
        let worker =
            Worker { client, checker: checker.clone(), progress: progress.clone(), order: order.clone() };
        let thread = std::thread::Builder::new().name("load".to_owned()).spawn(move || worker.run())?;
        Ok(Self { checker, progress, order, thread })
    }

    /// How it went so far.
    pub fn progress(&self) -> Progress {
        *self.progress.lock()
    }

    /// Forgets earlier gaps.
    pub fn measure_gaps(&self) {
        self.progress.lock().longest_gap = Duration::ZERO;
    }

    /// Waits for that many more answers.
    pub fn wait_for_answers(&self, more: u64, limit: Duration) -> Result<()> {
        let (start, deadline) = (self.progress().answers, Instant::now() + limit);
        while self.progress().answers < start + more {
            ensure!(!self.thread.is_finished(), "the load has ended early");
            ensure!(
                Instant::now() < deadline,
                "{} of {more} answers within {limit:?}",
                self.progress().answers - start
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Waits until the client has connected once more.
    pub fn wait_for_reconnect(&self, limit: Duration) -> Result<()> {
        let (start, deadline) = (self.progress().reconnects, Instant::now() + limit);
        while self.progress().reconnects == start {
            ensure!(!self.thread.is_finished(), "the load has ended early");
            ensure!(Instant::now() < deadline, "no new connection within {limit:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Lets all requests end.
    pub fn finish(self) -> Result<(BlkClient, Checker)> {
        self.end(FINISH)
    }

    /// Ends it with requests in flight, like the loss of the client's machine.
    pub fn abandon(self) -> Result<Checker> {
        let (_, mut checker) = self.end(ABANDON)?;
        checker.client_lost();
        Ok(checker)
    }

    fn end(self, order: u8) -> Result<(BlkClient, Checker)> {
        self.order.store(order, Ordering::SeqCst);
        let client = self.thread.join().map_err(|_| anyhow!("the load panicked"))??;
        let checker = Arc::into_inner(self.checker).context("the checker is in use")?;
        Ok((client, checker.into_inner()))
    }
}

struct Worker {
    client: BlkClient,
    checker: Arc<Mutex<Checker>>,
    progress: Arc<Mutex<Progress>>,
    order: Arc<AtomicU8>,
}

impl Worker {
    fn run(mut self) -> Result<BlkClient> {
        loop {
            let order = self.order.load(Ordering::SeqCst);
            for done in self.client.reap(0)? {
                self.checker.lock().done(&done)?;
                let mut progress = self.progress.lock();
                let gap = progress.last.elapsed();
                progress.longest_gap = progress.longest_gap.max(gap);
                progress.last = Instant::now();
                progress.answers += 1;
            }
            match order {
                RUN => {
                    while self.client.in_flight(0) < usize::from(DEPTH) {
                        // In one step: when all is lost, a request is either known or not there.
                        let mut checker = self.checker.lock();
                        let (tag, op) = checker.next_request();
                        self.client.submit(0, tag, &op)?;
                    }
                }
                FINISH if self.client.in_flight(0) > 0 => {}
                _ => return Ok(self.client),
            }
            let silent = {
                let mut progress = self.progress.lock();
                progress.reconnects = self.client.reconnects();
                progress.last.elapsed()
            };
            ensure!(silent < PATIENCE, "no answer for {silent:?}");
            if let Err(error) = self.client.wait(LOOK) {
                // The target does not come back. Whether that is right is for the test to say.
                return if self.is_abandoned_within(PATIENCE) { Ok(self.client) } else { Err(error) };
            }
        }
    }

    fn is_abandoned_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.order.load(Ordering::SeqCst) == RUN && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
        self.order.load(Ordering::SeqCst) == ABANDON
    }
}
