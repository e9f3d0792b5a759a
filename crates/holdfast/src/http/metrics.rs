//! Metrics in Prometheus' text format, computed anew for every scrape: nothing
//! has to be kept in step with the state.

use holdfast_core::{ClusterState, LunPath};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::views::{self, Vantage};

type Labels = Vec<(String, String)>;

/// The metrics of the cluster as this node sees it.
///
/// # Errors
/// Never in practice: writing to a string does not fail.
pub fn text(state: &ClusterState, from: Vantage<'_>) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("holdfast");
    let count = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
    let bytes = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    {
        let mut single = |name: &str, help: &str, value: i64| {
            let gauge = Gauge::<i64>::default();
            gauge.set(value);
            registry.register(name, help, gauge);
        };
        let cluster = views::cluster(state, from);
        single("revision", "Changes to the cluster's state that this node has applied", bytes(state.revision));
        single("coordinator_known", "Whether this node knows a coordinator", from.coordinator.is_some().into());
        single(
            "is_coordinator",
            "Whether this node coordinates",
            (from.me.is_some() && from.me == from.coordinator).into(),
        );
        single("raft_term", "The term of consensus", bytes(from.term));
        single(
            "lease_milliseconds",
            "How long a node may run VMs after it asked for its lease last",
            bytes(state.settings.profile.timing().length_ms),
        );
        single("voters", "Nodes that vote, and the witness when it does", count(cluster.quorum.voters));
        single("votes_needed", "Votes that an agreement needs", count(cluster.quorum.needed));
        single(
            "votes_spare",
            "Votes that may be lost at once, whichever they are",
            count(views::quorum(state, from).survives_at_once),
        );
        single(
            "voters_connected",
            "Voters that acknowledged something to the coordinator a moment ago",
            count(cluster.quorum.connected),
        );
        if let Some(witness) = &state.witness {
            single("witness_votes", "Whether the witness votes", from.voters.contains(&witness.id).into());
            single("witness_epoch", "Claims on the witness's disk so far", bytes(witness.epoch));
            single("witness_trouble", "Nodes that cannot use the witness's disk", count(witness.trouble.len()));
        }
        single("warnings", "Conditions that somebody should look at", count(cluster.warnings.len()));
        single("events", "Events of the cluster so far", bytes(state.last_event));
    }
    let mut family = |name: &str, help: &str, values: Vec<(Labels, i64)>| {
        let family = Family::<Labels, Gauge>::default();
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
        registry.register(name, help, family);
    };
    let label = |key: &str, value: String| (key.to_owned(), value);
    let seats = views::quorum(state, from).seats;
    let vote = |seat: &holdfast_api::SeatView| (vec![label("participant", seat.name.clone())], seat.votes.into());
    family("vote", "Whether a participant of consensus votes", seats.iter().map(vote).collect());
    let nodes = || state.nodes.values().map(|node| views::node(state, node, from));
    let by_node = |value: fn(&holdfast_api::NodeView) -> Option<i64>| {
        nodes().filter_map(|node| Some((vec![label("node", node.name.clone())], value(&node)?))).collect::<Vec<_>>()
    };
    family("nodes", "Nodes by state", nodes().map(|node| (vec![label("state", word(&node.state))], 1)).collect());
    family(
        "node_up",
        "Whether a node may run VMs",
        by_node(|node| Some((node.state == holdfast_api::NodeState::Up).into())),
    );
    family("node_term", "How often a node was admitted to run VMs", by_node(|node| i64::try_from(node.term).ok()));
    family(
        "node_silent_milliseconds",
        "For how long the coordinator has not answered a node's heartbeats",
        by_node(|node| node.silent_ms.and_then(|ms| i64::try_from(ms).ok())),
    );
    family(
        "node_memory_bytes",
        "RAM of a node that VMs may use",
        by_node(|node| i64::try_from(node.memory_bytes).ok()),
    );
    family(
        "node_memory_promised_bytes",
        "RAM of a node that is promised to VMs",
        by_node(|node| i64::try_from(node.memory_promised_bytes).ok()),
    );
    let vms = || state.vms.values().map(|vm| (vm, views::vm_state(vm)));
    family("vms", "VMs by state", vms().map(|(_, state)| (vec![label("state", word(&state))], 1)).collect());
    family(
        "vm_up",
        "Whether a VM's guest runs",
        vms()
            .map(|(vm, state)| {
                use holdfast_api::VmState;
                let up = matches!(state, VmState::Running | VmState::Migrating | VmState::Stopping);
                (vec![label("vm", vm.name.clone())], up.into())
            })
            .collect(),
    );
    family(
        "vm_epoch",
        "Starts of a VM's QEMU so far",
        vms().map(|(vm, _)| (vec![label("vm", vm.name.clone())], bytes(vm.last_epoch.0))).collect(),
    );
    let luns = || state.luns.keys().flat_map(|name| state.nodes.values().map(move |node| (name, node)));
    family(
        "volume_path",
        "How a node reaches a volume on a LUN: direct, redirected or unavailable",
        luns()
            .filter_map(|(name, node)| {
                let how = match state.reached(name, node.id)?.path {
                    LunPath::Direct => "direct",
                    LunPath::Redirected { .. } => "redirected",
                    LunPath::Unavailable { .. } => "unavailable",
                };
                let labels = [("volume", name), ("node", &node.name), ("path", &how.to_owned())];
                Some((labels.map(|(key, value)| label(key, value.clone())).to_vec(), 1))
            })
            .collect(),
    );
    family(
        "volume_owner",
        "Whether a node owns a volume on a LUN",
        luns()
            .map(|(name, node)| {
                let owns = state.owner(name).is_some_and(|owner| owner.node == node.id);
                (vec![label("volume", name.clone()), label("node", node.name.clone())], owns.into())
            })
            .collect(),
    );
    family(
        "jobs",
        "Jobs by what they do and how they are, of those that are remembered",
        state
            .jobs
            .values()
            .map(|job| {
                let state = word(&views::job_state(job));
                (vec![label("work", job.work.verb().into()), label("state", state)], 1)
            })
            .collect(),
    );
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// The word by which a state travels.
fn word(state: &impl serde::Serialize) -> String {
    match serde_json::to_value(state) {
        Ok(serde_json::Value::String(word)) => word,
        _ => "unknown".into(),
    }
}
