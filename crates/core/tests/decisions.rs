//! What the coordinator decides, one behaviour each.

mod common;

use common::*;
use holdfast_core::check::{Broken, check};
use holdfast_core::plan::plan;
use holdfast_core::*;
use uuid::Uuid;

fn exited() -> Run {
    Run::Exited { detail: "signal 11".into() }
}

#[test]
fn nothing_to_do_is_an_empty_plan() {
    let mut lab = Lab::new(3);
    lab.running_web(Priority::Medium);
    assert_eq!(lab.plan(), []);
}

#[test]
fn a_lost_node_s_vm_starts_elsewhere_under_a_greater_epoch() {
    let mut lab = Lab::new(3);
    let node = lab.running_web(Priority::Medium);
    lab.lose(node);
    let actions = lab.plan();
    assert_eq!(actions[0], Action::DeclareLost { node: NodeId(node) });
    assert_ne!(lab.on(WEB), Some(node));
    assert_eq!(lab.state.vms[&WEB].last_epoch, Epoch(2));
}

#[test]
fn silence_alone_loses_nobody() {
    let mut lab = Lab::new(3);
    let node = lab.running_web(Priority::Medium);
    lab.observed.nodes.get_mut(&NodeId(node)).unwrap().silent_ms = 60_000;
    assert_eq!(lab.plan(), []);
}

#[test]
fn a_restarted_keeper_s_vm_starts_anew_because_its_predecessor_s_is_dead() {
    let mut lab = Lab::new(1);
    let node = lab.running_web(Priority::Medium);
    lab.hear(node, 999);
    lab.plan();
    assert_eq!(lab.state.nodes[&NodeId(1)].term, NodeTerm(2));
    assert_eq!(lab.state.vms[&WEB].last_epoch, Epoch(2));
}

#[test]
fn priority_none_is_not_restarted_and_its_job_says_so() {
    let mut lab = Lab::new(2);
    let job = lab.create(WEB, "web", spec(512, Priority::None));
    lab.plan();
    let node = lab.on(WEB).unwrap();
    lab.lose(node);
    lab.plan();
    assert_eq!(lab.state.vms[&WEB].hold, Some(Hold::NotProtected));
    assert!(matches!(lab.outcome(job), Some(Outcome::Failed { .. })));
    assert_eq!(lab.plan(), []);
}

#[test]
fn a_crash_is_repeated_in_place_then_elsewhere_then_held() {
    let mut lab = Lab::new(2);
    let first = lab.running_web(Priority::Medium);
    let mut places = Vec::new();
    while let Some(node) = lab.on(WEB) {
        lab.now_ms += 1000;
        lab.say(node, WEB, exited());
        lab.plan();
        places.extend(lab.on(WEB));
    }
    let other = 3 - first;
    assert_eq!(places, [first, first, first, other, other, other, other]);
    assert!(matches!(lab.state.vms[&WEB].hold, Some(Hold::Failed { .. })));
}

#[test]
fn crashes_are_forgotten_after_their_window() {
    let mut lab = Lab::new(1);
    lab.running_web(Priority::Medium);
    for _ in 0..10 {
        lab.now_ms += 601_000;
        lab.say(1, WEB, exited());
        lab.plan();
        assert_eq!(lab.on(WEB), Some(1));
    }
}

fn locked() -> Run {
    Run::Locked { detail: "the disk image web.qcow2 is in use by another QEMU".into() }
}

#[test]
fn a_locked_disk_is_waited_for_ever_more_rarely_and_is_no_crash() {
    let mut lab = Lab::new(2);
    let first = lab.running_web(Priority::Medium);
    lab.lose(first);
    lab.plan();
    let other = 3 - first;
    let mut pauses = Vec::new();
    for tries in 1..=20 {
        lab.say(other, WEB, locked());
        lab.plan();
        let vm = &lab.state.vms[&WEB];
        assert!(matches!(vm.hold, Some(Hold::DiskLocked { tries: told, .. }) if told == tries), "{:?}", vm.hold);
        let began = lab.now_ms;
        while lab.plan().is_empty() {
            lab.now_ms += 100;
        }
        pauses.push(lab.now_ms - began);
        assert_eq!((lab.on(WEB), lab.state.vms[&WEB].last_epoch), (Some(other), Epoch(2 + u64::from(tries))));
    }
    assert_eq!(pauses[..6], [500, 1000, 2000, 4000, 8000, 8000]);
    let vm = &lab.state.vms[&WEB];
    assert_eq!(vm.crashes, []);
    let told = explain::explain(&lab.state, vm);
    let standing = &told[0].text;
    let holder = format!("most likely its own on n{first}, whose lease ended");
    assert!(standing.contains("waits for the image lock") && standing.contains(&holder), "{standing}");
    assert!(standing.contains("web.qcow2 is in use by another QEMU"), "{standing}");
    let tries = told.iter().filter(|line| line.text.contains("in use by another QEMU")).count();
    assert_eq!(tries, 2, "how it stands, and the last try: {told:?}");

    lab.say(other, WEB, Run::Running);
    lab.plan();
    assert_eq!(lab.state.vms[&WEB].hold, None);
    assert_eq!(lab.state.vms[&WEB].seen, Seen::Running);
    // What counts begins with what it does itself.
    lab.say(other, WEB, exited());
    lab.plan();
    assert_eq!(lab.state.vms[&WEB].crashes.len(), 1);
}

