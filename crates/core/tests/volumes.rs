//! Owners of volumes on LUNs, paths to them, and VMs that leave bad ones.

mod common;

use std::collections::BTreeMap;

use common::*;
use holdfast_core::*;
use proptest::prelude::*;
use uuid::Uuid;

const SAN: Uuid = Uuid::from_u128(9);

fn lun(lab: &mut Lab, name: &str, id: Uuid) {
    let kind = VolumeKind::Lun { device: format!("/dev/{name}"), slab_bytes: 16 << 20, slabs: 100 };
    assert_eq!(lab.ask(Command::AddVolume { name: name.into(), id, kind }), Reply::Done);
}

fn report(lab: &mut Lab, node: u64) -> &mut NodeReport {
    let known = lab.state.nodes[&NodeId(node)].clone();
    let report = lab.observed.nodes.entry(known.id).or_default().report.get_or_insert_default();
    if (report.incarnation, report.term) != (known.incarnation, known.term) {
        *report = NodeReport { incarnation: known.incarnation, term: known.term, ..NodeReport::default() };
    }
    report
}

fn reaches(lab: &mut Lab, node: u64, id: Uuid, path: LunPath) {
    report(lab, node).paths.insert(id, path);
}

fn away() -> LunPath {
    LunPath::Unavailable { why: "no such device".into() }
}

fn through(node: u64) -> LunPath {
    LunPath::Redirected { why: "input/output error".into(), through: NodeId(node) }
}

/// The owner's node says that it has left, if it was told to.
fn leaves(lab: &mut Lab, volume: &str) {
    let Some(owner) = lab.state.owner(volume).copied().filter(|owner| owner.leaving) else { return };
    let id = lab.state.volumes[volume].id;
    report(lab, owner.node.0).left.insert(id, owner.epoch);
}

fn owner(lab: &Lab, volume: &str) -> Option<(u64, u64)> {
    lab.state.owner(volume).map(|owner| (owner.node.0, owner.epoch.0))
}

/// Three nodes that all reach `san`, owned by the first.
fn san() -> Lab {
    let mut lab = Lab::new(3);
    lun(&mut lab, "san", SAN);
    assert_eq!(lab.plan(), [], "nobody has said that it reaches it");
    for node in 1..=3 {
        reaches(&mut lab, node, SAN, LunPath::Direct);
    }
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((1, 1)));
    assert_eq!(lab.plan(), []);
    lab
}

fn last_event(lab: &Lab) -> (Severity, String) {
    let event = lab.state.events.back().unwrap();
    (event.severity, format!("{}: {}", event.subject, event.text))
}

fn refused(reply: Reply) -> String {
    match reply {
        Reply::Refused(refusal) => refusal.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn owners_are_spread() {
    let mut lab = san();
    for (number, name) in ["b", "c", "d"].into_iter().enumerate() {
        let id = Uuid::from_u128(20 + number as u128);
        lun(&mut lab, name, id);
        for node in 1..=3 {
            reaches(&mut lab, node, id, LunPath::Direct);
        }
    }
    lab.plan();
    let owners = ["san", "b", "c", "d"].map(|name| owner(&lab, name).unwrap().0);
    assert_eq!(owners, [1, 2, 3, 1]);
}

#[test]
fn an_owner_is_succeeded_when_its_term_is_over_and_not_before() {
    let mut lab = san();
    lab.observed.nodes.get_mut(&NodeId(1)).unwrap().silent_ms = 1400;
    assert_eq!(lab.plan(), []);
    lab.lose(1);
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((2, 2)));
    // It comes back, and is not asked to take it again.
    lab.observed.nodes.insert(NodeId(1), NodeObserved::default());
    lab.hear(1, 900);
    lab.plan();
    reaches(&mut lab, 1, SAN, LunPath::Direct);
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((2, 2)));
    // A keeper that was started anew has no right of the one before.
    lab.hear(2, 901);
    lab.plan();
    assert_eq!(owner(&lab, "san").map(|(_, epoch)| epoch), Some(3));
}

#[test]
fn an_owner_is_not_removed_while_its_right_lasts() {
    let mut lab = san();
    let remove = || Command::RemoveNode { node: NodeId(1) };
    let why = refused(lab.ask(remove()));
    assert!(why.contains("owns volume \"san\"") && why.contains("set-owner san"), "{why}");
    lab.ask(Command::SetOwner { volume: "san".into(), node: NodeId(2) });
    assert!(matches!(lab.ask(remove()), Reply::Refused(_)), "it has not left yet");
    leaves(&mut lab, "san");
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((2, 2)));
    assert_eq!(lab.ask(remove()), Reply::Done);
    // One that is lost takes nothing along.
    lab.lose(2);
    lab.plan();
    assert_eq!(lab.ask(Command::RemoveNode { node: NodeId(2) }), Reply::Done);
}

