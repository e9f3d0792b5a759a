//! Views of the cluster's state: what the API shows, computed from what the
//! nodes agree on and, where it helps, from what the coordinator observes.

mod fencing;
mod paths;
mod quorum;
mod vm;
mod what_if;
mod witness;

use std::collections::BTreeMap;

use holdfast_api as api;
use holdfast_core::quorum::Survey;
use holdfast_core::watchdog::Standing;
use holdfast_core::*;

pub use fencing::{fence_test, fencing};
pub use paths::count;
pub use quorum::quorum;
#[cfg(test)]
pub use vm::definition;
pub use vm::{explanation, vm, vm_state};
pub use what_if::what_if;
pub use witness::witness;

/// What the coordinator observes, or nothing when it cannot be asked.
pub type Seen<'a> = Option<&'a BTreeMap<NodeId, NodeObserved>>;

/// Where a request was answered.
#[derive(Clone, Copy, Debug)]
pub struct Vantage<'a> {
    /// The node that answers.
    pub me: Option<NodeId>,
    /// Who coordinates, as far as it knows.
    pub coordinator: Option<NodeId>,
    /// The term of consensus.
    pub term: u64,
    /// Who votes.
    pub voters: &'a [NodeId],
    /// What keeps this node from taking part in consensus.
    pub trouble: Option<&'a str>,
    /// What the coordinator observes.
    pub observed: Seen<'a>,
    /// How the quorum stands, by the coordinator's account.
    pub survey: Option<&'a Survey>,
}

/// The cluster as a whole.
pub fn cluster(state: &ClusterState, from: Vantage<'_>) -> api::ClusterView {
    let quorum = quorum::figures(from);
    let running = |vm: &&Vm| vm_state(vm) == api::VmState::Running;
    api::ClusterView {
        name: state.cluster.name.clone(),
        id: state.cluster.id.to_string(),
        founded_ms: state.cluster.founded_ms,
        profile: profile(state.settings.profile),
        redirect_patience_s: state.settings.redirect_patience_s,
        lease_ms: state.settings.profile.timing().length_ms,
        answered_by: from.me.map(|me| state.node_name(me)).unwrap_or_default(),
        coordinator: from.coordinator.map(|node| state.node_name(node)),
        quorum,
        term: from.term,
        revision: state.revision,
        counts: api::Counts {
            nodes: state.nodes.len(),
            nodes_up: state.nodes.values().filter(|node| node.is_up()).count(),
            vms: state.vms.len(),
            vms_running: state.vms.values().filter(running).count(),
            volumes: state.volumes.len(),
            jobs: state.running_jobs().count(),
        },
        warnings: warnings(state, from),
        ca_certificate: state.cluster.ca_certificate.clone(),
    }
}

