//! How a node is fenced, in words and for programs.

use holdfast_api as api;
use holdfast_core::watchdog::{DEATH_MS, Device, Standing};
use holdfast_core::*;

/// What makes sure that a node's VMs are dead before they start elsewhere.
pub(super) fn in_words(state: &ClusterState, node: &Node, standing: Option<&Standing>) -> String {
    let timing = state.settings.profile.timing();
    let mut words = vec![format!(
        "by its lease: without an answer for {} ms it kills its VMs itself, and {} ms after the last answer they start elsewhere",
        timing.length_ms,
        timing.lost_after_ms()
    )];
    words.push(match standing {
        Some(standing) => watchdog_in_words(standing),
        None => match &node.facts.watchdog {
            Some(device) => format!("by its hardware watchdog {device}; how that stands is not known now"),
            None => "no hardware watchdog is used".into(),
        },
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

fn watchdog_in_words(standing: &Standing) -> String {
    let named = |device: &Device| match device.identity.as_str() {
        "" => device.path.clone(),
        identity => format!("{} ({identity})", device.path),
    };
    let resets = |timeout_s: u32| {
        format!(
            "VMs that are not shown dead {} s after their lease has ended, or a keeper that stands still, and it resets the host {timeout_s} s after it was fed last",
            DEATH_MS / 1_000
        )
    };
    match standing {
        Standing::Absent { why } => format!("no hardware watchdog is used: {why}"),
        Standing::Ready { device } => {
            format!("by its hardware watchdog {}, which is armed while VMs run", named(device))
        }
        Standing::Armed { device, timeout_s } => {
            format!("by its hardware watchdog {}, which is armed: {}", named(device), resets(*timeout_s))
        }
        Standing::Left { device, timeout_s } => format!(
            "VMs could not be shown dead: its hardware watchdog {} is not fed any more and resets the host within {timeout_s} s",
            named(device)
        ),
    }
}

/// A node's hardware watchdog.
pub(super) fn watchdog(standing: &Standing) -> api::WatchdogView {
    let device = standing.device().cloned();
    let (state, timeout_s, why) = match standing {
        Standing::Absent { why } => (api::WatchdogState::Absent, None, Some(why.clone())),
        Standing::Ready { .. } => (api::WatchdogState::Ready, None, None),
        Standing::Armed { timeout_s, .. } => (api::WatchdogState::Armed, Some(*timeout_s), None),
        Standing::Left { timeout_s, .. } => (api::WatchdogState::Left, Some(*timeout_s), None),
    };
    let (device, identity) = device.map(|device| (device.path, device.identity)).unzip();
    api::WatchdogView { state, device, identity, timeout_s, why }
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