#[test]
fn an_owner_without_a_path_leaves_first() {
    let mut lab = san();
    reaches(&mut lab, 1, SAN, away());
    let leave = Action::LeaveVolume { volume: "san".into() };
    assert_eq!(lab.plan().last(), Some(&leave));
    // What it does for others may be under way still.
    assert_eq!(lab.plan(), []);
    assert_eq!(owner(&lab, "san"), Some((1, 1)));
    leaves(&mut lab, "san");
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((2, 2)));
    assert!(last_event(&lab).1.starts_with("volume san: is owned by n2 (epoch 2)"), "{:?}", last_event(&lab));
    // Nor when it is lost before it said so.
    reaches(&mut lab, 2, SAN, away());
    lab.plan();
    lab.lose(2);
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((3, 3)));
}

#[test]
fn it_stays_where_it_is_while_nobody_has_a_path() {
    let mut lab = san();
    for node in [2, 3, 1] {
        reaches(&mut lab, node, SAN, away());
        lab.plan();
    }
    assert_eq!(owner(&lab, "san"), Some((1, 1)));
    assert_eq!(lab.plan(), []);
    lab.lose(1);
    lab.plan();
    assert_eq!((owner(&lab, "san"), lab.state.luns["san"].access.owner), (None, None));
    assert_eq!(last_event(&lab).0, Severity::Error);
    reaches(&mut lab, 3, SAN, LunPath::Direct);
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((3, 2)));
}

#[test]
fn a_path_that_comes_and_goes_drags_no_owner_along() {
    let mut lab = san();
    lab.now_ms += 60_000;
    reaches(&mut lab, 2, SAN, away());
    lab.plan();
    reaches(&mut lab, 2, SAN, LunPath::Direct);
    reaches(&mut lab, 1, SAN, away());
    lab.plan();
    leaves(&mut lab, "san");
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((3, 2)), "node 2 has been steady for too short");
    reaches(&mut lab, 1, SAN, LunPath::Direct);
    lab.plan();
    assert_eq!((owner(&lab, "san"), lab.plan()), (Some((3, 2)), vec![]));
}

#[test]
fn it_is_owned_by_whom_a_user_names() {
    let mut lab = san();
    assert!(refused(lab.ask(Command::SetOwner { volume: "vol1".into(), node: NodeId(2) })).contains("directory"));
    let set = |node| Command::SetOwner { volume: "san".into(), node: NodeId(node) };
    assert!(refused(lab.ask(set(1))).contains("already"));
    reaches(&mut lab, 2, SAN, away());
    lab.plan();
    assert!(refused(lab.ask(set(2))).contains("no such device"));
    assert_eq!(lab.ask(set(3)), Reply::Done);
    assert_eq!(lab.plan(), []);
    leaves(&mut lab, "san");
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((3, 2)));
    assert_eq!(lab.state.luns["san"].access.next, None);
    // Whoever was named loses its path before it is its turn.
    assert_eq!(lab.ask(set(1)), Reply::Done);
    reaches(&mut lab, 1, SAN, away());
    leaves(&mut lab, "san");
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((3, 3)));
}

#[test]
fn a_node_that_is_redirected_by_hand_owns_nothing() {
    let mut lab = san();
    let redirect = |node, redirect| Command::SetRedirect { volume: "san".into(), node: NodeId(node), redirect };
    assert_eq!(lab.ask(redirect(1, true)), Reply::Done);
    assert!(refused(lab.ask(redirect(1, true))).contains("already"));
    lab.plan();
    leaves(&mut lab, "san");
    lab.plan();
    assert_eq!(owner(&lab, "san"), Some((2, 2)));
    assert_eq!(lab.ask(redirect(3, true)), Reply::Done);
    let last = refused(lab.ask(redirect(2, true)));
    assert!(last.contains("no node but n2"), "{last}");
    assert_eq!(lab.ask(redirect(1, false)), Reply::Done);
    assert!(refused(lab.ask(redirect(1, false))).contains("was not redirected"));
    assert_eq!((owner(&lab, "san"), lab.plan()), (Some((2, 2)), vec![]));
}

