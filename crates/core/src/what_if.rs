//! What would happen if: the coordinator's own decisions, on a copy.
//!
//! ```text
//!  question ──▶ who has a quorum ──▶ whose lease ends ──▶ plan ─▶ check ─▶ apply
//!                                                           ▲               │ until nothing
//!                                                           └── nodes say ◀─┘ is left to do
//! ```
//! [`plan`](crate::plan::plan), [`check`](crate::check::check) and
//! [`seats`](crate::quorum::seats) are the ones that the coordinator uses; only
//! what the nodes would say is made up here: that what they are told works.

mod phrase;
mod run;

use std::collections::BTreeSet;

use crate::check::Broken;
use crate::fencing;
use crate::model::*;
use crate::observed::Observed;
use crate::quorum::{Survey, seats};
use crate::state::ClusterState;

pub use phrase::{Misunderstood, Question};

/// How things stand: what the question is asked of.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// The state.
    pub state: &'a ClusterState,
    /// What the coordinator sees.
    pub observed: &'a Observed,
    /// Who coordinates.
    pub coordinator: NodeId,
    /// Who votes and is present.
    pub survey: &'a Survey,
    /// How long an election takes when the coordinator is lost, from and to, in
    /// milliseconds after the loss.
    pub election_ms: (u64, u64),
    /// Now, in milliseconds since the Unix epoch.
    pub now_ms: u64,
}

/// From and to, in milliseconds after the event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// At the earliest.
    pub from_ms: u64,
    /// At the latest, on a machine that keeps up.
    pub to_ms: u64,
}

/// What would happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// How many votes there are, and how many of them are left on the side that has
    /// the most.
    pub votes: (usize, usize),
    /// Who may coordinate; nobody without a quorum. One that stays is named alone.
    pub coordinators: Vec<NodeId>,
    /// Who votes afterwards.
    pub voters: BTreeSet<NodeId>,
    /// Nodes that would be lost, and when they are called so.
    pub lost: Vec<NodeId>,
    /// When that is; `None` without a quorum or without a loss.
    pub lost_within: Option<Span>,
    /// Every VM.
    pub vms: Vec<(VmId, Fate)>,
    /// What else there is to say.
    pub notes: Vec<String>,
}

/// What would become of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing.
    Stays {
        /// Where it runs; `None` when it is off, and stays so.
        on: Option<NodeId>,
    },
    /// It starts on another node, or on the same anew.
    Restarts {
        /// Where it ran.
        from: Option<NodeId>,
        /// Where it starts.
        to: NodeId,
        /// When its start is ordered.
        within: Option<Span>,
        /// Why.
        why: String,
    },
    /// It moves while it runs.
    Migrates {
        /// From here.
        from: NodeId,
        /// To there.
        to: NodeId,
    },
    /// It does not run any more, or its guest stands still.
    Stops {
        /// Where it ran.
        on: Option<NodeId>,
        /// When.
        within: Option<Span>,
        /// Why.
        why: String,
    },
    /// It would have to move, and cannot.
    Cannot {
        /// Where it runs.
        on: NodeId,
        /// Why.
        why: String,
    },
}

/// Says what would happen; changes nothing.
///
/// # Errors
/// The plan would break a safety rule and would not be carried out: a defect.
pub fn what_if(question: &Question, now: Situation<'_>) -> Result<Forecast, Broken> {
    let (coordinators, votes) = coordinators(question, now);
    let Some(&coordinator) = coordinators.first() else {
        return Ok(without_quorum(question, now, votes));
    };
    let up: Vec<_> = now.state.nodes.values().filter(|node| node.is_up()).map(|node| node.id).collect();
    let lost: Vec<_> = up.into_iter().filter(|id| !reaches(question, now.state, coordinator, *id)).collect();
    let within = (!lost.is_empty()).then(|| lost_within(now, coordinator));
    let mut run = run::Run::new(now.state, now.observed, now.now_ms, &lost);
    run.unreachable(&question.volumes);
    let refused = run.drain(&question.drained)?;
    let unfit = lost.iter().copied().chain(now.survey.seats.iter().filter(|seat| !seat.present).map(|seat| seat.id));
    let mut unfit: BTreeSet<_> = unfit.filter(|id| *id != coordinator).collect();
    unfit.extend(now.state.witness.as_ref().map(|witness| witness.id).filter(|_| question.witness));
    let voting = voting(now.survey);
    let voters = seats(&run.state, coordinator, &voting, &unfit).voters;
    let mut notes = notes(question, now, coordinator, &lost);
    if voters.len() == 1 && run.state.nodes.len() > 1 {
        notes.push(format!(
            "{} alone votes afterwards: if it is lost too, no VM restarts elsewhere",
            now.state.participant_name(coordinator)
        ));
    }
    let fate = |vm: &Vm| match refused.get(&vm.id) {
        Some(why) => Fate::Cannot { on: vm.node().unwrap_or_default(), why: why.clone() },
        None => fate(question, vm, &run, within),
    };
    let vms = now.state.vms.values().map(|vm| (vm.id, fate(vm))).collect();
    Ok(Forecast { votes, coordinators, voters, lost, lost_within: within, vms, notes })
}

