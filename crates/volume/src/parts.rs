//! Where the parts of a disk on a LUN are, and how they come by their slabs.
//!
//! ```text
//!          a write needs it           given
//!  absent ─────────────────▶ asked ───────────▶ present
//!    ▲  ▲                      │                   │ discarded
//!    │  └──────────────────────┘                   ▼
//!    │         refused                          leaving: its I/O ends, no other begins
//!    └─────────────────────────────────────────────┘ given back
//! ```
//! One word of memory holds all of a part, so that I/O to parts that are present
//! takes no lock that anybody waits for.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use crate::device::Lun;
use crate::lun::Geometry;
use crate::order::Waker;

/// A word: state, operations under way, slab.
const STATE: u64 = 3 << 62;
const ABSENT: u64 = 0;
const ASKED: u64 = 1 << 62;
const PRESENT: u64 = 2 << 62;
const LEAVING: u64 = 3 << 62;
const ONE_UNDER_WAY: u64 = 1 << 32;
const UNDER_WAY: u64 = !STATE & !(ONE_UNDER_WAY - 1);

/// No part has this number.
const NEVER: u32 = u32::MAX;
/// So much at most is asked for ahead of a writer that streams, in bytes.
const AHEAD_BYTES: u64 = 128 << 20;
/// Whoever has no slabs now is asked again after this.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// Where the slabs of one open disk come from. Called by the threads that do I/O:
/// must not block.
pub trait Allocator: Send + Sync + 'static {
    /// Parts of the disk need slabs. At most one call for each part is under way.
    fn allocate(&self, wanted: Wanted, grant: Grant);

    /// Parts are to be absent again, and to read as zero. No I/O to them is under way,
    /// and none begins until this is answered.
    fn release(&self, parts: Range<u32>, release: Release);
}

/// Parts that need slabs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which.
    pub parts: Range<u32>,
    /// A request waits for the first of them; otherwise a writer will soon be there.
    pub urgent: bool,
}

/// Why there is no slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The volume is full: who waits is told so, and VMs pause.
    NoSpace,
    /// Nobody can say right now: who waits goes on waiting, and it is asked again.
    Unavailable,
}

/// How slabs are given. Dropped unanswered, it is [`Refusal::Unavailable`].
#[must_use = "requests wait for it"]
pub struct Grant(Option<(Arc<Parts>, Wanted)>);

impl Grant {
    /// Gives parts (the first number) their slabs (the second), perhaps not all that
    /// were wanted. Each slab is this part's in the state that all nodes agree on,
    /// and reads as zero already; both survive a crash.
    pub fn give(mut self, slabs: &[(u32, u32)]) {
        if let Some((parts, wanted)) = self.0.take() {
            parts.given(&wanted, slabs);
        }
    }

    /// Gives none.
    pub fn refuse(mut self, why: Refusal) {
        if let Some((parts, wanted)) = self.0.take() {
            parts.refused(&wanted, why);
        }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if let Some((parts, wanted)) = self.0.take() {
            parts.refused(&wanted, Refusal::Unavailable);
        }
    }
}

/// How it is told that parts are absent. Dropped unanswered, it was refused.
#[must_use = "requests wait for it"]
pub struct Release(Option<(Arc<Parts>, Range<u32>)>);

impl Release {
    /// They are absent in the state that all nodes agree on.
    pub fn done(mut self) {
        if let Some((parts, range)) = self.0.take() {
            parts.left(range, ABSENT);
        }
    }

    /// They stay where they are; what is in them is zeroed there.
    pub fn refuse(self) {
        drop(self);
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        if let Some((parts, range)) = self.0.take() {
            parts.left(range, PRESENT);
        }
    }
}

/// Where a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At this byte of the LUN. It stays there until [`Parts::leave`].
    At(u64),
    /// Nowhere: it reads as zero.
    Absent,
}

/// What became of asking for a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// It is there now.
    Present,
    /// The asker is woken when there is something new. There were so many refusals.
    Waits(u64),
}

pub(crate) struct Parts {
    pub(crate) lun: Lun,
    geometry: Geometry,
    allocator: Arc<dyn Allocator>,
    words: RwLock<Vec<AtomicU64>>,
    /// A writer that comes here will soon need more.
    mark: AtomicU32,
    asking: Mutex<Asking>,
}

#[derive(Default)]
struct Asking {
    wakers: Vec<Waker>,
    /// The part behind those that were asked for last, and how many they were.
    next: u32,
    window: u32,
    /// Not to be asked before.
    not_before: Option<Instant>,
    /// How often there was no space.
    refusals: u64,
}

impl Parts {
    pub(crate) fn new(
        lun: Lun,
        geometry: Geometry,
        bytes: u64,
        present: &[(u32, u32)],
        allocator: Arc<dyn Allocator>,
    ) -> Parts {
        let words: Vec<_> = (0..bytes.div_ceil(geometry.slab_bytes)).map(|_| AtomicU64::new(ABSENT)).collect();
        for (part, slab) in present {
            if let Some(word) = words.get(*part as usize) {
                word.store(PRESENT | u64::from(*slab), Ordering::Relaxed);
            }
        }
        Parts {
            lun,
            geometry,
            allocator,
            words: RwLock::new(words),
            mark: AtomicU32::new(NEVER),
            asking: Mutex::new(Asking { next: NEVER, window: 1, ..Asking::default() }),
        }
    }