/// What somebody should look at.
fn warnings(state: &ClusterState, from: Vantage<'_>) -> Vec<String> {
    let mut warnings = Vec::new();
    if let (Some(trouble), Some(me)) = (from.trouble, from.me) {
        warnings.push(format!("node {}: {trouble}", state.node_name(me)));
    }
    warnings.extend(quorum::warning(state, from));
    warnings.extend(witness::warnings(state));
    for node in state.nodes.values() {
        let name = &node.name;
        match node.membership {
            Membership::Up => {}
            Membership::Lost { .. } => warnings.push(format!("node {name} is lost")),
            Membership::Joined => warnings.push(format!(
                "node {name} has joined, but its keeper was not heard yet: check `systemctl status holdfast` there"
            )),
        }
        if node.drained_ms.is_some() {
            warnings.push(format!(
                "node {name} is drained for maintenance: no VM starts there (`holdfast node resume {name}` ends that)"
            ));
        }
        if node.is_up() && node.facts.qemu.is_none() {
            warnings.push(format!("node {name} has no usable QEMU, so no VM can run there: install QEMU 7.2 or later"));
        }
        if node.is_up()
            && let Some(seen) = from.observed.and_then(|observed| observed.get(&node.id))
        {
            for network in &seen.unheard_on {
                warnings
                    .push(format!("node {name} is not heard on network {network}: check its cable or switch there"));
            }
        }
        if let Some(Standing::Left { device, .. }) = watchdog(from.observed, node) {
            warnings.push(format!(
                "node {name} has VMs that could not be shown dead: its watchdog {} resets it",
                device.path
            ));
        }
        let unreachable = report(from.observed, node).map(|report| &report.unreachable);
        for (volume, why) in unreachable.into_iter().flatten() {
            warnings.push(format!("node {name} does not reach volume {volume}: {why}"));
        }
    }
    warnings.extend(paths::warnings(state));
    for (name, lun) in &state.luns {
        let percent = lun.used_percent();
        match lun.told {
            Fullness::Low => {}
            Fullness::Fills => warnings.push(format!("volume {name} is {percent} % full")),
            Fullness::NearlyFull => warnings.push(format!(
                "volume {name} is {percent} % full: when it is full, VMs whose disks need more of it stand still"
            )),
            Fullness::Full => {
                warnings.push(format!("volume {name} is full: VMs whose disks need more of it stand still"));
            }
        }
    }
    for (name, lun) in &state.luns {
        if let Some(why) = &lun.journal.trouble {
            warnings
                .push(format!("volume {name} is not described on its LUN ({why}): see `holdfast volume check {name}`"));
        }
        if lun.importing {
            warnings.push(format!(
                "volume {name} is being imported; if that has broken off, remove it and import it again"
            ));
        }
    }
    for vm in state.vms.values() {
        let waits = vm.hold.is_some() || holdfast_core::explain::waits_for_room(state, vm).is_some();
        if vm.desired.wants_qemu() && waits {
            warnings.push(holdfast_core::explain::standing(state, vm));
        }
    }
    warnings
}

/// What a node last said, when it speaks for the term that it is in.
fn report<'a>(observed: Seen<'a>, node: &Node) -> Option<&'a NodeReport> {
    observed?.get(&node.id)?.report_in_term(node)
}

/// How a node's watchdog stands. A node without a lease speaks of it too.
fn watchdog<'a>(observed: Seen<'a>, node: &Node) -> Option<&'a Standing> {
    let report = observed?.get(&node.id)?.report.as_ref()?;
    report.watchdog.as_ref().filter(|_| report.incarnation == node.incarnation)
}

/// The word for a profile.
pub fn profile(profile: Profile) -> api::ProfileName {
    match profile {
        Profile::Default => api::ProfileName::Default,
        Profile::Fast => api::ProfileName::Fast,
        Profile::Wan => api::ProfileName::Wan,
    }
}

/// A node.
pub fn node(state: &ClusterState, node: &Node, from: Vantage<'_>) -> api::NodeView {
    let (memory_promised, cpus_promised) = holdfast_core::placement::promised(state, node.id, None);
    let network = |address: &NodeAddress| state.networks.get(&subnet(address)).map(|network| network.name.clone());
    let on_it = |vm: &&Vm| vm.tenures().any(|tenure| tenure.node == node.id && !state.is_void(tenure));
    let watchdog = watchdog(from.observed, node);
    api::NodeView {
        name: node.name.clone(),
        id: node.id.0,
        state: node_state(node),
        lost_since_ms: match node.membership {
            Membership::Lost { since_ms } => Some(since_ms),
            _ => None,
        },
        term: node.term.0,
        coordinator: from.coordinator == Some(node.id),
        voter: from.voters.contains(&node.id),
        site: node.site.clone(),
        silent_ms: from.observed.and_then(|observed| observed.get(&node.id)).map(|seen| seen.silent_ms),
        accelerator: node.facts.accelerator.to_string(),
        qemu: node.facts.qemu.clone(),
        cpus: node.facts.cpus,
        cpus_promised,
        memory_bytes: node.facts.memory_bytes,
        memory_promised_bytes: memory_promised,
        memory_free_bytes: node.facts.memory_bytes.saturating_sub(memory_promised),
        addresses: node
            .facts
            .addresses
            .iter()
            .map(|address| api::Address {
                interface: address.interface.clone(),
                ip: address.ip.to_string(),
                prefix: address.prefix,
                network: network(address),
            })
            .collect(),
        port: node.port,
        version: node.facts.version.clone(),
        vms: state.vms.values().filter(on_it).count(),
        drained_since_ms: node.drained_ms,
        stays: stays(state, node),
        leaves: node.leaves,
        fencing: fencing::in_words(state, node, watchdog),
        power_fencing: fencing(state, node.id),
        watchdog: watchdog.map(fencing::watchdog),
        joined_ms: node.joined_ms,
        newest_machine: node.facts.machines.last().cloned(),
    }
}

