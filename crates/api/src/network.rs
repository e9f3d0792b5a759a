//! Networks that the nodes share, and virtual switches.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A subnet that the nodes share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkView {
    /// Its name.
    pub name: String,
    /// The subnet, `10.77.1.0/24`.
    pub subnet: String,
    /// Whether it carries heartbeats and the traffic between agents.
    pub cluster: bool,
    /// Whether it carries live migrations.
    pub migration: bool,
    /// Preference for bulk traffic: lowest first.
    pub metric: u32,
    /// Nodes that have an address in it.
    pub nodes: Vec<String>,
}

/// Renames a network or changes its use. What is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetNetwork {
    /// Its new name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether it carries heartbeats and the traffic between agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<bool>,
    /// Whether it carries live migrations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<bool>,
    /// Preference for bulk traffic: lowest first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<u32>,
}

/// A virtual switch, the same on every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SwitchView {
    /// Its name.
    pub name: String,
    /// What it reaches.
    pub kind: SwitchKind,
    /// The interface through which an external one reaches a physical network.
    pub uplink: Option<String>,
    /// VMs that are plugged into it.
    pub vms: Vec<String>,
}

/// What a virtual switch reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SwitchKind {
    /// A physical network, through an interface of every node.
    External,
    /// The other VMs of the node and the node itself.
    Internal,
    /// The other VMs of the node.
    Private,
}

/// Adds a virtual switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddSwitch {
    /// Its name.
    pub name: String,
    /// What it reaches.
    pub kind: SwitchKind,
    /// For an external one: the interface, or an existing bridge, on every node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<String>,
}