    pub(crate) fn grow(&self, bytes: u64) {
        let count = bytes.div_ceil(self.geometry.slab_bytes) as usize;
        let mut words = self.words.write().unwrap_or_else(PoisonError::into_inner);
        while words.len() < count {
            words.push(AtomicU64::new(ABSENT));
        }
    }

    /// Learns where parts are after another node has written to the disk. `false`, and
    /// nothing is changed, if a part or slab cannot be, or somebody here asked for one.
    pub(crate) fn learn(&self, slabs: &[(u32, u32)]) -> bool {
        let mut asking = self.asking();
        let words = self.words();
        let mut known = vec![ABSENT; words.len()];
        for (part, slab) in slabs {
            match known.get_mut(*part as usize) {
                Some(word) if *slab < self.geometry.slabs => *word = PRESENT | u64::from(*slab),
                _ => return false,
            }
        }
        if words.iter().any(|word| matches!(word.load(Ordering::Acquire) & STATE, ASKED | LEAVING)) {
            return false;
        }
        for (word, known) in words.iter().zip(known) {
            // Reads of what was there before end in their own time.
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| Some(word & UNDER_WAY | known));
        }
        wake(&mut asking);
        true
    }

    /// The part that a byte is in, and how many bytes of it are from there on.
    pub(crate) fn part_of(&self, offset: u64) -> (u32, u64) {
        let slab_bytes = self.geometry.slab_bytes;
        ((offset / slab_bytes) as u32, slab_bytes - offset % slab_bytes)
    }

    /// The parts that are whole between two bytes.
    pub(crate) fn whole(&self, offset: u64, length: u64, bytes: u64) -> Range<u32> {
        let (slab_bytes, end) = (self.geometry.slab_bytes, offset + length);
        let first = offset.div_ceil(slab_bytes);
        // The last part may be shorter.
        let last = if end == bytes { end.div_ceil(slab_bytes) } else { end / slab_bytes };
        first as u32..last.max(first) as u32
    }

    fn words(&self) -> RwLockReadGuard<'_, Vec<AtomicU64>> {
        self.words.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn asking(&self) -> MutexGuard<'_, Asking> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an operation where the byte is, if it is anywhere.
    pub(crate) fn enter(&self, offset: u64) -> Place {
        let (part, rest) = self.part_of(offset);
        let words = self.words();
        let Some(word) = words.get(part as usize) else { return Place::Absent };
        let entered = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            (word & STATE == PRESENT).then_some(word + ONE_UNDER_WAY)
        });
        match entered {
            Ok(word) => Place::At(self.geometry.slab(word as u32) + (self.geometry.slab_bytes - rest)),
            Err(_) => Place::Absent,
        }
    }

    /// An operation that [`Parts::enter`] began is over.
    pub(crate) fn leave(self: &Arc<Parts>, part: u32) {
        let last = {
            let words = self.words();
            let before = words[part as usize].fetch_sub(ONE_UNDER_WAY, Ordering::AcqRel);
            before & STATE == LEAVING && before & UNDER_WAY == ONE_UNDER_WAY
        };
        if last {
            self.release(part..part + 1);
        }
    }

    /// Whether a part is there, if only for this moment.
    pub(crate) fn is_present(&self, part: u32) -> bool {
        self.words().get(part as usize).is_some_and(|word| word.load(Ordering::Acquire) & STATE == PRESENT)
    }

    /// A write comes to a part that is there. One that streams will soon need others.
    pub(crate) fn touch(self: &Arc<Parts>, part: u32) {
        if part == self.mark.load(Ordering::Relaxed) {
            let mut asking = self.asking();
            if self.mark.load(Ordering::Relaxed) == part {
                self.mark.store(NEVER, Ordering::Relaxed);
                let from = asking.next;
                if let Some(wanted) = self.want(&mut asking, from, false) {
                    drop(asking);
                    self.allocate(wanted);
                }
            }
        }
    }

    /// A write needs a part that was not there.
    pub(crate) fn ask(self: &Arc<Parts>, part: u32, waker: &Waker) -> Asked {
        let mut asking = self.asking();
        let state = self.words().get(part as usize).map_or(ABSENT, |word| word.load(Ordering::Acquire) & STATE);
        if state == PRESENT {
            return Asked::Present;
        }
        if !asking.wakers.contains(waker) {
            asking.wakers.push(waker.clone());
        }
        let waits = Asked::Waits(asking.refusals);
        if state == ABSENT
            && asking.not_before.is_none_or(|then| Instant::now() >= then)
            && let Some(wanted) = self.want(&mut asking, part, true)
        {
            drop(asking);
            self.allocate(wanted);
            // It may have been answered at once.
            if self.is_present(part) {
                return Asked::Present;
            }
        }
        waits
    }

    /// How often there was no space, if the part is not there and nobody is asked for it.
    pub(crate) fn refusals(&self, part: u32) -> Option<u64> {
        let asking = self.asking();
        let state = self.words().get(part as usize).map_or(ABSENT, |word| word.load(Ordering::Acquire) & STATE);
        (state == ABSENT).then_some(asking.refusals)
    }

    /// What to ask for from a part on: as much as the writer's habits suggest.
    fn want(&self, asking: &mut Asking, from: u32, urgent: bool) -> Option<Wanted> {
        let most = (AHEAD_BYTES / self.geometry.slab_bytes).max(1) as u32;
        let streams = from == asking.next;
        asking.window = if streams { (asking.window * 2).min(most) } else { 1 };
        let words = self.words();
        let mut end = from;
        while end - from < asking.window
            && let Some(word) = words.get(end as usize)
            && word.compare_exchange(ABSENT, ASKED, Ordering::AcqRel, Ordering::Acquire).is_ok()
        {
            end += 1;
        }
        if end == from {
            return None;
        }
        asking.next = end;
        if streams {
            self.mark.store(from, Ordering::Relaxed);
        }
        Some(Wanted { parts: from..end, urgent })
    }

    fn allocate(self: &Arc<Parts>, wanted: Wanted) {
        self.allocator.allocate(wanted.clone(), Grant(Some((self.clone(), wanted))));
    }

    fn given(&self, wanted: &Wanted, slabs: &[(u32, u32)]) {
        let mut asking = self.asking();
        let words = self.words();
        let sound = |(part, slab): &&(u32, u32)| wanted.parts.contains(part) && *slab < self.geometry.slabs;
        for (part, slab) in slabs.iter().filter(sound) {
            let present = PRESENT | u64::from(*slab);
            let _ = words[*part as usize].compare_exchange(ASKED, present, Ordering::AcqRel, Ordering::Acquire);
        }
        self.unask(&words, wanted);
        asking.not_before = None;
        wake(&mut asking);
    }

    fn refused(&self, wanted: &Wanted, why: Refusal) {
        let mut asking = self.asking();
        self.unask(&self.words(), wanted);
        // Nobody streams where there is nothing.
        (asking.next, asking.window) = (NEVER, 1);
        self.mark.store(NEVER, Ordering::Relaxed);
        match why {
            // It was only for later: whoever needs it asks for himself.
            _ if !wanted.urgent => {}
            Refusal::NoSpace => asking.refusals += 1,
            Refusal::Unavailable => asking.not_before = Some(Instant::now() + ASK_AGAIN),
        }
        wake(&mut asking);
    }

    fn unask(&self, words: &[AtomicU64], wanted: &Wanted) {
        for part in wanted.parts.clone() {
            let _ = words[part as usize].compare_exchange(ASKED, ABSENT, Ordering::AcqRel, Ordering::Acquire);
        }
    }

    /// Gives parts back that are not needed any more: done when none of them
    /// [is leaving](Parts::are_leaving).
    pub(crate) fn give_back(self: &Arc<Parts>, range: Range<u32>) {
        let mut runs: Vec<Range<u32>> = Vec::new();
        {
            let words = self.words();
            for part in range {
                let Some(word) = words.get(part as usize) else { break };
                let leaving = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                    (word & STATE == PRESENT).then_some(word | LEAVING)
                });
                // With I/O under way, whoever ends the last of it goes on.
                if leaving.is_ok_and(|word| word & UNDER_WAY == 0) {
                    match runs.last_mut() {
                        Some(run) if run.end == part => run.end += 1,
                        _ => runs.push(part..part + 1),
                    }
                }
            }
        }
        runs.into_iter().for_each(|run| self.release(run));
    }

    /// Whether some are on their way out; then the waker is rung when that changes.
    pub(crate) fn are_leaving(&self, range: Range<u32>, waker: &Waker) -> bool {
        let mut asking = self.asking();
        let words = self.words();
        let leaving = words[..words.len().min(range.end as usize)]
            .iter()
            .skip(range.start as usize)
            .any(|word| word.load(Ordering::Acquire) & STATE == LEAVING);
        if leaving && !asking.wakers.contains(waker) {
            asking.wakers.push(waker.clone());
        }
        leaving
    }

    fn release(self: &Arc<Parts>, range: Range<u32>) {
        self.allocator.release(range.clone(), Release(Some((self.clone(), range))));
    }

    fn left(&self, range: Range<u32>, state: u64) {
        let mut asking = self.asking();
        let words = self.words();
        for part in range {
            let slab = words[part as usize].load(Ordering::Acquire) & u64::from(u32::MAX);
            words[part as usize].store(if state == PRESENT { PRESENT | slab } else { ABSENT }, Ordering::Release);
        }
        wake(&mut asking);
    }
}

fn wake(asking: &mut Asking) {
    asking.wakers.drain(..).for_each(|waker| waker.wake());
}
