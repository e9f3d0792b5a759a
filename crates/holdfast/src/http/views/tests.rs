use holdfast_core::lease::BootTime;
use holdfast_core::quorum::{Attendance, Heard};
use holdfast_core::watchdog::Device;

use super::*;

/// Two nodes of which the first founded the cluster, made by real commands.
fn state() -> ClusterState {
    let mut state = ClusterState::default();
    let mut apply = |command| {
        let proposal = Proposal { id: RequestId(uuid::Uuid::new_v4()), at_ms: 1000, by: "root".into(), command };
        let reply = state.apply(&proposal);
        assert!(!matches!(reply, Reply::Refused(_)), "{reply:?}");
    };
    let new = |name: &str, last: u8| NewNode {
        name: name.into(),
        port: 7400,
        heartbeat_port: 7400,
        heartbeat_key: [0; 32],
        facts: NodeFacts {
            cpus: 4,
            memory_bytes: 8 << 30,
            qemu: Some("7.2.0".into()),
            machines: vec!["pc-q35-7.2".into()],
            addresses: vec![NodeAddress { interface: "eth0".into(), ip: [10, 0, 0, last].into(), prefix: 24 }],
            ..NodeFacts::default()
        },
        site: None,
    };
    apply(Command::Found { cluster: Cluster { name: "prod".into(), ..Cluster::default() }, node: new("n1", 1) });
    apply(Command::AddJoinToken { digest: "d".into(), expires_ms: 5000 });
    apply(Command::Join { digest: "d".into(), node: new("n2", 2) });
    apply(Command::AddVolume {
        name: "main".into(),
        id: uuid::Uuid::nil(),
        kind: VolumeKind::Directory { path: "/srv/main".into() },
    });
    for node in state.nodes.values_mut() {
        node.membership = Membership::Up;
        node.term = NodeTerm(1);
    }
    state
}

fn a_vm(state: &mut ClusterState) -> VmId {
    let id = VmId(uuid::Uuid::from_u128(7));
    let proposal = Proposal {
        id: RequestId(uuid::Uuid::new_v4()),
        at_ms: 2000,
        by: "root".into(),
        command: Command::CreateVm {
            id,
            name: "web".into(),
            spec: VmSpec {
                cpus: 1,
                memory_bytes: 1 << 30,
                machine: "pc-q35-7.2".into(),
                cpu_model: None,
                direct_boot: None,
                disks: Vec::new(),
                nics: Vec::new(),
                priority: Priority::Medium,
                stop_timeout_s: 60,
            },
            node: NodeId(1),
            sources: Sources::default(),
        },
    };
    assert_eq!(state.apply(&proposal), Reply::Job(JobId(1)));
    id
}

fn quiet(silent_ms: u64, state: &ClusterState) -> BTreeMap<NodeId, NodeObserved> {
    let seen = |node: &Node| NodeObserved {
        silent_ms,
        report: Some(NodeReport { incarnation: node.incarnation, term: node.term, ..NodeReport::default() }),
        ..NodeObserved::default()
    };
    state.nodes.values().map(|node| (node.id, seen(node))).collect()
}

fn from<'a>(observed: Seen<'a>) -> Vantage<'a> {
    Vantage {
        me: Some(NodeId(1)),
        coordinator: observed.map(|_| NodeId(1)),
        term: 3,
        voters: &[NodeId(1), NodeId(2)],
        trouble: None,
        observed,
        survey: None,
    }
}

/// By the account of node 1, which has heard node 2 a moment ago.
fn survey(state: &ClusterState, voters: &[u64]) -> Survey {
    let (since, now) = (BootTime(0), BootTime(10_000_000));
    let mut attendance = Attendance::new(since);
    let heard = Heard { acknowledged: Some(now), behind: Some(0) };
    attendance.hear(state, &[(NodeId(2), heard)].into(), now);
    let voters = voters.iter().copied().map(NodeId).collect();
    holdfast_core::quorum::survey(state, NodeId(1), &[voters], &attendance, now)
}

