//! Who votes: chosen by the cluster, not by hand.
//!
//! ```text
//!  fit nodes        1   2    2    3   4    4    5+
//!  a fit witness    –   no   yes  –   no   yes  –
//!  votes            1   1    2+w  3   3    4+w  5
//! ```
//! The number of votes is odd, at most [`VOTES`]. An even one is dearer by one
//! acknowledgement and survives no more: of two voters both must live, of one
//! only that one. So with every loss that lasts the quorum shrinks, down to the
//! last node, and it grows again with what comes back. The witness votes where
//! the nodes alone would be even; else it only listens, to be ready.
//!
//! What is fit: a node whose lease has not ended and that acknowledges what the
//! coordinator sends, a witness that acknowledges; [`Attendance`] keeps account of
//! that. The coordinator always votes. A loss counts at once, a return only after
//! a while, so that a node that comes and goes moves no votes.

mod attendance;
mod survey;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::model::*;
use crate::state::ClusterState;

pub use attendance::{Attendance, Heard, Unfit};
pub use survey::{Seat, Survey, Why, survey};

/// As many votes as one agreement should wait for, at most.
pub const VOTES: usize = 5;

/// A participant that has acknowledged nothing for so long is not fit to vote, in
/// milliseconds: longer than an agent needs to restart, shorter than the time in
/// which a second loss is likely.
pub const SILENT_MS: u64 = 4_000;

/// Who takes part in consensus, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seats {
    /// They vote.
    pub voters: BTreeSet<NodeId>,
    /// They only receive the log.
    pub learners: BTreeSet<NodeId>,
}

/// Chooses who votes. `voting` votes now, `unfit` are the participants that do not
/// attend well enough ([`Attendance::unfit`]): silent for [`SILENT_MS`], or not
/// back for long enough to get a vote again.
///
/// Votes are spread over the sites, and within a site they stay where they are:
/// only a loss, a return that makes room for more votes, or a better spread moves
/// one.
pub fn seats(state: &ClusterState, coordinator: NodeId, voting: &BTreeSet<NodeId>, unfit: &BTreeSet<NodeId>) -> Seats {
    let fit = |node: &&Node| {
        let lost = matches!(node.membership, Membership::Lost { .. });
        node.id == coordinator || !lost && !unfit.contains(&node.id)
    };
    let fit: Vec<_> = state.nodes.values().filter(fit).collect();
    let witness = state.witness.as_ref().map(|witness| witness.id).filter(|id| !unfit.contains(id));
    let odd = |count: usize| count - (count + 1) % 2;
    let (from_nodes, from_witness) = match (fit.len(), witness) {
        (0, _) => (0, None),
        (1.., _) if fit.len() >= VOTES => (VOTES, None),
        (even, Some(witness)) if even.is_multiple_of(2) => (even, Some(witness)),
        (some, _) => (odd(some), None),
    };
    let mut voters: BTreeSet<_> = spread(&fit, coordinator, voting).into_iter().take(from_nodes).collect();
    voters.extend(from_witness);
    let all = state.nodes.keys().copied().chain(state.witness.as_ref().map(|witness| witness.id));
    let learners = all.filter(|id| !voters.contains(id)).collect();
    Seats { voters, learners }
}

/// The order in which nodes get votes: one of each site, then a second of each,
/// and so on; the coordinator first, then those that vote, then the oldest.
fn spread(fit: &[&Node], coordinator: NodeId, voting: &BTreeSet<NodeId>) -> Vec<NodeId> {
    let rank = |id: NodeId| (id != coordinator, !voting.contains(&id), id);
    let mut sites: BTreeMap<Option<&str>, Vec<_>> = BTreeMap::new();
    for node in fit {
        sites.entry(node.site.as_deref()).or_default().push(rank(node.id));
    }
    let mut order = Vec::new();
    for ranks in sites.values_mut() {
        ranks.sort_unstable();
        order.extend(ranks.iter().enumerate().map(|(round, rank)| (round, *rank)));
    }
    order.sort_unstable();
    order.into_iter().map(|(_, (.., id))| id).collect()
}

