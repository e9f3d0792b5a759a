//! What the coordinator sees: leases from its lease thread, reports from the
//! nodes' agents. None of it is replicated: a new coordinator sees it anew.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::model::*;
use crate::witness::Memory;

/// Everything that the coordinator sees.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// By node; a node that is missing was not heard of yet.
    pub nodes: BTreeMap<NodeId, NodeObserved>,
    /// Who coordinates and who acknowledges what it says; without it nothing is
    /// decided that hangs on it.
    pub attendance: Option<Attending>,
    /// No lease of an earlier, longer timing can be out any more.
    pub longer_leases_over: bool,
}

/// Who coordinates, and who does not acknowledge it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attending {
    /// The coordinator itself.
    pub coordinator: NodeId,
    /// Those that have acknowledged nothing for [`crate::quorum::SILENT_MS`].
    pub silent: BTreeSet<NodeId>,
    /// Those that acknowledged something a moment ago.
    pub present: BTreeSet<NodeId>,
}

/// What the coordinator sees of one node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeObserved {
    /// Its lease in the current term has certainly ended.
    pub lease_ended: bool,
    /// For how long it was not answered, in milliseconds.
    pub silent_ms: u64,
    /// The life of the keeper that asks for a lease.
    pub heard: Option<Incarnation>,
    /// The last report of its agent.
    pub report: Option<NodeReport>,
    /// What became of the last order to switch its host off. A word after which its
    /// keeper was heard is not told: it was wrong.
    #[serde(default)]
    pub fence: Option<FenceWord>,
    /// Networks that the coordinator shares with it and does not hear it on.
    #[serde(default)]
    pub unheard_on: Vec<String>,
}

/// What a node's agent says, whole each time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The life of its keeper.
    pub incarnation: Incarnation,
    /// The term of its lease.
    pub term: NodeTerm,
    /// What it says of itself.
    pub facts: NodeFacts,
    /// Its QEMUs.
    pub vms: BTreeMap<VmId, VmReport>,
    /// Its work on disks.
    pub work: BTreeMap<JobId, WorkReport>,
    /// Volumes that it does not reach, and why.
    pub unreachable: BTreeMap<String, String>,
    /// How it reaches volumes on LUNs, by their identities.
    #[serde(default)]
    pub paths: BTreeMap<Uuid, LunPath>,
    /// Volumes of which it does no I/O for others any more, up to which epoch of their
    /// owner.
    #[serde(default)]
    pub left: BTreeMap<Uuid, Epoch>,
    /// How it stands to the witness.
    #[serde(default)]
    pub witness: Option<WitnessReport>,
    /// How its host's watchdog stands.
    #[serde(default)]
    pub watchdog: Option<crate::watchdog::Standing>,
}

/// What a node says of the witness.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WitnessReport {
    /// Which witness.
    pub id: NodeId,
    /// The epoch on the disk since which it hosts it, if it does.
    pub hosts_since: Option<u64>,
    /// Why it cannot use the disk; a clause that follows the node's name.
    pub trouble: Option<String>,
    /// What it has seen on the disk, if that shows less now.
    #[serde(default)]
    pub missing: Option<Memory>,
}

/// What a node says of one of its QEMUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    /// Under which epoch it was started.
    pub epoch: Epoch,
    /// How it is.
    pub run: Run,
    /// On a migration's target: the figures of its coming.
    #[serde(default)]
    pub moved: Option<Moved>,
}

/// How a QEMU is. Every word is final where it says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Run {
    /// On its way.
    Starting,
    /// The guest runs here.
    Running,
    /// The guest is here and stands still.
    Paused,
    /// The guest was asked to shut down.
    Stopping,
    /// A migration's target: waits for the guest at this address.
    Waiting {
        /// `ADDRESS:PORT` on the migration network.
        address: String,
    },
    /// A migration's source: the guest is here, RAM is on its way.
    Sending {
        /// How far.
        progress: Progress,
    },
    /// A migration's source, final: it was given up, the guest is here.
    Kept {
        /// Why.
        why: String,
    },
    /// A migration's source, final: the guest is never continued here.
    Sent,
    /// Final: QEMU is dead, the epoch is used up.
    Exited {
        /// What it left behind.
        detail: String,
    },
    /// Final: the keeper killed QEMU because the node's lease had ended.
    Fenced,
    /// Final: QEMU could not be started, the epoch is used up.
    StartFailed {
        /// What stopped it.
        detail: String,
    },
    /// Final: another QEMU has a disk open, so this one ended before its guest began;
    /// the epoch is used up.
    Locked {
        /// Which disk.
        detail: String,
    },
    /// The guest shut itself down; QEMU waits to be ended.
    GuestShutdown,
}

impl Run {
    /// Whether nothing of it is left.
    pub fn is_over(&self) -> bool {
        matches!(self, Run::Exited { .. } | Run::StartFailed { .. } | Run::Fenced | Run::Locked { .. })
    }
}

/// What a node says of its work on disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkReport {
    /// How far.
    pub progress: Progress,
    /// How it ended.
    pub end: Option<Result<(), String>>,
}

impl NodeObserved {
    /// The last report, if it speaks for the node's current term.
    pub fn report_in_term(&self, node: &Node) -> Option<&NodeReport> {
        self.report.as_ref().filter(|report| report.incarnation == node.incarnation && report.term == node.term)
    }
}

impl Observed {
    /// What the node said of its QEMU of `vm` for this very tenure.
    pub fn said_of(&self, node: &Node, vm: VmId, tenure: &Tenure) -> Option<&VmReport> {
        let report = self.nodes.get(&tenure.node)?.report_in_term(node)?;
        report.vms.get(&vm).filter(|report| report.epoch == tenure.epoch && node.term == tenure.term)
    }

    /// How the node's QEMU of `vm` is, for this very tenure.
    pub fn run_of(&self, node: &Node, vm: VmId, tenure: &Tenure) -> Option<&Run> {
        self.said_of(node, vm, tenure).map(|report| &report.run)
    }
}
