//! Files on LUNs that nodes have in their hands without a VM.

mod common;

use common::*;
use holdfast_core::*;
use uuid::Uuid;

const SLAB: u64 = 16 << 20;
const MINE: HoldId = HoldId(Uuid::from_u128(50));
const OTHER: HoldId = HoldId(Uuid::from_u128(51));

fn lab() -> Lab {
    let mut lab = Lab::new(2);
    let kind = VolumeKind::Lun { device: "/dev/sdb".into(), slab_bytes: SLAB, slabs: 100 };
    lab.ask(Command::AddVolume { name: "san".into(), id: Uuid::from_u128(9), kind });
    lab
}

fn hold(lab: &mut Lab, id: HoldId, node: u64, what: Holding) -> Reply {
    let term = lab.state.nodes[&NodeId(node)].term;
    lab.ask(Command::HoldFile { id, volume: "san".into(), node: NodeId(node), term, what })
}

fn file(name: &str, kind: HoldKind) -> Holding {
    Holding::File { name: name.into(), kind }
}

fn end(lab: &mut Lab, id: HoldId, name: Option<(&str, bool)>) -> Reply {
    let naming = name.map(|(name, replaces)| Naming { name: name.into(), replaces });
    lab.ask(Command::EndHold { id, naming })
}

/// Puts a file of two slabs, one of which is there.
fn put(lab: &mut Lab, id: HoldId, name: &str, replaces: bool) -> Reply {
    assert_eq!(hold(lab, id, 1, Holding::New { bytes: 2 * SLAB }), Reply::Done);
    write(lab, id, 1);
    end(lab, id, Some((name, replaces)))
}

fn write(lab: &mut Lab, id: HoldId, node: u64) -> Reply {
    let node = NodeId(node);
    let term = lab.state.nodes[&node].term;
    let taken = lab.ask(Command::TakeSlabs { volume: "san".into(), node, term, known: Vec::new(), most: 1 });
    let Reply::Slabs(taking) = taken else { panic!("{taken:?}") };
    let wanted = vec![Mapped { part: 0, slab: taking.slabs[0].first, count: 1 }];
    let tenure = Tenure { node, term, epoch: Epoch(1) };
    lab.ask(Command::MapSlabs { vm: id.as_vm(), disk: 0, tenure, wanted, takings: vec![taking.number] })
}

fn names(lab: &Lab) -> Vec<&str> {
    lab.state.luns["san"].named_files().map(|(name, _)| name.as_str()).collect()
}

fn conflict(reply: &Reply) -> bool {
    matches!(reply, Reply::Refused(Refusal::Conflict(_)))
}

#[test]
fn a_file_has_its_name_when_it_is_whole_and_replaces_another_only_if_asked() {
    let mut lab = lab();
    hold(&mut lab, MINE, 1, Holding::New { bytes: 2 * SLAB });
    assert!(matches!(write(&mut lab, MINE, 1), Reply::Mapped(found) if found.len() == 1));
    assert_eq!(names(&lab), [""; 0]);
    assert_eq!(end(&mut lab, MINE, Some(("iso/a", false))), Reply::Done);
    assert_eq!(names(&lab), ["iso/a"]);
    assert!(matches!(end(&mut lab, MINE, None), Reply::Refused(Refusal::Unknown { .. })), "it is over");
    assert!(matches!(put(&mut lab, OTHER, "iso/a", false), Reply::Refused(Refusal::Duplicate { .. })));
    assert!(conflict(&end(&mut lab, OTHER, Some(("iso", true)))), "iso is a directory");
    assert!(matches!(end(&mut lab, OTHER, Some(("../a", true))), Reply::Refused(Refusal::Invalid(_))));
    let used = lab.state.luns["san"].used_slabs();
    assert_eq!(end(&mut lab, OTHER, Some(("iso/a", true))), Reply::Done);
    assert_eq!((names(&lab), lab.state.luns["san"].used_slabs()), (vec!["iso/a"], used - 1));
    assert!(lab.state.luns["san"].holds.is_empty());
}

