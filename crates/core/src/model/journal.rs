//! The description of a LUN's files on the LUN itself: who writes it, how far it is,
//! and what may not be used again before it is further.
//!
//! ```text
//!  a file's part ──▶ freed ───────────────────────────▶ free
//!                      │  the journal is at the revision  │
//!                      └─ that freed it, or at a later ───┘
//! ```
//! So whatever the journal says of a slab, nobody else has written to it: an import
//! finds a file as it is, or as it was, and never with another one's data.

use serde::{Deserialize, Serialize};

use super::slabs::{insert_slabs, remove_slabs};
use super::{Lun, LunFile, Mapped, NodeId, NodeTerm, Slabs};

/// Who writes a LUN's journal, and what is known of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// Counts the writers: each of them writes where no earlier one does.
    pub epoch: u64,
    /// Who writes it now, in which of its terms. Nobody else does before it has said
    /// that it does not any more, or its term is over.
    pub writer: Option<Writer>,
    /// The revision of the LUN's files that is on stable storage there at least.
    pub written: u64,
    /// It is to be written anew, with the superblocks, whatever is there.
    pub repair: bool,
    /// Why it cannot be written, if it cannot.
    pub trouble: Option<String>,
}

/// The writer of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writer {
    /// The node.
    pub node: NodeId,
    /// Its term.
    pub term: NodeTerm,
}

/// Slabs that a change of a LUN's files has freed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freed {
    /// The revision that the change led to.
    pub revision: u64,
    /// Which slabs, in order and joined.
    pub slabs: Vec<Slabs>,
}

impl Lun {
    /// Its files have changed, and these slabs are none of theirs any more.
    pub fn changed(&mut self, freed: impl IntoIterator<Item = Slabs>) {
        self.revision += 1;
        let mut slabs = Vec::new();
        freed.into_iter().for_each(|run| insert_slabs(&mut slabs, run));
        match slabs.is_empty() {
            true => {}
            // Nobody has described anything yet.
            false if self.journal.epoch == 0 => slabs.into_iter().for_each(|run| insert_slabs(&mut self.free, run)),
            false => self.freed.push(Freed { revision: self.revision, slabs }),
        }
    }

    /// The journal is on stable storage up to a revision: what was freed by then is free.
    pub fn described(&mut self, revision: u64) {
        self.journal.written = self.journal.written.max(revision);
        let written = self.journal.written;
        let over = self.freed.partition_point(|freed| freed.revision <= written);
        for run in self.freed.drain(..over).flat_map(|freed| freed.slabs) {
            insert_slabs(&mut self.free, run);
        }
    }

    /// Adds a file, or more parts of it, as they were found on the LUN.
    ///
    /// # Errors
    /// Why it cannot be; some of it may have been added.
    pub fn import_file(&mut self, name: &str, bytes: u64, parts: &[Mapped]) -> Result<(), String> {
        let most = self.parts(bytes);
        let new = || LunFile { vm: None, bytes, parts: Vec::new(), unmaps: 0, imported: true };
        let file = self.files.entry(name.to_owned()).or_insert_with(new);
        if file.bytes != bytes {
            return Err(format!("file {name:?} has two sizes"));
        }
        for run in parts {
            let (end, slabs) = (run.part.saturating_add(run.count), run.slab.saturating_add(run.count));
            let after = file.parts.last().map_or(0, |last| last.part + last.count);
            let taken = Slabs { first: run.slab, count: run.count };
            if run.count == 0
                || run.part < after
                || end > most
                || slabs > self.slabs
                || !remove_slabs(&mut self.free, taken)
            {
                return Err(format!("file {name:?} has parts or slabs that cannot be its own: {run:?}"));
            }
            file.parts.push(*run);
        }
        Ok(())
    }

    /// How many slabs wait for the journal.
    pub fn freed_slabs(&self) -> u32 {
        self.freed.iter().flat_map(|freed| &freed.slabs).map(|run| run.count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLAB: u64 = 16 << 20;

    #[test]
    fn what_is_imported_has_one_place_each() {
        let mut lun = Lun::new(SLAB, 20);
        lun.import_file("a", 6 * SLAB, &[(0, 3, 2).into()]).unwrap();
        lun.import_file("a", 6 * SLAB, &[(2, 7, 1).into(), (5, 0, 1).into()]).unwrap();
        lun.import_file("b", SLAB, &[(0, 19, 1).into()]).unwrap();
        assert_eq!(lun.free, [(1, 2).into(), (5, 2).into(), (8, 11).into()]);
        assert_eq!((lun.files["a"].slab(1), lun.files["a"].vm), (Some(4), None));
        for wrong in [(0, 4, 1), (3, 7, 1), (4, 10, 3), (0, 20, 1), (0, 18, 3), (0, 9, 0), (u32::MAX, 9, 2)] {
            assert!(lun.clone().import_file("c", 6 * SLAB, &[wrong.into()]).is_err(), "{wrong:?}");
        }
        let backwards = [(3, 8, 1).into(), (2, 9, 1).into()];
        assert!(lun.clone().import_file("c", 6 * SLAB, &backwards).is_err());
        assert!(lun.import_file("b", 2 * SLAB, &[]).is_err());
    }
}
