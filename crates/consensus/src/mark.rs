//! How far the log was acknowledged, noted beside it: so that a log which lost its
//! end by something else than a crash is not taken for one that a crash cut short.
//!
//! ```text
//! file = "HFMARK\0" version:u8 end:u64 crc:u32        `log.mark`; end in bytes, little-endian
//! ```
//! A torn write at the end of the log looks like a truncation: both leave a file
//! that ends inside a frame. The note tells them apart. It is written after the
//! frame is durable and not flushed itself, which would double the price of every
//! commit: so after a loss of power it may be old, but what it says is always a
//! length that was acknowledged. After any other end of the process it is exact.
//! It is lowered, durably, before the log is replaced by a shorter one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// The file's name.
pub(crate) const FILE: &str = "log.mark";

const MAGIC: &[u8; 8] = b"HFMARK\0\x01";
const BYTES: usize = 20;

/// The note. A node that cannot write it, or has none as an older version wrote its
/// log, does without: it says less then, but nothing wrong.
#[derive(Debug)]
pub(crate) struct Mark(Option<File>);

impl Mark {
    /// Opens the note in a directory, or begins one, and says what it says.
    pub(crate) fn open(directory: &Path) -> (Mark, u64) {
        let path = directory.join(FILE);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        match file {
            Ok(file) => {
                let end = read(&file);
                (Mark(Some(file)), end)
            }
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "a truncation of the log would not be noticed");
                (Mark(None), 0)
            }
        }
    }

    /// The log is acknowledged up to here. Not flushed.
    pub(crate) fn note(&self, end: u64) {
        if let Some(file) = &self.0 {
            // Twenty bytes within one sector, written once before: no disk is too full for them.
            let _ = file.write_all_at(&encode(end), 0);
        }
    }

    /// Makes the note say nothing, for certain, before the log gets shorter.
    pub(crate) fn forget(&self) -> io::Result<()> {
        match &self.0 {
            Some(file) => {
                file.write_all_at(&encode(0), 0)?;
                file.sync_data()
            }
            None => Ok(()),
        }
    }
}

fn encode(end: u64) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&end.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..16]);
    bytes[16..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Zero when it says nothing: new, or not whole.
fn read(file: &File) -> u64 {
    let mut bytes = [0; BYTES];
    if file.read_exact_at(&mut bytes, 0).is_err() {
        return 0;
    }
    let mut end = [0; 8];
    end.copy_from_slice(&bytes[8..16]);
    let end = u64::from_le_bytes(end);
    if bytes == encode(end) { end } else { 0 }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn it_says_what_was_noted_last_or_nothing() {
        let directory = TempDir::new().expect("a directory");
        let (mark, end) = Mark::open(directory.path());
        assert_eq!(end, 0);
        mark.note(70_000);
        mark.note(80_000);
        let (mark, end) = Mark::open(directory.path());
        assert_eq!(end, 80_000);
        mark.forget().expect("written");
        assert_eq!(Mark::open(directory.path()).1, 0);
        mark.note(9);
        std::fs::write(directory.path().join(FILE), &encode(9)[..19]).expect("cut");
        assert_eq!(Mark::open(directory.path()).1, 0);
    }
}
