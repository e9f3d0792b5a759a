//! How a node is fenced, in words and for programs.

use holdfast_api as api;
use holdfast_core::*;

/// What makes sure that a node's VMs are dead before they start elsewhere.
pub(super) fn in_words(state: &ClusterState, node: &Node) -> String {
    let timing = state.settings.profile.timing();
    let mut words = vec![format!(
        "by its lease: without an answer for {} ms it kills its VMs itself, and {} ms after the last answer they start elsewhere",
        timing.length_ms,
        timing.lost_after_ms()
    )];
    words.push(match &node.facts.watchdog {
        Some(device) => format!("the hardware watchdog {device}"),
        None => "no hardware watchdog was found".into(),
    });
    words.push(match state.fencing.get(&node.id) {
        Some(PowerFencing { agent, test, .. }) => {
            let tested = match test {
                Some(FenceTest { passed: true, .. }) => "its last test passed",
                Some(_) => "its last test failed",
                None => "never tested",
            };
            format!(
                "by {agent} ({tested}): silent for {} ms, its power is switched off, and once that is confirmed its VMs start elsewhere",
                holdfast_core::fencing::suspected_after_ms(timing)
            )
        }
        None => "its power cannot be switched off (`holdfast node fencing set`)".into(),
    });
    words.join("; ")
}

/// How a node's host can be switched off.
pub fn fencing(state: &ClusterState, node: NodeId) -> Option<api::FencingView> {
    let fencing = state.fencing.get(&node)?;
    Some(api::FencingView {
        node: state.node_name(node),
        agent: fencing.agent.clone(),
        options: fencing.options.clone(),
        secrets: fencing.secrets.keys().cloned().collect(),
        test: fencing.test.as_ref().map(|test| fence_test(state, test)),
        asked: state.nodes.get(&node).is_some_and(|node| fencing.asked == Some(node.term)),
    })
}

/// What a test showed.
pub fn fence_test(state: &ClusterState, test: &FenceTest) -> api::FenceTestView {
    api::FenceTestView {
        at_ms: test.at_ms,
        from: state.node_name(test.from),
        passed: test.passed,
        text: test.text.clone(),
    }
}
