//! When a host's power is switched off, and what that shows.
//!
//! ```text
//!  answered ──── half a lease: suspected ──── lease + margin: lost by its lease
//!                     │                            ▲ whatever becomes of the fence
//!                     └─ off, then status = off ─▶ lost at once
//! ```
//! A fence only ever makes a failover earlier. One that fails, hangs or comes late
//! changes nothing: leases decide as if it had not been ordered.

use crate::lease::LeaseTiming;
use crate::model::*;
use crate::observed::{NodeObserved, Observed};
use crate::state::ClusterState;

/// A host to be switched off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// Its node.
    pub node: NodeId,
    /// The node's term: in any other the order is void.
    pub term: NodeTerm,
    /// Why, for a person.
    pub why: String,
}

/// For how long a node has to be silent before its host is switched off, in
/// milliseconds: half a lease. Sooner, and a hiccup that the lease forgives would
/// cost a host its power; later, and little would be gained over waiting.
pub fn suspected_after_ms(timing: LeaseTiming) -> u64 {
    timing.length_ms / 2
}

/// The hosts that `coordinator` should have switched off now. Right before it is
/// done this is asked once more.
///
/// When more than half of the nodes that are up fall silent at once, the fault is
/// more likely on the coordinator's side: then nobody is switched off, and leases
/// decide.
pub fn due(state: &ClusterState, observed: &Observed, coordinator: NodeId) -> Vec<Due> {
    let suspected_ms = suspected_after_ms(state.settings.profile.timing());
    let up: Vec<_> = state.nodes.values().filter(|node| node.is_up()).collect();
    let silent = |node: &Node| {
        node.id != coordinator
            && !node.leaves
            && observed
                .nodes
                .get(&node.id)
                .is_some_and(|seen| seen.silent_ms >= suspected_ms && seen.heard != Some(node.incarnation))
    };
    let quiet = up.iter().filter(|node| silent(node)).count();
    let mut due = Vec::new();
    for node in &up {
        let (Some(fencing), Some(seen)) = (state.fencing.get(&node.id), observed.nodes.get(&node.id)) else {
            continue;
        };
        let told = seen.fence.as_ref().is_some_and(|word| word.term == node.term);
        // One that is being removed is silent because it is not answered.
        if node.leaves || node.id == coordinator || seen.lease_ended || told {
            continue;
        }
        let why = if fencing.asked == Some(node.term) {
            "somebody asked for it".into()
        } else if silent(node) && 2 * quiet <= up.len() {
            format!("it was not answered for {} ms", seen.silent_ms)
        } else {
            continue;
        };
        due.push(Due { node: node.id, term: node.term, why });
    }
    due
}

/// What shows that the host of a node that is up has lost its power in the node's
/// current term. A keeper that is heard all the same gives the fence agent the lie.
pub fn believed<'a>(node: &Node, seen: &'a NodeObserved) -> Option<&'a FenceWord> {
    let word = seen.fence.as_ref()?;
    let alive = seen.heard == Some(node.incarnation);
    (word.term == node.term && word.is_confirmed() && !alive).then_some(word)
}
