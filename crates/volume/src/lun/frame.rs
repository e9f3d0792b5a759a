//! A frame: some changes in an area, with what makes it recognisable and whole.

use uuid::Uuid;

use super::contents::FileId;
use super::op::Op;
use super::{PAGE_BYTES, Reader};

const MAGIC: u32 = u32::from_le_bytes(*b"HFJ1");
/// Length of what precedes the changes.
const HEAD_BYTES: usize = 72;
/// Where the checksum is; it is over everything else, itself taken as zero.
const CHECKSUM: usize = 52;
/// The most bytes of changes that one frame carries.
pub(super) const MOST_BYTES: usize = 256 << 10;
/// The longest frame, in bytes.
pub(super) const LONGEST: usize = (HEAD_BYTES + MOST_BYTES).next_multiple_of(PAGE_BYTES);

/// What a frame is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The journal: made after the snapshot of its area.
    Journal = 0,
    /// A snapshot that goes on in the next frame.
    Part = 1,
    /// The last frame of a snapshot, or all of it.
    Last = 2,
}

/// Everything about a frame but its changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub kind: Kind,
    pub volume: Uuid,
    /// Counts the times that an area was begun anew, on the whole LUN.
    pub generation: u64,
    /// Counts the frames of this generation, from 0.
    pub sequence: u64,
    /// The epoch of the owner that wrote it.
    pub epoch: u64,
    /// The revision of the volume's description that its changes lead to.
    pub revision: u64,
    /// The greatest number that a file had by then.
    pub last_file: FileId,
}

/// A frame that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub head: Head,
    pub ops: Vec<Op>,
    /// Its length on the LUN in bytes, whole pages.
    pub length: usize,
}

/// The frame's pages. `ops` are encoded changes, at most [`MOST_BYTES`].
pub(super) fn encode(head: &Head, ops: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_le_bytes().to_vec();
    bytes.extend([head.kind as u8, 0, 0, 0]);
    for number in [head.generation, head.sequence, head.epoch, head.revision, head.last_file.0] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend((ops.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(head.volume.as_bytes());
    bytes.extend(ops);
    let checksum = crc32fast::hash(&bytes);
    bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&checksum.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(PAGE_BYTES), 0);
    bytes
}

/// Reads the frame that `bytes` begin with; `None` if there is none, or not a whole one.
pub(super) fn decode(bytes: &[u8]) -> Option<Frame> {
    let mut reader = Reader(bytes);
    if reader.u32()? != MAGIC {
        return None;
    }
    let kind = match reader.array()? {
        [0, 0, 0, 0] => Kind::Journal,
        [1, 0, 0, 0] => Kind::Part,
        [2, 0, 0, 0] => Kind::Last,
        _ => return None,
    };
    let (generation, sequence, epoch, revision) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?);
    let last_file = FileId(reader.u64()?);
    let length = reader.u32()? as usize;
    let checksum = reader.u32()?;
    let volume = Uuid::from_bytes(reader.array()?);
    if length > MOST_BYTES {
        return None;
    }
    let ops = reader.bytes(length)?;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..CHECKSUM]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[CHECKSUM + 4..HEAD_BYTES + length]);
    if hasher.finalize() != checksum {
        return None;
    }
    Some(Frame {
        head: Head { kind, volume, generation, sequence, epoch, revision, last_file },
        ops: Op::decode_all(ops)?,
        length: (HEAD_BYTES + length).next_multiple_of(PAGE_BYTES),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::op::tests::any_op;
    use super::*;

    fn head() -> Head {
        Head {
            kind: Kind::Last,
            volume: Uuid::from_u128(5),
            generation: 1,
            sequence: 2,
            epoch: 3,
            revision: 4,
            last_file: FileId(9),
        }
    }

    proptest! {
        #[test]
        fn a_frame_is_read_as_written_and_damage_is_seen(
            ops in proptest::collection::vec(any_op(), 0..40), at: prop::sample::Index, bit in 0..8,
        ) {
            let mut encoded = Vec::new();
            ops.iter().for_each(|op| op.encode(&mut encoded));
            let mut bytes = encode(&head(), &encoded);
            prop_assert_eq!(decode(&bytes), Some(Frame { head: head(), ops, length: bytes.len() }));
            let used = HEAD_BYTES + encoded.len();
            bytes[at.index(used)] ^= 1_u8 << bit;
            prop_assert_eq!(decode(&bytes), None);
        }

        #[test]
        fn no_bytes_make_it_panic(mut bytes: Vec<u8>) {
            decode(&bytes);
            bytes.splice(0..0, MAGIC.to_le_bytes());
            decode(&bytes);
        }
    }
}
