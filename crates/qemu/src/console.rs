//! The guest's console log.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use crate::QemuError;

/// Gives the space of all but the last `keep_bytes` of a log back.
///
/// A guest can write to its console without end, and QEMU to its log with it.
/// The old part becomes a hole (it reads as zeroes) and the file keeps its
/// length, so nothing that QEMU appends meanwhile is lost.
///
/// # Errors
/// [`QemuError::Io`] when the file system cannot make holes. A log that is not
/// there is none.
pub fn trim_log(log: &Path, keep_bytes: u64) -> Result<(), QemuError> {
    let doing = || format!("cannot trim the console log {}", log.display());
    let file = match OpenOptions::new().write(true).open(log) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(QemuError::io(doing())(error)),
    };
    let length = file.metadata().map_err(QemuError::io(doing()))?.len();
    let Some(old) = length.checked_sub(keep_bytes).filter(|old| *old > 0) else {
        return Ok(());
    };
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let old = i64::try_from(old).unwrap_or(i64::MAX);
    fallocate(&file, hole, 0, old).map_err(|error| QemuError::io(doing())(error.into()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_old_part_gives_its_space_back_and_appending_goes_on() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(&vec![b'x'; 1 << 20]).expect("a log");
        file.as_file().sync_all().expect("on disk");
        trim_log(file.path(), 64 << 10).expect("trimmed");
        file.write_all(b"more").expect("appended");
        let metadata = file.path().metadata().expect("metadata");
        assert_eq!(metadata.len(), (1 << 20) + 4);
        assert!(metadata.blocks() * 512 <= 128 << 10, "{}", metadata.blocks());
        let read = std::fs::read(file.path()).expect("readable");
        assert!(read[(1 << 20) - (64 << 10)..].starts_with(b"xxxx"));
        assert!(read.ends_with(b"xmore"));
        trim_log(&file.path().with_extension("absent"), 1).expect("nothing to do");
    }
}
