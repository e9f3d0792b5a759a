//! The durable log: one append-only file, `log`.
//!
//! ```text
//! file    = header frame*
//! header  = "HFLOG\0\0" version:u8 node:u64 crc:u32            crc of the 16 bytes before it
//! frame   = length:u32 head:u32 crc:u32 body[length] 0x17      one write and one fdatasync
//! body    = (kind:u8 length:u32 payload[length])*              payload is JSON (record.rs)
//! kind    = 1 entry · 2 vote · 3 committed · 4 truncate · 5 purge
//! ```
//! Numbers are little-endian, checksums CRC-32 (IEEE). `head` covers the frame's
//! offset in the file and its length, `crc` the body. An entry replaces the one
//! at its index and everything behind it.
//!
//! A frame is acknowledged after fdatasync, and the next one is written only then.
//! So a crash can leave at most one incomplete frame, the last, which nobody was
//! told about: the file ends inside it, or its end reads as zeros. That is cut off.
//! When what is cut off was acknowledged after all, by the note of [`crate::mark`],
//! the log was truncated. That and everything else that does not check out is damage, and damage is never repaired
//! by forgetting: [`recover`] refuses it and leaves the file alone.
//!
//! Room comes back by [`writer`] copying what is still needed to `log.new` and
//! renaming that over `log`.

mod recover;
mod writer;

#[cfg(test)]
mod tests;

use serde::Serialize;

pub(crate) use recover::{Recovered, recover};
pub(crate) use writer::Wal;

use crate::record::{EntryRecord, Position, VoteRecord};

/// The file's name.
pub(crate) const FILE: &str = "log";
/// Where a smaller replacement is written.
pub(crate) const NEW_FILE: &str = "log.new";
/// The newest format that this version reads, and the one that it writes.
pub(crate) const VERSION: u8 = 1;

const MAGIC: &[u8; 7] = b"HFLOG\0\0";
const HEADER_BYTES: usize = 20;
const FRAME_HEAD_BYTES: usize = 12;
const OP_HEAD_BYTES: usize = 5;
/// Ends a frame. Not zero, so that the end of a frame that was never written differs.
const END: u8 = 0x17;
/// No frame is longer: a batch stops growing at [`BATCH_BYTES`], and one
/// proposal is limited by the API to far less than the rest.
const MAX_FRAME_BYTES: u32 = 64 << 20;
/// A batch takes no further jobs beyond this.
const BATCH_BYTES: usize = 1 << 20;

/// What an operation does to the set of bytes that are still needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Entry(u64),
    Vote,
    Committed,
    /// Keeps entries up to this index, or none.
    Truncate(Option<u64>),
    /// Drops entries up to this index.
    Purge(u64),
}

/// One operation, encoded.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    bytes: Vec<u8>,
    effect: Effect,
}

impl Op {
    pub(crate) fn entry(record: &EntryRecord) -> serde_json::Result<Op> {
        Self::encode(1, record, Effect::Entry(record.index))
    }

    pub(crate) fn vote(record: VoteRecord) -> serde_json::Result<Op> {
        Self::encode(2, &record, Effect::Vote)
    }

    pub(crate) fn committed(at: Option<Position>) -> serde_json::Result<Op> {
        Self::encode(3, &at, Effect::Committed)
    }

    pub(crate) fn truncate_after(keep: Option<u64>) -> serde_json::Result<Op> {
        Self::encode(4, &keep, Effect::Truncate(keep))
    }

    pub(crate) fn purge(up_to: Position) -> serde_json::Result<Op> {
        Self::encode(5, &up_to, Effect::Purge(up_to.index))
    }

    fn encode(kind: u8, payload: &impl Serialize, effect: Effect) -> serde_json::Result<Op> {
        let mut bytes = vec![kind, 0, 0, 0, 0];
        serde_json::to_writer(&mut bytes, payload)?;
        // A payload beyond 4 GiB cannot be built from a proposal, and the writer
        // refuses any that is too long for a frame long before.
        let length = u32::try_from(bytes.len() - OP_HEAD_BYTES).unwrap_or(u32::MAX);
        bytes[1..OP_HEAD_BYTES].copy_from_slice(&length.to_le_bytes());
        Ok(Op { bytes, effect })
    }
}

fn header(node: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..7].copy_from_slice(MAGIC);
    bytes[7] = VERSION;
    bytes[8..16].copy_from_slice(&node.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..16]);
    bytes[16..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn frame_head_crc(offset: u64, length: u32) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&offset.to_le_bytes());
    hasher.update(&length.to_le_bytes());
    hasher.finalize()
}

/// A whole frame for `offset`, or `None` if the body is too long for one.
fn frame(offset: u64, body: &[u8]) -> Option<Vec<u8>> {
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= MAX_FRAME_BYTES)?;
    let mut bytes = Vec::with_capacity(FRAME_HEAD_BYTES + body.len() + 1);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&frame_head_crc(offset, length).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes.push(END);
    Some(bytes)
}
