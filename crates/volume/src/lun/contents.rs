//! The files of a LUN and which slab is whose.

use std::collections::BTreeMap;

use super::geometry::Geometry;
use super::op::Op;

/// A file's number, never used again on its LUN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u64);

/// The longest name of a file, in bytes.
const LONGEST_NAME: usize = 1024;

/// A file on a LUN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LunFile {
    /// Its name: parts with slashes between them.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// The slab of each part, absent ones not listed.
    slabs: BTreeMap<u32, u32>,
}

/// A run of bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it is on the LUN, in bytes; `None`: nowhere yet, it reads as zero.
    pub at: Option<u64>,
    /// How long it is, in bytes.
    pub bytes: u64,
}

/// Why a change cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// No file has this number.
    #[error("there is no file number {}", .0.0)]
    NoFile(FileId),
    /// The number or the name is taken.
    #[error("there is a file {0:?} already")]
    Taken(String),
    /// A name that is no name.
    #[error(
        "{0:?} cannot be the name of a file: parts of 1 to 255 bytes with single slashes between them, no \".\" or \"..\", no control characters, 1024 bytes in all"
    )]
    Name(String),
    /// Outside the LUN or the file.
    #[error("slabs or parts outside the volume or the file")]
    Range,
    /// A slab that is in use, or a part that has one.
    #[error("slab {0} is in use already")]
    InUse(u32),
}

/// The files of a LUN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    geometry: Geometry,
    files: BTreeMap<FileId, LunFile>,
    names: BTreeMap<String, FileId>,
    /// Slabs in use, with their files.
    used: BTreeMap<u32, FileId>,
    /// The greatest number that a file ever had.
    last_file: FileId,
}

impl Contents {
    /// No files.
    pub fn new(geometry: Geometry) -> Contents {
        Contents {
            geometry,
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            used: BTreeMap::new(),
            last_file: FileId(0),
        }
    }

    /// The sizes that everything follows from.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// All files, by their numbers.
    pub fn files(&self) -> impl Iterator<Item = (FileId, &LunFile)> {
        self.files.iter().map(|(id, file)| (*id, file))
    }

    /// The file with this number.
    pub fn file(&self, id: FileId) -> Option<&LunFile> {
        self.files.get(&id)
    }

    /// The file with this name.
    pub fn named(&self, name: &str) -> Option<FileId> {
        self.names.get(name).copied()
    }

    /// A number for a new file.
    pub fn next_file(&self) -> FileId {
        FileId(self.last_file.0 + 1)
    }

    /// Slabs in use.
    pub fn used_slabs(&self) -> u32 {
        self.used.len() as u32
    }

    /// Free slabs.
    pub fn free_slabs(&self) -> u32 {
        self.geometry.slabs - self.used_slabs()
    }

    /// Slabs that all files would need if nothing of them were absent.
    pub fn promised_slabs(&self) -> u64 {
        self.files.values().map(|file| u64::from(self.parts(file.bytes))).sum()
    }

    /// The first run of free slabs at or after `from`, else the first at all: its
    /// begin and its length, at most `most`.
    pub fn free_run(&self, from: u32, most: u32) -> Option<(u32, u32)> {
        self.free_between(from, self.geometry.slabs, most).or_else(|| self.free_between(0, from, most))
    }

    fn free_between(&self, from: u32, to: u32, most: u32) -> Option<(u32, u32)> {
        let mut begin = from;
        for used in self.used.range(from..to).map(|(slab, _)| *slab) {
            if used > begin {
                return Some((begin, (used - begin).min(most)));
            }
            begin = used + 1;
        }
        (begin < to).then(|| (begin, (to - begin).min(most)))
    }

    /// How many parts a file of so many bytes has.
    fn parts(&self, bytes: u64) -> u32 {
        bytes.div_ceil(self.geometry.slab_bytes) as u32
    }

    /// Where the bytes of a file are, from `offset` on for `bytes`.
    pub fn segments(&self, id: FileId, offset: u64, bytes: u64) -> Vec<Segment> {
        let Some(file) = self.files.get(&id) else { return Vec::new() };
        let slab_bytes = self.geometry.slab_bytes;
        let end = offset.saturating_add(bytes).min(file.bytes);
        let (mut at, mut segments) = (offset, Vec::<Segment>::new());
        while at < end {
            let (index, within) = ((at / slab_bytes) as u32, at % slab_bytes);
            let length = (slab_bytes - within).min(end - at);
            let place = file.slabs.get(&index).map(|slab| self.geometry.slab(*slab) + within);
            match segments.last_mut() {
                Some(last) if last.follows(place) => last.bytes += length,
                _ => segments.push(Segment { at: place, bytes: length }),
            }
            at += length;
        }
        segments
    }

