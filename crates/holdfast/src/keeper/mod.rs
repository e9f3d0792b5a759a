//! The keeper: the small process that never needs a restart. It is the parent of
//! every VM's QEMU, of the agent and of the volume server, renews the node's lease, and kills the VMs
//! when the lease ends. No consensus, no API, no disk.
//!
//! ```text
//!  main thread                                lease thread (real-time)
//!  ├─ forks, reaps, restarts the agent        ├─ heartbeats, grants
//!  ├─ keeper.sock: protocol, control          └─ kills all VMs when the lease ends
//!  └─ one poll loop                            watchdog thread (real-time)
//!                                              └─ feeds the hardware watchdog
//!       shared: table (atomics), queues
//! ```
//! All children are forked by the main thread, because the kernel ties their
//! PR_SET_PDEATHSIG to the forking *thread*: they die with the keeper.
//!
//! ```text
//!  clearing ──leftovers of an earlier keeper are dead──▶ serving
//!     │ SIGTERM                                             │ SIGTERM
//!     ▼                                                     ▼
//!  draining: the agent gets SIGTERM and its time ─▶ killing the VMs ─▶ end
//! ```

pub mod client;
pub mod protocol;

mod agent;
mod control;
mod lease;
mod leftovers;
mod table;
mod vms;
mod volume;
pub mod watchdog;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use holdfast_core::watchdog::{DEATH_MS, Standing};
use holdfast_core::{Incarnation, NodeId};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use uuid::Uuid;

use self::agent::Agent;
use self::control::{Asked, Control};
use self::lease::{FromLease, Heartbeating, LeaseThread, Lines, ToLease};
use self::leftovers::{Leftover, Records};
use self::protocol::{Configuration, Event, Exit, Greeting, Refusal, Reply, Request};
use self::table::Table;
use self::vms::{Due, Vms};
use self::volume::VolumeServer;
use self::watchdog::{WatchdogLine, Watchdogs};
use crate::heartbeat::{KeyError, draw};
use crate::realtime::{LEASE_PRIORITY, go_realtime, lock_memory};

/// The name of the keeper's socket in its run directory.
pub const SOCKET: &str = "keeper.sock";

/// How long VMs may take to die from SIGKILL before that is called a failure.
const DEATH: Duration = Duration::from_millis(DEATH_MS);

/// How long an earlier keeper may take to let go of the run directory.
const HANDOVER: Duration = Duration::from_secs(2);

const RETRY: Duration = Duration::from_secs(1);

/// Messages under way between the two threads, in each direction.
const QUEUE: usize = 64;

/// What a keeper needs to know.
#[derive(Clone, Debug)]
pub struct KeeperConfig {
    /// For the socket and the records of processes: on a tmpfs, this keeper's own.
    pub run_dir: PathBuf,
    /// The agent: program and arguments. Restarted whenever it ends.
    pub agent: Vec<OsString>,
    /// The volume server, likewise, less its last argument; started once a disk on a
    /// LUN is to be served.
    pub volume: Vec<OsString>,
    /// How long the agent may take to end when the keeper is told to stop: time
    /// in which it moves the VMs away.
    pub drain: Duration,
    /// The hardware watchdog.
    pub watchdogs: Watchdogs,
}

