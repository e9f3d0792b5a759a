//! The keeper is killed: its VMs die with it, so they are started again only
//! after they were seen dead, and its node is admitted anew.

use std::time::{Duration, Instant};

use holdfast_api::VmState;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, bring, three_nodes};

#[test]
fn a_keeper_that_dies_takes_its_vms_along_and_they_come_back() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let node = cluster.followers().unwrap().remove(0);
    bring(&cluster, "web", &node);
    let before = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    let term = cluster.wait_node(&node, DEADLINE, |_| true).unwrap().term;
    let boot = vm.wait_answer(DEADLINE).unwrap().boot_id;
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    vm.client().unwrap().write(DEADLINE).unwrap();

    let killed = Instant::now();
    cluster.kill_keeper(&node).unwrap();
    let again = cluster.watch().wait_started(&vm.id, killed, DEADLINE).unwrap();
    println!("QEMU again on {:?} after {:?}", again.host, again.first_seen - killed);
    assert_ne!(vm.wait_answer(DEADLINE).unwrap().boot_id, boot);
    cluster.wait_node(&node, DEADLINE, |node| node.term > term).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let view = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    assert!(view.epoch > before.epoch);
    cluster.assert_clean(&[(&vm, &writer.stop().unwrap().acknowledged)]).unwrap();
}
