//! Files on a LUN that a node has in its hands without a VM: to read one, to write one, or to
//! make a new one.
//!
//! ```text
//!  HoldFile ─▶ held ─▶ EndHold: as it is, or (one that was made) under its name
//!                └───▶ the node's term is over: what was being made is gone
//! ```
//! What is being made has no name that anybody could ask for, and is not described on the
//! LUN. Nothing takes slabs from a file while it is held: one whose VM goes away meanwhile
//! loses its name, and its slabs when the last hold on it ends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{HoldId, Lun, LunFile, Slabs, Tenure};

/// The longest name of a file, in bytes.
const LONGEST_NAME: usize = 1024;
/// The longest part of one, in bytes.
const LONGEST_PART: usize = 255;

/// What a node may do with a file that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HoldKind {
    /// Read it; others may, too.
    Reads,
    /// Read and write it; nobody else may use it.
    Writes,
}

/// A node's right to a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHold {
    /// The file, by its key in [`Lun::files`].
    pub file: String,
    /// What the node may do with it.
    pub kind: HoldKind,
    /// Whose right it is.
    pub tenure: Tenure,
}

/// A name of a file as a user gives it: parts of 1 to 255 bytes with single slashes between
/// them, none of them `.` or `..`, without control characters, 1024 bytes in all.
pub fn is_file_name(name: &str) -> bool {
    let part = |part: &str| {
        let dots = part == "." || part == "..";
        !part.is_empty() && part.len() <= LONGEST_PART && !dots && !part.chars().any(char::is_control)
    };
    name.len() <= LONGEST_NAME && name.split('/').all(part)
}

/// Whether two names cannot both be files' in one place: they are the same, or one would be
/// a directory of the other.
pub fn are_in_the_way(one: &str, other: &str) -> bool {
    let below = |name: &str, dir: &str| name.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'));
    one == other || below(one, other) || below(other, one)
}

impl Lun {
    /// The files that have names.
    pub fn named_files(&self) -> impl Iterator<Item = (&String, &LunFile)> {
        self.files.iter().filter(|(name, _)| !is_nameless(name))
    }

    /// The holds on a file.
    pub fn holds_on<'a>(&'a self, file: &'a str) -> impl Iterator<Item = (&'a HoldId, &'a FileHold)> {
        self.holds.iter().filter(move |(_, hold)| hold.file == file)
    }

    /// A file whose name stands in the way of this one.
    pub fn in_the_way<'a>(&'a self, name: &str) -> Option<&'a String> {
        self.files.keys().find(|known| are_in_the_way(known, name))
    }

    /// A new file without a name, in the hands of a node.
    pub fn make_nameless(&mut self, id: HoldId, tenure: Tenure, bytes: u64) {
        let file = nameless(id);
        self.files.insert(file.clone(), LunFile { vm: None, bytes, parts: Vec::new(), unmaps: 0, imported: false });
        self.holds.insert(id, FileHold { file, kind: HoldKind::Writes, tenure });
    }

    /// A file gets another name: it had none, or nobody has it open.
    pub fn rename_file(&mut self, old: &str, new: &str) {
        if let Some(file) = self.files.remove(old) {
            self.files.insert(new.to_owned(), file);
            self.changed([]);
        }
    }

    /// A file is none any more. Its slabs are free, or, while it is held, when the last hold
    /// on it ends.
    pub fn drop_file(&mut self, name: &str) {
        let holder = self.holds_on(name).map(|(id, _)| *id).next();
        let Some(file) = self.files.remove(name) else { return };
        match holder {
            Some(id) => {
                let new = nameless(id);
                self.holds.values_mut().filter(|hold| hold.file == name).for_each(|hold| hold.file.clone_from(&new));
                self.files.insert(new, LunFile { vm: None, ..file });
                self.changed([]);
            }
            None => {
                let slabs = file.parts.iter().map(|run| Slabs { first: run.slab, count: run.count });
                self.changed(slabs.collect::<Vec<_>>());
            }
        }
    }

    /// A node has let go of a file. One without a name that nobody holds any more is gone.
    pub fn end_hold(&mut self, id: HoldId) {
        if let Some(hold) = self.holds.remove(&id)
            && is_nameless(&hold.file)
            && self.holds_on(&hold.file).next().is_none()
        {
            self.drop_file(&hold.file);
        }
    }
}

