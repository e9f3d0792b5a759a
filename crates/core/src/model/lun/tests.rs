use proptest::prelude::*;

use super::*;

const N1: NodeId = NodeId(1);
const T1: NodeTerm = NodeTerm(1);
const WEB: VmId = VmId(uuid::Uuid::from_u128(1));
const DB: VmId = VmId(uuid::Uuid::from_u128(2));

/// Every slab has one place, and runs are as long as they can be.
fn account(lun: &Lun) {
    let files = lun.files.values().flat_map(|file| &file.parts);
    let taken = lun.taken.values().flat_map(Taken::slabs);
    let freed = lun.freed.iter().flat_map(|freed| &freed.slabs);
    let runs = taken.chain(lun.free.iter().chain(freed).copied());
    let mut all: Vec<u32> = files
        .map(|run| Slabs { first: run.slab, count: run.count })
        .chain(runs)
        .flat_map(|run| run.first..run.end())
        .collect();
    all.sort_unstable();
    assert_eq!(all, (0..lun.slabs).collect::<Vec<_>>());
    for runs in lun.taken.values().flat_map(|taken| taken.takings.values()).chain([&lun.free]) {
        assert!(runs.windows(2).all(|pair| pair[0].end() < pair[1].first), "{runs:?}");
    }
    for file in lun.files.values() {
        let apart = |pair: &[Mapped]| {
            let end = pair[0].part + pair[0].count;
            end < pair[1].part || end == pair[1].part && pair[0].slab + pair[0].count != pair[1].slab
        };
        assert!(file.parts.windows(2).all(apart), "{:?}", file.parts);
        assert!(file.parts.iter().all(|run| run.part + run.count <= lun.parts(file.bytes)));
    }
}

fn lun() -> Lun {
    let mut lun = Lun::new(16 << 20, 20);
    lun.make_file("web", WEB, 8 * (16 << 20));
    lun.make_file("db", DB, 8 * (16 << 20) - 512);
    lun.journal.epoch = 1;
    lun
}

fn taking(number: u64, slabs: &[(u32, u32)]) -> Taking {
    Taking { number, slabs: slabs.iter().copied().map(Slabs::from).collect() }
}

#[test]
fn what_is_asked_twice_is_done_once_and_answered_alike() {
    let mut lun = lun();
    assert_eq!(lun.take(N1, T1, &[], 4), taking(1, &[(0, 4)]));
    let wanted = [Mapped { part: 2, slab: 1, count: 2 }];
    assert_eq!(lun.map("web", N1, T1, &wanted, &[1]), wanted);
    let once = lun.clone();
    assert_eq!(lun.map("web", N1, T1, &wanted, &[1]), wanted);
    assert_eq!(
        lun.map("web", N1, T1, &[Mapped { part: 3, slab: 0, count: 1 }], &[1]),
        [Mapped { part: 3, slab: 2, count: 1 }]
    );
    assert_eq!(lun, once);
}

#[test]
fn only_what_a_node_took_in_its_term_gets_into_files() {
    let mut lun = lun();
    lun.take(N1, T1, &[], 4);
    let untouched = lun.clone();
    let wanted = [Mapped { part: 0, slab: 1, count: 1 }];
    for (node, term, slab) in [(NodeId(2), T1, 1), (N1, NodeTerm(2), 1), (N1, T1, 4)] {
        assert_eq!(lun.map("web", node, term, &[Mapped { slab, ..wanted[0] }], &[1]), []);
    }
    assert_eq!(lun.map("gone", N1, T1, &wanted, &[1]), []);
    assert_eq!(lun.map("web", N1, T1, &[Mapped { part: 8, slab: 1, count: u32::MAX }], &[1]), []);
    assert_eq!(lun, untouched);
    assert_eq!(lun.take(N1, NodeTerm(2), &[], 1), taking(2, &[(0, 1)]), "a new term takes anew");
    account(&lun);
}

