//! Who has which slab of a volume on a LUN: pure accounting, as runs.
//!
//! ```text
//!         take                map                 drop
//!  free ───────▶ a node's ───────▶ a file's part ───────▶ freed ───────▶ free
//!    ▲    (the node zeroes them)            (the LUN's journal says so, too)
//!    └── the node's term is over: all that it had taken
//! ```
//! A slab gets into a file only after the node that had taken it has zeroed it, so a
//! crash at any moment leaves a part absent or zeroed, and nobody ever reads what a
//! slab held before.
//!
//! Each taking has a number, and whoever maps a slab names the taking that gave it. A
//! node that forgot a slab gets it again with another number and zeroes it again; what
//! it had asked for before that and is decided late does not make it part of a file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::hold::Holds;
use super::slabs::{insert_slabs, remove_slab};
use super::{Access, Freed, Journal, NodeId, NodeTerm, Slabs, VmId};

/// Parts of a file, in order, in as many slabs, in order. A part is as long as a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u32, u32)", into = "(u32, u32, u32)")]
pub struct Mapped {
    /// The first part.
    pub part: u32,
    /// Its slab.
    pub slab: u32,
    /// How many.
    pub count: u32,
}

/// Devices have blocks of so many bytes at most: what is on a LUN is read and written in
/// multiples of this.
pub const LUN_BLOCK_BYTES: u64 = 4096;

/// A file on a LUN: a VM's disk, or what a user put there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LunFile {
    /// The VM whose disk it is, if it is one's.
    pub vm: Option<VmId>,
    /// How long it is, in bytes.
    pub bytes: u64,
    /// Where its parts are, ordered by part and joined where they can be. What is
    /// absent reads as zero.
    pub parts: Vec<Mapped>,
    /// How often it has given parts back: what was asked for before the last time, and
    /// is decided late, takes nothing from it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unmaps: u64,
    /// It came with an imported LUN: a VM that could not be made leaves it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub imported: bool,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What became of parts that were to have no slab any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmapped {
    /// How often the file has given parts back: the next time names this number.
    pub number: u64,
    /// Some of them have slabs still: another number was named.
    pub left: bool,
}

/// Slabs that a node has taken to zero them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "TakenAsStored")]
pub struct Taken {
    /// In which of the node's terms: in any other they are free.
    pub term: NodeTerm,
    /// Which, in order, by the number of the taking that gave them last.
    pub takings: BTreeMap<u64, Vec<Slabs>>,
}

/// [`Taken`], also from when takings had no numbers.
#[derive(Deserialize)]
struct TakenAsStored {
    term: NodeTerm,
    #[serde(default)]
    slabs: Vec<Slabs>,
    #[serde(default)]
    takings: BTreeMap<u64, Vec<Slabs>>,
}

impl From<TakenAsStored> for Taken {
    fn from(TakenAsStored { term, slabs, mut takings }: TakenAsStored) -> Self {
        if !slabs.is_empty() {
            takings.insert(0, slabs);
        }
        Taken { term, takings }
    }
}

/// What a node gets when it takes slabs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taking {
    /// Its number: grows with every taking of this LUN, and is named by whoever makes
    /// these slabs parts of a file. Of nothing, it says nothing.
    pub number: u64,
    /// Which slabs.
    pub slabs: Vec<Slabs>,
}

/// From so many percent on a volume fills, and from so many on it is nearly full.
const FILLS_PERCENT: u64 = 80;
const NEARLY_FULL_PERCENT: u64 = 90;
/// It is said to be less full when it is so many percent below that.
const CLEARLY_PERCENT: u64 = 5;
/// A full one has room again when so many percent are free.
const ROOM_PERCENT: u64 = 2;

/// How full a LUN is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Fullness {
    /// There is room.
    #[default]
    Low,
    /// Files have four fifths of it.
    Fills,
    /// Files have nine tenths of it.
    NearlyFull,
    /// No slab is free.
    Full,
}

impl Fullness {
    fn is_low(&self) -> bool {
        *self == Fullness::Low
    }
}