/// A VM that waits for its disk, and the node on which it does.
fn waiting() -> (Lab, u64) {
    let mut lab = Lab::new(2);
    let node = lab.running_web(Priority::Medium);
    lab.say(node, WEB, exited());
    lab.plan();
    lab.say(node, WEB, locked());
    lab.plan();
    assert!(matches!(lab.state.vms[&WEB].hold, Some(Hold::DiskLocked { tries: 1, .. })));
    (lab, node)
}

#[test]
fn a_vm_that_waits_for_its_disk_can_be_switched_off() {
    let (mut lab, _) = waiting();
    lab.ask(Command::SetDesired { vm: WEB, desired: Desired::Stopped });
    lab.plan();
    assert_eq!((lab.on(WEB), &lab.state.vms[&WEB].hold), (None, &None));
}

#[test]
fn a_vm_that_waits_for_its_disk_loses_its_node_like_any_other() {
    let (mut lab, node) = waiting();
    lab.lose(node);
    lab.plan();
    assert_eq!((lab.on(WEB), &lab.state.vms[&WEB].hold), (Some(3 - node), &None));
}

#[test]
fn memory_is_never_promised_twice_and_priority_comes_first() {
    let mut lab = Lab::new(2);
    let ids = [(vm_id(1), Priority::Low), (vm_id(2), Priority::High), (vm_id(3), Priority::Medium)];
    for (id, priority) in ids {
        lab.create(id, &format!("vm{}", id.0.as_u128()), spec(900, priority));
        lab.plan();
    }
    let (roomy, full) = (1..=2)
        .map(|n| (n, ids.iter().filter(|(id, _)| lab.on(*id) == Some(n)).count()))
        .fold((0, 0), |(r, f), (n, count)| if count == 1 { (n, f) } else { (r, n) });
    assert!(roomy != full && roomy > 0 && full > 0);
    lab.lose(roomy);
    lab.plan();
    let held: Vec<_> = ids.iter().filter(|(id, _)| lab.on(*id).is_none()).collect();
    assert_eq!(held.len(), 1, "two fit on the node that is left");
    lab.hear(roomy, 555);
    let seen = lab.observed.nodes.get_mut(&NodeId(roomy)).unwrap();
    (seen.lease_ended, seen.silent_ms) = (false, 0);
    lab.plan();
    assert!(ids.iter().all(|(id, _)| lab.on(*id).is_some()), "room appeared");
}

#[test]
fn a_job_to_restart_ends_when_its_vm_is_held_instead() {
    let mut lab = Lab::new(2);
    let node = lab.running_web(Priority::None);
    let job = lab.job(Command::RestartVm { vm: WEB });
    lab.lose(node);
    lab.plan();
    assert!(matches!(lab.outcome(job), Some(Outcome::Failed { .. })), "{:?}", lab.outcome(job));
}

#[test]
fn a_job_to_restart_goes_on_until_the_guest_runs_anew() {
    let mut lab = Lab::new(2);
    let (from, to, job) = moving(&mut lab);
    // The migration comes to nothing, and used up an epoch.
    lab.ask(Command::CancelJob { job });
    lab.say(from, WEB, Run::Kept { why: "it was cancelled".into() });
    lab.say(to, WEB, exited());
    lab.plan();
    assert_eq!(lab.on(WEB), Some(from));
    lab.say(from, WEB, Run::Running);
    lab.plan();
    let job = lab.job(Command::RestartVm { vm: WEB });
    assert_eq!(lab.outcome(job), None, "the guest has not even been asked");
    lab.say(from, WEB, Run::Stopping);
    lab.plan();
    lab.say(from, WEB, exited());
    lab.plan();
    assert_eq!(lab.outcome(job), None, "it boots");
    lab.say(from, WEB, Run::Running);
    lab.plan();
    assert_eq!(lab.outcome(job), Some(Outcome::Done));
}