    /// Makes a change; one that cannot be changes nothing.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn apply(&mut self, op: &Op) -> Result<(), Wrong> {
        match op {
            Op::Create { file, bytes, name } => {
                self.free_name(name)?;
                if *file <= self.last_file {
                    return Err(Wrong::Taken(format!("number {}", file.0)));
                }
                self.valid_size(*bytes)?;
                self.last_file = *file;
                self.names.insert(name.clone(), *file);
                self.files.insert(*file, LunFile { name: name.clone(), bytes: *bytes, slabs: BTreeMap::new() });
            }
            Op::Remove { file } => {
                let gone = self.files.remove(file).ok_or(Wrong::NoFile(*file))?;
                self.names.remove(&gone.name);
                for slab in gone.slabs.values() {
                    self.used.remove(slab);
                }
            }
            Op::Rename { file, name } => {
                let known = self.files.get(file).ok_or(Wrong::NoFile(*file))?;
                if known.name != *name {
                    self.free_name(name)?;
                }
                if let Some(known) = self.files.get_mut(file) {
                    self.names.remove(&known.name);
                    self.names.insert(name.clone(), *file);
                    known.name = name.clone();
                }
            }
            Op::Resize { file, bytes } => {
                self.valid_size(*bytes)?;
                let parts = self.parts(*bytes);
                let known = self.files.get_mut(file).ok_or(Wrong::NoFile(*file))?;
                known.bytes = *bytes;
                for slab in known.slabs.split_off(&parts).values() {
                    self.used.remove(slab);
                }
            }
            Op::Map { file, index, slab, count } => self.map(*file, *index, *slab, *count)?,
            Op::Unmap { file, index, count } => {
                let end = index.checked_add(*count).ok_or(Wrong::Range)?;
                let known = self.files.get_mut(file).ok_or(Wrong::NoFile(*file))?;
                for index in known.slabs.range(*index..end).map(|(index, _)| *index).collect::<Vec<_>>() {
                    if let Some(slab) = known.slabs.remove(&index) {
                        self.used.remove(&slab);
                    }
                }
            }
        }
        Ok(())
    }

    fn map(&mut self, id: FileId, index: u32, slab: u32, count: u32) -> Result<(), Wrong> {
        let bytes = self.files.get(&id).ok_or(Wrong::NoFile(id))?.bytes;
        let (parts, slabs) =
            (index.checked_add(count).ok_or(Wrong::Range)?, slab.checked_add(count).ok_or(Wrong::Range)?);
        if count == 0 || parts > self.parts(bytes) || slabs > self.geometry.slabs {
            return Err(Wrong::Range);
        }
        if let Some((taken, _)) = self.used.range(slab..slabs).next() {
            return Err(Wrong::InUse(*taken));
        }
        let Some(file) = self.files.get_mut(&id) else { return Err(Wrong::NoFile(id)) };
        if let Some((_, taken)) = file.slabs.range(index..parts).next() {
            return Err(Wrong::InUse(*taken));
        }
        for step in 0..count {
            file.slabs.insert(index + step, slab + step);
            self.used.insert(slab + step, id);
        }
        Ok(())
    }

    fn free_name(&self, name: &str) -> Result<(), Wrong> {
        let part = |part: &str| {
            !part.is_empty() && part.len() <= 255 && part != "." && part != ".." && !part.chars().any(char::is_control)
        };
        if name.len() > LONGEST_NAME || !name.split('/').all(part) {
            return Err(Wrong::Name(name.into()));
        }
        // A file is no directory of another.
        let below = format!("{name}/");
        let inside = self.names.range(below.clone()..).next().is_some_and(|(other, _)| other.starts_with(&below));
        let above = name.match_indices('/').any(|(at, _)| self.names.contains_key(&name[..at]));
        if self.names.contains_key(name) || inside || above {
            return Err(Wrong::Taken(name.into()));
        }
        Ok(())
    }

    fn valid_size(&self, bytes: u64) -> Result<(), Wrong> {
        let most = u64::from(u32::MAX) * self.geometry.slab_bytes;
        if bytes > most { Err(Wrong::Range) } else { Ok(()) }
    }

    /// The changes that make all of this from nothing.
    pub(super) fn rebuild(&self) -> impl Iterator<Item = Op> + '_ {
        self.files.iter().flat_map(|(id, file)| {
            let create = Op::Create { file: *id, bytes: file.bytes, name: file.name.clone() };
            std::iter::once(create).chain(file.runs().into_iter().map(|(index, slab, count)| Op::Map {
                file: *id,
                index,
                slab,
                count,
            }))
        })
    }

    /// The greatest number that a file ever had, for a snapshot: files that are gone
    /// are not in it.
    pub(super) fn last_file(&self) -> FileId {
        self.last_file
    }

    pub(super) fn set_last_file(&mut self, last: FileId) {
        self.last_file = self.last_file.max(last);
    }
}

impl Segment {
    fn follows(&self, place: Option<u64>) -> bool {
        match (self.at, place) {
            (Some(at), Some(place)) => at + self.bytes == place,
            (None, None) => true,
            _ => false,
        }
    }
}

impl LunFile {
    /// Slabs that it has.
    pub fn slabs(&self) -> u32 {
        self.slabs.len() as u32
    }

    /// Its parts that have slabs, and which.
    pub fn parts(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.slabs.iter().map(|(part, slab)| (*part, *slab))
    }

