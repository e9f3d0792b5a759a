//! Holdfast: failover clusters of virtual machines. One binary: the keeper, the
//! agent, and the command line that talks to them.

mod agent;
mod cli;
mod config;
mod demo;
mod generation;
mod heartbeat;
mod http;
mod identity;
mod keeper;
mod leases;
mod mount;
mod process;
mod realtime;
mod volume;

use std::process::ExitCode;

use cli::Command;
use cli::args::{Group, VolumeCommand};

fn main() -> ExitCode {
    let cli = cli::parse();
    // The keeper blocks signals and forks: nothing may have started a thread before.
    match cli.command {
        Command::Keeper { config } => process::keeper(config.as_deref()),
        Command::Agent { config } => process::agent(config.as_deref()),
        Command::Volume(Group { command: VolumeCommand::Serve { config, channel }, .. }) => {
            process::volume(config.as_deref(), channel)
        }
        Command::Volume(Group { command: VolumeCommand::Mount { log, volume, at }, .. }) => {
            process::mount(&log, &volume, &at)
        }
        Command::Demo(args) => demo::main(args),
        Command::LabInit { args } => holdfast_lab::init::main(args),
        _ => client(cli),
    }
}

fn client(cli: cli::Cli) -> ExitCode {
    rustls::crypto::ring::default_provider().install_default().ok();
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let code = runtime.block_on(cli::run(cli));
            // A console's keyboard may still be waited for.
            runtime.shutdown_background();
            code
        }
        Err(error) => {
            eprintln!("holdfast: {error}");
            ExitCode::FAILURE
        }
    }
}
