//! Removing a node: not while VMs are on it; one that is lost; one that coordinates.
//! Whoever was removed is told so, and can join again.

use holdfast_api::{JoinCluster, MakeJoinToken, NodeState, SwitchKind};
use holdfast_lab::cluster::{Cluster, VmTemplate};

use crate::bench::{DEADLINE, bring, elsewhere, refused, three_nodes};

#[test]
fn a_node_is_removed_when_nothing_runs_on_it_and_is_told_so() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let lost = cluster.followers().unwrap().remove(0);
    bring(&cluster, "web", &lost);

    // Its VM is named, and runs on.
    let (code, why) = refused(cluster.any().unwrap().delete(&format!("/api/v1/nodes/{lost}")));
    assert!(code == "conflict" && why.contains("web") && why.contains("move it away"), "{code} {why}");
    assert_eq!(cluster.node_of("web").unwrap(), lost);

    // A lost one goes, because its VM is elsewhere by then; what comes back learns of it.
    cluster.host(&lost).unwrap().power_off().unwrap();
    cluster.wait_vm("web", DEADLINE, elsewhere(&lost)).unwrap();
    cluster.wait_node(&lost, DEADLINE, |node| node.state == NodeState::Lost).unwrap();
    remove(&cluster, &lost);
    vm.wait_answer(DEADLINE).unwrap();
    cluster.host(&lost).unwrap().power_on().unwrap();
    is_told(&cluster, &lost);
    join_again(&cluster, &lost);

    // The coordinator hands over, and is told too.
    let coordinator = cluster.coordinator().unwrap();
    let other = cluster.followers().unwrap().remove(0);
    bring(&cluster, "web", &other);
    remove(&cluster, &coordinator);
    is_told(&cluster, &coordinator);
    let rest = cluster.client(&other);
    let switch = holdfast_api::AddSwitch { name: "later".into(), kind: SwitchKind::Private, uplink: None };
    rest.add_switch(&switch).unwrap();
    assert_eq!(rest.nodes().unwrap().len(), 2);
    // What is left can lose its coordinator in the same way: of two nodes one votes.
    let last = rest.cluster().unwrap().coordinator.unwrap();
    let stays = cluster.host(if last == other { &lost } else { &other }).unwrap();
    bring(&cluster, "web", stays.name());
    remove(&cluster, &last);
    is_told(&cluster, &last);
    let alone = cluster.client(stays.name());
    let (code, why) = refused(alone.delete(&format!("/api/v1/nodes/{}", stays.name())));
    assert!(code == "conflict", "{code} {why}");
    join_again(&cluster, &last);
    cluster.assert_clean(&[(&vm, &[])]).unwrap();
}

fn remove(cluster: &Cluster, node: &str) {
    cluster.any().unwrap().delete(&format!("/api/v1/nodes/{node}")).unwrap();
    cluster
        .wait(&format!("a cluster without {node}"), DEADLINE, |client| {
            let nodes = client.nodes().ok()?;
            let coordinator = client.cluster().ok()?.coordinator?;
            (coordinator != node && nodes.iter().all(|known| known.name != node)).then_some(())
        })
        .unwrap();
}

/// Waits until a host knows that it is no node any more.
fn is_told(cluster: &Cluster, host: &str) {
    let client = cluster.client(host);
    let why = crate::bench::eventually("the host to know that it was removed", || match client.vms() {
        Err(error) if error.code() == "not_in_cluster" => Some(error.to_string()),
        _ => None,
    });
    assert!(why.contains("was removed") && why.contains("node join") && why.contains("removed-"), "{why}");
}

fn join_again(cluster: &Cluster, host: &str) {
    let line = cluster.any().unwrap().make_join_token(&MakeJoinToken::default()).unwrap();
    let request = JoinCluster { address: line.address, token: line.token, site: None };
    assert_eq!(cluster.client(host).join(&request).unwrap().name, host);
    cluster.wait_node(host, DEADLINE, |node| node.state == NodeState::Up).unwrap();
}