    /// The slab of its last part that has one.
    pub fn last_slab(&self) -> Option<u32> {
        self.slabs.last_key_value().map(|(_, slab)| *slab)
    }

    /// The slab of a part.
    pub fn slab(&self, part: u32) -> Option<u32> {
        self.slabs.get(&part).copied()
    }

    /// Runs of parts in runs of slabs: first part, first slab, how many.
    pub fn runs(&self) -> Vec<(u32, u32, u32)> {
        super::follow::runs(self.parts())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::op::tests::any_op;
    use super::*;

    const SLAB: u64 = 16 << 20;

    fn empty() -> Contents {
        let geometry = Geometry::of(600 << 20, None).unwrap();
        assert_eq!(geometry.slab_bytes, SLAB);
        Contents::new(geometry)
    }

    fn with_file(bytes: u64) -> (Contents, FileId) {
        let (mut contents, file) = (empty(), FileId(1));
        contents.apply(&Op::Create { file, bytes, name: "vms/web".into() }).unwrap();
        (contents, file)
    }

    #[test]
    fn segments_are_runs_on_the_lun_and_holes() {
        let (mut contents, file) = with_file(5 * SLAB);
        contents.apply(&Op::Map { file, index: 1, slab: 7, count: 2 }).unwrap();
        let start = contents.geometry().slab(7);
        let expected = [
            Segment { at: None, bytes: SLAB - 512 },
            Segment { at: Some(start), bytes: 2 * SLAB },
            Segment { at: None, bytes: 2 * SLAB },
        ];
        assert_eq!(contents.segments(file, 512, u64::MAX), expected);
        assert_eq!(contents.segments(file, SLAB + 4096, 512), [Segment { at: Some(start + 4096), bytes: 512 }]);
        assert_eq!(contents.segments(file, 5 * SLAB, 512), []);
    }

    #[test]
    fn a_slab_belongs_to_one_file_at_most() {
        let (mut contents, file) = with_file(5 * SLAB);
        contents.apply(&Op::Map { file, index: 0, slab: 3, count: 1 }).unwrap();
        assert_eq!(contents.apply(&Op::Map { file, index: 2, slab: 2, count: 2 }), Err(Wrong::InUse(3)));
        assert_eq!(contents.apply(&Op::Map { file, index: 0, slab: 9, count: 1 }), Err(Wrong::InUse(3)));
        assert_eq!(contents.apply(&Op::Map { file, index: 4, slab: 9, count: 2 }), Err(Wrong::Range));
        contents.apply(&Op::Resize { file, bytes: 0 }).unwrap();
        assert_eq!(contents.used_slabs(), 0);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let (mut contents, file) = with_file(SLAB);
        for name in ["", "/a", "a/", "a//b", "..", "a/../b", ".", "a/./b", "a\nb", "vms", "vms/web/disk"] {
            assert!(contents.apply(&Op::Create { file: FileId(2), bytes: 512, name: name.into() }).is_err(), "{name}");
        }
        contents.apply(&Op::Rename { file, name: "vms/db".into() }).unwrap();
        assert_eq!((contents.named("vms/db"), contents.named("vms/web")), (Some(file), None));
    }

    #[test]
    fn free_runs_are_found_behind_what_is_used_and_before() {
        let (mut contents, file) = with_file(30 * SLAB);
        let all = contents.geometry().slabs;
        assert_eq!(contents.free_run(0, 4), Some((0, 4)));
        contents.apply(&Op::Map { file, index: 0, slab: 0, count: 3 }).unwrap();
        contents.apply(&Op::Map { file, index: 5, slab: 5, count: 25 }).unwrap();
        assert_eq!(contents.free_run(0, 9), Some((3, 2)));
        assert_eq!(contents.free_run(6, 99), Some((30, all - 30)));
        assert_eq!(contents.free_run(all, 1), Some((3, 1)));
    }

    proptest! {
        #[test]
        fn whatever_is_asked_the_account_stays_right(ops in proptest::collection::vec(any_op(), 0..60)) {
            let mut contents = empty();
            for op in ops {
                let before = contents.clone();
                if contents.apply(&op).is_err() {
                    prop_assert_eq!(&contents, &before, "what is refused changes nothing");
                }
                let slabs: Vec<_> = contents.files.values().flat_map(|file| file.slabs.values().copied()).collect();
                let distinct: BTreeSet<_> = slabs.iter().copied().collect();
                prop_assert_eq!(slabs.len(), distinct.len());
                prop_assert_eq!(distinct, contents.used.keys().copied().collect::<BTreeSet<_>>());
                let names: Vec<_> = contents.files.iter().map(|(id, file)| (file.name.clone(), *id)).collect();
                prop_assert_eq!(names.into_iter().collect::<BTreeMap<_, _>>(), contents.names.clone());
                let mut again = empty();
                contents.rebuild().for_each(|op| again.apply(&op).unwrap());
                again.set_last_file(contents.last_file());
                prop_assert_eq!(again, contents.clone());
            }
        }
    }
}
