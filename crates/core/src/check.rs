//! An independent judge: refuses a plan that breaks a safety rule.
//!
//! It shares no code with the planner. It keeps its own small account of who is
//! up and who may run what, and follows the decisions through it.

use std::collections::BTreeMap;

use crate::model::*;
use crate::plan::{Action, Ended, Evidence, Plan};
use crate::state::ClusterState;

/// The rule that a plan breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Made from another state than the one it is checked against.
    #[error("the plan was made from revision {planned}, the state is at {current}")]
    Revision {
        /// The plan's.
        planned: u64,
        /// The state's.
        current: u64,
    },
    /// A node is called lost that is not up, or for another term.
    #[error("node {0} is called lost without its current term being over: no lease that ended, no power that is off")]
    Lost(NodeId),
    /// A node is admitted that does not exist.
    #[error("node {0} is admitted but does not exist")]
    Admitted(NodeId),
    /// A node is forgotten that nobody removes, or before its lease has ended.
    #[error("node {0} is forgotten although it is not being removed, or is up")]
    Forgotten(NodeId),
    /// A VM gets a new right while an old one may be alive.
    #[error("VM {vm} gets a new right while node {node} may still run it")]
    StillOut {
        /// The VM.
        vm: VmId,
        /// Who has the old right.
        node: NodeId,
    },
    /// A right is said to be over on evidence that does not hold.
    #[error("VM {vm}: the evidence that node {node} lost it does not hold")]
    Evidence {
        /// The VM.
        vm: VmId,
        /// Whose right.
        node: NodeId,
    },
    /// A VM is placed on a node that may not run VMs.
    #[error("VM {vm} is placed on node {node}, which is not up")]
    NotUp {
        /// The VM.
        vm: VmId,
        /// Where.
        node: NodeId,
    },
    /// A VM that was not there is placed on a node that is drained or being removed.
    #[error("VM {vm} comes to node {node}, which is drained or being removed")]
    Drained {
        /// The VM.
        vm: VmId,
        /// Where.
        node: NodeId,
    },
    /// A node's memory would be promised twice.
    #[error("node {node} would promise {promised} bytes of {has}")]
    Memory {
        /// Which node.
        node: NodeId,
        /// What would be promised.
        promised: u64,
        /// What it has.
        has: u64,
    },
    /// The witness is to be hosted by a node that cannot, or its epoch goes back.
    #[error("node {0} is to host the witness but is not up, or an epoch of it is told that is not new")]
    Witness(NodeId),
    /// A volume gets an owner that is not up, or while another may do I/O for others.
    #[error("volume {0:?} gets an owner that is not up, or before the last one's right is over")]
    Owner(String),
    /// A VM is moved that does not run in one place, or to where it cannot.
    #[error("VM {0}: a move is begun that is not from one node that is up to another")]
    MoveAway(VmId),
    /// A migration is ended that is not under way, or without its end's word.
    #[error("VM {0}: a migration is ended without the word of the end that has the guest")]
    Move(VmId),
}

/// Follows a plan's decisions and refuses the first that breaks a rule.
///
/// # Errors
/// The broken rule.
pub fn check(state: &ClusterState, plan: &Plan) -> Result<(), Broken> {
    if plan.revision != state.revision {
        return Err(Broken::Revision { planned: plan.revision, current: state.revision });
    }
    let mut account = Account::of(state);
    for decision in &plan.decisions {
        account.follow(state, &decision.action, &decision.cause)?;
    }
    Ok(())
}

struct Account {
    up: BTreeMap<NodeId, (bool, NodeTerm)>,
    rights: BTreeMap<VmId, Vec<Tenure>>,
    /// Who owns volumes on LUNs.
    owners: BTreeMap<String, Owner>,
}

impl Account {
    fn of(state: &ClusterState) -> Self {
        Account {
            up: state.nodes.values().map(|node| (node.id, (node.membership == Membership::Up, node.term))).collect(),
            rights: state.vms.values().map(|vm| (vm.id, vm.tenures().copied().collect())).collect(),
            owners: state.luns.iter().filter_map(|(name, lun)| Some((name.clone(), lun.access.owner?))).collect(),
        }
    }

