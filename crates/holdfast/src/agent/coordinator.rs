//! What the coordinator does beside answering: it grants leases, watches them,
//! plans, and has its plans agreed on.

use std::time::Duration;

use holdfast_consensus::{ProposeError, Role, Standing};
use holdfast_core::check::check;
use holdfast_core::lease::{Authority, BootTime};
use holdfast_core::plan::plan;
use holdfast_core::*;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::{Agent, Member, now_ms};
use crate::leases::Admission;
use crate::realtime::boot_time;

/// Planned at every change, and this often for what only time changes.
const EVERY: Duration = Duration::from_millis(500);
/// A plan that could not even be proposed is made anew after this.
const NOT_PROPOSED: Duration = Duration::from_millis(10);
/// A keeper that was not heard for so many heartbeats is not asking for a lease.
const HEARD_WITHIN_HEARTBEATS: u64 = 5;
/// A network on which a node was not heard for so long does not carry its heartbeats.
const UNHEARD_MS: u64 = 2000;

/// What the coordinator sees, from its lease thread and from reports.
pub fn observe(member: &Member) -> Observed {
    let state = member.consensus.state().borrow().clone();
    let timing = state.settings.profile.timing();
    let now = boot_time();
    let mut reports = member.reports.heard();
    let mut observed = Observed::default();
    for slot in member.leases.snapshot() {
        // A slot that has not caught up with the state speaks of another term.
        let current =
            state.nodes.get(&slot.node).is_some_and(|node| slot.lease.is_some_and(|lease| lease.term == node.term));
        let seen = NodeObserved {
            lease_ended: current && slot.lease.is_some_and(|lease| lease.condemned),
            silent_ms: slot.lease.filter(|_| current).map_or(0, |lease| now.ms_since(lease.answered)),
            heard: slot.heard_within(timing.heartbeat_ms * HEARD_WITHIN_HEARTBEATS, now).filter(|_| current),
            report: reports.remove(&slot.node),
            unheard_on: unheard_on(&state, member, slot.node, now),
            fence: member.fences.word(slot.node, slot.heard.map(|(_, at)| at)),
        };
        observed.nodes.insert(slot.node, seen);
    }
    observed.attendance = Some(member.roll.attending(&state, member.me, now));
    for (node, report) in reports {
        observed.nodes.entry(node).or_default().report = Some(report);
    }
    observed
}

/// The networks that this node shares with another and has not heard it on lately.
fn unheard_on(state: &ClusterState, member: &Member, node: NodeId, now: BootTime) -> Vec<String> {
    if node == member.me {
        return Vec::new();
    }
    let links = member.leases.link_view();
    let heard = |ip: std::net::IpAddr| {
        links.iter().any(|link| link.node == node && link.local.ip() == ip && now.ms_since(link.heard) < UNHEARD_MS)
    };
    let bound = member.leases.addresses();
    let subnets = |node: NodeId| state.nodes.get(&node).map(|node| node.facts.addresses.as_slice()).unwrap_or_default();
    let theirs: Vec<_> = subnets(node).iter().map(subnet).collect();
    let mine = subnets(member.me).iter().filter(|address| bound.iter().any(|socket| socket.ip() == address.ip));
    mine.filter(|address| theirs.contains(&subnet(address)) && !heard(address.ip))
        .filter_map(|address| state.networks.get(&subnet(address)).filter(|network| network.roles.cluster))
        .map(|network| network.name.clone())
        .collect()
}

/// Whether this node is still the coordinator of `term`.
fn coordinates(standing: &Standing, term: u64) -> bool {
    standing.is_coordinator() && standing.term == term
}

fn lend_authority(member: &Member) {
    let standing = member.consensus.standing();
    let standing = standing.borrow();
    let authority = match (standing.me, standing.quorum_acked) {
        (Role::Coordinator { .. }, Some(acknowledged)) => {
            Authority::from_quorum(acknowledged, member.consensus.authority_window_ms())
        }
        _ => Authority::NONE,
    };
    member.lending.lend(member, authority);
}

fn admissions(state: &ClusterState) -> Vec<Admission> {
    let admission = |node: &Node| {
        let (admitted, term, up) = (node.incarnation, node.term, node.is_up());
        Admission { node: node.id, admitted, term, up, leaves: node.leaves }
    };
    state.nodes.values().map(admission).collect()
}

impl Agent {
    /// Lends the lease thread the authority that consensus gives, as it gives it.
    pub(super) async fn keep_authority(self, member: &'static Member) {
        let mut standing = member.consensus.standing();
        while standing.changed().await.is_ok() {
            standing.borrow_and_update();
            lend_authority(member);
        }
    }

