//! Changing who takes part, and handing the coordination over.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::Duration;

use holdfast_core::NodeId;
use holdfast_core::quorum::Heard;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::{BasicNode, ChangeMembers, ServerState};
use tokio::time::timeout;

use crate::authority::boot_time;
use crate::consensus::{Consensus, unknown};
use crate::error::ConsensusError;
use crate::types::{Metrics, Types};

/// One change of the member list.
const CHANGE_DEADLINE: Duration = Duration::from_secs(5);
/// For a new voter to receive what the log and the snapshot hold. Other changes
/// wait meanwhile, so whoever has much to receive should be a learner first, until
/// [`Consensus::participants`] shows that it is close.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(3);

/// Who takes part in consensus, as the coordinator sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Participants {
    /// Who votes: two sets while voters change.
    pub voters: Vec<BTreeSet<NodeId>>,
    /// What was heard of everybody else who takes part, in the current term.
    pub heard: BTreeMap<NodeId, Heard>,
}

impl Consensus {
    /// Makes the members equal to `voters` and `learners`, with these addresses.
    /// Only on the coordinator, which must stay a voter.
    ///
    /// New voters learn first, and get their vote when they have caught up. If one
    /// does not, the change ends there with an error that names it; calling again
    /// goes on from what was reached.
    pub async fn set_members(
        &self,
        voters: BTreeMap<NodeId, String>,
        learners: BTreeMap<NodeId, String>,
    ) -> Result<(), ConsensusError> {
        let changing = self.inner.changing_members.try_lock();
        let _changing = changing.map_err(|_| ConsensusError::Busy)?;
        let metrics = self.leading()?;
        if !voters.contains_key(&NodeId(self.me())) {
            return Err(ConsensusError::RemovesCoordinator);
        }
        let wanted: BTreeMap<u64, BasicNode> =
            learners.iter().chain(&voters).map(|(id, address)| (id.0, BasicNode::new(address))).collect();
        let voters: BTreeSet<u64> = voters.keys().map(|id| id.0).collect();

        let known: BTreeMap<u64, BasicNode> = nodes(&metrics);
        let moved: BTreeMap<u64, BasicNode> = wanted
            .iter()
            .filter(|(id, node)| known.get(id).is_some_and(|known| known != *node))
            .map(|(id, node)| (*id, node.clone()))
            .collect();
        if !moved.is_empty() {
            self.change(ChangeMembers::SetNodes(moved)).await?;
        }
        let new: BTreeMap<u64, BasicNode> =
            wanted.iter().filter(|(id, _)| !known.contains_key(id)).map(|(id, node)| (*id, node.clone())).collect();
        if !new.is_empty() {
            self.change(ChangeMembers::AddNodes(new)).await?;
        }
        let configs = metrics.membership_config.get_joint_config();
        if configs.len() != 1 || configs[0] != voters {
            let before: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
            for voter in voters.difference(&before) {
                self.caught_up(*voter, &wanted[voter].addr).await?;
            }
            self.change(ChangeMembers::ReplaceAllVoters(voters)).await?;
        }
        let gone: BTreeSet<u64> =
            nodes(&self.inner.node.metrics()).into_keys().filter(|id| !wanted.contains_key(id)).collect();
        if !gone.is_empty() {
            self.change(ChangeMembers::RemoveNodes(gone)).await?;
        }
        Ok(())
    }

    /// Who votes and what was heard of everybody; `None` unless this node coordinates.
    pub fn participants(&self) -> Option<Participants> {
        let metrics = self.leading().ok()?;
        let last = metrics.last_log_index.unwrap_or(0);
        let stamps = &self.inner.node.wire.stamps;
        let heard = |id: &u64| {
            let progress = metrics.replication.as_ref().and_then(|progress| progress.get(id).copied().flatten());
            let behind = progress.map(|matched| last.saturating_sub(matched.index));
            Heard { acknowledged: stamps.of(metrics.current_term, *id), behind }
        };
        let members = &metrics.membership_config;
        let sets = members.get_joint_config().iter();
        let others = members.nodes().map(|(id, _)| id).filter(|id| **id != self.me());
        Some(Participants {
            voters: sets.map(|set| set.iter().copied().map(NodeId).collect()).collect(),
            heard: others.map(|id| (NodeId(*id), heard(id))).collect(),
        })
    }

