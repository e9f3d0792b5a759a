//! Nodes, and how a host becomes one.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{FencingView, WatchdogView};

/// A host that belongs to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Its number; never given to another host.
    pub id: u64,
    /// Whether it may run VMs.
    pub state: NodeState,
    /// Since when it is lost.
    pub lost_since_ms: Option<u64>,
    /// Counts how often it was admitted to run VMs.
    pub term: u64,
    /// Whether it coordinates, as far as the asked node knows.
    pub coordinator: bool,
    /// Whether it votes.
    pub voter: bool,
    /// The site at which it stands.
    #[serde(default)]
    pub site: Option<String>,
    /// For how long the coordinator has not answered it; absent when unknown.
    pub silent_ms: Option<u64>,
    /// How QEMU runs guests there: `kvm` or `tcg`.
    pub accelerator: String,
    /// QEMU's version; absent when it is missing or too old.
    pub qemu: Option<String>,
    /// Processors.
    pub cpus: u32,
    /// Virtual processors that are promised to VMs.
    pub cpus_promised: u64,
    /// RAM that VMs may use.
    pub memory_bytes: u64,
    /// What of it is promised to VMs, with QEMU's own share.
    pub memory_promised_bytes: u64,
    /// What of it may still be promised.
    pub memory_free_bytes: u64,
    /// Its addresses on the networks that the nodes share.
    pub addresses: Vec<Address>,
    /// The port on which its agent answers.
    pub port: u16,
    /// Holdfast's version.
    pub version: String,
    /// How many VMs it may run right now.
    pub vms: usize,
    /// Since when it is drained for maintenance: VMs leave it, and none comes.
    #[serde(default)]
    pub drained_since_ms: Option<u64>,
    /// VMs that stay on it although it is drained, and why; those that are on their way
    /// or move next are not among them.
    #[serde(default)]
    pub stays: Vec<StaysView>,
    /// It is being removed: it is a node until its lease has ended.
    #[serde(default)]
    pub leaves: bool,
    /// What makes sure that its VMs are dead before they start elsewhere.
    pub fencing: String,
    /// How its power can be switched off; absent when nobody has said how.
    pub power_fencing: Option<FencingView>,
    /// Its hardware watchdog, as its keeper says; absent while that is not known.
    #[serde(default)]
    pub watchdog: Option<WatchdogView>,
    /// When it joined.
    pub joined_ms: u64,
    /// The newest machine type that its QEMU offers.
    pub newest_machine: Option<String>,
}

/// A VM that stays on a drained node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StaysView {
    /// Its name.
    pub vm: String,
    /// What stands in its way.
    pub why: String,
}

/// Whether a node may run VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It joined, but its keeper was not heard yet.
    Joined,
    /// It holds a lease, or may hold one.
    Up,
    /// Its lease has certainly ended.
    Lost,
}

/// An address of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Address {
    /// The interface's name on the node.
    pub interface: String,
    /// The address.
    pub ip: String,
    /// Length of the subnet's prefix.
    pub prefix: u8,
    /// The name of the cluster's network that it is in.
    pub network: Option<String>,
}

/// Makes the asked host join a cluster.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinCluster {
    /// Where a member answers: `ADDRESS` or `ADDRESS:PORT`.
    pub address: String,
    /// The join token.
    pub token: String,
    /// The site at which the host stands; what its configuration says when absent.
    #[serde(default)]
    pub site: Option<String>,
}

/// Changes what is said of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetNode {
    /// The site at which it stands: votes are spread over sites. `none` takes it back.
    pub site: String,
}

/// Makes a join token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MakeJoinToken {
    /// For how long it is good, in milliseconds; an hour when absent.
    #[serde(default)]
    pub valid_ms: Option<u64>,
}

/// What a host needs to join.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinLine {
    /// Where a member answers: `ADDRESS:PORT`.
    pub address: String,
    /// The token: secret, good once, expires; pins the cluster's authority.
    pub token: String,
}
