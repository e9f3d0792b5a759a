//! How the quorum stands, and in which sentence.

use holdfast_api as api;
use holdfast_core::quorum::{Seat, Survey};
use holdfast_core::*;

use super::Vantage;

/// The quorum, seat by seat.
pub fn quorum(state: &ClusterState, from: Vantage<'_>) -> api::QuorumView {
    let figures = figures(from);
    let seats = match from.survey {
        Some(survey) => survey.seats.iter().map(|seat| seat_view(state, seat)).collect(),
        None => unheard(state, from),
    };
    api::QuorumView {
        answered_by: from.me.map(|me| state.node_name(me)).unwrap_or_default(),
        coordinator: from.coordinator.map(|node| state.node_name(node)),
        has_quorum: figures.connected >= figures.needed,
        settled: from.survey.is_some_and(|survey| survey.settled),
        votes: figures.voters,
        needed: figures.needed,
        present: figures.connected,
        survives_at_once: from.survey.map_or(0, |survey| survey.spare),
        survives_in_turn: from.survey.map_or(0, |survey| survey.in_turn),
        outlook: outlook(state, from.survey),
        seats,
    }
}

/// Votes, those that are present, and how many are needed.
pub(super) fn figures(from: Vantage<'_>) -> api::Quorum {
    match from.survey {
        Some(survey) => api::Quorum { voters: survey.votes, connected: survey.present, needed: survey.needed },
        None => api::Quorum { voters: from.voters.len(), connected: 0, needed: from.voters.len() / 2 + 1 },
    }
}

fn seat_view(state: &ClusterState, seat: &Seat) -> api::SeatView {
    api::SeatView {
        name: state.participant_name(seat.id),
        witness: seat.id.is_witness(),
        site: state.nodes.get(&seat.id).and_then(|node| node.site.clone()),
        votes: seat.votes,
        present: Some(seat.present),
        silent_ms: Some(seat.silent_ms),
        why: seat.why.to_string(),
    }
}

/// What a node knows by itself.
fn unheard(state: &ClusterState, from: Vantage<'_>) -> Vec<api::SeatView> {
    let ids = state.nodes.keys().copied().chain(state.witness.as_ref().map(|witness| witness.id));
    let view = |id: NodeId| api::SeatView {
        name: state.participant_name(id),
        witness: id.is_witness(),
        site: state.nodes.get(&id).and_then(|node| node.site.clone()),
        votes: from.voters.contains(&id),
        present: None,
        silent_ms: None,
        why: "as this node last knew; no coordinator says more".into(),
    };
    ids.map(view).collect()
}

fn outlook(state: &ClusterState, survey: Option<&Survey>) -> String {
    let Some(survey) = survey else {
        return "no coordinator answers here: a majority of the votes has to be up and connected before anything can be \
                agreed on"
            .into();
    };
    if survey.present < survey.needed {
        return format!(
            "{} of {} votes are present and {} are needed: nothing can be agreed on at this moment",
            survey.present, survey.votes, survey.needed
        );
    }
    let at_once = match survey.spare {
        0 if survey.votes == 1 => match sole(state, survey) {
            Some(name) if state.nodes.len() > 1 => {
                format!("{name} alone votes: the others may be lost, {name} may not")
            }
            _ => "there is no other node that could go on".into(),
        },
        0 => "no vote may be lost now".into(),
        1 => "any one vote may be lost now".into(),
        spare => format!("any {spare} votes may be lost at once"),
    };
    match survey.in_turn {
        in_turn if in_turn > survey.spare => {
            format!("{at_once}; one after the other, any {in_turn} nodes, while the votes have time to move")
        }
        _ => at_once,
    }
}

fn sole(state: &ClusterState, survey: &Survey) -> Option<String> {
    let mut voting = survey.seats.iter().filter(|seat| seat.votes);
    Some(state.participant_name(voting.next()?.id)).filter(|_| voting.next().is_none())
}

/// What to say when the next loss would stop the cluster, or something has.
pub(super) fn warning(state: &ClusterState, from: Vantage<'_>) -> Option<String> {
    let Some(survey) = from.survey else {
        return Some(
            "no coordinator answers, so nothing can be changed: a majority of the votes has to be up and connected \
             (`holdfast quorum show`)"
                .into(),
        );
    };
    if survey.spare > 0 || state.nodes.len() < 2 {
        return None;
    }
    let what = "nothing can be changed and no VM restarts elsewhere";
    match sole(state, survey) {
        Some(name) => {
            Some(format!("{name} alone votes: if it is lost, {what}. A third node, or a witness, closes this gap"))
        }
        None => {
            Some(format!("{} of {} votes are present: if one more is lost now, {what}", survey.present, survey.votes))
        }
    }
}
