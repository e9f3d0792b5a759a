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
    /// Where the asked node sees it; absent for a LUN, which holds no files for others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mounted_at: Option<String>,
    /// Its size; of a directory as the asked node sees it, absent when it does not
    /// reach it.
    pub size_bytes: Option<u64>,
    /// What of it is free, likewise.
    pub free_bytes: Option<u64>,
    /// What its disks would take if they were full; for a LUN.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub promised_bytes: Option<u64>,
    /// How each node reaches it.
    pub reach: Vec<Reach>,
    /// VMs with files on it.
    pub vms: Vec<String>,
    /// When it was added.
    pub added_ms: u64,
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
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reach {
    /// The node.
    pub node: String,
    /// Whether it does; absent when it said nothing yet.
    pub ok: Option<bool>,
    /// Why it does not.
    pub why: Option<String>,
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
