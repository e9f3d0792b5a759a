//! The coordination is handed over when an operator asks for it, and by a node
//! that is stopped in order: no node's lease suffers, no VM notices.

use holdfast_api::NodeState;
use holdfast_lab::cluster::{Cluster, VmTemplate};

use crate::bench::{DEADLINE, refused, three_nodes};

/// Every node's name and term: a term counts the node's admissions.
fn terms(cluster: &Cluster) -> Vec<(String, u64)> {
    let nodes = cluster.any().unwrap().nodes().unwrap();
    nodes.into_iter().map(|node| (node.name, node.term)).collect()
}

#[test]
fn the_coordination_is_handed_over_and_nothing_else_changes() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let before = terms(&cluster);
    let first = cluster.coordinator().unwrap();
    let others = cluster.followers().unwrap();

    // Whoever is asked, and by name or not.
    let api = cluster.client(&others[1]);
    assert_eq!(api.hand_over(Some(&others[0])).unwrap().coordinator, others[0]);
    assert_eq!(api.cluster().unwrap().coordinator.as_deref(), Some(&*others[0]));
    let next = cluster.client(&first).hand_over(None).unwrap().coordinator;
    assert_ne!(next, others[0]);
    let (code, why) = refused(api.hand_over(Some(&next)));
    assert!(code == "conflict" && why.contains(&next) && why.contains("already"), "{code} {why}");
    assert_eq!(refused(api.hand_over(Some("n9"))).0, "not_found");

    // The one that is stopped does not leave its election to the others' patience.
    let host = cluster.host(&next).unwrap();
    host.stop_service().unwrap();
    let named = |host: &holdfast_lab::Host| cluster.client(host.name()).cluster().unwrap().coordinator;
    let left: Vec<_> = cluster.hosts().into_iter().filter(|host| host.name() != next).collect();
    let ousted = left.iter().any(|host| named(host).as_deref() != Some(&*next));
    assert!(ousted, "all still take {next}, which has stopped, for the coordinator");
    cluster.wait_node(&next, DEADLINE, |node| node.state == NodeState::Lost).unwrap();
    let (code, why) = refused(cluster.client(left[0].name()).hand_over(Some(&next)));
    assert!(code == "conflict" && why.contains(&next), "{code} {why}");

    host.start_service().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let after = terms(&cluster);
    for (before, after) in before.iter().zip(&after) {
        assert!(before == after || before.0 == next, "{before:?} became {after:?}");
    }
    vm.wait_answer(DEADLINE).unwrap();
    cluster.assert_clean(&[(&vm, &[])]).unwrap();
}
