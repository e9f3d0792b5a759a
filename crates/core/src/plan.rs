//! The coordinator's decisions: a pure function of the state and what is observed.

mod drain;
mod migration;
mod vm;
mod volume;
mod witness;

use serde::{Deserialize, Serialize};

use crate::fencing;
use crate::model::*;
use crate::observed::Observed;
use crate::state::ClusterState;
use crate::witness::Memory;

/// What the coordinator wants to commit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The revision of the state that it was made from: its precondition.
    pub revision: u64,
    /// In order; each stands on the ones before it.
    pub decisions: Vec<Decision>,
}

/// One decision and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What to do.
    pub action: Action,
    /// Why.
    pub cause: Cause,
}

/// What can be decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// A node's lease has certainly ended, or its host has lost its power: every
    /// right of its term is void.
    DeclareLost {
        /// Which.
        node: NodeId,
    },
    /// A node that was to be removed is none any more: its lease has certainly ended.
    Forget {
        /// Which.
        node: NodeId,
    },
    /// A keeper may run VMs, in a new term.
    Admit {
        /// Its node.
        node: NodeId,
        /// Its life.
        incarnation: Incarnation,
    },
    /// A node may run a VM, under a new epoch.
    Place {
        /// Which VM.
        vm: VmId,
        /// Where.
        node: NodeId,
        /// Every right that was out, and what shows that it is over.
        after: Vec<Ended>,
    },
    /// Nobody may run a VM any more.
    Vacate {
        /// Which.
        vm: VmId,
        /// Every right that was out, and what shows that it is over.
        after: Vec<Ended>,
    },
    /// A VM that should run stays off.
    Hold {
        /// Which.
        vm: VmId,
        /// Why.
        hold: Hold,
    },
    /// The guest shut itself down: the VM is to be off.
    SwitchOff {
        /// Which.
        vm: VmId,
    },
    /// The guest did not shut down in time: it goes on.
    GiveUpStop {
        /// Which.
        vm: VmId,
    },
    /// The guest did not shut down in time for its restart: it goes on.
    GiveUpRestart {
        /// Which.
        vm: VmId,
    },
    /// The target is ready: RAM may move.
    Transfer {
        /// Which VM.
        vm: VmId,
        /// Where the target listens.
        address: String,
    },
    /// The guest runs on the target.
    FinishMove {
        /// Which VM.
        vm: VmId,
        /// The figures of the move.
        moved: Option<Moved>,
    },
    /// The guest stays on the source.
    AbortMove {
        /// Which VM.
        vm: VmId,
    },
    /// A node said how a VM is.
    Saw {
        /// Which VM.
        vm: VmId,
        /// How it is.
        seen: Seen,
    },
    /// A node said how far a job is.
    Progress {
        /// Which job.
        job: JobId,
        /// How far.
        progress: Progress,
    },
    /// A new VM's disks are there.
    DisksMade {
        /// Which VM.
        vm: VmId,
    },
    /// A new VM's disks could not be made, and nothing is left of them.
    DisksFailed {
        /// Which VM.
        vm: VmId,
        /// Why.
        why: String,
    },
    /// A VM's disks are gone, and so is the VM.
    DisksDeleted {
        /// Which VM.
        vm: VmId,
    },
    /// A VM's disks could not be deleted.
    DeleteFailed {
        /// Which VM.
        vm: VmId,
        /// Why.
        why: String,
    },
    /// A node should host the witness.
    SeatWitness {
        /// Which.
        host: NodeId,
    },
    /// A node said that it hosts the witness.
    WitnessHosted {
        /// Which.
        node: NodeId,
        /// Its epoch on the disk.
        epoch: u64,
    },
    /// A node said that it cannot use the witness's disk, or can again.
    WitnessTrouble {
        /// Which.
        node: NodeId,
        /// Why not.
        why: Option<String>,
    },
    /// A node misses on the witness's disk what it has seen there.
    WitnessMissing {
        /// Which.
        node: NodeId,
        /// What.
        seen: Memory,
    },
    /// A node said how it reaches a volume on a LUN.
    PathIs {
        /// The volume.
        volume: String,
        /// Which node.
        node: NodeId,
        /// How.
        path: LunPath,
    },
    /// The owner of a volume is to take nothing new and to end what is under way.
    LeaveVolume {
        /// The volume.
        volume: String,
    },
    /// A volume gets an owner, under a new epoch, or has none any more.
    OwnVolume {
        /// The volume.
        volume: String,
        /// Who; `None`: nobody can.
        to: Option<NodeId>,
        /// What shows that the last owner's right is over, if there was one.
        after: Option<Evidence>,
    },
    /// A VM moves while it runs, because its node reaches its disks only through another.
    MoveAway {
        /// Which.
        vm: VmId,
        /// Where to.
        to: NodeId,
    },
    /// No lease longer than the profile's is out any more.
    LeasesSettled,
}

