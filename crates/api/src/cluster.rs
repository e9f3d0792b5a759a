//! The cluster as a whole.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::JoinLine;

/// How the cluster stands, as the asked node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterView {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: String,
    /// When it was founded.
    pub founded_ms: u64,
    /// The failover profile.
    pub profile: ProfileName,
    /// How long VMs stay on a node that reaches their disks only through another, in
    /// seconds.
    #[serde(default)]
    pub redirect_patience_s: u64,
    /// Length of a lease under that profile.
    pub lease_ms: u64,
    /// The node that was asked.
    pub answered_by: String,
    /// The node that coordinates, as far as the asked node knows.
    pub coordinator: Option<String>,
    /// How many voters there are and how many are connected.
    pub quorum: Quorum,
    /// The term of consensus: each has at most one coordinator.
    pub term: u64,
    /// Counts changes to the cluster's state.
    pub revision: u64,
    /// How many things there are.
    pub counts: Counts,
    /// What somebody should look at, in sentences; empty when all is well.
    pub warnings: Vec<String>,
    /// The certificate of the cluster's authority, PEM: what clients pin.
    pub ca_certificate: String,
}

/// How many voters are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quorum {
    /// Nodes that vote, and the witness when it does.
    pub voters: usize,
    /// Those of them that acknowledged something to the coordinator a moment ago; 0
    /// when there is no coordinator.
    pub connected: usize,
    /// How many have to be connected.
    pub needed: usize,
}

/// How many things there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counts {
    /// Nodes.
    pub nodes: usize,
    /// Nodes that are up.
    pub nodes_up: usize,
    /// VMs.
    pub vms: usize,
    /// VMs that run.
    pub vms_running: usize,
    /// Volumes.
    pub volumes: usize,
    /// Jobs that go on.
    pub jobs: usize,
}

/// How fast a lost node is noticed, against how much disturbance is tolerated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProfileName {
    /// For any local network.
    Default,
    /// For quiet, dedicated networks.
    Fast,
    /// Between sites.
    Wan,
}

/// Founds a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FoundCluster {
    /// Its name: 1 to 63 letters, digits, `-`, `_` or `.`.
    pub name: String,
    /// The site at which its first node stands; what its configuration says when absent.
    #[serde(default)]
    pub site: Option<String>,
}

/// A cluster was founded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Founded {
    /// The cluster.
    pub cluster: ClusterView,
    /// How the next host joins.
    pub join: JoinLine,
}

/// Chooses the failover profile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetProfile {
    /// The profile.
    pub profile: ProfileName,
}

/// Hands the coordination over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HandOver {
    /// The node that is to coordinate, by its name or its number; any that can when
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

/// The coordination was handed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HandedOver {
    /// The node that coordinates now.
    pub coordinator: String,
}