#[test]
fn the_quorum_is_told_seat_by_seat() {
    let mut state = state();
    let told = survey(&state, &[1]);
    let view = quorum(&state, Vantage { survey: Some(&told), ..from(None) });
    assert!(view.has_quorum && view.settled, "{view:?}");
    assert_eq!((view.votes, view.needed, view.present, view.survives_at_once), (1, 1, 1, 0));
    assert_eq!(view.outlook, "n1 alone votes: the others may be lost, n1 may not");
    let seats: Vec<_> = view.seats.iter().map(|seat| (seat.name.as_str(), seat.votes, seat.present)).collect();
    assert_eq!(seats, [("n1", true, Some(true)), ("n2", false, Some(true))]);
    assert!(view.seats[1].why.contains("even"), "{:?}", view.seats[1]);

    state.nodes.get_mut(&NodeId(2)).unwrap().membership = Membership::Lost { since_ms: 3 };
    let told = survey(&state, &[1, 2]);
    let view = quorum(&state, Vantage { survey: Some(&told), ..from(None) });
    assert!(!view.has_quorum && !view.settled, "{view:?}");
    assert_eq!((view.votes, view.present, view.seats[1].why.as_str()), (2, 1, "it is lost"));

    let alone = quorum(&state, from(None));
    assert!(!alone.has_quorum && alone.seats.iter().all(|seat| seat.votes && seat.present.is_none()), "{alone:?}");
    assert!(alone.outlook.contains("no coordinator"), "{}", alone.outlook);
}

#[test]
fn a_healthy_cluster_has_no_warnings_but_that_one_vote_is_few() {
    let state = state();
    let observed = quiet(10, &state);
    let survey = survey(&state, &[1]);
    let view = cluster(&state, Vantage { survey: Some(&survey), ..from(Some(&observed)) });
    assert_eq!((view.name.as_str(), view.answered_by.as_str()), ("prod", "n1"));
    assert_eq!(view.coordinator.as_deref(), Some("n1"));
    let quorum = api::Quorum { voters: 1, connected: 1, needed: 1 };
    assert_eq!(view.quorum, quorum);
    assert_eq!((view.counts.nodes, view.counts.nodes_up), (2, 2));
    assert_eq!(view.warnings.len(), 1, "{:?}", view.warnings);
    assert!(view.warnings[0].starts_with("n1 alone votes"), "{:?}", view.warnings);
}

#[test]
fn everything_that_is_wrong_is_told_in_a_sentence() {
    let mut state = state();
    let id = a_vm(&mut state);
    let vm = state.vms.get_mut(&id).unwrap();
    vm.disks = DiskStage::Ready;
    vm.desired = Desired::Running;
    vm.hold = Some(Hold::NoRoom { why: "n1 is full".into() });
    let mut observed = quiet(10_000, &state);
    let report = observed.get_mut(&NodeId(1)).unwrap().report.as_mut().unwrap();
    report.unreachable.insert("main".into(), "it is not mounted".into());
    let lost = state.nodes.get_mut(&NodeId(2)).unwrap();
    lost.membership = Membership::Lost { since_ms: 3 };
    let survey = survey(&state, &[1, 2]);
    let view = cluster(&state, Vantage { survey: Some(&survey), ..from(Some(&observed)) });
    let told = view.warnings.join("\n");
    for text in [
        "1 of 2 votes are present",
        "node n2 is lost",
        "n1 does not reach volume main: it is not mounted",
        "web should run but no node has room",
    ] {
        assert!(told.contains(text), "{told}");
    }
    assert_eq!(view.quorum.connected, 1);
    let told = cluster(&state, from(None)).warnings.join("\n");
    assert!(told.contains("no coordinator answers"), "{told}");
}

#[test]
fn a_volume_says_how_each_node_reaches_it() {
    let mut state = state();
    let mut observed = quiet(10, &state);
    let report = observed.get_mut(&NodeId(2)).unwrap().report.as_mut().unwrap();
    report.unreachable.insert("main".into(), "it is not mounted".into());
    let reach = |state: &ClusterState, observed: Seen<'_>| {
        let view = volume(state, "main", &state.volumes["main"], "/clusterstorage/main".into(), None, observed);
        view.reach.into_iter().map(|reach| (reach.ok, reach.why)).collect::<Vec<_>>()
    };
    let why = Some("it is not mounted".to_owned());
    assert_eq!(reach(&state, Some(&observed)), [(Some(true), None), (Some(false), why)]);
    assert_eq!(reach(&state, None), [(None, None), (None, None)]);
    // What a node said before it was lost says nothing about now.
    state.nodes.get_mut(&NodeId(2)).unwrap().membership = Membership::Lost { since_ms: 3 };
    assert_eq!(reach(&state, Some(&observed)), [(Some(true), None), (None, None)]);
}