fn voting(survey: &Survey) -> BTreeSet<NodeId> {
    survey.seats.iter().filter(|seat| seat.votes).map(|seat| seat.id).collect()
}

/// Who would have a quorum, and how many votes there are and are left at most.
fn coordinators(question: &Question, now: Situation<'_>) -> (Vec<NodeId>, (usize, usize)) {
    let voting = voting(now.survey);
    let present = |id: NodeId| now.survey.seats.iter().any(|seat| seat.id == id && seat.present);
    let heard_by = |candidate: NodeId| {
        let there = |id: &&NodeId| match id.is_witness() {
            true => !question.witness,
            false => reaches(question, now.state, candidate, **id),
        };
        voting.iter().filter(there).filter(|id| present(**id)).count()
    };
    let alive = |id: &NodeId| !id.is_witness() && present(*id) && !question.nodes.contains(id);
    let mut counted: Vec<_> = voting.iter().copied().filter(alive).map(|id| (heard_by(id), id)).collect();
    let left = counted.iter().map(|(votes, _)| *votes).max().unwrap_or(0);
    counted.retain(|(votes, _)| 2 * votes > voting.len());
    let mut able: Vec<_> = counted.into_iter().map(|(_, id)| id).collect();
    // Whoever coordinates goes on while it can: its side also has the witness first.
    if able.contains(&now.coordinator) {
        able = vec![now.coordinator];
    }
    (able, (voting.len(), left))
}

/// Whether two nodes hear each other after the event.
fn reaches(question: &Question, state: &ClusterState, one: NodeId, other: NodeId) -> bool {
    if question.nodes.contains(&one) || question.nodes.contains(&other) {
        return false;
    }
    if one == other || question.cut.is_empty() {
        return true;
    }
    shared(question, state, one, other, |network| network.roles.cluster)
}

/// Whether two nodes share a network of that kind after the event.
fn shared(
    question: &Question,
    state: &ClusterState,
    one: NodeId,
    other: NodeId,
    kind: impl Fn(&Network) -> bool,
) -> bool {
    let on = |id: NodeId| -> BTreeSet<String> {
        let addresses = state.nodes.get(&id).map(|node| node.facts.addresses.as_slice()).unwrap_or_default();
        let cut = |subnet: &String| {
            question.cut.iter().any(|(cut, node)| cut == subnet && node.is_none_or(|node| node == id))
        };
        addresses.iter().map(subnet).filter(|subnet| !cut(subnet)).collect()
    };
    on(one).intersection(&on(other)).any(|subnet| state.networks.get(subnet).is_some_and(&kind))
}

/// When nodes are called lost: counted from the coordinator's last answer, which is
/// up to a heartbeat before the event, or by a new one from its election.
fn lost_within(now: Situation<'_>, coordinator: NodeId) -> Span {
    let timing = now.state.settings.profile.timing();
    if coordinator == now.coordinator {
        let to_ms = timing.lost_after_ms();
        return Span { from_ms: to_ms - timing.heartbeat_ms, to_ms };
    }
    let waits = now.state.settings.longest_lease.lost_after_ms();
    Span { from_ms: now.election_ms.0 + waits, to_ms: now.election_ms.1 + waits }
}

