//! The coordinator: leases and reports in, one checked plan at a time out.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use holdfast_core::check::check;
use holdfast_core::lease::{BootTime, LeaseSlot, LeaseTiming};
use holdfast_core::plan::plan;
use holdfast_core::quorum::Attendance;
use holdfast_core::*;

use super::World;
use crate::mutation::Mutation;

/// A plan is made this often even if nothing seems to have changed: waits end.
const PLAN_EVERY_MS: u64 = 200;

/// When the coordinator begins to wonder what became of its proposal.
const DECIDE_DEADLINE_MS: u64 = 500;

/// One coordinatorship.
pub struct Coordinatorship {
    /// Its term of Raft.
    pub term: u64,
    pub slots: Vec<LeaseSlot>,
    pub reports: BTreeMap<NodeId, Rc<NodeReport>>,
    /// When the report was sent that is known.
    pub reported: BTreeMap<NodeId, u64>,
    /// The hosts that were to be switched off, each once in a term of its node.
    pub ordered: BTreeSet<(NodeId, NodeTerm)>,
    /// What became of it, and when that was said.
    pub fences: BTreeMap<NodeId, (FenceWord, BootTime)>,
    /// The last proposal, until its outcome is known.
    outstanding: Option<(RequestId, BootTime, Vec<NodeId>)>,
    pub dirty: bool,
    planned: BootTime,
    revision: u64,
    /// The timing that is granted, and since when no longer one was.
    granting: (LeaseTiming, BootTime),
    /// Who attends, and when to look next.
    pub attendance: Attendance,
    pub look_next: BootTime,
    /// When to tell again that votes moved.
    pub tell_next: BootTime,
}

impl Coordinatorship {
    pub fn begin(term: u64, now: BootTime, state: &ClusterState, skip_wait: bool) -> Self {
        let longest = state.settings.longest_lease;
        // The mutation takes over as if it had done so long ago.
        let since = if skip_wait { BootTime(now.0.saturating_sub(longest.lost_after_ms() * 900_000)) } else { now };
        let slot = |node: &Node| LeaseSlot::assumed(node.id, node.incarnation, node.term, node.is_up(), since, longest);
        Coordinatorship {
            term,
            slots: state.nodes.values().map(slot).collect(),
            reports: BTreeMap::new(),
            reported: BTreeMap::new(),
            ordered: BTreeSet::new(),
            fences: BTreeMap::new(),
            outstanding: None,
            dirty: true,
            planned: BootTime(0),
            revision: 0,
            granting: (state.settings.profile.timing(), now),
            attendance: Attendance::new(now),
            look_next: now,
            tell_next: now,
        }
    }

    /// Takes over what the cluster has agreed on since: `crates/holdfast/src/leases`.
    fn follow(&mut self, state: &ClusterState, now: BootTime) {
        let timing = state.settings.profile.timing();
        if timing != self.granting.0 {
            self.granting = (timing, now);
        }
        self.slots.retain(|slot| state.nodes.contains_key(&slot.node));
        for node in state.nodes.values() {
            let fresh = || {
                let longest = state.settings.longest_lease;
                LeaseSlot::assumed(node.id, node.incarnation, node.term, node.is_up(), now, longest)
            };
            match self.slots.iter_mut().find(|slot| slot.node == node.id) {
                Some(slot) if slot.term == node.term => slot.admit(node.incarnation, node.term, node.is_up()),
                Some(slot) => {
                    // What was heard stays heard.
                    *slot = fresh();
                }
                None => self.slots.push(fresh()),
            }
            if let Some(slot) = self.slots.iter_mut().find(|slot| slot.node == node.id) {
                slot.retire(node.leaves);
            }
        }
    }
}

impl World {
    pub(super) fn coordinate(&mut self, host: usize) {
        let now = self.boot(host);
        let at_once = self.mutated(Mutation::CoordinateAtOnce);
        let agent = &mut self.hosts[host].agent;
        let leads = agent.seat.raft.leads_since().is_some_and(|blank| at_once || agent.applied >= blank);
        let same = agent.coordinatorship.as_ref().is_some_and(|c| c.term == agent.seat.raft.term);
        if !leads || !same {
            agent.coordinatorship = None;
            if !leads {
                return;
            }
            self.begin_coordinating(host);
        }
        let agent = &mut self.hosts[host].agent;
        let Some(mut mine) = agent.coordinatorship.take() else {
            return;
        };
        let state = agent.state.clone();
        if mine.revision != state.revision {
            mine.follow(&state, now);
            mine.revision = state.revision;
            mine.dirty = true;
        }
        self.keep_members(host, &mut mine, &state, now);
        self.settle_outstanding(host, &mut mine, &state, now);
        self.watch_leases(host, &mut mine, &state, now);
        if mine.dirty || now.ms_since(mine.planned) >= PLAN_EVERY_MS {
            let observed = self.observe(host, &mut mine, &state, now);
            self.fence(host, &mut mine, &state, &observed, now);
            mine.planned = now;
            if mine.outstanding.is_none() {
                mine.dirty = false;
                self.decide(host, &mut mine, &state, &observed, now);
            }
        }
        self.hosts[host].agent.coordinatorship = Some(mine);
    }

