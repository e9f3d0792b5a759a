//! A VM's life at one node, by the API.

use holdfast_api::VmState;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, three_nodes};

#[test]
fn a_vm_boots_pauses_restarts_stops_and_is_deleted() {
    let (cluster, _turn) = three_nodes();
    println!("{:?}", cluster.times());
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    let wrote = vm.client().unwrap().write(DEADLINE).unwrap();
    cluster.assert_clean(&[(&vm, &[wrote])]).unwrap();
}