#[test]
fn paths_to_a_lun_are_shown_and_warned_of() {
    let mut state = state();
    let (id, kind) =
        (uuid::Uuid::from_u128(9), VolumeKind::Lun { device: "/dev/sdb".into(), slab_bytes: 16 << 20, slabs: 9 });
    let proposal = Proposal {
        id: RequestId(uuid::Uuid::from_u128(99)),
        at_ms: 1,
        by: "anna".into(),
        command: Command::AddVolume { name: "san".into(), id, kind },
    };
    state.apply(&proposal);
    let term = state.nodes[&NodeId(1)].term;
    let away = LunPath::Redirected { why: "input/output error".into(), through: NodeId(1) };
    let access = &mut state.luns.get_mut("san").unwrap().access;
    access.paths.insert(NodeId(1), Reached { path: LunPath::Direct, term, since_ms: 5 });
    access.paths.insert(NodeId(2), Reached { path: away, term, since_ms: 7 });
    access.owner = Some(Owner { node: NodeId(1), term, epoch: Epoch(3), leaving: false });
    let shown = volume(&state, "san", &state.volumes["san"], String::new(), None, None);
    assert_eq!(shown.owner.map(|owner| (owner.node, owner.epoch)), Some(("n1".into(), 3)));
    let how = |reach: &api::Reach| (reach.path, reach.through.clone(), reach.since_ms, reach.ok);
    assert_eq!(how(&shown.reach[0]), (Some(api::PathState::Direct), None, Some(5), Some(true)));
    assert_eq!(how(&shown.reach[1]), (Some(api::PathState::Redirected), Some("n1".into()), Some(7), Some(true)));
    let told = |state: &ClusterState| cluster(state, from(None)).warnings.join("\n");
    assert!(told(&state).contains("node n2 is redirected on volume san, through n1: input/output error"));
    assert!(!told(&state).contains("has no owner"));
    let access = &mut state.luns.get_mut("san").unwrap().access;
    access.paths.get_mut(&NodeId(1)).unwrap().path = LunPath::Unavailable { why: "no such device".into() };
    access.owner = None;
    let told = told(&state);
    for text in ["n1 does not reach volume san: no such device", "volume san has no owner"] {
        assert!(told.contains(text), "{told}");
    }
}

#[test]
fn a_node_shows_what_it_has_and_what_is_promised() {
    let mut state = state();
    let id = a_vm(&mut state);
    let tenure = Tenure { node: NodeId(1), term: NodeTerm(1), epoch: Epoch(1) };
    state.vms.get_mut(&id).unwrap().placement = Placement::On(tenure);
    let view = node(&state, &state.nodes[&NodeId(1)], from(None));
    assert_eq!((view.vms, view.cpus_promised), (1, 1));
    assert_eq!(view.memory_promised_bytes + view.memory_free_bytes, view.memory_bytes);
    assert!(view.memory_promised_bytes > 1 << 30);
    assert_eq!(view.addresses[0].network.as_deref(), Some("network-1"));
    assert!(view.fencing.contains("by its lease"), "{}", view.fencing);
    assert!(view.fencing.contains("no hardware watchdog is used"), "{}", view.fencing);
    assert_eq!(view.watchdog, None, "its keeper was not heard");
    let view = network(&state, "10.0.0.0/24", &state.networks["10.0.0.0/24"]);
    assert_eq!(view.nodes, ["n1", "n2"]);
}

#[test]
fn a_node_shows_how_its_watchdog_stands() {
    let state = state();
    let device = Device { path: "/dev/watchdog0".into(), identity: "iTCO_wdt".into() };
    let show = |standing: Standing| {
        let mut observed = quiet(10, &state);
        observed.get_mut(&NodeId(2)).unwrap().report.as_mut().unwrap().watchdog = Some(standing);
        let view = node(&state, &state.nodes[&NodeId(2)], from(Some(&observed)));
        (view.watchdog.unwrap(), view.fencing, cluster(&state, from(Some(&observed))).warnings.join("; "))
    };
    let (view, words, warnings) = show(Standing::Absent { why: "/dev/watchdog0 is in use by another process".into() });
    assert_eq!((view.state, view.device), (api::WatchdogState::Absent, None));
    assert_eq!(view.why.as_deref(), Some("/dev/watchdog0 is in use by another process"));
    assert!(words.contains("no hardware watchdog is used: /dev/watchdog0 is in use"), "{words}");
    assert!(!warnings.contains("watchdog"), "{warnings}");
    let (view, words, _) = show(Standing::Armed { device: device.clone(), timeout_s: 10 });
    assert_eq!((view.state, view.timeout_s), (api::WatchdogState::Armed, Some(10)));
    assert_eq!((view.device.as_deref(), view.identity.as_deref()), (Some("/dev/watchdog0"), Some("iTCO_wdt")));
    assert!(words.contains("resets the host 10 s after it was fed last"), "{words}");
    let (view, words, warnings) = show(Standing::Left { device, timeout_s: 10 });
    assert_eq!(view.state, api::WatchdogState::Left);
    assert!(words.contains("is not fed any more"), "{words}");
    assert!(warnings.contains("node n2 has VMs that could not be shown dead"), "{warnings}");
}