fn other_than(node: u64) -> u64 {
    3 - node
}

/// `web` on its way from the first node to the second.
fn moving(lab: &mut Lab) -> (u64, u64, JobId) {
    let from = lab.running_web(Priority::Medium);
    let to = other_than(from);
    let job = lab.job(Command::MigrateVm { vm: WEB, to: Some(NodeId(to)) });
    (from, to, job)
}

fn transferring(lab: &mut Lab) -> (u64, u64, JobId) {
    let (from, to, job) = moving(lab);
    lab.say(to, WEB, Run::Waiting { address: "10.0.0.2:49152".into() });
    assert_eq!(lab.plan(), [Action::Transfer { vm: WEB, address: "10.0.0.2:49152".into() }]);
    (from, to, job)
}

#[test]
fn a_migration_ends_where_the_target_says_that_the_guest_runs() {
    let mut lab = Lab::new(2);
    let (from, to, job) = transferring(&mut lab);
    lab.say(from, WEB, Run::Sent);
    assert_eq!(lab.plan(), []);
    lab.say(to, WEB, Run::Running);
    lab.plan();
    assert_eq!((lab.on(WEB), lab.outcome(job)), (Some(to), Some(Outcome::Done)));
}

#[test]
fn a_migration_that_the_source_gave_up_ends_where_it_began() {
    let mut lab = Lab::new(2);
    let (from, _, job) = transferring(&mut lab);
    lab.say(from, WEB, Run::Kept { why: "no route".into() });
    lab.plan();
    assert_eq!(lab.on(WEB), Some(from));
    assert!(matches!(lab.outcome(job), Some(Outcome::Failed { .. })));
}

#[test]
fn one_lost_end_of_a_migration_starts_nothing_anew() {
    for lost_source in [true, false] {
        let mut lab = Lab::new(2);
        let (from, to, _) = transferring(&mut lab);
        lab.lose(if lost_source { from } else { to });
        let actions = lab.plan();
        assert_eq!(actions.len(), 1, "only the loss: {actions:?}");
        assert_eq!(lab.plan(), []);
    }
}

#[test]
fn a_migration_with_both_ends_over_starts_anew_and_its_job_fails() {
    let mut lab = Lab::new(2);
    let (from, to, job) = transferring(&mut lab);
    lab.lose(from);
    lab.plan();
    lab.say(to, WEB, exited());
    lab.plan();
    assert_eq!(lab.on(WEB), Some(to));
    assert!(matches!(lab.outcome(job), Some(Outcome::Failed { .. })));
}

#[test]
fn a_migration_whose_vm_stays_off_ends_its_job() {
    let mut lab = Lab::new(2);
    let (from, to, job) = transferring(&mut lab);
    lab.job(Command::SetDesired { vm: WEB, desired: Desired::ForcedOff });
    lab.say(from, WEB, exited());
    lab.say(to, WEB, exited());
    lab.plan();
    assert_eq!(lab.state.vms[&WEB].placement, Placement::Nowhere);
    assert!(matches!(lab.outcome(job), Some(Outcome::Failed { .. })), "{:?}", lab.outcome(job));
}

#[test]
fn a_cancelled_migration_ends_as_cancelled() {
    let mut lab = Lab::new(2);
    let (from, _, job) = moving(&mut lab);
    assert_eq!(lab.ask(Command::CancelJob { job }), Reply::Done);
    lab.plan();
    assert_eq!((lab.on(WEB), lab.outcome(job)), (Some(from), Some(Outcome::Cancelled)));
}

#[test]
fn a_report_from_an_earlier_term_says_nothing() {
    let mut lab = Lab::new(2);
    let node = lab.running_web(Priority::Medium);
    lab.say(node, WEB, exited());
    lab.observed.nodes.get_mut(&NodeId(node)).unwrap().report.as_mut().unwrap().term = NodeTerm(0);
    assert_eq!(lab.plan(), []);
}

