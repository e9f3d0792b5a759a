//! Who votes and why, and how many more losses the cluster survives.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Attendance, Unfit, VOTES, seats};
use crate::lease::BootTime;
use crate::model::*;
use crate::state::ClusterState;

/// How the quorum stands, by the coordinator's account.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survey {
    /// Every node, and the witness.
    pub seats: Vec<Seat>,
    /// How many votes there are.
    pub votes: usize,
    /// How many of them an agreement needs.
    pub needed: usize,
    /// How many are present.
    pub present: usize,
    /// How many more votes may be lost at once, whichever they are.
    pub spare: usize,
    /// How many more nodes may be lost one after the other, whichever they are, when
    /// the votes have time to move in between.
    pub in_turn: usize,
    /// Everybody who should vote does, and nobody else.
    pub settled: bool,
}

/// One participant of consensus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// Which.
    pub id: NodeId,
    /// It votes now.
    pub votes: bool,
    /// It acknowledged something a moment ago, or coordinates.
    pub present: bool,
    /// For how long it acknowledged nothing, in milliseconds.
    pub silent_ms: u64,
    /// Why it votes, or why not.
    pub why: Why,
}

/// Why a participant votes, or why it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    /// It coordinates.
    Coordinates,
    /// It is one of those that should.
    Chosen,
    /// It is the witness, and without it the votes would be even.
    EvensOut,
    /// It is the witness, and the nodes' votes are odd without it.
    OddWithout,
    /// It would be one more than an odd number.
    OddWithoutIt,
    /// There are enough votes.
    Enough,
    /// Its lease has certainly ended.
    Lost,
    /// It acknowledged nothing for so long, in milliseconds.
    Silent(u64),
    /// It has not acknowledged anything to this coordinator yet.
    Unheard,
    /// It lacks so many entries of the log.
    Behind(u64),
    /// It came back only so long ago, in milliseconds.
    Returned(u64),
    /// It gets a vote now.
    Joins,
    /// It gives its vote up now.
    Leaves,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Coordinates => f.write_str("it coordinates"),
            Why::Chosen => f.write_str("it is up and acknowledges"),
            Why::EvensOut => f.write_str("the nodes' votes are even without it"),
            Why::OddWithout => f.write_str("the nodes' votes are odd without it; it stands by"),
            Why::OddWithoutIt => f.write_str("with it the votes would be even, which survives no more"),
            Why::Enough => write!(f, "there are {VOTES} votes, more would only make agreements slower"),
            Why::Lost => f.write_str("it is lost"),
            Why::Silent(ms) => write!(f, "it has acknowledged nothing for {} s", ms / 1000),
            Why::Unheard => f.write_str("it has not acknowledged anything to this coordinator yet"),
            Why::Behind(entries) => write!(f, "it still lacks {entries} entries of the log"),
            Why::Returned(_) => f.write_str("it came back only just now"),
            Why::Joins => f.write_str("it is being given a vote"),
            Why::Leaves => f.write_str("its vote is being taken back"),
        }
    }
}

impl From<Unfit> for Why {
    fn from(unfit: Unfit) -> Self {
        match unfit {
            Unfit::Lost => Why::Lost,
            Unfit::Silent(ms) => Why::Silent(ms),
            Unfit::Unheard => Why::Unheard,
            Unfit::Behind(entries) => Why::Behind(entries),
            Unfit::Returned(ms) => Why::Returned(ms),
        }
    }
}

