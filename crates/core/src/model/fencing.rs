//! Power fencing: a host's power, switched off from another node.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{NodeId, NodeTerm};

/// The exit code by which a fence agent's `status` says that the host has no
/// power (FenceAgentAPI of ClusterLabs, "Return codes").
pub const STATUS_OFF: i32 = 2;

/// How the power of a node's host can be switched off: one of the programs that
/// Debian's `fence-agents` brings, called as Pacemaker calls them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerFencing {
    /// The program's name, `fence_ipmilan`.
    pub agent: String,
    /// What it is told, as `key=value`.
    pub options: BTreeMap<String, String>,
    /// What it is told and nobody else is shown.
    pub secrets: BTreeMap<String, Secret>,
    /// What the last test showed, of these very options.
    #[serde(default)]
    pub test: Option<FenceTest>,
    /// A user wants the host switched off in this term of its node.
    #[serde(default)]
    pub asked: Option<NodeTerm>,
}

/// A password or the like. Nothing prints it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What a test of a node's power fencing showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceTest {
    /// When, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// From which node.
    pub from: NodeId,
    /// Whether the fence agent reached the host's power and found it on.
    pub passed: bool,
    /// What it showed, for a person.
    pub text: String,
}

/// What a fence agent's runs against a host ended with: raw, because the planner
/// and its judge each read it for themselves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceWord {
    /// The node's term when the fence was ordered: nothing is said of any other.
    pub term: NodeTerm,
    /// The fence agent.
    pub agent: String,
    /// The exit code of its `off`; `None` when it did not end by itself.
    pub off: Option<i32>,
    /// The exit code of the `status` that was asked for afterwards.
    pub status: Option<i32>,
    /// How long both took, in milliseconds.
    pub took_ms: u64,
}

impl FenceWord {
    /// Whether the host certainly lost its power after the fence was ordered:
    /// switching off succeeded, and a later look found it off.
    pub fn is_confirmed(&self) -> bool {
        self.off == Some(0) && self.status == Some(STATUS_OFF)
    }
}
