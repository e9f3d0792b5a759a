//! The two long-running processes: the keeper, and the agent that it starts.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, setrlimit};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::agent::Agent;
use crate::config::Config;
use crate::keeper::watchdog::Watchdogs;
use crate::keeper::{Keeper, KeeperConfig};

/// The group whose members may use the agent's socket.
const GROUP: &str = "holdfast";
/// How long the agent may take to end when the keeper is told to stop.
const DRAIN: Duration = Duration::from_secs(10);
/// The agent goes before guests when processors are scarce, as far as the system
/// allows: an agreement that comes late looks like a lost node.
const NICE: i32 = -15;

/// `holdfast keeper`.
pub fn keeper(config: Option<&Path>) -> ExitCode {
    end("the keeper", run_keeper(config))
}

/// `holdfast agent`.
pub fn agent(config: Option<&Path>) -> ExitCode {
    end("the agent", run_agent(config))
}

/// `holdfast volume serve`.
pub fn volume(config: Option<&Path>, channel: i32) -> ExitCode {
    // First of all: whatever is opened later must not be taken for it.
    let channel = crate::realtime::inherited(channel);
    end("the volume server", channel.map_err(Into::into).and_then(|channel| run_volume(config, channel)))
}

/// `holdfast volume mount`.
pub fn mount(log: &str, volume: &str, at: &Path) -> ExitCode {
    end("the mount", log_to_stderr(log).and_then(|()| crate::mount::run(volume, at)))
}

fn run_volume(config: Option<&Path>, channel: OwnedFd) -> Result<()> {
    let config = set_up(config)?;
    rustls::crypto::ring::default_provider().install_default().ok();
    crate::volume::serve(channel, &config.run_dir.join(crate::volume::protocol::SOCKET))
}

fn end(who: &str, ended: Result<()>) -> ExitCode {
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("holdfast: {who} cannot go on: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn set_up(config: Option<&Path>) -> Result<Config> {
    let config = Config::load(config)?;
    log_to_stderr(&config.log)?;
    std::fs::create_dir_all(&config.run_dir).with_context(|| format!("cannot make {}", config.run_dir.display()))?;
    Ok(config)
}

fn log_to_stderr(log: &str) -> Result<()> {
    // What the Raft engine tells at every turn is for its own developers.
    let filter = EnvFilter::try_new(format!("openraft=error,{log}"))
        .with_context(|| format!("log = {log:?} is not a filter"))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    Ok(())
}

fn run_keeper(path: Option<&Path>) -> Result<()> {
    let config = set_up(path)?;
    // QEMU holds some descriptors for each disk and NIC.
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, 65536, 65536) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let mut agent: Vec<OsString> = vec![std::env::current_exe()?.into(), "agent".into()];
    if let Some(path) = path {
        agent.extend(["--config".into(), path.into()]);
    }
    let mut volume: Vec<OsString> = vec![std::env::current_exe()?.into(), "volume".into(), "serve".into()];
    if let Some(path) = path {
        volume.extend(["--config".into(), path.into()]);
    }
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let watchdogs = Watchdogs::of_host(config.watchdog()?);
    Ok(Keeper::run(KeeperConfig { run_dir: config.run_dir, agent, volume, drain: DRAIN, watchdogs })?)
}

fn run_agent(path: Option<&Path>) -> Result<()> {
    let config = set_up(path)?;
    rustls::crypto::ring::default_provider().install_default().ok();
    // Consensus has a thread of its own: whatever else the agent does stands in the way
    // of no heartbeat, and a heartbeat wakes one thread up, not three. It ends last.
    let engine = runtime("consensus", 1)?;
    let runtime = runtime("agent", 2)?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let agent = Agent::start(config.clone(), engine.handle().clone(), stop.clone()).await?;
        let (ending, parting) = (stop.clone(), agent.clone());
        tokio::spawn(async move {
            terminate.recv().await;
            tracing::info!("asked to end");
            parting.part().await;
            ending.cancel();
        });
        crate::http::serve(agent, config.agent_socket(), Some(GROUP), stop).await?;
        Ok(())
    })
}

fn runtime(name: &str, threads: usize) -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .thread_name(name)
        .worker_threads(threads)
        .max_blocking_threads(16)
        .on_thread_start(|| {
            if let Err(error) = crate::realtime::go_first(NICE) {
                tracing::warn!(%error, "the agent has no precedence over other processes");
            }
        })
        .enable_all()
        .build()
}
