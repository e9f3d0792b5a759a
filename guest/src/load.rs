//! Load on the guest's memory: pages that change at a rate, pages that do not compress.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const PAGE_WORDS: usize = 4096 / 8;
const MB: usize = 1 << 20;
/// Memory that is left to the rest of the guest.
const RESERVE_MB: u64 = 16;
const TICK: Duration = Duration::from_millis(10);

/// Why memory could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It would not fit.
    #[error("{wanted_mb} MB do not fit: {available_mb} MB are available, {RESERVE_MB} MB of them are reserved")]
    Memory {
        /// What was asked for.
        wanted_mb: u32,
        /// What `/proc/meminfo` says.
        available_mb: u64,
    },
    /// A rate or a size of zero.
    #[error("the rate and the size must be at least 1 MB")]
    Zero,
}

/// The loads that run now.
#[derive(Debug, Default)]
pub struct Load {
    dirty_mb_s: Arc<AtomicU32>,
    stop_dirty: Mutex<Option<Arc<AtomicBool>>>,
    filled: Mutex<Vec<u64>>,
}

impl Load {
    /// MB/s of memory that is being dirtied.
    pub fn dirty_mb_s(&self) -> u32 {
        self.dirty_mb_s.load(Ordering::Relaxed)
    }

    /// Changes `rate_mb_s` worth of pages per second, round and round in `size_mb` of memory that
    /// starts incompressible. Replaces an earlier dirtying.
    ///
    /// # Errors
    /// [`LoadError`] when the memory is not there.
    pub fn dirty(&self, rate_mb_s: u32, size_mb: u32) -> Result<(), LoadError> {
        self.stop_dirty();
        if rate_mb_s == 0 {
            return Err(LoadError::Zero);
        }
        let mut pages = incompressible(size_mb)?;
        let stop = Arc::new(AtomicBool::new(false));
        *self.stop_dirty.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&stop));
        self.dirty_mb_s.store(rate_mb_s, Ordering::Relaxed);
        thread::spawn(move || {
            let started = Instant::now();
            let mut done = 0_u64;
            let mut page = 0;
            while !stop.load(Ordering::Relaxed) {
                // Against the clock, not against the last tick: a late tick catches up, but after a
                // pause (a migration, a stopped machine) at most a second's worth.
                let due = pages_due(started.elapsed(), rate_mb_s);
                done = done.max(due.saturating_sub(pages_due(Duration::from_secs(1), rate_mb_s)));
                while done < due {
                    pages[page] = pages[page].wrapping_add(1);
                    page = (page + PAGE_WORDS) % pages.len();
                    done += 1;
                }
                thread::sleep(TICK);
            }
        });
        Ok(())
    }

    /// Ends dirtying and frees its memory.
    pub fn stop_dirty(&self) {
        let running = self.stop_dirty.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(stop) = running {
            stop.store(true, Ordering::Relaxed);
        }
        self.dirty_mb_s.store(0, Ordering::Relaxed);
    }

    /// Holds `size_mb` of incompressible memory, instead of what an earlier call held. 0 frees it.
    ///
    /// # Errors
    /// [`LoadError`] when the memory is not there.
    pub fn fill(&self, size_mb: u32) -> Result<(), LoadError> {
        let mut filled = self.filled.lock().unwrap_or_else(PoisonError::into_inner);
        *filled = Vec::new();
        if size_mb > 0 {
            *filled = incompressible(size_mb)?;
        }
        Ok(())
    }
}

fn pages_due(elapsed: Duration, rate_mb_s: u32) -> u64 {
    u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX).saturating_mul(u64::from(rate_mb_s)) * 256 / 1_000_000
}

fn incompressible(size_mb: u32) -> Result<Vec<u64>, LoadError> {
    let available_mb = available_mb();
    if u64::from(size_mb) + RESERVE_MB > available_mb {
        return Err(LoadError::Memory { wanted_mb: size_mb, available_mb });
    }
    if size_mb == 0 {
        return Err(LoadError::Zero);
    }
    // xorshift64 (Marsaglia, "Xorshift RNGs", 2003).
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    Ok(std::iter::repeat_with(next).take(size_mb as usize * MB / 8).collect())
}

fn available_mb() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()).unwrap_or(0) / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_memory_is_refused() {
        let load = Load::default();
        assert!(matches!(load.fill(u32::MAX), Err(LoadError::Memory { wanted_mb: u32::MAX, .. })));
        assert!(matches!(load.dirty(10, 0), Err(LoadError::Zero)));
        assert!(matches!(load.dirty(0, 1), Err(LoadError::Zero)));
        assert_eq!(load.dirty_mb_s(), 0);
    }

    #[test]
    fn rate_is_kept_in_pages() {
        assert_eq!(pages_due(Duration::from_secs(2), 100), 2 * 100 * 256);
        assert_eq!(pages_due(Duration::from_millis(10), 1), 2);
    }

    #[test]
    fn filling_is_incompressible_and_freed() {
        let words = incompressible(1).unwrap();
        let mut sorted = words.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!((words.len(), sorted.len()), (MB / 8, MB / 8));
        let load = Load::default();
        load.fill(1).unwrap();
        assert_eq!(load.filled.lock().unwrap().len(), MB / 8);
        load.fill(0).unwrap();
        assert_eq!(load.filled.lock().unwrap().len(), 0);
    }
}
