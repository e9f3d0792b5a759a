//! What a look at a LUN found, as it travels.

use std::path::Path;

use holdfast_api as api;
use holdfast_volume::Lun;
use holdfast_volume::lun::{Inspection, inspect};

/// Looks at a device of this host. Changes nothing.
///
/// # Errors
/// It cannot be read.
pub fn look(device: &Path) -> Result<Inspection, String> {
    let lun = Lun::open(device).map_err(|error| error.to_string())?;
    inspect(&lun, None).map_err(|error| format!("{}: {error}", device.display()))
}

/// What was found on a device.
pub fn check(device: &Path, found: &Inspection) -> api::VolumeCheck {
    let superblock = found.superblock.as_ref();
    let slab_bytes = superblock.map(|superblock| superblock.geometry.slab_bytes);
    let contents = found.contents.as_ref().map(|(contents, _)| contents);
    let files = contents.into_iter().flat_map(|contents| {
        let slab_bytes = contents.geometry().slab_bytes;
        contents.files().map(move |(_, file)| api::FileView {
            name: file.name.clone(),
            size_bytes: file.bytes,
            allocated_bytes: u64::from(file.slabs()) * slab_bytes,
            vm: None,
        })
    });
    let mut files: Vec<_> = files.collect();
    files.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    api::VolumeCheck {
        device: device.display().to_string(),
        bytes: found.bytes,
        volume: superblock.map(|superblock| superblock.identity.name.clone()),
        id: superblock.map(|superblock| superblock.identity.volume.to_string()),
        cluster: superblock.map(|superblock| superblock.identity.cluster.to_string()),
        made_ms: superblock.map(|superblock| superblock.made_ms),
        slab_bytes,
        slabs: superblock.map(|superblock| superblock.geometry.slabs),
        revision: found.contents.as_ref().map(|(_, revision)| *revision),
        agreed_revision: None,
        files,
        findings: found.findings(),
    }
}