/// The slabs of a LUN and who has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lun {
    /// The size of a slab in bytes.
    pub slab_bytes: u64,
    /// How many there are.
    pub slabs: u32,
    /// The files, by name; one without a name by what no name can be.
    pub files: BTreeMap<String, LunFile>,
    /// Files that nodes have in their hands without a VM.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub holds: Holds,
    /// What nodes have taken.
    pub taken: BTreeMap<NodeId, Taken>,
    /// How many takings there were.
    #[serde(default)]
    pub takings: u64,
    /// What was said last of how full it is.
    #[serde(default, skip_serializing_if = "Fullness::is_low")]
    pub told: Fullness,
    /// What nobody has, in order and joined.
    pub free: Vec<Slabs>,
    /// What files had and the journal may still say that they have, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub freed: Vec<Freed>,
    /// Counts the changes of files and of their parts.
    #[serde(default)]
    pub revision: u64,
    /// The description of the files on the LUN.
    #[serde(default)]
    pub journal: Journal,
    /// Its files are still being read from it: nobody uses it yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub importing: bool,
    /// Who owns it, and how nodes reach it.
    #[serde(default, skip_serializing_if = "Access::is_new")]
    pub access: Access,
}

impl Lun {
    /// All of it free.
    pub fn new(slab_bytes: u64, slabs: u32) -> Self {
        Lun {
            slab_bytes,
            slabs,
            files: BTreeMap::new(),
            holds: BTreeMap::new(),
            taken: BTreeMap::new(),
            takings: 0,
            told: Fullness::Low,
            free: vec![Slabs { first: 0, count: slabs }],
            freed: Vec::new(),
            revision: 0,
            journal: Journal::default(),
            importing: false,
            access: Access::default(),
        }
    }

    /// A copy without who has which slab.
    pub(crate) fn without_slabs(&self) -> Self {
        let (importing, access) = (self.importing, self.access.clone());
        Lun { importing, access, free: Vec::new(), ..Lun::new(self.slab_bytes, self.slabs) }
    }

    /// How many slabs nobody has.
    pub fn free_slabs(&self) -> u32 {
        self.free.iter().map(|run| run.count).sum()
    }

    /// How many slabs files have.
    pub fn used_slabs(&self) -> u32 {
        // Files have many more runs than what is not theirs.
        self.slabs - self.free_slabs() - self.taken_slabs() - self.freed_slabs()
    }

    /// How much of it files have, in percent, rounded down.
    pub fn used_percent(&self) -> u64 {
        u64::from(self.used_slabs()) * 100 / u64::from(self.slabs.max(1))
    }

    /// How full it is to be called now: what was said last stays true until it is clearly
    /// not, so that nobody hears the same again and again.
    pub fn fullness(&self) -> Fullness {
        let free = self.free_slabs();
        let level = |percent: u64| match percent {
            _ if free == 0 => Fullness::Full,
            NEARLY_FULL_PERCENT.. => Fullness::NearlyFull,
            FILLS_PERCENT.. => Fullness::Fills,
            _ => Fullness::Low,
        };
        let (up, down) = (level(self.used_percent()), level(self.used_percent() + CLEARLY_PERCENT));
        let stays_full = self.told == Fullness::Full && u64::from(free) * 100 < u64::from(self.slabs) * ROOM_PERCENT;
        match self.told {
            told if up > told => up,
            told if down < told && !stays_full => down,
            told => told,
        }
    }

    /// How many parts a file of so many bytes has.
    pub fn parts(&self, bytes: u64) -> u32 {
        u32::try_from(bytes.div_ceil(self.slab_bytes)).unwrap_or(u32::MAX)
    }

    /// How many slabs nodes have taken.
    pub fn taken_slabs(&self) -> u32 {
        self.taken.values().flat_map(Taken::slabs).map(|run| run.count).sum()
    }

    /// Gives a node up to `most` free slabs, and says which. What it had taken in an
    /// earlier term is free before that. What it has and does not know of, because an
    /// answer was lost or its memory was, is given anew instead.
    pub fn take(&mut self, node: NodeId, term: NodeTerm, known: &[Slabs], most: u32) -> Taking {
        if self.taken.get(&node).is_some_and(|taken| taken.term != term) {
            self.give_back(node);
        }
        let mut slabs = self.taken.get_mut(&node).map_or_else(Vec::new, |taken| taken.give_up_all_but(known));
        if slabs.is_empty() {
            slabs = self.take_free(most);
        }
        if slabs.is_empty() {
            return Taking::default();
        }
        self.takings += 1;
        let taken = self.taken.entry(node).or_insert(Taken { term, takings: BTreeMap::new() });
        taken.takings.insert(self.takings, slabs.clone());
        Taking { number: self.takings, slabs }
    }

