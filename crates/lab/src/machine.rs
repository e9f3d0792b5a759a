//! A host while it has power: its init, and what that reports.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;

use crate::{netns, procfs, sys};

/// The longest line that an init may send, in bytes.
const MAX_LINE: u64 = 4096;

/// What has happened to a host's service since power-on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceEvent {
    /// The service's pid as the host sees it; `None` when it does not run.
    pub pid: Option<i32>,
    /// How often it has been started.
    pub starts: u32,
    /// How it ended last: `code 0`, `signal SIGKILL`.
    pub last_exit: Option<String>,
    /// What last went wrong in starting it.
    pub failure: Option<String>,
}

#[derive(Debug, Default)]
struct Report {
    up: bool,
    service: ServiceEvent,
    dead: Option<Instant>,
}

#[derive(Debug, Default)]
struct Board {
    report: Mutex<Report>,
    changed: Condvar,
}

/// A running host.
#[derive(Debug)]
pub(crate) struct Machine {
    watcher: Watcher,
    control: UnixStream,
    pid_namespace: u64,
    thread: Option<JoinHandle<()>>,
}

/// Sees what becomes of a machine, and knows the way into it.
#[derive(Debug, Clone)]
pub(crate) struct Watcher {
    board: Arc<Board>,
    pub(crate) init: Arc<OwnedFd>,
}

impl Machine {
    /// Starts `command` as the init of a new PID namespace inside the network
    /// namespace `network`, and waits until it says that it is up.
    pub(crate) fn boot(command: Command, network: &str, deadline: Duration) -> Result<Self> {
        let (control, theirs) = UnixStream::pair().context("making the init's control socket")?;
        let lines = control.try_clone().context("duplicating the init's control socket")?;
        let board = Arc::new(Board::default());
        let (report, reported) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("host {network}"))
            .spawn({
                let (board, network) = (Arc::clone(&board), network.to_owned());
                move || live(command, theirs, lines, &network, &board, &report)
            })
            .context("starting the thread of a host")?;
        let (pid, init) = reported.recv().map_err(|_| anyhow!("the host's thread died"))??;
        let mut machine = Self {
            watcher: Watcher { board, init: Arc::new(init) },
            control,
            pid_namespace: procfs::pid_namespace(pid).unwrap_or_default(),
            thread: Some(thread),
        };
        let booted = machine.watcher.wait(deadline, "its init is up", |report| report.up).map(drop);
        if let Err(error) = booted {
            let failure = machine.service().failure;
            // Dropping a machine switches it off.
            let _ = machine.kill().and_then(|()| machine.wait_dead(deadline));
            return Err(failure.map_or(error, |text| anyhow!(text)));
        }
        if machine.pid_namespace == 0 {
            bail!("cannot read the PID namespace of the host's init");
        }
        Ok(machine)
    }

    pub(crate) fn pid_namespace(&self) -> u64 {
        self.pid_namespace
    }

    pub(crate) fn watcher(&self) -> Watcher {
        self.watcher.clone()
    }

    pub(crate) fn service(&self) -> ServiceEvent {
        self.watcher.report().service.clone()
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.watcher.report().dead.is_some()
    }

    pub(crate) fn command(&self, line: &str) -> Result<()> {
        (&self.control)
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| format!("telling the host's init to {line}"))
    }

    /// SIGKILL to the init, and so to everything in its PID namespace.
    pub(crate) fn kill(&self) -> Result<()> {
        match sys::pidfd_send_signal(&*self.watcher.init, Signal::SIGKILL) {
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => Ok(()),
            result => result.context("killing the host's init"),
        }
    }

    /// Waits until the last process of the host is gone.
    pub(crate) fn wait_dead(&mut self, deadline: Duration) -> Result<Instant> {
        let dead = self.watcher.wait(deadline, "every process is gone", |r| r.dead.is_some())?;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        dead.dead.context("the host's death has no instant")
    }

    pub(crate) fn wait_service(
        &self,
        deadline: Duration,
        wanted: impl Fn(&ServiceEvent) -> bool,
    ) -> Result<ServiceEvent> {
        self.watcher.wait_service(deadline, wanted)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.kill();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Watcher {
    pub(crate) fn wait_service(
        &self,
        deadline: Duration,
        wanted: impl Fn(&ServiceEvent) -> bool,
    ) -> Result<ServiceEvent> {
        let report =
            self.wait(deadline, "its service is as wanted", |report| wanted(&report.service) || report.dead.is_some())?;
        let service = report.service.clone();
        if !wanted(&service) {
            bail!("the host died; its service: {service:?}");
        }
        Ok(service)
    }

    fn report(&self) -> MutexGuard<'_, Report> {
        self.board.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, deadline: Duration, what: &str, wanted: impl Fn(&Report) -> bool) -> Result<MutexGuard<'_, Report>> {
        let (report, _) = self
            .board
            .changed
            .wait_timeout_while(self.report(), deadline, |report| !wanted(report) && report.dead.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        if !wanted(&report) {
            let dead = if report.dead.is_some() { "; the host is dead" } else { "" };
            bail!("waited {deadline:?} in vain until {what}{dead}; its service: {:?}", report.service);
        }
        Ok(report)
    }
}

/// The life of one host. This thread starts the init, which dies with it, and
/// so stays until the init is gone.
fn live(
    mut command: Command,
    theirs: UnixStream,
    lines: UnixStream,
    network: &str,
    board: &Board,
    report: &mpsc::Sender<Result<(i32, OwnedFd)>>,
) {
    let started = (|| {
        netns::enter(network)?;
        unshare(CloneFlags::CLONE_NEWPID).context("making a PID namespace (needs root)")?;
        command.stdin(Stdio::from(OwnedFd::from(theirs)));
        sys::die_with_spawning_thread(&mut command);
        let child = command.spawn().context("starting the host's init")?;
        let pid = child.id() as i32;
        let pidfd = sys::pidfd_open(pid).context("opening the host's init")?;
        Ok((child, pid, pidfd))
    })();
    // The command keeps its copy of the init's end of the socket, which would
    // hide that the init has closed its own.
    drop(command);
    let mut child = match started {
        Ok((child, pid, pidfd)) => {
            let _ = report.send(Ok((pid, pidfd)));
            child
        }
        Err(error) => {
            let _ = report.send(Err(error));
            return;
        }
    };
    follow(lines, board);
    // Returns only when the kernel has collected every process of the namespace.
    let _ = child.wait();
    board.report.lock().unwrap_or_else(PoisonError::into_inner).dead = Some(Instant::now());
    board.changed.notify_all();
}

/// Takes down what the init says until it says no more.
fn follow(lines: UnixStream, board: &Board) {
    let mut lines = BufReader::new(lines);
    loop {
        let mut line = String::new();
        match (&mut lines).take(MAX_LINE).read_line(&mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let (word, rest) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
        let mut report = board.report.lock().unwrap_or_else(PoisonError::into_inner);
        match word {
            "up" => report.up = true,
            "started" => {
                report.service.pid = rest.parse().ok();
                report.service.starts += 1;
            }
            "exited" => {
                report.service.pid = None;
                report.service.last_exit = Some(rest.to_owned());
            }
            "failed" => report.service.failure = Some(rest.to_owned()),
            _ => {}
        }
        drop(report);
        board.changed.notify_all();
    }
}
