//! Runs of slabs, in order and joined where they can be.

use serde::{Deserialize, Serialize};

/// A run of slabs: the first, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u32)", into = "(u32, u32)")]
pub struct Slabs {
    /// The first slab.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// Puts a run into runs that are in order and joined, and have nothing of it.
pub(super) fn insert_slabs(runs: &mut Vec<Slabs>, new: Slabs) {
    let at = runs.partition_point(|run| run.first < new.first);
    let before = at.checked_sub(1).filter(|before| runs[*before].end() == new.first);
    let after = runs.get(at).is_some_and(|after| new.end() == after.first);
    match (before, after) {
        (Some(before), true) => {
            runs[before].count += new.count + runs[at].count;
            runs.remove(at);
        }
        (Some(before), false) => runs[before].count += new.count,
        (None, true) => runs[at] = Slabs { first: new.first, count: new.count + runs[at].count },
        (None, false) => runs.insert(at, new),
    }
}

/// Takes one slab out of runs; `false` if it is not in them.
pub(super) fn remove_slab(runs: &mut Vec<Slabs>, slab: u32) -> bool {
    let Some(at) = runs.partition_point(|run| run.first <= slab).checked_sub(1) else { return false };
    let run = runs[at];
    if slab >= run.end() {
        return false;
    }
    let (before, after) = (slab - run.first, run.end() - slab - 1);
    let rest = Slabs { first: slab + 1, count: after };
    match (before, after) {
        (0, 0) => drop(runs.remove(at)),
        (0, _) => runs[at] = rest,
        (_, 0) => runs[at].count = before,
        _ => {
            runs[at].count = before;
            runs.insert(at + 1, rest);
        }
    }
    true
}

impl Slabs {
    /// The slab after the last.
    pub fn end(self) -> u32 {
        self.first + self.count
    }

    /// Whether a slab is among them.
    pub fn has(self, slab: u32) -> bool {
        (self.first..self.end()).contains(&slab)
    }
}

impl From<(u32, u32)> for Slabs {
    fn from((first, count): (u32, u32)) -> Self {
        Slabs { first, count }
    }
}

impl From<Slabs> for (u32, u32) {
    fn from(run: Slabs) -> Self {
        (run.first, run.count)
    }
}

/// Takes a run out of runs that are in order and joined; `false` if not all of it is
/// in them.
pub(super) fn remove_slabs(runs: &mut Vec<Slabs>, wanted: Slabs) -> bool {
    let Some(at) = runs.partition_point(|run| run.first <= wanted.first).checked_sub(1) else { return false };
    let run = runs[at];
    if wanted.end() > run.end() {
        return false;
    }
    let before = Slabs { first: run.first, count: wanted.first - run.first };
    let after = Slabs { first: wanted.end(), count: run.end() - wanted.end() };
    runs.splice(at..=at, [before, after].into_iter().filter(|rest| rest.count > 0));
    true
}
