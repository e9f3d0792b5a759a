//! The stream of changes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One thing that differs from what it was. Coarse: it says what to ask for anew,
/// not what is different about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    /// What kind of thing.
    pub kind: ChangeKind,
    /// Which: a job's number, a network's subnet, anything else's name. The
    /// cluster's name for the cluster itself.
    pub name: String,
    /// Whether it is gone.
    pub removed: bool,
    /// The revision of the state in which it was noticed.
    pub revision: u64,
}

/// What kind of thing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    /// The cluster's settings.
    Cluster,
    /// A node.
    Node,
    /// A network.
    Network,
    /// A virtual switch.
    Switch,
    /// A volume.
    Volume,
    /// A VM.
    Vm,
    /// A job.
    Job,
    /// An API token.
    Token,
    /// There are new events.
    Event,
}
