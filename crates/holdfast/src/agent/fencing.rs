//! Power fencing: the coordinator has silent hosts switched off, and any node
//! tries out whether another's power could be.
//!
//! ```text
//!  due ─▶ still due? ─▶ agent: off ─▶ agent: status, until it says off ─▶ told to the planner
//!             │ no          │ heard again · readmitted · too late · failed
//!             ▼             ▼
//!          nothing       killed; an event says so; the lease decides
//! ```
//! Each order is a task of its own, that nothing waits for: a fence agent that
//! fails or hangs delays no failover. What is concluded is `core::fencing`'s.

mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_core::fencing::{Due, due, suspected_after_ms};
use holdfast_core::lease::{Authority, BootTime};
use holdfast_core::*;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{Agent, Failure, Member, coordinator, now_ms, rpc};
use crate::realtime::boot_time;
use program::{Deed, NotRun, run};

/// How long switching a host off, and seeing that it is off, may take together.
/// Devices that cut power need some seconds to half a minute.
const ORDER_WITHIN: Duration = Duration::from_secs(60);
/// How long a test may take in all.
pub const TEST_WITHIN: Duration = Duration::from_secs(60);
/// How often `status` is asked for while it still says that the host is on.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// So many looks at the leases in the time in which a node becomes suspected.
const LOOKS: u64 = 10;

/// What became of this coordinator's orders.
#[derive(Default)]
pub struct Fences {
    words: Mutex<BTreeMap<NodeId, (FenceWord, BootTime)>>,
    news: Notify,
}

impl Fences {
    fn words(&self) -> MutexGuard<'_, BTreeMap<NodeId, (FenceWord, BootTime)>> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new coordinatorship: what an earlier one was told is not known to be true.
    pub fn forget(&self) {
        self.words().clear();
    }

    /// Notifies once for each word that came in.
    pub async fn news(&self) {
        self.news.notified().await;
    }

    /// What was said of a node, unless its keeper was heard since: then it was wrong.
    pub fn word(&self, node: NodeId, heard: Option<BootTime>) -> Option<FenceWord> {
        let words = self.words();
        let (word, at) = words.get(&node)?;
        heard.is_none_or(|heard| heard < *at).then(|| word.clone())
    }

    /// `at`: the host was seen to be off not before this moment.
    fn tell(&self, node: NodeId, word: FenceWord, at: BootTime) {
        self.words().insert(node, (word, at));
        self.news.notify_one();
    }
}

/// Why a host was not shown to have lost its power.
#[derive(Debug, thiserror::Error)]
enum NotFenced {
    #[error(transparent)]
    NotRun(#[from] NotRun),
    #[error("{agent} says no (off: exit code {exit}): {said}")]
    Refused { agent: String, exit: String, said: String },
    #[error("{agent} switched it off, but cannot show that it is off (status: exit code {exit}): {said}")]
    Unseen { agent: String, exit: String, said: String },
    #[error("it was heard again, so {agent} was stopped")]
    Back { agent: String },
    #[error("{agent} did not bring it about within {} s", ORDER_WITHIN.as_secs())]
    Late { agent: String },
}

fn code(exit: Option<i32>) -> String {
    exit.map_or_else(|| "none".into(), |code| code.to_string())
}

impl Agent {
    /// Orders what is due for as long as this coordinatorship lasts; when this is
    /// dropped, every fence agent is killed.
    pub(super) async fn keep_fencing(self, member: &'static Member) {
        let mut state = member.consensus.state();
        let mut leases = member.leases.changed();
        let mut ordered = BTreeSet::new();
        let mut orders = JoinSet::new();
        loop {
            let now = state.borrow_and_update().clone();
            if now.fencing.is_empty() {
                if state.changed().await.is_err() {
                    return;
                }
                continue;
            }
            leases.borrow_and_update();
            let suspected_ms = suspected_after_ms(now.settings.profile.timing());
            let asked = |node, term| now.fencing.get(&node).is_some_and(|fencing| fencing.asked == Some(term));
            for due in due_now(member) {
                if ordered.insert((due.node, due.term, asked(due.node, due.term)))
                    && let Some(fencing) = now.fencing.get(&due.node)
                {
                    orders.spawn(self.clone().order(member, due, fencing.clone()));
                }
            }
            // Once in a term, and once more whenever somebody asks for it.
            ordered.retain(|(node, term, by_hand)| {
                let same = now.nodes.get(node).is_some_and(|known| known.term == *term);
                same && (!by_hand || asked(*node, *term))
            });
            let wake = async {
                tokio::select! {
                    _ = state.changed() => {}
                    _ = leases.changed() => {}
                    Some(_) = orders.join_next() => {}
                }
            };
            let _ = timeout(Duration::from_millis(suspected_ms / LOOKS), wake).await;
        }
    }

