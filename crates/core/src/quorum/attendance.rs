//! Who attends: what the coordinator has heard of each participant, and since when.
//!
//! ```text
//!  acknowledges ──gap──▶ absent ──acknowledges──▶ returned ──steady──▶ attends
//!       ▲ keeps its vote until SILENT_MS, or until its lease has ended    │
//!       └──────────────────── may get a vote ◀────────────────────────────┘
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::SILENT_MS;
use crate::lease::BootTime;
use crate::model::*;
use crate::observed::Attending;
use crate::state::ClusterState;

/// A pause between two acknowledgements that ends a continuous attendance, in
/// milliseconds: ten heartbeats of the default profile.
const GAP_MS: u64 = 1_000;
/// For how long a participant that was away has to attend without a gap before it
/// may get a vote again, in milliseconds: twice the lease of the default profile.
const STEADY_MS: u64 = 3_000;
/// The witness moves only to a node that acknowledged something so lately, in
/// milliseconds: three heartbeats of the default profile.
const LATELY_MS: u64 = 300;
/// A participant that lacks more entries of the log than this gets no vote yet: the
/// first agreement with it would wait for them.
const BEHIND: u64 = 64;

/// What consensus says of another participant in the coordinator's term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// When the last message that it acknowledged was sent, on this node's clock.
    pub acknowledged: Option<BootTime>,
    /// How many entries of the log it is not known to have; `None` before it said so.
    pub behind: Option<u64>,
}

/// Why a participant is not fit to vote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Its lease has certainly ended.
    Lost,
    /// It acknowledged nothing for so long, in milliseconds.
    Silent(u64),
    /// It has no vote, and has not acknowledged anything to this coordinator.
    Unheard,
    /// It has no vote, and lacks so many entries of the log.
    Behind(u64),
    /// It has no vote, and came back only so long ago, in milliseconds.
    Returned(u64),
}

/// One coordinator's account of who attends. Begins anew with each coordinator.
#[derive(Clone, Debug)]
pub struct Attendance {
    since: BootTime,
    of: BTreeMap<NodeId, Presence>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Presence {
    heard: Heard,
    /// Since when it attends without a gap; `None` while it is away.
    steady: Option<BootTime>,
    /// It was away once, as far as this coordinator or the state knows.
    returned: bool,
}

impl Attendance {
    /// For a coordinator since that moment.
    pub fn new(since: BootTime) -> Self {
        Attendance { since, of: BTreeMap::new() }
    }

    /// Takes in what consensus has heard by `now`. To be called several times a second.
    pub fn hear(&mut self, state: &ClusterState, heard: &BTreeMap<NodeId, Heard>, now: BootTime) {
        self.of.retain(|id, _| heard.contains_key(id));
        for (id, heard) in heard {
            let node = state.nodes.get(id);
            let presence = self.of.entry(*id).or_default();
            presence.heard = *heard;
            // A node that was admitted more than once was away once.
            presence.returned |= node.is_some_and(|node| node.term > NodeTerm(1));
            let there = heard.acknowledged.is_some_and(|at| now.ms_since(at) <= GAP_MS);
            let lost = node.is_some_and(|node| matches!(node.membership, Membership::Lost { .. }));
            if !there || lost {
                presence.returned |= lost || presence.steady.is_some();
                presence.steady = None;
            } else if presence.steady.is_none() {
                presence.steady = Some(now);
            }
        }
    }

    /// For how long a participant has acknowledged nothing. Nobody is silent for
    /// longer than the coordinator could have heard them.
    pub fn silent_ms(&self, id: NodeId, now: BootTime) -> u64 {
        let heard = self.of.get(&id).and_then(|presence| presence.heard.acknowledged);
        now.ms_since(heard.map_or(self.since, |at| at.max(self.since)))
    }

    /// Whether a participant acknowledged something a moment ago.
    pub fn is_present(&self, id: NodeId, now: BootTime) -> bool {
        let heard = self.of.get(&id).and_then(|presence| presence.heard.acknowledged);
        heard.is_some_and(|at| now.ms_since(at) <= GAP_MS)
    }

    /// What the planner is told: who has been silent for long, and who is there for certain.
    pub fn attending(&self, state: &ClusterState, coordinator: NodeId, now: BootTime) -> Attending {
        let silent = |id: &NodeId| *id != coordinator && self.silent_ms(*id, now) > SILENT_MS;
        let present = |id: &NodeId| self.is_present(*id, now) && self.silent_ms(*id, now) < LATELY_MS;
        Attending {
            coordinator,
            silent: state.nodes.keys().copied().filter(silent).collect(),
            present: state.nodes.keys().copied().filter(present).collect(),
        }
    }

    /// How many entries of the log a participant lacks, where that is known.
    pub fn behind(&self, id: NodeId) -> Option<u64> {
        self.of.get(&id)?.heard.behind
    }

    /// Who is not fit to vote, and why.
    pub fn unfit(
        &self,
        state: &ClusterState,
        coordinator: NodeId,
        voting: &BTreeSet<NodeId>,
        now: BootTime,
    ) -> BTreeMap<NodeId, Unfit> {
        let participants = state.nodes.keys().copied().chain(state.witness.as_ref().map(|witness| witness.id));
        let others = participants.filter(|id| *id != coordinator);
        others.filter_map(|id| Some((id, self.why_unfit(state, id, voting.contains(&id), now)?))).collect()
    }

