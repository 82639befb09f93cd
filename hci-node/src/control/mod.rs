//! `hci node run`: the control process of a node.
//!
//! | start reading at | it is |
//! |---|---|
//! | [`run`] | start, first boot, end |
//! | [`app`] | in a cluster or not, and the way from the one to the other |
//! | [`join`] | forming and joining a cluster: tokens, proofs, certificates, unattended |
//! | [`running`] | what runs on a member, and in which order it starts |
//! | [`leader`] | what the leader decides: availability, assignment of VMs, ends of tasks (pure), and its loop |
//! | [`lease`], [`renew`] | leases of nodes, and their renewal with a report |
//! | [`replicated`], [`raft`] | what is needed of consensus, and consensus behind it |
//! | [`member`], [`local`] | what the parts of a member share, and what runs beside the control process |
//! | [`rpc`] | what control processes ask each other |
//! | [`metrics`] | `/metrics` |
//! | [`options`] | flags and `/etc/hci/node.toml` |
//!
//! The process may be killed and started again at any time: guests and the data process do not notice. Everything that it
//! was doing is found again in the replicated state.

pub mod app;
pub mod export;
pub mod import;
pub mod join;
pub mod leader;
pub mod lease;
pub mod local;
pub mod member;
pub mod metrics;
pub mod options;
pub mod raft;
pub mod renew;
pub mod replicated;
pub mod rpc;
pub mod running;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

pub use self::options::Args;
use self::{
    app::App,
    join::firstboot::{self, Action},
    options::NodeOptions,
};
use crate::api::{
    http,
    problem::{Problem, ProblemKind},
    types as api,
};

/// Pauses between attempts to join unattended.
const JOIN_PAUSE: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(10);

/// Runs the control process until SIGTERM.
pub fn run(args: Args) -> anyhow::Result<()> {
    let options = args.complete()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("control")
        .build()
        .context("cannot start the runtime")?;
    let ended = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut term = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
        let stop = shutdown.clone();
        let signals = tokio::spawn(async move {
            tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
            tracing::info!("asked to stop");
            stop.cancel();
        });
        let ended = serve(options, shutdown).await;
        signals.abort();
        ended
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

/// Serves this node until `shutdown`.
pub async fn serve(options: NodeOptions, shutdown: CancellationToken) -> anyhow::Result<()> {
    let paths = options.paths.clone();
    for dir in [paths.state(), paths.run()] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let app = App::new(options);
    let socket = paths.run().join("node.sock");
    let local = http::serve_local(http::router(app.clone()), socket, shutdown.clone());
    let local = tokio::spawn(local);
    let joined = app.resume().await;
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    match joined {
        Ok(true) => {}
        Ok(false) => tokio::select! {
            () = first_boot(&app) => {}
            () = shutdown.cancelled() => {}
        },
        Err(error) => {
            shutdown.cancel();
            local.abort();
            return Err(error);
        }
    }
    shutdown.cancelled().await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    if let Some(running) = app.running() {
        running.stop().await;
    }
    local.await.context("the local socket's task failed")?.context("the local socket cannot be served")
}

/// Forms or joins a cluster as `firstboot.toml` says, and tries until it works: the others may not be up yet.
async fn first_boot(app: &Arc<App>) {
    let first = match firstboot::read(app.options.paths.state()) {
        Ok(Some(first)) => first,
        Ok(None) => {
            tracing::info!("this node is in no cluster: waiting for hci cluster create or join");
            return;
        }
        Err(error) => {
            tracing::error!(%error, "the first boot cannot be done: use hci cluster create or join");
            return;
        }
    };
    let name = first.node_name.clone().unwrap_or_else(|| app.options.node_name.clone());
    let mut pause = *JOIN_PAUSE.start();
    loop {
        if app.member().is_some() {
            return;
        }
        let done: Result<String, Problem> = match &first.action {
            Action::Create { name: cluster, join_secret } => {
                let request = api::CreateCluster { name: cluster.clone(), node_name: Some(name.clone()) };
                let created = app.create_cluster(request, join_secret.clone()).await;
                created.map(|created| created.cluster.name)
            }
            Action::Join(invitation) => app.join(invitation, &name).await.map(|joined| joined.cluster),
        };
        match done {
            Ok(cluster) => {
                tracing::info!(cluster, "this node is in its cluster");
                return;
            }
            Err(problem) if problem.is(ProblemKind::Unavailable) => {
                tracing::info!(reason = problem.detail, "cannot join yet");
            }
            Err(problem) => tracing::warn!(reason = problem.detail, next = problem.next, "cannot join"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(*JOIN_PAUSE.end());
    }
}
