//! Who runs which VM, seen from outside: a witness that trusts no part of the
//! product.
//!
//! A thread looks at the machine's processes every 2 ms. A QEMU counts for the
//! VM whose UUID is on its command line, from the look that first found it
//! until the kernel says that it has ended. New processes are found cheaply: the
//! kernel tells the last pid that it gave away, so only new ones are looked at.
//!
//! A QEMU that was started with `-incoming` is a migration's target. It runs its
//! VM from the moment on when it is the VM's only QEMU. (So two QEMUs that both
//! restore a saved VM, with nothing else of that VM alive, look like a migration.)
//! Of one that a target came beside, the guest may be gone: see [`husk`].

mod husk;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use self::husk::Husk;
use crate::{procfs, sys};

/// How often the watch looks, in milliseconds: the timeline's resolution.
const TICK_MS: u8 = 2;
/// A process shows its parent's command line until it has replaced itself with
/// another program. For this long every tick looks at it again ...
const INFANCY: Duration = Duration::from_millis(20);
/// ... and for this long one does now and then, as on a busy machine the step
/// may take its time.
const YOUTH: Duration = Duration::from_millis(300);
const YOUTH_LOOK_EVERY: Duration = Duration::from_millis(10);
/// How often all processes are looked at, for those that changed later.
const FULL_SCAN_EVERY: Duration = Duration::from_millis(250);
/// How far below the last pid a process that only the full scan found still
/// counts as new.
const NEW_PIDS: i32 = 64;

/// Which PID namespace is which host's.
#[derive(Debug, Clone, Default)]
pub struct HostNames(Arc<Mutex<BTreeMap<u64, String>>>);

impl HostNames {
    pub(crate) fn insert(&self, pid_namespace: u64, name: &str) {
        self.lock().insert(pid_namespace, name.to_owned());
    }

    pub(crate) fn remove(&self, pid_namespace: u64) {
        self.lock().remove(&pid_namespace);
    }

    /// The host on which the process `pid` runs, if on any.
    pub fn host_of(&self, pid: i32) -> Option<String> {
        self.lock().get(&procfs::pid_namespace(pid)?).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One QEMU and its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// The VM's UUID, in small letters.
    pub vm: String,
    /// The host; `None` for a QEMU outside the lab.
    pub host: Option<String>,
    /// The pid as this process sees it.
    pub pid: i32,
    /// Whether it was started as a migration's target or to restore a saved VM.
    pub incoming: bool,
    /// When it was first seen: at most a few milliseconds after it started.
    pub first_seen: Instant,
    /// Since when it has been running the VM: `first_seen`, or for an incoming
    /// one the moment when the other QEMU was gone; `None` if that has not come.
    pub running_since: Option<Instant>,
    /// When it was found to have ended; `None` while it lives.
    pub gone: Option<Instant>,
}

/// Two QEMUs that ran one VM at the same time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlap {
    /// When that was seen.
    pub at: Instant,
    /// The one that was there before.
    pub older: Sighting,
    /// The one that came.
    pub newer: Sighting,
}

/// Watches all QEMUs of the machine until it is dropped.
#[derive(Debug)]
pub struct SplitBrainWatch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    record: Mutex<Record>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Record {
    sightings: Vec<Sighting>,
    overlaps: Vec<Overlap>,
    failure: Option<String>,
}

impl SplitBrainWatch {
    /// Starts to watch; see [`crate::Lab::host_names`].
    ///
    /// # Errors
    /// When the thread cannot be started or `/proc` cannot be read.
    pub fn start(names: HostNames) -> Result<Self> {
        Self::start_with(names, |_| false)
    }

