//! Where this node stands: its role, who coordinates, how sure that is.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_core::NodeId;
use holdfast_core::lease::BootTime;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};

use crate::authority::boot_time;
use crate::network::Wire;
use crate::types::{Engine, Metrics, ServerMetrics};

/// What this node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It decides. An entry of its own term is committed and applied, so the
    /// applied state holds everything that earlier coordinators committed.
    Coordinator {
        /// When this was first known; no earlier coordinator had authority then.
        since: BootTime,
    },
    /// It votes.
    Voter,
    /// It only receives the log.
    Learner,
}

/// Where this node stands, as far as it knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Who coordinates, as far as this node knows. May be out of date: a node that
    /// is cut off goes on naming the last one.
    pub coordinator: Option<NodeId>,
    /// The term. Each has at most one coordinator; later ones have greater terms.
    pub term: u64,
    /// What this node is.
    pub me: Role,
    /// On the coordinator: the latest moment such that a majority acknowledged
    /// what it sent then, for [`holdfast_core::lease::Authority::from_quorum`] with
    /// [`crate::Consensus::authority_window_ms`]. A coordinator that is cut off
    /// keeps its role, and this stands still.
    pub quorum_acked: Option<BootTime>,
    /// The last index of the log that is applied to the state.
    pub last_applied: u64,
    /// Who votes; while voters change, those of both sets.
    pub voters: Vec<NodeId>,
    /// Who only receives the log.
    pub learners: Vec<NodeId>,
    /// What keeps this node from taking part, in words for an operator: a full
    /// or broken disk, or that consensus has stopped.
    pub trouble: Option<String>,
}

impl Standing {
    /// Whether this node is the coordinator.
    pub fn is_coordinator(&self) -> bool {
        matches!(self.me, Role::Coordinator { .. })
    }
}

/// What the tasks of one node share.
pub(crate) struct Node {
    pub(crate) engine: Engine,
    pub(crate) wire: Arc<Wire>,
    pub(crate) standing: watch::Sender<Standing>,
    /// The same, told anew only when more has changed than the last acknowledgement.
    pub(crate) place: watch::Sender<Standing>,
    publishing: Mutex<()>,
    pub(crate) trouble: watch::Receiver<Option<String>>,
    pub(crate) heartbeat: Duration,
    /// How long a voter keeps still after it accepted a coordinator's message.
    pub(crate) hold: Duration,
    /// When a coordinator was last heard, or when this node started.
    heard: Mutex<Instant>,
    /// When this node started, if an earlier life of it may have voted or accepted
    /// a coordinator.
    pub(crate) held_since: Option<Instant>,
    /// Whether it sends no heartbeats, so that another is elected.
    pub(crate) mute: AtomicBool,
    /// It campaigns for nothing, whatever its log says of who votes.
    pub(crate) only_listens: AtomicBool,
}

impl Node {
    pub(crate) fn new(
        engine: Engine,
        wire: Arc<Wire>,
        trouble: watch::Receiver<Option<String>>,
        heartbeat: Duration,
        hold: Duration,
        held: bool,
    ) -> Self {
        let now = Instant::now();
        let standing = Standing {
            coordinator: None,
            term: 0,
            me: Role::Learner,
            quorum_acked: None,
            last_applied: 0,
            voters: Vec::new(),
            learners: Vec::new(),
            trouble: None,
        };
        Node {
            engine,
            wire,
            place: watch::Sender::new(standing.clone()),
            publishing: Mutex::new(()),
            standing: watch::Sender::new(standing),
            trouble,
            heartbeat,
            hold,
            heard: Mutex::new(now),
            held_since: held.then_some(now),
            mute: AtomicBool::new(false),
            only_listens: AtomicBool::new(false),
        }
    }

    pub(crate) fn metrics(&self) -> Metrics {
        self.engine.metrics().borrow_watched().clone()
    }