#[test]
fn the_same_request_is_applied_once() {
    let mut lab = Lab::new(2);
    lab.running_web(Priority::Medium);
    let id = RequestId(uuid::Uuid::from_u128(u128::MAX));
    let command = Command::RestartVm { vm: WEB };
    let proposal = Proposal { id, at_ms: lab.now_ms, by: "anna".into(), command };
    let first = lab.state.apply(&proposal);
    let after = lab.state.clone();
    assert_eq!(lab.state.apply(&proposal), first);
    assert_eq!(lab.state, after);
}

#[test]
fn a_plan_made_from_another_revision_changes_nothing() {
    let mut lab = Lab::new(2);
    let node = lab.running_web(Priority::Medium);
    lab.lose(node);
    let stale = plan(&lab.state, &lab.observed, lab.now_ms);
    lab.ask(Command::SetProfile { profile: Profile::Fast });
    assert!(matches!(check(&lab.state, &stale), Err(Broken::Revision { .. })));
    let vms = lab.state.vms.clone();
    let reply = lab.ask(Command::Decide { revision: stale.revision, decisions: stale.decisions });
    assert!(matches!(reply, Reply::Refused(Refusal::Stale { .. })));
    assert_eq!(lab.state.vms, vms);
}

#[test]
fn the_judge_refuses_what_breaks_a_rule() {
    let mut lab = Lab::new(3);
    let node = lab.running_web(Priority::Medium);
    let tenure = *lab.state.vms[&WEB].tenures().next().unwrap();
    let requested = || Cause::Requested { by: "anna".into() };
    let elsewhere = NodeId(node % 3 + 1);
    let ended = |evidence| vec![Ended { tenure, evidence }];
    let place = |node, after| Action::Place { vm: WEB, node, after };
    let lost = |node| Cause::LeaseEnded { node, term: NodeTerm(7), silent_ms: 1 };
    let cases = [
        (place(elsewhere, Vec::new()), requested(), Broken::StillOut { vm: WEB, node: tenure.node }),
        (place(elsewhere, ended(Evidence::TermOver)), requested(), Broken::Evidence { vm: WEB, node: tenure.node }),
        (place(NodeId(9), ended(Evidence::Exited)), requested(), Broken::NotUp { vm: WEB, node: NodeId(9) }),
        (Action::DeclareLost { node: tenure.node }, requested(), Broken::Lost(tenure.node)),
        (Action::DeclareLost { node: tenure.node }, lost(tenure.node), Broken::Lost(tenure.node)),
        (Action::Admit { node: NodeId(9), incarnation: Incarnation(1) }, requested(), Broken::Admitted(NodeId(9))),
        (Action::AbortMove { vm: WEB }, requested(), Broken::Move(WEB)),
    ];
    for (action, cause, broken) in cases {
        let plan = Plan { revision: lab.state.revision, decisions: vec![Decision { action, cause }] };
        assert_eq!(check(&lab.state, &plan), Err(broken));
    }
}

