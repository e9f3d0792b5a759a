//! What is done with the project's own sources: check them, renew what is
//! generated from them, run the simulation, the end-to-end tests and the benchmarks.

mod bench;
mod chaos;
mod cuts;
mod dice;
mod fix;
mod leftovers;
mod step;
mod verify;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::step::{Step, minutes};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Check everything; changes no source. Needs root, for the tests in the lab.
    Verify {
        /// Only what needs neither root nor QEMU: formatting, clippy, structure.
        #[arg(long)]
        quick: bool,
    },
    /// Format, and renew every generated file that a test compares: look at the
    /// difference before you commit it.
    Fix,
    /// Run the simulation, e.g. `cargo xtask sim --seeds 5000`, `--seed 7`, `--mutants`.
    Sim {
        /// What the simulation is told; 500 seeds when empty.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Run the end-to-end tests in the lab, one after another.
    E2e {
        /// Only tests with this in their names.
        filter: Option<String>,
    },
    /// Run the end-to-end test with sixteen nodes.
    Sixteen,
    /// Let everything fail at random for a long time, with real guests, and judge.
    Chaos(chaos::Args),
    /// Cut a node's path to a LUN and heal it, again and again, under a guest that writes.
    Cuts(cuts::Args),
    /// Measure against the goals: `cargo xtask bench NAME [--json FILE] [--runs N]`.
    #[command(disable_help_flag = true)]
    Bench {
        /// Which benchmark, and its options.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Does the task; false when what it looked at is not as it should be.
fn run(task: Task) -> Result<bool> {
    match task {
        Task::Verify { quick } => verify::run(quick),
        Task::Fix => fix::run(),
        Task::Sim { args } => Ok(sim(args).run()?.passed()),
        Task::E2e { filter } => {
            let ready = verify::guest().run()?.passed() && verify::binary().run()?.passed();
            Ok(ready && e2e(filter.as_deref()).run()?.passed())
        }
        Task::Sixteen => {
            let ready = verify::guest().run()?.passed() && verify::binary().run()?.passed();
            Ok(ready && e2e(Some("sixteen")).args(["--ignored", "--nocapture"]).run()?.passed())
        }
        Task::Chaos(args) => chaos::run(&args),
        Task::Cuts(args) => cuts::run(&args),
        Task::Bench { args } => bench::main(args).map(|()| true),
    }
}

/// The simulation with `args`, or over the seeds that every change has to pass.
fn sim(args: Vec<OsString>) -> Step {
    let args = if args.is_empty() { vec!["--seeds".into(), "500".into()] } else { args };
    Step::cargo("simulation", &["run", "--release", "--quiet", "-p", "holdfast-sim", "--"])
        .args(args)
        .within(minutes(30))
}

/// The end-to-end tests with `filter` in their names. They take turns: each has
/// the machine's processors to itself, as its hosts would.
fn e2e(filter: Option<&str>) -> Step {
    Step::cargo("end-to-end tests", &["test", "-p", "holdfast-lab", "--test", "e2e", "--"])
        .args(filter)
        .args(["--test-threads=1"])
        .within(minutes(40))
}

/// The root of the checkout.
fn root() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path
}
