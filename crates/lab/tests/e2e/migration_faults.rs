//! Whatever dies during a migration, exactly one node owns the VM afterwards,
//! and its guest goes on or comes back.

use std::time::{Duration, Instant};

use holdfast_api::{JobState, JobView, VmState};
use holdfast_lab::Network;
use holdfast_lab::cluster::{Cluster, GuestVm, VmTemplate};

use crate::bench::{DEADLINE, eventually, three_nodes};

/// Starts a move that takes long, and returns when RAM is on its way.
fn slow_move(cluster: &Cluster, to: &str) -> JobView {
    cluster.lab().fabric().limit(to, Network::Migration, Some(40)).unwrap();
    let job = cluster.any().unwrap().migrate_vm("web", Some(to)).unwrap();
    cluster.wait("RAM on its way", DEADLINE, |client| client.job(job.id).ok().filter(|job| job.percent > 0)).unwrap()
}

/// Waits until the VM is in one place, and returns it.
fn settled(cluster: &Cluster, vm: &GuestVm, job: &JobView) -> (String, JobView) {
    let ended = cluster.wait_job(job.id, DEADLINE).unwrap();
    let view = cluster.wait_vm(&vm.name, DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    let owner = view.node.unwrap();
    vm.wait_answer(DEADLINE).unwrap();
    eventually("one QEMU, at its owner", || {
        let hosts = cluster.hosts();
        let running = hosts.iter().filter(|host| cluster.qemu_pid(host.name(), &vm.id).is_ok());
        running.map(|host| host.name().to_owned()).eq([owner.clone()]).then_some(())
    });
    (owner, ended)
}

fn others(cluster: &Cluster, node: &str) -> Vec<String> {
    cluster.hosts().iter().map(|host| host.name().to_owned()).filter(|name| name != node).collect()
}

#[test]
fn agents_die_during_a_migration() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101).memory(192 << 20).append("hf.fill=32")).unwrap();
    let boot = vm.wait_answer(DEADLINE).unwrap().boot_id;
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    let session = vm.session().unwrap();
    for end in ["source", "target", "coordinator"] {
        let home = cluster.node_of("web").unwrap();
        let coordinator = cluster.coordinator().unwrap();
        let away = others(&cluster, &home).into_iter().find(|name| *name != coordinator).unwrap();
        let job = slow_move(&cluster, &away);
        let victim = match end {
            "source" => &home,
            "target" => &away,
            _ => &coordinator,
        };
        cluster.kill_agent(victim).unwrap();
        cluster.lab().fabric().limit(&away, Network::Migration, None).unwrap();
        let (owner, ended) = settled(&cluster, &vm, &job);
        println!("agent of the {end} killed: {:?} {:?}, on {owner}", ended.state, ended.outcome);
        let expected = if ended.state == JobState::Done { &away } else { &home };
        assert_eq!(owner, *expected);
        assert_eq!(vm.wait_answer(DEADLINE).unwrap().boot_id, boot, "the guest noticed that the {end}'s agent died");
        cluster.wait_ready(DEADLINE).unwrap();
    }
    assert_eq!(session.stop().unwrap().failure, None);
    let wrote = writer.stop().unwrap();
    cluster.assert_clean(&[(&vm, &wrote.acknowledged)]).unwrap();
}

#[test]
fn the_target_and_then_the_source_lose_power_during_a_migration() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101).memory(192 << 20).append("hf.fill=32")).unwrap();
    let boot = vm.wait_answer(DEADLINE).unwrap().boot_id;
    let writer = vm.writer(Duration::from_millis(10)).unwrap();

    let home = cluster.node_of("web").unwrap();
    let away = others(&cluster, &home).remove(0);
    let job = slow_move(&cluster, &away);
    cluster.kill_qemu(&away, &vm.id).unwrap();
    let (owner, ended) = settled(&cluster, &vm, &job);
    assert_eq!((owner.as_str(), ended.state), (home.as_str(), JobState::Failed), "{ended:?}");
    assert!(ended.outcome.unwrap().why.is_some());

    let job = slow_move(&cluster, &away);
    cluster.host(&away).unwrap().power_off().unwrap();
    let (owner, ended) = settled(&cluster, &vm, &job);
    assert_eq!((owner.as_str(), ended.state), (home.as_str(), JobState::Failed), "{ended:?}");
    assert_eq!(vm.wait_answer(DEADLINE).unwrap().boot_id, boot);
    cluster.power_on_all().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();

    let job = slow_move(&cluster, &away);
    let cut = Instant::now();
    cluster.host(&home).unwrap().power_off().unwrap();
    cluster.watch().wait_for(DEADLINE, |seen| seen.vm == vm.id && !seen.incoming && seen.first_seen > cut).unwrap();
    let (owner, ended) = settled(&cluster, &vm, &job);
    assert!(owner != home && ended.state == JobState::Failed, "{owner} {ended:?}");
    assert_ne!(vm.wait_answer(DEADLINE).unwrap().boot_id, boot);
    let wrote = writer.stop().unwrap();
    cluster.assert_clean(&[(&vm, &wrote.acknowledged)]).unwrap();
}