    /// Starts to watch with an `excuse`: an overlap for which it returns true is
    /// not recorded. It runs on the watching thread and should be quick.
    ///
    /// # Errors
    /// As for [`SplitBrainWatch::start`].
    pub fn start_with(names: HostNames, excuse: impl Fn(&Overlap) -> bool + Send + 'static) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut scanner = Scanner {
            names,
            excuse: Box::new(excuse),
            shared: Arc::clone(&shared),
            loadavg: File::open("/proc/loadavg").context("opening /proc/loadavg")?,
            last_pid: 0,
            next_full_scan: Instant::now(),
            young: Vec::new(),
            tracked: Vec::new(),
            husks: Vec::new(),
        };
        // What runs already is on the record when this returns.
        scanner.look()?;
        let thread = std::thread::Builder::new()
            .name("split-brain watch".to_owned())
            .spawn(move || scanner.run())
            .context("starting the split-brain watch")?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Every QEMU seen so far, in the order of their coming.
    pub fn timeline(&self) -> Vec<Sighting> {
        self.record().sightings.clone()
    }

    /// Every case of two QEMUs that ran one VM at the same time.
    ///
    /// # Errors
    /// When the watch itself has failed and so cannot vouch for anything.
    pub fn overlaps(&self) -> Result<Vec<Overlap>> {
        let record = self.record();
        match &record.failure {
            Some(text) => bail!("the split-brain watch failed: {text}"),
            None => Ok(record.overlaps.clone()),
        }
    }

    /// Waits for a QEMU of which `wanted` holds and returns it.
    ///
    /// # Errors
    /// When there is none within `deadline`.
    pub fn wait_for(&self, deadline: Duration, wanted: impl Fn(&Sighting) -> bool) -> Result<Sighting> {
        let (record, _) = self
            .shared
            .changed
            .wait_timeout_while(self.record(), deadline, |record| {
                record.failure.is_none() && !record.sightings.iter().any(&wanted)
            })
            .unwrap_or_else(PoisonError::into_inner);
        match record.sightings.iter().find(|sighting| wanted(sighting)) {
            Some(sighting) => Ok(sighting.clone()),
            None => bail!(
                "no such QEMU within {deadline:?}{}; seen: {:#?}",
                record.failure.as_ref().map(|text| format!(" ({text})")).unwrap_or_default(),
                record.sightings
            ),
        }
    }

    /// Waits for a QEMU of `vm` that came after `instant`.
    ///
    /// # Errors
    /// When there is none within `deadline`.
    pub fn wait_started(&self, vm: &str, after: Instant, deadline: Duration) -> Result<Sighting> {
        let vm = vm.to_ascii_lowercase();
        self.wait_for(deadline, |sighting| sighting.vm == vm && sighting.first_seen > after)
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.shared.record()
    }
}

