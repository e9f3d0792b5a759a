//! Rest: nothing swings to and fro once everything works again, and no queue grows
//! beyond its bound.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_core::{ClusterState, Epoch, NodeId, NodeTerm, Owner, Placement, VmId};

use super::World;
use crate::clock::MS;

/// From the heal until all is settled a VM gets so many rights to run at most: it is
/// started elsewhere, and moved once by what was asked before.
const EPOCHS: u64 = 4;
/// And a volume so many owners: who leaves it may be lost before it has left.
const OWNERS: u64 = 4;
/// So many entries about who takes part: three for a change, of which there are a
/// loss, a return of several at different times, and one that was begun before.
const MOVES: u64 = 18;
/// So many elections are won.
const ELECTIONS: u64 = 4;
/// In a cluster at rest so much is decided at most: that the witness goes back to
/// whom it was given, and that it did.
const DECISIONS: usize = 2;

/// What `core` keeps of what was, at most.
const EVENTS_KEPT: usize = 1_000;
const JOBS_KEPT: usize = 200;
const CAUSES_KEPT: usize = 16;
/// A VM's crashes within ten minutes: after twice a node's budget it is failed, but
/// a few more may be under way.
const CRASHES_KEPT: usize = 16;
/// Writes that wait for a participant's disk.
const WRITES: usize = 64;
/// Proposals that an agent has been asked for and has not answered.
const ASKED: usize = 64;

/// What does not change in a cluster at rest.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Standing {
    placements: BTreeMap<VmId, Placement>,
    terms: BTreeMap<NodeId, NodeTerm>,
    voters: BTreeSet<NodeId>,
    owners: Vec<(Option<Owner>, Epoch)>,
    elections: u64,
    moves: u64,
}

/// How much had happened when it was looked at.
#[derive(Clone, Debug)]
pub struct Mark {
    standing: Standing,
    epochs: BTreeMap<VmId, u64>,
    decisions: usize,
}

impl World {
    /// Remembers what there is now.
    pub fn mark(&self) -> Mark {
        let state = self.chain.latest();
        let standing = Standing {
            placements: state.vms.values().map(|vm| (vm.id, vm.placement.clone())).collect(),
            terms: state.nodes.values().map(|node| (node.id, node.term)).collect(),
            voters: state.voters.clone(),
            owners: World::owners_of_volumes(&state),
            elections: self.tally.elections,
            moves: self.tally.moves,
        };
        let epochs = state.vms.values().map(|vm| (vm.id, vm.last_epoch.0)).collect();
        Mark { standing, epochs, decisions: self.chain.decisions }
    }

    /// For how long everything has worked, nobody asked for anything, nothing was
    /// decided and no votes moved, in milliseconds.
    pub fn quiet_ms(&self) -> u64 {
        let since = self.last_decision.max(self.last_move).max(self.last_asked).max(self.last_heal);
        self.now.saturating_sub(since) / MS
    }

    /// From the heal until everything was settled nothing may have swung to and fro.
    pub fn judge_recovery(&mut self, healed: &Mark) {
        let now = self.mark();
        let most = now.epochs.iter().map(|(vm, epoch)| epoch - healed.epochs.get(vm).copied().unwrap_or(0)).max();
        let (moves, elections) =
            (now.standing.moves - healed.standing.moves, now.standing.elections - healed.standing.elections);
        let most = most.unwrap_or(0);
        let owners = now.standing.owners.iter().zip(&healed.standing.owners);
        let owners = owners.map(|((_, now), (_, then))| now.0 - then.0).max().unwrap_or(0);
        if owners > OWNERS {
            self.broken("nothing swings to and fro", format!("since the heal a volume got {owners} owners"));
        }
        self.tally.unrest = [most, moves, elections];
        if most > EPOCHS || moves > MOVES || elections > ELECTIONS {
            let text =
                format!("since the heal a VM got {most} epochs, votes moved {moves} times, {elections} elections");
            self.broken("nothing swings to and fro", text);
        }
    }

    /// At rest nothing moves, nobody is elected and next to nothing is decided.
    pub fn judge_rest(&mut self, before: &Mark) {
        let now = self.mark();
        let decisions = now.decisions - before.decisions;
        if now.standing != before.standing || decisions > DECISIONS {
            let text = format!("{decisions} decisions at rest: {:?} became {:?}", before.standing, now.standing);
            self.broken("rests when all is well", text);
        }
    }

    /// The queues of an agent.
    pub(super) fn judge_queues(&mut self, host: usize) {
        let agent = &self.hosts[host].agent;
        let full = [("writes", agent.seat.writes.len(), WRITES), ("proposals", agent.asked.len(), ASKED)];
        for (most, (_, length, _)) in self.tally.fullest.iter_mut().zip(full) {
            *most = (*most).max(length as u64);
        }
        if let Some((what, length, bound)) = full.into_iter().find(|(_, length, bound)| length > bound) {
            self.broken("queues have bounds", format!("{length} {what} wait on n{}, {bound} may", host + 1));
        }
    }

    /// What the agreed state keeps.
    pub(super) fn judge_history(&mut self, state: &ClusterState) {
        let ended = state.jobs.len() - state.running_jobs().count();
        let causes = state.vms.values().map(|vm| vm.causes.len()).max().unwrap_or(0);
        let crashes = state.vms.values().map(|vm| vm.crashes.len()).max().unwrap_or(0);
        let kept = [
            ("events", state.events.len(), EVENTS_KEPT),
            ("jobs that ended", ended, JOBS_KEPT),
            ("causes of a VM", causes, CAUSES_KEPT),
            ("crashes of a VM", crashes, CRASHES_KEPT),
        ];
        for (most, (_, length, _)) in self.tally.fullest[2..].iter_mut().zip(kept) {
            *most = (*most).max(length as u64);
        }
        if let Some((what, length, bound)) = kept.into_iter().find(|(_, length, bound)| length > bound) {
            self.broken("queues have bounds", format!("{length} {what} are kept, {bound} may be"));
        }
    }
}