#[test]
fn only_who_may_run_a_vm_maps_its_slabs_and_a_lost_node_s_are_free() {
    let mut lab = Lab::new(2);
    let kind = VolumeKind::Lun { device: "/dev/sdb".into(), slab_bytes: 16 << 20, slabs: 100 };
    lab.ask(Command::AddVolume { name: "san".into(), id: Uuid::from_u128(9), kind });
    let disk = DiskSpec { volume: "san".into(), format: DiskFormat::Raw, ..spec(512, Priority::High).disks.remove(0) };
    lab.create(WEB, "web", VmSpec { disks: vec![disk], ..spec(512, Priority::High) });
    lab.plan();
    let file = lab.state.vms[&WEB].spec.disks[0].file.clone();
    let before = *lab.state.vms[&WEB].tenures().next().expect("a right");
    let take = |tenure: &Tenure| Command::TakeSlabs {
        volume: "san".into(),
        node: tenure.node,
        term: tenure.term,
        known: Vec::new(),
        most: 2,
    };
    let map = |tenure: &Tenure, part: u32, slab: u32| Command::MapSlabs {
        vm: WEB,
        disk: 0,
        tenure: *tenure,
        wanted: vec![(part, slab, 1).into()],
        takings: Vec::new(),
    };
    let taking =
        |number: u64, first: u32, count: u32| Reply::Slabs(Taking { number, slabs: vec![(first, count).into()] });
    let revision = lab.state.revision;
    assert_eq!(lab.ask(take(&before)), taking(1, 0, 2));
    assert_eq!(lab.ask(map(&before, 5, 0)), Reply::Mapped(vec![(5, 0, 1).into()]));
    let unmap = |tenure: &Tenure, number: u64| Command::UnmapSlabs {
        vm: WEB,
        disk: 0,
        tenure: *tenure,
        number,
        parts: vec![(4, 1), (6, 1)],
    };
    assert_eq!(lab.ask(unmap(&before, 0)), Reply::Unmapped(Unmapped { number: 1, left: false }));
    assert_eq!(lab.ask(Command::VoidUnmaps { node: before.node }), Reply::Done);
    assert_eq!(lab.ask(unmap(&before, 1)), Reply::Unmapped(Unmapped { number: 2, left: false }), "void by now");
    assert_eq!(lab.state.luns["san"].files[&file].unmaps, 2);
    assert_eq!(lab.state.revision, revision, "no decision stands on it");

    lab.lose(before.node.0);
    lab.plan();
    let after = *lab.state.vms[&WEB].tenures().next().expect("a right elsewhere");
    assert_ne!(after.node, before.node);
    assert!(matches!(lab.ask(take(&before)), Reply::Refused(Refusal::Conflict(_))));
    assert!(matches!(lab.ask(map(&before, 6, 1)), Reply::Refused(Refusal::Conflict(_))));
    assert!(matches!(lab.ask(unmap(&before, 2)), Reply::Refused(Refusal::Conflict(_))));
    assert_eq!(lab.ask(take(&after)), taking(2, 1, 2), "the lost node's slab is free again");
    assert_eq!(lab.ask(map(&after, 5, 1)), Reply::Mapped(vec![(5, 0, 1).into()]), "what is there stays");
    assert_eq!(lab.state.luns["san"].files[&file].slabs(), 1);

    let mut spec = lab.state.vms[&WEB].spec.clone();
    spec.disks[0].format = DiskFormat::Qcow2;
    let create = |spec: VmSpec| Command::CreateVm {
        id: vm_id(77),
        name: "db".into(),
        spec,
        node: after.node,
        sources: Sources::default(),
    };
    assert!(
        matches!(lab.ask(create(spec.clone())), Reply::Refused(Refusal::Invalid(why)) if why.contains("format=raw"))
    );
    spec.disks[0].format = DiskFormat::Raw;
    assert!(matches!(lab.ask(create(spec.clone())), Reply::Refused(Refusal::Duplicate { .. })), "the same file");
    (spec.disks[0].file, spec.disks[0].size_bytes) = ("other".into(), 1 << 40);
    assert!(matches!(lab.ask(create(spec)), Reply::Refused(Refusal::Invalid(why)) if why.contains("san")));
    assert!(matches!(lab.ask(Command::RemoveVolume { name: "san".into() }), Reply::Refused(Refusal::Conflict(_))));
}

#[test]
fn a_guest_that_writes_makes_nobody_forget_what_was_asked_before() {
    let mut lab = Lab::new(1);
    let kind = VolumeKind::Lun { device: "/dev/sdb".into(), slab_bytes: 16 << 20, slabs: 100 };
    lab.ask(Command::AddVolume { name: "san".into(), id: Uuid::from_u128(9), kind });
    let add = Proposal {
        id: RequestId(Uuid::from_u128(1 << 100)),
        at_ms: 1,
        by: "anna".into(),
        command: Command::AddSwitch { name: "inner".into(), kind: SwitchKind::Internal },
    };
    assert_eq!(lab.state.apply(&add), Reply::Done);
    let (node, term) = (NodeId(1), lab.state.nodes[&NodeId(1)].term);
    for number in 1..2000 {
        let take = Command::TakeSlabs { volume: "san".into(), node, term, known: Vec::new(), most: 1 };
        assert_eq!(lab.ask(take), Reply::Slabs(Taking { number, slabs: vec![(0, 1).into()] }));
    }
    assert_eq!(lab.state.apply(&add), Reply::Done, "applied once, and answered alike");
}