    /// A coordinator's message was accepted.
    pub(crate) fn heard(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    pub(crate) fn last_heard(&self) -> Instant {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a coordinator may still rely on an earlier life of this node.
    pub(crate) fn held(&self) -> bool {
        self.held_since.is_some_and(|since| since.elapsed() <= self.hold)
    }

    /// Whether this node must not help to elect another coordinator now, for
    /// reasons that the engine does not know.
    pub(crate) fn withholds_vote(&self) -> bool {
        if self.held() {
            return true;
        }
        let server = self.engine.server_metrics().borrow_watched().clone();
        if server.state != ServerState::Leader {
            return false;
        }
        let now = boot_time();
        let hold_ms = self.hold.as_millis() as u64;
        self.quorum(&server, now).is_some_and(|acked| now <= acked.plus_ms(hold_ms))
    }

    fn quorum(&self, server: &ServerMetrics, now: BootTime) -> Option<BootTime> {
        let voters = server.membership_config.get_joint_config();
        let term = server.vote.leader_id.term;
        self.wire.stamps.quorum(term, self.wire.me, voters, now)
    }

    fn now(&self, before: &Standing) -> Standing {
        let server = self.engine.server_metrics().borrow_watched().clone();
        let last_applied = self.engine.data_metrics().borrow_watched().last_applied;
        let running = self.engine.metrics().borrow_watched().running_state.clone();
        let membership = server.membership_config.membership();
        let me = self.wire.me;
        let term = server.vote.leader_id.term;
        let leads = server.state == ServerState::Leader
            && running.is_ok()
            && !self.wire.stamps.handed_over(term)
            && server.vote.committed
            && server.vote.leader_id.voted_for == me
            // The first entry of the own term, or a later one.
            && last_applied.is_some_and(|last| last.leader_id.term == term);
        let role = match (leads, before.me) {
            (true, Role::Coordinator { since }) if before.term == term => Role::Coordinator { since },
            (true, _) => Role::Coordinator { since: boot_time() },
            (false, _) if membership.voter_ids().any(|voter| voter == me) => Role::Voter,
            (false, _) => Role::Learner,
        };
        let stopped = running.err().map(|e| e.to_string());
        Standing {
            coordinator: match server.current_leader {
                Some(leader) if leader == me && !leads => None,
                leader => leader.map(NodeId),
            },
            term,
            me: role,
            quorum_acked: leads.then(|| self.quorum(&server, boot_time())).flatten(),
            last_applied: last_applied.map_or(0, |last| last.index),
            voters: sorted(membership.voter_ids()),
            learners: sorted(membership.learner_ids()),
            trouble: self.trouble.borrow().clone().or(stopped),
        }
    }

    /// Publishes the standing as it is now.
    pub(crate) fn refresh(&self) {
        // One at a time, so that both end with the same.
        let _turn = self.publishing.lock().unwrap_or_else(PoisonError::into_inner);
        self.standing.send_if_modified(|standing| {
            let now = self.now(standing);
            let changed = now != *standing;
            *standing = now;
            changed
        });
        let now = self.standing.borrow().clone();
        self.place.send_if_modified(|place| {
            let moved = *place != Standing { quorum_acked: place.quorum_acked, ..now.clone() };
            if moved {
                *place = now;
            }
            moved
        });
    }

    /// Keeps the standing up to date until the engine has stopped.
    pub(crate) async fn follow(self: Arc<Self>) {
        // Not `metrics()`, which is sent anew at each heartbeat: an idle node should sleep.
        let mut server = self.engine.server_metrics();
        let mut data = self.engine.data_metrics();
        let mut trouble = self.trouble.clone();
        let mut tick = tokio::time::interval(self.heartbeat);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut members_at = None;
        loop {
            let members = server.borrow_watched().membership_config.clone();
            if members_at != Some(*members.log_id()) {
                members_at = Some(*members.log_id());
                let addresses = members.nodes().map(|(id, node)| (*id, node.addr.clone()));
                self.wire.set_addresses(addresses.collect());
            }
            self.refresh();
            // It hears nobody, and its authority must go on.
            let sole = members.voter_ids().count() == 1;
            let running = tokio::select! {
                changed = WatchReceiver::changed(&mut server) => changed.is_ok(),
                changed = WatchReceiver::changed(&mut data) => changed.is_ok(),
                changed = trouble.changed() => changed.is_ok(),
                () = self.wire.stamps.changed.notified() => true,
                _ = tick.tick(), if sole => true,
            };
            if !running {
                self.refresh();
                return;
            }
        }
    }
}

fn sorted(nodes: impl Iterator<Item = u64>) -> Vec<NodeId> {
    nodes.collect::<BTreeSet<_>>().into_iter().map(NodeId).collect()
}