#[test]
fn what_nodes_say_of_paths_is_told_once() {
    let mut lab = san();
    let began = lab.now_ms;
    reaches(&mut lab, 3, SAN, through(1));
    lab.plan();
    assert_eq!(
        last_event(&lab),
        (Severity::Warning, "volume san: n3 reaches it through n1: input/output error".into())
    );
    // Another word for it, and another owner: it still does not reach it by itself.
    lab.now_ms += 5_000;
    reaches(&mut lab, 3, SAN, LunPath::Redirected { why: "timed out".into(), through: NodeId(1) });
    assert_eq!(lab.plan(), []);
    reaches(&mut lab, 3, SAN, through(2));
    lab.plan();
    let reached = lab.state.reached("san", NodeId(3)).unwrap();
    assert_eq!((&reached.path, reached.since_ms), (&through(2), began));
    reaches(&mut lab, 3, SAN, LunPath::Direct);
    lab.plan();
    assert_eq!(last_event(&lab), (Severity::Info, "volume san: n3 reaches it by itself again".into()));
    assert_eq!(lab.plan(), []);
}

#[test]
fn the_judge_lets_no_owner_be_succeeded_too_early() {
    let mut lab = san();
    let home = web_on_san(&mut lab);
    let judged = |lab: &Lab, action: Action| {
        let decisions = vec![Decision { action, cause: Cause::NoPath }];
        check::check(&lab.state, &Plan { revision: lab.state.revision, decisions })
    };
    let own = |to: u64, after| Action::OwnVolume { volume: "san".into(), to: Some(NodeId(to)), after };
    let early = Err(check::Broken::Owner("san".into()));
    for after in [None, Some(Evidence::TermOver), Some(Evidence::Exited)] {
        assert_eq!(judged(&lab, own(2, after)), early);
    }
    lab.ask(Command::SetOwner { volume: "san".into(), node: NodeId(2) });
    assert_eq!(judged(&lab, own(2, Some(Evidence::TermOver))), early);
    assert_eq!(judged(&lab, own(2, Some(Evidence::Exited))), Ok(()));
    let away = |to: u64| Action::MoveAway { vm: WEB, to: NodeId(to) };
    let other = 1 + home % 3;
    assert_eq!(judged(&lab, away(other)), Ok(()));
    assert_eq!(judged(&lab, away(home)), Err(check::Broken::MoveAway(WEB)));
    lab.lose(other);
    lab.plan();
    assert_eq!(judged(&lab, away(other)), Err(check::Broken::MoveAway(WEB)));
    assert_eq!(judged(&lab, own(other, Some(Evidence::Exited))), early, "it is not up");
}

fn on_san(memory_mib: u64) -> VmSpec {
    let disk =
        DiskSpec { volume: "san".into(), format: DiskFormat::Raw, ..spec(512, Priority::Medium).disks.remove(0) };
    VmSpec { disks: vec![disk], ..spec(memory_mib, Priority::Medium) }
}

/// `web` has its disk on `san` and runs on the node that is returned.
fn web_on_san(lab: &mut Lab) -> u64 {
    lab.create(WEB, "web", on_san(512));
    lab.plan();
    let node = lab.on(WEB).expect("placed");
    lab.say(node, WEB, Run::Running);
    lab.plan();
    node
}

#[test]
fn a_vm_starts_where_its_disks_are_reached() {
    let mut lab = san();
    reaches(&mut lab, 1, SAN, through(2));
    reaches(&mut lab, 3, SAN, through(2));
    lab.plan();
    assert_eq!(web_on_san(&mut lab), 2);
}

#[test]
fn a_vm_waits_while_no_node_reaches_its_disks() {
    let mut lab = san();
    let home = web_on_san(&mut lab);
    for node in 1..=3 {
        reaches(&mut lab, node, SAN, away());
    }
    lab.plan();
    let standing = explain::standing(&lab.state, &lab.state.vms[&WEB]);
    assert!(standing.contains("volume san waits until a path to it is back: no such device"), "{standing}");
    assert_eq!(lab.on(WEB), Some(home));
    lab.lose(home);
    lab.plan();
    let Some(Hold::NoRoom { why }) = &lab.state.vms[&WEB].hold else { panic!("{:?}", lab.state.vms[&WEB].hold) };
    assert!(why.contains("does not reach volume san: no such device"), "{why}");
    let back = 1 + home % 3;
    reaches(&mut lab, back, SAN, LunPath::Direct);
    lab.plan();
    lab.plan();
    assert_eq!(lab.on(WEB), Some(back));
}