/// Looks at the quorum. `voters` are the sets of voters of consensus: two while
/// they change, and then an agreement needs a majority of each.
pub fn survey(
    state: &ClusterState,
    coordinator: NodeId,
    voters: &[BTreeSet<NodeId>],
    attendance: &Attendance,
    now: BootTime,
) -> Survey {
    let voting: BTreeSet<_> = voters.iter().flatten().copied().collect();
    let unfit = attendance.unfit(state, coordinator, &voting, now);
    let wanted = seats(state, coordinator, &voting, &unfit.keys().copied().collect());
    let witness = state.witness.as_ref().map(|witness| witness.id);
    let present = |id: NodeId| {
        let lost = state.nodes.get(&id).is_some_and(|node| matches!(node.membership, Membership::Lost { .. }));
        id == coordinator || !lost && attendance.is_present(id, now)
    };
    let why = |id: NodeId| match (voting.contains(&id), wanted.voters.contains(&id), unfit.get(&id)) {
        (.., Some(unfit)) => Why::from(*unfit),
        (false, true, _) => Why::Joins,
        (true, false, _) => Why::Leaves,
        (true, true, _) if id == coordinator => Why::Coordinates,
        (true, true, _) if Some(id) == witness => Why::EvensOut,
        (true, true, _) => Why::Chosen,
        (false, false, _) if Some(id) == witness => Why::OddWithout,
        (false, false, _) if wanted.voters.len() >= VOTES => Why::Enough,
        (false, false, _) => Why::OddWithoutIt,
    };
    let everybody: BTreeSet<_> = voting.iter().chain(&wanted.voters).chain(&wanted.learners).copied().collect();
    let seat = |id: NodeId| Seat {
        id,
        votes: voting.contains(&id),
        present: present(id),
        silent_ms: if id == coordinator { 0 } else { attendance.silent_ms(id, now) },
        why: why(id),
    };
    // What counts is the set that can lose least.
    let margin = |set: &BTreeSet<NodeId>| {
        let there = set.iter().filter(|id| present(**id)).count();
        (there as i64 - (set.len() / 2 + 1) as i64, set.len(), there)
    };
    let (spare, votes, there) = voters.iter().map(margin).min().unwrap_or_default();
    let fit = state.nodes.keys().filter(|id| !unfit.contains_key(id)).count();
    let with_witness = witness.is_some_and(|id| !unfit.contains_key(&id));
    Survey {
        seats: everybody.into_iter().map(seat).collect(),
        votes,
        needed: votes / 2 + 1,
        present: there,
        spare: usize::try_from(spare).unwrap_or(0),
        // Of the last two nodes one votes alone, unless there is a witness.
        in_turn: fit.saturating_sub(if with_witness { 1 } else { 2 }),
        settled: voters.len() == 1 && voters[0] == wanted.voters,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::tests::{WITNESS, cluster, ids};
    use super::super::{Heard, SILENT_MS};
    use super::*;

    const NOW: BootTime = BootTime(60_000_000_000);

    /// The survey of node 1, which heard these `(participant, milliseconds ago)`.
    fn look(state: &ClusterState, voters: &[&[u64]], heard: &[(u64, u64)]) -> Survey {
        let ago = |ms: u64| BootTime(NOW.0 - ms * 1_000_000);
        let heard: BTreeMap<_, _> = heard
            .iter()
            .map(|(id, ms)| (NodeId(*id), Heard { acknowledged: Some(ago(*ms)), behind: Some(0) }))
            .collect();
        let mut attendance = Attendance::new(BootTime(0));
        attendance.hear(state, &heard, NOW);
        let voters: Vec<_> = voters.iter().map(|set| ids(set)).collect();
        survey(state, NodeId(1), &voters, &attendance, NOW)
    }

    fn whys(survey: &Survey) -> Vec<Why> {
        survey.seats.iter().map(|seat| seat.why).collect()
    }

    #[test]
    fn every_seat_has_its_reason() {
        let state = cluster(&["-"; 4], false);
        let seen = look(&state, &[&[1, 2, 3]], &[(2, 10), (3, 10), (4, 10)]);
        assert_eq!(whys(&seen), [Why::Coordinates, Why::Chosen, Why::Chosen, Why::OddWithoutIt]);
        assert_eq!((seen.votes, seen.needed, seen.present, seen.spare, seen.in_turn), (3, 2, 3, 1, 2));
        assert!(seen.settled);
        let seen = look(&cluster(&["-"; 6], true), &[&[1, 2, 3, 4, 5]], &[(2, 10), (3, 10), (4, 10), (5, 10), (6, 10)]);
        assert_eq!(whys(&seen)[5..], [Why::Enough, Why::Silent(60_000)], "a witness that was never heard");
        assert_eq!((seen.spare, seen.in_turn), (2, 4));
    }

    #[test]
    fn the_last_pair_has_one_vote_and_with_a_witness_three() {
        let seen = look(&cluster(&["-"; 2], false), &[&[1]], &[(2, 10)]);
        assert_eq!((seen.votes, seen.needed, seen.spare, seen.in_turn, seen.settled), (1, 1, 0, 0, true));
        let seen = look(&cluster(&["-"; 2], true), &[&[1, 2, WITNESS.0]], &[(2, 10), (WITNESS.0, 10)]);
        assert_eq!((seen.votes, seen.spare, seen.in_turn, seen.settled), (3, 1, 1, true));
        assert_eq!(whys(&seen), [Why::Coordinates, Why::Chosen, Why::EvensOut]);
    }

    #[test]
    fn while_votes_move_the_weaker_set_counts() {
        let mut state = cluster(&["-"; 4], false);
        state.nodes.get_mut(&NodeId(3)).unwrap().membership = Membership::Lost { since_ms: 0 };
        let seen = look(&state, &[&[1, 2, 3], &[1, 2, 4]], &[(2, 10), (3, SILENT_MS + 1), (4, 10)]);
        assert_eq!((seen.votes, seen.present, seen.spare, seen.settled), (3, 2, 0, false));
        assert_eq!(whys(&seen)[2], Why::Lost);
        let seen = look(&state, &[&[1, 2, 3]], &[(2, 1_500), (3, SILENT_MS + 1), (4, 10)]);
        assert_eq!((seen.present, seen.spare), (1, 0), "there is no quorum at this moment");
        assert_eq!(whys(&seen)[3], Why::Joins);
    }
}
