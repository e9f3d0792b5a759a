//! The record disk as its one writer sees it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::records::{self, Aligned, Record, SECTOR_BYTES};
use crate::sys;

/// Why there is no record disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Opening or reading failed.
    #[error("cannot use the record disk {path}: {source}")]
    Io {
        /// The device.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// No room for the header and one record.
    #[error("the record disk {path} has {bytes} bytes: attach one of at least 1 KiB")]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The header promises more than the device has.
    #[error("the record disk {path} was cut to {bytes} bytes but its header promises {slots} records")]
    Shrunk {
        /// The device.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// What the header says.
        slots: u64,
    },
    /// Something else lives there.
    #[error("{path} holds something that is not a record disk: attach an empty one, nothing was written")]
    Foreign {
        /// The device.
        path: PathBuf,
    },
}

/// An open record disk: appends go behind the highest record that it held when opened.
#[derive(Debug)]
pub struct RecordDisk {
    file: File,
    slots: u64,
    next: u64,
    epoch: u64,
    boot_id: u64,
}

impl RecordDisk {
    /// Opens the disk, formats it when it is empty, and finds its end. `direct` bypasses the page
    /// cache, as the guest does with its block device.
    ///
    /// # Errors
    /// [`DiskError`]; nothing is written unless the first sector is empty.
    pub fn open(path: &Path, boot_id: u64, direct: bool) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Io { path: path.to_owned(), source };
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let mut file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map_err(failed)?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if bytes < 2 * SECTOR_BYTES as u64 {
            return Err(DiskError::TooSmall { path: path.to_owned(), bytes });
        }
        let mut header = Aligned([0; SECTOR_BYTES]);
        file.read_exact_at(&mut header.0, 0).map_err(failed)?;
        let room = bytes / SECTOR_BYTES as u64 - 1;
        let slots = if header.0.iter().all(|byte| *byte == 0) {
            header.0 = records::encode_header(room);
            file.write_all_at(&header.0, 0).map_err(failed)?;
            file.sync_data().map_err(failed)?;
            room
        } else {
            // A disk that grew keeps its layout: its records stay where the header says.
            records::decode_header(&header.0).ok_or_else(|| DiskError::Foreign { path: path.to_owned() })?
        };
        if slots > room {
            return Err(DiskError::Shrunk { path: path.to_owned(), bytes, slots });
        }
        let last = records::highest(&file, slots).map_err(failed)?;
        Ok(RecordDisk {
            file,
            slots,
            next: last.map_or(1, |record| record.sequence + 1),
            epoch: last.map_or(1, |record| record.epoch + 1),
            boot_id,
        })
    }

    /// The highest record that is on stable storage (0: none).
    pub fn last(&self) -> u64 {
        self.next - 1
    }

    /// One more than the epoch of the last record of earlier boots.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Appends `count` records and returns the first one's sequence once all of them are on stable
    /// storage.
    ///
    /// # Errors
    /// The disk's. None of the records is then acknowledged to anybody, so the next call writes the
    /// same sequences again.
    pub fn append(&mut self, count: u64) -> io::Result<u64> {
        let first = self.next;
        let mut sector = Aligned([0; SECTOR_BYTES]);
        for sequence in first..first + count {
            let uptime_ns = u64::try_from(sys::uptime().as_nanos()).unwrap_or(u64::MAX);
            let record = Record { sequence, epoch: self.epoch, boot_id: self.boot_id, uptime_ns };
            sector.0 = record.encode();
            self.file.write_all_at(&sector.0, records::offset(sequence, self.slots))?;
        }
        self.file.sync_data()?;
        self.next += count;
        Ok(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verify::{Acknowledged, RecordsReport};

    #[test]
    fn sequence_goes_on_across_boots() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(20 * SECTOR_BYTES as u64).unwrap();
        for boot in 1..=12_u64 {
            let mut disk = RecordDisk::open(image.path(), 100 + boot, false).unwrap();
            assert_eq!((disk.last(), disk.epoch()), ((boot - 1) * 5, boot));
            assert_eq!(disk.append(2).unwrap(), (boot - 1) * 5 + 1);
            assert_eq!(disk.append(3).unwrap(), (boot - 1) * 5 + 3);
        }
        let report = RecordsReport::read(image.path()).unwrap();
        assert_eq!((report.slots, report.highest, report.present), (19, 60, 19));
        assert_eq!((report.missing.len(), report.corrupt_sectors.len()), (0, 0));
        assert_eq!(report.lost(&[Acknowledged { sequence: 60, boot_id: 112 }]), []);
    }

    #[test]
    fn foreign_small_and_shrunk_disks_are_left_alone() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || RecordDisk::open(image.path(), 1, false);
        assert!(matches!(open(), Err(DiskError::TooSmall { bytes: 0, .. })));
        image.as_file().set_len(1 << 20).unwrap();
        image.as_file().write_all_at(b"a boot sector", 0).unwrap();
        assert!(matches!(open(), Err(DiskError::Foreign { .. })));
        image.as_file().write_all_at(&records::encode_header(1 << 20), 0).unwrap();
        assert!(matches!(open(), Err(DiskError::Shrunk { .. })));
    }
}
