//! Why a VM is where it is, as a chain of causes for a person.

use crate::model::*;
use crate::state::ClusterState;

/// One line of an explanation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When, milliseconds since the Unix epoch; `None` for how things stand now.
    pub at_ms: Option<u64>,
    /// What is or was so, and why.
    pub text: String,
}

/// How a VM stands and the causes that led there, oldest first.
pub fn explain(state: &ClusterState, vm: &Vm) -> Vec<Line> {
    let mut lines = vec![Line { at_ms: None, text: standing(state, vm) }];
    lines.extend(vm.causes.iter().map(|because| Line {
        at_ms: Some(because.at_ms),
        text: format!("{}, because {}", because.what, because.cause),
    }));
    lines
}

/// The volume that a VM's node does not reach, neither by itself nor through another,
/// and why: the guest's I/O waits.
pub fn waits_for<'a>(state: &'a ClusterState, vm: &'a Vm) -> Option<(&'a str, &'a str)> {
    let node = vm.node()?;
    vm.spec.disks.iter().find_map(|disk| match &state.reached(&disk.volume, node)?.path {
        LunPath::Unavailable { why } => Some((disk.volume.as_str(), why.as_str())),
        LunPath::Direct | LunPath::Redirected { .. } => None,
    })
}

/// The full volume that a VM waits for: its guest stands still in a write that finds no
/// room, and goes on when there is some.
pub fn waits_for_room<'a>(state: &'a ClusterState, vm: &'a Vm) -> Option<&'a str> {
    let stands = vm.desired == Desired::Running && vm.seen == Seen::Paused && vm.placement != Placement::Nowhere;
    stands.then(|| state.full_volume(&vm.spec)).flatten()
}

/// How a VM stands, in one sentence.
pub fn standing(state: &ClusterState, vm: &Vm) -> String {
    let name = &vm.name;
    match (&vm.disks, &vm.placement) {
        (DiskStage::Making { node, .. }, _) => {
            format!("{name}: its disks are being made on {}", state.node_name(*node))
        }
        (DiskStage::Deleting { node, .. }, _) => {
            format!("{name} is being deleted on {}", state.node_name(*node))
        }
        (_, Placement::Nowhere) => match (&vm.hold, vm.desired.wants_qemu()) {
            (Some(Hold::NoRoom { why }), true) => {
                format!("{name} should run but no node has room ({why}); it starts when one has")
            }
            (Some(Hold::Failed { why }), true) => {
                format!("{name} should run but failed ({why}); start it again by hand")
            }
            (Some(Hold::NotProtected), true) => {
                format!(
                    "{name} should run, but its priority is none, so it was not restarted elsewhere; start it by hand"
                )
            }
            (None | Some(Hold::DiskLocked { .. }), true) => format!("{name} should run and is about to be placed"),
            (_, false) => format!("{name} is off, as wanted"),
        },
        (_, Placement::On(tenure)) => {
            let node = state.node_name(tenure.node);
            if let (Some(Hold::DiskLocked { why, tries, .. }), true) = (&vm.hold, vm.desired.wants_qemu()) {
                let holder = vm.causes.iter().rev().find_map(|because| match because.cause {
                    Cause::LeaseEnded { node, .. } => Some(state.node_name(node)),
                    _ => None,
                });
                let holder = holder.map_or_else(
                    || "another QEMU".into(),
                    |lost| format!("another QEMU, most likely its own on {lost}, whose lease ended,"),
                );
                let times = if *tries == 1 { "once".into() } else { format!("{tries} times") };
                return format!(
                    "{name} should run on {node} and waits for the image lock that {holder} still has ({why}); tried {times}, it starts when the lock is free"
                );
            }
            if let Some(volume) = waits_for_room(state, vm) {
                return format!(
                    "{name} stands still on {node} and waits for room on volume {volume}, which is full; it goes on when there is some: delete disks, or have guests discard what they do not need"
                );
            }
            let how = match vm.seen {
                Seen::Nothing => "is to start",
                Seen::Starting => "starts",
                Seen::Running => "runs",
                Seen::Paused => "is paused",
                Seen::Stopping => "shuts down",
            };
            let waits = waits_for(state, vm).map_or_else(String::new, |(volume, why)| {
                format!("; what it asks of volume {volume} waits until a path to it is back: {why}")
            });
            format!("{name} {how} on {node} (epoch {}, term {} of the node){waits}", tenure.epoch, tenure.term)
        }
        (_, Placement::Moving { from, to, job, .. }) => format!(
            "{name} is being migrated from {} (epoch {}) to {} (epoch {}) by job {job}",
            state.node_name(from.node),
            from.epoch,
            state.node_name(to.node),
            to.epoch
        ),
    }
}
