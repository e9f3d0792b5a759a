//! Handing the coordination over in order: because an operator asks for it, because
//! this node ends, or because it does not vote any more. A successor is there within
//! milliseconds, where an election would first wait for this node's silence.
//!
//! ```text
//!  choose ─▶ give it a vote ─▶ stop granting leases ─▶ hand over ─▶ it coordinates
//!  └── another candidate, when this one cannot ◀──┘        └─ or whoever is elected
//! ```
//! The successor waits out the leases that were granted, as after any change.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use holdfast_consensus::{ConsensusError, Standing};
use holdfast_core::lease::Authority;
use holdfast_core::*;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout, timeout_at};

use super::peers::CallError;
use super::{Agent, Failure, Member, rpc};

/// How long a hand-over that is asked for may take, a new voter's catching up included.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long an agent that ends looks for a successor.
const PARTING: Duration = Duration::from_secs(3);
/// The members may just be changing for another reason.
const BUSY_AGAIN: Duration = Duration::from_millis(50);

/// Whether the lease thread may be lent any authority: not while the coordination is
/// being handed over, whatever consensus says at the same moment.
#[derive(Default)]
pub struct Lending {
    stopped: Mutex<bool>,
}

impl Lending {
    /// Lends what consensus gives, or nothing.
    pub fn lend(&self, member: &Member, authority: Authority) {
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        member.leases.set_authority(if *stopped { Authority::NONE } else { authority });
    }

    /// Lends nothing from here on.
    fn stop(&self, member: &Member) {
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        *stopped = true;
        member.leases.set_authority(Authority::NONE);
    }

    /// Lends again. What consensus gave in a term that was handed over is over.
    fn go_on(&self) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// What became of a wish to hand over, as it travels between nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Succession {
    /// This node coordinates now.
    Done(NodeId),
    /// The asked node does not coordinate: nothing was begun.
    NotHere,
    /// Nobody can take it; nothing was begun.
    Refused(String),
    /// It was begun, and how it ended is not known.
    Unknown,
}

impl Agent {
    /// Hands the coordination to a node, or to whichever can take it, wherever the
    /// coordinator is. Returns who coordinates then.
    ///
    /// # Errors
    /// The node coordinates already or cannot take it, no coordinator is known, or
    /// the outcome is not known.
    pub async fn hand_over(&self, to: Option<NodeId>) -> Result<NodeId, Failure> {
        let member = self.member()?;
        let until = Instant::now() + DEADLINE;
        let mut standing = member.consensus.standing();
        loop {
            let coordinator = standing.borrow_and_update().coordinator;
            let outcome = match coordinator {
                None => Succession::NotHere,
                Some(node) if node == member.me => self.hand_over_here(member, to, until).await,
                Some(node) => {
                    let rest = until.saturating_duration_since(Instant::now());
                    let asked = member.peers.ask(node, rpc::HAND_OVER, &to, rest).await;
                    asked.unwrap_or_else(|error| match error {
                        CallError::Refused { .. } => Succession::NotHere,
                        CallError::Unreachable(_) | CallError::Deadline => Succession::Unknown,
                    })
                }
            };
            match outcome {
                Succession::Done(node) => {
                    let seen = standing.wait_for(|now| now.coordinator == Some(node));
                    let _ = timeout_at(until, seen).await;
                    return match to {
                        Some(wanted) if wanted != node => {
                            let state = self.state();
                            let (wanted, node) = (state.node_name(wanted), state.node_name(node));
                            Err(Failure::other(
                                "conflict",
                                format!("{wanted} did not take the coordination: {node} was elected instead"),
                            ))
                        }
                        _ => Ok(node),
                    };
                }
                Succession::Refused(why) => return Err(Failure::other("conflict", why)),
                Succession::Unknown => return Err(Failure::Unknown),
                Succession::NotHere if Instant::now() >= until => {
                    return Err(Failure::NoCoordinator { seconds: DEADLINE.as_secs() });
                }
                Succession::NotHere => {
                    let soon = (Instant::now() + Duration::from_millis(100)).min(until);
                    let _ = timeout_at(soon, standing.changed()).await;
                }
            }
        }
    }

