//! Who takes part in consensus: the coordinator has the votes follow the nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_consensus::Participants;
use holdfast_core::lease::BootTime;
use holdfast_core::quorum::{Attendance, Seats, Survey, seats, survey};
use holdfast_core::*;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use super::{ATTEMPT, Agent, Failure, Member, now_ms, peers, rpc};
use crate::realtime::boot_time;

/// Attendance is taken this often: what somebody does not say is no event.
const EVERY: Duration = Duration::from_millis(250);
/// How often a failed change of the members is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// What stands for the witness's address: whoever hosts it is asked.
const WITNESS_ADDRESS: &str = "witness";

type Addresses = BTreeMap<NodeId, String>;

/// The account of who attends, shared with those who ask how the quorum stands.
pub struct Roll(Mutex<Attendance>);

impl Roll {
    /// Nobody was heard yet.
    pub fn new() -> Self {
        Roll(Mutex::new(Attendance::new(BootTime(0))))
    }

    /// Who is there, and who has acknowledged nothing for long.
    pub fn attending(&self, state: &ClusterState, coordinator: NodeId, now: BootTime) -> Attending {
        self.attendance().attending(state, coordinator, now)
    }

    fn attendance(&self) -> MutexGuard<'_, Attendance> {
        // Each change leaves it whole: a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the coordinator says of the quorum; `None` on any other node.
pub(super) fn surveyed(member: &Member) -> Option<Survey> {
    let participants = member.consensus.participants()?;
    let state = member.consensus.state().borrow().clone();
    Some(survey(&state, member.me, &participants.voters, &member.roll.attendance(), boot_time()))
}

impl Agent {
    /// How the quorum stands, by the coordinator's account.
    ///
    /// # Errors
    /// No coordinator answers.
    pub async fn survey(&self) -> Result<Survey, Failure> {
        let member = self.member()?;
        let none = || Failure::NoCoordinator { seconds: ATTEMPT.as_secs() };
        let coordinator = self.coordinator().ok_or_else(none)?;
        if coordinator == member.me {
            return surveyed(member).ok_or_else(none);
        }
        member.peers.ask(coordinator, rpc::QUORUM, &(), ATTEMPT).await.map_err(|_| none())
    }

    /// Has the votes follow who is there, for as long as this node coordinates.
    pub(super) async fn keep_members(self, member: &'static Member, since: BootTime) {
        *member.roll.attendance() = Attendance::new(since);
        let mut state = member.consensus.state();
        let mut settled = None;
        loop {
            let now = state.borrow_and_update().clone();
            let Some(participants) = member.consensus.participants() else { return };
            let wanted = self.take_attendance(member, &now, &participants);
            let pause = match self.move_votes(member, &now, &participants, wanted, &mut settled).await {
                Ok(()) => EVERY,
                Err(error) => {
                    tracing::warn!(%error, "the members of consensus do not follow the nodes yet");
                    AGAIN
                }
            };
            drop(now);
            let _ = timeout(pause, state.changed()).await;
        }
    }

    fn take_attendance(&self, member: &Member, state: &ClusterState, participants: &Participants) -> Seats {
        let voting: BTreeSet<_> = participants.voters.iter().flatten().copied().collect();
        let mut attendance = member.roll.attendance();
        let now = boot_time();
        attendance.hear(state, &participants.heard, now);
        let unfit = attendance.unfit(state, member.me, &voting, now);
        seats(state, member.me, &voting, &unfit.into_keys().collect())
    }

    /// Makes the participants what they should be, step by step: those that are new
    /// learn before they vote, so that nothing waits for them.
    async fn move_votes(
        &self,
        member: &'static Member,
        state: &ClusterState,
        participants: &Participants,
        mut wanted: Seats,
        settled: &mut Option<(Addresses, Addresses)>,
    ) -> anyhow::Result<()> {
        // Before the first node is in the state, the founder votes alone.
        if state.nodes.is_empty() {
            return Ok(());
        }
        let leaves = !state.nodes.contains_key(&member.me);
        if leaves {
            // This node was removed: another decides, and needs a vote for that.
            wanted.voters.insert(member.me);
        }
        // Whoever takes over counts this node's vote until it has ended it.
        let mine = settled.as_ref().and_then(|(voters, _)| voters.get(&member.me)).cloned();
        let address = |id: NodeId| match &mine {
            Some(mine) if leaves && id == member.me => mine.clone(),
            _ => address(state, member, id),
        };
        let addresses = |ids: &BTreeSet<NodeId>| -> Addresses { ids.iter().map(|id| (*id, address(*id))).collect() };
        let members = (addresses(&wanted.voters), addresses(&wanted.learners));
        let votes_as_wanted = participants.voters.len() == 1 && participants.voters[0] == wanted.voters;
        if !votes_as_wanted || settled.as_ref() != Some(&members) {
            member.consensus.set_members(members.0.clone(), members.1.clone()).await?;
            *settled = Some(members);
        }
        if state.voters != wanted.voters && !state.cluster.name.is_empty() {
            self.tell(member, wanted.voters.clone()).await;
        }
        if leaves {
            let others = wanted.voters.iter().filter(|id| **id != member.me && !id.is_witness());
            for to in others {
                match self.hand_over_to(member, *to, Instant::now() + AGAIN).await {
                    Ok(()) => break,
                    Err(error) => tracing::warn!(%error, %to, "the coordination was not handed over"),
                }
            }
        }
        Ok(())
    }

    /// Has it recorded who votes now, for those who read what happened.
    async fn tell(&self, member: &Member, voters: BTreeSet<NodeId>) {
        let command = Command::VotesMoved { voters };
        let proposal = Proposal { id: RequestId(Uuid::new_v4()), at_ms: now_ms(), by: "coordinator".into(), command };
        if let Err(error) = member.consensus.propose(proposal).await {
            tracing::debug!(%error, "that the votes moved was not recorded yet");
        }
    }
}

/// Where a participant answers.
fn address(state: &ClusterState, member: &Member, id: NodeId) -> String {
    if id.is_witness() {
        return WITNESS_ADDRESS.into();
    }
    match state.nodes.get(&id) {
        Some(node) => {
            let addresses: Vec<_> = peers::addresses(state, node).iter().map(ToString::to_string).collect();
            addresses.join(",")
        }
        // A node that was removed just when it began to coordinate.
        None => member.by(),
    }
}