    async fn order(self, member: &'static Member, due: Due, fencing: PowerFencing) {
        // Right before it is done, with what is known now.
        if !due_now(member).iter().any(|now| (now.node, now.term) == (due.node, due.term)) {
            return;
        }
        let (node, agent) = (due.node, fencing.agent.clone());
        let name = self.state().node_name(node);
        tracing::warn!(node = name, term = %due.term, %agent, because = due.why, "has the host switched off");
        let begun = boot_time();
        let asked = fencing.asked == Some(due.term);
        let ended = tokio::select! {
            ended = timeout(ORDER_WITHIN, self.switch_off(&due, &fencing)) => {
                ended.unwrap_or_else(|_| Err(NotFenced::Late { agent: agent.clone() }))
            }
            () = back(member, &due, begun, asked) => Err(NotFenced::Back { agent: agent.clone() }),
        };
        let why = match ended {
            Ok((word, at)) => {
                tracing::warn!(node = name, ?word, "the host is off");
                return member.fences.tell(node, word, at);
            }
            Err(why) => why.to_string(),
        };
        tracing::warn!(node = name, %why, "the host was not shown to be off");
        let failed = Command::FenceFailed { node, term: due.term, why };
        if let Err(error) = self.execute("coordinator", failed).await {
            tracing::warn!(%error, "the cluster was not told of a fence that failed");
        }
    }

    /// Switches a host off and looks until it is off; the moment of the look that
    /// found it so.
    async fn switch_off(&self, due: &Due, fencing: &PowerFencing) -> Result<(FenceWord, BootTime), NotFenced> {
        let directory = &self.0.config.fence_agents_dir;
        let (begun, until) = (boot_time(), Instant::now() + ORDER_WITHIN);
        let agent = fencing.agent.clone();
        let off = run(directory, fencing, Deed::Off, ORDER_WITHIN).await?;
        if off.exit != Some(0) {
            return Err(NotFenced::Refused { agent, exit: code(off.exit), said: off.said });
        }
        loop {
            let looked = boot_time();
            let status = run(directory, fencing, Deed::Status, until.saturating_duration_since(Instant::now())).await?;
            let took_ms = boot_time().ms_since(begun);
            let word = FenceWord { term: due.term, agent: agent.clone(), off: off.exit, status: status.exit, took_ms };
            match status.exit {
                _ if word.is_confirmed() => return Ok((word, looked)),
                // It takes a moment.
                Some(0) => sleep(LOOK_AGAIN).await,
                exit => return Err(NotFenced::Unseen { agent, exit: code(exit), said: status.said }),
            }
        }
    }

    /// Tries out the power fencing of a node without switching anything, from a node
    /// that is not the target, and notes what that showed.
    ///
    /// # Errors
    /// There is no power fencing, or nobody to try it from.
    pub async fn test_fencing(&self, by: &str, node: NodeId) -> Result<FenceTest, Failure> {
        let member = self.member()?;
        let state = self.state();
        let Some(fencing) = state.fencing.get(&node).cloned() else {
            let name = state.node_name(node);
            return Err(Failure::other(
                "conflict",
                format!("node {name:?} has no power fencing: configure it with `holdfast node fencing set`"),
            ));
        };
        let coordinator = self.coordinator().filter(|coordinator| *coordinator != node);
        let others = state.nodes.values().filter(|other| other.is_up() && other.id != node).map(|other| other.id);
        // Whoever would give the order; that is the coordinator.
        let mut from = coordinator.into_iter().chain((member.me != node).then_some(member.me)).chain(others);
        let Some(from) = from.next() else {
            return Err(Failure::other("conflict", "no other node is up that could switch this one off"));
        };
        let test = if from == member.me {
            self.try_fencing(&state, node, &fencing).await
        } else {
            let asked = FenceTestCall { node, fencing: fencing.clone() };
            let tried = member.peers.ask(from, rpc::FENCE_TEST, &asked, TEST_WITHIN + Duration::from_secs(5)).await;
            tried.map_err(|error| Failure::other("unreachable", format!("{}: {error}", state.node_name(from))))?
        };
        let noted = Command::FenceTested { node, agent: fencing.agent, test: test.clone() };
        self.execute(by, noted).await?;
        Ok(test)
    }

