//! The watchdog thread: feeds the host's hardware watchdog while VMs are alive, and
//! leaves it alone when VMs of a lease that is over cannot be shown dead (safety
//! rule 2). When to do what is decided by [`holdfast_core::watchdog`].
//!
//! ```text
//!  run directory      device
//!  record written ──▶ opened: armed ──▶ fed ──▶ "V", closed: disarmed ──▶ record removed
//!                                        │
//!                                        └─ the keeper dies: it stays armed, and only a
//!                                           successor that has seen everything dead
//!                                           disarms it in time
//! ```
//! It looks at nothing but the keeper's table, with real-time priority just below the
//! lease thread's: whoever keeps the lease thread from running keeps this one from
//! feeding. Feeding takes no lock, asks for no memory and writes no log.

mod device;

#[cfg(test)]
pub(super) mod stand_in;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use holdfast_core::lease::BootTime;
use holdfast_core::watchdog::{Act, FEED_MS, Standing, Watchdog};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use self::device::{Armed, Book, Record};
pub use self::device::{Choice, Watchdogs};
use super::table::Table;
use crate::realtime::{Alarm, LEASE_PRIORITY, boot_time, go_realtime};

const PRIORITY: i32 = LEASE_PRIORITY - 1;

/// Changes that may wait to be heard.
const QUEUE: usize = 16;

/// The main thread's end.
pub struct WatchdogLine {
    thread: JoinHandle<()>,
    signs: Arc<Signs>,
    inbox: Receiver<Standing>,
    standing: Standing,
}

/// What the main thread says.
struct Signs {
    /// A VM was started or is dead, or one of the following.
    wake: EventFd,
    /// Nothing of an earlier keeper is alive.
    cleared: AtomicBool,
    stopping: AtomicBool,
}

impl WatchdogLine {
    /// Starts the thread. `notify` is rung when there is something to hear.
    ///
    /// # Errors
    /// The system has no thread, timer or descriptor left, or the run directory cannot be read.
    pub fn start(
        watchdogs: Watchdogs,
        run_dir: &Path,
        table: &Arc<Table>,
        notify: &Arc<EventFd>,
    ) -> io::Result<WatchdogLine> {
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let signs = Arc::new(Signs {
            wake: EventFd::from_flags(flags)?,
            cleared: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        });
        let (outbox, inbox) = sync_channel(QUEUE);
        let mut state = WatchdogThread::new(watchdogs, Book::open(run_dir)?, table.clone(), signs.clone())?;
        state.tells = Some((outbox, notify.clone()));
        let standing = state.standing.clone();
        let thread = std::thread::Builder::new().name("watchdog".into()).stack_size(256 << 10).spawn(move || {
            if let Err(error) = go_realtime(PRIORITY) {
                tracing::warn!(%error, "no real-time priority for the watchdog thread: on a busy host it may feed late (needs CAP_SYS_NICE)");
            }
            // A watchdog that nobody feeds would reset the host for no reason of the
            // lease's: the VMs die with this keeper, and the next one disarms it.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| state.run()));
            if outcome.is_err() {
                std::process::abort();
            }
        })?;
        Ok(WatchdogLine { thread, signs, inbox, standing })
    }

    /// A VM was started, or is dead.
    pub fn look(&self) {
        let _ = self.signs.wake.write(1);
    }

    /// Nothing of an earlier keeper is alive any more.
    pub fn cleared(&self) {
        self.signs.cleared.store(true, SeqCst);
        self.look();
    }

    /// What changed since the last time, if anything did.
    pub fn heard(&mut self) -> Option<&Standing> {
        self.standing = self.inbox.try_iter().last()?;
        Some(&self.standing)
    }

    /// How the watchdog stands.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Ends the thread. The watchdog is disarmed if every VM is dead, else it is left
    /// armed.
    pub fn stop(self) {
        self.signs.stopping.store(true, SeqCst);
        self.look();
        if self.thread.join().is_err() {
            tracing::error!("the watchdog thread had panicked");
        }
    }
}

/// The thread's state.
struct WatchdogThread {
    watchdogs: Watchdogs,
    book: Book,
    table: Arc<Table>,
    signs: Arc<Signs>,
    alarm: Alarm,
    machine: Watchdog,
    armed: Option<Armed>,
    /// What an earlier keeper left armed.
    left: Option<Record>,
    unfed: bool,
    standing: Standing,
    tells: Option<(SyncSender<Standing>, Arc<EventFd>)>,
}

impl WatchdogThread {
    fn new(watchdogs: Watchdogs, book: Book, table: Arc<Table>, signs: Arc<Signs>) -> io::Result<WatchdogThread> {
        let left = book.left().unwrap_or_else(|error| {
            tracing::error!(%error, "the record of an armed watchdog cannot be read: if an earlier keeper left one armed, it resets this host");
            None
        });
        let standing = match &left {
            Some(Record { device, timeout_s, .. }) => Standing::Left { device: device.clone(), timeout_s: *timeout_s },
            None => ready(&watchdogs),
        };
        Ok(WatchdogThread {
            watchdogs,
            book,
            table,
            signs,
            alarm: Alarm::new()?,
            machine: Watchdog::default(),
            armed: None,
            left,
            unfed: false,
            standing,
            tells: None,
        })
    }

