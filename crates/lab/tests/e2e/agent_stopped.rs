//! An agent stands still for 10 s and goes on: no VM notices, and nothing fails
//! over, whichever node's agent it is.

use std::time::Duration;

use holdfast_api::VmState;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, all_but, bring, lost_since, three_nodes};

/// Six leases.
const STILL: Duration = Duration::from_secs(10);

#[test]
fn nothing_fails_over_while_an_agent_stands_still() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let boot = vm.wait_answer(DEADLINE).unwrap().boot_id;
    let (writer, prober) = (vm.writer(Duration::from_millis(10)).unwrap(), vm.probe().unwrap());
    for which in ["the coordinator", "a follower"] {
        let node = match which {
            "a follower" => cluster.followers().unwrap().remove(0),
            _ => cluster.coordinator().unwrap(),
        };
        bring(&cluster, "web", &node);
        let before = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        let qemu = cluster.qemu_pid(&node, &vm.id).unwrap();
        let since = cluster.last_event().unwrap();

        let agent = cluster.stop_agent(&node).unwrap();
        let others = all_but(&cluster, &[&node]);
        let other = cluster.client(&others[0]);
        // For as long as it stands still the others are a cluster, and nobody is lost.
        let failed_over = cluster.wait_event(since, STILL, |event| {
            event.text.starts_with("is lost") || (event.subject == "vm web" && event.text.contains("start"))
        });
        assert!(failed_over.is_err(), "{which} stood still: {failed_over:?}");
        let view = other.cluster().unwrap();
        let coordinator = view.coordinator.expect("no coordinator while an agent stands still");
        assert_ne!(coordinator, node);
        cluster.go_on(&node, agent).unwrap();

        cluster.wait_api(&node, DEADLINE).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
        // It did not come back as the coordinator that it was.
        let later = other.cluster().unwrap();
        assert_eq!((later.coordinator.as_ref(), later.term), (Some(&coordinator), view.term));
        let after = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        assert_eq!((after.epoch, after.node.as_ref()), (before.epoch, Some(&node)));
        assert_eq!(cluster.qemu_pid(&node, &vm.id).unwrap(), qemu);
        assert_eq!(lost_since(&cluster, since), [""; 0]);
        // And it obeys.
        cluster.job_done(&cluster.client(&node).pause_vm("web").unwrap(), DEADLINE).unwrap();
        cluster.job_done(&cluster.client(&node).resume_vm("web").unwrap(), DEADLINE).unwrap();
    }
    assert_eq!(prober.stop().boots(), [boot]);
    cluster.assert_clean(&[(&vm, &writer.stop().unwrap().acknowledged)]).unwrap();
}
