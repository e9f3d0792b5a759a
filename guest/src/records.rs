//! The records on the guest's disk.
//!
//! Sector 0 is a header that is written once and never again, so no crash can tear it while
//! records depend on it. Record `n` (from 1) lies in sector `1 + (n - 1) % slots`: a ring. Within
//! one lap the records are dense, so the highest one is found by a binary search.
//!
//! ```text
//! header  0 magic "HFDISK01"   8 slots u64                                       508 crc32 u32
//! record  0 magic "HFRECORD"   8 sequence u64  16 epoch u64  24 boot_id u64
//!         32 uptime_ns u64     40 filler, made from the sequence                  508 crc32 u32
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a sector, of the header and of a record.
pub const SECTOR_BYTES: usize = 512;

const HEADER_MAGIC: [u8; 8] = *b"HFDISK01";
const RECORD_MAGIC: [u8; 8] = *b"HFRECORD";
const CRC_AT: usize = SECTOR_BYTES - 4;
/// Slots that one probe of the search reads: a single damaged record must not hide all after it.
const PROBE_SLOTS: u64 = 8;
const PROBE_BYTES: usize = PROBE_SLOTS as usize * SECTOR_BYTES;
const CHUNK_SLOTS: u64 = 128;

/// A buffer that direct I/O accepts.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Aligned<const N: usize>(pub [u8; N]);

/// One record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// From 1, strictly increasing over all boots.
    pub sequence: u64,
    /// How often a booting guest has opened the disk.
    pub epoch: u64,
    /// Which boot wrote it.
    pub boot_id: u64,
    /// Nanoseconds since that boot.
    pub uptime_ns: u64,
}

/// What a sector holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Zeroes: never written.
    Empty,
    /// Something that is not a whole record.
    Corrupt,
    /// A record whose checksum is right.
    Valid(Record),
}

impl Record {
    /// The sector of the record.
    pub fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        bytes[..8].copy_from_slice(&RECORD_MAGIC);
        for (at, value) in [(8, self.sequence), (16, self.epoch), (24, self.boot_id), (32, self.uptime_ns)] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        for (index, byte) in bytes[40..CRC_AT].iter_mut().enumerate() {
            *byte = (self.sequence as u8).wrapping_mul(31).wrapping_add(index as u8);
        }
        seal(&mut bytes);
        bytes
    }
}

impl Slot {
    /// Reads a sector.
    pub fn decode(bytes: &[u8; SECTOR_BYTES]) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            return Slot::Empty;
        }
        if bytes[..8] != RECORD_MAGIC || !sealed(bytes) || u64_at(bytes, 8) == 0 {
            return Slot::Corrupt;
        }
        Slot::Valid(Record {
            sequence: u64_at(bytes, 8),
            epoch: u64_at(bytes, 16),
            boot_id: u64_at(bytes, 24),
            uptime_ns: u64_at(bytes, 32),
        })
    }
}

/// The header for a ring of `slots` records.
pub fn encode_header(slots: u64) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    bytes[..8].copy_from_slice(&HEADER_MAGIC);
    bytes[8..16].copy_from_slice(&slots.to_le_bytes());
    seal(&mut bytes);
    bytes
}

/// The number of slots that a header promises; `None` when the sector is not a header.
pub fn decode_header(bytes: &[u8; SECTOR_BYTES]) -> Option<u64> {
    let slots = u64_at(bytes, 8);
    (bytes[..8] == HEADER_MAGIC && sealed(bytes) && slots > 0).then_some(slots)
}

/// Where the sector of a record starts, in bytes.
pub fn offset(sequence: u64, slots: u64) -> u64 {
    (1 + (sequence - 1) % slots) * SECTOR_BYTES as u64
}

/// Finds the highest record of a disk with `slots` slots. `Ok(None)`: it holds none.
///
/// Reads about `log2(slots)` times 4 KiB; only when slot 0 is unreadable, all of the disk.
///
/// # Errors
/// When the disk cannot be read.
pub fn highest(disk: &File, slots: u64) -> io::Result<Option<Record>> {
    let base = match read_slots(disk, 0, slots)?[0] {
        Slot::Valid(first) => first.sequence,
        // Slot 0 is the first that is ever written: empty means that nothing was.
        Slot::Empty => return Ok(None),
        Slot::Corrupt => return highest_of_all(disk, slots),
    };
    // The last record of this lap at or shortly behind slot `at`.
    let in_lap = |at: u64| -> io::Result<Option<Record>> {
        let mut last = None;
        for (index, slot) in (at..).zip(read_slots(disk, at, slots)?) {
            if let Slot::Valid(record) = slot
                && Some(record.sequence) == base.checked_add(index)
            {
                last = Some(record);
            }
        }
        Ok(last)
    };
    let (mut low, mut high) = (0, slots);
    let mut found = in_lap(0)?;
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match in_lap(middle)? {
            Some(record) => {
                low = middle;
                found = found.max_by_sequence(record);
            }
            None => high = middle,
        }
    }
    Ok(found)
}

