//! Reads a record disk's image offline and says which records are there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::records::{self, Record, SECTOR_BYTES, Slot};

/// Why an image could not be read.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Reading failed.
    #[error("cannot read the record disk {path}")]
    Read {
        /// The image.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No header: no guest has used this image as its record disk, or it is not raw.
    #[error("{path} does not start with a record disk's header: is it a raw image that a guest has used?")]
    NoHeader {
        /// The image.
        path: PathBuf,
    },
}

/// A write that the guest has acknowledged as durable.
///
/// It names the boot too: after a split brain two guests would both have written the same
/// sequence, and the number alone would look as if nothing were lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Acknowledged {
    /// The record.
    pub sequence: u64,
    /// The boot that wrote it.
    pub boot_id: u64,
}

/// What an image holds.
#[derive(Debug, Clone)]
pub struct RecordsReport {
    /// Slots of the ring.
    pub slots: u64,
    /// The highest record (0: none).
    pub highest: u64,
    /// How many records are whole and in their place.
    pub present: u64,
    /// Sequences that the ring should still hold but does not.
    pub missing: Vec<u64>,
    /// Sectors that hold something that is not a whole record of that place.
    pub corrupt_sectors: Vec<u64>,
    /// The boot of each epoch that is still in the ring.
    pub boots: BTreeMap<u64, u64>,
    by_slot: Vec<Option<Record>>,
}

impl RecordsReport {
    /// Reads the raw image at `path`.
    ///
    /// # Errors
    /// [`VerifyError`] when it cannot be read or has no header.
    pub fn read(path: &Path) -> Result<Self, VerifyError> {
        let failed = |source| VerifyError::Read { path: path.to_owned(), source };
        let disk = File::open(path).map_err(failed)?;
        let mut header = [0; SECTOR_BYTES];
        disk.read_exact_at(&mut header, 0).map_err(failed)?;
        let slots = records::decode_header(&header).ok_or_else(|| VerifyError::NoHeader { path: path.to_owned() })?;
        let mut by_slot = Vec::new();
        let mut corrupt_sectors = Vec::new();
        let mut boots = BTreeMap::new();
        records::for_each_slot(&disk, slots, |index, slot| {
            let here = match slot {
                Slot::Valid(record) if (record.sequence - 1) % slots == index => Some(record),
                Slot::Empty => None,
                Slot::Valid(_) | Slot::Corrupt => {
                    corrupt_sectors.push(1 + index);
                    None
                }
            };
            boots.extend(here.map(|record| (record.epoch, record.boot_id)));
            by_slot.push(here);
        })
        .map_err(failed)?;
        let highest = by_slot.iter().flatten().map(|record| record.sequence).max().unwrap_or(0);
        let mut report =
            RecordsReport { slots, highest, present: 0, missing: Vec::new(), corrupt_sectors, boots, by_slot };
        report.present = report.by_slot.iter().flatten().count() as u64;
        report.missing =
            (report.oldest_expected()..=highest).filter(|sequence| report.record(*sequence).is_none()).collect();
        Ok(report)
    }

    /// The record with this sequence, if the ring holds it.
    pub fn record(&self, sequence: u64) -> Option<Record> {
        let slot = usize::try_from(sequence.checked_sub(1)? % self.slots).ok()?;
        self.by_slot.get(slot).copied().flatten().filter(|record| record.sequence == sequence)
    }

    /// The acknowledged writes that are not there, or were overwritten by another boot under the
    /// same number. Those that the ring itself has overwritten by a later lap are not counted.
    pub fn lost(&self, acknowledged: &[Acknowledged]) -> Vec<Acknowledged> {
        acknowledged
            .iter()
            .filter(|write| write.sequence >= self.oldest_expected())
            .filter(|write| self.record(write.sequence).is_none_or(|record| record.boot_id != write.boot_id))
            .copied()
            .collect()
    }

    fn oldest_expected(&self) -> u64 {
        self.highest.saturating_sub(self.slots) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(slots: u64, present: &[u64]) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len((1 + slots) * SECTOR_BYTES as u64).unwrap();
        image.as_file().write_all_at(&records::encode_header(slots), 0).unwrap();
        for sequence in present {
            let record = Record { sequence: *sequence, epoch: 1, boot_id: 7, uptime_ns: 0 };
            image.as_file().write_all_at(&record.encode(), records::offset(*sequence, slots)).unwrap();
        }
        image
    }

    fn acknowledged(sequences: &[u64]) -> Vec<Acknowledged> {
        sequences.iter().map(|sequence| Acknowledged { sequence: *sequence, boot_id: 7 }).collect()
    }

    #[test]
    fn whole_disk_has_nothing_lost() {
        let image = image(10, &[1, 2, 3]);
        let report = RecordsReport::read(image.path()).unwrap();
        assert_eq!((report.highest, report.present, report.missing.len()), (3, 3, 0));
        assert_eq!(report.lost(&acknowledged(&[1, 2, 3])), []);
        assert_eq!(report.boots, BTreeMap::from([(1, 7)]));
    }

    #[test]
    fn holes_tears_and_tails_are_reported() {
        let image = image(10, &[1, 2, 4, 5]);
        image.as_file().write_all_at(b"torn", records::offset(2, 10) + 50).unwrap();
        let report = RecordsReport::read(image.path()).unwrap();
        assert_eq!(report.missing, [2, 3]);
        assert_eq!(report.corrupt_sectors, [2]);
        assert_eq!(report.lost(&acknowledged(&[1, 2, 4, 6])), acknowledged(&[2, 6]));
    }

    #[test]
    fn another_boots_record_under_the_same_number_is_a_loss() {
        let image = image(10, &[1, 2]);
        let report = RecordsReport::read(image.path()).unwrap();
        let foreign = Acknowledged { sequence: 2, boot_id: 8 };
        assert_eq!(report.lost(&[foreign]), [foreign]);
    }

    #[test]
    fn overwritten_laps_are_no_loss() {
        let image = image(4, &[1, 2, 3, 4, 5, 6]);
        let report = RecordsReport::read(image.path()).unwrap();
        assert_eq!((report.highest, report.present), (6, 4));
        assert_eq!(report.missing, []);
        assert_eq!(report.lost(&acknowledged(&[1, 2, 3, 6])), []);
    }

    #[test]
    fn foreign_or_short_images_are_refused() {
        let image = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(RecordsReport::read(image.path()), Err(VerifyError::Read { .. })));
        image.as_file().set_len(4096).unwrap();
        assert!(matches!(RecordsReport::read(image.path()), Err(VerifyError::NoHeader { .. })));
    }
}