/// Nobody renews leases any more: every VM is killed by its own keeper.
fn without_quorum(question: &Question, now: Situation<'_>, votes: (usize, usize)) -> Forecast {
    let timing = now.state.settings.profile.timing();
    let ends = Span { from_ms: timing.length_ms - timing.heartbeat_ms, to_ms: timing.length_ms + now.election_ms.0 };
    let fate = |vm: &Vm| match vm.node() {
        None => Fate::Stays { on: None },
        Some(on) if question.nodes.contains(&on) => Fate::Stops {
            on: Some(on),
            within: Some(Span { from_ms: 0, to_ms: 0 }),
            why: "its node is lost, and nobody can decide to start it elsewhere".into(),
        },
        Some(on) => Fate::Stops {
            on: Some(on),
            within: Some(ends),
            why: "its node's lease ends, because without a quorum nobody renews it".into(),
        },
    };
    let note = format!(
        "{} of {} votes are left and {} are needed: nothing can be decided until enough voters are back; then the VMs \
         start again",
        votes.1,
        votes.0,
        votes.0 / 2 + 1
    );
    Forecast {
        votes,
        coordinators: Vec::new(),
        voters: voting(now.survey),
        lost: question.nodes.iter().copied().collect(),
        lost_within: None,
        vms: now.state.vms.values().map(|vm| (vm.id, fate(vm))).collect(),
        notes: vec![note],
    }
}

fn fate(question: &Question, before: &Vm, run: &run::Run, within: Option<Span>) -> Fate {
    let Some(after) = run.state.vms.get(&before.id) else {
        let why = "it is given up: its disks were not made yet".into();
        return Fate::Stops { on: None, within, why };
    };
    let why = || after.causes.last().map_or_else(String::new, |because| because.cause.to_string());
    let (from, to) = (before.node(), after.node());
    let migrated = run.moved.contains(&before.id);
    match (from, to) {
        (Some(from), Some(to)) if migrated && from != to => Fate::Migrates { from, to },
        (from, Some(to)) if before.last_epoch != after.last_epoch && !migrated => {
            Fate::Restarts { from, to, within, why: why() }
        }
        (Some(on), None) => Fate::Stops { on: Some(on), within, why: why() },
        (_, Some(on)) => match question.volumes.iter().find(|(name, node)| *node == on && after.spec.uses_volume(name))
        {
            Some((volume, _)) => {
                let why = format!(
                    "its files are on {volume}: QEMU stops the guest at its first failed read or write; nothing starts \
                     it elsewhere by itself"
                );
                Fate::Stops { on: Some(on), within: None, why }
            }
            None => Fate::Stays { on: Some(on) },
        },
        (None, None) => Fate::Stays { on: None },
    }
}

fn notes(question: &Question, now: Situation<'_>, coordinator: NodeId, lost: &[NodeId]) -> Vec<String> {
    let mut notes = Vec::new();
    let timing = now.state.settings.profile.timing();
    if !now.survey.settled {
        notes.push("the votes are about to move: ask again in a few seconds".into());
    }
    let mut observed = now.observed.clone();
    for id in lost {
        let seen = observed.nodes.entry(*id).or_default();
        (seen.heard, seen.silent_ms) = (None, fencing::suspected_after_ms(timing));
    }
    for due in fencing::due(now.state, &observed, coordinator) {
        let name = now.state.node_name(due.node);
        let after = fencing::suspected_after_ms(timing);
        notes.push(format!(
            "the power of {name} is ordered off after {after} ms of silence; once that is confirmed, {name} is called \
             lost without waiting for its lease"
        ));
    }
    for id in lost.iter().filter(|id| !question.nodes.contains(id)) {
        let name = now.state.node_name(*id);
        notes.push(format!("{name} is cut off: it kills its own VMs when its lease ends, before they start elsewhere"));
    }
    let still = |kind: fn(&Network) -> bool| {
        let up: Vec<_> = now.state.nodes.values().filter(|node| node.is_up()).map(|node| node.id).collect();
        let missing = up.iter().flat_map(|one| up.iter().map(move |other| (*one, *other))).find(|(one, other)| {
            one < other
                && !lost.contains(one)
                && !lost.contains(other)
                && !shared(question, now.state, *one, *other, kind)
        });
        missing.map(|(one, other)| (now.state.node_name(one), now.state.node_name(other)))
    };
    if !question.cut.is_empty() {
        if lost.is_empty() {
            notes.push(
                "every node is still heard over another network with the cluster role: nothing fails over".into(),
            );
        }
        if let Some((one, other)) = still(|network| network.roles.migration) {
            notes.push(format!("no network for migrations is left between {one} and {other}"));
        }
    }
    for (volume, node) in &question.volumes {
        let name = now.state.node_name(*node);
        notes.push(format!("`holdfast cluster status` warns that {name} does not reach {volume}"));
    }
    notes
}