/// What was decided about moving `web`.
fn moves(actions: &[Action]) -> Vec<u64> {
    let to = |action: &Action| match action {
        Action::MoveAway { to, .. } => Some(to.0),
        _ => None,
    };
    actions.iter().filter_map(to).collect()
}

#[test]
fn a_vm_leaves_a_node_whose_path_stays_away() {
    let mut lab = san();
    let home = web_on_san(&mut lab);
    let other = if home == 2 { 3 } else { 2 };
    let last = 6 - home - other;
    // One that is redirected too is no better.
    for node in [home, other] {
        reaches(&mut lab, node, SAN, through(last));
    }
    lab.plan();
    lab.now_ms += 59_999;
    assert_eq!(moves(&lab.plan()), []);
    lab.now_ms += 1;
    assert_eq!(moves(&lab.plan()), [last]);
    // It came to nothing: not at once again.
    lab.say(home, WEB, Run::Kept { why: "no route".into() });
    assert_eq!(moves(&lab.plan()), []);
    assert_eq!(lab.on(WEB), Some(home));
    lab.now_ms += 59_999;
    assert_eq!(moves(&lab.plan()), []);
    lab.now_ms += 1;
    assert_eq!(moves(&lab.plan()), [last]);
}

#[test]
fn a_vm_stays_when_the_path_is_back_in_time_or_was_taken_by_hand() {
    let mut lab = san();
    let home = web_on_san(&mut lab);
    let other = 1 + home % 3;
    lab.ask(Command::SetOwner { volume: "san".into(), node: NodeId(other) });
    leaves(&mut lab, "san");
    lab.plan();
    lab.ask(Command::SetRedirect { volume: "san".into(), node: NodeId(home), redirect: true });
    reaches(&mut lab, home, SAN, through(other));
    lab.plan();
    lab.now_ms += 600_000;
    assert_eq!(lab.plan(), []);
    lab.ask(Command::SetRedirect { volume: "san".into(), node: NodeId(home), redirect: false });
    reaches(&mut lab, home, SAN, LunPath::Direct);
    lab.plan();
    reaches(&mut lab, home, SAN, through(other));
    lab.plan();
    lab.now_ms += 59_000;
    assert_eq!(lab.plan(), []);
}

#[test]
fn a_vm_that_fits_nowhere_else_stays_redirected() {
    let mut lab = san();
    lab.create(WEB, "web", on_san(1500));
    lab.plan();
    let home = lab.on(WEB).unwrap();
    lab.say(home, WEB, Run::Running);
    let others: Vec<u64> = (1..=3).filter(|node| *node != home).collect();
    for (number, _) in others.iter().enumerate() {
        let id = vm_id(100 + number as u128);
        lab.create(id, &format!("big{number}"), spec(1500, Priority::Medium));
    }
    reaches(&mut lab, home, SAN, through(others[0]));
    lab.plan();
    lab.now_ms += 61_000;
    assert_eq!(moves(&lab.plan()), []);
}

#[test]
fn a_volume_is_renamed_with_all_that_names_it_while_its_vms_are_off() {
    let mut lab = san();
    let home = web_on_san(&mut lab);
    let rename = |name: &str, new: &str| Command::RenameVolume { name: name.into(), new: new.into() };
    assert!(refused(lab.ask(rename("san", "fast"))).contains("shut it down first"));
    assert!(refused(lab.ask(rename("san", "vol1"))).contains("already"));
    assert!(refused(lab.ask(rename("san", "../x"))).contains("cannot be the name"));
    assert!(refused(lab.ask(rename("nas", "fast"))).contains("no volume"));
    lab.ask(Command::SetDesired { vm: WEB, desired: Desired::ForcedOff });
    assert!(refused(lab.ask(rename("san", "fast"))).contains("shut it down first"), "its QEMU may be alive");
    lab.say(home, WEB, Run::Exited { detail: "killed".into() });
    lab.plan();
    assert_eq!(lab.ask(rename("san", "fast")), Reply::Done);
    assert_eq!(lab.state.vms[&WEB].spec.disks[0].volume, "fast");
    assert_eq!(lab.state.luns["fast"].files.len(), 1);
    assert_eq!((lab.state.volumes.contains_key("san"), owner(&lab, "fast")), (false, Some((1, 1))));
    assert_eq!(lab.plan(), []);
}

