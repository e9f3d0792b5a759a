//! A VM's life, by the API.

use std::time::Duration;

use holdfast_api::{DesiredState, VmState};
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, refused, three_nodes};
use crate::postmortem::examine;

#[test]
fn a_vm_boots_pauses_restarts_stops_and_is_deleted() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let running = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    let node = running.node.clone().unwrap();
    let mut client = vm.client().unwrap();
    let first = client.write(DEADLINE).unwrap();

    // Whichever node is asked, the console is that of the node that runs it.
    for host in cluster.hosts() {
        let mut console = cluster.client(host.name()).console("web").unwrap();
        console.type_line(&format!("echo hello-{}", host.name())).unwrap();
        console.wait_for(&format!("hello-{}", host.name()), DEADLINE).unwrap();
    }

    let api = cluster.any().unwrap();
    cluster.job_done(&api.pause_vm("web").unwrap(), DEADLINE).unwrap();
    cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Paused).unwrap();
    assert!(client.ping(Duration::from_millis(500)).is_err(), "a paused guest answered");
    assert_eq!(refused(api.start_vm("web")).0, "conflict");
    cluster.job_done(&api.resume_vm("web").unwrap(), DEADLINE).unwrap();
    assert_eq!(client.ping(DEADLINE).unwrap().boot_id, first.boot_id);

    cluster.job_done(&api.restart_vm("web").unwrap(), DEADLINE).unwrap();
    client.ping(DEADLINE).unwrap();
    let second = client.write(DEADLINE).unwrap();
    assert_ne!(second.boot_id, first.boot_id);
    let restarted = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    assert_eq!(restarted.node, Some(node));
    assert!(restarted.epoch > running.epoch && restarted.crashes == 0);

    assert_eq!(refused(api.delete_vm("web")).0, "conflict");
    let stopped = cluster.job_done(&api.stop_vm("web", false).unwrap(), DEADLINE).unwrap();
    assert_eq!(stopped.work, "stop");
    let off = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Off).unwrap();
    assert_eq!((off.node, off.desired, off.hold), (None, DesiredState::Off, None));
    assert_eq!(refused(api.stop_vm("web", false)).0, "conflict");

    cluster.job_done(&api.start_vm("web").unwrap(), DEADLINE).unwrap();
    client.ping(DEADLINE).unwrap();
    let third = client.write(DEADLINE).unwrap();
    // The guest that ends itself stays off.
    assert_eq!(client.command("poweroff", DEADLINE).unwrap(), "ok");
    let ended = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Off);
    if let Err(error) = ended {
        // Who is to blame: a guest that did not end, or a cluster that did not see it?
        let answer = client.ping(Duration::from_secs(2));
        let found = examine(&cluster, &vm);
        panic!("the guest was told to end, and answers {answer:?}: {error:#}\n{found}");
    }
    cluster.assert_clean(&[(&vm, &[first, second, third])]).unwrap();

    let causes = api.explain("web").unwrap().causes;
    assert!(causes.iter().any(|cause| cause.text.contains("shut")), "{causes:?}");
    cluster.job_done(&api.delete_vm("web").unwrap(), DEADLINE).unwrap();
    assert_eq!(refused(api.vm("web")).0, "not_found");
    assert!(!vm.image.exists(), "{} is left", vm.image.display());
}