/// A right to run a VM that is over, with what shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The right.
    pub tenure: Tenure,
    /// What shows it.
    pub evidence: Evidence,
}

/// What shows that a right to run a VM, or to own a volume, is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Evidence {
    /// The node's term is over: it was lost or admitted anew.
    TermOver,
    /// The node said that this epoch's QEMU is dead or never was; of a volume, that
    /// nothing of this epoch is under way and nothing is taken any more.
    Exited,
}

/// Decides what to do about everything that differs from what it should be.
///
/// `now_ms` is milliseconds since the Unix epoch; it only dates things and ages
/// crashes and waits, it never decides who may run a VM.
pub fn plan(state: &ClusterState, observed: &Observed, now_ms: u64) -> Plan {
    let mut planner = Planner { state: state.without_history(), observed, now_ms, decisions: Vec::new() };
    planner.nodes();
    planner.witness();
    planner.volumes();
    let mut vms: Vec<_> =
        planner.state.vms.values().map(|vm| (std::cmp::Reverse(vm.spec.priority), vm.created_ms, vm.id)).collect();
    vms.sort_unstable();
    for (.., vm) in vms {
        planner.vm(vm);
    }
    if observed.longer_leases_over && state.settings.longest_lease != state.settings.profile.timing() {
        planner.decide(Action::LeasesSettled, Cause::Requested { by: "coordinator".into() });
    }
    Plan { revision: state.revision, decisions: planner.decisions }
}

/// Decides on a copy of the state, so that each decision stands on the ones before.
struct Planner<'a> {
    state: ClusterState,
    observed: &'a Observed,
    now_ms: u64,
    decisions: Vec<Decision>,
}

impl Planner<'_> {
    fn decide(&mut self, action: Action, cause: Cause) {
        let decision = Decision { action, cause };
        self.state.decide(self.now_ms, &decision);
        self.decisions.push(decision);
    }

    fn nodes(&mut self) {
        let nodes: Vec<_> = self.state.nodes.values().cloned().collect();
        for node in nodes {
            let Some(seen) = self.observed.nodes.get(&node.id) else {
                continue;
            };
            if node.is_up() && seen.lease_ended {
                let cause = Cause::LeaseEnded { node: node.id, term: node.term, silent_ms: seen.silent_ms };
                self.decide(Action::DeclareLost { node: node.id }, cause);
            } else if node.is_up()
                && let Some(word) = fencing::believed(&node, seen)
            {
                let cause = Cause::PowerFenced { node: node.id, word: word.clone() };
                self.decide(Action::DeclareLost { node: node.id }, cause);
            }
            if node.leaves {
                self.forget(&node, seen.silent_ms);
                continue;
            }
            let Some(incarnation) = seen.heard else {
                continue;
            };
            // A keeper asks for its first lease only after it saw dead what a
            // predecessor ran, and after its own lease ended it killed everything:
            // in both cases nothing of the node's earlier term is alive.
            let lost = matches!(node.membership, Membership::Lost { .. });
            if lost || node.membership == Membership::Joined {
                self.decide(Action::Admit { node: node.id, incarnation }, Cause::Heard { node: node.id, incarnation });
            } else if !seen.lease_ended && node.incarnation != incarnation {
                let cause = Cause::KeeperRestarted { node: node.id, incarnation };
                self.decide(Action::Admit { node: node.id, incarnation }, cause);
            }
        }
    }

    /// A node that is to be removed is none any more once no right of it lasts.
    fn forget(&mut self, node: &Node, silent_ms: u64) {
        if self.state.nodes.get(&node.id).is_some_and(|now| !now.is_up()) {
            let cause = Cause::LeaseEnded { node: node.id, term: node.term, silent_ms };
            self.decide(Action::Forget { node: node.id }, cause);
        }
    }

    /// Nodes that were not answered for half a lease: they may be dying.
    fn quiet(&self) -> Vec<NodeId> {
        let half = self.state.settings.profile.timing().length_ms / 2;
        self.observed.nodes.iter().filter(|(_, seen)| seen.silent_ms > half).map(|(id, _)| *id).collect()
    }
}
