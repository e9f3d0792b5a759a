//! Cluster shared volumes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A cluster shared volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeView {
    /// Its name.
    pub name: String,
    /// Its identity, also written on it.
    pub id: String,
    /// What is behind it.
    pub kind: VolumeKind,
    /// The path of what is behind it: of a directory on every node, of a LUN on the
    /// node that added it.
    pub path: String,
    /// Where the asked node sees it; absent for a LUN, whose files are reached by `volume ls|put|get`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mounted_at: Option<String>,
    /// Its size; of a directory as the asked node sees it, absent when it does not
    /// reach it.
    pub size_bytes: Option<u64>,
    /// What of it is free, likewise.
    pub free_bytes: Option<u64>,
    /// What of it is used, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    /// What of the free part nodes keep ready for their guests' next writes; for a LUN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ahead_bytes: Option<u64>,
    /// What its disks would take if they were full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub promised_bytes: Option<u64>,
    /// That in percent of its size: above 100 more is promised than there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promised_percent: Option<u64>,
    /// Who does I/O for nodes without a path of their own; for a LUN that has an owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<OwnerView>,
    /// How each node reaches it.
    pub reach: Vec<Reach>,
    /// VMs with files on it.
    pub vms: Vec<String>,
    /// When it was added.
    pub added_ms: u64,
}

/// How much of a volume is used and promised: what `holdfast volume df --json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpace {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: Option<u64>,
    /// What of it is used.
    pub used_bytes: Option<u64>,
    /// What of the free part nodes keep ready for their guests' next writes.
    pub ahead_bytes: Option<u64>,
    /// What of it is free, with that.
    pub free_bytes: Option<u64>,
    /// What its disks would take if they were full.
    pub promised_bytes: Option<u64>,
    /// That in percent of its size.
    pub promised_percent: Option<u64>,
}

impl From<&VolumeView> for VolumeSpace {
    fn from(volume: &VolumeView) -> Self {
        VolumeSpace {
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            used_bytes: volume.used_bytes,
            ahead_bytes: volume.ahead_bytes,
            free_bytes: volume.free_bytes,
            promised_bytes: volume.promised_bytes,
            promised_percent: volume.promised_percent,
        }
    }
}

/// What is behind a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VolumeKind {
    /// A directory that every node sees under the same path.
    Directory,
    /// A block device that every node sees.
    Lun,
}

/// How a node reaches a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reach {
    /// The node.
    pub node: String,
    /// Whether it does; absent when it said nothing yet.
    pub ok: Option<bool>,
    /// Why it does not, or only through another node.
    pub why: Option<String>,
    /// Of a LUN: how it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathState>,
    /// The node that it goes through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through: Option<String>,
    /// Since when it is so, milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<u64>,
    /// It is redirected because a user wants it so.
    #[serde(default)]
    pub by_hand: bool,
    /// Requests that went through other nodes since its volume server was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirected_requests: Option<u64>,
    /// What they read and wrote, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirected_bytes: Option<u64>,
}

/// How a node reaches a LUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PathState {
    /// By itself.
    Direct,
    /// Through the owner.
    Redirected,
    /// Not at all: what guests ask for waits.
    Unavailable,
}

/// Who owns a volume on a LUN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OwnerView {
    /// The node.
    pub node: String,
    /// Counts the volume's owners.
    pub epoch: u64,
    /// It hands it over, and takes nothing new.
    pub leaving: bool,
    /// Who is to own it next, by a user's wish.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// Renames a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameVolume {
    /// Its new name.
    pub name: String,
}

/// Chooses who owns a volume on a LUN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetOwner {
    /// The node.
    pub node: String,
}

/// Chooses how a node reaches a volume on a LUN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRedirect {
    /// The node.
    pub node: String,
    /// Through the owner, although it need not; otherwise by itself where it can.
    pub redirect: bool,
}

/// Chooses how long VMs stay on a node that reaches their disks only through another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRedirectPatience {
    /// How long, in seconds.
    pub seconds: u64,
}

/// Adds a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddVolume {
    /// Its name.
    pub name: String,
    /// A directory that every node sees under this path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// Or a block device that every node sees, by its path on the node that is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lun: Option<String>,
    /// What is on the device and may be destroyed, in the word that the refusal gave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub erase: Option<String>,
}
