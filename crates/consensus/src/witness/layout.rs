//! What stands on a witness's disk, byte by byte; `docs/witness-disk.md` tells it
//! to people. Numbers are little-endian, checksums CRC-32 (IEEE).

use std::ops::Range;

use holdfast_core::NodeId;
use holdfast_core::witness::{Block, HOSTS, Kept, Seen, Use};
use uuid::Uuid;

/// The newest format that this version reads, and the one that it writes.
pub(crate) const VERSION: u32 = 1;
/// Everything begins at a multiple of this many bytes and is written whole.
pub(crate) const BLOCK: usize = 4096;
/// So many areas hold the log: two for each owner, and those of three owners before
/// it are left alone.
pub(crate) const AREAS: usize = 8;
/// A disk is at least so large, in bytes.
pub(crate) const LEAST: u64 = 32 << 20;
/// Of a larger one no more is used.
const MOST: u64 = 256 << 20;

const SUPERBLOCK: &[u8; 8] = b"HFWITNES";
const LEASE: &[u8; 8] = b"HFWLEASE";
const AREA: &[u8; 8] = b"HFWAREA\0";
const RECORD: &[u8; 8] = b"HFWRECRD";

/// Where the superblock stands, twice.
pub(crate) const SUPERBLOCKS: [u64; 2] = [0, BLOCK as u64];
/// Where the nodes' blocks begin, and behind them the areas' heads: what one look reads.
pub(crate) const LOOK: u64 = 2 * BLOCK as u64;
/// The bytes that one look reads.
pub(crate) const LOOK_BYTES: usize = (HOSTS as usize + AREAS) * BLOCK;
/// Where the areas begin.
pub(crate) const AREAS_AT: u64 = LOOK + LOOK_BYTES as u64;
/// Bytes before the payload of a record.
pub(crate) const RECORD_HEAD: usize = 80;

/// Says that this is a witness's disk, and whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) cluster: Uuid,
    pub(crate) mark: Uuid,
    /// Bytes of each area.
    pub(crate) area: u64,
}

/// Says what an area holds. The one with the greatest epoch and generation counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct AreaHead {
    pub(crate) epoch: u64,
    pub(crate) generation: u64,
    pub(crate) node: NodeId,
    /// Bytes of the snapshot at its beginning; none without a snapshot.
    pub(crate) snapshot: u64,
    pub(crate) snapshot_crc: u32,
    /// Bytes of the log that it began with.
    pub(crate) log: u64,
}

/// Precedes some bytes of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHead {
    pub(crate) epoch: u64,
    pub(crate) generation: u64,
    /// Counts the records of an area, from 0.
    pub(crate) sequence: u64,
    /// Where its bytes stand in the log.
    pub(crate) at: u64,
    pub(crate) bytes: u32,
    pub(crate) crc: u32,
}

/// The area's size on a disk of so many bytes.
pub(crate) fn area_bytes(disk: u64) -> u64 {
    let rest = disk.min(MOST) - AREAS_AT;
    rest / AREAS as u64 / BLOCK as u64 * BLOCK as u64
}

/// How many bytes whole blocks for so many are.
pub(crate) fn whole(bytes: usize) -> usize {
    bytes.div_ceil(BLOCK) * BLOCK
}

/// Where a node's block stands.
pub(crate) fn block_at(node: NodeId) -> u64 {
    LOOK + (node.0 - 1) * BLOCK as u64
}

/// Where an area's head stands.
pub(crate) fn head_at(area: usize) -> u64 {
    LOOK + (HOSTS + area as u64) * BLOCK as u64
}

struct Put {
    bytes: Vec<u8>,
}

impl Put {
    fn new(magic: &[u8; 8]) -> Self {
        Put { bytes: magic.to_vec() }
    }

    fn u32(mut self, number: u32) -> Self {
        self.bytes.extend_from_slice(&number.to_le_bytes());
        self
    }

    fn u64(mut self, number: u64) -> Self {
        self.bytes.extend_from_slice(&number.to_le_bytes());
        self
    }

    fn uuid(mut self, id: Uuid) -> Self {
        self.bytes.extend_from_slice(id.as_bytes());
        self
    }

    fn sealed(self) -> Vec<u8> {
        let crc = crc32fast::hash(&self.bytes);
        self.u32(crc).bytes
    }

    fn block(self) -> Vec<u8> {
        let mut bytes = self.sealed();
        bytes.resize(BLOCK, 0);
        bytes
    }
}

struct Get<'a>(&'a [u8]);

impl<'a> Get<'a> {
    /// The fields, if magic and checksum are right.
    fn open(bytes: &'a [u8], magic: &[u8; 8], length: usize) -> Option<Self> {
        let (body, rest) = bytes.split_at_checked(length)?;
        let crc = u32::from_le_bytes(*rest.first_chunk()?);
        (body.starts_with(magic) && crc32fast::hash(body) == crc).then(|| Get(&body[magic.len()..]))
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn uuid(&mut self) -> Option<Uuid> {
        self.take().map(Uuid::from_bytes)
    }
}

/// What a block that may be a superblock is.
pub(crate) enum FoundSuperblock {
    Valid(Superblock),
    Newer(u32),
    None,
}

impl Superblock {
    const LENGTH: usize = 64;

