//! Sixteen nodes, five of which vote: voters and others are lost, the coordinator
//! is, and seven are cut off from nine. `cargo xtask sixteen` runs it: it wants the
//! machine to itself for a minute or two.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use holdfast_api::{AddSwitch, NodeState, SwitchKind};
use holdfast_lab::cluster::Cluster;

use crate::bench::{DEADLINE, all_but, form, lost_since, spec};

/// With sixteen agents on few processors things take longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// After it has healed nothing may happen for so long.
const CALM: Duration = Duration::from_secs(5);

fn voters(cluster: &Cluster) -> BTreeSet<String> {
    let nodes = cluster.any().unwrap().nodes().unwrap();
    nodes.into_iter().filter(|node| node.voter).map(|node| node.name).collect()
}

/// Waits until five vote, none of them one of `gone`.
fn five_vote_without(cluster: &Cluster, gone: &[&str]) -> BTreeSet<String> {
    cluster
        .wait(&format!("five votes, none with {gone:?}"), PATIENCE, |client| {
            let quorum = client.quorum().ok()?;
            let nodes = client.nodes().ok()?;
            let voters: BTreeSet<String> = nodes.into_iter().filter(|node| node.voter).map(|node| node.name).collect();
            let settled = quorum.settled && voters.len() == 5 && quorum.present == 5;
            (settled && gone.iter().all(|name| !voters.contains(*name))).then_some(voters)
        })
        .unwrap()
}

/// Cuts the power of a node, sees it declared lost, it alone, and its vote replaced.
fn lose(cluster: &Cluster, what: &str, node: &str) {
    let since = cluster.last_event().unwrap();
    let before = voters(cluster);
    let cut = cluster.host(node).unwrap().power_off().unwrap();
    let subject = format!("node {node}");
    let lost = |event: &holdfast_api::Event| event.subject == subject && event.text.starts_with("is lost");
    let (_, told) = cluster.wait_event(since, PATIENCE, lost).unwrap();
    let after = five_vote_without(cluster, &[node]);
    println!("{what} {node}: lost after {:?}, five vote without it after {:?}", told - cut.at, cut.at.elapsed());
    assert_eq!(lost_since(cluster, since), [node]);
    if !before.contains(node) {
        assert_eq!(after, before, "votes moved although no voter was lost");
    }
    cluster.power_on_all().unwrap();
    cluster.wait_ready(PATIENCE).unwrap();
}

fn write(cluster: &Cluster, name: &str) {
    let request = AddSwitch { name: name.into(), kind: SwitchKind::Private, uplink: None };
    cluster.any().unwrap().add_switch(&request).unwrap();
}

#[test]
#[ignore = "sixteen nodes want the machine to themselves: cargo xtask sixteen"]
fn sixteen_nodes_survive_losses_and_a_partition() {
    let mut sixteen = spec();
    sixteen.nodes = 16;
    let begun = Instant::now();
    let (cluster, _turn) = form(sixteen);
    println!("formed after {:?}", begun.elapsed());
    let voting = five_vote_without(&cluster, &[]);
    let coordinator = cluster.coordinator().unwrap();
    assert!(voting.contains(&coordinator));
    let voter = voting.iter().find(|name| **name != coordinator).unwrap();
    lose(&cluster, "a voter", voter);
    let voting = voters(&cluster);
    let coordinator = cluster.coordinator().unwrap();
    let other = all_but(&cluster, &[]).into_iter().find(|name| !voting.contains(name)).unwrap();
    lose(&cluster, "another node", &other);
    assert_eq!(cluster.coordinator().unwrap(), coordinator);
    lose(&cluster, "the coordinator", &coordinator);
    assert_ne!(cluster.coordinator().unwrap(), coordinator);

    // Seven, two voters among them: the nine have three votes of five.
    let voting = voters(&cluster);
    let coordinator = cluster.coordinator().unwrap();
    let (mut seven, mut nine): (Vec<String>, Vec<String>) =
        all_but(&cluster, &[]).into_iter().partition(|name| !voting.contains(name));
    nine.extend(seven.split_off(5));
    let others: Vec<String> =
        nine.iter().filter(|name| **name != coordinator && voting.contains(*name)).cloned().collect();
    nine.retain(|name| !others[..2].contains(name));
    seven.extend_from_slice(&others[..2]);
    assert_eq!((seven.len(), nine.len()), (7, 9));
    let since = cluster.last_event().unwrap();
    let term = cluster.client(&coordinator).cluster().unwrap().term;
    let sides = [&seven, &nine].map(|side| side.iter().map(String::as_str).collect::<Vec<_>>());
    let cut = Instant::now();
    cluster.lab().fabric().partition(&sides[0], &sides[1]).unwrap();
    let here = cluster.client(&coordinator);
    for node in &seven {
        cluster
            .wait_on(&coordinator, &format!("{node} lost"), PATIENCE, |client| {
                client.nodes().ok()?.into_iter().find(|view| view.name == *node && view.state == NodeState::Lost)
            })
            .unwrap();
    }
    println!("seven lost after {:?}", cut.elapsed());
    five_vote_without(&cluster, &sides[0]);
    println!("five of the nine vote after {:?}", cut.elapsed());
    write(&cluster, "during");
    assert!(here.nodes().unwrap().iter().all(|view| (view.state == NodeState::Up) == nine.contains(&view.name)));
    // The coordinator stayed where it was, and nobody coordinates the seven.
    let view = here.cluster().unwrap();
    assert_eq!((view.coordinator, view.term), (Some(coordinator.clone()), term));
    let request = AddSwitch { name: "apart".into(), kind: SwitchKind::Private, uplink: None };
    let refused = cluster.client(&seven[0]).add_switch(&request).unwrap_err();
    assert!(["no_coordinator", "unknown"].contains(&refused.code()), "{refused}");

    cluster.lab().fabric().heal().unwrap();
    let healed = Instant::now();
    cluster.wait_ready(PATIENCE).unwrap();
    println!("all back after {:?}", healed.elapsed());
    let mut lost = lost_since(&cluster, since);
    lost.sort();
    seven.sort();
    assert_eq!(lost, seven, "others were lost, or some twice");
    let since = cluster.last_event().unwrap();
    let votes = voters(&cluster);
    let restless = cluster.wait_event(since, CALM, |event| event.text.contains("lost") || event.text.contains("vote"));
    assert!(restless.is_err(), "{restless:?}");
    assert_eq!(voters(&cluster), votes);
    assert_eq!(cluster.any().unwrap().cluster().unwrap().term, term);
    for node in all_but(&cluster, &[]) {
        cluster
            .wait_on(&node, "what was written", DEADLINE, |client| {
                let switches: Vec<holdfast_api::SwitchView> = client.get("/api/v1/switches").ok()?;
                switches.iter().any(|switch| switch.name == "during").then_some(())
            })
            .unwrap();
    }
}
