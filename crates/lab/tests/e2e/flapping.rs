//! Every link of a node comes and goes for 30 s: its VMs never run twice, nobody
//! else is disturbed, and when it is over all is as it should be.

use std::time::Duration;

use holdfast_api::{NodeState, VmState};
use holdfast_lab::cluster::VmTemplate;

use crate::bench::{DEADLINE, bring, lost_since, three_nodes};

const LENGTH: Duration = Duration::from_secs(30);

/// For how long the links are out and then in, in milliseconds: too short for a
/// lease to end, just long enough, and long enough for its VMs to be elsewhere.
const TIMES: [(u64, u64); 9] =
    [(200, 100), (600, 300), (1200, 200), (1450, 150), (1600, 50), (2500, 400), (100, 30), (1900, 900), (3000, 1500)];

#[test]
fn a_node_whose_links_flap_disturbs_nobody_else() {
    let (cluster, _turn) = three_nodes();
    let fabric = cluster.lab().fabric();
    let coordinator = cluster.coordinator().unwrap();
    let mut followers = cluster.followers().unwrap();
    let (node, calm) = (followers.remove(0), followers.remove(0));
    let web = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let other = cluster.create_vm(&VmTemplate::new("other", 102)).unwrap();
    bring(&cluster, "web", &node);
    bring(&cluster, "other", &calm);
    let boot = other.wait_answer(DEADLINE).unwrap().boot_id;
    let writers = [&web, &other].map(|vm| vm.writer(Duration::from_millis(10)).unwrap());
    let prober = other.probe().unwrap();
    let term = cluster.any().unwrap().cluster().unwrap().term;
    let since = cluster.last_event().unwrap();

    let times = TIMES.map(|(out, into)| (Duration::from_millis(out), Duration::from_millis(into)));
    let count = fabric.flap(&node, LENGTH, times.into_iter().cycle()).unwrap();

    let lost = lost_since(&cluster, since);
    let starts = cluster.watch().timeline().iter().filter(|seen| seen.vm == web.id).count() - 1;
    println!("{count} times out, {} times lost, its VM started {starts} more times", lost.len());
    assert!(!lost.is_empty() && lost.iter().all(|name| *name == node), "{lost:?}");
    // Each loss of its node moves a VM once at most.
    assert!(starts <= lost.len() + 1, "{starts} starts after {} losses", lost.len());
    cluster.wait_node(&node, DEADLINE, |node| node.state == NodeState::Up).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    web.wait_answer(DEADLINE).unwrap();
    let view = cluster.any().unwrap().cluster().unwrap();
    assert_eq!((view.coordinator.as_ref(), view.term), (Some(&coordinator), term), "others were made to elect");
    assert_eq!(prober.stop().boots(), [boot]);
    let [of_web, of_other] = writers.map(|writer| writer.stop().unwrap().acknowledged);
    cluster.assert_clean(&[(&web, &of_web), (&other, &of_other)]).unwrap();
}
