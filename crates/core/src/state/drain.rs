//! Nodes that are emptied for maintenance.

use crate::model::*;
use crate::placement;

use super::commands::Executed;
use super::{ClusterState, Refusal, Reply};

impl ClusterState {
    pub(super) fn drain_node(&mut self, at_ms: u64, by: &str, id: NodeId, drained: bool) -> Executed {
        let node = self.nodes.get_mut(&id).ok_or_else(|| Refusal::unknown("node", id))?;
        let name = node.name.clone();
        let text = match (node.drained_ms, drained) {
            _ if node.leaves => return Err(Refusal::Conflict(format!("node {name:?} is being removed"))),
            (Some(_), true) => return Ok(Reply::Done),
            (None, false) => return Err(Refusal::Conflict(format!("node {name:?} is not drained"))),
            (None, true) => "drains it: VMs leave it, and none comes",
            (Some(_), false) => "lets VMs come to it again",
        };
        node.drained_ms = drained.then_some(at_ms);
        self.event(at_ms, Severity::Info, format!("node {name}"), format!("{by} {text}"));
        Ok(Reply::Done)
    }

    /// What stands in the way of a VM that is to leave its node; `None` when nothing does.
    pub fn cannot_leave(&self, vm: &Vm) -> Option<String> {
        let node = vm.node()?;
        if matches!(vm.placement, Placement::Moving { .. }) {
            return None;
        }
        match placement::choose(self, vm.id, &vm.spec, &[node], &[]) {
            Ok((to, _)) => self.can_move(vm.id, Some(to)).err().map(|refusal| refusal.to_string()),
            Err(mut denials) => {
                denials.retain(|(other, _)| *other != node);
                Some(format!("no node has room: {}", placement::tell(self, &denials)))
            }
        }
    }
}
