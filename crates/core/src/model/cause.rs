//! Why things happened.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Epoch, FenceWord, Incarnation, NodeId, NodeTerm};

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
    /// A node's host was switched off, and seen to be off.
    PowerFenced {
        /// Which node.
        node: NodeId,
        /// What the fence agent said.
        word: FenceWord,
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
    /// A node's keeper killed QEMU because its lease had ended.
    Fenced {
        /// Which node.
        node: NodeId,
        /// Under which epoch.
        epoch: Epoch,
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
    /// Another QEMU has a disk open.
    DiskLocked {
        /// On which node this was found.
        node: NodeId,
        /// Under which epoch.
        epoch: Epoch,
        /// Which disk.
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
    /// The guest did not react to its power button.
    NoReaction {
        /// How long was waited, in seconds.
        seconds: u32,
    },
    /// The target of a migration is ready.
    TargetWaits {
        /// The target.
        node: NodeId,
        /// Under which epoch.
        epoch: Epoch,
    },
    /// The target of a migration says that the guest runs there now.
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
    /// The witness should not sit on the node that coordinates.
    BesideCoordinator {
        /// Who coordinates.
        coordinator: NodeId,
    },
    /// No other node than the coordinator can host the witness.
    NobodyElse {
        /// Who coordinates.
        coordinator: NodeId,
    },
    /// A node said so.
    Told {
        /// Which node.
        node: NodeId,
    },
    /// A node does not reach a volume by itself.
    PathAway {
        /// Which node.
        node: NodeId,
        /// The volume.
        volume: String,
        /// What is in the way.
        why: String,
    },
    /// A node is drained for maintenance.
    Drained {
        /// Which node.
        node: NodeId,
    },
    /// A node reaches a volume by itself, and owns the fewest others of those that do.
    FewestVolumes {
        /// Which node.
        node: NodeId,
        /// How many others it owns.
        owned: usize,
    },
    /// No node reaches a volume by itself.
    NoPath,
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

impl Cause {
    /// Whether a node's whole term is over by it.
    pub fn is_loss_of_node(&self) -> bool {
        matches!(self, Cause::LeaseEnded { .. } | Cause::PowerFenced { .. } | Cause::KeeperRestarted { .. })
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Requested { by } => write!(f, "{by} asked for it"),
            Cause::LeaseEnded { node, term, silent_ms } => {
                write!(f, "the lease of node {node} (term {term}) ended: not answered for {silent_ms} ms")
            }
            Cause::PowerFenced { node, word } => write!(
                f,
                "the power of node {node} (term {}) was switched off by {}, and seen to be off, within {} ms",
                word.term, word.agent, word.took_ms
            ),
            Cause::KeeperRestarted { node, incarnation } => {
                write!(f, "the keeper of node {node} restarted as {incarnation}: what its predecessor ran is dead")
            }
            Cause::Heard { node, incarnation } => write!(f, "the keeper {incarnation} of node {node} asks for a lease"),
            Cause::Exited { node, epoch, detail } => {
                write!(f, "its QEMU on node {node} (epoch {epoch}) ended by itself: {detail}")
            }
            Cause::Fenced { node, epoch } => {
                write!(f, "the lease of node {node} had ended, so its QEMU there (epoch {epoch}) was killed")
            }
            Cause::StartFailed { node, epoch, detail } => {
                write!(f, "QEMU could not be started on node {node} (epoch {epoch}): {detail}")
            }
            Cause::DiskLocked { node, epoch, detail } => {
                write!(f, "node {node} could not start it (epoch {epoch}): {detail}")
            }
            Cause::GuestShutdown { node, epoch } => {
                write!(f, "the guest shut down on node {node} (epoch {epoch})")
            }
            Cause::MostRoom { node, free_bytes } => {
                write!(f, "node {node} has the most room: {} MiB stay free", free_bytes >> 20)
            }
            Cause::NoReaction { seconds } => {
                write!(f, "the guest did not react to its power button for {seconds} s: try again with --force")
            }
            Cause::TargetWaits { node, epoch } => {
                write!(f, "node {node} waits for the guest (epoch {epoch})")
            }
            Cause::TargetRuns { node, epoch } => {
                write!(f, "the guest runs on node {node} now (epoch {epoch})")
            }
            Cause::SourceKept { node, epoch, detail } => {
                write!(f, "node {node} kept the guest (epoch {epoch}): {detail}")
            }
            Cause::BesideCoordinator { coordinator } => {
                write!(f, "node {coordinator} coordinates, and with the witness on it its loss would cost both")
            }
            Cause::NobodyElse { coordinator } => {
                write!(f, "no other node than the coordinator, node {coordinator}, can host the witness now")
            }
            Cause::Told { node } => write!(f, "node {node} said so"),
            Cause::PathAway { node, volume, why } => {
                write!(f, "node {node} does not reach volume {volume} by itself: {why}")
            }
            Cause::Drained { node } => write!(f, "node {node} is drained for maintenance"),
            Cause::FewestVolumes { node, owned } => {
                write!(f, "node {node} reaches it by itself, and owns {owned} other volumes")
            }
            Cause::NoPath => write!(f, "no node reaches it by itself"),
            Cause::NoRoom { why } => write!(f, "no node has room: {why}"),
            Cause::BudgetSpent { crashes, window_s, detail } => {
                write!(f, "it crashed {crashes} times in {window_s} s, the last time: {detail}")
            }
        }
    }
}