#[test]
fn what_was_taken_and_forgotten_comes_first() {
    let mut lun = lun();
    lun.take(N1, T1, &[], 4);
    assert_eq!(lun.take(N1, T1, &[(1, 2).into()], 9), taking(2, &[(0, 1), (3, 1)]));
    assert_eq!(lun.take(N1, T1, &[(0, 4).into()], 2), taking(3, &[(4, 2)]));
    assert_eq!((lun.free_slabs(), lun.taken_slabs()), (14, 6));
    account(&lun);
}

#[test]
fn a_mapping_from_before_the_last_taking_of_its_slab_comes_too_late() {
    let mut lun = lun();
    lun.take(N1, T1, &[], 2);
    // Its answer was lost; the node takes again, and zeroes again, what it forgot.
    let late = [Mapped { part: 0, slab: 1, count: 1 }];
    assert_eq!(lun.take(N1, T1, &[(0, 1).into()], 2), taking(2, &[(1, 1)]));
    assert_eq!(lun.map("web", N1, T1, &late, &[1]), []);
    assert_eq!(lun.map("web", N1, T1, &[(1, 0, 2).into()], &[1]), [(1, 0, 1).into()], "the other slab is as it was");
    assert_eq!(lun.map("web", N1, T1, &late, &[2]), late);
    account(&lun);
}

#[test]
fn what_was_stored_before_takings_had_numbers_is_read() {
    let mut lun = lun();
    lun.take(N1, T1, &[], 4);
    let mut stored = serde_json::to_value(&lun).unwrap();
    stored["taken"]["1"] = serde_json::json!({"term": 1, "slabs": [[0, 4]]});
    stored.as_object_mut().unwrap().remove("takings");
    let mut lun: Lun = serde_json::from_value(stored).unwrap();
    account(&lun);
    let wanted = [Mapped { part: 0, slab: 1, count: 1 }];
    assert_eq!(lun.map("web", N1, T1, &wanted, &[]), wanted);
    assert_eq!(lun.take(N1, T1, &[], 4), taking(1, &[(0, 1), (2, 2)]));
}

#[test]
fn a_full_volume_gives_what_it_has() {
    let mut lun = lun();
    assert_eq!(lun.take(N1, T1, &[], 99), taking(1, &[(0, 20)]));
    assert_eq!(lun.take(NodeId(2), T1, &[], 1), Taking::default());
    assert_eq!((lun.free_slabs(), lun.used_slabs()), (0, 0));
    account(&lun);
}

#[test]
fn how_full_it_is_is_said_once() {
    let mut lun = Lun::new(16 << 20, 100);
    lun.make_file("web", WEB, 100 * (16 << 20));
    let mut said = Vec::new();
    let mut tell = |lun: &mut Lun| {
        let now = lun.fullness();
        if now != std::mem::replace(&mut lun.told, now) {
            said.push((lun.used_slabs(), now));
        }
    };
    for part in 0..100 {
        let taking = lun.take(N1, T1, &[], 1);
        let slab = taking.slabs[0].first;
        lun.map("web", N1, T1, &[(part, slab, 1).into()], &[taking.number]);
        tell(&mut lun);
    }
    let mut discard = |lun: &mut Lun, part: u32| {
        lun.unmap("web", lun.files["web"].unmaps, &[(part, 1)]);
        tell(lun);
    };
    for part in 0..30 {
        discard(&mut lun, part);
    }
    assert_eq!(lun.used_slabs(), lun.files["web"].slabs());
    let (fills, nearly) = (Fullness::Fills, Fullness::NearlyFull);
    let up = [(80, fills), (90, nearly), (100, Fullness::Full)];
    assert_eq!(said, [up.as_slice(), &[(98, nearly), (84, fills), (74, Fullness::Low)]].concat());
}

