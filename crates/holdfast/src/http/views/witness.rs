//! How the witness stands.

use holdfast_api as api;
use holdfast_core::*;

use super::Vantage;

/// The witness, with what the asked node knows of its disk itself.
pub fn witness(
    state: &ClusterState,
    witness: &Witness,
    from: Vantage<'_>,
    seen_ms: Option<u64>,
    trouble: Option<String>,
) -> api::WitnessView {
    let seat = from.survey.and_then(|survey| survey.seats.iter().find(|seat| seat.id == witness.id));
    let me = from.me.map(|me| state.node_name(me));
    let here = me.as_ref().zip(trouble).map(|(me, why)| format!("{me} {why}"));
    let told = witness.trouble.iter().map(|(node, why)| format!("{} {why}", state.node_name(*node)));
    let why = here.or_else(|| told.into_iter().next()).or_else(|| match seat {
        Some(seat) if !seat.present => Some("it does not acknowledge what the coordinator says".into()),
        None if from.survey.is_some() => Some("it does not take part yet".into()),
        None => Some("no coordinator answers here".into()),
        Some(_) if witness.hosted_by.is_none() => Some("no node hosts it yet".into()),
        Some(_) => None,
    });
    let name = |id: Option<NodeId>| id.map(|id| state.node_name(id));
    api::WitnessView {
        disk: witness.disk.clone(),
        mark: witness.mark.to_string(),
        host: name(witness.host),
        hosted_by: name(witness.hosted_by),
        epoch: witness.epoch,
        votes: seat.map_or_else(|| from.voters.contains(&witness.id), |seat| seat.votes),
        present: seat.map(|seat| seat.present),
        silent_ms: seat.map(|seat| seat.silent_ms),
        seen_from: me.filter(|_| seen_ms.is_some()),
        seen_ms,
        healthy: why.is_none(),
        why,
    }
}

/// What somebody should look at.
pub(super) fn warnings(state: &ClusterState) -> impl Iterator<Item = String> {
    let trouble = state.witness.iter().flat_map(|witness| &witness.trouble);
    trouble.map(|(node, why)| format!("witness: {} {why}", state.node_name(*node)))
}
