//! The description of files on LUNs: one writer at a time, nothing used again before it
//! says so, and what it says when it is read by another cluster.

mod common;

use std::collections::BTreeMap;

use common::*;
use holdfast_core::*;
use uuid::Uuid;

const SLAB: u64 = 16 << 20;

fn san() -> VolumeKind {
    VolumeKind::Lun { device: "/dev/sdb".into(), slab_bytes: SLAB, slabs: 100 }
}

fn lab() -> Lab {
    let mut lab = Lab::new(2);
    lab.ask(Command::AddVolume { name: "san".into(), id: Uuid::from_u128(9), kind: san() });
    lab
}

fn writer(lab: &Lab, node: u64) -> Writer {
    Writer { node: NodeId(node), term: lab.state.nodes[&NodeId(node)].term }
}

fn claim(writer: Writer) -> Command {
    Command::ClaimJournal { volume: "san".into(), writer }
}

fn written(writer: Writer, outcome: Result<u64, &str>, ends: bool) -> Command {
    let outcome = outcome.map_err(str::to_owned);
    Command::JournalWritten { volume: "san".into(), writer, outcome, repaired: false, ends }
}

fn refused(reply: &Reply) -> bool {
    matches!(reply, Reply::Refused(Refusal::Conflict(_)))
}

#[test]
fn a_removed_node_keeps_what_it_may_still_write_to_until_its_lease_has_ended() {
    let mut lab = lab();
    let (first, second) = (writer(&lab, 1), writer(&lab, 2));
    let take = |of: Writer| {
        let (node, term) = (of.node, of.term);
        Command::TakeSlabs { volume: "san".into(), node, term, known: Vec::new(), most: 100 }
    };
    let slabs = |reply: Reply| match reply {
        Reply::Slabs(taking) => taking.slabs,
        other => panic!("{other:?}"),
    };
    let zeroes = slabs(lab.ask(take(first)));
    assert_eq!(lab.ask(claim(first)), Reply::Done);
    assert_eq!(lab.ask(Command::RemoveNode { node: NodeId(1) }), Reply::Done);
    assert_eq!(lab.ask(Command::RemoveNode { node: NodeId(1) }), Reply::Done, "asked again");
    assert!(matches!(lab.ask(Command::RemoveNode { node: NodeId(2) }), Reply::Refused(_)), "the last one that stays");

    // A new keeper is not admitted there, and no VM comes.
    lab.hear(1, 900);
    assert_eq!(lab.plan(), []);
    lab.create(WEB, "web", spec(512, Priority::High));
    lab.plan();
    assert_eq!(lab.on(WEB), Some(2));
    assert!(refused(&lab.ask(claim(second))), "the first may still write");
    let theirs = slabs(lab.ask(take(second)));
    assert!(theirs.iter().all(|run| zeroes.iter().all(|mine| mine.end() <= run.first)), "{theirs:?}");

    lab.lose(1);
    let gone = [Action::DeclareLost { node: NodeId(1) }, Action::Forget { node: NodeId(1) }];
    assert_eq!(lab.plan(), gone);
    assert_eq!(lab.ask(claim(second)), Reply::Done);
    let (node, term) = (second.node, second.term);
    let more = Command::TakeSlabs { volume: "san".into(), node, term, known: theirs, most: 100 };
    let given = slabs(lab.ask(more));
    assert!(given.iter().any(|run| run.first == zeroes[0].first), "{given:?}");
}

/// A VM with a disk on the volume, of which two parts are there.
fn with_disk(lab: &mut Lab) -> String {
    let disk = DiskSpec { volume: "san".into(), format: DiskFormat::Raw, ..spec(512, Priority::High).disks.remove(0) };
    lab.create(WEB, "web", VmSpec { disks: vec![disk], ..spec(512, Priority::High) });
    lab.plan();
    let tenure = *lab.state.vms[&WEB].tenures().next().expect("a right");
    let (node, term) = (tenure.node, tenure.term);
    lab.ask(Command::TakeSlabs { volume: "san".into(), node, term, known: Vec::new(), most: 2 });
    lab.ask(Command::MapSlabs { vm: WEB, disk: 0, tenure, wanted: vec![(0, 0, 2).into()], takings: Vec::new() });
    lab.state.vms[&WEB].spec.disks[0].file.clone()
}

