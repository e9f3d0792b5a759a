//! Two nodes and a witness on a shared disk: either node may be lost, and so may
//! the disk, and no VM that need not stop does.

use std::fs;
use std::time::{Duration, Instant};

use holdfast_api::{QuorumView, VmState, WitnessView};
use holdfast_lab::cluster::{Cluster, GuestVm, VmTemplate};

use crate::bench::{DEADLINE, Turn, bring, elsewhere, form, lost_since, refused, spec};

/// Two nodes that coordinate and host, each with a VM.
struct Pair {
    cluster: Cluster,
    coordinator: String,
    host: String,
    /// Runs on the coordinator.
    web: GuestVm,
    /// Runs on the host of the witness.
    db: GuestVm,
    _turn: Turn,
}

fn disk(cluster: &Cluster) -> String {
    cluster.on_volume("witness.disk").to_string_lossy().into_owned()
}

fn settled(cluster: &Cluster, votes: usize) -> QuorumView {
    let reached = |quorum: &QuorumView| quorum.settled && quorum.votes == votes && quorum.present == votes;
    cluster.wait(&format!("{votes} votes"), DEADLINE, |client| client.quorum().ok().filter(reached)).unwrap()
}

/// Waits until the witness votes, is healthy and is hosted where it should be.
fn hosted(cluster: &Cluster) -> WitnessView {
    let well =
        |view: &WitnessView| view.healthy && view.votes && view.hosted_by.is_some() && view.hosted_by == view.host;
    cluster.wait("a hosted witness", DEADLINE, |client| client.witness().ok().filter(well)).unwrap()
}

fn pair() -> Pair {
    let (cluster, turn) = form(holdfast_lab::cluster::ClusterSpec { nodes: 2, ..spec() });
    cluster.any().unwrap().set_witness(&disk(&cluster)).unwrap();
    settled(&cluster, 3);
    let view = hosted(&cluster);
    let coordinator = cluster.coordinator().unwrap();
    let host = view.hosted_by.unwrap();
    assert_ne!(host, coordinator, "it sits beside the coordinator");
    let web = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let db = cluster.create_vm(&VmTemplate::new("db", 102)).unwrap();
    bring(&cluster, "web", &coordinator);
    bring(&cluster, "db", &host);
    Pair { cluster, coordinator, host, web, db, _turn: turn }
}

/// Pulls the plug of one of the two: its VM runs on the other, whose own never stops.
fn lose(pair: &Pair, lost: &str, left: &str, moves: &GuestVm, stays: &GuestVm) {
    let cluster = &pair.cluster;
    let qemu = cluster.qemu_pid(left, &stays.id).unwrap();
    let probe = stays.probe().unwrap();
    let writer = moves.writer(Duration::from_millis(10)).unwrap();
    probe.wait_for(DEADLINE, |sample| sample.answered.is_some()).unwrap();
    let cut = cluster.host(lost).unwrap().power_off().unwrap();
    let started = cluster.watch().wait_started(&moves.id, cut.dead, DEADLINE).unwrap();
    assert_eq!(started.host.as_deref(), Some(left));
    let after = started.first_seen.saturating_duration_since(cut.at);
    println!("{lost} lost: its VM's QEMU runs on {left} after {after:?}");
    cluster.wait_vm(&moves.name, DEADLINE, elsewhere(lost)).unwrap();
    moves.wait_answer(DEADLINE).unwrap();
    assert_eq!(cluster.qemu_pid(left, &stays.id).unwrap(), qemu, "the survivor's own VM never stopped");
    let report = probe.stop();
    assert_eq!(report.boots().len(), 1, "its guest booted once");
    println!("the survivor's own guest was silent for {:?} at most", report.longest_gap());

    cluster.power_on_all().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    settled(cluster, 3);
    hosted(cluster);
    let wrote = writer.stop().unwrap();
    cluster.assert_clean(&[(moves, &wrote.acknowledged), (stays, &[])]).unwrap();
}

#[test]
fn the_host_of_the_witness_is_lost() {
    let pair = pair();
    lose(&pair, &pair.host, &pair.coordinator, &pair.db, &pair.web);
}

#[test]
fn the_coordinator_is_lost() {
    let pair = pair();
    lose(&pair, &pair.coordinator, &pair.host, &pair.web, &pair.db);
}

