//! Votes follow the nodes: a cluster that loses its nodes one after the other runs
//! on to the last; one that loses most of them at once stops.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use holdfast_api::{QuorumView, VmState, VmView};
use holdfast_lab::cluster::{Cluster, VmTemplate};

use crate::bench::{DEADLINE, Turn, bring, form, spec};

fn five_nodes() -> (Cluster, Turn) {
    let mut spec = spec();
    spec.nodes = 5;
    spec.memory_per_node = "1G".into();
    form(spec)
}

fn voters(quorum: &QuorumView) -> BTreeSet<&str> {
    quorum.seats.iter().filter(|seat| seat.votes).map(|seat| seat.name.as_str()).collect()
}

/// Waits until the votes are settled, there are so many, and none is of a lost node.
fn settled(cluster: &Cluster, votes: usize, lost: &[String]) -> QuorumView {
    let reached = |quorum: &QuorumView| {
        let without_lost = voters(quorum).iter().all(|name| lost.iter().all(|lost| lost != name));
        quorum.settled && quorum.votes == votes && quorum.present == votes && without_lost
    };
    let what = format!("{votes} settled votes without {lost:?}");
    cluster.wait(&what, DEADLINE, |client| client.quorum().ok().filter(reached)).unwrap()
}

#[test]
fn four_of_five_nodes_are_lost_one_after_the_other() {
    let (cluster, _turn) = five_nodes();
    let web = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let db = cluster.create_vm(&VmTemplate::new("db", 102)).unwrap();
    let writer = web.writer(Duration::from_millis(10)).unwrap();
    let whole = settled(&cluster, 5, &[]);
    assert_eq!((whole.survives_at_once, whole.survives_in_turn), (2, 3), "{whole:?}");
    let mut lost = Vec::new();
    for (left, votes) in [(4, 3), (3, 3), (2, 1), (1, 1)] {
        // The coordinator first of all. Of the last pair one votes, and it stays.
        let quorum = cluster.any().unwrap().quorum().unwrap();
        let coordinator = quorum.coordinator.clone().unwrap();
        let victim = match left {
            4 => coordinator,
            _ => {
                let alive = |name: &str| cluster.host(name).unwrap().is_on();
                let seats = quorum.seats.iter().map(|seat| seat.name.clone());
                let mut others = seats.filter(|name| alive(name) && *name != coordinator);
                let other = others.next().unwrap();
                cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
                bring(&cluster, "web", &other);
                other
            }
        };
        cluster.host(&victim).unwrap().power_off().unwrap();
        lost.push(victim);
        let quorum = settled(&cluster, votes, &lost);
        let expected = [0, 0, 0, 1, 2][left];
        assert_eq!(quorum.survives_in_turn, expected, "{left} left: {quorum:?}");
    }
    let on_the_last = |vm: &VmView| vm.state == VmState::Running && !lost.contains(vm.node.as_ref().unwrap());
    for vm in ["web", "db"] {
        cluster.wait_vm(vm, DEADLINE, on_the_last).unwrap();
    }
    web.wait_answer(DEADLINE).unwrap();
    db.wait_answer(DEADLINE).unwrap();
    let told = cluster.any().unwrap().events(0).unwrap();
    assert!(told.iter().any(|event| event.subject == "quorum" && event.text.contains("1 vote (")), "{told:?}");

    // They come back, and their votes with them.
    cluster.power_on_all().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    assert_eq!(settled(&cluster, 5, &[]).survives_at_once, 2);
    cluster.assert_clean(&[(&web, &writer.stop().unwrap().acknowledged), (&db, &[])]).unwrap();
}

#[test]
fn the_smaller_side_of_a_cluster_stops_its_vms() {
    let (cluster, _turn) = five_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let coordinator = cluster.coordinator().unwrap();
    // The coordinator is on the smaller side, and so is the VM.
    let others = cluster.followers().unwrap();
    let (small, large) = ([coordinator.as_str(), others[0].as_str()], [&others[1][..], &others[2][..], &others[3][..]]);
    bring(&cluster, "web", small[1]);
    let cut = Instant::now();
    cluster.lab().fabric().partition(&small, &large).unwrap();
    let again = cluster.watch().wait_started(&vm.id, cut, DEADLINE).unwrap();
    assert!(large.contains(&again.host.as_deref().unwrap()), "{again:?}");
    let timeline = cluster.watch().timeline();
    let before = timeline.iter().rfind(|seen| seen.vm == vm.id && seen.host.as_deref() == Some(small[1])).unwrap();
    let died = before.gone.expect("it still runs on the smaller side");
    println!("dead after {:?}, elsewhere after {:?}", died - cut, again.first_seen - cut);
    assert!(died < again.first_seen);
    let quorum = cluster.client(small[1]).quorum().unwrap();
    assert!(!quorum.has_quorum, "{quorum:?}");
    // Those three go on with the votes that they have: all of them.
    let quorum = settled(&cluster, 3, &small.map(String::from));
    assert_eq!(voters(&quorum), large.into_iter().collect());

    cluster.lab().fabric().heal().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    vm.wait_answer(DEADLINE).unwrap();
    cluster.assert_clean(&[(&vm, &[])]).unwrap();
}

#[test]
fn votes_are_spread_over_sites_and_a_node_that_flaps_moves_none() {
    let mut spec = spec();
    spec.nodes = 4;
    for (node, site) in [("n1", "east"), ("n2", "east"), ("n3", "east")] {
        spec = spec.configure(node, "site", site);
    }
    let (cluster, _turn) = form(spec);
    let client = cluster.any().unwrap();
    assert_eq!(client.set_site("n4", "west").unwrap().site.as_deref(), Some("west"));
    let west_votes = |quorum: &QuorumView| quorum.settled && voters(quorum).contains("n4");
    let quorum = cluster.wait("a vote for the other site", DEADLINE, |client| client.quorum().ok().filter(west_votes));
    assert_eq!(quorum.unwrap().votes, 3);
    let refused = client.set_site("n4", "not a name").unwrap_err();
    assert_eq!(refused.code(), "invalid");

    // The fourth is a node too many; it comes and goes, and no vote moves.
    let since = cluster.last_event().unwrap();
    let quorum = client.quorum().unwrap();
    let idle = quorum.seats.iter().find(|seat| !seat.votes).unwrap().name.clone();
    for _ in 0..3 {
        let before = cluster.last_event().unwrap();
        cluster.lab().fabric().pull_all(&idle).unwrap();
        cluster.wait_event(before, DEADLINE, |event| event.text.contains("is lost")).unwrap();
        cluster.lab().fabric().plug_all(&idle).unwrap();
        cluster.wait_event(before, DEADLINE, |event| event.text.contains("up again")).unwrap();
    }
    let moved = cluster.any().unwrap().events(since).unwrap();
    assert!(moved.iter().all(|event| event.subject != "quorum"), "{moved:?}");
}
