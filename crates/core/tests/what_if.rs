//! What would happen if: the coordinator's decisions on a copy.

mod common;

use common::{Lab, WEB, spec, vm_id};
use holdfast_core::quorum::{Seat, Survey, Why};
use holdfast_core::what_if::{Fate, Forecast, Misunderstood, Question, Situation, Span, what_if};
use holdfast_core::*;

const DB: VmId = vm_id(0xdb);

/// Asks a cluster whose first node coordinates and whose nodes `voting` vote.
fn ask(lab: &Lab, voting: &[u64], phrase: &str) -> Forecast {
    let ids = lab.state.nodes.keys().copied().chain(lab.state.witness.as_ref().map(|witness| witness.id));
    let seat = |id: NodeId| Seat {
        id,
        votes: voting.contains(&id.0) || id.is_witness(),
        present: true,
        silent_ms: 0,
        why: Why::Chosen,
    };
    let survey = Survey { seats: ids.map(seat).collect(), settled: true, ..Survey::default() };
    let question = Question::read(phrase, &lab.state).unwrap();
    let situation = Situation {
        state: &lab.state,
        observed: &lab.observed,
        coordinator: NodeId(1),
        survey: &survey,
        election_ms: (320, 480),
        now_ms: lab.now_ms,
    };
    let before = (lab.state.clone(), lab.observed.clone());
    let forecast = what_if(&question, situation).unwrap();
    assert_eq!(before, (lab.state.clone(), lab.observed.clone()), "nothing was touched");
    forecast
}

fn fate(forecast: &Forecast, vm: VmId) -> &Fate {
    &forecast.vms.iter().find(|(id, _)| *id == vm).unwrap().1
}

/// Nodes with an address each on a network for heartbeats, one for migrations, and
/// one for both.
fn wired(lab: &mut Lab, subnets: &[(&str, bool, bool)]) {
    for (index, (name, cluster, migration)) in subnets.iter().enumerate() {
        for node in lab.state.nodes.values_mut() {
            let ip = format!("10.0.{index}.{}", node.id).parse().unwrap();
            node.facts.addresses.push(NodeAddress { interface: format!("eth{index}"), ip, prefix: 24 });
        }
        let roles = Roles { cluster: *cluster, migration: *migration };
        lab.state.networks.insert(format!("10.0.{index}.0/24"), Network { name: (*name).into(), roles, metric: 1 });
    }
}

#[test]
fn the_vms_of_a_lost_node_start_where_the_plan_puts_them() {
    let mut lab = Lab::new(3);
    let on = lab.running_web(Priority::Medium);
    let lost = if on == 1 { 2 } else { on };
    if on != lost {
        lab.say(on, WEB, Run::Running);
    }
    let forecast = ask(&lab, &[1, 2, 3], &format!("lose n{lost}"));
    assert_eq!((forecast.votes, &forecast.coordinators), ((3, 2), &vec![NodeId(1)]));
    assert_eq!(forecast.lost, [NodeId(lost)]);
    assert_eq!(forecast.lost_within, Some(Span { from_ms: 1550, to_ms: 1650 }));
    assert_eq!(forecast.voters.len(), 1, "two nodes without a witness");

    // And what the plan really does is the same.
    let forecast = ask(&lab, &[1, 2, 3], &format!("lose n{on}"));
    lab.lose(on);
    lab.plan();
    let really = lab.on(WEB).unwrap();
    let Fate::Restarts { from, to, why, .. } = fate(&forecast, WEB) else { panic!("{forecast:?}") };
    assert_eq!((*from, *to), (Some(NodeId(on)), NodeId(really)));
    assert!(why.contains("lease"), "{why}");
}

#[test]
fn a_lost_coordinator_costs_an_election_and_its_successors_wait() {
    let mut lab = Lab::new(3);
    lab.running_web(Priority::Medium);
    let forecast = ask(&lab, &[1, 2, 3], "lose node n1");
    assert_eq!(forecast.coordinators, [NodeId(2), NodeId(3)]);
    assert_eq!(forecast.lost_within, Some(Span { from_ms: 320 + 1650, to_ms: 480 + 1650 }));
}

#[test]
fn without_a_quorum_every_vm_stops_and_nothing_starts() {
    let mut lab = Lab::new(3);
    let on = lab.running_web(Priority::High);
    for phrase in ["lose n2 and n3", "lose n1, n2", "lose n1 and lose n3"] {
        let forecast = ask(&lab, &[1, 2, 3], phrase);
        assert_eq!((forecast.votes, forecast.coordinators.len()), ((3, 1), 0), "{phrase}");
        assert!(matches!(fate(&forecast, WEB), Fate::Stops { on: Some(node), .. } if node.0 == on), "{phrase}");
    }
    // A vote that only one node has: the other may be lost, it may not.
    assert!(ask(&lab, &[1], "lose n1").coordinators.is_empty());
    assert_eq!(ask(&lab, &[1], "lose n2 and n3").coordinators, [NodeId(1)]);
}

