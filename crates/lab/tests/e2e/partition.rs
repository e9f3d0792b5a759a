//! Four nodes part in halves: the side with a majority of the votes goes on, the
//! other stops its VMs, and they never run on both.

use std::time::{Duration, Instant};

use holdfast_api::{NodeState, VmState};
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, bring, eventually, form, spec};

#[test]
fn of_two_halves_one_goes_on_at_most() {
    let mut four = spec();
    four.nodes = 4;
    let (cluster, _turn) = form(four);
    let fabric = cluster.lab().fabric();
    let coordinator = cluster.coordinator().unwrap();
    let vms = [("one", 101), ("two", 102)].map(|(name, last)| cluster.create_vm(&VmTemplate::new(name, last)).unwrap());
    let writers = vms.each_ref().map(|vm| vm.writer(Duration::from_millis(10)).unwrap());
    let nodes = cluster.any().unwrap().nodes().unwrap();
    // With the coordinator on the side with fewer votes, where there is one.
    let (mut here, mut there) = (vec![coordinator.clone()], Vec::new());
    let mut others: Vec<_> = nodes.iter().filter(|node| node.name != coordinator).collect();
    others.sort_by_key(|node| node.voter);
    here.push(others.remove(0).name.clone());
    there.extend(others.iter().map(|node| node.name.clone()));
    let votes = |side: &[String]| nodes.iter().filter(|node| node.voter && side.contains(&node.name)).count();
    let majority = votes(&here) + votes(&there);
    let goes_on = |side: &[String]| votes(side) * 2 > majority;
    println!("{here:?} have {} votes, {there:?} {}", votes(&here), votes(&there));
    bring(&cluster, "one", &here[0]);
    bring(&cluster, "two", &there[0]);
    let qemus = [&here, &there].map(|side| {
        let on = |vm: &&_| cluster.qemu_pid(&side[0], vm).is_ok();
        let vm = vms.iter().map(|vm| vm.id.as_str()).find(on).unwrap();
        cluster.qemu_pid(&side[0], vm).unwrap()
    });
    let cut = Instant::now();
    let sides = [&here, &there].map(|side| side.iter().map(String::as_str).collect::<Vec<_>>());
    fabric.partition(&sides[0], &sides[1]).unwrap();

    for ((side, vm), qemu) in [&here, &there].into_iter().zip(&vms).zip(qemus) {
        if goes_on(side) {
            continue;
        }
        let gone = eventually("its VM is dead where it has no majority", || {
            cluster.watch().timeline().into_iter().find(|seen| seen.vm == vm.id && seen.pid == qemu)?.gone
        });
        println!("{side:?} without a majority: {} dead after {:?}", vm.name, gone - cut);
        if [&here, &there].into_iter().any(|side| goes_on(side)) {
            let again = cluster.watch().wait_started(&vm.id, cut, DEADLINE).unwrap();
            assert!(again.first_seen > gone);
            assert!(again.host.as_ref().is_some_and(|host| !side.contains(host)), "{again:?}");
        }
    }
    for (side, qemu) in [&here, &there].into_iter().zip(qemus) {
        if goes_on(side) {
            assert_eq!(cluster.watch().timeline().iter().find(|seen| seen.pid == qemu).unwrap().gone, None);
        }
    }

    fabric.heal().unwrap();
    for node in &nodes {
        cluster.wait_node(&node.name, DEADLINE, |node| node.state == NodeState::Up).unwrap();
    }
    for vm in &vms {
        cluster.wait_vm(&vm.name, DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        vm.wait_answer(DEADLINE).unwrap();
    }
    let [one, two] = writers.map(|writer| writer.stop().unwrap().acknowledged);
    cluster.assert_clean(&[(&vms[0], &one), (&vms[1], &two)]).unwrap();
}
