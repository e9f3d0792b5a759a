//! A VM under load moves to another node and back, and nobody loses anything;
//! a move that was cancelled leaves it where it was.

use std::time::Duration;

use holdfast_api::{JobState, VmState};
use holdfast_lab::Network;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, eventually, refused, three_nodes};

#[test]
fn a_vm_moves_there_and_back_under_load_and_a_cancelled_move_leaves_it() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101).memory(192 << 20).append("hf.fill=32")).unwrap();
    let boot = vm.wait_answer(DEADLINE).unwrap().boot_id;
    let client = vm.client().unwrap();
    client.command("dirty 20 16", DEADLINE).unwrap();
    let home = cluster.node_of("web").unwrap();
    let away = cluster.hosts().iter().map(|host| host.name().to_owned()).find(|name| *name != home).unwrap();

    let (writer, session, prober) =
        (vm.writer(Duration::from_millis(10)).unwrap(), vm.session().unwrap(), vm.probe().unwrap());
    for (from, to) in [(&home, &away), (&away, &home)] {
        let before = session.answered();
        let job = cluster.migrate("web", to, DEADLINE).unwrap();
        assert_eq!((job.from.as_ref(), job.to.as_ref()), (Some(from), Some(to)));
        let moved = job.moved.expect("QEMU's figures");
        println!("{from} -> {to}: {moved:?}");
        assert!(moved.total_ms > 0 && moved.downtime_ms < moved.total_ms);
        let view = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        assert_eq!(view.node.as_ref(), Some(to));
        assert_eq!(vm.wait_answer(DEADLINE).unwrap().boot_id, boot);
        eventually("the end of the source's QEMU", || cluster.qemu_pid(from, &vm.id).err());
        assert!(session.answered() > before);
    }
    let probed = prober.stop();
    println!("blackout {:?}, {} of {} pings lost", probed.longest_gap(), probed.lost(), probed.sent());
    assert_eq!(probed.boots(), [boot]);
    assert!(probed.longest_gap().unwrap().length < Duration::from_secs(2));

    // A slow wire, so that the move is still under way when it is cancelled.
    cluster.lab().fabric().limit(&away, Network::Migration, Some(8)).unwrap();
    let api = cluster.any().unwrap();
    assert_eq!(refused(api.migrate_vm("web", Some(&home))).0, "conflict");
    assert_eq!(refused(api.migrate_vm("web", Some("n9"))).0, "not_found");
    let job = api.migrate_vm("web", Some(&away)).unwrap();
    cluster
        .wait("the move's progress", DEADLINE, |client| {
            let job = client.job(job.id).ok()?;
            (job.percent > 0 && job.state == JobState::Running).then_some(())
        })
        .unwrap();
    assert_eq!(refused(api.migrate_vm("web", Some(&away))).0, "conflict");
    api.cancel_job(job.id).unwrap();
    let ended = cluster.wait_job(job.id, DEADLINE).unwrap();
    assert_eq!(ended.state, JobState::Cancelled, "{ended:?}");
    let view = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    assert_eq!((view.node.as_ref(), view.target), (Some(&home), None));
    cluster.lab().fabric().limit(&away, Network::Migration, None).unwrap();

    // What was cancelled can be done after all.
    cluster.migrate("web", &away, DEADLINE).unwrap();
    assert_eq!(vm.wait_answer(DEADLINE).unwrap().boot_id, boot);
    let session = session.stop().unwrap();
    assert_eq!(session.failure, None);
    let wrote = writer.stop().unwrap();
    assert!(wrote.acknowledged.len() > 50, "{} writes", wrote.acknowledged.len());
    cluster.assert_clean(&[(&vm, &wrote.acknowledged)]).unwrap();
}
