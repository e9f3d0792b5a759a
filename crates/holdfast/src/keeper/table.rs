//! What the keeper's threads share: whether VMs may run, and the
//! processes that must not outlive that.
//!
//! No lock: the lease thread has real-time priority and must never wait for a
//! thread without. The two races are closed like this:
//!
//! ```text
//!  main thread                          lease thread, when the lease ends
//!  generation g, odd: held              generation += 1: even
//!  fork; the child waits at its gate    (the volume server is told here)
//!  publish its pidfd                    kill every published pidfd
//!  generation still g? open the gate
//! ```
//! All of it is sequentially consistent, so either the lease thread sees the
//! pidfd, or the main thread sees the new generation and the gate stays shut.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicI32, AtomicU64};

use holdfast_core::NodeTerm;
use holdfast_core::lease::BootTime;
use holdfast_core::watchdog::Seen;

use super::protocol::{LeaseView, Refusal};
use crate::realtime::{LeasePage, boot_time, pidfd_kill};

/// How many VMs one keeper can hold.
pub const CAPACITY: usize = 512;

const FREE: i32 = -1;
const NEVER: u64 = u64::MAX;

/// Shared by the keeper's threads.
pub struct Table {
    lease: LeasePage,
    /// Lets the volume server read `lease`.
    lease_fd: OwnedFd,
    length_ms: AtomicU64,
    late_us: AtomicU64,
    /// Odd while [`Table::kill_all`] is going through the slots.
    passes: AtomicU64,
    pidfds: [AtomicI32; CAPACITY],
}

/// The permission to start VMs, as long as the generation lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permit(u64);

impl Table {
    /// No lease, no processes.
    pub fn new() -> io::Result<Self> {
        let (lease, lease_fd) = LeasePage::create()?;
        Ok(Table {
            lease,
            lease_fd,
            length_ms: AtomicU64::new(0),
            late_us: AtomicU64::new(NEVER),
            passes: AtomicU64::new(0),
            pidfds: [const { AtomicI32::new(FREE) }; CAPACITY],
        })
    }

    /// With which another process can read the lease.
    pub fn lease_fd(&self) -> &OwnedFd {
        &self.lease_fd
    }

    /// Whether VMs may run, for the lease thread's own use.
    pub fn open(&self) -> bool {
        !self.lease.generation.load(SeqCst).is_multiple_of(2)
    }

    /// Lease thread: VMs may run.
    pub fn gain(&self, term: NodeTerm, ends: BootTime) {
        debug_assert!(!self.open());
        self.lease.term.store(term.0, SeqCst);
        self.lease.ends.store(ends.0, SeqCst);
        self.lease.generation.fetch_add(1, SeqCst);
    }

    /// Lease thread: they may run longer.
    pub fn renew(&self, ends: BootTime) {
        self.lease.ends.store(ends.0, SeqCst);
    }

    /// Lease thread: how long leases are, in milliseconds.
    pub fn lasting(&self, length_ms: u64) {
        self.length_ms.store(length_ms, SeqCst);
    }

    /// Lease thread: no VM may start any more; the running ones are to be killed next.
    pub fn close(&self) {
        debug_assert!(self.open());
        self.lease.generation.fetch_add(1, SeqCst);
    }

    /// Lease thread: SIGKILL to every VM; says how many were alive.
    pub fn kill_all(&self) -> u32 {
        self.passes.fetch_add(1, SeqCst);
        let mut killed = 0;
        for slot in &self.pidfds {
            let pidfd = slot.load(SeqCst);
            // Only its reaping by the main thread counts as death, so an error
            // here is tried again at the next heartbeat.
            if pidfd != FREE && pidfd_kill(pidfd).unwrap_or(false) {
                killed += 1;
            }
        }
        self.passes.fetch_add(1, SeqCst);
        killed
    }

    /// Lease thread: notes how long after the lease's end the VMs were sent SIGKILL,
    /// in microseconds.
    pub fn ended(&self, late_us: u64) {
        self.late_us.store(late_us, SeqCst);
    }

    /// Lease thread, watchdog thread: whether every VM was seen dead.
    pub fn all_dead(&self) -> bool {
        self.pidfds.iter().all(|slot| slot.load(SeqCst) == FREE)
    }

    /// Watchdog thread: whether VMs may run, and whether any is alive. In this order:
    /// a table that is open again has seen the VMs of the last lease die.
    pub fn seen(&self, now: BootTime) -> Seen {
        let alive = !self.all_dead();
        let ends = BootTime(self.lease.ends.load(SeqCst));
        Seen { held: self.open() && now < ends, ends, alive, lease_ms: self.length_ms.load(SeqCst) }
    }

    /// Main thread: may the volume server start?
    pub fn permit_now(&self) -> Result<Permit, Refusal> {
        self.permit(NodeTerm(self.lease.term.load(SeqCst)))
    }