/// Calls `visit` with every slot's index and content.
///
/// # Errors
/// When the disk cannot be read.
pub fn for_each_slot(disk: &File, slots: u64, mut visit: impl FnMut(u64, Slot)) -> io::Result<()> {
    let mut buffer = Box::new(Aligned([0; CHUNK_SLOTS as usize * SECTOR_BYTES]));
    let mut at = 0;
    while at < slots {
        let count = CHUNK_SLOTS.min(slots - at);
        let bytes = &mut buffer.0[..count as usize * SECTOR_BYTES];
        disk.read_exact_at(bytes, (1 + at) * SECTOR_BYTES as u64)?;
        for (index, sector) in (at..).zip(bytes.as_chunks::<SECTOR_BYTES>().0) {
            visit(index, Slot::decode(sector));
        }
        at += count;
    }
    Ok(())
}

fn highest_of_all(disk: &File, slots: u64) -> io::Result<Option<Record>> {
    let mut found: Option<Record> = None;
    for_each_slot(disk, slots, |index, slot| {
        if let Slot::Valid(record) = slot
            && (record.sequence - 1) % slots == index
        {
            found = found.max_by_sequence(record);
        }
    })?;
    Ok(found)
}

fn read_slots(disk: &File, at: u64, slots: u64) -> io::Result<Vec<Slot>> {
    let count = PROBE_SLOTS.min(slots - at) as usize;
    let mut buffer = Aligned([0; PROBE_BYTES]);
    let bytes = &mut buffer.0[..count * SECTOR_BYTES];
    disk.read_exact_at(bytes, (1 + at) * SECTOR_BYTES as u64)?;
    Ok(bytes.as_chunks::<SECTOR_BYTES>().0.iter().map(Slot::decode).collect())
}

trait MaxBySequence {
    fn max_by_sequence(self, other: Record) -> Self;
}

impl MaxBySequence for Option<Record> {
    fn max_by_sequence(self, other: Record) -> Self {
        match self {
            Some(record) if record.sequence >= other.sequence => Some(record),
            _ => Some(other),
        }
    }
}

fn seal(bytes: &mut [u8; SECTOR_BYTES]) {
    let crc = crc32fast::hash(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
}

fn sealed(bytes: &[u8; SECTOR_BYTES]) -> bool {
    bytes[CRC_AT..] == crc32fast::hash(&bytes[..CRC_AT]).to_le_bytes()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(sequence: u64) -> Record {
        Record { sequence, epoch: 3, boot_id: 7, uptime_ns: 11 }
    }

    /// A ring of `slots` slots that holds the records 1..=last as a guest would have left them.
    fn ring(slots: u64, last: u64) -> File {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len((1 + slots) * SECTOR_BYTES as u64).unwrap();
        for sequence in 1..=last {
            disk.write_all_at(&record(sequence).encode(), offset(sequence, slots)).unwrap();
        }
        disk
    }

    fn damage(disk: &File, sequence: u64, slots: u64) {
        disk.write_all_at(b"torn", offset(sequence, slots) + 100).unwrap();
    }

    #[test]
    fn record_and_header_survive_the_disk() {
        assert_eq!(Slot::decode(&record(42).encode()), Slot::Valid(record(42)));
        assert_eq!(decode_header(&encode_header(99)), Some(99));
        assert_eq!(Slot::decode(&[0; SECTOR_BYTES]), Slot::Empty);
        for at in 0..SECTOR_BYTES {
            let mut bytes = record(42).encode();
            bytes[at] ^= 0x40;
            assert_eq!(Slot::decode(&bytes), Slot::Corrupt, "byte {at} changed unseen");
        }
    }

    #[test]
    fn highest_is_found_at_every_fill_level() {
        for slots in [1, 2, 7, 8, 9, 33] {
            for last in 0..=3 * slots + 1 {
                let found = highest(&ring(slots, last), slots).unwrap();
                assert_eq!(found.map_or(0, |record| record.sequence), last, "{slots} slots");
            }
        }
    }

    #[test]
    fn one_damaged_record_hides_no_later_one() {
        for slots in [33, 64] {
            for last in 2_u64..=2 * slots {
                for damaged in (last.saturating_sub(slots) + 1)..last {
                    let disk = ring(slots, last);
                    damage(&disk, damaged, slots);
                    let found = highest(&disk, slots).unwrap().unwrap();
                    assert_eq!(found.sequence, last, "{slots} slots, {damaged} damaged");
                }
            }
        }
    }

    #[test]
    fn torn_last_record_is_not_counted() {
        let disk = ring(64, 40);
        damage(&disk, 40, 64);
        assert_eq!(highest(&disk, 64).unwrap().unwrap().sequence, 39);
    }
}
