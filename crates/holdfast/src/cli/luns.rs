//! What is on LUNs.

use std::path::Path;

use holdfast_api as api;

use super::{CliError, Done, output};
use crate::volume::view;

/// The files of a volume.
pub fn list(files: &[api::FileView], json: bool) -> Done {
    if json {
        return output::json(&files);
    }
    let row = |file: &api::FileView| {
        let vm = output::or_dash(file.vm.clone());
        [file.name.clone(), output::size(file.size_bytes), output::size(file.allocated_bytes), vm]
    };
    output::table(["file", "size", "allocated", "vm"], files.iter().map(row))
}

/// What a look at a volume found. A finding is a failure.
pub fn check(found: &api::VolumeCheck, json: bool) -> Done {
    if json {
        output::json(found)?;
    } else {
        let revision = match (found.revision, found.agreed_revision) {
            (Some(there), Some(agreed)) if there != agreed => format!("{there}, and {agreed} is agreed on"),
            (Some(there), _) => there.to_string(),
            (None, _) => "-".into(),
        };
        output::facts(&[
            ("device", found.device.clone()),
            ("size", output::size(found.bytes)),
            ("volume", output::or_dash(found.volume.clone())),
            ("id", output::or_dash(found.id.clone())),
            ("cluster", output::or_dash(found.cluster.clone())),
            ("made", output::or_dash(found.made_ms.map(output::moment))),
            ("slabs", output::or_dash(found.slabs)),
            ("slab size", output::or_dash(found.slab_bytes.map(output::size))),
            ("revision", revision),
            ("findings", if found.findings.is_empty() { "none".into() } else { found.findings.join("\n") }),
        ])?;
        if !found.files.is_empty() {
            output::line("")?;
            list(&found.files, false)?;
        }
    }
    match found.findings.is_empty() {
        true => Ok(()),
        false => Err(CliError::Unsound(found.device.clone())),
    }
}

/// Looks at a device of this host, without a cluster.
pub fn check_alone(device: &Path, json: bool) -> Done {
    let found = view::look(device).map_err(CliError::Local)?;
    check(&view::check(device, &found), json)
}
