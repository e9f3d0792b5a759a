//! Holdfast: failover clusters of virtual machines. One binary: the keeper, the
//! agent, and the command line that talks to them.

mod agent;
mod config;
mod heartbeat;
mod http;
mod identity;
mod keeper;
mod leases;
mod process;
mod realtime;

fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let config = args.get(3).map(std::path::Path::new);
    match args.get(1).map(String::as_str) {
        Some("keeper") => process::keeper(config),
        Some("agent") => process::agent(config),
        Some("lab-init") => holdfast_lab::init::main(args.into_iter().skip(2).map(Into::into)),
        _ => std::process::ExitCode::FAILURE,
    }
}