    /// Coordinates whenever this node is the coordinator, for ever.
    pub(super) async fn keep_coordinating(self, member: &'static Member) {
        let mut standing = member.consensus.place();
        loop {
            let role = standing.borrow_and_update().me;
            if let Role::Coordinator { since } = role {
                let term = standing.borrow().term;
                tracing::info!(term, "this node is the coordinator");
                member.reports.forget();
                member.fences.forget();
                self.coordinate(member, since, term).await;
                tracing::info!(term, "this node is no longer the coordinator");
                if let Err(error) = member.leases.step_down() {
                    tracing::error!(%error, "the lease thread did not step down; it has no authority");
                }
            } else if standing.changed().await.is_err() {
                return;
            }
        }
    }

    async fn coordinate(&self, member: &'static Member, since: BootTime, term: u64) {
        let mut standing = member.consensus.place();
        let mut state = member.consensus.state();
        let mut leases = member.leases.changed();
        let begun = {
            let state = state.borrow_and_update();
            let settings = &state.settings;
            member.leases.become_coordinator(
                since,
                &admissions(&state),
                settings.profile.timing(),
                settings.longest_lease,
            )
        };
        if let Err(error) = begun {
            tracing::error!(%error, "cannot coordinate");
            sleep(EVERY).await;
            return;
        }
        // Each coordinatorship begins without any.
        lend_authority(member);
        let fencing = tokio::spawn(self.clone().keep_fencing(member));
        let members = tokio::spawn(self.clone().keep_members(member, since));
        let mut known = Vec::new();
        // When the lease thread began to grant the current, perhaps shorter leases.
        let mut timing_since = (state.borrow().settings.profile, boot_time());
        loop {
            let now = state.borrow_and_update().clone();
            leases.borrow_and_update();
            let admitted = admissions(&now);
            if admitted != known || timing_since.0 != now.settings.profile {
                if let Err(error) = member.leases.update(&admitted, now.settings.profile.timing()) {
                    tracing::error!(%error, "the lease thread was not told of a change");
                }
                if timing_since.0 != now.settings.profile {
                    timing_since = (now.settings.profile, boot_time());
                }
                known = admitted;
            }
            let mut observed = observe(member);
            observed.longer_leases_over =
                boot_time().ms_since(timing_since.1.max(since)) > 2 * now.settings.longest_lease.lost_after_ms();
            if let Some(command) = decide(&now, &observed) {
                drop(now);
                self.agree(member, command).await;
            } else {
                drop(now);
                let wake = async {
                    tokio::select! {
                        _ = state.changed() => {}
                        _ = leases.changed() => {}
                        () = member.reports.news() => {}
                        () = member.fences.news() => {}
                        _ = standing.wait_for(|now| !coordinates(now, term)) => {}
                    }
                };
                let _ = timeout(EVERY, wake).await;
            }
            if !coordinates(&standing.borrow(), term) {
                break;
            }
        }
        members.abort();
        fencing.abort();
    }

    /// Has a plan agreed on. When the outcome is unknown the next plan waits until
    /// everything before it is applied, or this node is not the coordinator.
    async fn agree(&self, member: &Member, command: Command) {
        let proposal = Proposal { id: RequestId(Uuid::new_v4()), at_ms: now_ms(), by: "coordinator".into(), command };
        match member.consensus.propose(proposal).await {
            Ok(Reply::Refused(refusal)) => tracing::debug!(%refusal, "planned on a state that has changed meanwhile"),
            Ok(_) => {}
            Err(ProposeError::Unknown) => {
                if let Ok(index) = member.consensus.barrier().await {
                    member.consensus.wait_applied(index, EVERY).await;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "a plan was not proposed");
                // Where this node stands may be known a moment later only.
                sleep(NOT_PROPOSED).await;
            }
        }
    }
}

/// The next decisions, if any, after an independent judge has passed them.
fn decide(state: &ClusterState, observed: &Observed) -> Option<Command> {
    if state.cluster.name.is_empty() {
        return None;
    }
    let plan = plan(state, observed, now_ms());
    if plan.decisions.is_empty() {
        return None;
    }
    if let Err(broken) = check(state, &plan) {
        tracing::error!(%broken, ?plan, "a plan breaks a safety rule and is not carried out: this is a defect");
        return None;
    }
    for decision in &plan.decisions {
        tracing::info!(action = ?decision.action, because = %decision.cause, "decides");
    }
    Some(Command::Decide { revision: plan.revision, decisions: plan.decisions })
}