#[test]
fn the_witness_s_disk_alone_is_lost_and_costs_nothing() {
    let pair = pair();
    let cluster = &pair.cluster;
    let qemus = |pair: &Pair| {
        let web = pair.cluster.qemu_pid(&pair.coordinator, &pair.web.id).unwrap();
        (web, pair.cluster.qemu_pid(&pair.host, &pair.db.id).unwrap())
    };
    let before = qemus(&pair);
    let since = cluster.last_event().unwrap();
    let (path, aside) = (disk(cluster), cluster.on_volume("witness.aside"));
    fs::rename(&path, &aside).unwrap();
    // Its vote goes, and with two nodes one votes.
    settled(cluster, 1);
    let view = cluster.any().unwrap().witness().unwrap();
    assert!(!view.healthy && view.why.is_some(), "{view:?}");
    assert!(cluster.any().unwrap().cluster().unwrap().warnings.iter().any(|text| text.contains("witness")));
    fs::rename(&aside, &path).unwrap();
    settled(cluster, 3);
    hosted(cluster);
    assert_eq!(lost_since(cluster, since), Vec::<String>::new());
    assert_eq!(qemus(&pair), before);
    cluster.assert_clean(&[(&pair.web, &[]), (&pair.db, &[])]).unwrap();
}

#[test]
fn cut_from_each_other_exactly_one_node_goes_on() {
    let pair = pair();
    let cluster = &pair.cluster;
    let cut = Instant::now();
    cluster.lab().fabric().partition(&[&pair.coordinator], &[&pair.host]).unwrap();
    // The witness is with its host, so that one is elected; both still see the disk.
    let started = cluster.watch().wait_started(&pair.web.id, cut, DEADLINE).unwrap();
    assert_eq!(started.host.as_deref(), Some(pair.host.as_str()));
    let alone = cluster.client(&pair.coordinator).quorum().unwrap();
    assert!(!alone.has_quorum, "{alone:?}");
    pair.web.wait_answer(DEADLINE).unwrap();
    cluster.lab().fabric().heal().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    settled(cluster, 3);
    hosted(cluster);
    cluster.assert_clean(&[(&pair.web, &[]), (&pair.db, &[])]).unwrap();
}

#[test]
fn a_host_that_stood_still_beyond_its_lease_speaks_for_the_witness_no_more() {
    let pair = pair();
    let cluster = &pair.cluster;
    let epoch = hosted(cluster).epoch;
    let qemu = cluster.qemu_pid(&pair.host, &pair.db.id).unwrap();
    let pid = cluster.stop_agent(&pair.host).unwrap();
    // The coordinator takes the witness over; without it it would have no quorum.
    let taken = |view: &WitnessView| view.epoch > epoch && view.hosted_by.as_deref() == Some(&pair.coordinator);
    let view = cluster
        .wait_on(&pair.coordinator, "the coordinator hosts", DEADLINE, |client| client.witness().ok().filter(taken))
        .unwrap();
    cluster.go_on(&pair.host, pid).unwrap();
    settled(cluster, 3);
    let view_now = hosted(cluster);
    assert!(view_now.epoch >= view.epoch, "{view_now:?}");
    assert_eq!(cluster.qemu_pid(&pair.host, &pair.db.id).unwrap(), qemu, "its VM noticed nothing");
    cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    cluster.assert_clean(&[(&pair.web, &[]), (&pair.db, &[])]).unwrap();
}

#[test]
fn what_is_no_blank_disk_of_all_nodes_is_refused() {
    let (cluster, _turn) = form(holdfast_lab::cluster::ClusterSpec { nodes: 2, ..spec() });
    let client = cluster.any().unwrap();
    let used = cluster.on_volume("used.disk");
    let mut bytes = vec![0; 32 << 20];
    bytes[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
    fs::write(&used, &bytes).unwrap();
    let (code, text) = refused(client.set_witness(&used.to_string_lossy()));
    assert!(code == "bad_disk" && text.contains("ext file system"), "{code}: {text}");
    assert_eq!(fs::read(&used).unwrap(), bytes);
    let (_, text) = refused(client.set_witness("witness"));
    assert!(text.contains("absolute"), "{text}");
    let (_, text) = refused(client.set_witness("/nowhere/witness"));
    assert!(text.contains("/nowhere"), "{text}");
    let (code, _) = refused(client.witness());
    assert_eq!(code, "not_found");
    client.set_witness(&disk(&cluster)).unwrap();
    settled(&cluster, 3);
    let (code, text) = refused(client.set_witness(&disk(&cluster)));
    assert!(code == "conflict" && text.contains("already"), "{code}: {text}");
    client.delete("/api/v1/quorum/witness").unwrap();
    settled(&cluster, 1);
    let again = || client.set_witness(&disk(&cluster)).ok();
    cluster.wait("the same disk, made anew", DEADLINE, |_| again()).unwrap();
    settled(&cluster, 3);
    hosted(&cluster);
}
