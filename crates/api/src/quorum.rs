//! The quorum: who votes and why.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How the quorum stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuorumView {
    /// The node that was asked.
    pub answered_by: String,
    /// The node that coordinates, as far as the asked node knows.
    pub coordinator: Option<String>,
    /// Whether a coordinator answered and has the votes that it needs.
    pub has_quorum: bool,
    /// Whether everybody who should vote does, and nobody else.
    pub settled: bool,
    /// Votes there are. While they move, of the set that can lose least.
    pub votes: usize,
    /// How many of them an agreement needs.
    pub needed: usize,
    /// How many of them are present; 0 when no coordinator answered.
    pub present: usize,
    /// How many more votes may be lost at once, whichever they are.
    pub survives_at_once: usize,
    /// How many more nodes may be lost one after the other, whichever they are, when
    /// the votes have time to move in between.
    pub survives_in_turn: usize,
    /// What that means, in a sentence.
    pub outlook: String,
    /// Every node, and the witness.
    pub seats: Vec<SeatView>,
}

/// One participant and its vote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SeatView {
    /// The node's name; `the witness` for that.
    pub name: String,
    /// Whether it is the witness.
    pub witness: bool,
    /// The site at which the node stands.
    pub site: Option<String>,
    /// Whether it votes now.
    pub votes: bool,
    /// Whether it acknowledged something a moment ago; absent when no coordinator
    /// answered.
    pub present: Option<bool>,
    /// For how long it acknowledged nothing; absent when no coordinator answered.
    pub silent_ms: Option<u64>,
    /// Why it votes, or why not.
    pub why: String,
}

/// The wish to go on with one node alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForceQuorum {
    /// The cluster's name, to show that this is the one that is meant.
    pub cluster: String,
    /// Nodes that are up and come along.
    #[serde(default)]
    pub with: Vec<String>,
    /// The nodes that are left out have been switched off: do it.
    #[serde(default)]
    pub others_are_off: bool,
}

/// What became of it, or would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForcedQuorum {
    /// The node that goes on.
    pub node: String,
    /// Whether it was done, or only told.
    pub done: bool,
    /// Counts how often a quorum was forced in this cluster.
    pub generation: u64,
    /// The term of the last entry of the node's log.
    pub log_term: u64,
    /// The index of the last entry of the node's log.
    pub log_index: u64,
    /// For how long the node has heard no coordinator, in milliseconds.
    pub unheard_ms: u64,
    /// The nodes that are left out.
    pub left_out: Vec<String>,
    /// How long the node waits for leases that others may have granted, in milliseconds.
    pub wait_ms: u64,
}