    fn follow(&mut self, state: &ClusterState, action: &Action, cause: &Cause) -> Result<(), Broken> {
        match action {
            Action::DeclareLost { node } => {
                let known = self.up.get_mut(node).ok_or(Broken::Lost(*node))?;
                let shown = match cause {
                    Cause::LeaseEnded { node: of, term, .. } => of == node && *term == known.1,
                    Cause::PowerFenced { node: of, word } => {
                        // 0: it was switched off; 2: it was seen to be off afterwards.
                        let off = (word.off, word.status) == (Some(0), Some(2));
                        let agent = state.fencing.get(node).is_some_and(|fencing| fencing.agent == word.agent);
                        of == node && word.term == known.1 && off && agent
                    }
                    _ => false,
                };
                if !known.0 || !shown {
                    return Err(Broken::Lost(*node));
                }
                known.0 = false;
            }
            Action::Forget { node } => {
                let leaves = state.nodes.get(node).is_some_and(|node| node.leaves);
                let Some((false, _)) = self.up.remove(node).filter(|_| leaves) else {
                    return Err(Broken::Forgotten(*node));
                };
            }
            Action::Admit { node, .. } => {
                let known = self.up.get_mut(node).ok_or(Broken::Admitted(*node))?;
                *known = (true, known.1.next());
            }
            Action::Vacate { vm, after } => {
                self.all_over(*vm, after)?;
                self.rights.insert(*vm, Vec::new());
            }
            Action::Place { vm, node, after } => {
                self.all_over(*vm, after)?;
                self.may_come(state, *vm, *node)?;
                let Some((true, term)) = self.up.get(node).copied() else {
                    return Err(Broken::NotUp { vm: *vm, node: *node });
                };
                self.rights.insert(*vm, vec![Tenure { node: *node, term, epoch: Epoch(0) }]);
                self.memory(state, *node)?;
            }
            Action::SeatWitness { host } => {
                let coordinates = matches!(cause, Cause::NobodyElse { coordinator } if coordinator == host);
                let up = self.up.get(host).is_some_and(|(up, _)| *up);
                if state.witness.is_none() || !up && !coordinates {
                    return Err(Broken::Witness(*host));
                }
            }
            Action::WitnessHosted { node, epoch } => {
                let told = matches!(cause, Cause::Told { node: of } if of == node);
                let newer = state.witness.as_ref().is_some_and(|witness| *epoch > witness.epoch);
                if !told || !newer {
                    return Err(Broken::Witness(*node));
                }
            }
            Action::WitnessMissing { node, seen } => {
                let told = matches!(cause, Cause::Told { node: of } if of == node);
                let more = state.witness.as_ref().is_some_and(|witness| *seen > witness.missing);
                if !told || !more {
                    return Err(Broken::Witness(*node));
                }
            }
            Action::OwnVolume { volume, to, after } => {
                let over = match (self.owners.remove(volume), after) {
                    (None, None) => true,
                    (Some(owner), Some(Evidence::TermOver)) => {
                        self.up.get(&owner.node).is_none_or(|(up, term)| !up || *term != owner.term)
                    }
                    // It was told to take nothing new before, in a plan of its own.
                    (Some(owner), Some(Evidence::Exited)) => owner.leaving,
                    _ => false,
                };
                let up = to.is_none_or(|to| self.up.get(&to).is_some_and(|(up, _)| *up));
                if !state.luns.contains_key(volume) || !over || !up {
                    return Err(Broken::Owner(volume.clone()));
                }
            }
            Action::MoveAway { vm, to } => {
                let rights = self.rights.get(vm).map_or(&[][..], Vec::as_slice);
                let [from] = *rights else { return Err(Broken::MoveAway(*vm)) };
                self.may_come(state, *vm, *to)?;
                let Some((true, term)) = self.up.get(to).copied() else { return Err(Broken::MoveAway(*vm)) };
                if self.is_void(&from) || from.node == *to {
                    return Err(Broken::MoveAway(*vm));
                }
                self.rights.insert(*vm, vec![from, Tenure { node: *to, term, epoch: Epoch(0) }]);
                self.memory(state, *to)?;
            }
            Action::FinishMove { vm, .. } | Action::AbortMove { vm } => {
                let Some(Placement::Moving { from, to, stage, .. }) = state.vms.get(vm).map(|vm| &vm.placement) else {
                    return Err(Broken::Move(*vm));
                };
                let finished = matches!(action, Action::FinishMove { .. });
                let word = match cause {
                    Cause::TargetRuns { node, epoch } => {
                        finished && *node == to.node && *epoch == to.epoch && *stage != MoveStage::Preparing
                    }
                    Cause::SourceKept { node, epoch, .. } => !finished && *node == from.node && *epoch == from.epoch,
                    _ => false,
                };
                let owner = if finished { *to } else { *from };
                if !word || self.is_void(&owner) {
                    return Err(Broken::Move(*vm));
                }
                self.rights.insert(*vm, vec![owner]);
            }
            _ => {}
        }
        Ok(())
    }

    fn is_void(&self, tenure: &Tenure) -> bool {
        self.up.get(&tenure.node).is_none_or(|(up, term)| !up || *term != tenure.term)
    }

    /// Nothing comes to a node that is to be empty; what is there may stay.
    fn may_come(&self, state: &ClusterState, vm: VmId, node: NodeId) -> Result<(), Broken> {
        let open = state.nodes.get(&node).is_none_or(|node| node.drained_ms.is_none() && !node.leaves);
        let there = self.rights.get(&vm).is_some_and(|rights| rights.iter().any(|right| right.node == node));
        if open || there { Ok(()) } else { Err(Broken::Drained { vm, node }) }
    }

    /// Every right that is out has to be over, on evidence that holds.
    fn all_over(&self, vm: VmId, after: &[Ended]) -> Result<(), Broken> {
        for tenure in self.rights.get(&vm).map_or(&[][..], Vec::as_slice) {
            let ended = after.iter().find(|ended| ended.tenure == *tenure);
            match ended.map(|ended| ended.evidence) {
                None => {
                    return Err(Broken::StillOut { vm, node: tenure.node });
                }
                Some(Evidence::TermOver) if !self.is_void(tenure) => {
                    return Err(Broken::Evidence { vm, node: tenure.node });
                }
                Some(Evidence::TermOver | Evidence::Exited) => {}
            }
        }
        Ok(())
    }

    fn memory(&self, state: &ClusterState, node: NodeId) -> Result<(), Broken> {
        let has = state.nodes.get(&node).map_or(0, |node| node.facts.memory_bytes);
        let promised = self
            .rights
            .iter()
            .filter(|(_, rights)| rights.iter().any(|t| t.node == node && !self.is_void(t)))
            .filter_map(|(vm, _)| state.vms.get(vm))
            .map(|vm| vm.spec.memory_bytes)
            .sum();
        if promised > has { Err(Broken::Memory { node, promised, has }) } else { Ok(()) }
    }
}
