//! A node, its rights, and why things happened to it.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Epoch, Incarnation, NodeId, NodeTerm};

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

/// Why something was decided. Typed, because [`crate::check`] verifies it and
/// `holdfast explain` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// A user asked for it.
    Requested {
        /// Who, as the API knows them.
        by: String,
    },
    /// A node's lease has certainly ended.
    LeaseEnded {
        /// Which node.
        node: NodeId,
        /// In which of its terms.
        term: NodeTerm,
        /// For how long the coordinator had not answered it, in milliseconds.
        silent_ms: u64,
    },
    /// The keeper of a node restarted: what its predecessor ran is dead.
    KeeperRestarted {
        /// Which node.
        node: NodeId,
        /// The new keeper's life.
        incarnation: Incarnation,
    },
    /// A node's keeper asks for a lease.
    Heard {
        /// Which node.
        node: NodeId,
        /// The keeper's life.
        incarnation: Incarnation,
    },
    /// QEMU ended by itself.
    Exited {
        /// On which node.
        node: NodeId,
        /// Under which epoch.
        epoch: Epoch,
        /// What it left behind.
        detail: String,
    },
    /// QEMU could not be started.
    StartFailed {
        /// On which node.
        node: NodeId,
        /// Under which epoch.
        epoch: Epoch,
        /// What stopped it.
        detail: String,
    },
    /// The guest shut itself down.
    GuestShutdown {
        /// On which node.
        node: NodeId,
        /// Under which epoch.
        epoch: Epoch,
    },
    /// The node has the most free room of those that may run it.
    MostRoom {
        /// Which node.
        node: NodeId,
        /// Memory left there afterwards, in bytes.
        free_bytes: u64,
    },
    /// The node that ran it says that the guest is the target's now.
    TargetRuns {
        /// The target.
        node: NodeId,
        /// Under which epoch.
        epoch: Epoch,
    },
    /// The source says that it kept the guest and gave the migration up.
    SourceKept {
        /// The source.
        node: NodeId,
        /// Under which epoch.
        epoch: Epoch,
        /// Why the migration ended.
        detail: String,
    },
    /// Nobody that is up has room.
    NoRoom {
        /// What each node lacks.
        why: String,
    },
    /// More crashes than the budget allows.
    BudgetSpent {
        /// How many in the window.
        crashes: u32,
        /// The window, in seconds.
        window_s: u64,
        /// The last one.
        detail: String,
    },
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Requested { by } => write!(f, "{by} asked for it"),
            Cause::LeaseEnded {
                node,
                term,
                silent_ms,
            } => {
                write!(
                    f,
                    "the lease of node {node} (term {term}) ended: not answered for {silent_ms} ms"
                )
            }
            Cause::KeeperRestarted { node, incarnation } => {
                write!(
                    f,
                    "the keeper of node {node} restarted as {incarnation}: what its predecessor ran is dead"
                )
            }
            Cause::Heard { node, incarnation } => write!(
                f,
                "the keeper {incarnation} of node {node} asks for a lease"
            ),
            Cause::Exited {
                node,
                epoch,
                detail,
            } => {
                write!(
                    f,
                    "its QEMU on node {node} (epoch {epoch}) ended by itself: {detail}"
                )
            }
            Cause::StartFailed {
                node,
                epoch,
                detail,
            } => {
                write!(
                    f,
                    "QEMU could not be started on node {node} (epoch {epoch}): {detail}"
                )
            }
            Cause::GuestShutdown { node, epoch } => {
                write!(f, "the guest shut down on node {node} (epoch {epoch})")
            }
            Cause::MostRoom { node, free_bytes } => {
                write!(
                    f,
                    "node {node} has the most room: {} MiB stay free",
                    free_bytes >> 20
                )
            }
            Cause::TargetRuns { node, epoch } => {
                write!(f, "the guest runs on node {node} now (epoch {epoch})")
            }
            Cause::SourceKept {
                node,
                epoch,
                detail,
            } => {
                write!(f, "node {node} kept the guest (epoch {epoch}): {detail}")
            }
            Cause::NoRoom { why } => write!(f, "no node has room: {why}"),
            Cause::BudgetSpent {
                crashes,
                window_s,
                detail,
            } => {
                write!(
                    f,
                    "it crashed {crashes} times in {window_s} s, the last time: {detail}"
                )
            }
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accelerator::Tcg => "tcg",
            Accelerator::Kvm => "kvm",
        })
    }
}
