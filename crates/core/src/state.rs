//! The one truth: the replicated state and how it changes.

use serde::{Deserialize, Serialize};

use crate::model::RequestId;

/// Everything that the cluster agrees on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterState {
    /// Counts applied commands.
    pub revision: u64,
}

/// A change to the state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Changes nothing.
    Nothing,
}

/// A command on its way through consensus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// A retry carries the same id and is applied once.
    pub id: RequestId,
    /// When it was proposed, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Who asked for it.
    pub by: String,
    /// What to change.
    pub command: Command,
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Applied.
    Done,
    /// Refused; nothing changed.
    Refused(Refusal),
}

/// Why a command was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

impl ClusterState {
    /// Applies a committed proposal. Deterministic: the same state and proposal
    /// give the same result on every node.
    pub fn apply(&mut self, _proposal: &Proposal) -> Reply {
        self.revision += 1;
        Reply::Done
    }
}