#[test]
fn a_file_has_one_writer_or_readers_and_stays_while_somebody_has_it_open() {
    let mut lab = lab();
    put(&mut lab, MINE, "a", false);
    let remove = || Command::RemoveFile { volume: "san".into(), name: "a".into() };
    assert_eq!(hold(&mut lab, MINE, 1, file("a", HoldKind::Reads)), Reply::Done);
    assert_eq!(hold(&mut lab, OTHER, 2, file("a", HoldKind::Reads)), Reply::Done);
    assert!(conflict(&write(&mut lab, MINE, 1)), "it only reads");
    let third = HoldId(Uuid::from_u128(52));
    assert!(conflict(&hold(&mut lab, third, 2, file("a", HoldKind::Writes))));
    end(&mut lab, OTHER, None);
    assert!(conflict(&lab.ask(remove())));
    let rename = Command::RenameVolume { name: "san".into(), new: "tank".into() };
    assert!(conflict(&lab.ask(rename)) && conflict(&lab.ask(Command::RemoveVolume { name: "san".into() })));
    assert!(conflict(&lab.ask(Command::RemoveNode { node: NodeId(1) })));
    end(&mut lab, MINE, None);
    assert_eq!(hold(&mut lab, third, 2, file("a", HoldKind::Writes)), Reply::Done);
    assert!(conflict(&hold(&mut lab, MINE, 1, file("a", HoldKind::Reads))));
    end(&mut lab, third, None);
    assert_eq!(lab.ask(Command::RemoveNode { node: NodeId(2) }), Reply::Done);
    assert!(conflict(&hold(&mut lab, third, 2, file("a", HoldKind::Reads))), "it is being removed");
    assert_eq!(lab.ask(remove()), Reply::Done);
    assert_eq!(lab.state.luns["san"].used_slabs(), 0);
}

#[test]
fn what_a_lost_node_was_making_is_gone_and_what_it_had_open_is_free() {
    let mut lab = lab();
    put(&mut lab, OTHER, "a", false);
    hold(&mut lab, MINE, 2, Holding::New { bytes: SLAB });
    write(&mut lab, MINE, 2);
    hold(&mut lab, OTHER, 2, file("a", HoldKind::Writes));
    assert_eq!(lab.state.luns["san"].used_slabs(), 2);
    lab.lose(2);
    lab.plan();
    let lun = &lab.state.luns["san"];
    assert_eq!((lun.holds.len(), lun.files.len(), lun.used_slabs()), (0, 1, 1));
    let term = NodeTerm(1);
    let late =
        Command::HoldFile { id: MINE, volume: "san".into(), node: NodeId(2), term, what: Holding::New { bytes: SLAB } };
    assert!(conflict(&lab.ask(late)));
}

#[test]
fn a_vm_s_disk_is_nobody_else_s_but_of_the_node_that_makes_it() {
    let mut lab = lab();
    let disk = DiskSpec { volume: "san".into(), format: DiskFormat::Raw, ..spec(512, Priority::High).disks.remove(0) };
    let spec = VmSpec { disks: vec![disk.clone()], ..spec(512, Priority::High) };
    let sources = Sources { images: vec![Some("san:a".into())], start: false };
    let create = Command::CreateVm { id: WEB, name: "web".into(), spec, node: NodeId(1), sources };
    assert!(matches!(lab.ask(create), Reply::Job(_)));
    assert!(conflict(&hold(&mut lab, OTHER, 2, file(&disk.file, HoldKind::Writes))));
    assert_eq!(hold(&mut lab, MINE, 1, file(&disk.file, HoldKind::Writes)), Reply::Done);
    write(&mut lab, MINE, 1);

    // It is not made after all, while the node still writes to it.
    let failed = Action::DisksFailed { vm: WEB, why: "the image is damaged".into() };
    let cause = Cause::Requested { by: "anna".into() };
    let decisions = vec![Decision { action: failed, cause }];
    lab.ask(Command::Decide { revision: lab.state.revision, decisions });
    assert_eq!((names(&lab).len(), lab.state.luns["san"].used_slabs()), (0, 1));
    end(&mut lab, MINE, None);
    assert_eq!((lab.state.luns["san"].files.len(), lab.state.luns["san"].used_slabs()), (0, 0));
}