/// Where the witness should sit: on a node that is fit and does not coordinate.
///
/// When that node is lost the coordinator lacks one acknowledgement until it hosts
/// the witness itself, but needs no election. When the coordinator is lost, host
/// and witness together elect the host at once. With the witness on the
/// coordinator its loss would cost both, one after the other.
pub fn witness_host(state: &ClusterState, coordinator: NodeId, silent: &BTreeSet<NodeId>) -> Option<NodeId> {
    let witness = state.witness.as_ref()?;
    let fit = |node: &&Node| node.is_up() && node.id != coordinator && !silent.contains(&node.id);
    let fit: Vec<_> = state.nodes.values().filter(fit).map(|node| node.id).collect();
    let stays = witness.host.filter(|host| fit.contains(host));
    Some(stays.or(fit.first().copied()).unwrap_or(coordinator))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const WITNESS: NodeId = NodeId::witness(1);

    /// Nodes 1 to `sites.len()`, all up, each with its site; `-` for none.
    pub(crate) fn cluster(sites: &[&str], witness: bool) -> ClusterState {
        let mut state = ClusterState::default();
        for (index, site) in sites.iter().enumerate() {
            let id = NodeId(index as u64 + 1);
            let node = Node {
                id,
                name: format!("n{id}"),
                port: 1,
                heartbeat_port: 1,
                heartbeat_key: [0; 32],
                membership: Membership::Up,
                term: NodeTerm(1),
                incarnation: Incarnation(1),
                facts: NodeFacts::default(),
                joined_ms: 0,
                site: (*site != "-").then(|| (*site).to_owned()),
                drained_ms: None,
                leaves: false,
            };
            state.nodes.insert(id, node);
        }
        state.witness = witness.then(|| Witness::new(WITNESS, "/w".into(), Default::default()));
        state
    }

    pub(super) fn ids(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    fn voters(state: &ClusterState, coordinator: u64, voting: &[u64], silent: &[u64]) -> BTreeSet<NodeId> {
        let seats = seats(state, NodeId(coordinator), &ids(voting), &ids(silent));
        let all: BTreeSet<_> = seats.voters.union(&seats.learners).copied().collect();
        let expected = state.nodes.keys().copied().chain(state.witness.as_ref().map(|w| w.id)).collect();
        assert_eq!(all, expected, "everybody takes part");
        assert!(seats.voters.is_disjoint(&seats.learners));
        seats.voters
    }

    #[test]
    fn votes_are_odd_and_five_at_most() {
        for (nodes, expected) in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (16, 5), (64, 5)] {
            let state = cluster(&vec!["-"; nodes], false);
            assert_eq!(voters(&state, 1, &[1], &[]).len(), expected, "{nodes} nodes");
        }
    }

    #[test]
    fn the_witness_votes_where_the_nodes_are_even() {
        for (nodes, votes, witness) in [(1, 1, false), (2, 3, true), (3, 3, false), (4, 5, true), (5, 5, false)] {
            let state = cluster(&vec!["-"; nodes], true);
            let voters = voters(&state, 1, &[1], &[]);
            assert_eq!((voters.len(), voters.contains(&WITNESS)), (votes, witness), "{nodes} nodes");
        }
        let silent = [WITNESS.0];
        assert_eq!(voters(&cluster(&["-"; 2], true), 2, &[1, 2], &silent), ids(&[2]), "without its disk");
    }

    #[test]
    fn a_lost_voter_is_replaced_and_the_quorum_shrinks_to_the_last_node() {
        let mut state = cluster(&["-"; 7], false);
        assert_eq!(voters(&state, 2, &[1, 2, 3, 4, 5], &[3]), ids(&[1, 2, 4, 5, 6]));
        let mut voting = vec![1, 2, 3, 4, 5];
        for (lost, left) in [(1, 5), (3, 5), (4, 3), (5, 3), (6, 1), (7, 1)] {
            state.nodes.get_mut(&NodeId(lost)).unwrap().membership = Membership::Lost { since_ms: 0 };
            let now = voters(&state, 2, &voting, &[]);
            assert_eq!(now.len(), left, "after the loss of {lost}");
            assert!(now.contains(&NodeId(2)) && !now.contains(&NodeId(lost)));
            voting = now.into_iter().map(|id| id.0).collect();
        }
        for id in [5, 6] {
            state.nodes.get_mut(&NodeId(id)).unwrap().membership = Membership::Up;
        }
        assert_eq!(voters(&state, 2, &voting, &[]), ids(&[2, 5, 6]), "and grows again");
    }

    #[test]
    fn what_votes_stays_when_others_come_back() {
        let state = cluster(&["-"; 6], false);
        assert_eq!(voters(&state, 6, &[2, 3, 4, 5, 6], &[]), ids(&[2, 3, 4, 5, 6]));
    }

    #[test]
    fn votes_are_spread_over_sites() {
        let state = cluster(&["a", "a", "a", "a", "b", "b", "c"], false);
        assert_eq!(voters(&state, 1, &[1, 2, 3, 4, 5], &[]), ids(&[1, 2, 5, 6, 7]));
        assert_eq!(voters(&state, 1, &[1, 2, 5, 6, 7], &[7]), ids(&[1, 2, 3, 5, 6]), "site c is gone");
    }

    #[test]
    fn the_witness_sits_beside_the_coordinator_not_on_it() {
        let mut state = cluster(&["-"; 3], true);
        assert_eq!(witness_host(&state, NodeId(1), &ids(&[])), Some(NodeId(2)));
        state.witness.as_mut().unwrap().host = Some(NodeId(3));
        assert_eq!(witness_host(&state, NodeId(1), &ids(&[])), Some(NodeId(3)), "it stays");
        assert_eq!(witness_host(&state, NodeId(3), &ids(&[])), Some(NodeId(1)), "its host coordinates now");
        assert_eq!(witness_host(&state, NodeId(1), &ids(&[2, 3])), Some(NodeId(1)), "nobody else is there");
        assert_eq!(witness_host(&cluster(&["-"; 3], false), NodeId(1), &ids(&[])), None);
    }
}
