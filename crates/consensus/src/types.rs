//! The engine's types, spelled out once. Nothing of this leaves the crate.

use std::fmt;
use std::sync::Arc;

use holdfast_core::{Proposal, Reply};
use openraft::vote::RaftLeaderId;
use serde::{Deserialize, Serialize};

/// A proposal on its way through the log; shared, so that handing it from the
/// log to the state machine and to the network copies nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Item(pub(crate) Arc<Proposal>);

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "proposal {}", self.0.id)
    }
}

// `leader_id_std`: at most one coordinator per term, so that a term names its
// coordinator. The price, split votes, is kept small by the staggered campaigns
// (pace.rs).
openraft::declare_raft_types!(
    pub(crate) Types:
        D = Item,
        R = Option<Reply>,
        NodeId = u64,
        Node = openraft::BasicNode,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
);

pub(crate) type LogId = openraft::alias::LogIdOf<Types>;
pub(crate) type Vote = openraft::alias::VoteOf<Types>;
pub(crate) type Entry = openraft::alias::EntryOf<Types>;
pub(crate) type StoredMembership = openraft::alias::StoredMembershipOf<Types>;
pub(crate) type SnapshotMeta = openraft::alias::SnapshotMetaOf<Types>;
pub(crate) type Snapshot = openraft::alias::SnapshotOf<Types, Vec<u8>>;
pub(crate) type Membership = openraft::Membership<u64, openraft::BasicNode>;
pub(crate) type Engine = openraft::Raft<Types, crate::machine::Machine>;
pub(crate) type Metrics = openraft::RaftMetrics<Types>;
pub(crate) type ServerMetrics = openraft::metrics::RaftServerMetrics<Types>;

/// A log id from its two numbers.
pub(crate) fn log_id(term: u64, index: u64) -> LogId {
    let leader = openraft::impls::leader_id_std::LeaderId::<u64, u64>::new(term, 0);
    LogId { leader_id: leader.to_committed(), index }
}
