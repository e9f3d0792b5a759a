//! What the log and the snapshots store is a contract: a change here is a change
//! to what every cluster has on its disks. `UPDATE=1` writes the files anew.

mod common;

use std::fs;
use std::path::Path;

use common::*;
use holdfast_core::plan::plan;
use holdfast_core::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

fn golden<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(name: &str, value: &T) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text = serde_json::to_string_pretty(value).unwrap() + "\n";
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&file, &text).unwrap();
    }
    let stored = fs::read_to_string(&file).unwrap();
    assert_eq!(stored, text, "{name}: the stored format changed; UPDATE=1 accepts it");
    assert_eq!(serde_json::from_str::<T>(&stored).unwrap(), *value);
}

fn eventful() -> Lab {
    let mut lab = Lab::new(2);
    let from = lab.running_web(Priority::High);
    lab.ask(Command::MigrateVm { vm: WEB, to: Some(NodeId(3 - from)) });
    lab.ask(Command::AddSwitch { name: "lan".into(), kind: SwitchKind::External { uplink: "eth0".into() } });
    lab.ask(Command::AddApiToken { name: "ci".into(), digest: "00ff".into() });
    lab
}

#[test]
fn the_state_in_a_snapshot() {
    golden("cluster_state.json", &eventful().state);
}

#[test]
fn a_decision_in_the_log() {
    let mut lab = Lab::new(2);
    let node = lab.running_web(Priority::High);
    lab.lose(node);
    let plan = plan(&lab.state, &lab.observed, lab.now_ms);
    let command = Command::Decide { revision: plan.revision, decisions: plan.decisions };
    let id = RequestId(Uuid::from_u128(77));
    golden("decide.json", &Proposal { id, at_ms: NOW, by: "coordinator".into(), command });
}

#[test]
fn a_user_s_command_in_the_log() {
    let nic = NicSpec { switch: "lan".into(), mac: "52:54:00:12:34:56".parse().unwrap(), vlan: Some(7) };
    let boot = DirectBoot {
        volume: "vol1".into(),
        kernel: "vms/web/kernel".into(),
        initrd: Some("vms/web/initrd".into()),
        append: "quiet".into(),
    };
    let command = Command::CreateVm {
        id: WEB,
        name: "web".into(),
        spec: VmSpec { nics: vec![nic], direct_boot: Some(boot), ..spec(512, Priority::Medium) },
        node: NodeId(1),
        sources: Sources { images: vec![Some("/tmp/image.qcow2".into())], start: true },
    };
    let id = RequestId(Uuid::from_u128(78));
    golden("create_vm.json", &Proposal { id, at_ms: NOW, by: "anna".into(), command });
}

#[test]
fn power_fencing_in_the_log() {
    let fencing = PowerFencing {
        agent: "fence_ipmilan".into(),
        options: [("ip".to_owned(), "10.9.0.2".to_owned())].into(),
        secrets: [("password".to_owned(), Secret("hush".into()))].into(),
        test: Some(FenceTest { at_ms: NOW, from: NodeId(2), passed: true, text: "it is on".into() }),
        asked: Some(NodeTerm(3)),
    };
    golden("set_fencing.json", &Command::SetFencing { node: NodeId(1), fencing: Some(fencing) });
    let word = FenceWord {
        term: NodeTerm(3),
        agent: "fence_ipmilan".into(),
        off: Some(0),
        status: Some(STATUS_OFF),
        took_ms: 40,
    };
    let cause = Cause::PowerFenced { node: NodeId(1), word };
    golden("power_fenced.json", &Decision { action: Action::DeclareLost { node: NodeId(1) }, cause });
}

#[test]
fn a_state_read_back_goes_on_the_same_way() {
    let lab = eventful();
    let mut copy: ClusterState = serde_json::from_str(&serde_json::to_string(&lab.state).unwrap()).unwrap();
    let mut original = lab.state.clone();
    let next = Proposal {
        id: RequestId(Uuid::from_u128(79)),
        at_ms: NOW + 1,
        by: "anna".into(),
        command: Command::SetProfile { profile: Profile::Wan },
    };
    assert_eq!(original.apply(&next), copy.apply(&next));
    assert_eq!(original, copy);
}

#[test]
fn slabs_in_the_log_and_in_a_snapshot() {
    let mut lab = Lab::new(2);
    let kind = VolumeKind::Lun { device: "/dev/sdb".into(), slab_bytes: 16 << 20, slabs: 100 };
    lab.ask(Command::AddVolume { name: "san".into(), id: Uuid::from_u128(9), kind });
    let disk =
        DiskSpec { volume: "san".into(), format: DiskFormat::Raw, ..spec(512, Priority::Medium).disks.remove(0) };
    lab.create(WEB, "web", VmSpec { disks: vec![disk], ..spec(512, Priority::Medium) });
    lab.plan();
    let tenure = *lab.state.vms[&WEB].tenures().next().expect("a right");
    let (node, term) = (tenure.node, tenure.term);
    let take = Command::TakeSlabs { volume: "san".into(), node, term, known: vec![(3, 1).into()], most: 4 };
    assert_eq!(lab.ask(take.clone()), Reply::Slabs(Taking { number: 1, slabs: vec![(0, 4).into()] }));
    let map = Command::MapSlabs { vm: WEB, disk: 0, tenure, wanted: vec![(7, 1, 2).into()], takings: vec![1] };
    assert_eq!(lab.ask(map.clone()), Reply::Mapped(vec![(7, 1, 2).into()]));
    let unmap = Command::UnmapSlabs { vm: WEB, disk: 0, tenure, number: 0, parts: vec![(8, 2)] };
    assert_eq!(lab.ask(unmap.clone()), Reply::Unmapped(Unmapped { number: 1, left: false }));
    let void = Command::VoidUnmaps { node };
    golden("slabs.json", &(take, map, unmap, void, lab.state.luns));
}

#[test]
fn owners_and_paths_in_the_log_and_in_a_snapshot() {
    let mut lab = Lab::new(2);
    let kind = VolumeKind::Lun { device: "/dev/sdb".into(), slab_bytes: 16 << 20, slabs: 100 };
    let id = Uuid::from_u128(9);
    lab.ask(Command::AddVolume { name: "san".into(), id, kind });
    let away = LunPath::Redirected { why: "input/output error".into(), through: NodeId(1) };
    for (node, path) in [(1, LunPath::Direct), (2, away)] {
        let known = lab.state.nodes[&NodeId(node)].clone();
        let report = lab.observed.nodes.entry(known.id).or_default().report.get_or_insert_default();
        (report.incarnation, report.term) = (known.incarnation, known.term);
        report.paths.insert(id, path);
    }
    let plan = plan(&lab.state, &lab.observed, lab.now_ms);
    lab.plan();
    let commands = [
        Command::SetRedirect { volume: "san".into(), node: NodeId(2), redirect: true },
        Command::RenameVolume { name: "san".into(), new: "fast".into() },
        Command::SetRedirectPatience { seconds: 30 },
    ];
    for command in &commands {
        assert_eq!(lab.ask(command.clone()), Reply::Done);
    }
    let set = Command::SetOwner { volume: "fast".into(), node: NodeId(2) };
    let decisions = [
        Action::LeaveVolume { volume: "fast".into() },
        Action::OwnVolume { volume: "fast".into(), to: None, after: Some(Evidence::TermOver) },
        Action::MoveAway { vm: WEB, to: NodeId(2) },
    ];
    golden("owners.json", &(plan.decisions, commands, set, decisions, lab.state.luns));
}
