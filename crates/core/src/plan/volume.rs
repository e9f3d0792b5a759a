//! Who owns a volume on a LUN, what the nodes say of their paths, and VMs that
//! leave nodes whose paths stay away.

use std::cmp::Reverse;

use crate::model::*;
use crate::placement;

use super::{Action, Evidence, Planner};

/// A path that has not been there for so long, in milliseconds, is taken only when
/// there is no steadier one: one that comes and goes drags no owner along.
const STEADY_MS: u64 = 10_000;

impl Planner<'_> {
    pub(super) fn volumes(&mut self) {
        let names: Vec<String> = self.state.luns.keys().cloned().collect();
        for volume in &names {
            self.hear_paths(volume);
        }
        for volume in &names {
            self.owner(volume);
        }
    }

    fn hear_paths(&mut self, volume: &str) {
        let Some(id) = self.state.volumes.get(volume).map(|volume| volume.id) else { return };
        let said = self.state.nodes.values().filter(|node| node.is_up()).filter_map(|node| {
            let path = self.observed.nodes.get(&node.id)?.report_in_term(node)?.paths.get(&id)?;
            let known = self.state.reached(volume, node.id);
            let news = known.is_none_or(|known| !known.path.is_like(path));
            news.then(|| (node.id, path.clone()))
        });
        for (node, path) in said.collect::<Vec<_>>() {
            let action = Action::PathIs { volume: volume.into(), node, path };
            self.decide(action, Cause::Told { node });
        }
    }

    fn owner(&mut self, volume: &str) {
        let Some(access) = self.state.luns.get(volume).map(|lun| lun.access.clone()) else { return };
        match access.owner {
            None => {
                if let Some((to, cause)) = self.next_owner(volume, &access) {
                    self.give(volume, Some(to), None, cause);
                }
            }
            Some(owner) if self.state.is_owner_void(&owner) => self.succeed(volume, &access, Evidence::TermOver),
            Some(owner) if owner.leaving => {
                if self.has_left(volume, &owner) {
                    self.succeed(volume, &access, Evidence::Exited);
                }
            }
            Some(owner) if self.is_drained(owner.node) && self.state.is_fit(volume, owner.node) => {
                if self.next_owner(volume, &access).is_some_and(|(next, _)| !self.is_drained(next)) {
                    let cause = Cause::Drained { node: owner.node };
                    self.decide(Action::LeaveVolume { volume: volume.into() }, cause);
                }
            }
            Some(owner) if !self.state.is_fit(volume, owner.node) => {
                // While nobody else has a path either, nothing is gained.
                if self.next_owner(volume, &access).is_some() {
                    let cause = match self.state.reached(volume, owner.node).and_then(|reached| reached.path.why()) {
                        Some(why) => Cause::PathAway { node: owner.node, volume: volume.into(), why: why.into() },
                        None => Cause::Requested { by: "maintenance".into() },
                    };
                    self.decide(Action::LeaveVolume { volume: volume.into() }, cause);
                }
            }
            Some(_) => {}
        }
    }

    /// The last owner's right is over.
    fn succeed(&mut self, volume: &str, access: &Access, evidence: Evidence) {
        match self.next_owner(volume, access) {
            Some((to, cause)) => self.give(volume, Some(to), Some(evidence), cause),
            None => self.give(volume, None, Some(evidence), Cause::NoPath),
        }
    }

    fn give(&mut self, volume: &str, to: Option<NodeId>, after: Option<Evidence>, cause: Cause) {
        self.decide(Action::OwnVolume { volume: volume.into(), to, after }, cause);
    }

    /// Whoever a user named, if it can; else a node with a steady path that was answered
    /// lately, if there is one, and owns the fewest volumes.
    fn next_owner(&self, volume: &str, access: &Access) -> Option<(NodeId, Cause)> {
        if let Some(next) = access.next.filter(|next| self.state.is_fit(volume, *next) && !self.is_drained(*next)) {
            return Some((next, Cause::Requested { by: "a user".into() }));
        }
        let quiet = self.quiet();
        let owned = |id: NodeId| {
            let others = self.state.luns.keys().filter(|other| *other != volume);
            others.filter(|other| self.state.owner(other).is_some_and(|owner| owner.node == id)).count()
        };
        let steady = |id: NodeId| {
            let since_ms = self.state.reached(volume, id).map_or(0, |reached| reached.since_ms);
            self.now_ms.abs_diff(since_ms) >= STEADY_MS
        };
        let fit = self.state.nodes.keys().copied().filter(|id| self.state.is_fit(volume, *id));
        let best =
            fit.min_by_key(|id| (self.is_drained(*id), quiet.contains(id), Reverse(steady(*id)), owned(*id), *id))?;
        Some((best, Cause::FewestVolumes { node: best, owned: owned(best) }))
    }

    pub(super) fn is_drained(&self, id: NodeId) -> bool {
        self.state.nodes.get(&id).is_some_and(|node| node.drained_ms.is_some())
    }

    /// Whether the owner's node has said that nothing of others is under way there.
    fn has_left(&self, volume: &str, owner: &Owner) -> bool {
        let said = || {
            let id = self.state.volumes.get(volume)?.id;
            let node = self.state.nodes.get(&owner.node)?;
            self.observed.nodes.get(&owner.node)?.report_in_term(node)?.left.get(&id).copied()
        };
        said().is_some_and(|epoch| epoch >= owner.epoch)
    }

    /// A VM whose node has gone through another one for long moves to one that does not
    /// have to, if there is room.
    pub(super) fn leave_bad_path(&mut self, vm: &Vm, tenure: Tenure) {
        let runs = matches!(vm.seen, Seen::Running | Seen::Paused) && vm.desired.wants_qemu();
        if !runs || vm.restart.is_some() {
            return;
        }
        let patience_ms = self.state.settings.redirect_patience_s * 1000;
        let old = |at_ms: u64| self.now_ms.abs_diff(at_ms) >= patience_ms;
        let away = vm.spec.disks.iter().find_map(|disk| {
            let reached = self.state.reached(&disk.volume, tenure.node)?;
            let by_hand = self.state.luns.get(&disk.volume)?.access.redirected.contains(&tenure.node);
            match &reached.path {
                LunPath::Redirected { why, .. } if !by_hand && old(reached.since_ms) => {
                    Some(Cause::PathAway { node: tenure.node, volume: disk.volume.clone(), why: why.clone() })
                }
                _ => None,
            }
        });
        let Some(cause) = away else { return };
        // A move that came to nothing is not begun again at once.
        let tried = vm.causes.iter().rev().find(|because| matches!(because.cause, Cause::PathAway { .. }));
        if tried.is_some_and(|tried| !old(tried.at_ms)) {
            return;
        }
        let bad = |id: &NodeId| *id == tenure.node || !placement::reaches_directly(&self.state, *id, &vm.spec);
        let avoid: Vec<_> = self.state.nodes.keys().copied().filter(bad).collect();
        let Ok((to, _)) = placement::choose(&self.state, vm.id, &vm.spec, &avoid, &self.quiet()) else { return };
        if self.state.can_move(vm.id, Some(to)).is_ok() {
            self.decide(Action::MoveAway { vm: vm.id, to }, cause);
        }
    }
}
