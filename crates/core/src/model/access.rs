//! How nodes reach a LUN, and which of them does I/O for those that do not.
//!
//! ```text
//!             the coordinator gives it            its node's path is away, or by hand
//!   nobody ───────────────────────────▶ owner ──────────────────────────────▶ leaving
//!     ▲                                   │                                      │
//!     └── its node's term is over ────────┴──────────────────────────────────────┤
//!     └── its node said that nothing of others is under way any more ────────────┘
//! ```
//! An owner is a right, as a [`super::Tenure`] is one: it is given anew only when the
//! last one is certainly over, so no two nodes do I/O for others at one time, and
//! nothing of what the first had begun comes after what the second does.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{Epoch, NodeId, NodeTerm};

/// The right to do I/O on a LUN for nodes that have no path of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Who.
    pub node: NodeId,
    /// In which of the node's terms: void in any other.
    pub term: NodeTerm,
    /// Grows with every owner that the volume gets.
    pub epoch: Epoch,
    /// It takes nothing new, and is over once the node says that nothing is under way.
    #[serde(default)]
    pub leaving: bool,
}

/// How a node reaches a LUN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LunPath {
    /// By itself.
    Direct,
    /// Through the owner.
    Redirected {
        /// Why not by itself.
        why: String,
        /// The owner.
        through: NodeId,
    },
    /// Not at all: what guests ask for waits.
    Unavailable {
        /// Why.
        why: String,
    },
}

/// What a node said of its path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// How it reaches the LUN.
    pub path: LunPath,
    /// In which of its terms it said so.
    pub term: NodeTerm,
    /// Since when it is so, milliseconds since the Unix epoch.
    pub since_ms: u64,
}

/// How a LUN is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// Who owns it. A right of a term that is over is void.
    pub owner: Option<Owner>,
    /// The last epoch that an owner got.
    pub last_epoch: Epoch,
    /// Who is to own it next, by a user's wish.
    pub next: Option<NodeId>,
    /// Nodes that go through the owner by a user's wish.
    pub redirected: BTreeSet<NodeId>,
    /// What nodes said last.
    pub paths: BTreeMap<NodeId, Reached>,
}

impl LunPath {
    /// Whether both are the same but for the words that say why.
    pub fn is_like(&self, other: &LunPath) -> bool {
        match (self, other) {
            (LunPath::Redirected { through: one, .. }, LunPath::Redirected { through: other, .. }) => one == other,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }

    /// Why it is not direct.
    pub fn why(&self) -> Option<&str> {
        match self {
            LunPath::Direct => None,
            LunPath::Redirected { why, .. } | LunPath::Unavailable { why } => Some(why),
        }
    }
}

impl Access {
    /// Whether nothing was ever said or decided about it.
    pub fn is_new(&self) -> bool {
        *self == Access::default()
    }

    /// What a node said in this term of it.
    pub fn reached(&self, node: NodeId, term: NodeTerm) -> Option<&Reached> {
        self.paths.get(&node).filter(|reached| reached.term == term)
    }

    /// Forgets a node.
    pub fn forget(&mut self, node: NodeId) {
        self.paths.remove(&node);
        self.redirected.remove(&node);
        self.next.take_if(|next| *next == node);
    }
}
