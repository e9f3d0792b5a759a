//! What would happen if.

use holdfast_api as api;
use holdfast_core::ClusterState;
use holdfast_core::what_if::{Fate, Forecast, Span};

/// What would happen if what was asked did.
pub fn what_if(state: &ClusterState, asked: &str, forecast: &Forecast) -> api::WhatIfView {
    let names = |ids: &mut dyn Iterator<Item = &holdfast_core::NodeId>| -> Vec<String> {
        ids.map(|id| state.participant_name(*id)).collect()
    };
    let vm = |id: &holdfast_core::VmId, fate: &Fate| {
        let named = |id: holdfast_core::NodeId| Some(state.node_name(id));
        let (fate, from, to, span, why) = match fate {
            Fate::Stays { on } => (api::VmFate::Stays, on.and_then(named), on.and_then(named), None, None),
            Fate::Restarts { from, to, within, why } => {
                (api::VmFate::Restarts, from.and_then(named), named(*to), *within, Some(why.clone()))
            }
            Fate::Migrates { from, to } => (api::VmFate::Migrates, named(*from), named(*to), None, None),
            Fate::Stops { on, within, why } => {
                (api::VmFate::Stops, on.and_then(named), None, *within, Some(why.clone()))
            }
            Fate::Cannot { on, why } => (api::VmFate::Cannot, named(*on), named(*on), None, Some(why.clone())),
        };
        let name = state.vms.get(id).map_or_else(|| id.to_string(), |vm| vm.name.clone());
        api::VmForecast { name, fate, from, to, within: span.map(within), why }
    };
    let mut vms: Vec<_> = forecast.vms.iter().map(|(id, fate)| vm(id, fate)).collect();
    vms.sort_by(|one, other| one.name.cmp(&other.name));
    api::WhatIfView {
        asked: asked.into(),
        has_quorum: !forecast.coordinators.is_empty(),
        votes: forecast.votes.0,
        votes_left: forecast.votes.1,
        coordinators: names(&mut forecast.coordinators.iter()),
        voters_afterwards: names(&mut forecast.voters.iter()),
        lost: names(&mut forecast.lost.iter()),
        lost_within: forecast.lost_within.map(within),
        vms,
        notes: forecast.notes.clone(),
    }
}

fn within(span: Span) -> api::Within {
    api::Within { from_ms: span.from_ms, to_ms: span.to_ms }
}
