//! When a host is switched off, and what is concluded from it.

mod common;

use common::*;
use holdfast_core::check::{Broken, check};
use holdfast_core::*;

fn power_fencing() -> PowerFencing {
    PowerFencing {
        agent: "fence_ipmilan".into(),
        options: [("ip".to_owned(), "10.9.0.2".to_owned())].into(),
        secrets: [("password".to_owned(), Secret("hush".into()))].into(),
        test: None,
        asked: None,
    }
}

fn word(term: u64, off: Option<i32>, status: Option<i32>) -> FenceWord {
    FenceWord { term: NodeTerm(term), agent: "fence_ipmilan".into(), off, status, took_ms: 40 }
}

/// `web` runs on a node with power fencing that has been silent for so long.
fn suspected(nodes: u64, silent_ms: u64) -> (Lab, NodeId) {
    let mut lab = Lab::new(nodes);
    let node = NodeId(lab.running_web(Priority::Medium));
    assert_eq!(lab.ask(Command::SetFencing { node, fencing: Some(power_fencing()) }), Reply::Done);
    let seen = lab.observed.nodes.get_mut(&node).unwrap();
    (seen.silent_ms, seen.heard) = (silent_ms, None);
    (lab, node)
}

fn fences(lab: &Lab, coordinator: u64) -> Vec<NodeId> {
    fencing::due(&lab.state, &lab.observed, NodeId(coordinator)).into_iter().map(|due| due.node).collect()
}

#[test]
fn a_silent_host_is_switched_off_at_half_a_lease_and_not_before() {
    let (lab, node) = suspected(3, 749);
    let other = 1 + node.0 % 3;
    assert_eq!(fences(&lab, other), []);
    let (mut lab, node) = suspected(3, 750);
    assert_eq!(fences(&lab, other), [node]);
    assert_eq!(fences(&lab, node.0), [], "nobody switches himself off");
    let keeper = lab.state.nodes[&node].incarnation;
    lab.observed.nodes.get_mut(&node).unwrap().heard = Some(keeper);
    assert_eq!(fences(&lab, other), [], "it was heard again");
    lab.lose(node.0);
    assert_eq!(fences(&lab, other), [], "its lease has ended anyway");
    lab.ask(Command::SetFencing { node, fencing: None });
    assert_eq!(fences(&lab, other), []);
}

#[test]
fn a_coordinator_that_hears_less_than_half_blames_itself() {
    let (mut lab, node) = suspected(3, 800);
    let other = NodeId(1 + node.0 % 3);
    let coordinator = NodeId(6 - node.0 - other.0);
    lab.ask(Command::SetFencing { node: other, fencing: Some(power_fencing()) });
    let seen = lab.observed.nodes.get_mut(&other).unwrap();
    (seen.silent_ms, seen.heard) = (800, None);
    assert_eq!(fences(&lab, coordinator.0), []);
    lab.ask(Command::AskFence { node });
    assert_eq!(fences(&lab, coordinator.0), [node], "a user knows more");
    lab.ask(Command::FenceFailed { node, term: NodeTerm(1), why: "no route".into() });
    assert_eq!(fences(&lab, coordinator.0), [], "said once, tried once");
}

#[test]
fn everybody_learns_that_a_watchdog_is_about_to_reset_a_host() {
    let (mut lab, node) = suspected(3, 0);
    lab.ask(Command::WatchdogLeft { node, device: "/dev/watchdog0".into(), timeout_s: 10 });
    let event = lab.state.events.back().unwrap();
    assert_eq!((event.severity, &event.subject), (Severity::Error, &format!("node {}", lab.state.node_name(node))));
    assert!(event.text.contains("/dev/watchdog0 is not fed any more and resets it within 10 s"), "{}", event.text);
}

#[test]
fn a_confirmed_power_cut_ends_a_term_before_its_lease() {
    let (mut lab, node) = suspected(3, 800);
    lab.observed.nodes.get_mut(&node).unwrap().fence = Some(word(1, Some(0), Some(2)));
    assert_eq!(lab.plan()[0], Action::DeclareLost { node });
    assert_ne!(lab.on(WEB), Some(node.0));
    let causes = &lab.state.vms[&WEB].causes;
    assert!(matches!(causes.last().unwrap().cause, Cause::PowerFenced { .. }), "{causes:?}");
    assert_eq!(lab.plan(), []);
    lab.hear(node.0, 900);
    lab.observed.nodes.get_mut(&node).unwrap().silent_ms = 0;
    lab.plan();
    assert_eq!(lab.state.nodes[&node].term, NodeTerm(2), "it may come back");
    assert_eq!(lab.plan(), [], "and the old word says nothing of the new term");
}