#[derive(Clone, Debug)]
enum Step {
    Path(u64, u8),
    Lose(u64),
    Return(u64),
    Leave,
    Set(u64),
    Redirect(u64, bool),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..4u64, 0..3u8).prop_map(|(node, path)| Step::Path(node, path)),
        (1..4u64).prop_map(Step::Lose),
        (1..4u64).prop_map(Step::Return),
        Just(Step::Leave),
        (1..4u64).prop_map(Step::Set),
        (1..4u64, any::<bool>()).prop_map(|(node, redirect)| Step::Redirect(node, redirect)),
        (0..100_000u64).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever happens: epochs only grow, an owner is succeeded only when it is lost
    /// or has left, a new one is up and reaches the volume, decisions come to an end,
    /// and with a path there is an owner in the end.
    #[test]
    fn one_owner_at_a_time(steps in proptest::collection::vec(step(), 1..60)) {
        let mut lab = san();
        let mut life = 1000;
        let mut epochs = BTreeMap::from([(1, NodeId(1))]);
        for step in steps {
            let before = lab.state.owner("san").copied();
            let mut left = false;
            match step {
                Step::Path(node, path) if lab.state.nodes[&NodeId(node)].is_up() => {
                    let path = match path {
                        0 => LunPath::Direct,
                        1 => through(1 + node % 3),
                        _ => away(),
                    };
                    reaches(&mut lab, node, SAN, path);
                }
                Step::Lose(node) => lab.lose(node),
                Step::Return(node) => {
                    lab.observed.nodes.insert(NodeId(node), NodeObserved::default());
                    life += 1;
                    lab.hear(node, life);
                }
                Step::Leave => {
                    left = before.is_some_and(|owner| owner.leaving);
                    leaves(&mut lab, "san");
                }
                Step::Set(node) => drop(lab.ask(Command::SetOwner { volume: "san".into(), node: NodeId(node) })),
                Step::Redirect(node, redirect) => {
                    drop(lab.ask(Command::SetRedirect { volume: "san".into(), node: NodeId(node), redirect }));
                }
                Step::Wait(ms) => lab.now_ms += ms,
                Step::Path(..) => {}
            }
            let mut rounds = 0;
            while !lab.plan().is_empty() {
                rounds += 1;
                prop_assert!(rounds < 10, "decisions without an end");
            }
            let now = lab.state.luns["san"].access.owner;
            let same = |owner: &Owner| now.is_some_and(|now| now.epoch == owner.epoch);
            if let Some(before) = before.filter(|before| !same(before)) {
                prop_assert!(left || lab.state.is_owner_void(&before), "{before:?} was succeeded by {now:?}");
            }
            if let Some(now) = now {
                prop_assert_eq!(*epochs.entry(now.epoch.0).or_insert(now.node), now.node);
                prop_assert_eq!(epochs.keys().last(), Some(&now.epoch.0));
                prop_assert!(!lab.state.is_owner_void(&now));
            }
            let fit = (1..=3).any(|node| lab.state.is_fit("san", NodeId(node)));
            prop_assert!(!fit || now.is_some(), "nobody owns it");
        }
        // Once paths and owners rest, and who is to leave does, it stays with one that is fit.
        leaves(&mut lab, "san");
        while !lab.plan().is_empty() {
            leaves(&mut lab, "san");
        }
        let fit = (1..=3).any(|node| lab.state.is_fit("san", NodeId(node)));
        if let Some(owner) = lab.state.owner("san").filter(|_| fit) {
            prop_assert!(lab.state.is_fit("san", owner.node) && !owner.leaving, "{owner:?}");
        }
    }
}

#[test]
fn a_fully_allocated_disk_is_refused_when_it_does_not_fit() {
    let mut lab = san();
    let lun = &lab.state.luns["san"];
    let (slab, free) = (lun.slab_bytes, u64::from(lun.free_slabs()));
    let vm = |slabs: &[u64]| {
        let disk = |(index, slabs): (usize, &u64)| DiskSpec {
            file: format!("disk{index}"),
            size_bytes: slabs * slab,
            allocation: Allocation::Full,
            ..on_san(512).disks.remove(0)
        };
        VmSpec { disks: slabs.iter().enumerate().map(disk).collect(), ..on_san(512) }
    };
    let mut create = |number: u128, spec: VmSpec| {
        let (id, name) = (vm_id(number), format!("vm{number}"));
        lab.ask(Command::CreateVm { id, name, spec, node: NodeId(1), sources: Sources::default() })
    };
    let Reply::Refused(why) = create(1, vm(&[free, 1])) else { panic!("it has no room") };
    assert!(why.to_string().contains("disk 1: fully allocated"), "{why}");
    assert!(matches!(create(2, vm(&[free - 1, 1])), Reply::Job(_)));
}
