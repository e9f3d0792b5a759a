//! A LUN as this process has it open.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::buffer::Pool;
use crate::export::{Fence, Open, OpenError, end, open};
use crate::lun::Device;

/// What one read or write of zeroes or of a description moves at most, in bytes.
const PIECE_BYTES: usize = 1 << 20;

/// How often somebody else's lock is looked at.
const HOLD_AGAIN: Duration = Duration::from_millis(1);

/// A block device, or a file in its place, that holds a volume. Clones are the same
/// open device; a process has one for each LUN.
#[derive(Clone, Debug)]
pub struct Lun {
    pub(crate) file: Arc<File>,
    pub(crate) block: u32,
    path: PathBuf,
    bytes: u64,
    pool: Arc<Mutex<Pool>>,
}

impl Lun {
    /// Opens it for reading and writing, past the page cache where that can be.
    ///
    /// # Errors
    /// [`OpenError`] says what it is instead.
    pub fn open(path: &Path) -> Result<Lun, OpenError> {
        let failed = |source| OpenError::Io { path: path.into(), source };
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind { path: path.into() });
        }
        let (file, block) = open(path, true).map_err(failed)?;
        let bytes = end(&file).map_err(failed)?;
        Ok(Lun { file: Arc::new(file), block, path: path.into(), bytes, pool: Arc::default() })
    }

    /// The device or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes the LUN for this process, and so waits until no I/O is under way of a
    /// process of this host that had it before, even if that was killed: the kernel
    /// may finish what a dead process has submitted, and that must not come after what
    /// this one submits. `false` if that did not happen within `patience`. The lock is
    /// that of flock(2); it is over when this device and its clones are.
    ///
    /// # Errors
    /// The system's.
    pub fn hold(&self, patience: Duration) -> io::Result<bool> {
        hold(&self.file, patience)
    }

    /// Makes a range read as zero, on stable storage. Takes as long as the device
    /// needs: where it cannot do this by itself, zeroes are written.
    ///
    /// # Errors
    /// The system's; some of the range may have been zeroed.
    pub fn wipe(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.wipe_while(at, bytes, &Open).map(drop)
    }

    /// As [`Lun::wipe`], piece by piece, for as long as `fence` is open: `false` if it
    /// was closed before the end.
    ///
    /// # Errors
    /// The system's; some of the range may have been zeroed.
    pub fn wipe_while(&self, at: u64, bytes: u64, fence: &dyn Fence) -> io::Result<bool> {
        let ways = [FallocateFlags::FALLOC_FL_ZERO_RANGE, FallocateFlags::FALLOC_FL_PUNCH_HOLE];
        let mut zeroes = None;
        let mut done = 0;
        while done < bytes {
            if !fence.may_write() {
                return Ok(false);
            }
            let (from, length) = (at + done, (bytes - done).min(PIECE_BYTES as u64));
            if zeroes.is_some() || !ways.into_iter().any(|way| self.allocate(way, from, length).is_ok()) {
                // The device did not answer at once, perhaps.
                if !fence.may_write() {
                    return Ok(false);
                }
                let zeroes = zeroes.get_or_insert_with(|| self.buffer(PIECE_BYTES));
                self.file.write_all_at(&zeroes.bytes()[..length as usize], from)?;
            }
            done += length;
        }
        self.file.sync_data()?;
        Ok(true)
    }

    /// Tells the device that what is in a range is not needed any more; what it reads
    /// as afterwards is not known. A device that cannot be told is no error.
    ///
    /// # Errors
    /// The system's.
    pub fn discard(&self, at: u64, bytes: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, at, bytes) {
            Err(Errno::EOPNOTSUPP) | Ok(()) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn allocate(&self, way: FallocateFlags, at: u64, bytes: u64) -> nix::Result<()> {
        let offset = |bytes: u64| i64::try_from(bytes).map_err(|_| Errno::EINVAL);
        loop {
            match fallocate(&*self.file, way | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset(at)?, offset(bytes)?) {
                Err(Errno::EINTR) => {}
                outcome => return outcome,
            }
        }
    }

    /// Zeroed memory that the device can read from and write to.
    fn buffer(&self, length: usize) -> crate::buffer::Buffer {
        let mut buffer = self.pool.lock().unwrap_or_else(PoisonError::into_inner).get(length);
        buffer.bytes_mut().fill(0);
        buffer
    }

    fn put(&self, buffer: crate::buffer::Buffer) {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).put(buffer);
    }
}

