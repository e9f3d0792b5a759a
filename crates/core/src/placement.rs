//! Where a VM may run, and where it runs best. Policy alone; nothing here acts.

use std::fmt;

use crate::model::*;
use crate::state::ClusterState;

/// What QEMU needs beside the guest's RAM, in bytes; counted for every VM.
pub const QEMU_OVERHEAD_BYTES: u64 = 64 << 20;

/// Why a node cannot take a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    /// It holds no lease.
    NotUp,
    /// It is being removed.
    Leaves,
    /// It is drained for maintenance.
    Drained,
    /// It has no usable QEMU.
    NoQemu,
    /// Its QEMU does not know the VM's machine type.
    NoMachine(String),
    /// It has fewer processors than the VM.
    Cpus {
        /// What the VM has.
        wanted: u32,
        /// What the node has.
        has: u32,
    },
    /// Its processors are promised already.
    CpusPromised {
        /// How many more may be promised.
        left: u64,
        /// What the VM has.
        wanted: u32,
    },
    /// Memory is never promised twice.
    Memory {
        /// What is left, in bytes.
        left: u64,
        /// What the VM needs, in bytes.
        wanted: u64,
    },
    /// It does not reach a volume that the VM has disks on, neither by itself nor
    /// through another node.
    NoPath {
        /// The volume.
        volume: String,
        /// Why.
        why: String,
    },
    /// The VM crashed there too often.
    Crashed,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Denial::NotUp => write!(f, "is not up"),
            Denial::Drained => write!(f, "is drained for maintenance"),
            Denial::Leaves => write!(f, "is being removed"),
            Denial::NoQemu => write!(f, "has no usable QEMU"),
            Denial::NoMachine(machine) => write!(f, "has a QEMU without machine type {machine}"),
            Denial::Cpus { wanted, has } => write!(f, "has {has} processors, {wanted} are needed"),
            Denial::CpusPromised { left, wanted } => {
                write!(f, "may promise {left} more virtual processors, {wanted} are needed")
            }
            Denial::Memory { left, wanted } => {
                write!(f, "has {} MiB free, {} MiB are needed", left >> 20, wanted.div_ceil(1 << 20))
            }
            Denial::NoPath { volume, why } => write!(f, "does not reach volume {volume}: {why}"),
            Denial::Crashed => write!(f, "crashed it too often"),
        }
    }
}

/// What is promised on a node to VMs other than `except`: memory in bytes and
/// virtual processors. Both ends of a migration count.
pub fn promised(state: &ClusterState, node: NodeId, except: Option<VmId>) -> (u64, u64) {
    state
        .vms
        .values()
        .filter(|vm| Some(vm.id) != except && vm.tenures().any(|t| t.node == node && !state.is_void(t)))
        .fold((0, 0), |(memory, cpus), vm| (memory + needed_memory(&vm.spec), cpus + u64::from(vm.spec.cpus)))
}

/// What a VM takes from a node's memory, in bytes.
pub fn needed_memory(spec: &VmSpec) -> u64 {
    spec.memory_bytes.saturating_add(QEMU_OVERHEAD_BYTES)
}

/// Whether a node may take a VM; the memory that would stay free, in bytes.
pub fn fits(state: &ClusterState, node: &Node, vm: Option<VmId>, spec: &VmSpec) -> Result<u64, Denial> {
    if !node.is_up() {
        return Err(Denial::NotUp);
    }
    if node.leaves {
        return Err(Denial::Leaves);
    }
    // What is still there may be started there again.
    let there = |id| state.vms.get(&id).is_some_and(|vm| vm.tenures().any(|t| t.node == node.id && !state.is_void(t)));
    if node.drained_ms.is_some() && !vm.is_some_and(there) {
        return Err(Denial::Drained);
    }
    if node.facts.qemu.is_none() {
        return Err(Denial::NoQemu);
    }
    if !node.offers(&spec.machine) {
        return Err(Denial::NoMachine(spec.machine.clone()));
    }
    if let Some(denial) = spec.disks.iter().find_map(|disk| no_path(state, node, &disk.volume)) {
        return Err(denial);
    }
    if spec.cpus > node.facts.cpus {
        return Err(Denial::Cpus { wanted: spec.cpus, has: node.facts.cpus });
    }
    let (memory, cpus) = promised(state, node.id, vm);
    let cpus_left = (u64::from(node.facts.cpus) * u64::from(state.settings.cpu_overcommit)).saturating_sub(cpus);
    if u64::from(spec.cpus) > cpus_left {
        return Err(Denial::CpusPromised { left: cpus_left, wanted: spec.cpus });
    }
    let left = node.facts.memory_bytes.saturating_sub(memory);
    let wanted = needed_memory(spec);
    left.checked_sub(wanted).ok_or(Denial::Memory { left, wanted })
}

