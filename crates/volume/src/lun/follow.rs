//! From files as they are described to files as they are agreed on.

use std::collections::{BTreeMap, BTreeSet};

use super::contents::{Contents, FileId, LunFile};
use super::op::Op;

/// A file as it is agreed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Its size in bytes.
    pub bytes: u64,
    /// Runs of parts in runs of slabs, by part: first part, first slab, how many.
    pub runs: Vec<(u32, u32, u32)>,
}

impl Agreed {
    fn parts(&self) -> BTreeMap<u32, u32> {
        let one_by_one = |(part, slab, count): &(u32, u32, u32)| {
            let (part, slab) = (*part, *slab);
            (0..*count).map(move |step| (part + step, slab + step))
        };
        self.runs.iter().flat_map(one_by_one).collect()
    }
}

impl Contents {
    /// The changes that make these files, by name, of those that there are. What is given
    /// up comes first, so that a slab or a name can be another file's at once.
    pub fn changes_to(&self, agreed: &BTreeMap<String, Agreed>) -> Vec<Op> {
        let (mut first, mut then) = (Vec::new(), Vec::new());
        for (file, known) in self.files() {
            match agreed.get(&known.name) {
                None => first.push(Op::Remove { file }),
                Some(wanted) => change(file, known, wanted, &mut first, &mut then),
            }
        }
        let known: BTreeSet<&str> = self.files().map(|(_, file)| file.name.as_str()).collect();
        let new = agreed.iter().filter(|(name, _)| !known.contains(name.as_str()));
        for (number, (name, wanted)) in (self.next_file().0..).zip(new) {
            let file = FileId(number);
            then.push(Op::Create { file, bytes: wanted.bytes, name: name.clone() });
            then.extend(wanted.runs.iter().map(|(index, slab, count)| map(file, *index, *slab, *count)));
        }
        first.extend(then);
        first
    }

    /// What is not as it was agreed on, a line each, for people.
    pub fn differences(&self, agreed: &BTreeMap<String, Agreed>) -> Vec<String> {
        let mut lines = Vec::new();
        for (_, known) in self.files() {
            let name = &known.name;
            let Some(wanted) = agreed.get(name) else {
                lines.push(format!("file {name:?} is on the LUN and not in the cluster's state"));
                continue;
            };
            if known.bytes != wanted.bytes {
                lines.push(format!(
                    "file {name:?} has {} bytes on the LUN and {} in the state",
                    known.bytes, wanted.bytes
                ));
            }
            let (there, here): (BTreeMap<u32, u32>, _) = (known.parts().collect(), wanted.parts());
            let all: BTreeSet<u32> = there.keys().chain(here.keys()).copied().collect();
            let slab = |slab: Option<&u32>| slab.map_or_else(|| "nowhere".to_owned(), |slab| format!("in slab {slab}"));
            for part in all.into_iter().filter(|part| there.get(part) != here.get(part)) {
                let (there, here) = (slab(there.get(&part)), slab(here.get(&part)));
                lines.push(format!("part {part} of file {name:?} is {there} on the LUN and {here} in the state"));
            }
        }
        let missing = agreed.keys().filter(|name| self.named(name).is_none());
        lines.extend(missing.map(|name| format!("file {name:?} is in the cluster's state and not on the LUN")));
        lines
    }
}

fn change(file: FileId, known: &LunFile, wanted: &Agreed, first: &mut Vec<Op>, then: &mut Vec<Op>) {
    let parts = wanted.parts();
    let over = known.parts().filter(|(part, slab)| parts.get(part) != Some(slab));
    for (index, _, count) in runs(over) {
        first.push(Op::Unmap { file, index, count });
    }
    if known.bytes != wanted.bytes {
        first.push(Op::Resize { file, bytes: wanted.bytes });
    }
    let has = |part: &u32, slab: &u32| known.slab(*part) == Some(*slab);
    let new = parts.into_iter().filter(|(part, slab)| !has(part, slab));
    then.extend(runs(new).into_iter().map(|(index, slab, count)| map(file, index, slab, count)));
}

fn map(file: FileId, index: u32, slab: u32, count: u32) -> Op {
    Op::Map { file, index, slab, count }
}

/// Parts in slabs, one by one, as runs.
pub(super) fn runs(parts: impl Iterator<Item = (u32, u32)>) -> Vec<(u32, u32, u32)> {
    let mut runs = Vec::<(u32, u32, u32)>::new();
    for (part, slab) in parts {
        match runs.last_mut() {
            Some((first, begin, count)) if *first + *count == part && *begin + *count == slab => *count += 1,
            _ => runs.push((part, slab, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::geometry::Geometry;
    use super::super::op::tests::any_op;
    use super::*;

    fn contents(ops: &[Op]) -> Contents {
        let mut contents = Contents::new(Geometry::of(600 << 20, None).unwrap());
        ops.iter().for_each(|op| drop(contents.apply(op)));
        contents
    }

    fn agreed(contents: &Contents) -> BTreeMap<String, Agreed> {
        let one = |file: &LunFile| (file.name.clone(), Agreed { bytes: file.bytes, runs: file.runs() });
        contents.files().map(|(_, file)| one(file)).collect()
    }

    proptest! {
        #[test]
        fn any_files_become_any_others(
            before in proptest::collection::vec(any_op(), 0..60), after in proptest::collection::vec(any_op(), 0..60),
        ) {
            let (mut described, wanted) = (contents(&before), agreed(&contents(&after)));
            let ops = described.changes_to(&wanted);
            prop_assert_eq!(ops.is_empty(), described.differences(&wanted).is_empty());
            for op in ops {
                prop_assert_eq!(described.apply(&op), Ok(()));
            }
            prop_assert_eq!(agreed(&described), wanted.clone());
            prop_assert_eq!(described.changes_to(&wanted), []);
            prop_assert_eq!(described.differences(&wanted), Vec::<String>::new());
        }
    }

    #[test]
    fn what_did_not_change_is_not_written() {
        let file = FileId(1);
        let create = Op::Create { file, bytes: 160 << 20, name: "a".into() };
        let described = contents(&[create, Op::Map { file, index: 0, slab: 4, count: 3 }]);
        let mut wanted = agreed(&described);
        wanted.get_mut("a").unwrap().runs = vec![(0, 4, 5), (7, 1, 1)];
        let expected = [map(file, 3, 7, 2), map(file, 7, 1, 1)];
        assert_eq!(described.changes_to(&wanted), expected);
        assert_eq!(
            described.differences(&wanted)[0],
            "part 3 of file \"a\" is nowhere on the LUN and in slab 7 in the state"
        );
    }
}
