//! Memory is never overcommitted by failover: what matters most gets the room
//! there is, the rest stays off, says so, and starts when room appears.

use holdfast_api::{Priority, VmState};
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, form, refused, spec};

#[test]
fn what_does_not_fit_waits_in_order_of_priority() {
    let mut spec = spec();
    // Room for two VMs of 128 MiB with QEMU's own share on each node.
    spec.memory_per_node = "400M".into();
    let (cluster, _turn) = form(spec);
    // One small VM on each node, then an important one on two of them.
    for n in 1..=3_u8 {
        cluster.create_vm(&VmTemplate::new(&format!("low{n}"), 100 + n).priority(Priority::Low)).unwrap();
    }
    let high = cluster.create_vm(&VmTemplate::new("high", 110).priority(Priority::High)).unwrap();
    let other = cluster.create_vm(&VmTemplate::new("other", 111).priority(Priority::High)).unwrap();
    let api = cluster.any().unwrap();
    let big = VmTemplate::new("big", 120).memory(256 << 20);
    let (code, why) = refused(api.create_vm(&holdfast_api::CreateVm { vm: cluster.definition(&big), start: true }));
    assert_eq!(code, "no_room");
    assert!(why.contains("n1") && why.contains("n2") && why.contains("n3"), "{why}");

    let node = cluster.node_of("high").unwrap();
    assert_ne!(cluster.node_of("other").unwrap(), node);
    let vms = api.vms().unwrap();
    let mate = vms.iter().find(|vm| vm.name != "high" && vm.node.as_deref() == Some(&node)).unwrap().name.clone();
    assert!(mate.starts_with("low"), "{mate}");

    cluster.host(&node).unwrap().power_off().unwrap();
    cluster.wait_vm("high", DEADLINE, crate::bench::elsewhere(&node)).unwrap();
    high.wait_answer(DEADLINE).unwrap();
    let waiting = cluster.wait_vm(&mate, DEADLINE, |vm| vm.state == VmState::Waiting).unwrap();
    let why = waiting.hold.expect("a reason");
    assert!(why.contains("room"), "{why}");
    let nodes = cluster.any().unwrap().nodes().unwrap();
    assert!(nodes.iter().all(|node| node.memory_promised_bytes <= node.memory_bytes), "{nodes:?}");

    // Room appears when another VM is switched off.
    cluster.switch_off("other").unwrap();
    cluster.wait_vm(&mate, DEADLINE, |vm| vm.state == VmState::Running && vm.hold.is_none()).unwrap();
    // And when the node is back, what waits starts there.
    let api = cluster.any().unwrap();
    assert_eq!(refused(api.start_vm("other")).0, "no_room");
    cluster.power_on_all().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    cluster.job_done(&cluster.any().unwrap().start_vm("other").unwrap(), DEADLINE).unwrap();
    other.wait_answer(DEADLINE).unwrap();
    cluster.assert_clean(&[(&high, &[]), (&other, &[])]).unwrap();
}