    /// The planner goes on when it knows what became of its last proposal. Its own
    /// log tells: while this node leads, what it stored is committed or still may be.
    fn settle_outstanding(&mut self, host: usize, mine: &mut Coordinatorship, state: &ClusterState, now: BootTime) {
        let Some((id, deadline, lost)) = &mine.outstanding else {
            return;
        };
        let known = self.chain.index_of(*id).is_some_and(|index| index <= self.hosts[host].agent.applied);
        if known {
            mine.outstanding = None;
            mine.dirty = true;
        } else if now >= *deadline && self.mutated(Mutation::TimeoutIsFailure) {
            // "It failed, so nobody was called lost."
            for slot in mine.slots.iter_mut().filter(|slot| lost.contains(&slot.node)) {
                let longest = state.settings.longest_lease;
                *slot = LeaseSlot::assumed(slot.node, slot.admitted, slot.term, slot.up, now, longest);
            }
            mine.outstanding = None;
        }
    }

    /// Whether the lease of a slot has certainly ended, before and now.
    fn lease_ended(
        &self,
        host: usize,
        mine: &mut Coordinatorship,
        at: usize,
        timing: LeaseTiming,
        now: BootTime,
    ) -> (bool, bool) {
        let slot = &mut mine.slots[at];
        let silent_ms = if slot.node == self.node_of(host) { 0 } else { mine.attendance.silent_ms(slot.node, now) };
        let judged_at = if self.mutated(Mutation::DropMargin) { now.plus_ms(timing.margin_ms()) } else { now };
        let was = slot.condemn_if_ended(BootTime(0));
        let mut ended = slot.condemn_if_ended(judged_at);
        if self.mutated(Mutation::SilenceIsLost) {
            ended |= slot.up && slot.silent_ms(now) > 3 * timing.heartbeat_ms;
        }
        if self.mutated(Mutation::UnheardIsLost) {
            ended |= slot.up && silent_ms > timing.lost_after_ms();
        }
        if self.mutated(Mutation::ForgetAtOnce) {
            ended |= slot.retired();
        }
        (was, ended)
    }

    fn watch_leases(&mut self, host: usize, mine: &mut Coordinatorship, state: &ClusterState, now: BootTime) {
        let timing = state.settings.profile.timing();
        for at in 0..mine.slots.len() {
            let (was, ended) = self.lease_ended(host, mine, at, timing, now);
            let (node, term, up) = (mine.slots[at].node, mine.slots[at].term, mine.slots[at].up);
            if ended && !was && up {
                mine.dirty = true;
                // Without authority a successor may grant leases by now; then
                // this one's opinion is never committed.
                let acked = self.hosts[host].agent.seat.raft.quorum_acked(now);
                if acked.is_some_and(|acked| now < acked.plus_ms(self.election().window_ms)) {
                    self.judge_condemned(host, node, term);
                }
            }
        }
    }

    fn observe(&mut self, host: usize, mine: &mut Coordinatorship, state: &ClusterState, now: BootTime) -> Observed {
        let timing = state.settings.profile.timing();
        let mut observed = Observed::default();
        for at in 0..mine.slots.len() {
            let (_, lease_ended) = self.lease_ended(host, mine, at, timing, now);
            let slot = &mine.slots[at];
            let seen = NodeObserved {
                lease_ended,
                silent_ms: slot.silent_ms(now),
                heard: slot.heard_within(3 * timing.heartbeat_ms, now),
                // A host that is heard after it was said to be off is not off.
                fence: mine
                    .fences
                    .get(&slot.node)
                    .filter(|(_, at)| slot.heard_within(now.ms_since(*at), now).is_none())
                    .map(|(word, _)| word.clone()),
                report: mine.reports.get(&slot.node).map(|report| (**report).clone()),
                ..NodeObserved::default()
            };
            observed.nodes.insert(slot.node, seen);
        }
        let settled = mine.granting.1.plus_ms(state.settings.longest_lease.lost_after_ms());
        observed.longer_leases_over = now >= settled;
        let me = self.node_of(host);
        observed.attendance = Some(mine.attendance.attending(state, me, now));
        observed
    }

    fn decide(
        &mut self,
        host: usize,
        mine: &mut Coordinatorship,
        state: &ClusterState,
        observed: &Observed,
        now: BootTime,
    ) {
        let now_ms = self.wall_ms(host);
        let plan = plan(state, observed, now_ms);
        if plan.decisions.is_empty() {
            return;
        }
        if let Err(broken) = check(state, &plan) {
            return self.broken("plan refused", format!("{broken}: {:?}", plan.decisions));
        }
        let lost = plan.decisions.iter().filter_map(|decision| match decision.action {
            Action::DeclareLost { node } => Some(node),
            _ => None,
        });
        let lost = lost.collect();
        let command = Command::Decide { revision: plan.revision, decisions: plan.decisions };
        let id = self.own_proposal(host, command);
        mine.outstanding = Some((id, now.plus_ms(DECIDE_DEADLINE_MS), lost));
    }

    /// Whether the coordinator has nothing on its mind.
    pub(super) fn is_settled(&self, host: usize) -> bool {
        let agent = &self.hosts[host].agent;
        agent.alive && agent.coordinatorship.as_ref().is_some_and(|mine| mine.outstanding.is_none())
    }
}