    fn take_free(&mut self, most: u32) -> Vec<Slabs> {
        let (mut left, mut given) = (most, Vec::new());
        while left > 0
            && let Some(run) = self.free.first_mut()
        {
            let count = run.count.min(left);
            given.push(Slabs { first: run.first, count });
            *run = Slabs { first: run.first + count, count: run.count - count };
            left -= count;
            if run.count == 0 {
                self.free.remove(0);
            }
        }
        given
    }

    /// Frees what a node had taken.
    pub fn give_back(&mut self, node: NodeId) {
        for run in self.taken.remove(&node).iter().flat_map(Taken::slabs) {
            insert_slabs(&mut self.free, run);
        }
    }

    /// Makes slabs that a node has taken, and zeroed, parts of a file; `takings` names
    /// for each run the taking that gave it, where the writer knew such numbers. A part
    /// that has a slab keeps it; a slab that the node did not take, or took again since,
    /// is passed over. Says where the parts that were asked for are then.
    pub fn map(&mut self, file: &str, node: NodeId, term: NodeTerm, wanted: &[Mapped], takings: &[u64]) -> Vec<Mapped> {
        let Some(bytes) = self.files.get(file).map(|file| file.bytes) else { return Vec::new() };
        let parts = self.parts(bytes);
        let mut nothing = Taken { term, takings: BTreeMap::new() };
        let taken = self.taken.get_mut(&node).filter(|taken| taken.term == term).unwrap_or(&mut nothing);
        let Some(file) = self.files.get_mut(file) else { return Vec::new() };
        let before = file.slabs();
        // Parts beyond the file's end are none.
        let steps = |run: &Mapped| 0..run.count.min(parts.saturating_sub(run.part));
        for (at, run) in wanted.iter().enumerate() {
            for step in steps(run) {
                let (part, slab) = (run.part + step, run.slab.saturating_add(step));
                if file.slab(part).is_none() && taken.remove(slab, takings.get(at).copied()) {
                    file.put(part, slab);
                }
            }
        }
        let asked = wanted.iter().flat_map(|run| steps(run).map(|step| run.part + step));
        let mut found = Vec::<Mapped>::new();
        for (part, slab) in asked.filter_map(|part| Some((part, file.slab(part)?))) {
            match found.last_mut() {
                Some(last) if last.part + last.count == part && last.slab + last.count == slab => last.count += 1,
                _ => found.push(Mapped { part, slab, count: 1 }),
            }
        }
        if file.slabs() != before {
            self.changed([]);
        }
        found
    }

    /// Parts of a file (the first, and how many) have no slabs any more, if `number` says
    /// how often it has given parts back so far.
    pub fn unmap(&mut self, file: &str, number: u64, parts: &[(u32, u32)]) -> Unmapped {
        let end = self.files.get(file).map_or(0, |file| self.parts(file.bytes));
        let Some(file) = self.files.get_mut(file) else { return Unmapped { number, left: false } };
        let asked = || parts.iter().flat_map(|(first, count)| *first..first.saturating_add(*count).min(end));
        let mut gone = Vec::new();
        if number == file.unmaps {
            file.unmaps += 1;
            gone.extend(asked().filter_map(|part| Some(Slabs { first: file.cut(part)?, count: 1 })));
        }
        let left = asked().any(|part| file.slab(part).is_some());
        let number = file.unmaps;
        if !gone.is_empty() {
            self.changed(gone);
        }
        Unmapped { number, left }
    }

    /// What was asked to be unmapped before now, and is decided later, is not.
    pub fn void_unmaps(&mut self, file: &str) {
        if let Some(file) = self.files.get_mut(file) {
            file.unmaps += 1;
        }
    }

    /// A new file, nothing of it there; one that was there and had no VM is the VM's.
    pub fn make_file(&mut self, name: &str, vm: VmId, bytes: u64) {
        let file = self.files.entry(name.to_owned()).or_insert_with(|| LunFile::new(vm, bytes));
        file.vm = Some(vm);
        self.changed([]);
    }

    /// Frees the files of a VM that could not be made; those that were there before it
    /// stay.
    pub fn unmake_files(&mut self, vm: VmId) {
        let there = |file: &&mut LunFile| file.vm == Some(vm) && file.imported;
        self.files.values_mut().filter(there).for_each(|file| file.vm = None);
        self.drop_files(vm);
    }