#[derive(Clone, Debug)]
enum Step {
    Take(u64, u64, u32, u32),
    Map(bool, u64, u64, Mapped, Option<u64>),
    GiveBack(u64),
    Drop(bool),
    /// By the number that the file has, or by none that it has.
    Unmap(bool, bool, u32, u32),
    /// The journal is written, and that is heard of or not.
    Describe(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let (node, term) = (1..4u64, 1..3u64);
    let run = (0..9u32, 0..21u32, 1..5u32).prop_map(|(part, slab, count)| Mapped { part, slab, count });
    prop_oneof![
        (node.clone(), term.clone(), 0..21u32, 0..6u32)
            .prop_map(|(node, term, known, most)| Step::Take(node, term, known, most)),
        (any::<bool>(), node.clone(), term, run, proptest::option::of(0..20u64))
            .prop_map(|(web, node, term, run, taking)| Step::Map(web, node, term, run, taking)),
        node.prop_map(Step::GiveBack),
        any::<bool>().prop_map(Step::Drop),
        (any::<bool>(), any::<bool>(), 0..9u32, 1..5u32)
            .prop_map(|(web, known, part, count)| Step::Unmap(web, known, part, count)),
        any::<bool>().prop_map(Step::Describe),
    ]
}

/// Every slab that a journal names is that part's still, or waits.
fn undisputed(lun: &Lun, journal: &BTreeMap<String, LunFile>) {
    let waits = |slab: u32| lun.freed.iter().flat_map(|freed| &freed.slabs).any(|run| run.has(slab));
    for (name, file) in journal {
        for (part, slab) in file.parts.iter().copied().flat_map(Mapped::one_by_one) {
            let still = lun.files.get(name).is_some_and(|now| now.vm == file.vm && now.slab(part) == Some(slab));
            assert!(still || waits(slab), "{name}: part {part} in slab {slab} is disputed");
        }
    }
}

proptest! {
    #[test]
    fn no_slab_has_two_places_whatever_is_asked(steps in proptest::collection::vec(step(), 0..80)) {
        let mut lun = lun();
        let mut journal = BTreeMap::new();
        for (number, step) in steps.into_iter().enumerate() {
            let before = (lun.files.clone(), lun.revision);
            match step {
                Step::Take(node, term, known, most) => {
                    drop(lun.take(NodeId(node), NodeTerm(term), &[Slabs { first: 0, count: known }], most));
                }
                Step::Map(web, node, term, run, taking) => {
                    let name = if web { "web" } else { "db" };
                    for found in lun.map(name, NodeId(node), NodeTerm(term), &[run], taking.as_slice()) {
                        prop_assert_eq!(lun.files[name].slab(found.part), Some(found.slab));
                    }
                }
                Step::GiveBack(node) => lun.give_back(NodeId(node)),
                Step::Drop(web) => {
                    let name = if web { "web" } else { "db" };
                    let bytes = lun.files[name].bytes;
                    lun.drop_files(lun.files[name].vm.unwrap());
                    prop_assert!(!lun.files.contains_key(name));
                    let again = VmId(uuid::Uuid::from_u128(100 + number as u128));
                    lun.make_file(name, again, bytes);
                }
                Step::Unmap(web, known, part, count) => {
                    let name = if web { "web" } else { "db" };
                    let (file, number) = (lun.files[name].clone(), lun.files[name].unmaps + u64::from(!known));
                    let unmapped = lun.unmap(name, number, &[(part, count)]);
                    let slabs = |file: &LunFile| (part..part + count).filter_map(|part| file.slab(part)).count();
                    prop_assert_eq!(slabs(&lun.files[name]), if known { 0 } else { slabs(&file) });
                    prop_assert_eq!(unmapped.left, slabs(&lun.files[name]) > 0);
                    prop_assert_eq!(lun.files[name].slabs() as usize + slabs(&file), file.slabs() as usize + slabs(&lun.files[name]));
                }
                Step::Describe(heard) => {
                    journal = lun.files.clone();
                    if heard {
                        lun.described(lun.revision);
                    }
                }
            }
            let parts = |files: &BTreeMap<String, LunFile>| {
                files.iter().map(|(name, file)| (name.clone(), file.parts.clone())).collect::<Vec<_>>()
            };
            prop_assert!(
                before.1 < lun.revision || parts(&before.0) == parts(&lun.files),
                "a change has a revision"
            );
            undisputed(&lun, &journal);
            account(&lun);
            let stored = serde_json::to_string(&lun).unwrap();
            prop_assert_eq!(serde_json::from_str::<Lun>(&stored).unwrap(), lun.clone());
        }
    }
}
