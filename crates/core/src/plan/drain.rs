//! VMs leave nodes that are drained.

use crate::model::*;
use crate::placement;

use super::{Action, Planner};

/// How many VMs leave a node at a time: each moves as fast as it can.
const AT_ONCE: usize = 1;
/// A move that came to nothing is begun again after so long, in milliseconds; until
/// then others are.
const AGAIN_MS: u64 = 10_000;

impl Planner<'_> {
    /// A VM that runs on a drained node moves to another, if there is room.
    pub(super) fn leave_drained(&mut self, vm: &Vm, tenure: Tenure) {
        if !self.is_drained(tenure.node) {
            return;
        }
        let runs = matches!(vm.seen, Seen::Running | Seen::Paused) && vm.desired.wants_qemu();
        let leaves =
            |other: &&Vm| matches!(other.placement, Placement::Moving { from, .. } if from.node == tenure.node);
        if !runs || vm.restart.is_some() || self.state.vms.values().filter(leaves).count() >= AT_ONCE {
            return;
        }
        let this = Cause::Drained { node: tenure.node };
        let tried = vm.causes.iter().rev().find(|because| because.cause == this);
        if tried.is_some_and(|tried| self.now_ms.abs_diff(tried.at_ms) < AGAIN_MS) {
            return;
        }
        let Ok((to, _)) = placement::choose(&self.state, vm.id, &vm.spec, &[tenure.node], &self.quiet()) else {
            return;
        };
        if self.state.can_move(vm.id, Some(to)).is_ok() {
            self.decide(Action::MoveAway { vm: vm.id, to }, this);
        }
    }
}
