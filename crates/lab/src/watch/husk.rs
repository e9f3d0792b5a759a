//! A QEMU that has sent its guest away stands still for good and ends a moment
//! later; when the guest's target is lost before that, the next QEMU of the VM may
//! come first. Two processes then, but the guest runs once. Whether the older one
//! really stands still the kernel tells: its virtual processors get no time.

use std::fs;
use std::time::Duration;

use super::Overlap;

/// More than a thread needs to be woken up and killed, less than a guest that runs
/// takes within a moment.
const STANDSTILL: Duration = Duration::from_millis(1);

/// Two QEMUs of one VM of which the older one may have sent its guest away.
#[derive(Debug)]
pub(super) struct Husk {
    overlap: Overlap,
    time: Duration,
}

impl Husk {
    /// `None` when the older one's processors cannot be watched: then it counts as running.
    pub(super) fn of(overlap: &Overlap) -> Option<Husk> {
        Some(Husk { overlap: overlap.clone(), time: processor_time(overlap.older.pid)? })
    }

    /// Which process it is.
    pub(super) fn pid(&self) -> i32 {
        self.overlap.older.pid
    }

    /// The overlap, once its guest was seen to run on.
    pub(super) fn runs(&self) -> Option<Overlap> {
        let now = processor_time(self.overlap.older.pid)?;
        (now > self.time + STANDSTILL).then(|| self.overlap.clone())
    }
}

/// The time that a QEMU's virtual processors have had: by their threads' names
/// (`debug-threads=on`) and the kernel's account (sched-stats.rst: the first number).
fn processor_time(pid: i32) -> Option<Duration> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let times = tasks.flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let account = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let time = account.split_whitespace().next()?.parse().ok()?;
        name.starts_with("CPU ").then(|| Duration::from_nanos(time))
    });
    times.reduce(|all, one| all + one)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn the_time_of_processors_counts_and_of_nothing_else() {
        let me = std::process::id() as i32;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let burn = || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            };
            std::thread::Builder::new().name("other".into()).spawn_scoped(scope, burn).expect("a thread");
            std::thread::Builder::new().name("CPU 0/test".into()).spawn_scoped(scope, burn).expect("a thread");
            let until = std::time::Instant::now() + Duration::from_secs(20);
            while processor_time(me).is_none_or(|time| time < Duration::from_millis(5)) {
                assert!(std::time::Instant::now() < until, "the processor has no time");
                std::thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
        });
        // A thread that has been joined still stands in /proc for a moment.
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while processor_time(me).is_some() {
            assert!(std::time::Instant::now() < until, "its threads have ended");
            std::thread::yield_now();
        }
    }
}