/// Locks an open file. I/O that is under way keeps the file open, and so the lock.
pub(crate) fn hold(file: &File, patience: Duration) -> io::Result<bool> {
    let until = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => return Ok(false),
            Err(TryLockError::WouldBlock) => std::thread::sleep(HOLD_AGAIN),
        }
    }
}

impl Device for Lun {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let mut buffer = self.buffer(into.len().min(PIECE_BYTES));
        let mut from = at;
        for piece in into.chunks_mut(PIECE_BYTES) {
            let bytes = &mut buffer.bytes_mut()[..piece.len()];
            self.file.read_exact_at(bytes, from)?;
            piece.copy_from_slice(bytes);
            from += piece.len() as u64;
        }
        self.put(buffer);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let mut buffer = self.buffer(from.len().min(PIECE_BYTES));
        let mut to = at;
        for piece in from.chunks(PIECE_BYTES) {
            let bytes = &mut buffer.bytes_mut()[..piece.len()];
            bytes.copy_from_slice(piece);
            self.file.write_all_at(bytes, to)?;
            to += piece.len() as u64;
        }
        self.put(buffer);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lun::PAGE_BYTES;

    /// Closed after so many questions.
    struct Closes(std::sync::atomic::AtomicU32);

    impl Fence for Closes {
        fn may_write(&self) -> bool {
            let less = |left: u32| left.checked_sub(1);
            self.0.fetch_update(std::sync::atomic::Ordering::SeqCst, std::sync::atomic::Ordering::SeqCst, less).is_ok()
        }
    }

    #[test]
    fn nothing_is_wiped_behind_a_fence_that_was_closed_half_way() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("lun");
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let lun = Lun::open(&path).unwrap();
        assert!(!lun.wipe_while(0, 4 << 20, &Closes(2.into())).unwrap());
        let left = std::fs::read(&path).unwrap().iter().filter(|byte| **byte == 7).count();
        // A file system that cannot zero by itself has each piece asked for twice.
        assert!(left == 2 << 20 || left == 3 << 20, "{left}");
        assert!(lun.wipe_while(0, 4 << 20, &Open).unwrap());
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_is_wiped_reads_as_zero_and_the_rest_stays() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("lun");
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let lun = Lun::open(&path).unwrap();
        lun.wipe(1 << 20, 2 << 20).unwrap();
        lun.write(0, &[9; PAGE_BYTES]).unwrap();
        lun.flush().unwrap();
        let mut bytes = vec![1; 4 << 20];
        lun.read(0, &mut bytes).unwrap();
        let expected = |at: usize| match at {
            0..PAGE_BYTES => 9,
            _ if (1 << 20..3 << 20).contains(&at) => 0,
            _ => 7,
        };
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
        lun.discard(0, 1 << 20).unwrap();
    }

    #[test]
    fn a_lun_is_held_once_and_until_its_last_clone_is_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (Lun::open(file.path()).unwrap(), Lun::open(file.path()).unwrap());
        assert!(first.hold(Duration::ZERO).unwrap());
        let clone = first.clone();
        assert!(clone.hold(Duration::ZERO).unwrap());
        drop(first);
        assert!(!second.hold(Duration::ZERO).unwrap());
        drop(clone);
        assert!(second.hold(Duration::ZERO).unwrap());
    }

    #[test]
    fn only_files_and_devices_are_luns() {
        assert!(matches!(Lun::open(Path::new("/")), Err(OpenError::Kind { .. })));
        assert!(matches!(Lun::open(Path::new("/nowhere/lun")), Err(OpenError::Io { .. })));
    }
}