impl Drop for SplitBrainWatch {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Scanner {
    names: HostNames,
    excuse: Box<dyn Fn(&Overlap) -> bool + Send>,
    shared: Arc<Shared>,
    loadavg: File,
    /// The last pid that the kernel had given away at the last look.
    last_pid: i32,
    next_full_scan: Instant,
    young: Vec<Young>,
    tracked: Vec<Tracked>,
    /// Looked at until they end.
    husks: Vec<Husk>,
}

/// A process that may yet become a QEMU.
struct Young {
    pid: i32,
    born: Instant,
    next_look: Instant,
}

/// A living QEMU; `sighting` is its index in the record.
struct Tracked {
    pid: i32,
    pidfd: OwnedFd,
    sighting: usize,
}

impl Scanner {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.look_at_husks();
            if let Err(error) = self.wait_tick().and_then(|()| self.look()) {
                self.shared.record().failure = Some(format!("{error:#}"));
                self.shared.changed.notify_all();
                return;
            }
        }
    }

    /// Waits for the next tick, or less when a QEMU ends.
    fn wait_tick(&mut self) -> Result<()> {
        let mut fds: Vec<PollFd<'_>> =
            self.tracked.iter().map(|tracked| PollFd::new(tracked.pidfd.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::from(TICK_MS)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("waiting for the end of a QEMU"),
        }
        let ended: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if !ended.contains(&true) {
            return Ok(());
        }
        let now = Instant::now();
        let mut record = self.shared.record();
        for (tracked, _) in self.tracked.iter().zip(&ended).filter(|(_, ended)| **ended) {
            record.sightings[tracked.sighting].gone = Some(now);
        }
        let mut ended = ended.into_iter();
        self.tracked.retain(|_| !ended.next().unwrap_or(false));
        record.promote(now);
        drop(record);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Records those overlaps whose older guest turned out to run.
    fn look_at_husks(&mut self) {
        let tracked = &self.tracked;
        self.husks.retain(|husk| tracked.iter().any(|tracked| tracked.pid == husk.pid()));
        let running: Vec<Overlap> = self.husks.iter().filter_map(Husk::runs).collect();
        if running.is_empty() {
            return;
        }
        self.husks.retain(|husk| running.iter().all(|overlap| overlap.older.pid != husk.pid()));
        self.shared.record().overlaps.extend(running);
        self.shared.changed.notify_all();
    }

    /// Finds new QEMUs.
    fn look(&mut self) -> Result<()> {
        let now = Instant::now();
        let last_pid = self.read_last_pid()?;
        let full = now >= self.next_full_scan || last_pid < self.last_pid;
        if !full {
            for pid in self.last_pid + 1..=last_pid {
                // The kernel counts threads' ids with the pids; they are of no interest.
                if sys::pidfd_open(pid).is_ok() {
                    self.young.push(Young { pid, born: now, next_look: now });
                }
            }
        }
        self.last_pid = last_pid;
        let mut young = std::mem::take(&mut self.young);
        young.retain_mut(|young| {
            if now < young.next_look {
                return true;
            }
            let age = now.duration_since(young.born);
            if age > INFANCY {
                young.next_look = now + YOUTH_LOOK_EVERY;
            }
            age < YOUTH && self.inspect(young.pid)
        });
        self.young = young;
        if full {
            self.next_full_scan = now + FULL_SCAN_EVERY;
            for pid in procfs::all_pids() {
                let looked_at = self.young.iter().any(|young| young.pid == pid);
                if !looked_at && self.inspect(pid) {
                    self.notice(pid, now);
                }
            }
        }
        Ok(())
    }

    /// Keeps an eye on a process that only the full scan found, in case it is new.
    fn notice(&mut self, pid: i32, now: Instant) {
        if pid > self.last_pid.saturating_sub(NEW_PIDS) {
            self.young.push(Young { pid, born: now, next_look: now });
        }
    }

    /// Tracks `pid` if it is a QEMU of a VM. Returns whether it should be looked
    /// at again: it lives, but is none of those (yet).
    fn inspect(&mut self, pid: i32) -> bool {
        if self.tracked.iter().any(|tracked| tracked.pid == pid) {
            return false;
        }
        let Some(argv) = procfs::argv(pid) else {
            return false;
        };
        let Some((vm, incoming)) = vm_of(&argv) else {
            // A kernel thread or a zombie has no command line and gets none.
            return !argv.is_empty();
        };
        let Ok(pidfd) = sys::pidfd_open(pid) else {
            return false;
        };
        // A QEMU that is about to start a helper program looks like two QEMUs
        // until the helper has replaced itself; the parent tells.
        let forked = procfs::parent(pid).is_some_and(|parent| self.tracked.iter().any(|tracked| tracked.pid == parent));
        if forked {
            return true;
        }
        let host = self.names.host_of(pid);
        self.track(pid, pidfd, vm, host, incoming);
        false
    }

    fn track(&mut self, pid: i32, pidfd: OwnedFd, vm: String, host: Option<String>, incoming: bool) {
        let now = Instant::now();
        let mut record = self.shared.record();
        let newer = Sighting {
            vm,
            host,
            pid,
            incoming,
            first_seen: now,
            running_since: (!incoming).then_some(now),
            gone: None,
        };
        let overlaps: Vec<Overlap> = record
            .sightings
            .iter()
            .filter(|older| older.vm == newer.vm && older.gone.is_none())
            .filter(|older| older.running_since.is_some() && !incoming)
            .map(|older| Overlap { at: now, older: older.clone(), newer: newer.clone() })
            .collect();
        let target_came = |older: &Sighting| {
            let beside = |other: &Sighting| other.incoming && other.first_seen > older.first_seen;
            record.sightings.iter().any(|other| other.vm == older.vm && beside(other))
        };
        let sent: Vec<i32> =
            overlaps.iter().map(|it| &it.older).filter(|it| target_came(it)).map(|it| it.pid).collect();
        self.tracked.push(Tracked { pid, pidfd, sighting: record.sightings.len() });
        record.sightings.push(newer);
        record.promote(now);
        drop(record);
        let guilty = overlaps.into_iter().filter(|overlap| {
            // The older one may have ended since the last look.
            let alive = self.tracked.iter().any(|t| t.pid == overlap.older.pid && !ended(&t.pidfd));
            alive && !(self.excuse)(overlap)
        });
        let mut guilty: Vec<Overlap> = guilty.collect();
        let mut husks = Vec::new();
        guilty.retain(|overlap| match Husk::of(overlap).filter(|husk| sent.contains(&husk.pid())) {
            Some(husk) => {
                husks.push(husk);
                false
            }
            None => true,
        });
        self.husks.extend(husks);
        self.shared.record().overlaps.extend(guilty);
        self.shared.changed.notify_all();
    }

    fn read_last_pid(&self) -> Result<i32> {
        let mut text = [0; 128];
        let length = self.loadavg.read_at(&mut text, 0).context("reading /proc/loadavg")?;
        let text = String::from_utf8_lossy(&text[..length]);
        let last = text.split_whitespace().last().and_then(|pid| pid.parse().ok());
        last.with_context(|| format!("/proc/loadavg is not understood: {text}"))
    }
}

impl Record {
    /// An incoming QEMU that is its VM's only one has taken the VM over.
    fn promote(&mut self, now: Instant) {
        for index in 0..self.sightings.len() {
            let this = &self.sightings[index];
            if this.gone.is_some() || this.running_since.is_some() {
                continue;
            }
            let vm = &this.vm;
            let living = self.sightings.iter().filter(|other| other.gone.is_none());
            if living.filter(|other| other.vm == *vm).count() == 1 {
                self.sightings[index].running_since = Some(now);
            }
        }
    }
}

fn ended(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(count) if count > 0)
}

