//! The plug of a node is pulled: its VMs are back elsewhere, with every record
//! that was acknowledged, and never ran twice.

use std::time::{Duration, Instant};

use holdfast_api::{NodeState, Priority, VmState};
use holdfast_lab::cluster::{Cluster, GuestVm, VmTemplate};

use crate::bench::{DEADLINE, bring, elsewhere, three_nodes};

/// Pulls the plug of a node under a VM and waits until the VM serves elsewhere.
fn pull(cluster: &Cluster, vm: &GuestVm, node: &str) {
    let since = cluster.last_event().unwrap();
    let cut = cluster.host(node).unwrap().power_off().unwrap();
    let lost = format!("node {node}");
    let (_, told) =
        cluster.wait_event(since, DEADLINE, |event| event.subject == lost && event.text.contains("lost")).unwrap();
    let started = cluster.watch().wait_started(&vm.id, cut.dead, DEADLINE).unwrap();
    assert_ne!(started.host.as_deref(), Some(node));
    vm.wait_answer(DEADLINE).unwrap();
    let after = |moment: Instant| moment.saturating_duration_since(cut.at);
    println!(
        "{node}: declared lost after {:?}, QEMU elsewhere after {:?}, serving after {:?}",
        after(told),
        after(started.first_seen),
        cut.at.elapsed()
    );
    // No lease was cut short: the node might have been alive behind its dark links.
    assert!(after(started.first_seen) > Duration::from_millis(1500));
    let view = cluster.wait_vm(&vm.name, DEADLINE, elsewhere(node)).unwrap();
    assert_eq!(view.node, started.host);
    let causes = cluster.any().unwrap().explain(&vm.name).unwrap().causes;
    assert!(causes.iter().any(|cause| cause.text.contains(node)), "{causes:?}");
}

#[test]
fn a_follower_and_then_the_coordinator_lose_power() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();

    let follower = cluster.followers().unwrap().remove(0);
    bring(&cluster, "web", &follower);
    // One that nobody wants restarted elsewhere.
    let scratch = VmTemplate::new("scratch", 102).priority(Priority::None);
    cluster.create_vm(&scratch).unwrap();
    bring(&cluster, "scratch", &follower);
    pull(&cluster, &vm, &follower);
    let left = cluster.wait_vm("scratch", DEADLINE, |vm| vm.state == VmState::Off).unwrap();
    assert!(left.hold.as_ref().is_some_and(|why| why.contains("priority")), "{:?}", left.hold);
    cluster.power_on_all().unwrap();
    cluster.wait_node(&follower, DEADLINE, |node| node.state == NodeState::Up).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();

    let coordinator = cluster.coordinator().unwrap();
    bring(&cluster, "web", &coordinator);
    pull(&cluster, &vm, &coordinator);
    assert_ne!(cluster.coordinator().unwrap(), coordinator);
    cluster.power_on_all().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();

    let wrote = writer.stop().unwrap();
    assert!(wrote.acknowledged.len() > 10, "{} writes", wrote.acknowledged.len());
    cluster.assert_clean(&[(&vm, &wrote.acknowledged)]).unwrap();
}
