//! The store on a device that tears, forgets and fails.

use std::cell::{Cell, RefCell};
use std::fmt::Write as _;
use std::path::Path;
use std::rc::Rc;

use proptest::prelude::*;
use uuid::Uuid;

use super::super::contents::FileId;
use super::super::op::tests::any_op;
use super::*;

mod damage;

const BYTES: u64 = 320 << 20;
const SECTOR: usize = 512;
/// Only so much of the device is ever touched by a description.
const TOUCHED: usize = 16 << 20;

/// What was written and not flushed: positions and bytes.
type Pending = Vec<(u64, Vec<u8>)>;

/// A device in memory. What is written and not flushed may be lost, sector by sector.
#[derive(Clone)]
struct Memory {
    stable: Rc<RefCell<Vec<u8>>>,
    pending: Rc<RefCell<Pending>>,
    /// Writes that still work; the one after them fails.
    left: Rc<Cell<u64>>,
}

impl Memory {
    fn new() -> Memory {
        Memory {
            stable: Rc::new(RefCell::new(vec![0; TOUCHED])),
            pending: Rc::default(),
            left: Rc::new(Cell::new(u64::MAX)),
        }
    }

    /// The power fails: of what was not flushed, `kept` says which sectors are there.
    fn crash(&self, mut kept: impl FnMut() -> bool) {
        for (at, bytes) in self.pending.take() {
            for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                if kept() {
                    let at = at as usize + index * SECTOR;
                    self.stable.borrow_mut()[at..at + SECTOR].copy_from_slice(sector);
                }
            }
        }
        self.left.set(u64::MAX);
    }
}