    /// From this node.
    pub(super) async fn try_fencing(&self, state: &ClusterState, node: NodeId, fencing: &PowerFencing) -> FenceTest {
        let directory = &self.0.config.fence_agents_dir;
        let until = Instant::now() + TEST_WITHIN;
        let me = self.me().unwrap_or_default();
        let (agent, here, name) = (&fencing.agent, state.node_name(me), state.node_name(node));
        let up = state.nodes.get(&node).is_some_and(Node::is_up);
        let step = async |deed| {
            let left = until.saturating_duration_since(Instant::now());
            run(directory, fencing, deed, left).await.map_err(|error| error.to_string())
        };
        let tried = async {
            let monitor = step(Deed::Monitor).await?;
            if monitor.exit != Some(0) {
                return Err(format!(
                    "{agent} does not reach its device (exit code {}): {}",
                    code(monitor.exit),
                    monitor.said
                ));
            }
            let status = step(Deed::Status).await?;
            match status.exit {
                Some(0) => Ok(format!("{agent} reaches its device from {here}, which says that {name} has power")),
                Some(STATUS_OFF) if up => Err(format!(
                    "{agent} says that the host has no power, but {name} is up: its options are those of another host"
                )),
                Some(STATUS_OFF) => {
                    Ok(format!("{agent} reaches its device from {here}, which says that {name} has no power"))
                }
                exit => Err(format!(
                    "{agent} cannot say whether the host has power (exit code {}): {}",
                    code(exit),
                    status.said
                )),
            }
        };
        let (passed, text) = match tried.await {
            Ok(text) => (true, text),
            Err(text) => (false, text),
        };
        FenceTest { at_ms: now_ms(), from: me, passed, text }
    }
}

/// Asks another node to try out a third one's fencing.
#[derive(Serialize, Deserialize)]
pub struct FenceTestCall {
    /// Whose.
    pub node: NodeId,
    /// How.
    pub fencing: PowerFencing,
}

/// What is due, if this node may decide that: it is the coordinator, and a quorum
/// has acknowledged it just now. One that is cut off itself switches nobody off.
fn due_now(member: &Member) -> Vec<Due> {
    // One look: who borrows twice waits for ever when the writer comes in between.
    let standing = member.consensus.standing().borrow().clone();
    let acknowledged = standing.quorum_acked.filter(|_| standing.is_coordinator());
    let window_ms = member.consensus.authority_window_ms();
    if !acknowledged.is_some_and(|at| Authority::from_quorum(at, window_ms).holds(boot_time())) {
        return Vec::new();
    }
    let state = member.consensus.state().borrow().clone();
    due(&state, &coordinator::observe(member), member.me)
}

/// Returns when an order has lost its sense: the node was admitted anew, or, if it
/// was silence that spoke against it, its keeper was heard again.
async fn back(member: &Member, due: &Due, since: BootTime, asked: bool) {
    let mut leases = member.leases.changed();
    loop {
        leases.borrow_and_update();
        let slots = member.leases.snapshot();
        let slot = slots.iter().find(|slot| slot.node == due.node);
        let heard = slot.and_then(|slot| slot.heard).is_some_and(|(_, at)| at > since);
        let state = member.consensus.state().borrow().clone();
        let same = state.nodes.get(&due.node).is_some_and(|node| node.term == due.term);
        if !same || (heard && !asked) {
            return;
        }
        let again = Instant::now() + Duration::from_millis(50);
        let _ = timeout_at(again, leases.changed()).await;
    }
}