    /// Drops the files of a VM.
    pub fn drop_files(&mut self, vm: VmId) {
        let theirs = |(name, file): (&String, &LunFile)| (file.vm == Some(vm)).then(|| name.clone());
        let names: Vec<_> = self.files.iter().filter_map(theirs).collect();
        names.iter().for_each(|name| self.drop_file(name));
    }
}

impl Taken {
    /// All of its slabs, by takings.
    pub fn slabs(&self) -> impl Iterator<Item = Slabs> {
        self.takings.values().flatten().copied()
    }

    /// Takes those out that are not known, and says which.
    fn give_up_all_but(&mut self, known: &[Slabs]) -> Vec<Slabs> {
        let mut forgotten = Vec::new();
        self.slabs().for_each(|run| insert_slabs(&mut forgotten, run));
        for slab in known.iter().flat_map(|run| run.first..run.end()) {
            remove_slab(&mut forgotten, slab);
        }
        for slab in forgotten.iter().flat_map(|run| run.first..run.end()) {
            self.remove(slab, None);
        }
        forgotten
    }

    /// Takes a slab out that a taking gave, or whichever; `false` if it is not there.
    fn remove(&mut self, slab: u32, taking: Option<u64>) -> bool {
        let found = match taking {
            Some(number) => self.takings.get_mut(&number).is_some_and(|runs| remove_slab(runs, slab)),
            None => self.takings.values_mut().any(|runs| remove_slab(runs, slab)),
        };
        if found {
            self.takings.retain(|_, runs| !runs.is_empty());
        }
        found
    }
}

impl LunFile {
    /// Nothing of it is there yet.
    pub fn new(vm: VmId, bytes: u64) -> Self {
        LunFile { vm: Some(vm), bytes, parts: Vec::new(), unmaps: 0, imported: false }
    }

    /// How many slabs it has.
    pub fn slabs(&self) -> u32 {
        self.parts.iter().map(|run| run.count).sum()
    }

    /// The slab of a part.
    pub fn slab(&self, part: u32) -> Option<u32> {
        let run = self.parts[..self.parts.partition_point(|run| run.part <= part)].last()?;
        (part - run.part < run.count).then(|| run.slab + (part - run.part))
    }

    /// A part has no slab any more; says which it had.
    pub fn cut(&mut self, part: u32) -> Option<u32> {
        let at = self.parts.partition_point(|run| run.part <= part).checked_sub(1)?;
        let run = self.parts[at];
        let before = part - run.part;
        let after = run.count.checked_sub(before + 1)?;
        let slab = run.slab + before;
        let rest = [Mapped { count: before, ..run }, Mapped { part: part + 1, slab: slab + 1, count: after }];
        self.parts.splice(at..=at, rest.into_iter().filter(|run| run.count > 0));
        Some(slab)
    }

    /// A part that had no slab has one; one that has one keeps it.
    pub fn put(&mut self, part: u32, slab: u32) {
        if self.slab(part).is_some() {
            return;
        }
        let at = self.parts.partition_point(|run| run.part < part);
        let joins =
            |one: &Mapped, other: &Mapped| one.part + one.count == other.part && one.slab + one.count == other.slab;
        let new = Mapped { part, slab, count: 1 };
        let before = at.checked_sub(1).filter(|before| joins(&self.parts[*before], &new));
        let after = self.parts.get(at).is_some_and(|after| joins(&new, after));
        match (before, after) {
            (Some(before), true) => {
                self.parts[before].count += 1 + self.parts[at].count;
                self.parts.remove(at);
            }
            (Some(before), false) => self.parts[before].count += 1,
            (None, true) => {
                let run = &mut self.parts[at];
                *run = Mapped { part, slab, count: run.count + 1 };
            }
            (None, false) => self.parts.insert(at, new),
        }
    }
}

impl Mapped {
    /// Each part with its slab.
    pub fn one_by_one(self) -> impl Iterator<Item = (u32, u32)> {
        (0..self.count).map(move |step| (self.part + step, self.slab + step))
    }
}

impl From<(u32, u32, u32)> for Mapped {
    fn from((part, slab, count): (u32, u32, u32)) -> Self {
        Mapped { part, slab, count }
    }
}

impl From<Mapped> for (u32, u32, u32) {
    fn from(run: Mapped) -> Self {
        (run.part, run.slab, run.count)
    }
}

#[cfg(test)]
mod tests;
