//! A witness beside two nodes: real files, real clocks, an in-memory network. Who
//! may host is decided by the tests here; `core::witness` has its own.

mod lab;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use holdfast_consensus::{Consensus, Disk, Gate, RpcError, RpcKind, Seat, Settings};
use holdfast_core::witness::{Block, Use};
use holdfast_core::{NodeId, Reply};
use lab::{DEADLINE, Lab, add_token};
use uuid::Uuid;

const WITNESS: NodeId = NodeId::witness(1);
const MARK: Uuid = Uuid::from_u128(0x17);

/// A hosted witness and the right to host it.
struct Hosted {
    held: Arc<AtomicBool>,
    witness: Consensus,
}

/// Hosts the witness on `node`, under this epoch, which its block says first.
async fn host(lab: &Lab, node: u64, epoch: u64) -> Hosted {
    let disk = Arc::new(Disk::open(&lab.directory(0), MARK).expect("the disk"));
    let counter = epoch * 1000;
    let block = Block { node: NodeId(node), epoch, counter, state: Use::Own, length_ms: 600, ..Block::default() };
    disk.write_block(&block).expect("a block");
    let held = Arc::new(AtomicBool::new(true));
    let gate: Gate = {
        let held = held.clone();
        Arc::new(move || held.load(Ordering::Acquire))
    };
    let kept = Arc::new(Mutex::default());
    let seat = Seat { disk, host: NodeId(node), epoch, kept, held: gate };
    let settings = Settings { snapshot_every: 50, ..Settings::new(WITNESS, "unused") };
    let witness = Consensus::start_witness(settings, seat, lab.wire(WITNESS.0)).await.expect("the witness starts");
    lab.connect(WITNESS.0, witness.clone());
    Hosted { held, witness }
}

/// Two nodes and the witness vote; node 1 coordinates, node 2 hosts.
async fn two_nodes_and_a_witness() -> (Lab, Hosted) {
    let lab = Lab::cluster(2).await;
    Disk::format(&lab.directory(0), Uuid::nil(), MARK, &[]).expect("a witness's disk");
    let hosted = host(&lab, 2, 1).await;
    lab.set_voters(1, &[1, 2, WITNESS.0]).await;
    (lab, hosted)
}

async fn acknowledged_anew(lab: &Lab, id: u64) {
    let before = lab::boot_time();
    lab.wait(id, |standing| standing.is_coordinator() && standing.quorum_acked.is_some_and(|at| at > before)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_its_host_dies_the_coordinator_hosts_it_and_needs_no_election() {
    let (mut lab, hosted) = two_nodes_and_a_witness().await;
    lab.propose(1, &["before"]).await;
    let term = lab.standing(1).term;
    lab.kill(2);
    lab.isolate(WITNESS.0);
    hosted.held.store(false, Ordering::Release);
    let again = host(&lab, 1, 2).await;
    lab.reunite(WITNESS.0);
    acknowledged_anew(&lab, 1).await;
    assert_eq!(lab.standing(1).term, term, "nobody was elected");
    lab.propose(1, &["after"]).await;
    // The former host wakes up; the witness does not speak there any more.
    let silenced = hosted.witness.handle(RpcKind::Barrier, Bytes::new()).await;
    assert_eq!(silenced.err(), Some(RpcError::NotHosted));
    hosted.witness.stop().await;
    again.witness.stop().await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_coordinator_dies_the_other_node_and_the_witness_elect() {
    let (mut lab, hosted) = two_nodes_and_a_witness().await;
    lab.propose(1, &["before"]).await;
    lab.kill(1);
    assert_eq!(lab.coordinator_among(&[2]).await, 2);
    lab.state_with(2, &["before"]).await;
    lab.propose(2, &["after"]).await;
    hosted.witness.stop().await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_the_witness_has_is_brought_to_its_host_before_that_coordinates() {
    let (mut lab, hosted) = two_nodes_and_a_witness().await;
    lab.isolate(2);
    let names: Vec<String> = (0..120).map(|i| format!("without-2-{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    lab.propose(1, &names).await;
    lab.kill(1);
    lab.reunite(2);
    lab.wait(2, holdfast_consensus::Standing::is_coordinator).await;
    lab.state_with(2, &names).await;
    lab.propose(2, &["after"]).await;
    assert!(!hosted.witness.standing().borrow().is_coordinator(), "it handed over");
    hosted.witness.stop().await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_witness_that_takes_over_again_and_again_forgets_nothing() {
    let (mut lab, mut hosted) = two_nodes_and_a_witness().await;
    let mut names = Vec::new();
    for round in 0..6u64 {
        let name = format!("round-{round}");
        // Node 2 hears nothing of it: the witness's word is needed each time.
        lab.isolate(2);
        lab.propose(1, &[&name]).await;
        names.push(name);
        hosted.held.store(false, Ordering::Release);
        hosted.witness.stop().await;
        hosted = host(&lab, 1 + round % 2, round + 2).await;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    lab.kill(1);
    lab.reunite(2);
    lab.state_with(2, &names).await;
    hosted.witness.stop().await;
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_witness_that_was_voted_out_helps_no_old_quorum() {
    let (lab, hosted) = two_nodes_and_a_witness().await;
    lab.isolate(2);
    lab.propose(1, &["without-2"]).await;
    // By the votes of node 1 and the witness, node 1 becomes the only voter.
    lab.set_voters(1, &[1]).await;
    lab.propose(1, &["alone"]).await;
    hosted.held.store(false, Ordering::Release);
    hosted.witness.stop().await;
    // Node 2 knows of none of that. It comes back where only the witness is heard,
    // hosts it, and by what it knows both are a majority.
    lab.isolate(1);
    let again = host(&lab, 2, 2).await;
    lab.reunite(2);
    lab.ballots(2, 8).await;
    assert!(!lab.standing(2).is_coordinator());
    assert_eq!(lab.node(1).propose(add_token("still-alone")).await, Ok(Reply::Done));
    // When it hears node 1 again it only learns.
    lab.reunite(1);
    lab.node(1)
        .set_members(
            BTreeMap::from([(NodeId(1), "node-1".to_owned())]),
            BTreeMap::from([(NodeId(2), "node-2".to_owned()), (WITNESS, "witness".to_owned())]),
        )
        .await
        .expect("the members change");
    lab.state_with(2, &["without-2", "alone", "still-alone"]).await;
    let mut learned = again.witness.state();
    let all = learned.wait_for(|state| state.api_tokens.contains_key("still-alone"));
    tokio::time::timeout(DEADLINE, all).await.expect("it learns").expect("it runs");
    again.witness.stop().await;
    lab.stop().await;
}