#[test]
fn a_drained_node_is_left_by_one_vm_after_the_other_and_takes_none() {
    let mut lab = Lab::new(2);
    let node = lab.running_web(Priority::High);
    let other = 3 - node;
    let drain = |drained: bool| Command::DrainNode { node: NodeId(node), drained };
    assert!(matches!(lab.ask(drain(false)), Reply::Refused(_)), "it is not drained");
    assert_eq!(lab.ask(drain(true)), Reply::Done);
    assert_eq!(lab.plan(), [Action::MoveAway { vm: WEB, to: NodeId(other) }]);
    lab.say(node, WEB, Run::Kept { why: "cancelled".into() });
    assert_eq!(lab.plan(), [Action::AbortMove { vm: WEB }]);
    assert_eq!(lab.plan(), [], "it is not begun again at once");
    lab.now_ms += 10_000;
    lab.say(node, WEB, Run::Running);
    assert_eq!(lab.plan(), [Action::MoveAway { vm: WEB, to: NodeId(other) }]);

    // Nothing comes to it, by no way.
    let (db, log) = (vm_id(7), vm_id(8));
    lab.create(db, "db", spec(512, Priority::High));
    lab.plan();
    assert_eq!(lab.on(db), Some(other));
    lab.say(other, db, Run::Running);
    lab.plan();
    let why = lab.ask(Command::MigrateVm { vm: db, to: Some(NodeId(node)) });
    assert!(matches!(&why, Reply::Refused(Refusal::NoRoom { why, .. }) if why.contains("is drained")), "{why:?}");
    lab.create(log, "log", spec(256, Priority::Low));
    lab.plan();
    assert_eq!(lab.on(log), Some(other));
    lab.lose(other);
    lab.plan();
    assert_eq!((lab.on(db), lab.on(log)), (None, None), "held until there is a node for them");
    assert!(matches!(lab.state.vms[&db].hold, Some(Hold::NoRoom { .. })));
    assert_eq!(lab.ask(drain(false)), Reply::Done);
    lab.plan();
    assert_eq!((lab.on(db), lab.on(log)), (Some(node), Some(node)));
}

#[test]
fn a_move_from_a_drained_node_is_not_begun_again_at_once_when_clocks_differ() {
    let mut lab = Lab::new(2);
    let node = lab.running_web(Priority::High);
    lab.ask(Command::DrainNode { node: NodeId(node), drained: true });
    // Whoever decides has a clock that is an hour behind that of whoever took the wish.
    lab.now_ms -= 3_600_000;
    assert_eq!(lab.plan(), [Action::MoveAway { vm: WEB, to: NodeId(3 - node) }]);
    lab.say(node, WEB, Run::Kept { why: "cancelled".into() });
    assert_eq!(lab.plan(), [Action::AbortMove { vm: WEB }]);
    assert_eq!(lab.plan(), []);
}

#[test]
fn what_cannot_leave_a_drained_node_says_why_and_starts_there_again() {
    let mut lab = Lab::new(2);
    let node = lab.running_web(Priority::High);
    let both: Vec<_> = (1..=2).map(|node| Command::DrainNode { node: NodeId(node), drained: true }).collect();
    for drain in both {
        lab.ask(drain);
    }
    assert_eq!(lab.plan(), []);
    let why = lab.state.cannot_leave(&lab.state.vms[&WEB]).expect("a reason");
    assert!(why.contains("no node has room") && why.contains("drained for maintenance"), "{why}");
    lab.say(node, WEB, Run::Exited { detail: "signal 9".into() });
    lab.plan();
    assert_eq!(lab.on(WEB), Some(node), "better there than nowhere");
}

#[test]
fn a_vm_with_a_disk_that_qemu_cannot_hand_over_does_not_move() {
    let mut lab = Lab::new(2);
    for format in [DiskFormat::Vhdx, DiskFormat::Vhd] {
        let node = lab.running_web(Priority::High);
        lab.state.vms.get_mut(&WEB).unwrap().spec.disks[0].format = format;
        let to = Some(NodeId(3 - node));
        let Reply::Refused(why) = lab.ask(Command::MigrateVm { vm: WEB, to }) else { panic!("it moves") };
        assert!(why.to_string().contains(format.extension()), "{why}");
        let vm = lab.state.vms[&WEB].clone();
        assert!(lab.state.cannot_leave(&vm).is_some_and(|why| why.contains("cannot be live-migrated")));
        lab = Lab::new(2);
    }
    let too_large = |format: DiskFormat| {
        let mut spec = spec(512, Priority::Medium);
        spec.disks[0].format = format;
        spec.disks[0].size_bytes = format.most_bytes().unwrap() + 512;
        spec
    };
    for format in [DiskFormat::Vhdx, DiskFormat::Vhd] {
        let (id, name, sources) = (vm_id(9), "large".into(), Sources::default());
        let create = Command::CreateVm { id, name, spec: too_large(format), node: NodeId(1), sources };
        let Reply::Refused(why) = lab.ask(create) else { panic!("no such disk can be") };
        assert!(why.to_string().contains("GiB at most"), "{why}");
    }
}
