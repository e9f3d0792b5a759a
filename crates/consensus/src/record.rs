//! What stands in the files: our own shapes, not the engine's.
//!
//! Everything is JSON, which names its fields. A later version may add fields
//! (with `#[serde(default)]`) and variants and still reads what an earlier one
//! wrote; it must not rename or remove any. The same holds for
//! [`holdfast_core::Proposal`] and [`holdfast_core::ClusterState`], which are
//! stored within; maps in them need keys that JSON can write as text. A change
//! that cannot keep to this needs a new format version (wal.rs, snapshot.rs).

use std::collections::{BTreeMap, BTreeSet};

use openraft::{BasicNode, EntryPayload};
use serde::{Deserialize, Serialize};

use crate::types::{self, Entry, Item, LogId, Membership, SnapshotMeta, StoredMembership, Vote};

/// A position in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    pub(crate) term: u64,
    pub(crate) index: u64,
}

/// The vote that this node gave last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VoteRecord {
    pub(crate) term: u64,
    pub(crate) node: u64,
    /// Whether `node` is known to have won.
    pub(crate) won: bool,
}

/// Who votes and who only listens. Two sets of voters while they change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Members {
    pub(crate) voters: Vec<BTreeSet<u64>>,
    pub(crate) addresses: BTreeMap<u64, String>,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct EntryRecord {
    pub(crate) term: u64,
    pub(crate) index: u64,
    pub(crate) payload: Payload,
}

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Payload {
    /// Nothing: the first entry of a term.
    Blank,
    /// A proposal for the state machine.
    Proposal(Item),
    /// New members.
    Members(Members),
}

/// Where a snapshot was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotHead {
    pub(crate) last: Option<Position>,
    pub(crate) members_at: Option<Position>,
    pub(crate) members: Members,
}

impl From<&LogId> for Position {
    fn from(id: &LogId) -> Self {
        Position { term: id.leader_id.term, index: id.index }
    }
}

impl From<Position> for LogId {
    fn from(position: Position) -> Self {
        types::log_id(position.term, position.index)
    }
}

impl From<&Vote> for VoteRecord {
    fn from(vote: &Vote) -> Self {
        VoteRecord { term: vote.leader_id.term, node: vote.leader_id.voted_for, won: vote.committed }
    }
}

impl From<VoteRecord> for Vote {
    fn from(record: VoteRecord) -> Self {
        let mut vote = Vote::new(record.term, record.node);
        vote.committed = record.won;
        vote
    }
}

impl From<&Membership> for Members {
    fn from(membership: &Membership) -> Self {
        Members {
            voters: membership.get_joint_config().clone(),
            addresses: membership.nodes().map(|(id, node)| (*id, node.addr.clone())).collect(),
        }
    }
}

impl Members {
    fn restore(self) -> Result<Membership, String> {
        let nodes: BTreeMap<u64, BasicNode> =
            self.addresses.into_iter().map(|(id, address)| (id, BasicNode::new(address))).collect();
        if self.voters.is_empty() && nodes.is_empty() {
            return Ok(Membership::default());
        }
        Membership::new(self.voters, nodes).map_err(|e| e.to_string())
    }
}

impl From<&Entry> for EntryRecord {
    fn from(entry: &Entry) -> Self {
        EntryRecord {
            term: entry.log_id.leader_id.term,
            index: entry.log_id.index,
            payload: match &entry.payload {
                EntryPayload::Blank => Payload::Blank,
                EntryPayload::Normal(item) => Payload::Proposal(item.clone()),
                EntryPayload::Membership(membership) => Payload::Members(membership.into()),
            },
        }
    }
}

impl EntryRecord {
    /// The engine's entry, or what is impossible about this one.
    pub(crate) fn restore(self) -> Result<Entry, String> {
        Ok(Entry {
            log_id: types::log_id(self.term, self.index),
            payload: match self.payload {
                Payload::Blank => EntryPayload::Blank,
                Payload::Proposal(item) => EntryPayload::Normal(item),
                Payload::Members(members) => EntryPayload::Membership(members.restore()?),
            },
        })
    }
}

impl From<&SnapshotMeta> for SnapshotHead {
    fn from(meta: &SnapshotMeta) -> Self {
        SnapshotHead {
            last: meta.last_log_id.as_ref().map(Position::from),
            members_at: meta.last_membership.log_id().as_ref().map(Position::from),
            members: meta.last_membership.membership().into(),
        }
    }
}

impl SnapshotHead {
    /// The engine's description of the snapshot, or what is impossible about this one.
    pub(crate) fn restore(self) -> Result<SnapshotMeta, String> {
        Ok(SnapshotMeta {
            last_log_id: self.last.map(LogId::from),
            last_membership: StoredMembership::new(self.members_at.map(LogId::from), self.members.restore()?),
        })
    }
}
