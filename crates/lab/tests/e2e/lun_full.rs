//! A LUN with more promised than there is: a VM whose write finds no room stands still
//! and says why, and goes on by itself when another one's disk is gone.

use std::time::Duration;

use holdfast_api::VmState;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, three_nodes};

/// Three slabs, and each guest needs one.
const LUN_BYTES: u64 = 64 << 20;
const SLAB_BYTES: u64 = 16 << 20;

#[test]
fn a_vm_that_finds_no_room_waits_and_goes_on_when_there_is_some() {
    let (cluster, _turn) = three_nodes();
    cluster.add_lun("san", LUN_BYTES).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let began = cluster.last_event().unwrap();

    // Nodes keep some ahead, so it may be any but the first that finds nothing.
    let mut writers = Vec::new();
    let waiting = (0..4).find_map(|number| {
        let name = format!("vm{number}");
        let template = VmTemplate::new(&name, 101 + number).memory(192 << 20).disk("san", SLAB_BYTES);
        let vm = cluster.create_vm_unawaited(&template).unwrap();
        let writer = vm.writer(Duration::from_millis(10)).unwrap();
        let stands =
            cluster.wait(&name, DEADLINE, |api| match api.vms().ok()?.into_iter().find(|vm| vm.name == name)? {
                vm if vm.state == VmState::Waiting => Some(true),
                _ => (writer.highest() > 0).then_some(false),
            });
        writers.push(writer);
        stands.unwrap().then_some(name)
    });
    let waiting = waiting.expect("four guests need more than there is");
    assert_ne!(waiting, "vm0");

    let view = cluster.wait_vm(&waiting, DEADLINE, |vm| vm.hold.is_some()).unwrap();
    assert!(view.hold.as_ref().is_some_and(|why| why.contains("waits for room on volume san")), "{view:?}");
    assert!(view.standing.contains("waits for room on volume san"), "{}", view.standing);
    let said = |text: &'static str| {
        cluster.wait_event(began, DEADLINE, move |event| event.text.contains(text)).unwrap();
    };
    said("it waits for room on volume san");
    said("is full");
    let warnings = cluster.any().unwrap().cluster().unwrap().warnings;
    assert!(warnings.iter().any(|text| text.contains("volume san is full")), "{warnings:?}");
    assert!(warnings.iter().any(|text| text.contains(&waiting)), "{warnings:?}");
    let volume = cluster.any().unwrap().volumes().unwrap().into_iter().find(|volume| volume.name == "san").unwrap();
    println!("{volume:?}");
    assert_eq!(volume.size_bytes, Some(3 * SLAB_BYTES));

    // Its disk is gone, and with it what the other one waits for.
    cluster.switch_off("vm0").unwrap();
    let job = cluster.any().unwrap().delete_vm("vm0").unwrap();
    cluster.job_done(&job, DEADLINE).unwrap();
    cluster.wait_vm(&waiting, DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    let writer = writers.pop().unwrap();
    cluster.wait("a record", DEADLINE, |_| (writer.highest() > 0).then_some(())).unwrap();
    let report = writer.stop().unwrap();
    assert_eq!(report.refused, 0, "the guest saw an error");
}
