//! A node that is cut off from the others kills its VMs before they start
//! elsewhere; a network that is not the only one may fail without consequence.

use std::time::{Duration, Instant};

use holdfast_api::{NodeState, VmState};
use holdfast_lab::Network;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, bring, elsewhere, three_nodes};

#[test]
fn a_node_that_is_cut_off_stops_its_vms_before_they_start_elsewhere() {
    let (cluster, _turn) = three_nodes();
    let fabric = cluster.lab().fabric();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    for which in ["a follower", "the coordinator"] {
        let node = match which {
            "a follower" => cluster.followers().unwrap().remove(0),
            _ => cluster.coordinator().unwrap(),
        };
        bring(&cluster, "web", &node);
        cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        let hosts = cluster.hosts();
        let rest: Vec<&str> = hosts.iter().map(|host| host.name()).filter(|name| *name != node).collect();
        let cut = Instant::now();
        // The guest's users still reach it: all that is gone is the others' word.
        fabric.partition(&[&node], &rest).unwrap();

        let again = cluster.watch().wait_started(&vm.id, cut, DEADLINE).unwrap();
        assert_ne!(again.host.as_deref(), Some(node.as_str()));
        let timeline = cluster.watch().timeline();
        let here =
            timeline.iter().rfind(|seen| seen.vm == vm.id && seen.host.as_deref() == Some(node.as_str())).unwrap();
        let died = here.gone.expect("it still runs on the node that was cut off");
        println!("{which}: dead after {:?}, elsewhere after {:?}", died - cut, again.first_seen - cut);
        assert!(died < again.first_seen);
        let view = cluster.wait_vm("web", DEADLINE, elsewhere(&node)).unwrap();
        assert_eq!(view.node, again.host);
        // What the cut-off node agrees to nobody else knows: it says no.
        let refused = cluster.client(&node).stop_vm("web", true).unwrap_err();
        assert!(["no_coordinator", "unknown"].contains(&refused.code()), "{refused}");

        fabric.heal().unwrap();
        cluster.wait_node(&node, DEADLINE, |node| node.state == NodeState::Up).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
        vm.wait_answer(DEADLINE).unwrap();
    }
    cluster.assert_clean(&[(&vm, &writer.stop().unwrap().acknowledged)]).unwrap();
}

#[test]
fn nothing_fails_over_when_the_heartbeat_network_alone_fails() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let before = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    let since = cluster.last_event().unwrap();
    for host in cluster.hosts() {
        cluster.lab().fabric().pull(host.name(), Network::Heartbeat).unwrap();
    }
    // Long enough for three leases to end.
    let lease = Duration::from_millis(cluster.any().unwrap().cluster().unwrap().lease_ms);
    let lost = cluster.wait_event(since, 3 * lease, |event| {
        event.text.contains("lost") || (event.subject == "vm web" && event.text.contains("start"))
    });
    assert!(lost.is_err(), "{lost:?}");
    let nodes = cluster.any().unwrap().nodes().unwrap();
    assert!(nodes.iter().all(|node| node.state == NodeState::Up), "{nodes:?}");
    let after = cluster.any().unwrap().vm("web").unwrap();
    assert_eq!((after.epoch, after.state, after.node), (before.epoch, VmState::Running, before.node));
    cluster.assert_clean(&[(&vm, &[])]).unwrap();
}
