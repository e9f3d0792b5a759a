//! A node and its rights.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Incarnation, NodeId, NodeTerm};

/// A host that belongs to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its identity.
    pub id: NodeId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// Where its agent answers other nodes: TLS over TCP.
    pub port: u16,
    /// Where its lease thread answers heartbeats: UDP.
    pub heartbeat_port: u16,
    /// Its X25519 public key: heartbeats are sealed with it.
    pub heartbeat_key: [u8; 32],
    /// Whether it may run VMs.
    pub membership: Membership,
    /// Counts its admissions; rights from earlier terms are void.
    pub term: NodeTerm,
    /// The keeper's life that was admitted.
    pub incarnation: Incarnation,
    /// What it last said of itself.
    pub facts: NodeFacts,
    /// When it joined, milliseconds since the Unix epoch.
    pub joined_ms: u64,
    /// Where it stands: votes are spread over sites.
    #[serde(default)]
    pub site: Option<String>,
    /// Since when it is drained, milliseconds since the Unix epoch: what is on it leaves,
    /// and nothing comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drained_ms: Option<u64>,
    /// It is being removed: it gets no lease any more, and is a node until its last one
    /// has certainly ended, so that what it still does is followed by nobody's work.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaves: bool,
}

/// Whether a node may run VMs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Membership {
    /// It joined, but its keeper was not heard yet.
    #[default]
    Joined,
    /// It holds a lease, or may hold one.
    Up,
    /// Its lease has certainly ended.
    Lost {
        /// Since when, milliseconds since the Unix epoch.
        since_ms: u64,
    },
}

/// What a node says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Processors.
    pub cpus: u32,
    /// RAM that VMs may use, in bytes: what the host has less its reserve.
    pub memory_bytes: u64,
    /// How QEMU runs guests here.
    pub accelerator: Accelerator,
    /// QEMU's version, `None` when it is missing or too old.
    pub qemu: Option<String>,
    /// Versioned machine types that this QEMU offers, newest last.
    pub machines: Vec<String>,
    /// Addresses on the networks that the nodes share.
    pub addresses: Vec<NodeAddress>,
    /// Holdfast's version.
    pub version: String,
    /// The hardware watchdog's device, where the host has one.
    pub watchdog: Option<String>,
    /// Where its volume server answers those of other nodes: TLS over TCP. 0: nowhere.
    #[serde(default)]
    pub volume_port: u16,
}

/// An address of a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeAddress {
    /// The interface's name on the node.
    pub interface: String,
    /// The address.
    pub ip: IpAddr,
    /// Length of the subnet's prefix.
    pub prefix: u8,
}

/// How QEMU runs guests on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// In software: correct, and many times slower.
    #[default]
    Tcg,
    /// On the processor's virtualisation extensions.
    Kvm,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accelerator::Tcg => "tcg",
            Accelerator::Kvm => "kvm",
        })
    }
}

impl Node {
    /// Whether it may run VMs.
    pub fn is_up(&self) -> bool {
        self.membership == Membership::Up
    }

    /// Whether QEMU on this node offers a machine type.
    pub fn offers(&self, machine: &str) -> bool {
        self.facts.machines.iter().any(|offered| offered == machine)
    }
}