#[test]
fn a_fence_that_failed_hung_or_lied_ends_nothing() {
    let (mut lab, node) = suspected(3, 800);
    for (off, status) in
        [(Some(1), Some(2)), (None, Some(2)), (Some(0), Some(0)), (Some(0), Some(1)), (Some(0), None), (None, None)]
    {
        lab.observed.nodes.get_mut(&node).unwrap().fence = Some(word(1, off, status));
        assert_eq!(lab.plan(), [], "off {off:?}, status {status:?}");
    }
    lab.observed.nodes.get_mut(&node).unwrap().fence = Some(word(0, Some(0), Some(2)));
    assert_eq!(lab.plan(), [], "of an earlier term");
    let seen = lab.observed.nodes.get_mut(&node).unwrap();
    (seen.fence, seen.heard) = (Some(word(1, Some(0), Some(2))), Some(lab.state.nodes[&node].incarnation));
    assert_eq!(lab.plan(), [], "its keeper is heard");
    lab.lose(node.0);
    assert_eq!(lab.plan()[0], Action::DeclareLost { node }, "the lease decides all the same");
}

#[test]
fn a_vm_between_two_hosts_without_power_is_freed() {
    let (mut lab, from) = suspected(4, 800);
    let to = NodeId(1 + from.0 % 4);
    lab.ask(Command::MigrateVm { vm: WEB, to: Some(to) });
    lab.ask(Command::SetFencing { node: to, fencing: Some(power_fencing()) });
    let off = Some(word(1, Some(0), Some(2)));
    lab.observed.nodes.get_mut(&from).unwrap().fence = off.clone();
    assert_eq!(lab.plan(), [Action::DeclareLost { node: from }], "the target may still have the guest");
    let seen = lab.observed.nodes.get_mut(&to).unwrap();
    (seen.silent_ms, seen.heard, seen.fence) = (800, None, off);
    lab.plan();
    assert!(lab.on(WEB).is_some_and(|node| node != from.0 && node != to.0));
}

#[test]
fn the_judge_reads_a_fence_s_exit_codes_itself() {
    let (mut lab, node) = suspected(3, 800);
    let judged = |lab: &Lab, word: FenceWord| {
        let cause = Cause::PowerFenced { node, word };
        let decisions = vec![Decision { action: Action::DeclareLost { node }, cause }];
        check(&lab.state, &Plan { revision: lab.state.revision, decisions })
    };
    assert_eq!(judged(&lab, word(1, Some(0), Some(2))), Ok(()));
    for wrong in [word(1, Some(1), Some(2)), word(1, Some(0), Some(0)), word(2, Some(0), Some(2)), word(1, None, None)]
    {
        assert_eq!(judged(&lab, wrong), Err(Broken::Lost(node)));
    }
    lab.ask(Command::SetFencing { node, fencing: None });
    assert_eq!(judged(&lab, word(1, Some(0), Some(2))), Err(Broken::Lost(node)), "nobody was to switch it off");
}

#[test]
fn fencing_is_refused_that_could_run_anything_or_say_more_than_one_line() {
    let (mut lab, node) = suspected(3, 0);
    let mut refused = |change: fn(&mut PowerFencing)| {
        let mut fencing = power_fencing();
        change(&mut fencing);
        let reply = lab.ask(Command::SetFencing { node, fencing: Some(fencing) });
        assert!(matches!(reply, Reply::Refused(Refusal::Invalid(_))), "{reply:?}");
    };
    refused(|fencing| fencing.agent = "sh".into());
    refused(|fencing| fencing.agent = "fence_/../../bin/sh".into());
    refused(|fencing| drop(fencing.options.insert("action".into(), "on".into())));
    refused(|fencing| drop(fencing.options.insert("ip".into(), "1\naction=on".into())));
    refused(|fencing| drop(fencing.options.insert("password".into(), "open".into())));
    assert!(!format!("{:?}", power_fencing()).contains("hush"), "a secret is not printed");
}