    /// The same on the coordinator.
    pub(super) async fn hand_over_here(
        &self,
        member: &'static Member,
        to: Option<NodeId>,
        until: Instant,
    ) -> Succession {
        let state = self.state();
        let standing = member.consensus.standing().borrow().clone();
        if !standing.is_coordinator() {
            return Succession::NotHere;
        }
        if to == Some(member.me) {
            return Succession::Refused(format!("{} is the coordinator already", state.node_name(member.me)));
        }
        let candidates = to.map_or_else(|| successors(&state, &standing, member.me), |node| vec![node]);
        let mut why = "there is no other node that is up".to_owned();
        for node in candidates {
            match self.hand_over_to(member, node, until).await {
                Ok(()) => return Succession::Done(node),
                Err(ConsensusError::ElectedInstead { coordinator: Some(node) }) => return Succession::Done(node),
                Err(ConsensusError::NotCoordinator { .. }) => return Succession::NotHere,
                Err(ConsensusError::ElectedInstead { coordinator: None } | ConsensusError::Unknown { .. }) => {
                    return Succession::Unknown;
                }
                Err(ConsensusError::CannotTransfer { node, why: reason }) => {
                    why = format!("{} cannot become the coordinator: {reason}", state.node_name(node));
                }
                Err(error) => why = format!("{} did not become the coordinator: {error}", state.node_name(node)),
            }
        }
        Succession::Refused(why)
    }

    /// Hands the coordination to one node. No lease is granted from when the voters
    /// may elect it.
    pub(super) async fn hand_over_to(
        &self,
        member: &'static Member,
        to: NodeId,
        until: Instant,
    ) -> Result<(), ConsensusError> {
        loop {
            let mut begun = false;
            let stop_granting = || {
                begun = true;
                member.lending.stop(member);
            };
            let outcome = member.consensus.transfer(to, stop_granting).await;
            // Only whoever stopped it: another hand-over may have just begun.
            if begun {
                member.lending.go_on();
            }
            match outcome {
                Err(ConsensusError::Busy) if Instant::now() + BUSY_AGAIN < until => {
                    tokio::time::sleep(BUSY_AGAIN).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// What an agent does before it ends in order: if it coordinates, it hands over,
    /// and stays until the others can agree without it. Not for long: an election
    /// does the same when it is gone.
    pub async fn part(&self) {
        let Some(member) = self.0.member.get() else { return };
        let until = Instant::now() + PARTING;
        match timeout(PARTING, self.hand_over_here(member, None, until)).await {
            Ok(Succession::Done(node)) => tracing::info!(%node, "handed the coordination over before ending"),
            Ok(Succession::NotHere) => return,
            Ok(Succession::Refused(why)) => {
                tracing::warn!("the coordination is not handed over before this agent ends: {why}");
                return;
            }
            Ok(Succession::Unknown) | Err(_) => {
                tracing::warn!("the coordination was not handed over in time before this agent ends");
                return;
            }
        }
        let mut standing = member.consensus.standing();
        let spared = standing.wait_for(|now| can_spare(&now.voters, member.me));
        if timeout_at(until, spared).await.is_err() {
            tracing::warn!("the others cannot agree on anything without this node, which ends");
        }
    }
}

/// Who may take over, the best first: nodes that are up, voters before others.
fn successors(state: &ClusterState, standing: &Standing, me: NodeId) -> Vec<NodeId> {
    let fit = state.nodes.values().filter(|node| node.is_up() && node.id != me);
    let mut nodes: Vec<_> = fit.map(|node| (!standing.voters.contains(&node.id), node.id)).collect();
    nodes.sort_unstable();
    nodes.into_iter().map(|(_, node)| node).collect()
}

/// Whether a majority of the voters is left without this one.
fn can_spare(voters: &[NodeId], me: NodeId) -> bool {
    let others = voters.iter().filter(|voter| **voter != me).count();
    others > voters.len() / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_three_voters_can_be_spared_and_one_of_two_cannot() {
        let ids = |ids: &[u64]| ids.iter().copied().map(NodeId).collect::<Vec<_>>();
        for (voters, spared) in
            [(vec![1, 2, 3], true), (vec![1, 2], false), (vec![2], true), (vec![1], false), (vec![1, 2, 3, 4], true)]
        {
            assert_eq!(can_spare(&ids(&voters), NodeId(1)), spared, "{voters:?}");
        }
    }
}
