//! What is on volumes on LUNs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Takes over a LUN that is a volume already, with its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportVolume {
    /// Its name here.
    pub name: String,
    /// The block device, by its path on the node that is asked.
    pub lun: String,
    /// The volume's name in the cluster that it is taken from, which must not use it any
    /// more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub take: Option<String>,
}

/// A file on a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileView {
    /// Its name: parts with slashes between them.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// What of it is there; the rest reads as zero.
    pub allocated_bytes: u64,
    /// The VM whose disk it is.
    pub vm: Option<String>,
}

/// What a look at a LUN's description found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeCheck {
    /// The device that was looked at, by its path where that was done.
    pub device: String,
    /// Its size.
    pub bytes: u64,
    /// The volume's name, as it stands there.
    pub volume: Option<String>,
    /// Its identity.
    pub id: Option<String>,
    /// The identity of the cluster that it belongs to.
    pub cluster: Option<String>,
    /// When it became a volume.
    pub made_ms: Option<u64>,
    /// The size of its slabs.
    pub slab_bytes: Option<u64>,
    /// How many it has.
    pub slabs: Option<u32>,
    /// The revision of the files, as it stands there.
    pub revision: Option<u64>,
    /// The revision that the cluster has agreed on; absent without a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreed_revision: Option<u64>,
    /// The files, as they stand there.
    pub files: Vec<FileView>,
    /// What is wrong, a sentence each; none if nothing is.
    pub findings: Vec<String>,
}
