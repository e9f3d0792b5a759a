//! A LUN as this process has it open.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::buffer::{Buffer, Pool};
use crate::export::{Fence, Open, OpenError, end, open};
use crate::link::{Link, Welcomed};
use crate::lun::{Device, PAGE_BYTES};
use crate::nbd::client::Address;
use crate::paths::{Carried, Hears, Paths, Reach};
use crate::piece::{Ended, Op, Piece};
use crate::remote::{Remote, SETTLES_WITHIN};

/// What one read or write of zeroes or of a description moves at most, in bytes.
const PIECE_BYTES: usize = 1 << 20;

/// How often somebody else's lock is looked at.
const HOLD_AGAIN: Duration = Duration::from_millis(1);

/// Where the bytes of a disk or a LUN are.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    /// In a file or device that this process has open.
    File(Arc<File>),
    /// Behind a connection.
    Remote(Arc<Remote>),
}

/// How the bytes of a disk or a LUN are reached.
#[derive(Clone, Debug)]
pub(crate) enum Reached {
    /// In the one way that there is.
    Plain(Storage),
    /// By whichever way works.
    Ways(Arc<Paths>),
}

impl Storage {
    /// Does something, and returns when it is done.
    pub(crate) fn perform(&self, mut piece: Piece) -> Ended {
        match self {
            Storage::Remote(remote) => remote.wait(piece),
            Storage::File(file) => {
                let outcome = on_file(file, &mut piece).map(|()| u32::try_from(piece.length).unwrap_or(u32::MAX));
                Ended { piece, outcome }
            }
        }
    }
}

fn on_file(file: &File, piece: &mut Piece) -> io::Result<()> {
    let (at, length) = (piece.at, piece.length);
    match piece.op {
        Op::Read => file.read_exact_at(piece.data_mut(), at),
        Op::Write { durable } => {
            file.write_all_at(piece.data(), at)?;
            if durable { file.sync_data() } else { Ok(()) }
        }
        Op::Sync => file.sync_data(),
        Op::Trim | Op::Zero { may_free: true } => allocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE, at, length),
        Op::Zero { may_free: false } => allocate(file, FallocateFlags::FALLOC_FL_ZERO_RANGE, at, length),
    }
}