    fn why_unfit(&self, state: &ClusterState, id: NodeId, votes: bool, now: BootTime) -> Option<Unfit> {
        if state.nodes.get(&id).is_some_and(|node| matches!(node.membership, Membership::Lost { .. })) {
            return Some(Unfit::Lost);
        }
        let silent = self.silent_ms(id, now);
        if silent > SILENT_MS {
            return Some(Unfit::Silent(silent));
        }
        if votes {
            return None;
        }
        let presence = self.of.get(&id).copied().unwrap_or_default();
        let (Some(steady), Some(behind)) = (presence.steady, presence.heard.behind) else {
            return Some(Unfit::Unheard);
        };
        if behind > BEHIND {
            return Some(Unfit::Behind(behind));
        }
        let back_ms = now.ms_since(steady);
        (presence.returned && back_ms < STEADY_MS).then_some(Unfit::Returned(back_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{cluster, ids};
    use super::*;

    const ME: NodeId = NodeId(1);
    const OTHER: NodeId = NodeId(2);

    fn at(ms: u64) -> BootTime {
        BootTime(0).plus_ms(ms)
    }

    fn heard(acknowledged: Option<u64>, behind: Option<u64>) -> BTreeMap<NodeId, Heard> {
        [(OTHER, Heard { acknowledged: acknowledged.map(at), behind })].into()
    }

    /// Why node 2 is not fit at that moment.
    fn why(attendance: &Attendance, state: &ClusterState, voting: &[u64], now: u64) -> Option<Unfit> {
        attendance.unfit(state, ME, &ids(voting), at(now)).remove(&OTHER)
    }

    #[test]
    fn a_new_coordinator_calls_nobody_silent_before_it_could_have_heard_them() {
        let state = cluster(&["-"; 2], false);
        let mut attendance = Attendance::new(at(100_000));
        attendance.hear(&state, &heard(None, None), at(100_000));
        assert_eq!(why(&attendance, &state, &[1, 2], 100_000), None);
        assert_eq!(why(&attendance, &state, &[1, 2], 100_000 + SILENT_MS), None);
        assert_eq!(why(&attendance, &state, &[1, 2], 100_001 + SILENT_MS), Some(Unfit::Silent(SILENT_MS + 1)));
    }

    #[test]
    fn a_new_node_may_vote_as_soon_as_it_has_the_log() {
        let state = cluster(&["-"; 2], false);
        let mut attendance = Attendance::new(at(0));
        assert_eq!(why(&attendance, &state, &[1], 10), Some(Unfit::Unheard));
        attendance.hear(&state, &heard(Some(90), Some(500)), at(100));
        assert_eq!(why(&attendance, &state, &[1], 100), Some(Unfit::Behind(500)));
        attendance.hear(&state, &heard(Some(190), Some(3)), at(200));
        assert_eq!(why(&attendance, &state, &[1], 200), None);
    }

    #[test]
    fn one_that_was_away_has_to_stay_for_a_while() {
        let state = cluster(&["-"; 2], false);
        let mut attendance = Attendance::new(at(0));
        let mut hear = |acknowledged, now| {
            attendance.hear(&state, &heard(Some(acknowledged), Some(0)), at(now));
            (why(&attendance, &state, &[1, 2], now), why(&attendance, &state, &[1], now))
        };
        assert_eq!(hear(0, 0), (None, None));
        assert_eq!(hear(0, 1_001), (None, Some(Unfit::Unheard)), "it keeps a vote, but gets none");
        assert_eq!(hear(2_000, 2_000), (None, Some(Unfit::Returned(0))));
        assert_eq!(hear(4_000, 4_100), (None, Some(Unfit::Returned(2_100))));
        assert_eq!(hear(4_000, 5_100), (None, Some(Unfit::Unheard)), "it flaps");
        assert_eq!(hear(6_000, 6_000).1, Some(Unfit::Returned(0)), "and begins anew");
        assert_eq!(hear(9_000, 9_000), (None, None));
    }

    #[test]
    fn the_planner_is_told_who_is_silent_and_who_is_there() {
        let state = cluster(&["-"; 2], false);
        let mut attendance = Attendance::new(at(0));
        attendance.hear(&state, &heard(Some(1_000), Some(0)), at(1_000));
        let told = |now| {
            let attending = attendance.attending(&state, ME, at(now));
            (attending.silent.contains(&OTHER), attending.present.contains(&OTHER))
        };
        assert_eq!(told(1_299), (false, true));
        assert_eq!(told(1_300), (false, false), "three heartbeats are missing");
        assert_eq!(told(1_001 + SILENT_MS), (true, false));
        assert!(!attendance.attending(&state, ME, at(9_000)).silent.contains(&ME), "the coordinator hears itself");
    }

    #[test]
    fn a_lost_node_is_not_fit_and_neither_is_one_that_is_just_admitted_again() {
        let mut state = cluster(&["-"; 2], false);
        let mut attendance = Attendance::new(at(0));
        state.nodes.get_mut(&OTHER).unwrap().membership = Membership::Lost { since_ms: 0 };
        attendance.hear(&state, &heard(Some(100), Some(0)), at(100));
        assert_eq!(why(&attendance, &state, &[1, 2], 100), Some(Unfit::Lost));
        state.nodes.get_mut(&OTHER).unwrap().membership = Membership::Up;
        attendance.hear(&state, &heard(Some(200), Some(0)), at(200));
        assert_eq!(why(&attendance, &state, &[1], 200), Some(Unfit::Returned(0)));
        // The next coordinator knows from the state that it was away.
        state.nodes.get_mut(&OTHER).unwrap().term = NodeTerm(2);
        let mut next = Attendance::new(at(300));
        next.hear(&state, &heard(Some(400), Some(0)), at(400));
        assert_eq!(why(&next, &state, &[1], 500), Some(Unfit::Returned(100)));
        next.hear(&state, &heard(Some(3_400), Some(0)), at(3_400));
        assert_eq!(why(&next, &state, &[1], 3_400), None);
    }
}