#[test]
fn the_witness_votes_for_the_side_that_coordinates() {
    let mut lab = Lab::new(2);
    lab.state.witness = Some(Witness::new(NodeId::witness(1), "/dev/w".into(), Default::default()));
    wired(&mut lab, &[("lan", true, true)]);
    assert_eq!(ask(&lab, &[1, 2], "lose n1").coordinators, [NodeId(2)]);
    let cut = ask(&lab, &[1, 2], "cut network lan");
    assert_eq!((cut.votes, cut.coordinators, cut.lost), ((3, 2), vec![NodeId(1)], vec![NodeId(2)]));
    assert_eq!(ask(&lab, &[1, 2], "lose the witness").coordinators, [NodeId(1)]);
    assert!(ask(&lab, &[1, 2], "lose witness and n2").coordinators.is_empty());
}

#[test]
fn a_cut_network_costs_nothing_while_another_carries_heartbeats() {
    let mut lab = Lab::new(3);
    let on = lab.running_web(Priority::Medium);
    wired(&mut lab, &[("beat", true, false), ("lan", true, true)]);
    let forecast = ask(&lab, &[1, 2, 3], "cut network beat");
    assert_eq!((forecast.lost.len(), fate(&forecast, WEB)), (0, &Fate::Stays { on: Some(NodeId(on)) }));
    let forecast = ask(&lab, &[1, 2, 3], "cut network lan");
    assert!(forecast.lost.is_empty() && forecast.notes.iter().any(|note| note.contains("migrations")), "{forecast:?}");
    assert!(ask(&lab, &[1, 2, 3], "cut network beat and lan").coordinators.is_empty(), "three islands");
    assert_eq!(ask(&lab, &[1, 2, 3], "cut beat on n3 and lan on n3").lost, [NodeId(3)]);
    // The coordinator is the one that is cut off: another one is elected.
    let forecast = ask(&lab, &[1, 2, 3], "cut 10.0.0.0/24 on n1 and lan on n1");
    assert_eq!((forecast.coordinators, forecast.lost), (vec![NodeId(2), NodeId(3)], vec![NodeId(1)]));
}

#[test]
fn what_fits_nowhere_stays_off_and_says_why() {
    let mut lab = Lab::new(2);
    lab.create(WEB, "web", spec(1500, Priority::Low));
    lab.create(DB, "db", spec(1500, Priority::High));
    lab.plan();
    let (web, db) = (lab.on(WEB).unwrap(), lab.on(DB).unwrap());
    assert_ne!(web, db);
    let forecast = ask(&lab, &[1], "lose n2");
    let lost = if web == 2 { WEB } else { DB };
    let Fate::Stops { on: Some(NodeId(2)), within: Some(_), why } = fate(&forecast, lost) else {
        panic!("{forecast:?}")
    };
    assert!(why.contains("no node has room"), "{why}");
}

#[test]
fn a_drain_moves_what_has_room_elsewhere() {
    let mut lab = Lab::new(2);
    let on = lab.running_web(Priority::Medium);
    let other = 3 - on;
    let forecast = ask(&lab, &[1], &format!("drain n{on}"));
    assert_eq!(fate(&forecast, WEB), &Fate::Migrates { from: NodeId(on), to: NodeId(other) });
    let forecast = ask(&lab, &[1], "drain n1 and n2");
    assert!(matches!(fate(&forecast, WEB), Fate::Cannot { why, .. } if why.contains("room")), "{forecast:?}");
}

#[test]
fn a_volume_that_a_node_does_not_reach_stops_its_guests_there() {
    let mut lab = Lab::new(2);
    let on = lab.running_web(Priority::Medium);
    let forecast = ask(&lab, &[1], &format!("lose volume vol1 on n{on}"));
    assert!(matches!(fate(&forecast, WEB), Fate::Stops { within: None, .. }), "{forecast:?}");
    let forecast = ask(&lab, &[1], &format!("lose volume vol1 on n{}", 3 - on));
    assert_eq!(fate(&forecast, WEB), &Fate::Stays { on: Some(NodeId(on)) });
}

#[test]
fn what_is_not_understood_says_what_can_be_asked() {
    let lab = Lab::new(2);
    let read = |text: &str| Question::read(text, &lab.state).unwrap_err();
    for text in ["", "and", "n1", "explode n1", "lose", "lose n1 n2", "lose volume vol1", "drain"] {
        let error = read(text);
        assert!(matches!(&error, Misunderstood::Phrase(_)), "{text}: {error}");
        assert!(error.to_string().contains("lose volume VOLUME on NODE"), "{error}");
    }
    assert_eq!(read("lose n9").to_string(), "there is no node \"n9\"; there is n1, n2");
    assert_eq!(read("lose volume x on n1").to_string(), "there is no volume \"x\"; there is vol1");
    assert_eq!(read("lose witness").to_string(), "there is no witness \"witness\"; there is none");
    assert_eq!(read("cut network x").to_string(), "there is no network \"x\"; there is none");
    assert_eq!(read("lose site x").to_string(), "there is no site \"x\"; there is none");
}
