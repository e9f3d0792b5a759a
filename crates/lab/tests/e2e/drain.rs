//! A node is emptied for maintenance, while another one is lost, and takes VMs again.

use holdfast_api::{NodeState, NodeView};
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, bring, eventually, refused, three_nodes};

#[test]
fn a_node_is_drained_while_another_is_lost_and_resumed() {
    let (cluster, _turn) = three_nodes();
    let coordinator = cluster.coordinator().unwrap();
    let [drained, lost]: [String; 2] = cluster.followers().unwrap().try_into().unwrap();
    let web = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let db = cluster.create_vm(&VmTemplate::new("db", 102)).unwrap();
    bring(&cluster, "web", &drained);
    bring(&cluster, "db", &lost);
    let client = cluster.client(&coordinator);
    let nothing = serde_json::json!({});

    // It is told what it does, and that somebody is to look at it.
    let told: NodeView = client.post(&format!("/api/v1/nodes/{drained}/drain"), &nothing).unwrap();
    assert!(told.drained_since_ms.is_some(), "{told:?}");
    cluster.host(&lost).unwrap().power_off().unwrap();
    cluster.wait_node(&lost, DEADLINE, |node| node.state == NodeState::Lost).unwrap();
    for vm in ["web", "db"] {
        let there = |view: &holdfast_api::VmView| view.node.as_ref() == Some(&coordinator);
        cluster.wait_vm(vm, DEADLINE, there).unwrap();
    }
    let empty = eventually("the node to be empty", || {
        client.get::<NodeView>(&format!("/api/v1/nodes/{drained}")).ok().filter(|node| node.vms == 0)
    });
    assert_eq!(empty.stays, []);
    let warnings = client.cluster().unwrap().warnings;
    assert!(warnings.iter().any(|text| text.contains(&drained) && text.contains("drained")), "{warnings:?}");
    let request = holdfast_api::MigrateVm { to: Some(drained.clone()) };
    let (code, why) = refused(client.post::<serde_json::Value>("/api/v1/vms/web/migrate", &request));
    assert!(code == "no_room" && why.contains("drained for maintenance"), "{code} {why}");

    let _: NodeView = client.post(&format!("/api/v1/nodes/{drained}/resume"), &nothing).unwrap();
    bring(&cluster, "web", &drained);
    web.wait_answer(DEADLINE).unwrap();
    db.wait_answer(DEADLINE).unwrap();
    cluster.assert_clean(&[(&web, &[]), (&db, &[])]).unwrap();
}