fn allocate(file: &File, way: FallocateFlags, at: u64, length: u64) -> io::Result<()> {
    let offset = |bytes: u64| i64::try_from(bytes).map_err(|_| Errno::EINVAL);
    loop {
        match fallocate(file, way | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset(at)?, offset(length)?) {
            Err(Errno::EINTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

/// A block device, a file in its place, or an export of an NBD server, that holds a
/// volume. Clones are the same open device; a process has one for each LUN.
#[derive(Clone, Debug)]
pub struct Lun {
    pub(crate) reached: Reached,
    pub(crate) block: u32,
    path: PathBuf,
    bytes: u64,
    pool: Arc<Mutex<Pool>>,
}

impl Lun {
    /// Opens it for reading and writing, past the page cache where that can be. In the
    /// place of a path there may be the address of an export: `nbd://HOST[:PORT]/EXPORT`
    /// or `nbd+unix:///EXPORT?socket=PATH`.
    ///
    /// # Errors
    /// [`OpenError`] says what it is instead.
    pub fn open(path: &Path) -> Result<Lun, OpenError> {
        let failed = |source| OpenError::Io { path: path.into(), source };
        let of = |storage, block, bytes| {
            let reached = Reached::Plain(storage);
            Lun { reached, block, path: path.into(), bytes, pool: Arc::default() }
        };
        if let Some(address) = Address::parse(path) {
            let (remote, found) = address.and_then(crate::remote::connect).map_err(failed)?;
            if found.block as usize > PAGE_BYTES || !found.block.is_power_of_two() {
                return Err(failed(io::Error::new(io::ErrorKind::Unsupported, "its blocks are larger than 4 KiB")));
            }
            return Ok(of(Storage::Remote(Arc::new(remote)), found.block, found.size));
        }
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind { path: path.into() });
        }
        let (file, block) = open(path, true).map_err(failed)?;
        let bytes = end(&file).map_err(failed)?;
        Ok(of(Storage::File(Arc::new(file)), block, bytes))
    }

    /// Whether a path is none, but the address of an export.
    pub fn is_address(path: &Path) -> bool {
        Address::parse(path).is_some()
    }

    /// The device, file or address.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What requests have to be multiples of, in bytes.
    pub fn block_bytes(&self) -> u32 {
        self.block
    }

    /// Takes the LUN for this process, and so waits until no I/O is under way of a
    /// process of this host that had it before, even if that was killed: the kernel
    /// may finish what a dead process has submitted, and that must not come after what
    /// this one submits. `false` if that did not happen within `patience`. The lock is
    /// that of flock(2); it is over when this device and its clones are. Nobody can lock
    /// an export: what its server had taken in is given the time that it may take.
    ///
    /// # Errors
    /// The system's.
    pub fn hold(&self, patience: Duration) -> io::Result<bool> {
        match &self.reached {
            Reached::Plain(Storage::File(file)) => hold(file, patience),
            Reached::Plain(Storage::Remote(_)) if patience < SETTLES_WITHIN => Ok(false),
            Reached::Plain(Storage::Remote(_)) => {
                std::thread::sleep(SETTLES_WITHIN);
                Ok(true)
            }
            // Each way was held before it became one.
            Reached::Ways(_) => Ok(true),
        }
    }

    /// As [`Lun::hold`] for what each node has for itself, be it a device or a connection.
    /// A file in the place of a device is shared with others, and with it the lock: it is
    /// not locked.
    ///
    /// # Errors
    /// The system's.
    pub fn outlive_others(&self, patience: Duration) -> io::Result<bool> {
        match &self.reached {
            Reached::Plain(Storage::File(file)) if !file.metadata()?.file_type().is_block_device() => Ok(true),
            _ => self.hold(patience),
        }
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
        let ways = [Op::Zero { may_free: false }, Op::Zero { may_free: true }];
        let mut zeroes = None::<Buffer>;
        let mut done = 0;
        while done < bytes {
            if !fence.may_write() {
                return Ok(false);
            }
            let (from, length) = (at + done, (bytes - done).min(PIECE_BYTES as u64));
            let by_itself = |op| {
                let ended = self.perform_while(Piece::without_data(op, from, length), fence);
                ended.is_some_and(|ended| ended.outcome.is_ok())
            };
            if zeroes.is_some() || !ways.into_iter().any(by_itself) {
                // The device did not answer at once, perhaps.
                if !fence.may_write() {
                    return Ok(false);
                }
                let buffer = zeroes.take().unwrap_or_else(|| self.buffer(PIECE_BYTES));
                let piece = Piece { op: Op::Write { durable: false }, at: from, length, buffer, skip: 0 };
                let Some(Ended { piece, outcome }) = self.perform_while(piece, fence) else { return Ok(false) };
                zeroes = Some(piece.buffer);
                outcome?;
            }
            done += length;
        }
        match self.perform_while(Piece::without_data(Op::Sync, 0, 0), fence) {
            Some(ended) => ended.outcome.map(|_| true),
            None => Ok(false),
        }
    }

    /// Tells the device that what is in a range is not needed any more; what it reads
    /// as afterwards is not known. A device that cannot be told is no error.
    ///
    /// # Errors
    /// The system's.
    pub fn discard(&self, at: u64, bytes: u64) -> io::Result<()> {
        match self.perform(Piece::without_data(Op::Trim, at, bytes)).outcome {
            Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Does something, and returns when it is done.
    fn perform(&self, piece: Piece) -> Ended {
        match &self.reached {
            Reached::Plain(storage) => storage.perform(piece),
            Reached::Ways(paths) => paths.perform(piece, &|| true).unwrap_or_else(|| Ended {
                piece: Piece::without_data(Op::Sync, 0, 0),
                outcome: Err(io::ErrorKind::NotConnected.into()),
            }),
        }
    }

    /// As [`Lun::perform`]; `None`: it waited for a way while `fence` was closed.
    fn perform_while(&self, piece: Piece, fence: &dyn Fence) -> Option<Ended> {
        match &self.reached {
            Reached::Plain(storage) => Some(storage.perform(piece)),
            Reached::Ways(paths) => paths.perform(piece, &|| fence.may_write()),
        }
    }

    /// The LUN, reached by this host itself or through another node, whichever works.
    /// `direct` is the LUN as this host has it open, or why it has not; in that case
    /// somebody who reaches it said what it is like. `opens` opens it anew, perhaps at
    /// another device.
    ///
    /// # Errors
    /// The system gives no thread; nobody knows what the LUN is like.
    pub fn by_ways(
        path: &Path,
        direct: Result<Lun, String>,
        welcomed: Option<Welcomed>,
        opens: impl Fn() -> io::Result<Lun> + Send + Sync + 'static,
        hears: Hears,
    ) -> io::Result<Lun> {
        let known = match (&direct, welcomed) {
            (Ok(lun), _) => Welcomed { block: lun.block, bytes: lun.bytes },
            (Err(_), Some(welcomed)) => welcomed,
            (Err(why), None) => return Err(io::Error::other(why.clone())),
        };
        let plain = |lun: Lun| match lun.reached {
            Reached::Plain(storage) => Ok(storage),
            Reached::Ways(_) => Err(io::Error::other("it is reached by ways already")),
        };
        let opens = move || {
            let lun = opens()?;
            match lun.bytes < known.bytes || lun.block > known.block {
                true => Err(io::Error::other("the device is another one now")),
                false => plain(lun),
            }
        };
        let direct = direct.and_then(|lun| plain(lun).map_err(|error| error.to_string()));
        let paths = Paths::new(direct, Box::new(opens), hears)?;
        let Welcomed { block, bytes } = known;
        Ok(Lun { reached: Reached::Ways(Arc::new(paths)), block, path: path.into(), bytes, pool: Arc::default() })
    }

    fn paths(&self) -> Option<&Paths> {
        match &self.reached {
            Reached::Plain(_) => None,
            Reached::Ways(paths) => Some(paths),
        }
    }

    /// Another node is to be gone through where that is needed, or none. `new_owner`:
    /// whatever earlier ones had been asked for is certainly over.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn go_through(&self, link: Option<Link>, new_owner: bool) -> io::Result<()> {
        let link = link.map(Link::start).transpose()?;
        if let Some(paths) = self.paths() {
            paths.set_link(link, new_owner);
        }
        Ok(())
    }

    /// Whether the other node is to be gone through although this host's own way works.
    pub fn plan(&self, planned: bool) {
        if let Some(paths) = self.paths() {
            paths.set_planned(planned);
        }
    }

    /// Uses this host's own way only after the other node has answered once: an earlier
    /// life of this process may have something under way there.
    pub fn hold_direct(&self) {
        if let Some(paths) = self.paths() {
            paths.hold();
        }
    }

    /// Waits until this host's own way may be used, if it works: see [`Lun::hold_direct`].
    /// `false` if it may still not be after `patience`.
    pub fn wait_direct(&self, patience: Duration) -> bool {
        self.paths().is_none_or(|paths| paths.wait_unheld(patience))
    }

    /// How it is reached, and what went through other nodes so far.
    pub fn reach(&self) -> (Reach, Carried) {
        self.paths().map_or((Reach::Direct, Carried::default()), |paths| (paths.reach(), paths.carried()))
    }

    /// Zeroed memory that the device can read from and write to.
    fn buffer(&self, length: usize) -> Buffer {
        let mut buffer = self.pool.lock().unwrap_or_else(PoisonError::into_inner).get(length);
        buffer.bytes_mut().fill(0);
        buffer
    }

    fn put(&self, buffer: Buffer) {
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
        for bytes in into.chunks_mut(PIECE_BYTES) {
            let length = bytes.len() as u64;
            let Ended { piece, outcome } = self.perform(Piece { op: Op::Read, at: from, length, buffer, skip: 0 });
            outcome?;
            bytes.copy_from_slice(piece.data());
            buffer = piece.buffer;
            from += length;
        }
        self.put(buffer);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let mut buffer = self.buffer(from.len().min(PIECE_BYTES));
        let mut to = at;
        for bytes in from.chunks(PIECE_BYTES) {
            let length = bytes.len() as u64;
            let mut piece = Piece { op: Op::Write { durable: false }, at: to, length, buffer, skip: 0 };
            piece.data_mut().copy_from_slice(bytes);
            let Ended { piece, outcome } = self.perform(piece);
            outcome?;
            buffer = piece.buffer;
            to += length;
        }
        self.put(buffer);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.perform(Piece::without_data(Op::Sync, 0, 0)).outcome.map(drop)
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
