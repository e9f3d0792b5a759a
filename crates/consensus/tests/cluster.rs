//! Clusters of up to five nodes in one process: real files, real clocks, an
//! in-memory network whose links can be cut.

mod lab;

use std::collections::BTreeMap;

use holdfast_consensus::{
    Consensus, ConsensusError, MAX_PROPOSAL_BYTES, ProposeError, Role, RpcError, RpcKind, Settings,
};
use holdfast_core::{Command, NodeId, Proposal, Reply};
use lab::{DEADLINE, Lab, add_token, boot_time, proposal};

#[tokio::test(flavor = "multi_thread")]
async fn what_the_coordinator_commits_is_applied_everywhere() {
    let lab = Lab::cluster(3).await;
    let first = lab.node(1);
    assert_eq!(first.propose(add_token("a")).await, Ok(Reply::Done));
    let again = add_token("b");
    assert_eq!(first.propose(again.clone()).await, Ok(Reply::Done));
    assert_eq!(first.propose(again).await, Ok(Reply::Done), "a retry gets the same answer");
    for id in 1..=3 {
        let state = lab.state_with(id, &["a", "b"]).await;
        assert_eq!(state.revision, 3, "node {id}");
    }
    let refused = lab.node(2).propose(add_token("c")).await;
    let coordinator = Some(NodeId(1));
    assert_eq!(refused, Err(ProposeError::NotCoordinator { coordinator }));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_takes_over_quickly_and_nothing_acknowledged_is_lost() {
    let mut lab = Lab::cluster(3).await;
    let mut acknowledged = Vec::new();
    for i in 0..20 {
        let name = format!("before-{i}");
        if lab.node(1).propose(add_token(&name)).await == Ok(Reply::Done) {
            acknowledged.push(name);
        }
    }
    assert_eq!(acknowledged.len(), 20);
    let gone = boot_time();
    lab.kill(1);
    let successor = lab.coordinator_among(&[2, 3]).await;
    let Role::Coordinator { since } = lab.standing(successor).me else {
        panic!("a coordinator");
    };
    assert!(since.ms_since(gone) < 1500, "it took {} ms", since.ms_since(gone));
    acknowledged.push("after".into());
    let names: Vec<&str> = acknowledged.iter().map(String::as_str).collect();
    let after = lab.node(successor).propose(add_token("after")).await;
    assert_eq!(after, Ok(Reply::Done));
    lab.start(1).await;
    for id in 1..=3 {
        lab.state_with(id, &names).await;
    }
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_nodes_can_restart_at_once() {
    let mut lab = Lab::cluster(3).await;
    lab.propose(1, &["a", "b"]).await;
    for id in 1..=3 {
        lab.node(id).stop().await;
    }
    for id in 1..=3 {
        lab.start(id).await;
    }
    let coordinator = lab.coordinator_among(&[1, 2, 3]).await;
    lab.propose(coordinator, &["c"]).await;
    for id in 1..=3 {
        lab.state_with(id, &["a", "b", "c"]).await;
    }
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_is_cut_off_loses_its_authority_before_a_successor_exists() {
    let lab = Lab::cluster(3).await;
    lab.propose(1, &["a"]).await;
    let old = lab.node(1);
    let window = old.authority_window_ms();
    lab.isolate(1);
    let lost = old.propose(add_token("lost")).await;
    assert_eq!(lost, Err(ProposeError::Unknown));
    let successor = lab.coordinator_among(&[2, 3]).await;
    let Role::Coordinator { since } = lab.standing(successor).me else {
        panic!("a coordinator");
    };
    let standing = lab.standing(1);
    assert!(standing.is_coordinator(), "it cannot know better");
    let acked = standing.quorum_acked.expect("it had a majority");
    assert!(
        acked.plus_ms(window) < since,
        "authority lasted {} ms into the successor's time",
        acked.plus_ms(window).ms_since(since)
    );
    assert_eq!(old.barrier().await, Err(ProposeError::Unknown));
    let refused = old.propose(add_token("later")).await;
    assert!(matches!(refused, Err(ProposeError::NotCoordinator { .. })), "{refused:?}");
    assert_eq!(lab.standing(1).quorum_acked, Some(acked), "it stands still");

    lab.propose(successor, &["b"]).await;
    lab.reunite(1);
    let state = lab.state_with(1, &["a", "b"]).await;
    assert!(!state.api_tokens.contains_key("lost"));
    lab.wait(1, |standing| standing.me == Role::Voter).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_was_cut_off_does_not_disturb_the_coordinator() {
    let lab = Lab::cluster(3).await;
    let term = lab.standing(1).term;
    lab.isolate(3);
    // Several campaigns, all in vain.
    lab.ballots(3, 6).await;
    lab.propose(1, &["a"]).await;
    lab.reunite(3);
    lab.state_with(3, &["a"]).await;
    assert_eq!(lab.standing(1).term, term);
    assert!(lab.standing(1).is_coordinator());
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_voter_elects_nobody_while_its_coordinator_may_rely_on_it() {
    let mut lab = Lab::cluster(3).await;
    lab.isolate(1);
    let second = lab.coordinator_among(&[2, 3]).await;
    let follower = 5 - second;
    lab.reunite(1);
    lab.wait(1, |standing| standing.coordinator == Some(NodeId(second))).await;
    lab.propose(second, &["a"]).await;
    lab.node(follower).stop().await;
    lab.isolate(second);
    let restarted = boot_time();
    lab.start(follower).await;
    let ballot = lab.last_ballot().expect("there was an election");
    let answer = lab.node(follower).handle(RpcKind::Vote, ballot).await;
    assert_eq!(answer, Err(RpcError::VoteWithheld));
    let third = lab.coordinator_among(&[1, follower]).await;
    let Role::Coordinator { since } = lab.standing(third).me else {
        panic!("a coordinator");
    };
    let hold = Settings::new(NodeId(0), "").election_ms.1;
    assert!(since.ms_since(restarted) >= hold, "{} ms", since.ms_since(restarted));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sole_voter_keeps_its_authority_and_restarts_at_once() {
    let mut lab = Lab::new();
    lab.start(1).await;
    let node = lab.node(1);
    lab.initialize(1).await;
    let again = node.initialize("one").await;
    assert!(matches!(again, Err(ConsensusError::AlreadyInitialized)), "{again:?}");
    let acked = lab.standing(1).quorum_acked.expect("its own");
    lab.wait(1, move |standing| standing.quorum_acked > Some(acked.plus_ms(200))).await;
    lab.propose(1, &["a"]).await;
    node.stop().await;
    assert_eq!(node.propose(add_token("b")).await, Err(ProposeError::Stopped));
    lab.start(1).await;
    lab.coordinator_among(&[1]).await;
    lab.state_with(1, &["a"]).await;
    lab.stop().await;
}

/// By its log it is the only voter. But it has acknowledged another coordinator,
/// which was elected by a newer list of members and relies on that.
#[tokio::test(flavor = "multi_thread")]
async fn a_sole_voter_by_its_log_that_voted_for_another_keeps_still_after_a_restart() {
    let mut lab = Lab::cluster(1).await;
    let vote = |node: u64, won: bool| format!(r#"{{"leader_id":{{"term":9,"voted_for":{node}}},"committed":{won}}}"#);
    let heartbeat = format!(r#"{{"vote":{},"prev_log_id":null,"entries":[],"leader_commit":null}}"#, vote(2, true));
    let node = lab.node(1);
    node.handle(RpcKind::Heartbeat, heartbeat.into()).await.expect("a later term's coordinator is accepted");
    lab.wait(1, |standing| standing.coordinator == Some(NodeId(2))).await;
    node.stop().await;
    let restarted = boot_time();
    lab.start(1).await;
    let request = vote(3, false).replace('9', "10");
    let ballot = format!(
        r#"{{"prospect":false,"request":{{"vote":{request},"last_log_id":null,"leadership_transfer":false}}}}"#
    );
    assert_eq!(lab.node(1).handle(RpcKind::Vote, ballot.into()).await, Err(RpcError::VoteWithheld));
    lab.coordinator_among(&[1]).await;
    let Role::Coordinator { since } = lab.standing(1).me else {
        panic!("a coordinator");
    };
    let hold = Settings::new(NodeId(0), "").election_ms.1;
    assert!(since.ms_since(restarted) >= hold, "{} ms", since.ms_since(restarted));
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn votes_follow_the_losses_down_to_one_and_grow_again() {
    let mut lab = Lab::cluster(5).await;
    let learners = |left: &[u64]| {
        (1..=5).filter(|id| !left.contains(id)).map(|id| (NodeId(id), format!("node-{id}"))).collect::<BTreeMap<_, _>>()
    };
    let voters = |ids: &[u64]| ids.iter().map(|id| (NodeId(*id), format!("node-{id}"))).collect::<BTreeMap<_, _>>();
    let first = lab.node(1);
    let steps: [(&[u64], u64); 4] = [(&[1, 2, 3], 5), (&[1, 2, 3], 4), (&[1], 3), (&[1], 2)];
    for (left, lost) in steps {
        lab.kill(lost);
        first.set_members(voters(left), learners(left)).await.expect("a majority of both sets is there");
        lab.propose(1, &[&format!("without-{lost}")]).await;
    }
    let participants = first.participants().expect("it coordinates");
    assert_eq!(participants.voters, [[NodeId(1)].into()]);
    assert_eq!(participants.heard.len(), 4, "the others listen, if they can");
    lab.wait(1, |standing| standing.quorum_acked.is_some()).await;
    for id in 2..=5 {
        lab.start(id).await;
        lab.state_with(id, &["without-2"]).await;
    }
    let heard = first.participants().expect("it coordinates").heard;
    assert!(heard.values().all(|heard| heard.acknowledged.is_some() && heard.behind.is_some()), "{heard:?}");
    first.set_members(voters(&[1, 2, 3, 4, 5]), BTreeMap::new()).await.expect("all are back");
    lab.kill(1);
    let next = lab.coordinator_among(&[2, 3, 4, 5]).await;
    lab.state_with(next, &["without-5", "without-4", "without-3", "without-2"]).await;
    let other = if next == 2 { 3 } else { 2 };
    assert_eq!(lab.node(other).participants(), None, "only the coordinator knows");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_come_move_and_go() {
    let mut lab = Lab::cluster(3).await;
    lab.propose(1, &["a"]).await;
    lab.start(4).await;
    lab.start(5).await;
    let first = lab.node(1);
    let voters: BTreeMap<NodeId, String> = [1, 2, 4].map(|id| (NodeId(id), format!("moved-{id}"))).into();
    let learners: BTreeMap<NodeId, String> = [(NodeId(5), "five".into())].into();
    first.set_members(voters.clone(), learners.clone()).await.expect("3 goes, 4 and 5 come");
    first.set_members(voters.clone(), learners).await.expect("nothing is left to do");
    let ids = |nodes: &[u64]| nodes.iter().map(|id| NodeId(*id)).collect::<Vec<_>>();
    assert_eq!(lab.standing(1).voters, ids(&[1, 2, 4]));
    assert_eq!(lab.standing(1).learners, ids(&[5]));
    lab.wait(5, |standing| standing.me == Role::Learner && standing.last_applied > 0).await;
    lab.state_with(5, &["a"]).await;

    lab.kill(3);
    lab.kill(2);
    lab.propose(1, &["b"]).await;
    lab.state_with(4, &["a", "b"]).await;

    let without = voters.into_iter().filter(|(id, _)| *id != NodeId(1)).collect();
    let refused = first.set_members(without, BTreeMap::new()).await;
    assert!(matches!(refused, Err(ConsensusError::RemovesCoordinator)), "{refused:?}");
    let elsewhere = lab.node(4).set_members(BTreeMap::new(), BTreeMap::new()).await;
    assert!(matches!(elsewhere, Err(ConsensusError::NotCoordinator { .. })), "{elsewhere:?}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn coordination_is_handed_over_in_order() {
    let lab = Lab::cluster(3).await;
    lab.propose(1, &["a"]).await;
    let first = lab.node(1);
    for (to, why) in [(1, "already"), (9, "no part")] {
        let refused = first.transfer(NodeId(to), || panic!("not yet")).await.expect_err("it cannot");
        assert!(refused.to_string().contains(why), "{refused}");
        assert!(lab.standing(1).is_coordinator(), "nothing was begun");
    }
    let mut standing = first.standing();
    let begun = boot_time();
    let mut told = false;
    first.transfer(NodeId(3), || told = lab.standing(1).is_coordinator()).await.expect("it is handed over");
    assert!(told, "to stop granting, before the authority ended");
    assert!(boot_time().ms_since(begun) < 1000);
    assert_eq!(standing.borrow_and_update().me, Role::Voter);
    assert_eq!(standing.borrow().quorum_acked, None);
    assert_eq!(lab.coordinator_among(&[3]).await, 3);
    lab.propose(3, &["b"]).await;
    lab.state_with(1, &["a", "b"]).await;
    assert_eq!(standing.borrow_and_update().term, lab.standing(3).term, "nobody has campaigned since");
    let refused = first.transfer(NodeId(2), || panic!("not here")).await;
    assert!(matches!(refused, Err(ConsensusError::NotCoordinator { coordinator: Some(NodeId(3)) })), "{refused:?}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_without_a_vote_gets_one_first() {
    let lab = Lab::cluster(2).await;
    let first = lab.node(1);
    let member = |id: u64| BTreeMap::from([(NodeId(id), format!("node-{id}"))]);
    first.set_members(member(1), member(2)).await.expect("one vote is enough for two nodes");
    lab.propose(1, &["a"]).await;
    lab.wait(2, |standing| standing.me == Role::Learner).await;
    first.transfer(NodeId(2), || {}).await.expect("it is handed over");
    assert_eq!(lab.coordinator_among(&[2]).await, 2);
    lab.node(2).set_members(member(2), member(1)).await.expect("and the first has no vote any more");
    lab.propose(2, &["b"]).await;
    lab.state_with(1, &["a", "b"]).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_that_is_lost_still_ends_the_authority() {
    let lab = Lab::cluster(3).await;
    lab.propose(1, &["a"]).await;
    lab.isolate(1);
    let lost = lab.node(1).transfer(NodeId(2), || {}).await;
    assert!(matches!(lost, Err(ConsensusError::Unknown { .. })), "{lost:?}");
    let standing = lab.standing(1);
    assert_eq!((standing.me, standing.quorum_acked), (Role::Voter, None));
    lab.reunite(1);
    let coordinator = lab.coordinator_among(&[1, 2, 3]).await;
    lab.propose(coordinator, &["b"]).await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_barrier_on_any_node_sees_what_was_committed_before_it() {
    let lab = Lab::cluster(3).await;
    for i in 0..10 {
        let name = format!("token-{i}");
        lab.node(1).propose(add_token(&name)).await.expect("committed");
        let id = i % 3 + 1;
        let reader = lab.node(id);
        let point = reader.barrier().await.expect("a majority answers");
        assert!(reader.wait_applied(point, DEADLINE).await);
        assert!(reader.state().borrow().api_tokens.contains_key(&name), "node {id}");
    }
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_node_is_brought_up_by_a_snapshot_and_restarts_from_it() {
    let mut lab = Lab::new().with_snapshots_every(40);
    lab.form(2).await;
    let names: Vec<String> = (0..200).map(|i| format!("token-{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    lab.propose(1, &names).await;
    lab.start(3).await;
    lab.set_voters(1, &[1, 2, 3]).await;
    lab.state_with(3, &names).await;
    assert!(lab.directory(3).join("snapshot").exists());
    lab.node(3).stop().await;
    lab.start(3).await;
    lab.state_with(3, &names).await;

    lab.node(3).stop().await;
    let snapshot = lab.directory(3).join("snapshot");
    let mut bytes = std::fs::read(&snapshot).expect("a snapshot");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&snapshot, &bytes).expect("a damaged snapshot");
    let damaged = lab.try_start(3).await.expect_err("it is damaged");
    assert!(matches!(&damaged, ConsensusError::Corrupt { file, .. } if *file == snapshot), "{damaged}");
    std::fs::remove_file(&snapshot).expect("no snapshot");
    let missing = lab.try_start(3).await.expect_err("it is missing");
    assert!(missing.to_string().contains("missing or older"), "{missing}");
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused() {
    let mut lab = Lab::cluster(1).await;
    let in_use = lab.try_start(1).await.expect_err("it runs already");
    assert!(matches!(in_use, ConsensusError::InUse { .. }), "{in_use}");

    let node = lab.node(1);
    let long = proposal(Command::RemoveApiToken { name: "x".repeat(MAX_PROPOSAL_BYTES) });
    assert!(matches!(node.propose(long).await, Err(ProposeError::Unfit(_))));
    lab.propose(1, &["still-works"]).await;
    for kind in RpcKind::ALL {
        assert_eq!(RpcKind::from_name(kind.name()), Some(kind));
        let answer = node.handle(kind, vec![0xff; 9].into()).await;
        match kind {
            RpcKind::Barrier => assert!(answer.is_ok()),
            _ => assert!(matches!(answer, Err(RpcError::Malformed { .. })), "{kind}: {answer:?}"),
        }
    }
    let hold_too_short = Settings { election_ms: (300, 300), ..lab.settings(2) };
    let error = Consensus::start(hold_too_short, lab.wire(2)).await.err();
    assert!(matches!(error, Some(ConsensusError::Settings(_))), "{error:?}");
    lab.stop().await;
}

/// Several kilobytes, so that a few of them fill what the last page leaves.
fn long(name: &str) -> Proposal {
    Proposal { by: "x".repeat(3000), ..add_token(name) }
}

/// On a file system of one megabyte, which needs root.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_delays_but_loses_nothing() {
    let mut lab = Lab::new();
    let Some(small) = lab::SmallDisk::mount(lab.directory(1)) else {
        eprintln!("skipped: mounting a tmpfs needs root");
        return;
    };
    lab.start(1).await;
    let node = lab.node(1);
    lab.initialize(1).await;
    lab.propose(1, &["a"]).await;
    small.fill();
    let mut acknowledged = vec!["a".to_owned()];
    let mut unknown = None;
    for i in 0..200 {
        let name = format!("token-{i}");
        match node.propose(long(&name)).await {
            Ok(_) => acknowledged.push(name),
            Err(e) => {
                assert_eq!(e, ProposeError::Unknown);
                unknown = Some(name);
                break;
            }
        }
    }
    let unknown = unknown.expect("the disk is full at last");
    let standing = lab.standing(1);
    let trouble = standing.trouble.expect("it says so");
    assert!(trouble.contains("no room"), "{trouble}");

    small.empty();
    lab.wait(1, |standing| standing.trouble.is_none()).await;
    lab.propose(1, &["b"]).await;
    let state = node.state().borrow().clone();
    assert!(state.api_tokens.contains_key(&unknown), "it went on where it had stopped");
    drop(state);
    small.fill();
    let blocked = tokio::spawn({
        let node = node.clone();
        async move {
            for i in 0..200 {
                if node.propose(long(&format!("more-{i}"))).await.is_err() {
                    break;
                }
            }
        }
    });
    lab.wait(1, |standing| standing.trouble.is_some()).await;
    node.stop().await;
    blocked.await.expect("no panic");
    small.empty();
    lab.start(1).await;
    lab.coordinator_among(&[1]).await;
    let names: Vec<&str> = acknowledged.iter().map(String::as_str).collect();
    lab.state_with(1, &names).await;
    lab.stop().await;
}