/// The VMs that cannot leave a drained node, and why.
fn stays(state: &ClusterState, node: &Node) -> Vec<api::StaysView> {
    let on_it = |vm: &&Vm| node.drained_ms.is_some() && vm.node() == Some(node.id);
    let why = |vm: &Vm| Some(api::StaysView { vm: vm.name.clone(), why: state.cannot_leave(vm)? });
    state.vms.values().filter(on_it).filter_map(why).collect()
}

/// The word for how a node is.
pub fn node_state(node: &Node) -> api::NodeState {
    match node.membership {
        Membership::Joined => api::NodeState::Joined,
        Membership::Up => api::NodeState::Up,
        Membership::Lost { .. } => api::NodeState::Lost,
    }
}

/// A network.
pub fn network(state: &ClusterState, cidr: &str, network: &Network) -> api::NetworkView {
    let in_it = |node: &&Node| node.facts.addresses.iter().any(|address| subnet(address) == cidr);
    api::NetworkView {
        name: network.name.clone(),
        subnet: cidr.into(),
        cluster: network.roles.cluster,
        migration: network.roles.migration,
        metric: network.metric,
        nodes: names(state.nodes.values().filter(in_it).map(|node| &node.name)),
    }
}

/// A virtual switch.
pub fn switch(state: &ClusterState, name: &str, kind: &SwitchKind) -> api::SwitchView {
    let plugged = |vm: &&Vm| vm.spec.nics.iter().any(|nic| nic.switch == name);
    let (kind, uplink) = match kind {
        SwitchKind::External { uplink } => (api::SwitchKind::External, Some(uplink.clone())),
        SwitchKind::Internal => (api::SwitchKind::Internal, None),
        SwitchKind::Private => (api::SwitchKind::Private, None),
    };
    api::SwitchView {
        name: name.into(),
        kind,
        uplink,
        vms: names(state.vms.values().filter(plugged).map(|vm| &vm.name)),
    }
}

/// Room on a volume, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// All of it.
    pub size: u64,
    /// What is free for ordinary users.
    pub free: u64,
}

