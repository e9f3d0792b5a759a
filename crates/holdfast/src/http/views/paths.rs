//! How nodes reach volumes on LUNs, and who owns them.

use std::collections::BTreeMap;

use holdfast_api as api;
use holdfast_core::*;
use uuid::Uuid;

use crate::agent::Traffic;

/// What nodes have done through others, of those that said so.
type Redirected = BTreeMap<NodeId, BTreeMap<Uuid, Traffic>>;

/// The owner of a volume.
pub fn owner(state: &ClusterState, volume: &str) -> Option<api::OwnerView> {
    let owner = state.owner(volume)?;
    let next = state.luns.get(volume)?.access.next.filter(|_| owner.leaving);
    Some(api::OwnerView {
        node: state.node_name(owner.node),
        epoch: owner.epoch.0,
        leaving: owner.leaving,
        next: next.map(|node| state.node_name(node)),
    })
}

/// How a node reaches a volume on a LUN.
pub fn reach(state: &ClusterState, name: &str, lun: &Lun, node: &Node) -> api::Reach {
    let reached = state.reached(name, node.id);
    let (path, through) = match reached.map(|reached| &reached.path) {
        None => (None, None),
        Some(LunPath::Direct) => (Some(api::PathState::Direct), None),
        Some(LunPath::Redirected { through, .. }) => {
            (Some(api::PathState::Redirected), Some(state.node_name(*through)))
        }
        Some(LunPath::Unavailable { .. }) => (Some(api::PathState::Unavailable), None),
    };
    api::Reach {
        node: node.name.clone(),
        ok: path.map(|path| path != api::PathState::Unavailable),
        why: reached.and_then(|reached| reached.path.why().map(str::to_owned)),
        path,
        through,
        since_ms: reached.map(|reached| reached.since_ms),
        by_hand: lun.access.redirected.contains(&node.id),
        ..api::Reach::default()
    }
}

/// Adds what nodes have done through others to how they reach a volume.
pub fn count(view: &mut api::VolumeView, state: &ClusterState, volume: Uuid, said: &Redirected) {
    for reach in &mut view.reach {
        let node = state.node_named(&reach.node).map(|node| node.id);
        if let Some(traffic) = node.and_then(|node| said.get(&node)?.get(&volume)) {
            reach.redirected_requests = Some(traffic.requests);
            reach.redirected_bytes = Some(traffic.bytes);
        }
    }
}

/// Paths that somebody should look at.
pub fn warnings(state: &ClusterState) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, lun) in &state.luns {
        for node in state.nodes.values() {
            match state.reached(name, node.id).map(|reached| &reached.path) {
                Some(LunPath::Redirected { why, through }) => {
                    let by_hand = match lun.access.redirected.contains(&node.id) {
                        true => " by hand",
                        false => "",
                    };
                    warnings.push(format!(
                        "node {} is redirected on volume {name}{by_hand}, through {}: {why}",
                        node.name,
                        state.node_name(*through)
                    ));
                }
                Some(LunPath::Unavailable { why }) => {
                    warnings.push(format!("node {} does not reach volume {name}: {why}", node.name));
                }
                Some(LunPath::Direct) | None => {}
            }
        }
        let said = state.nodes.keys().any(|node| state.reached(name, *node).is_some());
        if said && state.owner(name).is_none() {
            warnings.push(format!(
                "volume {name} has no owner, since no node reaches it by itself: VMs with disks on it stand still"
            ));
        }
    }
    warnings
}
