//! Reading the log after a start: everything that was acknowledged, or a refusal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use holdfast_core::NodeId;
use serde::de::DeserializeOwned;

use super::writer::Layout;
use super::{
    END, FRAME_HEAD_BYTES, HEADER_BYTES, MAGIC, MAX_FRAME_BYTES, OP_HEAD_BYTES, VERSION, frame_head_crc, header,
};
use crate::error::ConsensusError;
use crate::medium::Medium;
use crate::record::{EntryRecord, Position, VoteRecord};
use crate::types::Entry;

/// The log as it was acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    pub(crate) entries: BTreeMap<u64, Entry>,
    pub(crate) vote: Option<VoteRecord>,
    pub(crate) committed: Option<Position>,
    pub(crate) purged: Option<Position>,
    pub(super) layout: Layout,
}

/// Reads the log, or creates it if `may_create`, and says where it ends.
pub(crate) fn recover(medium: &dyn Medium, node: NodeId, may_create: bool) -> Result<(Recovered, u64), ConsensusError> {
    let path = medium.log_path();
    let bytes = match medium.read_log()? {
        Some(bytes) => bytes,
        None if may_create => {
            let bytes = header(node.0).to_vec();
            medium.create_log(&bytes)?;
            bytes
        }
        None => return Err(corrupt(&path, 0, "the file is missing although there is a snapshot")),
    };
    let (recovered, end) = parse(&path, &bytes, node)?;
    let acknowledged = medium.acknowledged();
    if (end as u64) < acknowledged {
        let what = format!("it ends there, but {acknowledged} bytes of it had been written for certain: it was cut");
        return Err(corrupt(&path, end as u64, what));
    }
    if end < bytes.len() {
        tracing::warn!(
            file = %path.display(), offset = end, bytes = bytes.len() - end,
            "cutting off an incomplete write at the end of the log: a crash interrupted it and nobody was told that it was done"
        );
        medium.cut_log(end as u64)?;
    }
    Ok((recovered, end as u64))
}

fn corrupt(path: &Path, offset: u64, what: impl Into<String>) -> ConsensusError {
    ConsensusError::Corrupt { file: path.to_owned(), offset, what: what.into() }
}

/// A little-endian number at `at`; the callers have checked the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut number = [0; 4];
    number.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(number)
}

/// The state after all complete frames, and where the last of them ends.
pub(super) fn parse(path: &Path, bytes: &[u8], node: NodeId) -> Result<(Recovered, usize), ConsensusError> {
    check_header(path, bytes, node)?;
    let mut reader = Reader { path: path.to_owned(), state: Recovered::default() };
    let mut at = HEADER_BYTES;
    while let Some(body) = next_frame(path, bytes, at)? {
        reader.body(at + FRAME_HEAD_BYTES, body)?;
        at += FRAME_HEAD_BYTES + body.len() + 1;
    }
    Ok((reader.state, at))
}

fn check_header(path: &Path, bytes: &[u8], node: NodeId) -> Result<(), ConsensusError> {
    if bytes.len() < HEADER_BYTES || &bytes[..7] != MAGIC {
        return Err(corrupt(path, 0, "it does not begin like a log"));
    }
    if u32_at(bytes, 16) != crc32fast::hash(&bytes[..16]) {
        return Err(corrupt(path, 0, "the checksum of its header is wrong"));
    }
    if bytes[7] > VERSION {
        return Err(ConsensusError::TooNew { file: path.to_owned(), found: bytes[7], known: VERSION });
    }
    let mut found = [0; 8];
    found.copy_from_slice(&bytes[8..16]);
    let found = NodeId(u64::from_le_bytes(found));
    if found != node {
        return Err(ConsensusError::OtherNode { file: path.to_owned(), found, expected: node });
    }
    Ok(())
}