    fn run(mut self) {
        while !self.signs.stopping.load(SeqCst) {
            self.wait();
            self.turn();
        }
        self.turn();
        // What is armed now watches something that is alive.
        if let Some(armed) = &self.armed {
            tracing::error!(
                device = armed.device.path,
                timeout_s = armed.timeout_s,
                "VMs are not dead: the watchdog is left armed and resets this host"
            );
        }
    }

    fn wait(&self) {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [readable(self.alarm.as_fd()), readable(self.signs.wake.as_fd())];
        // An error here can only be EINTR: the next turn waits again.
        let _ = poll(&mut fds, PollTimeout::NONE);
    }

    fn turn(&mut self) {
        let _ = self.signs.wake.read();
        let now = boot_time();
        if let Some(record) = self.left.take() {
            self.inherit(now, record);
            return;
        }
        let seen = self.table.seen(now);
        match self.machine.turn(now, seen) {
            Act::Rest => {}
            Act::Feed => self.feed(),
            Act::Arm(timeout_s) => self.arm(now, timeout_s),
            Act::Retime(timeout_s) => self.retime(now, timeout_s),
            Act::Leave => self.leave(),
            Act::Disarm => self.disarm(),
        }
        // It fails only for times that are no times.
        let _ = self.alarm.set(self.machine.wake(now, seen));
    }

    /// What an earlier keeper left armed bites, unless all that it ran is dead.
    fn inherit(&mut self, now: BootTime, record: Record) {
        let mut wake = None;
        if !self.signs.cleared.load(SeqCst) {
            self.left = Some(record);
        } else if let Err(error) = self.book.take_over(record.clone()) {
            tracing::error!(device = record.device.path, %error, "an earlier keeper left this watchdog armed, and it cannot be disarmed: it resets this host");
            self.left = Some(record);
            wake = Some(now.plus_ms(FEED_MS));
        } else {
            tracing::info!(
                device = record.device.path,
                "disarmed the watchdog of an earlier keeper, whose VMs are dead"
            );
            self.tell(ready(&self.watchdogs));
            wake = Some(now);
        }
        let _ = self.alarm.set(wake);
    }

    fn feed(&mut self) {
        let Some(armed) = &self.armed else {
            return;
        };
        match armed.feed() {
            Ok(()) => self.unfed = false,
            Err(_) if self.unfed => {}
            Err(error) => {
                self.unfed = true;
                tracing::error!(device = armed.device.path, %error, "the watchdog cannot be fed: it may reset this host");
            }
        }
        if matches!(self.standing, Standing::Left { .. }) {
            tracing::warn!("the VMs are dead, so the watchdog is fed again");
            self.tell_armed();
        }
    }

    fn arm(&mut self, now: BootTime, timeout_s: u32) {
        match self.watchdogs.find().and_then(|device| self.book.arm(device, timeout_s)) {
            Ok(armed) => {
                self.armed = Some(armed);
                self.machine.armed(timeout_s);
                self.tell_armed();
            }
            Err(why) => self.fail(now, why),
        }
    }

    fn retime(&mut self, now: BootTime, timeout_s: u32) {
        let Some(armed) = &mut self.armed else {
            return;
        };
        match self.book.retime(armed, timeout_s) {
            Ok(()) => {
                self.machine.armed(timeout_s);
                self.tell_armed();
            }
            Err(why) => {
                self.disarm();
                if self.armed.is_none() {
                    self.fail(now, why);
                }
            }
        }
    }

    fn fail(&mut self, now: BootTime, why: String) {
        self.machine.failed(now);
        self.tell(Standing::Absent { why });
    }

    fn leave(&mut self) {
        if let Some(Armed { device, timeout_s, .. }) = &self.armed {
            self.tell(Standing::Left { device: device.clone(), timeout_s: *timeout_s });
        }
    }

    fn disarm(&mut self) {
        let Some(armed) = self.armed.take() else {
            return;
        };
        match self.book.disarm(armed) {
            Ok(()) => {
                self.machine.disarmed();
                self.tell(ready(&self.watchdogs));
            }
            Err((armed, error)) => {
                tracing::error!(device = armed.device.path, %error, "the watchdog cannot be disarmed, so it is fed");
                self.armed = Some(armed);
                self.feed();
            }
        }
    }

    fn tell_armed(&mut self) {
        if let Some(Armed { device, timeout_s, .. }) = &self.armed {
            self.tell(Standing::Armed { device: device.clone(), timeout_s: *timeout_s });
        }
    }

    fn tell(&mut self, standing: Standing) {
        if standing == self.standing {
            return;
        }
        self.standing = standing;
        if let Some((outbox, notify)) = &self.tells {
            // Full only when the main thread has not run for very long.
            let _ = outbox.try_send(self.standing.clone());
            let _ = notify.write(1);
        }
    }
}

fn ready(watchdogs: &Watchdogs) -> Standing {
    match watchdogs.find() {
        Ok(device) => Standing::Ready { device },
        Err(why) => Standing::Absent { why },
    }
}
