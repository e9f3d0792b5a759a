//! The snapshot file: the whole state at one position of the log.
//!
//! ```text
//! file = "HFSNAP\0" version:u8 head_length:u32 state_length:u64 crc:u32 head state
//! ```
//! Numbers are little-endian; `crc` is the CRC-32 (IEEE) of everything else. `head`
//! is a [`SnapshotHead`] and `state` a [`ClusterState`], both JSON (record.rs). A
//! snapshot is written to `snapshot.new`, flushed and renamed over `snapshot`, so
//! that a crash leaves the old one or the new one.

use std::io;

use holdfast_core::ClusterState;

use crate::error::ConsensusError;
use crate::medium::Medium;
use crate::record::SnapshotHead;

/// The file's name.
pub(crate) const FILE: &str = "snapshot";
/// Where its replacement is written.
pub(crate) const NEW_FILE: &str = "snapshot.new";
const VERSION: u8 = 1;
const MAGIC: &[u8; 7] = b"HFSNAP\0";
const HEADER_BYTES: usize = 24;

/// A snapshot read from a file.
pub(crate) struct Stored {
    pub(crate) head: SnapshotHead,
    pub(crate) state: ClusterState,
    /// The state as it stands in the file.
    pub(crate) bytes: Vec<u8>,
}

/// The file's bytes.
pub(crate) fn encode(head: &SnapshotHead, state: &[u8]) -> io::Result<Vec<u8>> {
    let head = serde_json::to_vec(head)?;
    let head_length = u32::try_from(head.len()).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + head.len() + state.len());
    bytes.extend_from_slice(MAGIC);
    bytes.push(VERSION);
    bytes.extend_from_slice(&head_length.to_le_bytes());
    bytes.extend_from_slice(&(state.len() as u64).to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes);
    hasher.update(&head);
    hasher.update(state);
    bytes.extend_from_slice(&hasher.finalize().to_le_bytes());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(state);
    Ok(bytes)
}

/// Writes it; durable when this returns.
pub(crate) fn write(medium: &dyn Medium, head: &SnapshotHead, state: &[u8]) -> io::Result<()> {
    medium.write_snapshot(&encode(head, state)?)
}

/// Reads it, `None` if there is none.
pub(crate) fn read(medium: &dyn Medium) -> Result<Option<Stored>, ConsensusError> {
    let path = medium.snapshot_path();
    let Some(bytes) = medium.read_snapshot()? else { return Ok(None) };
    let corrupt =
        |offset: usize, what: String| ConsensusError::Corrupt { file: path.clone(), offset: offset as u64, what };
    if bytes.len() < HEADER_BYTES || &bytes[..7] != MAGIC {
        return Err(corrupt(0, "it does not begin like a snapshot".into()));
    }
    if bytes[7] > VERSION {
        return Err(ConsensusError::TooNew { file: path, found: bytes[7], known: VERSION });
    }
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[8..12]);
    let head_length = u32::from_le_bytes(word) as usize;
    word.copy_from_slice(&bytes[20..24]);
    let crc = u32::from_le_bytes(word);
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..20]);
    hasher.update(&bytes[HEADER_BYTES..]);
    if hasher.finalize() != crc || HEADER_BYTES + head_length > bytes.len() {
        return Err(corrupt(0, "its checksum is wrong".into()));
    }
    let (head, state) = bytes[HEADER_BYTES..].split_at(head_length);
    let newer = |e: serde_json::Error| format!("it cannot be understood ({e}); perhaps a newer version wrote it");
    Ok(Some(Stored {
        head: serde_json::from_slice(head).map_err(|e| corrupt(HEADER_BYTES, newer(e)))?,
        state: serde_json::from_slice(state).map_err(|e| corrupt(HEADER_BYTES + head_length, newer(e)))?,
        bytes: state.to_vec(),
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;
    use crate::medium::Directory;
    use crate::record::{Members, Position};

    fn head() -> SnapshotHead {
        SnapshotHead {
            last: Some(Position { term: 2, index: 9 }),
            members_at: Some(Position { term: 1, index: 0 }),
            members: Members { voters: vec![[7].into()], addresses: [(7, "a:1".to_owned())].into() },
        }
    }

    #[test]
    fn the_bytes_are_those_of_version_1() {
        let mut expected = b"HFSNAP\0\x01\x72\0\0\0\x02\0\0\0\0\0\0\0\x83\x89\xb7\xfa".to_vec();
        expected.extend_from_slice(
            br#"{"last":{"term":2,"index":9},"members_at":{"term":1,"index":0},"members":{"voters":[[7]],"addresses":{"7":"a:1"}}}"#,
        );
        expected.extend_from_slice(b"{}");
        let bytes = encode(&head(), b"{}").expect("plain data");
        assert_eq!(
            bytes.escape_ascii().to_string(),
            expected.escape_ascii().to_string(),
            "the snapshot's format changed: raise VERSION and read both"
        );
    }

    #[test]
    fn what_was_written_is_read_and_damage_anywhere_is_refused() {
        let directory = TempDir::new().expect("a directory");
        let medium = Directory::new(directory.path());
        let state = serde_json::to_vec(&ClusterState::default()).expect("plain data");
        write(&medium, &head(), &state).expect("it is written");
        let stored = read(&medium).expect("it is whole").expect("it is there");
        assert_eq!(stored.head, head());
        assert_eq!(stored.state, ClusterState::default());
        let file = medium.snapshot_path();
        let whole = fs::read(&file).expect("the file");
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(&file, &damaged).expect("a damaged file");
            assert!(read(&medium).is_err(), "byte {at}");
            fs::write(&file, &whole[..at]).expect("a short file");
            assert!(read(&medium).is_err(), "{at} bytes");
        }
    }
}
