//! `hci pool`: all disks together.

use clap::{Subcommand, ValueEnum};
use hyper::Method;
use serde_json::json;
use std::time::Duration;

use super::Context;
use crate::cli::exit::CliError;
use crate::cli::output::{self, Column, Format, Show, column};
use crate::cli::size::parse_duration;
use crate::cli::task::{Wait, finish};

/// The verbs of `hci pool`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show what holds for the pool, and what is being rebuilt or moved.
    #[command(after_help = "Examples:\n  hci pool get\n  hci pool get -o json\nAPI: GET /v1/pool")]
    Get,
    /// Change what holds for the pool.
    #[command(
        after_help = "Examples:\n  hci pool set --rebuild-grace 10m\n  hci pool set --reserve 15 --rebalance off\nAPI: PATCH /v1/pool"
    )]
    Set {
        /// How long a node may be lost before its copies are rebuilt elsewhere. A disk that failed is not waited for.
        #[arg(long, value_parser = parse_duration)]
        rebuild_grace: Option<Duration>,
        /// Percentage of each disk that placement and rebuilding leave free.
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..=50))]
        reserve: Option<u8>,
        /// Segments that are copied to or away from one disk at a time.
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=32))]
        moves_per_disk: Option<u8>,
        /// Whether copies are moved to even out how full the disks are.
        #[arg(long)]
        rebalance: Option<Switch>,
    },
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

const COLUMNS: &[Column] = &[
    column("RAW", "/raw_bytes").shown(Show::Bytes),
    column("USED", "/used_bytes").shown(Show::Bytes),
    column("RESERVE %", "/reserve_percent"),
    column("REBUILD AFTER S", "/rebuild_grace_seconds"),
    column("REBALANCE", "/rebalance"),
    column("SEGMENTS", "/segments"),
    column("DEGRADED", "/segments_degraded"),
    column("MOVING", "/moves"),
    column("SCRUBBED", "/scrub/last_complete"),
    column("SCRUB %", "/scrub/percent"),
    column("DAMAGED", "/scrub/damaged_blocks"),
    column("REPAIRED", "/scrub/repaired_blocks").wide(),
    column("TO REMOVE", "/segments_to_remove").wide(),
    column("MOVES PER DISK", "/moves_per_disk").wide(),
];

/// Runs a verb of `hci pool`.
pub async fn run(context: &Context, verb: Verb) -> Result<(), CliError> {
    if let Verb::Set { rebuild_grace, reserve, moves_per_disk, rebalance } = verb {
        let body = json!({
            "rebuild_grace_seconds": rebuild_grace.map(|grace| grace.as_secs()),
            "reserve_percent": reserve,
            "moves_per_disk": moves_per_disk,
            "rebalance": rebalance.map(|switch| switch == Switch::On),
        });
        let answer = context.client.json(Method::PATCH, "/v1/pool", Some(&body)).await?;
        finish(&context.client, context.wait, answer).await?;
        if matches!(context.wait, Wait::No) {
            return Ok(());
        }
    }
    let pool = context.client.get("/v1/pool").await?;
    let format = if context.format == Format::Name { Format::Json } else { context.format };
    output::print(format, &pool, COLUMNS)
}
