//! The witness: a vote without a host, on a shared disk.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::NodeId;
use crate::witness::Memory;

/// Where the numbers of witnesses begin: far above those of nodes.
const WITNESSES: u64 = 1 << 32;

/// A vote whose log lives on a disk that the nodes share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// Its number among the participants of consensus. Each disk that is set gets a
    /// new one, so that a disk of before never counts as if it were current.
    pub id: NodeId,
    /// The path of the disk, the same on every node.
    pub disk: String,
    /// What is written on the disk, to recognise it.
    pub mark: Uuid,
    /// The node that should host it; any other takes over when that one is silent.
    pub host: Option<NodeId>,
    /// Counts how often that was decided. Whoever took over without a decision gives
    /// the witness up to the next one that is decided.
    #[serde(default)]
    pub decided: u64,
    /// When it was decided last, milliseconds since the Unix epoch.
    #[serde(default)]
    pub decided_ms: u64,
    /// How often it was decided since somebody was last told to host it in fact.
    #[serde(default)]
    pub asked: u32,
    /// The node that hosts it, as far as it was told.
    #[serde(default)]
    pub hosted_by: Option<NodeId>,
    /// When that was told, milliseconds since the Unix epoch.
    #[serde(default)]
    pub hosted_ms: u64,
    /// The highest epoch on the disk that was told: a disk that shows less is stale.
    #[serde(default)]
    pub epoch: u64,
    /// What some node has seen on the disk and misses there: nobody hosts it before it
    /// shows that again.
    #[serde(default)]
    pub missing: Memory,
    /// What each node that cannot use the disk says of it.
    #[serde(default)]
    pub trouble: BTreeMap<NodeId, String>,
}

impl Witness {
    /// A disk that nobody has hosted yet.
    pub fn new(id: NodeId, disk: String, mark: Uuid) -> Self {
        Witness {
            id,
            disk,
            mark,
            host: None,
            decided: 0,
            decided_ms: 0,
            asked: 0,
            hosted_by: None,
            hosted_ms: 0,
            epoch: 0,
            missing: Memory::default(),
            trouble: BTreeMap::new(),
        }
    }
}

impl NodeId {
    /// The number of the `n`th witness of a cluster, from 1.
    pub const fn witness(n: u64) -> Self {
        NodeId(WITNESSES + n)
    }

    /// Whether this is a witness's number.
    pub const fn is_witness(self) -> bool {
        self.0 > WITNESSES
    }
}