/// The UUID of the VM that a command line runs, and whether it waits for a
/// migration; `None` when it is no QEMU's.
fn vm_of(argv: &[String]) -> Option<(String, bool)> {
    let program = argv.first()?.rsplit('/').next()?;
    if !program.starts_with("qemu") && program != "kvm" {
        return None;
    }
    // QEMU takes its options with one dash or two.
    let option = |name: &str| {
        argv.iter().position(|word| word.strip_prefix("--").or_else(|| word.strip_prefix('-')) == Some(name))
    };
    let uuid = argv.get(option("uuid")? + 1)?;
    let incoming = option("incoming").is_some();
    Some((uuid.to_ascii_lowercase(), incoming))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn only_a_qemu_with_a_uuid_runs_a_vm() {
        let running = vm_of(&argv("/usr/bin/qemu-system-x86_64 -S -uuid ABCD-1"));
        assert_eq!(running, Some(("abcd-1".to_owned(), false)));
        let target = vm_of(&argv("qemu-system-x86_64 --uuid a --incoming defer"));
        assert_eq!(target, Some(("a".to_owned(), true)));
        assert_eq!(vm_of(&argv("holdfast keeper -uuid a")), None);
        assert_eq!(vm_of(&argv("qemu-system-x86_64 -uuid")), None);
        assert_eq!(vm_of(&argv("qemu-img -h")), None);
        assert_eq!(vm_of(&[]), None);
    }
}
