//! The power of the whole room fails: all that ran comes back by itself.

use std::time::Duration;

use holdfast_api::VmState;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, three_nodes};

#[test]
fn vms_come_back_after_all_nodes_lost_power_at_once() {
    let (cluster, _turn) = three_nodes();
    let one = cluster.create_vm(&VmTemplate::new("one", 101)).unwrap();
    let two = cluster.create_vm(&VmTemplate::new("two", 102)).unwrap();
    let off = cluster.create_vm(&VmTemplate::new("off", 103).off()).unwrap();
    let writers = [&one, &two].map(|vm| vm.writer(Duration::from_millis(10)).unwrap());
    let boots = [&one, &two].map(|vm| vm.client().unwrap().write(DEADLINE).unwrap().boot_id);

    std::thread::scope(|scope| {
        for host in cluster.hosts() {
            scope.spawn(move || host.power_off().unwrap());
        }
    });
    cluster.power_on_all().unwrap();
    for (vm, before) in [&one, &two].into_iter().zip(boots) {
        assert_ne!(vm.wait_answer(DEADLINE).unwrap().boot_id, before);
        cluster.wait_vm(&vm.name, DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    }
    cluster.wait_ready(DEADLINE).unwrap();
    assert_eq!(cluster.any().unwrap().vm(&off.name).unwrap().state, VmState::Off);
    let [wrote_one, wrote_two] = writers.map(|writer| writer.stop().unwrap().acknowledged);
    assert!(!wrote_one.is_empty() && !wrote_two.is_empty());
    cluster.assert_clean(&[(&one, &wrote_one), (&two, &wrote_two)]).unwrap();
}