    pub(crate) fn encode(&self) -> Vec<u8> {
        Put::new(SUPERBLOCK)
            .u32(VERSION)
            .u32(BLOCK as u32)
            .uuid(self.cluster)
            .uuid(self.mark)
            .u32(HOSTS as u32)
            .u32(AREAS as u32)
            .u64(self.area)
            .block()
    }

    pub(crate) fn decode(bytes: &[u8]) -> FoundSuperblock {
        let Some(mut get) = Get::open(bytes, SUPERBLOCK, Self::LENGTH) else { return FoundSuperblock::None };
        let found = (|| {
            let version = get.u32()?;
            let shape = (get.u32()?, get.uuid()?, get.uuid()?, get.u32()?, get.u32()?, get.u64()?);
            Some((version, shape))
        })();
        match found {
            Some((VERSION, (block, cluster, mark, hosts, areas, area)))
                if block as usize == BLOCK && u64::from(hosts) == HOSTS && areas as usize == AREAS =>
            {
                FoundSuperblock::Valid(Superblock { cluster, mark, area })
            }
            Some((version, _)) if version > VERSION => FoundSuperblock::Newer(version),
            _ => FoundSuperblock::None,
        }
    }
}

const BLOCK_LENGTH: usize = 80;

pub(crate) fn encode_block(mark: Uuid, block: &Block) -> Vec<u8> {
    let state = match block.state {
        Use::Idle => 0,
        Use::Claim => 1,
        Use::Own => 2,
    };
    Put::new(LEASE)
        .uuid(mark)
        .u64(block.node.0)
        .u64(block.epoch)
        .u64(block.counter)
        .u32(state)
        .u32(u32::try_from(block.length_ms).unwrap_or(u32::MAX))
        .u64(block.kept.epoch)
        .u64(block.kept.generation)
        .u64(block.kept.length)
        .block()
}

/// What stands where `node`'s block should be. What was written for another mark is
/// a former witness's and counts for nothing.
pub(crate) fn decode_block(mark: Uuid, node: NodeId, bytes: &[u8]) -> Seen {
    if bytes.iter().all(|byte| *byte == 0) {
        return Seen::Empty;
    }
    let decoded = (|| {
        let mut get = Get::open(bytes, LEASE, BLOCK_LENGTH)?;
        if get.uuid()? != mark {
            return Some(Seen::Empty);
        }
        let (writer, epoch, counter) = (NodeId(get.u64()?), get.u64()?, get.u64()?);
        let state = match get.u32()? {
            0 => Use::Idle,
            1 => Use::Claim,
            2 => Use::Own,
            _ => return None,
        };
        let length_ms = get.u32()?.into();
        let kept = Kept { epoch: get.u64()?, generation: get.u64()?, length: get.u64()? };
        (writer == node).then_some(Seen::Block(Block { node, epoch, counter, state, length_ms, kept }))
    })();
    decoded.unwrap_or_else(|| Seen::Torn(crc32fast::hash(bytes).into()))
}

impl AreaHead {
    const LENGTH: usize = 68;

    pub(crate) fn encode(&self, mark: Uuid) -> Vec<u8> {
        Put::new(AREA)
            .uuid(mark)
            .u64(self.epoch)
            .u64(self.generation)
            .u64(self.node.0)
            .u64(self.snapshot)
            .u32(self.snapshot_crc)
            .u64(self.log)
            .block()
    }

    /// `None` for one that was never written whole for this mark.
    pub(crate) fn decode(mark: Uuid, bytes: &[u8]) -> Option<Self> {
        let mut get = Get::open(bytes, AREA, Self::LENGTH)?;
        (get.uuid()? == mark).then_some(())?;
        Some(AreaHead {
            epoch: get.u64()?,
            generation: get.u64()?,
            node: NodeId(get.u64()?),
            snapshot: get.u64()?,
            snapshot_crc: get.u32()?,
            log: get.u64()?,
        })
    }
}

impl RecordHead {
    const LENGTH: usize = RECORD_HEAD - 4;

    /// A whole record, padded to whole blocks.
    pub(crate) fn encode(mark: Uuid, area: &AreaHead, sequence: u64, at: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Put::new(RECORD)
            .uuid(mark)
            .u64(area.epoch)
            .u64(area.generation)
            .u64(sequence)
            .u64(at)
            .u64(payload.len() as u64)
            .u32(crc32fast::hash(payload))
            .u64(0)
            .sealed();
        bytes.extend_from_slice(payload);
        bytes.resize(whole(bytes.len()), 0);
        bytes
    }

    /// The head of a record of this area, if one begins here.
    pub(crate) fn decode(mark: Uuid, area: &AreaHead, bytes: &[u8]) -> Option<Self> {
        let mut get = Get::open(bytes, RECORD, Self::LENGTH)?;
        (get.uuid()? == mark).then_some(())?;
        let head = RecordHead {
            epoch: get.u64()?,
            generation: get.u64()?,
            sequence: get.u64()?,
            at: get.u64()?,
            bytes: u32::try_from(get.u64()?).ok()?,
            crc: get.u32()?,
        };
        (head.epoch == area.epoch && head.generation == area.generation).then_some(head)
    }

    /// Where its payload stands behind its beginning.
    pub(crate) fn payload(&self) -> Range<usize> {
        RECORD_HEAD..RECORD_HEAD + self.bytes as usize
    }
}