    async fn change(&self, change: ChangeMembers<u64, BasicNode>) -> Result<(), ConsensusError> {
        const ACTION: &str = "changing the members";
        let changed = self.engine().change_membership(change, true);
        match timeout(CHANGE_DEADLINE, changed).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(e)) => Err(match e {
                RaftError::APIError(ClientWriteError::ForwardToLeader(_)) => self.not_leading(),
                RaftError::APIError(ClientWriteError::ChangeMembershipError(e)) => {
                    tracing::info!("the members cannot be changed now: {e}");
                    ConsensusError::Busy
                }
                RaftError::APIError(_) => unknown(ACTION),
                RaftError::Fatal(e) => ConsensusError::Stopped(e.to_string()),
            }),
            Err(_) => Err(unknown(ACTION)),
        }
    }

    /// Waits until `node` has everything that the log holds now.
    async fn caught_up(&self, node: u64, address: &str) -> Result<(), ConsensusError> {
        let target = self.inner.node.metrics().last_log_index;
        let reached = self.when(CATCH_UP_DEADLINE, |metrics| {
            let replication = metrics.replication.as_ref();
            let matched = replication.and_then(|progress| progress.get(&node).copied().flatten());
            matched.map(|matched| matched.index) >= target || metrics.state != ServerState::Leader
        });
        if !reached.await {
            return Err(ConsensusError::CatchUp {
                node: NodeId(node),
                address: address.to_owned(),
                waited_ms: CATCH_UP_DEADLINE.as_millis() as u64,
            });
        }
        self.leading().map(drop)
    }

    /// Hands the coordination over to the member `to`, which becomes a voter first if
    /// it is none. Afterwards this node is not the coordinator.
    ///
    /// `stop_granting` is called when nothing stands in the way any more: **from when
    /// it returns no lease may be granted.** From then until the next term this node
    /// reports neither role nor authority, because the voters may elect another
    /// coordinator at any moment, even if this returns an error. An error before that
    /// moment leaves everything as it is.
    pub async fn transfer(&self, to: NodeId, stop_granting: impl FnOnce()) -> Result<(), ConsensusError> {
        let changing = self.inner.changing_members.try_lock();
        let _changing = changing.map_err(|_| ConsensusError::Busy)?;
        let metrics = self.leading()?;
        let cannot = |why| ConsensusError::CannotTransfer { node: to, why };
        if to.0 == self.me() {
            return Err(cannot("it is the coordinator already"));
        }
        let Some(member) = nodes(&metrics).remove(&to.0) else {
            return Err(cannot("it takes no part in consensus yet"));
        };
        let node = &self.inner.node;
        let term = metrics.current_term;
        let hold_ms = node.hold.as_millis() as u64;
        let stamps = &node.wire.stamps;
        let answers = || stamps.of(term, to.0).is_some_and(|sent| boot_time().ms_since(sent) <= hold_ms);
        if !answers() {
            return Err(cannot("it does not answer"));
        }
        if !metrics.membership_config.voter_ids().any(|voter| voter == to.0) {
            self.caught_up(to.0, &member.addr).await?;
            self.change(ChangeMembers::AddVoterIds(BTreeSet::from([to.0]))).await?;
            if self.leading()?.current_term != term || !answers() {
                return Err(cannot("it does not answer any more"));
            }
        }
        stop_granting();
        stamps.hand_over(term);
        node.refresh();
        if self.engine().trigger().transfer_leader(to.0).await.is_err() {
            return Err(ConsensusError::Stopped("it stopped during a hand-over".into()));
        }
        let me = self.me();
        let over = |metrics: &Metrics| {
            metrics.current_leader.is_some_and(|leader| leader != me)
                || metrics.current_term > term && metrics.state == ServerState::Leader
        };
        if !self.when(node.hold * 8, over).await {
            return Err(unknown("handing the coordination over"));
        }
        node.refresh();
        match node.metrics().current_leader {
            Some(leader) if leader == to.0 => Ok(()),
            leader => Err(ConsensusError::ElectedInstead { coordinator: leader.map(NodeId) }),
        }
    }

    /// Waits until the engine reports `condition`; `false` after `deadline` or a stop.
    async fn when(&self, deadline: Duration, condition: impl Fn(&Metrics) -> bool) -> bool {
        let mut metrics = self.engine().metrics();
        let waiting = async {
            loop {
                if condition(&metrics.borrow_watched()) {
                    return true;
                }
                if WatchReceiver::changed(&mut metrics).await.is_err() {
                    return false;
                }
            }
        };
        timeout_or_false(deadline, waiting).await
    }

    fn leading(&self) -> Result<Metrics, ConsensusError> {
        let metrics = self.inner.node.metrics();
        if let Err(e) = &metrics.running_state {
            return Err(ConsensusError::Stopped(e.to_string()));
        }
        let handed_over = self.inner.node.wire.stamps.handed_over(metrics.current_term);
        if metrics.state != ServerState::Leader || handed_over {
            return Err(self.not_leading());
        }
        Ok(metrics)
    }

    fn not_leading(&self) -> ConsensusError {
        ConsensusError::NotCoordinator { coordinator: self.other_coordinator() }
    }
}

async fn timeout_or_false(deadline: Duration, waiting: impl Future<Output = bool>) -> bool {
    timeout(deadline, waiting).await.unwrap_or(false)
}

fn nodes(metrics: &openraft::RaftMetrics<Types>) -> BTreeMap<u64, BasicNode> {
    let nodes = metrics.membership_config.nodes();
    nodes.map(|(id, node)| (*id, node.clone())).collect()
}
