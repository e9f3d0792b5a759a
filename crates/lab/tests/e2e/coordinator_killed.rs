//! The coordinator dies in the middle of 20 writes over the API: none that was
//! acknowledged is lost, none is applied twice.

use std::collections::BTreeSet;
use std::sync::mpsc;
use std::time::Instant;

use holdfast_api::{AddSwitch, SwitchKind, SwitchView};
use holdfast_lab::cluster::{ApiError, SWITCH};

use crate::bench::{DEADLINE, three_nodes};

const WRITES: usize = 20;

#[test]
fn no_acknowledged_write_is_lost_with_the_coordinator() {
    let (cluster, _turn) = three_nodes();
    let coordinator = cluster.coordinator().unwrap();
    let api = cluster.client(&cluster.followers().unwrap()[0]).within(DEADLINE);
    let (begin, begun) = mpsc::channel();
    let add = |n: usize| AddSwitch { name: format!("s{n}"), kind: SwitchKind::Private, uplink: None };
    let (answers, dead) = std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let begin = begin;
            (0..WRITES)
                .map(|n| {
                    begin.send(n).unwrap();
                    let answer: Result<SwitchView, ApiError> = api.add_switch(&add(n));
                    (n, answer, Instant::now())
                })
                .collect::<Vec<_>>()
        });
        while begun.recv().unwrap() < WRITES / 3 {}
        let cut = cluster.host(&coordinator).unwrap().power_off().unwrap();
        (writing.join().unwrap(), cut.killed)
    });
    let after = answers.iter().filter(|(.., at)| *at > dead).count();
    assert!(after > 0, "all was written before the coordinator died");
    let mut acknowledged = BTreeSet::new();
    for (n, answer, _) in &answers {
        match answer {
            Ok(view) => drop(acknowledged.insert(view.name.clone())),
            // Nobody knows, so a person asks again; an answer of any other kind is a lie.
            Err(error) => {
                println!("write {n}: {error}");
                assert!(["unknown", "no_coordinator"].contains(&error.code()), "{error}");
            }
        }
    }
    println!("{} acknowledged, {after} answered after the coordinator died", acknowledged.len());
    assert!(acknowledged.len() >= WRITES / 2, "{answers:?}");
    cluster.power_on_all().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    for host in cluster.hosts() {
        let switches: Vec<SwitchView> = cluster.client(host.name()).get("/api/v1/switches").unwrap();
        let names: Vec<String> = switches.into_iter().map(|switch| switch.name).filter(|name| name != SWITCH).collect();
        let distinct: BTreeSet<String> = names.iter().cloned().collect();
        assert_eq!(names.len(), distinct.len());
        assert!(acknowledged.is_subset(&distinct), "{} lacks {:?}", host.name(), acknowledged.difference(&distinct));
        assert!(distinct.iter().all(|name| (0..WRITES).any(|n| add(n).name == *name)), "{distinct:?}");
    }
}
