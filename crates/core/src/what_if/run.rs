//! The copy on which the coordinator decides, and nodes that do as they are told.

use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

use crate::check::{Broken, check};
use crate::model::*;
use crate::observed::{Observed, Run as Word, VmReport};
use crate::plan::{Action, plan};
use crate::state::{ClusterState, Command, Proposal, Reply};

/// More rounds than any chain of decisions needs.
const ROUNDS: usize = 64;
/// Where the ids of the copy's requests begin: none of the state's own is taken for one.
const REQUESTS: u128 = 0x7768_6174_2d69_663f << 64;

pub(super) struct Run {
    pub(super) state: ClusterState,
    /// VMs that were migrated in the run.
    pub(super) moved: BTreeSet<VmId>,
    observed: Observed,
    now_ms: u64,
    proposals: u128,
}

impl Run {
    /// A copy in which the leases of these nodes have ended.
    pub(super) fn new(state: &ClusterState, observed: &Observed, now_ms: u64, lost: &[NodeId]) -> Self {
        let mut observed = observed.clone();
        let lost_after_ms = state.settings.profile.timing().lost_after_ms();
        for id in lost {
            let seen = observed.nodes.entry(*id).or_default();
            (seen.lease_ended, seen.silent_ms, seen.heard, seen.report) = (true, lost_after_ms, None, None);
        }
        Run { state: state.clone(), moved: BTreeSet::new(), observed, now_ms, proposals: 0 }
    }

    pub(super) fn unreachable(&mut self, volumes: &[(String, NodeId)]) {
        for (volume, node) in volumes {
            let lun = self.state.volumes.get(volume).filter(|_| self.state.luns.contains_key(volume));
            if let Some(report) = self.observed.nodes.entry(*node).or_default().report.as_mut() {
                let why = "it is supposed so".to_owned();
                match lun {
                    Some(lun) => drop(report.paths.insert(lun.id, LunPath::Unavailable { why })),
                    None => drop(report.unreachable.insert(volume.clone(), why)),
                }
            }
        }
    }

    /// Decides until nothing is left to decide.
    pub(super) fn settle(&mut self) -> Result<(), Broken> {
        for _ in 0..ROUNDS {
            self.nodes_answer();
            let plan = plan(&self.state, &self.observed, self.now_ms);
            check(&self.state, &plan)?;
            if plan.decisions.is_empty() {
                return Ok(());
            }
            for decision in &plan.decisions {
                if let Action::FinishMove { vm, .. } = decision.action {
                    self.moved.insert(vm);
                }
            }
            self.apply(Command::Decide { revision: plan.revision, decisions: plan.decisions });
        }
        Ok(())
    }

    /// Decides until nothing is left to decide, with these nodes drained; says of which
    /// VM it stays on one of them, and why.
    pub(super) fn drain(&mut self, nodes: &BTreeSet<NodeId>) -> Result<BTreeMap<VmId, String>, Broken> {
        for node in nodes {
            self.apply(Command::DrainNode { node: *node, drained: true });
        }
        // They leave one after the other.
        loop {
            let before = self.moved.len();
            self.settle()?;
            if self.moved.len() == before {
                break;
            }
        }
        let on_them = |vm: &&Vm| vm.node().is_some_and(|node| nodes.contains(&node));
        let why = |vm: &Vm| self.state.cannot_leave(vm).unwrap_or_else(|| "it was tried a moment ago".into());
        Ok(self.state.vms.values().filter(on_them).map(|vm| (vm.id, why(vm))).collect())
    }

    fn apply(&mut self, command: Command) -> Reply {
        self.proposals += 1;
        let id = RequestId(Uuid::from_u128(REQUESTS | self.proposals));
        self.state.apply(&Proposal { id, at_ms: self.now_ms, by: "what-if".into(), command })
    }

    /// What nodes would say of what they were told.
    fn nodes_answer(&mut self) {
        for (name, lun) in &self.state.luns {
            let (Some(owner), Some(volume)) = (lun.access.owner, self.state.volumes.get(name)) else { continue };
            let report = self.observed.nodes.get_mut(&owner.node).and_then(|seen| seen.report.as_mut());
            if let Some(report) = report.filter(|_| owner.leaving) {
                report.left.insert(volume.id, owner.epoch);
            }
        }
        let vms: Vec<_> = self.state.vms.values().cloned().collect();
        for vm in vms {
            match &vm.placement {
                Placement::Nowhere => {}
                Placement::On(tenure) => {
                    let told = match vm.desired {
                        Desired::Paused => Word::Paused,
                        Desired::Running => Word::Running,
                        Desired::Stopped | Desired::ForcedOff => Word::Exited { detail: "it was to be off".into() },
                    };
                    if self.word(vm.id, tenure).is_none_or(|word| matches!(word, Word::Starting)) {
                        self.say(vm.id, tenure, told);
                    }
                }
                Placement::Moving { from, to, stage, .. } => self.ends_answer(vm.id, from, to, stage),
            }
        }
    }

    /// Both ends do their part; the one that lost the other gives up.
    fn ends_answer(&mut self, vm: VmId, from: &Tenure, to: &Tenure, stage: &MoveStage) {
        match (self.state.is_void(from), self.state.is_void(to), stage) {
            (true, false, _) => {
                self.say(vm, to, Word::Exited { detail: "the source was lost before it had sent".into() })
            }
            (false, true, MoveStage::Transferring { .. }) => {
                self.say(vm, from, Word::Kept { why: "the target was lost".into() });
            }
            (false, false, MoveStage::Preparing) => self.say(vm, to, Word::Waiting { address: "target".into() }),
            (false, false, MoveStage::Transferring { .. }) => {
                self.say(vm, from, Word::Sent);
                self.say(vm, to, Word::Running);
            }
            (true, true, _) | (false, true, MoveStage::Preparing) => {}
        }
    }

    fn word(&self, vm: VmId, tenure: &Tenure) -> Option<&Word> {
        self.observed.run_of(self.state.nodes.get(&tenure.node)?, vm, tenure)
    }

    fn say(&mut self, vm: VmId, tenure: &Tenure, run: Word) {
        let Some(node) = self.state.nodes.get(&tenure.node).filter(|node| node.is_up()) else { return };
        let report = self.observed.nodes.entry(tenure.node).or_default().report.get_or_insert_default();
        (report.incarnation, report.term) = (node.incarnation, node.term);
        report.vms.insert(vm, VmReport { epoch: tenure.epoch, run, moved: None });
    }
}
