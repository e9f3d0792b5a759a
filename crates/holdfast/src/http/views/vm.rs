//! Views of a VM.

use holdfast_api as api;
use holdfast_core::*;

/// A VM as it is now.
pub fn vm(state: &ClusterState, vm: &Vm) -> api::VmView {
    let target = match &vm.placement {
        Placement::Moving { to, .. } => Some(state.node_name(to.node)),
        _ => None,
    };
    let full = holdfast_core::explain::waits_for_room(state, vm);
    api::VmView {
        name: vm.name.clone(),
        id: vm.id.to_string(),
        state: match full {
            Some(_) => api::VmState::Waiting,
            None => vm_state(vm),
        },
        standing: holdfast_core::explain::standing(state, vm),
        node: vm.node().map(|node| state.node_name(node)),
        target,
        epoch: vm.last_epoch.0,
        desired: match vm.desired {
            Desired::Running => api::DesiredState::Running,
            Desired::Paused => api::DesiredState::Paused,
            Desired::Stopped | Desired::ForcedOff => api::DesiredState::Off,
        },
        cpus: vm.spec.cpus,
        memory_bytes: vm.spec.memory_bytes,
        disks: vm
            .spec
            .disks
            .iter()
            .map(|disk| api::DiskView {
                volume: disk.volume.clone(),
                file: disk.file.clone(),
                size_bytes: disk.size_bytes,
                format: format(disk.format),
                allocate: allocate(disk.allocation),
            })
            .collect(),
        nics: vm.spec.nics.iter().map(nic).collect(),
        priority: priority(vm.spec.priority),
        hold: hold(vm)
            .or_else(|| full.map(|volume| format!("waits for room on volume {volume}, which is full")))
            .or_else(|| {
                let (volume, why) = holdfast_core::explain::waits_for(state, vm)?;
                Some(format!("waits until a path to volume {volume} is back: {why}"))
            }),
        crashes: vm.crashes.len(),
        created_ms: vm.created_ms,
        definition: definition(vm),
    }
}

/// What a VM is doing, in a word.
pub fn vm_state(vm: &Vm) -> api::VmState {
    use api::VmState;
    match (&vm.disks, &vm.placement) {
        (DiskStage::Making { .. }, _) => VmState::Creating,
        (DiskStage::Deleting { .. }, _) => VmState::Deleting,
        (DiskStage::Ready, Placement::Moving { .. }) => VmState::Migrating,
        (DiskStage::Ready, Placement::Nowhere) => match &vm.hold {
            _ if !vm.desired.wants_qemu() => VmState::Off,
            Some(Hold::NoRoom { .. }) => VmState::Waiting,
            Some(Hold::Failed { .. }) => VmState::Failed,
            // It stays off until somebody starts it: that is what off means.
            Some(Hold::NotProtected) => VmState::Off,
            Some(Hold::DiskLocked { .. }) | None => VmState::Starting,
        },
        (DiskStage::Ready, Placement::On(_)) => match vm.seen {
            _ if !vm.desired.wants_qemu() || vm.restart == Some(vm.last_epoch) => VmState::Stopping,
            _ if matches!(vm.hold, Some(Hold::DiskLocked { .. })) => VmState::Waiting,
            Seen::Nothing | Seen::Starting => VmState::Starting,
            Seen::Running => VmState::Running,
            Seen::Paused => VmState::Paused,
            Seen::Stopping => VmState::Stopping,
        },
    }
}

/// Why a VM does not run although it should.
fn hold(vm: &Vm) -> Option<String> {
    vm.hold.as_ref().map(|hold| match hold {
        Hold::NoRoom { why } => format!("no node has room: {why}"),
        Hold::Failed { why } => why.clone(),
        Hold::DiskLocked { why, .. } => format!("waits for an image lock: {why}"),
        Hold::NotProtected => "its priority is none, so it was not restarted elsewhere: start it by hand".into(),
    })
}

/// What creates a VM like this one anew.
pub fn definition(vm: &Vm) -> api::VmDefinition {
    let spec = &vm.spec;
    let on = |volume: &str, file: &str| format!("{volume}:{file}");
    api::VmDefinition {
        name: vm.name.clone(),
        cpus: spec.cpus,
        memory: api::Size(spec.memory_bytes),
        machine: Some(spec.machine.clone()),
        cpu_model: spec.cpu_model.clone(),
        boot: spec.direct_boot.as_ref().map(|boot| api::KernelBoot {
            kernel: on(&boot.volume, &boot.kernel),
            initrd: boot.initrd.as_ref().map(|file| on(&boot.volume, file)),
            append: boot.append.clone(),
        }),
        disks: spec
            .disks
            .iter()
            .map(|disk| api::DiskDefinition {
                volume: disk.volume.clone(),
                size: Some(api::Size(disk.size_bytes)),
                format: format(disk.format),
                allocate: allocate(disk.allocation),
                image: None,
                file: None,
            })
            .collect(),
        nics: spec.nics.iter().map(nic).collect(),
        priority: priority(spec.priority),
        stop_timeout_s: spec.stop_timeout_s,
    }
}

/// Why a VM is where it is.
pub fn explanation(state: &ClusterState, vm: &Vm) -> api::Explanation {
    let mut lines = holdfast_core::explain::explain(state, vm).into_iter();
    api::Explanation {
        vm: vm.name.clone(),
        standing: lines.next().map(|line| line.text).unwrap_or_default(),
        causes: lines.map(|line| api::Cause { at_ms: line.at_ms.unwrap_or_default(), text: line.text }).collect(),
    }
}

fn priority(priority: Priority) -> api::Priority {
    match priority {
        Priority::None => api::Priority::None,
        Priority::Low => api::Priority::Low,
        Priority::Medium => api::Priority::Medium,
        Priority::High => api::Priority::High,
    }
}

fn format(format: DiskFormat) -> api::DiskFormat {
    match format {
        DiskFormat::Raw => api::DiskFormat::Raw,
        DiskFormat::Qcow2 => api::DiskFormat::Qcow2,
        DiskFormat::Vhdx => api::DiskFormat::Vhdx,
        DiskFormat::Vhd => api::DiskFormat::Vhd,
    }
}

fn allocate(allocation: Allocation) -> api::Allocation {
    match allocation {
        Allocation::Thin => api::Allocation::Thin,
        Allocation::Full => api::Allocation::Full,
    }
}

fn nic(nic: &NicSpec) -> api::NicDefinition {
    api::NicDefinition { switch: nic.switch.clone(), mac: Some(nic.mac.to_string()), vlan: nic.vlan }
}
