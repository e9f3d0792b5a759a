//! A virtual machine: what it is, what its user wants, and who may run it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Cause, Epoch, JobId, NodeId, NodeTerm, VmId};

/// A VM as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vm {
    /// Its identity; stays with it through renames and moves.
    pub id: VmId,
    /// Its name, unique in the cluster.
    pub name: String,
    /// The hardware that its guest sees.
    pub spec: VmSpec,
    /// What its user wants.
    pub desired: Desired,
    /// Who may run it right now.
    pub placement: Placement,
    /// The last epoch that was handed out for it.
    pub last_epoch: Epoch,
    /// What the node that may run it last said of it, for the current epoch.
    pub seen: Seen,
    /// The guest was asked to shut down in this epoch and shall start again.
    pub restart: Option<Epoch>,
    /// Where its disks stand in their making.
    pub disks: DiskStage,
    /// Why it does not run although it should.
    pub hold: Option<Hold>,
    /// When QEMU died under it unexpectedly: milliseconds since the Unix epoch,
    /// oldest first, only those that still count against the budget.
    pub crashes: Vec<Crash>,
    /// The chain of causes that led to the current placement, newest last.
    pub causes: Vec<Because>,
    /// When it was created, milliseconds since the Unix epoch.
    pub created_ms: u64,
}

/// One unexpected end of a VM's QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crash {
    /// When, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// On which node.
    pub node: NodeId,
}

/// A cause with its time, as kept for `holdfast explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Because {
    /// When it was decided, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What was decided, in a few words.
    pub what: String,
    /// Why.
    pub cause: Cause,
}

/// The hardware that a guest sees, and how the cluster treats it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Virtual processors.
    pub cpus: u32,
    /// RAM in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// QEMU's machine type, always versioned (`pc-q35-7.2`): a live migration
    /// must never meet another one.
    pub machine: String,
    /// QEMU's CPU model; what the accelerator offers when none is named.
    pub cpu_model: Option<String>,
    /// Boot this kernel directly instead of the first disk.
    pub direct_boot: Option<DirectBoot>,
    /// Disks, the boot disk first.
    pub disks: Vec<DiskSpec>,
    /// Network adapters.
    pub nics: Vec<NicSpec>,
    /// Order and preference after a failure.
    pub priority: Priority,
    /// How long a guest may take to shut down when asked, in seconds.
    pub stop_timeout_s: u32,
}

/// A kernel that QEMU loads itself, from files on a volume that VMs may share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectBoot {
    /// The volume that holds the files.
    pub volume: String,
    /// Kernel image, relative to the volume.
    pub kernel: String,
    /// Initial ramdisk, relative to the volume.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub append: String,
}

/// One virtual disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The volume that holds it.
    pub volume: String,
    /// The file, relative to the volume.
    pub file: String,
    /// What the guest sees, in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// How the file is laid out.
    pub format: DiskFormat,
    /// When it takes its room.
    #[serde(default, skip_serializing_if = "Allocation::is_thin")]
    pub allocation: Allocation,
}

/// When a disk takes room on its volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Allocation {
    /// When its guest writes; what its guest discards is given back.
    #[default]
    Thin,
    /// All of it when it is made, for good: its guest is not offered to discard.
    Full,
}

/// How a disk's file is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Block for block, sparse.
    Raw,
    /// QEMU's copy-on-write format.
    #[default]
    Qcow2,
    /// Hyper-V's.
    Vhdx,
    /// Virtual PC's and the older one of Hyper-V; fixed when it is fully allocated.
    Vhd,
}

/// One network adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    /// The virtual switch that it is plugged into.
    pub switch: String,
    /// Its hardware address.
    pub mac: Mac,
    /// Access VLAN, 1 to 4094.
    pub vlan: Option<u16>,
}

/// An Ethernet hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

/// Order and preference after a failure: higher priorities are placed first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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

/// What the user wants of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    /// Its guest runs, somewhere.
    Running,
    /// Its RAM is kept, its processors stand still.
    Paused,
    /// It is off; the guest is asked to shut down first.
    #[default]
    Stopped,
    /// It is off at once, whatever the guest is doing.
    ForcedOff,
}

/// A node's right to run a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenure {
    /// Who.
    pub node: NodeId,
    /// In which of the node's terms: void in any other.
    pub term: NodeTerm,
    /// Under which epoch of the VM.
    pub epoch: Epoch,
}

/// Who may run a VM: the single truth of safety rules 1 and 3.
///
/// ```text
///            Place                 BeginMigration
///  Nowhere ────────▶ On(tenure) ───────────────────▶ Moving(from, to)
///     ▲                 │  ▲                          │    │     │
///     └─────────────────┘  └──────────────────────────┘    │     │
///        Vacate              MigrationDone: On(to)  ◀───────┘     │
///     ▲                      MigrationAborted: On(from)          │
///     └──────────────────────────────────────────────────────────┘
///        Vacate: both ends fenced, or the survivor's word
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placement {
    /// Nobody may run it.
    #[default]
    Nowhere,
    /// Only this node may run it.
    On(Tenure),
    /// A live migration is under way: the source's guest runs until QEMU has
    /// handed it over, after which only the target's does. QEMU's own protocol
    /// keeps the two apart; a failover has to wait until both have lost it.
    Moving {
        /// The source.
        from: Tenure,
        /// The target.
        to: Tenure,
        /// The job that shows its progress.
        job: JobId,
        /// How far it is.
        stage: MoveStage,
        /// The user asked to stop it.
        cancel: bool,
    },
}