#[test]
fn a_vm_is_told_in_one_word() {
    use api::VmState;
    let mut state = state();
    let id = a_vm(&mut state);
    let word = |change: &dyn Fn(&mut Vm)| {
        let mut vm = state.vms[&id].clone();
        assert_eq!(vm_state(&vm), VmState::Creating);
        vm.disks = DiskStage::Ready;
        vm.desired = Desired::Running;
        vm.last_epoch = Epoch(1);
        change(&mut vm);
        vm_state(&vm)
    };
    let here = Tenure { node: NodeId(1), term: NodeTerm(1), epoch: Epoch(1) };
    let on = |vm: &mut Vm, seen| {
        vm.placement = Placement::On(here);
        vm.seen = seen;
    };
    use holdfast_core::Seen;
    assert_eq!(word(&|_| {}), VmState::Starting);
    assert_eq!(word(&|vm| vm.desired = Desired::Stopped), VmState::Off);
    assert_eq!(word(&|vm| vm.hold = Some(Hold::NotProtected)), VmState::Off);
    assert_eq!(word(&|vm| vm.hold = Some(Hold::NoRoom { why: String::new() })), VmState::Waiting);
    assert_eq!(word(&|vm| vm.hold = Some(Hold::Failed { why: String::new() })), VmState::Failed);
    assert_eq!(word(&|vm| on(vm, Seen::Nothing)), VmState::Starting);
    assert_eq!(word(&|vm| on(vm, Seen::Running)), VmState::Running);
    assert_eq!(word(&|vm| on(vm, Seen::Paused)), VmState::Paused);
    assert_eq!(
        word(&|vm| {
            on(vm, Seen::Running);
            vm.desired = Desired::Stopped;
        }),
        VmState::Stopping
    );
    assert_eq!(
        word(&|vm| {
            on(vm, Seen::Running);
            vm.restart = Some(Epoch(1));
        }),
        VmState::Stopping
    );
    let moving = |vm: &mut Vm| {
        vm.placement =
            Placement::Moving { from: here, to: here, job: JobId(1), stage: MoveStage::Preparing, cancel: false };
    };
    assert_eq!(word(&moving), VmState::Migrating);
    let deleting = |vm: &mut Vm| {
        vm.disks = DiskStage::Deleting { node: NodeId(1), job: JobId(1) };
    };
    assert_eq!(word(&deleting), VmState::Deleting);
}

#[test]
fn a_job_tells_how_it_ended() {
    let mut state = state();
    a_vm(&mut state);
    let mut one = state.jobs[&JobId(1)].clone();
    assert_eq!(job(&state, &one).state, api::JobState::Running);
    one.work = Work::Migrate { from: NodeId(1), to: NodeId(9) };
    one.end = Some(JobEnd { at_ms: 9, outcome: Outcome::Failed { why: "the link broke".into() } });
    let view = job(&state, &one);
    assert_eq!(view.state, api::JobState::Failed);
    assert_eq!(view.outcome.unwrap().why.as_deref(), Some("the link broke"));
    // A node that is gone is told by its number.
    assert_eq!((view.from.as_deref(), view.to.as_deref()), (Some("n1"), Some("node 9")));
}

#[test]
fn metrics_count_what_there_is() {
    let mut state = state();
    a_vm(&mut state);
    let observed = quiet(10, &state);
    let survey = survey(&state, &[1, 2]);
    let from = Vantage { survey: Some(&survey), ..from(Some(&observed)) };
    let text = crate::http::metrics::text(&state, from).unwrap();
    for line in [
        "holdfast_nodes{state=\"up\"} 2",
        "holdfast_vms{state=\"creating\"} 1",
        "holdfast_vm_up{vm=\"web\"} 0",
        "holdfast_jobs{work=\"create\",state=\"running\"} 1",
        "holdfast_node_silent_milliseconds{node=\"n2\"} 10",
        "holdfast_voters_connected 2",
        "holdfast_votes_spare 0",
        "holdfast_vote{participant=\"n2\"} 1",
        "holdfast_is_coordinator 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
    }
}
