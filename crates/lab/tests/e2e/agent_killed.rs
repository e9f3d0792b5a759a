//! The agent is killed while a VM runs: no VM notices, the keeper starts the
//! agent again, and that adopts the VM.

use std::time::{Duration, Instant};

use holdfast_api::VmState;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, bring, three_nodes};

#[test]
fn no_vm_notices_that_an_agent_dies() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let boot = vm.wait_answer(DEADLINE).unwrap().boot_id;
    let since = cluster.last_event().unwrap();
    let (writer, session, prober) =
        (vm.writer(Duration::from_millis(10)).unwrap(), vm.session().unwrap(), vm.probe().unwrap());
    for which in ["a follower", "the coordinator"] {
        let node = match which {
            "a follower" => cluster.followers().unwrap().remove(0),
            _ => cluster.coordinator().unwrap(),
        };
        bring(&cluster, "web", &node);
        let moved = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        let qemu = cluster.qemu_pid(&node, &vm.id).unwrap();
        let (old, killed) = (cluster.agent_pid(&node).unwrap(), Instant::now());
        cluster.kill_agent(&node).unwrap();
        let new = crate::bench::eventually("a new agent", || cluster.agent_pid(&node).ok().filter(|pid| *pid != old));
        cluster.wait_api(&node, DEADLINE).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
        println!("agent of {which} {old} -> {new}; all in order after {:?}", killed.elapsed());

        let view = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        assert_eq!((view.node.as_ref(), view.epoch), (Some(&node), moved.epoch));
        assert_eq!(cluster.qemu_pid(&node, &vm.id).unwrap(), qemu);
        // Adopted: it obeys.
        let api = cluster.client(&node);
        cluster.job_done(&api.pause_vm("web").unwrap(), DEADLINE).unwrap();
        cluster.job_done(&api.resume_vm("web").unwrap(), DEADLINE).unwrap();
    }
    let lost = |event: &holdfast_api::Event| event.subject.starts_with("node ") && event.text.contains("lost");
    let events = cluster.any().unwrap().events(since).unwrap();
    assert!(!events.iter().any(lost), "{events:#?}");
    assert_eq!(prober.stop().boots(), [boot]);
    assert_eq!(session.stop().unwrap().failure, None);
    cluster.assert_clean(&[(&vm, &writer.stop().unwrap().acknowledged)]).unwrap();
}
