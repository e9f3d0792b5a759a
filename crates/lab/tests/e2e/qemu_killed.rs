//! A VM whose QEMU dies is started again in place; one that dies again and again
//! goes elsewhere, and in the end stays off and says why.

use std::time::{Duration, Instant};

use holdfast_api::VmState;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, three_nodes};

#[test]
fn a_vm_whose_qemu_dies_comes_back_until_its_budget_is_spent() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let home = cluster.node_of("web").unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    vm.client().unwrap().write(DEADLINE).unwrap();

    let mut homes = vec![home.clone()];
    let failed = loop {
        let view =
            cluster.wait_vm("web", DEADLINE, |vm| matches!(vm.state, VmState::Running | VmState::Failed)).unwrap();
        if view.state == VmState::Failed {
            break view;
        }
        let node = view.node.unwrap();
        let killed = Instant::now();
        cluster.kill_qemu(&node, &vm.id).unwrap();
        let again = cluster.watch().wait_started(&vm.id, killed, Duration::from_secs(5));
        let Ok(again) = again else { continue };
        println!("killed on {node}, again on {:?} after {:?}", again.host, again.first_seen - killed);
        homes.push(again.host.unwrap());
        if homes.len() == 2 {
            assert_eq!(homes[1], home, "not in place");
            vm.wait_answer(DEADLINE).unwrap();
        }
        assert!(homes.len() < 12, "no budget: {homes:?}");
        // Not the one that was just killed.
        cluster
            .wait_vm("web", DEADLINE, |vm| {
                vm.epoch > view.epoch && matches!(vm.state, VmState::Running | VmState::Failed)
            })
            .unwrap();
    };
    assert!(homes.iter().any(|node| *node != home), "never elsewhere: {homes:?}");
    assert!(failed.hold.as_ref().is_some_and(|why| why.contains("crash")), "{:?}", failed.hold);
    assert_eq!(failed.node, None);

    // A person may try again, and the budget is whole.
    let api = cluster.any().unwrap();
    cluster.job_done(&api.start_vm("web").unwrap(), DEADLINE).unwrap();
    vm.wait_answer(DEADLINE).unwrap();
    assert_eq!(cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap().crashes, 0);
    let wrote = writer.stop().unwrap();
    cluster.assert_clean(&[(&vm, &wrote.acknowledged)]).unwrap();
}
