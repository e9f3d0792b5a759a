//! The benchmarks: the released program in the lab, with real guests, against the
//! goals. Each prints a table and, with `--json FILE`, writes its rows for programs.
//!
//! A machine that does other work at the same time gives worse figures; medians,
//! and the least and greatest of all runs, show how much.

mod bare;
mod consensus;
mod crash;
mod events;
mod failover;
mod false_loss;
mod idle;
mod migration;
mod peer;
mod stage;
pub mod table;
mod volume;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench", max_term_width = 100)]
struct Args {
    /// What to measure.
    name: Name,
    /// How often to repeat each experiment.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    runs: u16,
    /// For how long to keep the processors busy: 10 for false-loss, 1 for failover
    /// with a peer.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    minutes: Option<u64>,
    /// Beside Pacemaker and corosync on the same machine (failover).
    #[arg(long)]
    peer: bool,
    /// For how long to watch nodes on which nothing happens (idle).
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    seconds: u64,
    /// Measure this part only; may be given more than once (volume). All that need no
    /// cluster if none is named.
    #[arg(long, value_name = "PART")]
    only: Vec<volume::Part>,
    /// Write the rows to this file as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure this program instead of building one; the guest is taken as it is, too.
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Name {
    /// The power of a node is cut: its VM elsewhere, under both profiles.
    Failover,
    /// Live migrations beside those of bare QEMUs.
    Migration,
    /// Writes, and how long there are none when the coordinator goes.
    Consensus,
    /// Memory and processor time of nodes on which nothing happens.
    Idle,
    /// QEMU and the agent are killed.
    Crash,
    /// No node may be declared lost because its processors are busy.
    FalseLoss,
    /// The server of disks beside qemu-storage-daemon; with `--only killed` or `--only cuts`,
    /// how long a guest stands still in a cluster.
    Volume,
}

/// Runs the benchmark that `args` name.
///
/// # Errors
/// When it cannot be built or an experiment fails. A goal that is missed is a
/// figure and no error.
pub fn main(args: Vec<OsString>) -> Result<()> {
    let name = OsString::from("cargo xtask bench");
    let args = Args::parse_from(std::iter::once(name).chain(args));
    if args.peer {
        peer::look()?;
    }
    let minutes = |default: u64| Duration::from_secs(60 * args.minutes.unwrap_or(default));
    let built = || args.binary.clone().map_or_else(stage::build, Ok);
    let runs = usize::from(args.runs);
    let rows = match args.name {
        Name::Failover if args.peer => {
            let (binary, load) = (built()?, minutes(1));
            let mut ours = failover::run(&binary, runs, Some(load))?;
            let model = ours.model.take().context("no command line to give to the peer")?;
            let beside = peer::run(&binary, runs, load, &ours, &model)?;
            ours.rows.into_iter().chain(beside).collect()
        }
        Name::Failover => failover::run(&built()?, runs, None)?.rows,
        Name::Migration => migration::run(&built()?, runs)?,
        Name::Consensus => consensus::run(&built()?, runs)?,
        Name::Idle => idle::run(&built()?, Duration::from_secs(args.seconds))?,
        Name::Crash => crash::run(&built()?, runs)?,
        Name::FalseLoss => false_loss::run(&built()?, minutes(10))?,
        Name::Volume => volume::run(&args.only, runs, built)?,
    };
    println!("\n{}", table::table(&rows));
    match &args.json {
        Some(file) => table::write_json(&rows, file),
        None => Ok(()),
    }
}
