//! Who votes: the coordinator has the members of consensus follow what
//! `core::quorum` says, one change at a time, as `crates/holdfast/src/agent` does.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use holdfast_core::lease::BootTime;
use holdfast_core::quorum::{self, Heard};
use holdfast_core::{ClusterState, Command, NodeId};

use super::World;
use super::coordinator::Coordinatorship;
use crate::mutation::Mutation;
use crate::raft::{Group, Members, What};

/// Attendance is looked at this often.
const LOOK_EVERY_MS: u64 = 100;

/// That votes moved is told again after so long.
const TELL_AGAIN_MS: u64 = 500;

/// A new voter may lack so many entries when it gets its vote.
const CAUGHT_UP: usize = 8;

impl World {
    pub(super) fn keep_members(
        &mut self,
        host: usize,
        mine: &mut Coordinatorship,
        state: &ClusterState,
        now: BootTime,
    ) {
        if now < mine.look_next {
            return;
        }
        mine.look_next = now.plus_ms(LOOK_EVERY_MS);
        let me = self.node_of(host);
        let raft = &self.hosts[host].agent.seat.raft;
        let members = *raft.members();
        let voting: BTreeSet<_> = members.voting().iter().map(|who| self.node_id(who)).collect();
        let others = members.all().iter().filter(|who| *who != host);
        let heard: BTreeMap<_, _> = others
            .map(|who| {
                let behind = raft.lacks(who);
                let heard = Heard { acknowledged: raft.acked(who), behind: Some(behind as u64) };
                (self.node_id(who), heard)
            })
            .collect();
        mine.attendance.hear(state, &heard, now);
        if raft.is_changing() {
            return;
        }
        let unfit = mine.attendance.unfit(state, me, &voting, now).into_keys().collect();
        let mut seats = quorum::seats(state, me, &voting, &unfit);
        let leaves = !state.nodes.contains_key(&me);
        if leaves {
            // This node was removed: another decides, and needs a vote for that.
            seats.voters.insert(me);
        }
        let (voters, learners) = (self.group(&seats.voters), self.group(&seats.learners));
        let wanted = Members { voters, before: None, learners };
        if let Some(next) = self.next_members(host, &members, &wanted) {
            let told = self.told(&members, &next);
            self.log(|| format!("  n{} {told}", host + 1));
            self.tally.moves += 1;
            self.last_move = self.now;
            self.propose(host, What::Members(Rc::new(next)));
        } else if members.voters == wanted.voters && state.voters != seats.voters && now >= mine.tell_next {
            mine.tell_next = now.plus_ms(TELL_AGAIN_MS);
            self.own_proposal(host, Command::VotesMoved { voters: seats.voters });
        } else if leaves {
            let mut heirs = members.voters.iter().filter(|who| *who != host && *who < self.setting.nodes);
            let answers = |who: &usize| mine.attendance.is_present(self.node_id(*who), now);
            if let Some(to) = heirs.find(|who| answers(who)) {
                self.hand_over(host, to, now);
            }
        }
    }

    /// The next step from here to there: new ones learn first and vote when they
    /// have caught up, and while votes move both majorities count.
    fn next_members(&self, host: usize, now: &Members, wanted: &Members) -> Option<Members> {
        let new = wanted.all().without(now.all());
        if !new.is_empty() {
            return Some(Members { learners: now.learners.or(new), ..*now });
        }
        if now.before.is_some() {
            // A change that was begun ends first, perhaps by another coordinator.
            let learners = now.all().without(now.voters);
            return Some(Members { voters: now.voters, before: None, learners });
        }
        if now.voters != wanted.voters {
            let raft = &self.hosts[host].agent.seat.raft;
            let ready = wanted.voters.without(now.voters).iter().all(|who| raft.lacks(who) <= CAUGHT_UP);
            let before = (!self.mutated(Mutation::SkipJoint)).then_some(now.voters);
            let learners = now.all().without(wanted.voters).without(before.unwrap_or_default());
            return ready.then_some(Members { voters: wanted.voters, before, learners });
        }
        let gone = now.all().without(wanted.all());
        (!gone.is_empty()).then_some(Members { learners: now.learners.without(gone), ..*now })
    }

    /// Hands the coordination over; nothing is granted in this term any more.
    pub(super) fn hand_over(&mut self, host: usize, to: usize, now: BootTime) {
        let Some(out) = self.hosts[host].agent.seat.raft.hand_over(to, now) else {
            return;
        };
        self.log(|| format!("  n{} hands over to n{}", host + 1, to + 1));
        self.after_raft(host, host, out);
    }

    pub(super) fn group(&self, ids: &BTreeSet<NodeId>) -> Group {
        ids.iter().map(|id| self.participant(*id)).collect()
    }

    fn told(&self, from: &Members, to: &Members) -> String {
        let names = |group: Group| {
            let names: Vec<_> = group.iter().map(|who| self.name_of(who)).collect();
            names.join(" ")
        };
        match to.before {
            Some(before) => format!("moves votes from {} to {}", names(before), names(to.voters)),
            None if from.before.is_some() => format!("lets {} vote", names(to.voters)),
            None => format!("lets {} learn", names(to.learners)),
        }
    }
}