    /// Main thread: may a VM of `term` start?
    pub fn permit(&self, term: NodeTerm) -> Result<Permit, Refusal> {
        let generation = self.lease.generation.load(SeqCst);
        let current = NodeTerm(self.lease.term.load(SeqCst));
        let permit = Permit(generation);
        if generation.is_multiple_of(2) || !self.lasts(permit) {
            return Err(Refusal::NoLease);
        }
        if term != current {
            return Err(Refusal::WrongTerm { current });
        }
        Ok(permit)
    }

    /// Main thread: does the permission still last?
    pub fn lasts(&self, permit: Permit) -> bool {
        boot_time() < BootTime(self.lease.ends.load(SeqCst)) && self.lease.generation.load(SeqCst) == permit.0
    }

    /// Main thread: from now on the lease thread kills this process, too.
    pub fn publish(&self, pidfd: OwnedFd) -> Result<Published, OwnedFd> {
        let free = self.pidfds.iter().position(|slot| slot.load(SeqCst) == FREE);
        match free {
            Some(slot) => {
                self.pidfds[slot].store(pidfd.as_raw_fd(), SeqCst);
                Ok(Published { slot, pidfd })
            }
            None => Err(pidfd),
        }
    }

    /// Main thread: the process was seen dead. Its pidfd must stay open until
    /// [`Table::passed`] says that no killing pass uses its number any more.
    pub fn withdraw(&self, published: Published) -> Withdrawn {
        self.pidfds[published.slot].store(FREE, SeqCst);
        Withdrawn { _pidfd: published.pidfd, pass: self.passes.load(SeqCst) }
    }

    /// Main thread: whether a withdrawn pidfd may be closed.
    pub fn passed(&self, withdrawn: &Withdrawn) -> bool {
        withdrawn.pass.is_multiple_of(2) || self.passes.load(SeqCst) != withdrawn.pass
    }

    /// Main thread: the lease for people and agents.
    pub fn view(&self) -> LeaseView {
        let now = boot_time();
        let ends = BootTime(self.lease.ends.load(SeqCst));
        let held = self.open() && now < ends;
        LeaseView {
            held,
            term: NodeTerm(self.lease.term.load(SeqCst)),
            ends_in_ms: if held { ends.ms_since(now) } else { 0 },
            last_late_us: Some(self.late_us.load(SeqCst)).filter(|us| *us != NEVER),
        }
    }
}

/// A process that the lease thread kills when the lease ends.
#[derive(Debug)]
pub struct Published {
    slot: usize,
    pidfd: OwnedFd,
}

impl Published {
    /// SIGKILL to this one.
    pub fn kill(&self) -> std::io::Result<bool> {
        pidfd_kill(self.pidfd.as_raw_fd())
    }
}

/// A pidfd on its way to be closed.
#[derive(Debug)]
pub struct Withdrawn {
    _pidfd: OwnedFd,
    pass: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::realtime::pidfd_open;

    fn later() -> BootTime {
        boot_time().plus_ms(60_000)
    }

    #[test]
    fn a_permit_lasts_for_one_generation_and_one_term() {
        let table = Table::new().unwrap();
        assert_eq!(table.permit(NodeTerm(0)), Err(Refusal::NoLease));
        table.gain(NodeTerm(3), later());
        let current = NodeTerm(3);
        assert_eq!(table.permit(NodeTerm(2)), Err(Refusal::WrongTerm { current }));
        let permit = table.permit(current).unwrap();
        assert!(table.lasts(permit));
        table.close();
        assert!(!table.lasts(permit));
        table.gain(current, later());
        assert!(!table.lasts(permit), "regained in the same term");
    }

    #[test]
    fn a_permit_ends_with_the_lease_even_if_the_lease_thread_is_late() {
        let table = Table::new().unwrap();
        table.gain(NodeTerm(1), boot_time());
        assert_eq!(table.permit(NodeTerm(1)), Err(Refusal::NoLease));
        assert!(!table.view().held);
    }

    #[test]
    fn what_is_published_is_killed_and_only_its_withdrawal_is_its_death() {
        let table = Table::new().unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = pidfd_open(child.id().cast_signed()).unwrap();
        let published = table.publish(pidfd).unwrap();
        assert_eq!(table.kill_all(), 1);
        child.wait().unwrap();
        assert_eq!(table.kill_all(), 0);
        assert!(!table.all_dead());
        let withdrawn = table.withdraw(published);
        assert!(table.all_dead());
        assert!(table.passed(&withdrawn));
    }

    #[test]
    fn a_full_table_gives_the_process_back() {
        let table = Table::new().unwrap();
        let own = || pidfd_open(std::process::id().cast_signed()).unwrap();
        let all: Vec<_> = (0..CAPACITY).map(|_| table.publish(own()).unwrap()).collect();
        assert!(table.publish(own()).is_err());
        assert_eq!(all.len(), CAPACITY);
    }
}
