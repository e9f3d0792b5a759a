//! Frames get lost in one direction only, or between two nodes only: whoever is
//! not fully there leaves the cluster, and the larger connected side goes on.

use std::time::{Duration, Instant};

use holdfast_api::{NodeState, VmState};
use holdfast_lab::cluster::{Cluster, GuestVm, VmTemplate};

use crate::bench::{DEADLINE, all_but, bring, elsewhere, lost_since, three_nodes};

/// A VM whose QEMU must stay what it is.
struct Calm<'a> {
    vm: &'a GuestVm,
    node: String,
    qemu: i32,
}

impl<'a> Calm<'a> {
    fn on(cluster: &Cluster, vm: &'a GuestVm, node: &str) -> Self {
        bring(cluster, &vm.name, node);
        cluster.wait_vm(&vm.name, DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        Calm { vm, node: node.to_owned(), qemu: cluster.qemu_pid(node, &vm.id).unwrap() }
    }

    fn assert_undisturbed(&self, cluster: &Cluster) {
        let now = cluster.wait_vm(&self.vm.name, DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        assert_eq!(now.node.as_ref(), Some(&self.node));
        assert_eq!(cluster.qemu_pid(&self.node, &self.vm.id).unwrap(), self.qemu);
    }
}

#[test]
fn a_node_that_hears_nobody_or_is_heard_by_nobody_leaves_alone() {
    let (cluster, _turn) = three_nodes();
    let fabric = cluster.lab().fabric();
    let web = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let other = cluster.create_vm(&VmTemplate::new("other", 102)).unwrap();
    let writers = [&web, &other].map(|vm| vm.writer(Duration::from_millis(10)).unwrap());
    for (whom, deaf) in
        [("a follower", false), ("a follower", true), ("the coordinator", false), ("the coordinator", true)]
    {
        let node = match whom {
            "a follower" => cluster.followers().unwrap().remove(0),
            _ => cluster.coordinator().unwrap(),
        };
        let rest = all_but(&cluster, &[&node]);
        bring(&cluster, "web", &node);
        cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
        let calm = Calm::on(&cluster, &other, &rest[0]);
        let since = cluster.last_event().unwrap();
        let cut = Instant::now();
        for one in &rest {
            match deaf {
                true => fabric.drop_from(one, &node).unwrap(),
                false => fabric.drop_from(&node, one).unwrap(),
            }
        }

        let again = cluster.watch().wait_started(&web.id, cut, DEADLINE).unwrap();
        println!("{whom}, deaf {deaf}: elsewhere after {:?}", again.first_seen - cut);
        assert_ne!(again.host.as_deref(), Some(node.as_str()));
        cluster.wait_vm("web", DEADLINE, elsewhere(&node)).unwrap();
        calm.assert_undisturbed(&cluster);
        assert_ne!(cluster.coordinator().unwrap(), node);
        assert_eq!(lost_since(&cluster, since), [node.as_str()]);

        fabric.heal().unwrap();
        cluster.wait_node(&node, DEADLINE, |node| node.state == NodeState::Up).unwrap();
        cluster.wait_ready(DEADLINE).unwrap();
        calm.assert_undisturbed(&cluster);
        web.wait_answer(DEADLINE).unwrap();
    }
    let [of_web, of_other] = writers.map(|writer| writer.stop().unwrap().acknowledged);
    cluster.assert_clean(&[(&web, &of_web), (&other, &of_other)]).unwrap();
}

#[test]
fn two_nodes_that_cannot_see_each_other_are_no_reason_for_all_to_stop() {
    let (cluster, _turn) = three_nodes();
    let fabric = cluster.lab().fabric();
    let coordinator = cluster.coordinator().unwrap();
    let [near, far] = <[String; 2]>::try_from(cluster.followers().unwrap()).unwrap();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let other = cluster.create_vm(&VmTemplate::new("other", 102)).unwrap();
    let calm = Calm::on(&cluster, &other, &near);
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    bring(&cluster, "web", &far);
    let before = cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();

    // Two followers: who coordinates sees both, so nothing happens.
    let since = cluster.last_event().unwrap();
    fabric.partition(&[&near], &[&far]).unwrap();
    let lease = Duration::from_millis(cluster.client(&coordinator).cluster().unwrap().lease_ms);
    let lost = cluster.wait_event(since, 3 * lease, |event| event.text.starts_with("is lost"));
    assert!(lost.is_err(), "{lost:?}");
    assert_eq!(cluster.any().unwrap().vm("web").unwrap().epoch, before.epoch);
    fabric.heal().unwrap();

    // The coordinator and one of them: the one leaves, or the third leads both.
    let since = cluster.last_event().unwrap();
    let cut = Instant::now();
    fabric.partition(&[&coordinator], &[&far]).unwrap();
    let again = cluster.watch().wait_started(&vm.id, cut, DEADLINE).unwrap();
    assert_ne!(again.host.as_deref(), Some(far.as_str()));
    cluster.wait_vm("web", DEADLINE, elsewhere(&far)).unwrap();
    vm.wait_answer(DEADLINE).unwrap();
    calm.assert_undisturbed(&cluster);
    assert_eq!(lost_since(&cluster, since), [far.as_str()]);
    fabric.heal().unwrap();
    cluster.wait_node(&far, DEADLINE, |node| node.state == NodeState::Up).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    calm.assert_undisturbed(&cluster);
    cluster.assert_clean(&[(&vm, &writer.stop().unwrap().acknowledged), (&other, &[])]).unwrap();
}
