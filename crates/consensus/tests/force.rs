//! The disaster door: one node goes on alone, by its own log.

mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use holdfast_consensus::{ConsensusError, force};
use holdfast_core::{Command, Generation, NodeId, Proposal};
use lab::{Lab, proposal};

fn forced() -> Proposal {
    let generation = Generation { number: 1, mark: uuid::Uuid::from_u128(5) };
    proposal(Command::ForceQuorum { generation, node: NodeId(1), with: BTreeSet::new() })
}

/// Three nodes that know two tokens, all of them stopped.
async fn stopped() -> Lab {
    let lab = Lab::cluster(3).await;
    lab.propose(1, &["a", "b"]).await;
    for id in 1..=3 {
        lab.state_with(id, &["a", "b"]).await;
    }
    lab.stop().await;
    lab
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_survivor_goes_on_alone_with_all_that_it_had() {
    let mut lab = stopped().await;
    force(&lab.directory(1), NodeId(1), forced()).await.unwrap();
    lab.start(1).await;
    assert_eq!(lab.coordinator_among(&[1]).await, 1);
    lab.propose(1, &["c"]).await;
    let state = lab.state_with(1, &["a", "b", "c"]).await;
    assert_eq!(state.generation.number, 1);
    assert_eq!(lab.standing(1).voters, [NodeId(1)]);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_in_the_middle_leaves_the_old_or_the_new() {
    let mut lab = stopped().await;
    let (directory, wish) = (lab.directory(1), forced());
    let before = lab.directory(91);
    copy(&directory, &before);
    force(&directory, NodeId(1), wish.clone()).await.unwrap();
    let (old, new) = (fs::read(before.join("log")).unwrap(), fs::read(directory.join("log")).unwrap());
    assert!(new.starts_with(&old) && new.len() > old.len(), "it only adds");
    for (number, cut) in (old.len()..=new.len()).step_by(97).chain([new.len()]).enumerate() {
        let torn = lab.directory(100 + number as u64);
        copy(&before, &torn);
        fs::write(torn.join("log"), &new[..cut]).unwrap();
        // Tried again, as the node does when it starts: once, however often.
        for _ in 0..2 {
            force(&torn, NodeId(1), wish.clone()).await.unwrap();
        }
        assert_eq!(fs::read(torn.join("log")).unwrap(), new, "after {cut} bytes");
    }
    lab.start(1).await;
    assert_eq!(lab.coordinator_among(&[1]).await, 1);
    lab.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_knows_nothing_has_nothing_to_go_on_from() {
    let lab = Lab::new();
    fs::create_dir_all(lab.directory(1)).unwrap();
    let refused = force(&lab.directory(1), NodeId(1), forced()).await;
    assert!(matches!(refused, Err(ConsensusError::NothingKnown)), "{refused:?}");
}
