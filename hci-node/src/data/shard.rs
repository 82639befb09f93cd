//! A shard: a thread with a runtime of its own, on which storage and its mesh run.
//!
//! A guest's request goes from its ring through the coordinator to the network and back on this one thread: to hand it to
//! another would cost more than all the work on it. While there is I/O the thread polls instead of sleeping ([`BusyPoll`]), where there are processors enough for it.
//! Whatever may take long is kept away from it: stores, targets and calls have threads elsewhere.

use std::{
    future::Future,
    io,
    sync::Arc,
    thread::{Builder, JoinHandle},
};

use storage::BusyPoll;
use tokio::{
    runtime::{self, EnterGuard, Handle},
    task::JoinError,
};
use tokio_util::sync::CancellationToken;

/// With fewer processors a thread that polls keeps those from running that it waits for: guests, other roles, peers.
const LEAST_PROCESSORS: usize = 3;

fn may_poll() -> bool {
    std::thread::available_parallelism().is_ok_and(|processors| processors.get() >= LEAST_PROCESSORS)
}

/// A running shard.
pub(crate) struct Shard {
    runtime: Handle,
    poll: Arc<BusyPoll>,
    shutdown: CancellationToken,
    thread: parking_lot::Mutex<Option<JoinHandle<()>>>,
}

impl Shard {
    /// Starts the thread.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let shutdown = CancellationToken::new();
        let poll = BusyPoll::new();
        let (ended, polling) = (shutdown.clone(), poll.clone());
        let run = move || {
            runtime.block_on(async {
                let polling = async {
                    if may_poll() {
                        polling.run().await;
                    }
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = ended.cancelled() => {}
                    () = polling => {}
                }
            });
            // What hangs in a broken disk must not keep the process from ending.
            runtime.shutdown_background();
        };
        let thread = Builder::new().name(name.to_owned()).spawn(run)?;
        Ok(Self { runtime: handle, poll, shutdown, thread: parking_lot::Mutex::new(Some(thread)) })
    }

    /// Runs something on the shard to its end.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, JoinError> {
        self.runtime.spawn(task).await
    }

    /// What is spawned while the guard lives is spawned on the shard.
    pub(crate) fn enter(&self) -> EnterGuard<'_> {
        self.runtime.enter()
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    pub(crate) fn poll(&self) -> &Arc<BusyPoll> {
        &self.poll
    }

    /// Ends the thread and all that runs on it.
    pub(crate) async fn stop(&self) {
        self.shutdown.cancel();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("a shard's thread did not end in order");
            }
        }
    }
}