/// How far a live migration is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MoveStage {
    /// The target starts a QEMU that waits for the guest.
    Preparing,
    /// RAM moves. The target's QEMU listens here (`tcp:ADDRESS:PORT`).
    Transferring {
        /// Address and port of the target's QEMU on the migration network.
        address: String,
    },
}

/// What a node said of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seen {
    /// Nothing yet in this epoch.
    #[default]
    Nothing,
    /// QEMU is being started.
    Starting,
    /// The guest's processors run.
    Running,
    /// The guest's processors stand still at the user's wish.
    Paused,
    /// The guest was asked to shut down.
    Stopping,
}

/// Where a VM's disks stand in their making.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskStage {
    /// They have to be made by this node, which can read the sources.
    Making {
        /// The node that makes them.
        node: NodeId,
        /// The job that shows the progress.
        job: JobId,
        /// What to fill them from.
        sources: Sources,
    },
    /// They are there.
    #[default]
    Ready,
    /// They have to be deleted, and the VM with them.
    Deleting {
        /// The node that deletes them.
        node: NodeId,
        /// The job that shows the progress.
        job: JobId,
    },
}

/// Files, readable on the node that makes the disks, to fill them from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sources {
    /// An image for each disk, by index; absent: an empty disk.
    pub images: Vec<Option<String>>,
    /// Start the VM when its disks are there.
    pub start: bool,
}

/// Why a VM that should run does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Hold {
    /// No node that is up has room; it starts by itself when one has.
    NoRoom {
        /// What each node lacks.
        why: String,
    },
    /// It crashed more often than its budget allows, or cannot be started; it
    /// stays off until a user starts it again.
    Failed {
        /// What happened last.
        why: String,
    },
    /// Its priority is `none`: it stays off until a user starts it again.
    NotProtected,
    /// Another QEMU has one of its disks open, most likely its own on a host that was
    /// lost: it is tried again until that is gone, and no try counts as a crash.
    DiskLocked {
        /// Which disk.
        why: String,
        /// The epoch of the last try.
        epoch: Epoch,
        /// How often it was tried.
        tries: u32,
        /// Since when it waits, milliseconds since the Unix epoch.
        since_ms: u64,
        /// When the last try was found to have failed, milliseconds since the Unix epoch.
        tried_ms: u64,
    },
}

impl Vm {
    /// The node that may run it; during a migration the source.
    pub fn node(&self) -> Option<NodeId> {
        match &self.placement {
            Placement::Nowhere => None,
            Placement::On(tenure) => Some(tenure.node),
            Placement::Moving { from, .. } => Some(from.node),
        }
    }

    /// Every right to run it that is out.
    pub fn tenures(&self) -> impl Iterator<Item = &Tenure> {
        let (one, two) = match &self.placement {
            Placement::Nowhere => (None, None),
            Placement::On(tenure) => (Some(tenure), None),
            Placement::Moving { from, to, .. } => (Some(from), Some(to)),
        };
        one.into_iter().chain(two)
    }

    /// The right that `node` has in `term` to hold a QEMU of this VM, if any.
    pub fn tenure_of(&self, node: NodeId) -> Option<&Tenure> {
        self.tenures().find(|tenure| tenure.node == node)
    }

    /// The directory of its files on a volume, relative to the volume.
    pub fn directory(id: VmId, name: &str) -> String {
        let short = &id.0.simple().to_string()[..8];
        format!("vms/{name}-{short}")
    }
}

impl VmSpec {
    /// Whether any of its files is on a volume.
    pub fn uses_volume(&self, volume: &str) -> bool {
        self.disks.iter().any(|disk| disk.volume == volume)
            || self.direct_boot.as_ref().is_some_and(|boot| boot.volume == volume)
    }
}

impl Desired {
    /// Whether a QEMU should exist for the VM.
    pub fn wants_qemu(self) -> bool {
        matches!(self, Desired::Running | Desired::Paused)
    }
}

impl DiskSpec {
    /// Whether what the guest discards is room for others again. QEMU's drivers for VHDX
    /// and VHD cannot give any back.
    pub fn takes_discards(&self) -> bool {
        self.allocation.is_thin() && matches!(self.format, DiskFormat::Raw | DiskFormat::Qcow2)
    }
}

impl Allocation {
    /// Whether it is the default.
    pub fn is_thin(&self) -> bool {
        *self == Allocation::Thin
    }
}

impl DiskFormat {
    /// The name by which QEMU knows it.
    pub fn as_str(self) -> &'static str {
        match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
            DiskFormat::Vhdx => "vhdx",
            DiskFormat::Vhd => "vpc",
        }
    }

    /// The name by which people know it, and with which its files' names end.
    pub fn extension(self) -> &'static str {
        match self {
            DiskFormat::Vhd => "vhd",
            other => other.as_str(),
        }
    }

    /// The most bytes that a disk of this format has, if fewer than any file.
    pub fn most_bytes(self) -> Option<u64> {
        match self {
            DiskFormat::Raw | DiskFormat::Qcow2 => None,
            // [MS-VHDX] 2.6.2.4.
            DiskFormat::Vhdx => Some(64 << 40),
            // QEMU's, block/vpc.c: a little below what 32 bits can say in sectors.
            DiskFormat::Vhd => Some(2040 << 30),
        }
    }

    /// Whether QEMU can hand a guest with such a disk over to another QEMU.
    pub fn migrates(self) -> bool {
        matches!(self, DiskFormat::Raw | DiskFormat::Qcow2)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a hardware address: write six bytes like 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        match parts.next() {
            None if bytes[0] & 1 == 0 => Ok(Mac(bytes)),
            _ => Err(bad()),
        }
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
