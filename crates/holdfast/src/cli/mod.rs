//! The command line. Everything here but the processes and the documents is a
//! client of an agent's API.

pub mod args;
mod client;
mod cluster;
mod console;
mod documents;
mod fencing;
mod files;
mod job;
mod luns;
mod output;
mod quorum;
mod vm;
mod what_if;

use std::process::ExitCode;

use clap::Parser;

pub use args::{Cli, Command};
use args::{Group, VolumeCommand};
use client::{Client, ClientError};

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// The agent said no, or could not be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Something about the terminal or a local file.
    #[error("{0}")]
    Local(String),
    /// The job that was waited for did not do what was asked; said already.
    #[error("{0}")]
    Job(String),
    /// Something is wrong with a volume; what, is said already.
    #[error("{0} is not as it should be")]
    Unsound(String),
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        CliError::Local(error.to_string())
    }
}

type Done = Result<(), CliError>;

/// Reads the command line; ends the process with code 2 and usage when it makes
/// no sense.
pub fn parse() -> Cli {
    Cli::parse()
}

/// Runs a command that is a client of an agent, or that prints documents. The
/// processes (`keeper`, `agent`, `demo`, `lab-init`) are the caller's.
pub async fn run(cli: Cli) -> ExitCode {
    match dispatch(cli).await {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the output left: `holdfast vm list | head`.
        Err(CliError::Local(text)) if text.contains("Broken pipe") => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfast: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn dispatch(cli: Cli) -> Done {
    let json = cli.json;
    let client = || Client::new(&cli.connection);
    match cli.command {
        Command::Cluster(args) => cluster::cluster(&client()?, args.command, json || args.format.json).await,
        Command::Node(args) => cluster::node(&client()?, args.command, json || args.format.json).await,
        Command::Quorum(args) => quorum::quorum(&client()?, args.command, json || args.format.json).await,
        Command::Network(args) => cluster::network(&client()?, args.command, json || args.format.json).await,
        Command::Switch(args) => cluster::switch(&client()?, args.command, json || args.format.json).await,
        Command::Volume(Group { command: VolumeCommand::Check { lun: Some(device), .. }, format }) => {
            luns::check_alone(&device, json || format.json)
        }
        Command::Volume(args) => cluster::volume(&client()?, args.command, json || args.format.json).await,
        Command::Token(args) => cluster::token(&client()?, args.command, json || args.format.json).await,
        Command::Vm(args) => vm::vm(&client()?, args.command, json || args.format.json).await,
        Command::Explain(args) => vm::explain(&client()?, args.command, json || args.format.json).await,
        Command::WhatIf(args) => what_if::what_if(&client()?, &args.phrase, json || args.format.json).await,
        Command::Job(args) => job::job(&client()?, args.command, json || args.format.json).await,
        Command::Events(args) => job::events(&client()?, args.follow, args.since, json || args.format.json).await,
        Command::Completions { shell } => documents::completions(shell),
        Command::Man { dir } => documents::man(&dir),
        Command::Openapi => documents::openapi(),
        Command::Keeper { .. } | Command::Agent { .. } | Command::Demo(_) | Command::LabInit { .. } => {
            Err(CliError::Local("this command is not run by the client".into()))
        }
    }
}