/// The body of the frame at `at`, `None` at the end of what was acknowledged.
fn next_frame<'a>(path: &Path, bytes: &'a [u8], at: usize) -> Result<Option<&'a [u8]>, ConsensusError> {
    let rest = &bytes[at..];
    let offset = at as u64;
    let zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    if rest.len() <= FRAME_HEAD_BYTES || zero(rest) {
        return Ok(None);
    }
    let length = u32_at(rest, 0);
    if u32_at(rest, 4) != frame_head_crc(offset, length) {
        // Cut within the head, in a file that had grown already.
        if zero(&rest[FRAME_HEAD_BYTES..]) {
            return Ok(None);
        }
        return Err(corrupt(path, offset, "the head of a record is wrong"));
    }
    if length > MAX_FRAME_BYTES {
        return Err(corrupt(path, offset, "a record is impossibly long"));
    }
    let end = FRAME_HEAD_BYTES + length as usize;
    if rest.len() <= end {
        return Ok(None);
    }
    // Zeros where the last frame should end: the file had grown, its blocks had
    // not been written yet.
    if rest[end] == 0 && rest.len() == end + 1 {
        return Ok(None);
    }
    let body = &rest[FRAME_HEAD_BYTES..end];
    if rest[end] != END || u32_at(rest, 8) != crc32fast::hash(body) {
        return Err(corrupt(path, offset, "the checksum of a record is wrong"));
    }
    Ok(Some(body))
}

struct Reader {
    path: PathBuf,
    state: Recovered,
}

impl Reader {
    fn body(&mut self, start: usize, body: &[u8]) -> Result<(), ConsensusError> {
        let mut at = 0;
        while at < body.len() {
            let offset = (start + at) as u64;
            let rest = &body[at..];
            let length = match rest.len() {
                n if n < OP_HEAD_BYTES => return Err(self.unreadable(offset, "it is too short")),
                _ => u32_at(rest, 1) as usize,
            };
            let Some(payload) = rest.get(OP_HEAD_BYTES..OP_HEAD_BYTES + length) else {
                return Err(self.unreadable(offset, "it is too short"));
            };
            self.op(rest[0], offset, payload)?;
            at += OP_HEAD_BYTES + length;
        }
        Ok(())
    }

    fn op(&mut self, kind: u8, offset: u64, payload: &[u8]) -> Result<(), ConsensusError> {
        let place = (offset, OP_HEAD_BYTES + payload.len());
        match kind {
            1 => {
                let record: EntryRecord = self.json(offset, payload)?;
                let (index, term) = (record.index, record.term);
                let before = self.state.entries.last_key_value().map(|(index, _)| *index);
                let first = self.state.purged.map_or(0, |purged| purged.index + 1);
                let next = before.map_or(first, |before| before + 1);
                if index > next {
                    let what = format!("entry {index} of term {term} comes where {next} was due");
                    return Err(self.unreadable(offset, &what));
                }
                let entry = record.restore().map_err(|what| self.unreadable(offset, &what))?;
                self.state.entries.split_off(&index);
                self.state.entries.insert(index, entry);
                self.state.layout.entry(index, place);
            }
            2 => {
                self.state.vote = Some(self.json(offset, payload)?);
                self.state.layout.vote = Some(place);
            }
            3 => {
                self.state.committed = self.json(offset, payload)?;
                self.state.layout.committed = Some(place);
            }
            4 => {
                let keep: Option<u64> = self.json(offset, payload)?;
                self.state.entries.split_off(&keep.map_or(0, |keep| keep + 1));
                self.state.layout.truncate(keep);
            }
            5 => {
                let up_to: Position = self.json(offset, payload)?;
                self.state.entries = self.state.entries.split_off(&(up_to.index + 1));
                self.state.purged = Some(up_to);
                self.state.layout.purge(up_to.index, place);
            }
            kind => {
                return Err(self.unreadable(offset, &format!("kind {kind} is unknown")));
            }
        }
        Ok(())
    }

    fn json<T: DeserializeOwned>(&self, offset: u64, payload: &[u8]) -> Result<T, ConsensusError> {
        serde_json::from_slice(payload).map_err(|e| self.unreadable(offset, &e.to_string()))
    }

    fn unreadable(&self, offset: u64, what: &str) -> ConsensusError {
        corrupt(&self.path, offset, format!("a record cannot be understood ({what}); perhaps a newer version wrote it"))
    }
}