/// A volume. `mounted_at` and `room` are what the answering node sees.
pub fn volume(
    state: &ClusterState,
    name: &str,
    volume: &Volume,
    mounted_at: String,
    room: Option<Room>,
    observed: Seen<'_>,
) -> api::VolumeView {
    let (kind, path, mounted_at) = match &volume.kind {
        VolumeKind::Directory { path } => (api::VolumeKind::Directory, path, Some(mounted_at)),
        VolumeKind::Lun { device, .. } => (api::VolumeKind::Lun, device, None),
    };
    let lun = state.luns.get(name);
    let room = lun.map_or(room, |lun| {
        let bytes = |slabs: u32| u64::from(slabs) * lun.slab_bytes;
        Some(Room { size: bytes(lun.slabs), free: bytes(lun.slabs - lun.used_slabs()) })
    });
    let disks = || state.vms.values().flat_map(|vm| &vm.spec.disks).filter(|disk| disk.volume == name);
    let promised: u64 = match lun {
        Some(lun) => lun.files.values().map(|file| file.bytes).sum(),
        None => disks().map(|disk| disk.size_bytes).sum(),
    };
    let reach = |node: &Node| {
        if let Some(lun) = lun {
            return paths::reach(state, name, lun, node);
        }
        // A node that is not up may have said something long ago.
        let said = report(observed, node).filter(|_| node.is_up());
        let why = said.and_then(|report| report.unreachable.get(name).cloned());
        api::Reach { node: node.name.clone(), ok: said.map(|_| why.is_none()), why, ..api::Reach::default() }
    };
    let on_it = |vm: &&Vm| vm.spec.uses_volume(name);
    api::VolumeView {
        name: name.into(),
        id: volume.id.to_string(),
        kind,
        path: path.clone(),
        mounted_at,
        size_bytes: room.map(|room| room.size),
        free_bytes: room.map(|room| room.free),
        used_bytes: room.map(|room| room.size - room.free),
        ahead_bytes: lun.map(|lun| u64::from(lun.taken_slabs()) * lun.slab_bytes),
        promised_bytes: Some(promised),
        promised_percent: room.map(|room| promised.saturating_mul(100) / room.size.max(1)),
        owner: paths::owner(state, name),
        reach: state.nodes.values().map(reach).collect(),
        vms: names(state.vms.values().filter(on_it).map(|vm| &vm.name)),
        added_ms: volume.added_ms,
    }
}

/// The files of a volume on a LUN.
pub fn files(state: &ClusterState, lun: &Lun) -> Vec<api::FileView> {
    let file = |(name, file): (&String, &LunFile)| api::FileView {
        name: name.clone(),
        size_bytes: file.bytes,
        allocated_bytes: u64::from(file.slabs()) * lun.slab_bytes,
        vm: file.vm.and_then(|vm| state.vms.get(&vm)).map(|vm| vm.name.clone()),
    };
    lun.named_files().map(file).collect()
}

/// A job.
pub fn job(state: &ClusterState, job: &Job) -> api::JobView {
    let (from, to) = match job.work {
        Work::Migrate { from, to } => (Some(state.node_name(from)), Some(state.node_name(to))),
        _ => (None, None),
    };
    api::JobView {
        id: job.id.0,
        work: job.work.verb().into(),
        vm: job.vm_name.clone(),
        from,
        to,
        by: job.by.clone(),
        state: job_state(job),
        percent: job.progress.percent,
        // What it did last says nothing once all of it is done.
        note: match job_state(job) {
            api::JobState::Done => String::new(),
            _ => job.progress.note.clone(),
        },
        began_ms: job.began_ms,
        outcome: job.end.as_ref().map(|end| api::JobOutcome {
            at_ms: end.at_ms,
            why: match &end.outcome {
                Outcome::Failed { why } => Some(why.clone()),
                Outcome::Done | Outcome::Cancelled => None,
            },
        }),
        moved: job.moved.map(|moved| api::Moved { total_ms: moved.total_ms, downtime_ms: moved.downtime_ms }),
    }
}

/// The word for how a job is.
pub fn job_state(job: &Job) -> api::JobState {
    match job.end.as_ref().map(|end| &end.outcome) {
        None => api::JobState::Running,
        Some(Outcome::Done) => api::JobState::Done,
        Some(Outcome::Failed { .. }) => api::JobState::Failed,
        Some(Outcome::Cancelled) => api::JobState::Cancelled,
    }
}

/// An event.
pub fn event(event: &Event) -> api::Event {
    api::Event {
        index: event.index,
        at_ms: event.at_ms,
        severity: match event.severity {
            Severity::Info => api::Severity::Info,
            Severity::Warning => api::Severity::Warning,
            Severity::Error => api::Severity::Error,
        },
        subject: event.subject.clone(),
        text: event.text.clone(),
    }
}

/// The API tokens, without their secrets.
pub fn tokens(state: &ClusterState) -> Vec<api::TokenView> {
    let view =
        |(name, token): (&String, &ApiToken)| api::TokenView { name: name.clone(), created_ms: token.created_ms };
    state.api_tokens.iter().map(view).collect()
}

fn names<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut names: Vec<String> = names.cloned().collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests;
