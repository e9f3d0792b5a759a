//! The keeper stands still beyond its lease and goes on later. Nobody ends its VM
//! when the lease ends, so the VM outlives it for as long as the keeper stands
//! still. What keeps it from writing after it runs elsewhere is, here, QEMU's
//! image lock: while the old QEMU lives no new one gets the disk. On a host with a
//! hardware watchdog that host is reset, which is another test's.

use std::time::Duration;

use holdfast_api::{NodeState, VmState};
use holdfast_lab::cluster::VmTemplate;
use nix::sys::signal::Signal;

use crate::bench::{DEADLINE, bring, elsewhere, eventually, three_nodes};

#[test]
fn a_vm_of_a_keeper_that_stood_still_writes_nothing_after_it_runs_elsewhere() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let node = cluster.followers().unwrap().remove(0);
    bring(&cluster, "web", &node);
    let old = vm.wait_answer(DEADLINE).unwrap().boot_id;
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    vm.client().unwrap().write(DEADLINE).unwrap();

    let host = cluster.host(&node).unwrap();
    let (keeper, qemu) = (cluster.keeper_pid(&node).unwrap(), cluster.qemu_pid(&node, &vm.id).unwrap());
    let since = cluster.last_event().unwrap();
    host.kill(keeper, Signal::SIGSTOP).unwrap();
    let subject = format!("node {node}");
    cluster.wait_event(since, DEADLINE, |event| event.subject == subject && event.text.contains("is lost")).unwrap();
    // It has a right to run elsewhere now, and what tries to is kept out.
    let locked = |event: &holdfast_api::Event| event.subject == "vm web" && event.text.contains("is in use");
    let (told, _) = cluster.wait_event(since, DEADLINE, locked).unwrap();
    println!("while the keeper of {node} stands still: {}", told.text);
    assert_eq!(cluster.qemu_pid(&node, &vm.id).unwrap(), qemu, "nobody could end it");
    // It waits for that lock, however often it has to try, and says so.
    let tried = |times: u32| move |vm: &holdfast_api::VmView| vm.standing.contains(&format!("tried {times} times"));
    let waits = cluster.wait_vm("web", DEADLINE, tried(4)).unwrap();
    println!("{}", waits.standing);
    assert_eq!((waits.state, waits.crashes), (VmState::Waiting, 0), "{waits:?}");
    let holder = format!("most likely its own on {node}, whose lease ended");
    assert!(waits.standing.contains("waits for the image lock") && waits.standing.contains(&holder));
    // The old guest goes on all this while: its writes are whole, and before the new one's.
    assert_eq!(vm.client().unwrap().write(DEADLINE).unwrap().boot_id, old);

    host.kill(keeper, Signal::SIGCONT).unwrap();
    eventually("the old QEMU to be gone", || cluster.qemu_pid(&node, &vm.id).is_err().then_some(()));
    let view = cluster.wait_vm("web", DEADLINE, elsewhere(&node)).unwrap();
    assert_eq!((view.crashes, view.hold), (0, None), "{}", view.standing);
    assert_ne!(vm.wait_answer(DEADLINE).unwrap().boot_id, old);
    vm.client().unwrap().write(DEADLINE).unwrap();
    cluster.wait_node(&node, DEADLINE, |node| node.state == NodeState::Up).unwrap();

    let acknowledged = writer.stop().unwrap().acknowledged;
    cluster.switch_off("web").unwrap();
    let report = vm.verify().unwrap();
    assert!(report.missing.is_empty() && report.corrupt_sectors.is_empty(), "{report:?}");
    assert_eq!(report.lost(&acknowledged), [], "acknowledged, and gone");
    // Each boot's records come before all of the next boot's: had the old guest
    // written once more, its record would stand among the new one's, or under one.
    let records: Vec<_> = (1..=report.highest).filter_map(|sequence| report.record(sequence)).collect();
    let of_old = records.iter().filter(|record| record.boot_id == old).count();
    assert!(of_old > 0 && of_old < records.len(), "{of_old} of {}", records.len());
    assert!(records.is_sorted_by_key(|record| record.epoch));
    assert!(records[..of_old].iter().all(|record| record.boot_id == old));
    println!("{} records, the first {of_old} by the old guest", records.len());
}
