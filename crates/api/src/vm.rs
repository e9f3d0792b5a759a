//! Virtual machines.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Size;

/// A VM as its owner describes it: what `vm create -f` takes and what
/// `vm show -o yaml` prints. A VM that is created from what was printed is
/// printed the same way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDefinition {
    /// Its name: 1 to 63 letters, digits, `-`, `_` or `.`.
    pub name: String,
    /// Virtual processors.
    #[serde(default = "one")]
    #[schema(default = 1)]
    pub cpus: u32,
    /// RAM, in whole MiB.
    pub memory: Size,
    /// QEMU's machine type, always versioned; when absent, the newest one that
    /// all nodes that are up offer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "pc-q35-7.2")]
    pub machine: Option<String>,
    /// QEMU's CPU model; what the accelerator offers when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,
    /// Boot this kernel directly instead of the first disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<KernelBoot>,
    /// Disks, the boot disk first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskDefinition>,
    /// Network adapters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicDefinition>,
    /// Order and preference after a failure.
    #[serde(default)]
    pub priority: Priority,
    /// How long the guest may take to shut down when asked, in seconds.
    #[serde(default = "stop_timeout")]
    #[schema(default = 60)]
    pub stop_timeout_s: u32,
}

fn one() -> u32 {
    1
}

fn stop_timeout() -> u32 {
    60
}

/// A kernel that QEMU loads itself.
///
/// A file is an absolute path on the asked node, or `VOLUME:PATH` on a volume.
/// A file on a volume is used where it is. A file of the node is copied to
/// `boot/` on the volume of the first disk, under a name made from its contents:
/// VMs share it there, and it stays when a VM is deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelBoot {
    /// The kernel image.
    #[schema(example = "main:boot/vmlinuz")]
    pub kernel: String,
    /// The initial ramdisk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// The kernel's command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub append: String,
}

/// One virtual disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskDefinition {
    /// The volume that holds it.
    pub volume: String,
    /// What the guest sees, a multiple of 512 bytes. The image's size when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// How its file is laid out.
    #[serde(default)]
    pub format: DiskFormat,
    /// When it takes its room.
    #[serde(default, skip_serializing_if = "Allocation::is_thin")]
    pub allocate: Allocation,
    /// An image to fill it from when it is created: an absolute path on the asked
    /// node, or `VOLUME:PATH`. Never shown again: what is on the disk then is the
    /// guest's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Instead of a new disk, a file that is there on the volume and belongs to no VM, as
    /// after an import. It becomes the VM's, and is deleted with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

/// How a disk's file is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Block for block, sparse.
    Raw,
    /// QEMU's copy-on-write format.
    #[default]
    Qcow2,
    /// Hyper-V's. A running VM with such a disk cannot move; its guest cannot discard.
    Vhdx,
    /// Virtual PC's and the older one of Hyper-V, dynamic when it is thin, fixed when it is
    /// fully allocated; 2040 GiB at most. As with `vhdx`, the VM cannot move while it runs.
    Vhd,
}

/// When a disk takes room on its volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Allocation {
    /// When its guest writes; what its guest discards is given back.
    #[default]
    Thin,
    /// All of it when it is made, for good: its guest cannot discard.
    Full,
}

impl Allocation {
    fn is_thin(&self) -> bool {
        *self == Allocation::Thin
    }
}

/// One network adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NicDefinition {
    /// The virtual switch that it is plugged into.
    pub switch: String,
    /// Its hardware address; drawn when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "52:54:00:12:34:56")]
    pub mac: Option<String>,
    /// Access VLAN, 1 to 4094.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
}

/// Order and preference after a failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Never restarted elsewhere after its node is lost.
    None,
    /// Placed last.
    Low,
    /// The default.
    #[default]
    Medium,
    /// Placed first.
    High,
}

/// Creates a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVm {
    /// The VM.
    pub vm: VmDefinition,
    /// Start it when its disks are there.
    #[serde(default)]
    pub start: bool,
}

/// A VM as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Its identity, also the UUID that its guest sees.
    pub id: String,
    /// What it is doing.
    pub state: VmState,
    /// How it stands, in a sentence.
    pub standing: String,
    /// The node that may run it; during a migration the source.
    pub node: Option<String>,
    /// During a migration the target.
    pub target: Option<String>,
    /// Counts who may run it: each start of a QEMU has its own.
    pub epoch: u64,
    /// What its user wants.
    pub desired: DesiredState,
    /// Virtual processors.
    pub cpus: u32,
    /// RAM.
    pub memory_bytes: u64,
    /// Its disks.
    pub disks: Vec<DiskView>,
    /// Its network adapters.
    pub nics: Vec<NicDefinition>,
    /// Order and preference after a failure.
    pub priority: Priority,
    /// Why it does not run although it should.
    pub hold: Option<String>,
    /// Unexpected ends of its QEMU that still count against its budget.
    pub crashes: usize,
    /// When it was created.
    pub created_ms: u64,
    /// Its definition: what creates it anew.
    pub definition: VmDefinition,
}