/// Why a keeper cannot run, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// One keeper per run directory.
    #[error("another keeper runs in {run_dir}: stop it first, or give this one a run directory of its own")]
    AlreadyRunning {
        /// The directory.
        run_dir: PathBuf,
    },
    /// A file or directory that it needs.
    #[error("cannot use {path}: {source}")]
    File {
        /// Which one.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Something that every Linux since 5.3 has.
    #[error("this system does not give the keeper what it needs ({what}): {source}")]
    System {
        /// What is missing.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// No random numbers.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// VMs survived the keeper's end.
    #[error("{count} VMs did not die from SIGKILL within {} s: this host gets no lease before they are dead", DEATH.as_secs())]
    Undead {
        /// How many.
        count: usize,
    },
}

/// A keeper at work.
pub struct Keeper {
    config: KeeperConfig,
    life: Incarnation,
    signals: SignalFd,
    control: Control,
    vms: Vms,
    table: Arc<Table>,
    leftovers: Vec<Leftover>,
    retry_at: Instant,
    agent: Agent,
    volume: VolumeServer,
    identity: Option<(Uuid, NodeId)>,
    /// Waits until the leftovers are dead.
    configured: Option<Box<Heartbeating>>,
    lease: LeaseLine,
    watchdog: WatchdogLine,
    ending: Option<Ending>,
    /// Held for the keeper's whole life.
    _lock: Flock<File>,
}

struct LeaseLine {
    thread: JoinHandle<()>,
    outbox: SyncSender<ToLease>,
    wake: Arc<EventFd>,
    inbox: Receiver<FromLease>,
    notify: Arc<EventFd>,
}

enum Ending {
    /// The agent has until then.
    Draining(Instant),
    /// The VMs have until then.
    Killing(Instant),
}

impl Keeper {
    /// Runs until SIGTERM or SIGINT. Call it from a thread that lasts as long as
    /// the process, before any other thread was started: the signals that it
    /// waits for have to be blocked in all of them.
    pub fn run(config: KeeperConfig) -> Result<(), KeeperError> {
        let mut keeper = Keeper::start(config)?;
        loop {
            keeper.wait()?;
            if let Some(outcome) = keeper.turn() {
                keeper.finish();
                return outcome;
            }
        }
    }

    fn start(config: KeeperConfig) -> Result<Keeper, KeeperError> {
        let system = |what| move |source: io::Error| KeeperError::System { what, source };
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| KeeperError::File { path, source }
        };
        let run_dir = config.run_dir.clone();
        fs::create_dir_all(&run_dir).map_err(file(&run_dir))?;
        let lock = lock(&run_dir)?;
        if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
            tracing::warn!(%error, "the kernel may kill this keeper, and all VMs with it, when memory runs out");
        }

        // First of all: what an earlier keeper ran must be dead before this life
        // asks for a lease, because asking says that it is.
        let records = Records::open(&run_dir).map_err(file(&run_dir))?;
        let leftovers = records.kill_leftovers().map_err(file(&run_dir))?;
        let life = Incarnation(draw()?);
        tracing::info!(%life, leftovers = leftovers.len(), "keeper starts");

        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
            mask.add(signal);
        }
        let signals = mask
            .thread_block()
            .and_then(|()| SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC))
            .map_err(|errno| system("signalfd")(errno.into()))?;
        let socket = run_dir.join(SOCKET);
        let control = Control::listen(&socket).map_err(file(&socket))?;
        let table = Arc::new(Table::new().map_err(system("shared memory"))?);
        let lease = start_lease_thread(life, &table).map_err(system("a lease thread"))?;
        let watchdog = WatchdogLine::start(config.watchdogs.clone(), &run_dir, &table, &lease.notify)
            .map_err(system("a watchdog thread"))?;
        if leftovers.is_empty() {
            watchdog.cleared();
        }
        if let Err(error) = lock_memory() {
            tracing::warn!(%error, "cannot lock memory: under memory pressure this node may lose its lease (needs CAP_IPC_LOCK)");
        }
        let mut agent = Agent::new(config.agent.clone()).map_err(system("an agent to start"))?;
        agent.start_if_due();
        let volume = VolumeServer::new(config.volume.clone());
        Ok(Keeper {
            config,
            life,
            signals,
            control,
            vms: Vms::new(table.clone(), records),
            table,
            leftovers,
            retry_at: Instant::now(),
            agent,
            volume,
            identity: None,
            configured: None,
            lease,
            watchdog,
            ending: None,
            _lock: lock,
        })
    }

    /// Waits for something to do.
    fn wait(&mut self) -> Result<(), KeeperError> {
        let readable = PollFlags::POLLIN;
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), readable),
            PollFd::new(self.lease.notify.as_fd(), readable),
            PollFd::new(self.control.listener(), readable),
        ];
        let reports = self.vms.reports().map(|(_, report)| report.as_fd());
        fds.extend(reports.map(|report| PollFd::new(report, readable)));
        let clients: Vec<_> = self.control.clients().collect();
        let first = fds.len();
        fds.extend(clients.iter().map(|(_, stream, interest)| PollFd::new(*stream, *interest)));
        let timeout = self.deadline().map_or(PollTimeout::NONE, |at| {
            // Rounded up: waking a moment early would mean waking twice.
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(KeeperError::System { what: "poll", source: errno.into() });
            }
        }
        let ready = |index: usize| fds[first + index].revents().unwrap_or(PollFlags::POLLIN);
        let ready: Vec<_> = clients
            .iter()
            .enumerate()
            .map(|(index, (id, ..))| (*id, ready(index)))
            .filter(|(_, events)| !events.is_empty())
            .collect();
        for (id, events) in ready {
            if events.contains(PollFlags::POLLOUT) {
                self.control.flush(id);
            }
            if events.intersects(!PollFlags::POLLOUT) {
                self.serve(id);
            }
        }
        Ok(())
    }

    /// When something is due by itself.
    fn deadline(&self) -> Option<Instant> {
        let retry = (!self.leftovers.is_empty()).then_some(self.retry_at);
        let ending = self.ending.as_ref().map(|ending| match ending {
            Ending::Draining(until) | Ending::Killing(until) => *until,
        });
        let agent = self.agent.due().filter(|_| self.ending.is_none());
        let volume = self.volume.due().filter(|_| self.ending.is_none() && self.table.permit_now().is_ok());
        [retry, ending, agent, volume].into_iter().flatten().min()
    }

    /// Everything that is due; `Some` when the keeper has come to its end.
    fn turn(&mut self) -> Option<Result<(), KeeperError>> {
        self.control.accept();
        self.hear_threads();
        for tag in self.vms.reports().map(|(tag, _)| tag).collect::<Vec<_>>() {
            let due = self.vms.read_report(tag);
            self.answer(due);
        }
        self.read_signals();
        self.vms.tidy();
        self.volume.tidy(&self.table);
        self.clear_leftovers();
        match self.ending {
            None => {
                self.agent.start_if_due();
                self.volume.start_if_due(&self.table, self.vms.records());
                None
            }
            Some(_) => self.end(),
        }
    }

    fn hear_threads(&mut self) {
        let _ = self.lease.notify.read();
        while let Ok(message) = self.lease.inbox.try_recv() {
            match message {
                FromLease::Gained { term } => {
                    tracing::info!(%term, "lease gained: VMs may run");
                    self.control.publish(Event::LeaseGained { term });
                }
                FromLease::Lost { term, killed, late_us } => {
                    tracing::warn!(%term, killed, late_us, "lease lost: all VMs were killed");
                    self.control.publish(Event::LeaseLost { term, killed });
                }
                FromLease::Retired(_) => {}
            }
        }
        if let Some(standing) = self.watchdog.heard() {
            match standing {
                Standing::Left { .. } => {
                    tracing::error!(
                        ?standing,
                        "VMs of a lease that is over are not dead: the watchdog is not fed any more"
                    );
                }
                _ => tracing::info!(?standing, "the watchdog stands otherwise"),
            }
            self.control.publish(Event::WatchdogChanged);
        }
    }

    fn read_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            let number = signal.ssi_signo.cast_signed();
            if number == Signal::SIGTERM as i32 || number == Signal::SIGINT as i32 {
                self.begin_end();
            }
        }
        // One SIGCHLD may stand for many ends; as PID 1 also for those of strangers.
        loop {
            let (pid, exit) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, status)) => (pid, Exit::Status(status)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Exit::Signal(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => continue,
            };
            self.reaped(pid.as_raw(), exit);
        }
    }

    fn reaped(&mut self, pid: i32, exit: Exit) {
        if self.agent.ended(pid, exit) {
            return;
        }
        if self.volume.ended(pid, exit, &self.table, self.vms.records()) {
            // The lease thread may be waiting for the last one to be dead.
            let _ = self.lease.wake.write(1);
            return;
        }
        let Some((tag, due)) = self.vms.ended(pid, exit) else {
            return;
        };
        tracing::info!(vm = %tag.vm, epoch = %tag.epoch, %exit, "QEMU ended");
        self.answer(due);
        self.control.publish(Event::Exited { vm: tag.vm, epoch: tag.epoch, exit });
        // The lease thread may be waiting for the last one to be dead.
        let _ = self.lease.wake.write(1);
        self.watchdog.look();
    }

    fn answer(&mut self, due: impl IntoIterator<Item = Due>) {
        for (asked, result) in due {
            self.control.reply(asked, result);
        }
    }

    fn serve(&mut self, client: u64) {
        for call in self.control.read(client) {
            match call {
                Ok((asked, call)) => {
                    let due = self.handle(asked, call.request);
                    self.answer(due);
                }
                Err(refusal) => {
                    // A line without a readable number is answered as number 0.
                    self.control.reply(Asked { client, id: 0 }, Err(refusal));
                }
            }
        }
    }

    /// `None`: it is answered later.
    fn handle(&mut self, asked: Asked, request: Request) -> Option<Due> {
        let result = match request {
            Request::Hello => Ok(Reply::Hello(self.greeting())),
            Request::Configure(configuration) => self.configure(&configuration),
            Request::Start(_) if self.ending.is_some() => Err(Refusal::Stopping),
            Request::Start(wanted) => {
                let due = self.vms.start(asked, &wanted);
                self.watchdog.look();
                return due;
            }
            Request::Retire(tag) => self.vms.retire(tag),
            Request::Kill(tag) => return self.vms.kill(asked, tag),
            Request::End => {
                self.begin_end();
                Ok(Reply::Done)
            }
            Request::List => Ok(Reply::Vms(self.vms.list())),
            Request::Forget(tag) => self.vms.forget(tag),
            Request::Listen { path } => match self.volume.listen(&path) {
                Ok(()) => Ok(Reply::Done),
                Err(error) => Err(Refusal::NoSocket { path, why: error.to_string() }),
            },
            Request::Unlisten { path } => {
                self.volume.unlisten(&path);
                Ok(Reply::Done)
            }
            Request::Subscribe => {
                // Answered first, so that the list comes before every event.
                self.control.reply(asked, Ok(Reply::Vms(self.vms.list())));
                self.control.subscribe(asked.client);
                return None;
            }
        };
        Some((asked, result))
    }

    fn greeting(&self) -> Greeting {
        Greeting {
            incarnation: self.life,
            version: env!("CARGO_PKG_VERSION").into(),
            lease: self.table.view(),
            leftovers: self.leftovers.iter().map(Leftover::describe).collect(),
            watchdog: self.watchdog.standing().clone(),
            vms: self.vms.list(),
        }
    }

    fn configure(&mut self, configuration: &Configuration) -> Result<Reply, Refusal> {
        let wanted = (configuration.cluster, configuration.node);
        // A lease and its VMs belong to one node of one cluster.
        if let Some((cluster, node)) = self.identity
            && (cluster, node) != wanted
        {
            return Err(Refusal::OtherIdentity { cluster, node });
        }
        let heartbeating = Heartbeating::new(configuration, self.life)
            .map_err(|error| Refusal::Unusable { why: error.to_string() })?;
        self.identity = Some(wanted);
        self.configured = Some(Box::new(heartbeating));
        self.hand_over_configuration();
        Ok(Reply::Done)
    }

    /// Heartbeats say that everything of before is dead, so not before it is.
    fn hand_over_configuration(&mut self) {
        if !self.leftovers.is_empty() {
            return;
        }
        if let Some(configured) = self.configured.take()
            && self.lease.outbox.try_send(ToLease::Ask(configured)).is_err()
        {
            tracing::error!("the lease thread does not take a new configuration");
        }
        let _ = self.lease.wake.write(1);
    }

    fn clear_leftovers(&mut self) {
        if self.leftovers.is_empty() {
            return;
        }
        let records = self.vms.records();
        self.leftovers.retain_mut(|leftover| !records.dead(leftover));
        if self.leftovers.is_empty() {
            tracing::info!("everything that an earlier keeper ran is dead");
            self.watchdog.cleared();
            self.hand_over_configuration();
        } else if Instant::now() >= self.retry_at {
            for leftover in &self.leftovers {
                tracing::error!("this node asks for no lease yet: {}", leftover.describe());
            }
            self.retry_at = Instant::now() + RETRY;
        }
    }

    fn begin_end(&mut self) {
        let patience = match self.ending {
            // Asked twice: no more waiting for the agent.
            Some(Ending::Draining(_)) => Duration::ZERO,
            Some(Ending::Killing(_)) => return,
            None => {
                tracing::info!("stopping: the agent has {:?}", self.config.drain);
                self.agent.terminate();
                self.config.drain
            }
        };
        self.ending = Some(Ending::Draining(Instant::now() + patience));
    }

    fn end(&mut self) -> Option<Result<(), KeeperError>> {
        let now = Instant::now();
        if let Some(Ending::Draining(until)) = self.ending {
            if self.agent.alive() && now < until {
                return None;
            }
            self.agent.kill();
            self.vms.kill_all();
            self.volume.kill();
            self.ending = Some(Ending::Killing(now + DEATH));
        }
        let Some(Ending::Killing(until)) = self.ending else {
            return None;
        };
        match self.vms.alive_count() {
            0 if !self.agent.alive() && !self.volume.alive() => Some(Ok(())),
            count if now >= until => Some(Err(KeeperError::Undead { count })),
            _ => None,
        }
    }

    /// The lease is given up last, when no VM can be using it.
    fn finish(self) {
        self.watchdog.stop();
        let told = self.lease.outbox.try_send(ToLease::Stop);
        let _ = self.lease.wake.write(1);
        if told.is_ok() && self.lease.thread.join().is_err() {
            tracing::error!("the lease thread had panicked");
        }
    }
}