#[test]
fn a_journal_has_one_writer_and_the_next_only_when_that_one_is_over() {
    let mut lab = lab();
    let (first, second) = (writer(&lab, 1), writer(&lab, 2));
    assert!(refused(&lab.ask(claim(second))), "the first node is to");
    let revision = lab.state.revision;
    assert_eq!(lab.ask(claim(first)), Reply::Done);
    assert_eq!(lab.ask(claim(first)), Reply::Done);
    assert_eq!(lab.state.revision, revision, "no decision stands on it");
    let journal = |lab: &Lab| lab.state.luns["san"].journal.clone();
    assert_eq!((journal(&lab).epoch, journal(&lab).writer), (1, Some(first)));

    lab.lose(1);
    lab.plan();
    assert_eq!(lab.ask(claim(second)), Reply::Done, "its term is over");
    assert_eq!((journal(&lab).epoch, journal(&lab).writer), (2, Some(second)));
    assert!(refused(&lab.ask(written(first, Ok(1), false))));

    lab.hear(1, 2);
    lab.plan();
    let first = writer(&lab, 1);
    assert!(refused(&lab.ask(claim(first))), "the second still writes");
    lab.ask(written(second, Ok(0), true));
    assert_eq!(lab.ask(claim(first)), Reply::Done);
    assert_eq!(journal(&lab).epoch, 3);
}

#[test]
fn what_a_deleted_disk_had_is_free_when_the_journal_says_so() {
    let mut lab = lab();
    let file = with_disk(&mut lab);
    let writer = writer(&lab, 1);
    lab.ask(claim(writer));
    let described = lab.state.luns["san"].revision;
    lab.ask(written(writer, Ok(described), false));
    let mut lun = lab.state.luns["san"].clone();
    assert_eq!((lun.files[&file].slabs(), lun.freed_slabs()), (2, 0));
    lun.drop_files(WEB);
    lab.state.luns.insert("san".into(), lun.clone());
    assert_eq!((lun.used_slabs(), lun.freed_slabs(), lun.free_slabs()), (0, 2, 98));
    lab.ask(written(writer, Ok(described), false));
    assert_eq!(lab.state.luns["san"], lun, "what it says is older");
    lab.ask(written(writer, Ok(lun.revision), false));
    let lun = &lab.state.luns["san"];
    assert_eq!((lun.freed_slabs(), lun.free_slabs(), lun.journal.written), (0, 100, lun.revision));
}

#[test]
fn trouble_is_said_once_and_its_end_too() {
    let mut lab = lab();
    let writer = writer(&lab, 1);
    lab.ask(claim(writer));
    for outcome in [Err("no device"), Err("no device"), Ok(0), Ok(0)] {
        lab.ask(written(writer, outcome, false));
    }
    let told: Vec<_> = lab.state.events.iter().filter(|event| event.subject == "volume san").collect();
    assert_eq!(told.len(), 3, "added, trouble, its end: {told:?}");
    assert!(told[1].severity == Severity::Warning && told[1].text.contains("no device"));
    assert!(lab.state.luns["san"].journal.trouble.is_none());
}