/// The key of a file without a name: none that a user could give.
fn nameless(id: HoldId) -> String {
    format!("/{id}")
}

/// Whether the key of a file is no name.
pub fn is_nameless(key: &str) -> bool {
    key.starts_with('/')
}

/// Holds, by their identities.
pub(super) type Holds = BTreeMap<HoldId, FileHold>;

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::super::{Epoch, Mapped, NodeId, NodeTerm, VmId};
    use super::*;

    const SLAB: u64 = 16 << 20;
    const TENURE: Tenure = Tenure { node: NodeId(1), term: NodeTerm(1), epoch: Epoch(1) };

    fn id(number: u128) -> HoldId {
        HoldId(Uuid::from_u128(number))
    }

    /// A LUN of ten slabs with a file that has the first two of them.
    fn lun() -> Lun {
        let mut lun = Lun::new(SLAB, 10);
        lun.files.insert("disk".into(), LunFile::new(VmId(Uuid::nil()), 2 * SLAB));
        let taking = lun.take(NodeId(1), NodeTerm(1), &[], 2);
        let wanted = [Mapped { part: 0, slab: 0, count: 2 }];
        lun.map("disk", NodeId(1), NodeTerm(1), &wanted, &[taking.number]);
        lun
    }

    #[test]
    fn names_that_lead_elsewhere_are_none() {
        for name in ["a", "a/b", "iso/debian 13.iso", "..a", "a.", "ä", "x/".repeat(511).trim_end_matches('/')] {
            assert!(is_file_name(name), "{name}");
        }
        let long = "x".repeat(256);
        for name in ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".", "a/./b", "a\nb", "a\0", &long, &"x/".repeat(600)]
        {
            assert!(!is_file_name(name), "{name}");
        }
        assert!(are_in_the_way("a", "a") && are_in_the_way("a/b", "a") && are_in_the_way("a", "a/b/c"));
        assert!(!are_in_the_way("a", "ab") && !are_in_the_way("a/b", "a/c"));
    }

    #[test]
    fn slabs_of_a_file_that_is_held_are_free_when_the_last_hold_ends() {
        let mut lun = lun();
        for number in [1, 2] {
            lun.holds.insert(id(number), FileHold { file: "disk".into(), kind: HoldKind::Reads, tenure: TENURE });
        }
        lun.drop_files(VmId(Uuid::nil()));
        assert_eq!((lun.named_files().count(), lun.free_slabs()), (0, 8));
        lun.end_hold(id(1));
        assert_eq!(lun.free_slabs(), 8);
        lun.end_hold(id(2));
        assert_eq!((lun.files.len(), lun.free_slabs()), (0, 10));
    }

    #[test]
    fn what_is_made_has_no_name_before_it_gets_one_and_leaves_nothing_without() {
        let mut lun = Lun::new(SLAB, 10);
        lun.make_nameless(id(1), TENURE, SLAB);
        lun.make_nameless(id(2), TENURE, SLAB);
        assert_eq!((lun.files.len(), lun.named_files().count()), (2, 0));
        let key = lun.holds[&id(1)].file.clone();
        lun.rename_file(&key, "iso/a");
        lun.holds.remove(&id(1));
        lun.end_hold(id(2));
        assert_eq!(lun.files.keys().collect::<Vec<_>>(), ["iso/a"]);
        assert_eq!(lun.in_the_way("iso").map(String::as_str), Some("iso/a"));
        assert_eq!(lun.in_the_way("iso/b"), None);
    }
}