fn lock(run_dir: &Path) -> Result<Flock<File>, KeeperError> {
    let path = run_dir.join("keeper.lock");
    let deadline = Instant::now() + HANDOVER;
    let mut file = File::create(&path).map_err(|source| KeeperError::File { path: path.clone(), source })?;
    loop {
        // Not blocking, because that has no deadline.
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= deadline => {
                return Err(KeeperError::AlreadyRunning { run_dir: run_dir.to_owned() });
            }
            Err((same, Errno::EWOULDBLOCK | Errno::EINTR)) => file = same,
            Err((_, errno)) => {
                return Err(KeeperError::File { path, source: errno.into() });
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn start_lease_thread(life: Incarnation, table: &Arc<Table>) -> io::Result<LeaseLine> {
    let bell = || -> io::Result<_> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Ok(Arc::new(EventFd::from_flags(flags)?))
    };
    let (wake, notify) = (bell()?, bell()?);
    let (outbox, their_inbox) = sync_channel(QUEUE);
    let (their_outbox, inbox) = sync_channel(QUEUE);
    let lines = Lines { inbox: their_inbox, wake: wake.clone(), outbox: their_outbox, notify: notify.clone() };
    let state = LeaseThread::new(life, table.clone(), lines)?;
    let thread = std::thread::Builder::new()
        .name("lease".into())
        .stack_size(256 << 10)
        .spawn(move || {
            if let Err(error) = go_realtime(LEASE_PRIORITY) {
                tracing::warn!(%error, "no real-time priority for the lease thread: on a busy host this node may lose its lease (needs CAP_SYS_NICE)");
            }
            // A keeper whose lease thread is gone could not end its lease: it must
            // not outlive it, and the VMs die with it.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| state.run()));
            if outcome.is_err() {
                std::process::abort();
            }
        })?;
    Ok(LeaseLine { thread, outbox, wake, inbox, notify })
}