#[test]
fn a_repair_is_wanted_until_it_is_done() {
    let mut lab = lab();
    let writer = writer(&lab, 1);
    lab.ask(claim(writer));
    assert_eq!(lab.ask(Command::RepairVolume { name: "san".into() }), Reply::Done);
    lab.ask(written(writer, Ok(0), false));
    assert!(lab.state.luns["san"].journal.repair);
    let volume = "san".into();
    lab.ask(Command::JournalWritten { volume, writer, outcome: Ok(0), repaired: true, ends: false });
    assert!(!lab.state.luns["san"].journal.repair);
    assert!(matches!(lab.ask(Command::RepairVolume { name: "san2".into() }), Reply::Refused(_)));
}

#[test]
fn an_imported_volume_is_used_when_all_of_it_is_known() {
    let mut lab = Lab::new(1);
    let import =
        |name: &str| Command::ImportVolume { name: name.into(), id: Uuid::from_u128(9), kind: san(), journal: (7, 40) };
    assert_eq!(lab.ask(import("san")), Reply::Done);
    assert!(refused(&lab.ask(import("again"))));
    let Writer { node, term } = writer(&lab, 1);
    let take = Command::TakeSlabs { volume: "san".into(), node, term, known: Vec::new(), most: 2 };
    assert!(refused(&lab.ask(take.clone())));
    assert!(refused(&lab.ask(claim(writer(&lab, 1)))));
    let files = |files: &[(&str, Mapped)], last: bool| Command::ImportFiles {
        volume: "san".into(),
        files: files.iter().map(|(name, run)| ((*name).to_owned(), (4 * SLAB, vec![*run]))).collect::<BTreeMap<_, _>>(),
        last,
    };
    assert_eq!(lab.ask(files(&[("vms/a/disk0.raw", (0, 0, 2).into())], false)), Reply::Done);
    let both = files(&[("vms/a/disk0.raw", (2, 3, 1).into()), ("b", (0, 1, 1).into())], true);
    assert!(matches!(lab.ask(both), Reply::Refused(Refusal::Invalid(_))), "a slab has one place");
    assert_eq!(lab.ask(files(&[("vms/a/disk0.raw", (2, 3, 1).into())], true)), Reply::Done);
    assert!(refused(&lab.ask(files(&[], true))));
    let Reply::Slabs(taking) = lab.ask(take) else { panic!("slabs") };
    assert_eq!(taking.slabs, [(2, 1).into(), (4, 1).into()]);
    lab.ask(claim(writer(&lab, 1)));
    let lun = &lab.state.luns["san"];
    assert_eq!((lun.journal.epoch, lun.used_slabs()), (8, 3));
    assert!(lun.revision > 40);

    // A VM takes one of the disks, as it is.
    let disk = |bytes: u64| DiskSpec {
        volume: "san".into(),
        file: "vms/a/disk0.raw".into(),
        size_bytes: bytes,
        format: DiskFormat::Raw,
        allocation: Allocation::Thin,
    };
    let create = |lab: &mut Lab, number: u128, bytes: u64| {
        let spec = VmSpec { disks: vec![disk(bytes)], ..spec(512, Priority::High) };
        let (id, name) = (vm_id(number), format!("vm{number}"));
        lab.ask(Command::CreateVm { id, name, spec, node: NodeId(1), sources: Sources::default() })
    };
    assert!(matches!(create(&mut lab, 50, SLAB), Reply::Refused(Refusal::Invalid(_))), "it has another size");
    assert!(matches!(create(&mut lab, 50, 4 * SLAB), Reply::Job(_)));
    assert!(matches!(create(&mut lab, 51, 4 * SLAB), Reply::Refused(Refusal::Duplicate { .. })));
    let file = |lab: &Lab| lab.state.luns["san"].files["vms/a/disk0.raw"].clone();
    assert_eq!((file(&lab).vm, file(&lab).slabs()), (Some(vm_id(50)), 3));

    // A VM that could not be made leaves it as it was.
    let job = lab.state.running_jobs().next().expect("its making").id;
    assert_eq!(lab.ask(Command::CancelJob { job }), Reply::Done);
    assert_eq!((file(&lab).vm, file(&lab).slabs()), (None, 3));
}