/// Whether a node reaches every disk of a VM by itself, or has not said otherwise.
pub fn reaches_directly(state: &ClusterState, node: NodeId, spec: &VmSpec) -> bool {
    spec.disks.iter().all(|disk| {
        let by_hand = state.luns.get(&disk.volume).is_some_and(|lun| lun.access.redirected.contains(&node));
        !by_hand && state.reached(&disk.volume, node).is_none_or(|reached| reached.path == LunPath::Direct)
    })
}

/// A node without a path of its own goes through the volume's owner, if there is one.
fn no_path(state: &ClusterState, node: &Node, volume: &str) -> Option<Denial> {
    let LunPath::Unavailable { why } = &state.reached(volume, node.id)?.path else { return None };
    let owned = state.owner(volume).is_some_and(|owner| owner.node != node.id && state.is_fit(volume, owner.node));
    (!owned).then(|| Denial::NoPath { volume: volume.into(), why: why.clone() })
}

/// The best node for a VM: answered lately if any was, with a path of its own to the
/// VM's disks if any has one, with KVM if any has it, then the one whose scarcer
/// resource, memory or processors, stays freest.
///
/// `quiet` names nodes that were not answered lately: they may be dying, so they
/// are taken only when nobody else has room.
pub fn choose(
    state: &ClusterState,
    vm: VmId,
    spec: &VmSpec,
    avoid: &[NodeId],
    quiet: &[NodeId],
) -> Result<(NodeId, u64), Vec<(NodeId, Denial)>> {
    let mut denials = Vec::new();
    let mut best = None::<(_, NodeId, u64)>;
    for node in state.nodes.values() {
        let free = match fits(state, node, Some(vm), spec) {
            Ok(_) if avoid.contains(&node.id) => Err(Denial::Crashed),
            other => other,
        };
        match free {
            Err(denial) => denials.push((node.id, denial)),
            Ok(free) => {
                let direct = reaches_directly(state, node.id, spec);
                let room = freeness(state, node, vm, spec, free);
                let rank = (!quiet.contains(&node.id), node.drained_ms.is_none(), direct, node.facts.accelerator, room);
                if best.as_ref().is_none_or(|(known, ..)| rank > *known) {
                    best = Some((rank, node.id, free));
                }
            }
        }
    }
    best.map(|(_, node, free)| (node, free)).ok_or(denials)
}

/// How free the scarcer resource of a node stays, in parts per million.
fn freeness(state: &ClusterState, node: &Node, vm: VmId, spec: &VmSpec, free_bytes: u64) -> u64 {
    let (_, cpus) = promised(state, node.id, Some(vm));
    let cpus_total = u64::from(node.facts.cpus) * u64::from(state.settings.cpu_overcommit);
    let cpus_free = cpus_total.saturating_sub(cpus + u64::from(spec.cpus));
    let share = |free: u64, total: u64| (u128::from(free) * 1_000_000 / u128::from(total.max(1))) as u64;
    share(free_bytes, node.facts.memory_bytes).min(share(cpus_free, cpus_total))
}

/// Denials as a sentence for a person.
pub fn tell(state: &ClusterState, denials: &[(NodeId, Denial)]) -> String {
    if denials.is_empty() {
        return "there is no other node".into();
    }
    let parts: Vec<_> = denials.iter().map(|(node, denial)| format!("{} {denial}", state.node_name(*node))).collect();
    parts.join("; ")
}
