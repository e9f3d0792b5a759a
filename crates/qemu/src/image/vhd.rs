//! What QEMU does not see of a VHD by itself.
//!
//! A fixed one is a raw disk with a footer behind it, and QEMU looks at the beginning only. One
//! that refers to a parent is read as if what the parent has were zeroes. And QEMU believes the
//! geometry of cylinders, heads and sectors where it does not know who made the image, which
//! may say less than there is.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::FileTypeExt as _;
use std::time::Duration;

use serde_json::json;
use tempfile::NamedTempFile;

use super::{ImageAt, QemuImg};
use crate::{NBD_EXPORT, QemuError};

/// The length of a footer, in bytes; of Microsoft's "Virtual Hard Disk Image Format
/// Specification", as all that follows.
const FOOTER_BYTES: usize = 512;
const COOKIE: &[u8] = b"conectix";
/// Where the checksum is, and behind it, four bytes before, the kind.
const CHECKSUM: std::ops::Range<usize> = 64..68;
const KIND: std::ops::Range<usize> = 60..64;

/// What kind of VHD a footer belongs to.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Fixed,
    Differencing,
    Other,
}

/// The name by which qemu-img opens a VHD with the size that it says in bytes; none for a
/// file whose name is no text.
pub(super) fn address(at: &ImageAt<'_>) -> Option<String> {
    let file = match at {
        ImageAt::File(path) => {
            let device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
            json!({"driver": if device { "host_device" } else { "file" }, "filename": path.to_str()?})
        }
        ImageAt::Socket(path) => {
            json!({"driver": "nbd", "server": {"type": "unix", "path": path.to_str()?}, "export": NBD_EXPORT})
        }
    };
    Some(format!("json:{}", json!({"driver": "vpc", "force_size_calc": "current_size", "file": file})))
}

impl QemuImg {
    /// The name by which an image is to be opened that qemu-img takes for one of `format`
    /// with so many bytes, if it is a VHD.
    pub(super) async fn is_vhd(
        &self,
        at: ImageAt<'_>,
        format: &str,
        bytes: u64,
        doing: &str,
        deadline: Duration,
    ) -> Result<Option<String>, QemuError> {
        let last = bytes / FOOTER_BYTES as u64;
        let which = match format {
            "vpc" => "count=1".to_owned(),
            "raw" if last > 1 => format!("skip={}", last - 1),
            _ => return Ok(None),
        };
        let refuse = |why: &str| QemuError::Image { doing: doing.to_owned(), why: why.into() };
        let found = kind(&self.sector(at, &which, doing, deadline).await?);
        match (format, found) {
            ("raw", Some(Kind::Fixed)) | ("vpc", Some(Kind::Fixed | Kind::Other)) => {
                address(&at).map(Some).ok_or_else(|| refuse("its name is no text: rename it"))
            }
            ("vpc", Some(Kind::Differencing)) => {
                Err(QemuError::NotSelfContained { path: at.path().to_owned(), refers_to: "its parent VHD".into() })
            }
            ("vpc", None) => Err(refuse("it begins like a VHD, and its header is damaged")),
            _ => Ok(None),
        }
    }

    /// One sector of the image as it stands there.
    async fn sector(
        &self,
        at: ImageAt<'_>,
        which: &str,
        doing: &str,
        deadline: Duration,
    ) -> Result<Vec<u8>, QemuError> {
        let to = NamedTempFile::new().map_err(QemuError::io(doing))?;
        let named = |what: &str, name: &OsStr| {
            let mut option = OsString::from(what);
            option.push(name);
            option
        };
        let (from, into) = (named("if=", &at.argument()), named("of=", to.path().as_os_str()));
        let how = ["dd", "-U", "-f", "raw", "-O", "raw", "bs=512", which].map(OsStr::new);
        let arguments: Vec<&OsStr> = how.into_iter().chain([from.as_os_str(), into.as_os_str()]).collect();
        self.run(&arguments, at.path(), doing, deadline).await?;
        std::fs::read(to.path()).map_err(QemuError::io(doing))
    }
}

/// The kind of VHD, if this is a footer of one.
fn kind(sector: &[u8]) -> Option<Kind> {
    let number = |at: std::ops::Range<usize>| {
        let bytes = sector.get(at)?.try_into().ok()?;
        Some(u32::from_be_bytes(bytes))
    };
    if sector.len() != FOOTER_BYTES || !sector.starts_with(COOKIE) {
        return None;
    }
    let others = sector.iter().enumerate().filter(|(at, _)| !CHECKSUM.contains(at));
    let sum: u32 = others.map(|(_, byte)| u32::from(*byte)).sum();
    if number(CHECKSUM)? != !sum {
        return None;
    }
    Some(match number(KIND)? {
        2 => Kind::Fixed,
        4 => Kind::Differencing,
        _ => Kind::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(kind: u32) -> Vec<u8> {
        let mut sector = vec![0; FOOTER_BYTES];
        sector[..8].copy_from_slice(COOKIE);
        sector[KIND].copy_from_slice(&kind.to_be_bytes());
        let sum: u32 = sector.iter().map(|byte| u32::from(*byte)).sum();
        sector[CHECKSUM].copy_from_slice(&(!sum).to_be_bytes());
        sector
    }

    #[test]
    fn a_footer_is_known_by_its_checksum() {
        for (number, wanted) in [(2, Kind::Fixed), (3, Kind::Other), (4, Kind::Differencing)] {
            assert_eq!(kind(&footer(number)), Some(wanted));
        }
        let mut damaged = footer(2);
        damaged[100] = 1;
        assert_eq!(kind(&damaged), None);
        assert_eq!(kind(&footer(2)[..511]), None);
        assert_eq!(kind(&[0; FOOTER_BYTES]), None);
    }
}