/// What a VM is doing, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Its disks are being made.
    Creating,
    /// It is off.
    Off,
    /// It should run and is on its way.
    Starting,
    /// Its guest runs.
    Running,
    /// Its guest stands still at its user's wish.
    Paused,
    /// Its guest was asked to shut down.
    Stopping,
    /// It moves while it runs.
    Migrating,
    /// It should run, but no node has room, or another QEMU has its disk open, or a volume
    /// is full.
    Waiting,
    /// It should run, but failed.
    Failed,
    /// It is being deleted.
    Deleting,
}

/// What a VM's user wants of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DesiredState {
    /// Its guest runs, somewhere.
    Running,
    /// Its RAM is kept, its processors stand still.
    Paused,
    /// It is off.
    Off,
}

/// A disk of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskView {
    /// The volume that holds it.
    pub volume: String,
    /// Its file, relative to the volume.
    pub file: String,
    /// What the guest sees.
    pub size_bytes: u64,
    /// How its file is laid out.
    pub format: DiskFormat,
    /// When it takes its room.
    pub allocate: Allocation,
}

/// Shuts a VM down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopVm {
    /// Switch it off at once, whatever the guest is doing.
    #[serde(default)]
    pub force: bool,
}

/// Moves a VM while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrateVm {
    /// The node to move it to; the one with the most room when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

/// Why a VM is where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// The VM.
    pub vm: String,
    /// How it stands, in a sentence.
    pub standing: String,
    /// What led there, oldest first.
    pub causes: Vec<Cause>,
}

/// One decision and why it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cause {
    /// When.
    pub at_ms: u64,
    /// What was decided, and why.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_short_definition_gets_defaults() {
        let vm: VmDefinition = serde_norway::from_str(
            "name: web\nmemory: 512M\ndisks:\n- {volume: main, size: 20G, image: /tmp/a.qcow2}\nnics: [{switch: lan}]\n",
        )
        .unwrap();
        assert_eq!((vm.cpus, vm.memory, vm.priority), (1, Size(512 << 20), Priority::Medium));
        assert_eq!(vm.disks[0].size, Some(Size(20 << 30)));
        assert_eq!(vm.disks[0].format, DiskFormat::Qcow2);
        assert_eq!(vm.stop_timeout_s, 60);
    }

    #[test]
    fn a_misspelt_field_is_refused_by_name() {
        let refused =
            serde_norway::from_str::<VmDefinition>("name: web\nmemory: 1G\nmemroy: 2G\n").unwrap_err().to_string();
        assert!(refused.contains("memroy"), "{refused}");
    }

    fn texts() -> impl Strategy<Value = String> {
        // Words that YAML likes to take for something else are among them.
        prop_oneof!["[a-z][a-z0-9:/._=, #-]{0,20}", Just("no".to_owned()), Just("1e3".to_owned())]
    }

    fn disks() -> impl Strategy<Value = DiskDefinition> {
        let formats =
            prop_oneof![Just(DiskFormat::Raw), Just(DiskFormat::Qcow2), Just(DiskFormat::Vhdx), Just(DiskFormat::Vhd)];
        let allocations = prop_oneof![Just(Allocation::Thin), Just(Allocation::Full)];
        (texts(), any::<Option<u64>>(), formats, allocations, proptest::option::of(texts())).prop_map(
            |(volume, size, format, allocate, image)| DiskDefinition {
                volume,
                size: size.map(Size),
                format,
                allocate,
                image,
                file: None,
            },
        )
    }

    prop_compose! {
        fn definitions()(
            name in texts(), cpus: u32, memory: u64,
            machine in proptest::option::of(texts()), cpu_model in proptest::option::of(texts()),
            boot in proptest::option::of((texts(), proptest::option::of(texts()), texts())),
            disks in proptest::collection::vec(disks(), 0..3),
            nics in proptest::collection::vec((texts(), proptest::option::of(texts()), any::<Option<u16>>()), 0..3),
            priority in 0..4usize, stop_timeout_s: u32,
        ) -> VmDefinition {
            VmDefinition {
                name, cpus, memory: Size(memory), machine, cpu_model, disks, stop_timeout_s,
                boot: boot.map(|(kernel, initrd, append)| KernelBoot { kernel, initrd, append }),
                nics: nics.into_iter().map(|(switch, mac, vlan)| NicDefinition { switch, mac, vlan }).collect(),
                priority: [Priority::None, Priority::Low, Priority::Medium, Priority::High][priority],
            }
        }
    }

    proptest! {
        #[test]
        fn a_definition_survives_yaml_and_json(vm in definitions()) {
            let yaml = serde_norway::to_string(&vm).unwrap();
            prop_assert_eq!(&serde_norway::from_str::<VmDefinition>(&yaml).unwrap(), &vm);
            let json = serde_json::to_string(&vm).unwrap();
            prop_assert_eq!(&serde_json::from_str::<VmDefinition>(&json).unwrap(), &vm);
        }
    }
}