impl Device for Memory {
    fn bytes(&self) -> io::Result<u64> {
        Ok(BYTES)
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let at = at as usize;
        into.copy_from_slice(&self.stable.borrow()[at..at + into.len()]);
        for (start, bytes) in self.pending.borrow().iter() {
            let start = *start as usize;
            for (index, byte) in bytes.iter().enumerate() {
                if let Some(target) = (start + index).checked_sub(at).and_then(|at| into.get_mut(at)) {
                    *target = *byte;
                }
            }
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        assert!(at.is_multiple_of(PAGE_BYTES as u64) && from.len().is_multiple_of(PAGE_BYTES));
        let left = self.left.get();
        self.pending.borrow_mut().push((at, from.to_vec()));
        self.left.set(left.saturating_sub(1));
        // The one that fails may have been done all the same.
        if left == 0 { Err(io::Error::other("the device is gone")) } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        if left == 0 {
            return Err(io::Error::other("the device is gone"));
        }
        self.crash(|| true);
        self.left.set(left.saturating_sub(1));
        Ok(())
    }
}

fn identity() -> Identity {
    Identity { volume: Uuid::from_u128(7), cluster: Uuid::from_u128(8), name: "vol1".into() }
}

fn formatted() -> (Memory, Store<Memory>) {
    let memory = Memory::new();
    let store = Store::format(memory.clone(), identity(), None, 1, 1).unwrap();
    (memory, store)
}

fn create(number: u64) -> Op {
    Op::Create { file: FileId(number), bytes: 64 << 20, name: format!("file-{number}") }
}

#[test]
fn a_volume_is_found_as_it_was_left() {
    let (memory, mut store) = formatted();
    store.commit(1, &[create(1), Op::Map { file: FileId(1), index: 0, slab: 0, count: 3 }]).unwrap();
    store.commit(2, &[create(2), Op::Remove { file: FileId(1) }]).unwrap();
    let again = Store::open(memory).unwrap();
    assert_eq!(again.contents(), store.contents());
    assert_eq!((again.revision(), again.epoch()), (2, 1));
    assert_eq!(again.superblock(), store.superblock());
}

#[test]
fn areas_take_turns_when_they_are_full() {
    let (memory, mut store) = formatted();
    let pages = store.superblock().geometry.area_bytes / PAGE_BYTES as u64;
    for round in 1..=3 * pages {
        store.commit(round, &[create(round), Op::Remove { file: FileId(round) }]).unwrap();
        if round % 100 == 0 {
            let again = Store::open(memory.clone()).unwrap();
            assert_eq!((again.contents(), again.revision()), (store.contents(), round));
        }
    }
    assert!(store.generation >= 4);
    assert_eq!(
        Store::open(memory).unwrap().contents().next_file(),
        FileId(3 * pages + 1),
        "numbers are never used again"
    );
}

#[test]
fn a_batch_with_a_change_that_cannot_be_changes_nothing() {
    let (memory, mut store) = formatted();
    store.commit(1, &[create(1)]).unwrap();
    let before = store.contents().clone();
    let wrong = store.commit(2, &[create(2), Op::Remove { file: FileId(9) }]);
    assert!(matches!(wrong, Err(StoreError::Wrong(Wrong::NoFile(FileId(9))))));
    assert_eq!(store.contents(), &before);
    store.commit(2, &[create(2)]).unwrap();
    assert_eq!(Store::open(memory).unwrap().contents(), store.contents());
}

#[test]
fn an_earlier_owner_s_late_writes_do_no_harm() {
    let (memory, mut old) = formatted();
    old.commit(1, &[create(1)]).unwrap();
    let mut new = Store::open(memory.clone()).unwrap();
    new.take_over(2).unwrap();
    new.commit(2, &[create(2)]).unwrap();
    old.commit(2, &[create(7)]).unwrap();
    let now = Store::open(memory).unwrap();
    assert_eq!((now.contents(), now.epoch()), (new.contents(), 2));
    assert!(matches!(new.take_over(2), Err(StoreError::Outdated { ours: 2, theirs: 2 })));
}

#[test]
fn one_lost_superblock_is_mended_and_two_are_damage() {
    for (at, mended) in [(SUPERBLOCK, true), (SUPERBLOCK_COPY, true)] {
        let (memory, _) = formatted();
        memory.stable.borrow_mut()[at as usize + 100] ^= 1;
        let mut store = Store::open(memory.clone()).unwrap();
        assert!(store.superblock_lost());
        store.take_over(2).unwrap();
        assert_eq!(!Store::open(memory).unwrap().superblock_lost(), mended);
    }
    let (memory, _) = formatted();
    for at in [SUPERBLOCK, SUPERBLOCK_COPY] {
        memory.stable.borrow_mut()[at as usize + 100] ^= 1;
    }
    assert!(matches!(Store::open(memory), Err(StoreError::Damaged { what: "its superblock", .. })));
    assert!(matches!(Store::open(Memory::new()), Err(StoreError::NoVolume)));
}

#[test]
fn a_hole_in_the_journal_is_damage_and_a_torn_end_is_not() {
    let (memory, mut store) = formatted();
    for revision in 1..=4 {
        store.commit(revision, &[create(revision)]).unwrap();
    }
    let page = |from_end: u64| (store.position(store.area, store.used) - from_end * PAGE_BYTES as u64) as usize;
    memory.stable.borrow_mut()[page(1) + 80] ^= 1;
    assert_eq!(Store::open(memory.clone()).unwrap().revision(), 3);
    memory.stable.borrow_mut()[page(1) + 80] ^= 1;
    memory.stable.borrow_mut()[page(2) + 80] ^= 1;
    assert!(matches!(Store::open(memory), Err(StoreError::Damaged { .. })));
}

#[test]
fn another_volume_s_leftovers_are_not_taken_for_this_one_s() {
    let (memory, mut store) = formatted();
    store.commit(1, &[create(1)]).unwrap();
    let other = Identity { volume: Uuid::from_u128(99), ..identity() };
    let mut fresh = Store::format(memory.clone(), other, None, 2, 1).unwrap();
    assert_eq!(fresh.contents().files().count(), 0);
    fresh.commit(1, &[create(1)]).unwrap();
    assert_eq!(Store::open(memory).unwrap().contents(), fresh.contents());
}

/// The format is a contract with every LUN that was ever made: `UPDATE=1` accepts a
/// change, which then needs a new version.
#[test]
fn what_is_on_a_lun_is_what_it_always_was() {
    let (memory, mut store) = formatted();
    store.commit(1, &[create(1), Op::Map { file: FileId(1), index: 0, slab: 2, count: 2 }]).unwrap();
    store.commit(2, &[Op::Rename { file: FileId(1), name: "vms/web".into() }]).unwrap();
    store
        .commit(3, &[Op::Resize { file: FileId(1), bytes: 1 << 20 }, create(2), Op::Remove { file: FileId(2) }])
        .unwrap();
    store.commit(4, &[Op::Unmap { file: FileId(1), index: 0, count: 1 }]).unwrap();
    store.take_over(5).unwrap();
    let mut text = String::new();
    for (page, bytes) in memory.stable.borrow().chunks(PAGE_BYTES).enumerate() {
        for (line, sixteen) in bytes.chunks(16).enumerate().filter(|(_, sixteen)| sixteen.iter().any(|byte| *byte != 0))
        {
            let hex: Vec<_> = sixteen.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(text, "{:08x}  {}", page * PAGE_BYTES + line * 16, hex.join(" ")).unwrap();
        }
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/lun-v1.txt");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&golden, &text).unwrap();
    }
    assert_eq!(std::fs::read_to_string(golden).unwrap(), text);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    /// Changes, with the power failing at any write or flush: what was acknowledged
    /// is there, what was not is there as a whole or not at all, and the volume goes on.
    #[test]
    fn a_crash_leaves_all_of_a_change_or_nothing(
        rounds in proptest::collection::vec((proptest::collection::vec(any_op(), 1..4), 0_u64..6, any::<u64>()), 1..30),
        takes_over: bool,
    ) {
        let (memory, mut store) = formatted();
        for (number, (ops, left, mut kept)) in rounds.into_iter().enumerate() {
            let revision = number as u64 + 1;
            let before = (store.contents().clone(), store.revision());
            let mut after = before.0.clone();
            let applies = ops.iter().all(|op| after.apply(op).is_ok());
            memory.left.set(left);
            if takes_over && kept % 5 == 0 {
                let _ = store.take_over(store.epoch() + 1);
            }
            let outcome = store.commit(revision, &ops);
            memory.crash(|| { kept = kept.rotate_left(1); kept & 1 == 1 });
            let again = Store::open(memory.clone()).unwrap();
            match outcome {
                Ok(()) => prop_assert_eq!((again.contents(), again.revision()), (&after, revision)),
                Err(StoreError::Wrong(_)) => prop_assert_eq!((again.contents(), again.revision()), (&before.0, before.1)),
                Err(_) => {
                    let made = applies && again.revision() == revision;
                    let expected = if made { &after } else { &before.0 };
                    prop_assert_eq!(again.contents(), expected);
                }
            }
            store = again;
        }
    }
}
