//! Descriptions that are damaged: what is found of them, and how they are mended.

use std::collections::BTreeMap;

use super::super::super::follow::Agreed;
use super::super::super::inspect::{Condition, inspect};
use super::*;

fn agreed(contents: &Contents) -> BTreeMap<String, Agreed> {
    contents.files().map(|(_, file)| (file.name.clone(), Agreed { bytes: file.bytes, runs: file.runs() })).collect()
}

fn flip(memory: &Memory, at: u64) {
    memory.stable.borrow_mut()[at as usize] ^= 1;
}

/// A volume of some history; in both areas there is something.
fn used() -> (Memory, Store<Memory>) {
    let (memory, mut store) = formatted();
    store.commit(1, &[create(1), Op::Map { file: FileId(1), index: 0, slab: 0, count: 3 }]).unwrap();
    store.take_over(2).unwrap();
    for revision in 2..=4 {
        store.commit(revision, &[create(revision)]).unwrap();
    }
    (memory, store)
}

fn rebuilt(memory: &Memory, from: &Store<Memory>) -> Result<Store<Memory>, StoreError> {
    let superblock = Superblock { written: 9, ..from.superblock().clone() };
    Store::rebuild(memory.clone(), superblock, from.contents().clone(), (from.epoch(), from.revision()))
}

#[test]
fn a_sound_volume_has_no_findings() {
    let (memory, store) = used();
    let found = inspect(&memory, None).unwrap();
    assert_eq!(found.findings(), Vec::<String>::new());
    assert_eq!(found.superblocks, [Condition::Sound; 2]);
    assert_eq!(found.contents, Some((store.contents().clone(), 4)));
    let blank = inspect(&Memory::new(), None).unwrap();
    assert_eq!((blank.superblocks, blank.areas), ([Condition::Missing; 2], None));
}

#[test]
fn every_kind_of_damage_is_found_and_mended() {
    let (_, store) = used();
    let geometry = store.superblock().geometry;
    let journal = store.position(store.area, store.used - 2 * PAGE_BYTES as u64);
    let snapshots = [geometry.area(0), geometry.area(1)];
    let damages: [(&[u64], &str); 7] = [
        (&[SUPERBLOCK], "superblock at byte 0 is damaged"),
        (&[SUPERBLOCK_COPY], "superblock at byte 2097152 is damaged"),
        (&[SUPERBLOCK, SUPERBLOCK_COPY], "superblock at byte 2097152 is damaged"),
        (&[journal], "a change is missing"),
        (&[snapshots[1]], "changes to a snapshot"),
        (&[snapshots[0], snapshots[1]], "no snapshot of its files is whole"),
        (&[SUPERBLOCK, SUPERBLOCK_COPY, journal, snapshots[0]], "a change is missing"),
    ];
    for (places, finding) in damages {
        let (memory, store) = used();
        places.iter().for_each(|at| flip(&memory, at + 20));
        let before = memory.stable.borrow().clone();
        let found = inspect(&memory, Some(store.superblock())).unwrap();
        assert!(found.findings().iter().any(|line| line.contains(finding)), "{finding}: {:?}", found.findings());
        assert_eq!(*memory.stable.borrow(), before, "looking changes nothing");
        assert!(Store::leaves_traces(&memory, store.superblock()).unwrap());
        rebuilt(&memory, &store).unwrap();
        assert_eq!(inspect(&memory, None).unwrap().findings(), Vec::<String>::new(), "{finding}");
        let again = Store::open(memory).unwrap();
        assert_eq!((again.contents(), again.revision()), (store.contents(), 4), "{finding}");
    }
    assert!(!Store::leaves_traces(&Memory::new(), store.superblock()).unwrap());
}

#[test]
fn a_superblock_of_before_is_older() {
    let (memory, mut store) = used();
    let old = memory.stable.borrow()[..PAGE_BYTES].to_vec();
    store.identify(Identity { name: "vol2".into(), ..identity() }).unwrap();
    memory.stable.borrow_mut()[..PAGE_BYTES].copy_from_slice(&old);
    let found = inspect(&memory, None).unwrap();
    assert_eq!(found.superblocks, [Condition::Older, Condition::Sound]);
    assert_eq!(found.superblock.unwrap().identity.name, "vol2");
}

#[test]
fn an_area_that_a_later_owner_has_begun_is_not_overwritten() {
    let (memory, mut old) = formatted();
    let mut new = Store::open(memory.clone()).unwrap();
    new.take_over(2).unwrap();
    new.commit(2, &[create(2)]).unwrap();
    let outcome = (1..).find_map(|round| old.commit(round, &[create(round), Op::Remove { file: FileId(round) }]).err());
    assert!(matches!(outcome, Some(StoreError::Outdated { ours: 1, theirs: 2 })), "{outcome:?}");
    assert_eq!(Store::open(memory).unwrap().contents(), new.contents());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever becomes of some sectors, what is read is how things were at some time,
    /// or refused; and what is agreed on mends it, though the power fails meanwhile.
    #[test]
    fn damage_never_makes_up_files(
        rounds in proptest::collection::vec(proptest::collection::vec(any_op(), 1..4), 1..12),
        sectors in proptest::collection::vec((0..2_usize, 0_usize..40, any::<u8>(), any::<bool>()), 1..5),
        left in 0_u64..12,
        mut kept: u64,
    ) {
        let (memory, mut store) = formatted();
        let mut history = vec![(store.contents().clone(), 0)];
        for (number, ops) in rounds.iter().enumerate() {
            let revision = number as u64 + 1;
            if number % 4 == 3 {
                store.take_over(store.epoch() + 1).unwrap();
            }
            if store.commit(revision, ops).is_ok() {
                history.push((store.contents().clone(), revision));
            }
        }
        let geometry = store.superblock().geometry;
        for (area, sector, byte, superblock) in sectors {
            let begin = match (superblock, area) {
                (false, area) => geometry.area(area) as usize + sector * SECTOR,
                (true, 0) => SUPERBLOCK as usize,
                (true, _) => SUPERBLOCK_COPY as usize,
            };
            memory.stable.borrow_mut()[begin..begin + SECTOR].fill(byte);
        }
        if let Ok(found) = Store::open(memory.clone()) {
            prop_assert!(history.contains(&(found.contents().clone(), found.revision())));
        }
        inspect(&memory, Some(store.superblock())).unwrap();
        memory.left.set(left);
        let _ = rebuilt(&memory, &store);
        memory.crash(|| { kept = kept.rotate_left(1); kept & 1 == 1 });
        inspect(&memory, Some(store.superblock())).unwrap();
        rebuilt(&memory, &store).unwrap();
        let again = Store::open(memory).unwrap();
        prop_assert_eq!(again.contents().differences(&agreed(store.contents())), Vec::<String>::new());
        prop_assert_eq!(again.revision(), store.revision());
    }
}
