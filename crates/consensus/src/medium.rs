//! What the log and the snapshot lie on: a directory of this node, or the disk of a
//! witness ([`crate::witness`]). The formats above are the same.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::ConsensusError;
use crate::mark::Mark;
use crate::{snapshot, wal};

/// Where one log and one snapshot are kept. One thread at a time writes the log,
/// another may write the snapshot meanwhile.
pub(crate) trait Medium: Send + Sync + 'static {
    /// What messages call the log.
    fn log_path(&self) -> PathBuf;

    /// What messages call the snapshot.
    fn snapshot_path(&self) -> PathBuf;

    /// All bytes of the log, `None` if there never was one.
    fn read_log(&self) -> Result<Option<Vec<u8>>, ConsensusError>;

    /// So many bytes of the log were acknowledged, or more; 0 when that is not known.
    fn acknowledged(&self) -> u64 {
        0
    }

    /// Makes the log, with these bytes: a crash leaves it whole or not there.
    fn create_log(&self, bytes: &[u8]) -> Result<(), ConsensusError>;

    /// Cuts an incomplete write off the end.
    fn cut_log(&self, end: u64) -> Result<(), ConsensusError>;

    /// Writes `bytes` at `at`, the end of the log; durable when this returns. When
    /// there is no room ([`is_full`]) nothing was written and trying again makes
    /// sense; after any other error nobody knows what is there.
    fn append(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Reads from within the log.
    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Replaces the whole log at once.
    fn replace_log(&self, bytes: &[u8]) -> Result<(), NotReplaced>;

    /// The snapshot's bytes, `None` if there is none.
    fn read_snapshot(&self) -> Result<Option<Vec<u8>>, ConsensusError>;

    /// Replaces the snapshot at once; durable when this returns.
    fn write_snapshot(&self, bytes: &[u8]) -> io::Result<()>;
}

/// Why a log was not replaced.
#[derive(Debug)]
pub(crate) enum NotReplaced {
    /// The old one is there and whole.
    Kept(io::Error),
    /// Nobody knows which one is there after a crash.
    Unknown(String),
}

impl From<io::Error> for NotReplaced {
    fn from(error: io::Error) -> Self {
        NotReplaced::Kept(error)
    }
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
}

/// An error with what was tried, of the same kind.
pub(crate) fn failed(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what} failed: {error}"))
}

/// The files `log` and `snapshot` in a directory.
pub(crate) struct Directory {
    path: PathBuf,
    log: Mutex<Option<File>>,
    mark: OnceLock<(Mark, u64)>,
}

impl Directory {
    pub(crate) fn new(path: impl Into<PathBuf>) -> Self {
        Directory { path: path.into(), log: Mutex::new(None), mark: OnceLock::new() }
    }

    /// The note beside the log, and what it said when it was opened.
    fn mark(&self) -> &(Mark, u64) {
        self.mark.get_or_init(|| Mark::open(&self.path))
    }

    fn log(&self) -> MutexGuard<'_, Option<File>> {
        // A whole file or none: a panic leaves nothing half done.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_log<T>(&self, work: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        let mut log = self.log();
        if log.is_none() {
            *log = Some(OpenOptions::new().read(true).write(true).open(self.log_path())?);
        }
        log.as_ref().map_or_else(|| Err(ErrorKind::NotFound.into()), work)
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

impl Medium for Directory {
    fn log_path(&self) -> PathBuf {
        self.path.join(wal::FILE)
    }

    fn snapshot_path(&self) -> PathBuf {
        self.path.join(snapshot::FILE)
    }

    fn read_log(&self) -> Result<Option<Vec<u8>>, ConsensusError> {
        // Left by a crash before the rename: never acknowledged, the old file is whole.
        let replacement = self.path.join(wal::NEW_FILE);
        match fs::remove_file(&replacement) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(ConsensusError::io("remove", &replacement)(e)),
            _ => {}
        }
        read(&self.log_path())
    }

    fn acknowledged(&self) -> u64 {
        self.mark().1
    }

    /// A file that exists is always complete: it appears by a rename.
    fn create_log(&self, bytes: &[u8]) -> Result<(), ConsensusError> {
        let (path, new) = (self.log_path(), self.path.join(wal::NEW_FILE));
        let mut file = private().open(&new).map_err(ConsensusError::io("create", &new))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(ConsensusError::io("write", &new))?;
        fs::rename(&new, &path).map_err(ConsensusError::io("rename a new file to", &path))?;
        self.sync_directory().map_err(ConsensusError::io("flush", &self.path))
    }

    fn cut_log(&self, end: u64) -> Result<(), ConsensusError> {
        self.with_log(|file| {
            file.set_len(end)?;
            file.sync_all()
        })
        .map_err(ConsensusError::io("cut the incomplete end off", &self.log_path()))
    }

    fn append(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.with_log(|file| {
            match file.write_all_at(bytes, at) {
                Ok(()) => {}
                Err(e) if is_full(&e) => {
                    file.set_len(at).map_err(|e| io::Error::other(format!("cannot take back a partial write: {e}")))?;
                    return Err(e);
                }
                Err(e) => return Err(failed("writing", &e)),
            }
            // After a failed flush the kernel may have dropped the pages and marked
            // them clean: another flush would succeed and mean nothing. So it must
            // not look like a full disk, after which one tries again.
            file.sync_data().map_err(|e| io::Error::other(format!("flushing failed: {e}")))
        })?;
        self.mark().0.note(at + bytes.len() as u64);
        Ok(())
    }

    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.with_log(|file| file.read_exact_at(bytes, at))
    }

    fn replace_log(&self, bytes: &[u8]) -> Result<(), NotReplaced> {
        let new = self.path.join(wal::NEW_FILE);
        let written = (|| {
            let file = private().open(&new)?;
            file.write_all_at(bytes, 0)?;
            file.sync_all()?;
            self.mark().0.forget()?;
            fs::rename(&new, self.log_path())?;
            Ok(file)
        })();
        match written {
            Ok(file) => *self.log() = Some(file),
            Err(e) => {
                let _ = fs::remove_file(&new);
                return Err(NotReplaced::Kept(e));
            }
        }
        // Until the directory is flushed, a power loss may bring the old file
        // back; what is acknowledged from now on would be missing from it.
        self.sync_directory().map_err(|e| NotReplaced::Unknown(format!("flushing the directory failed: {e}")))
    }

    fn read_snapshot(&self) -> Result<Option<Vec<u8>>, ConsensusError> {
        read(&self.snapshot_path())
    }

    fn write_snapshot(&self, bytes: &[u8]) -> io::Result<()> {
        let new = self.path.join(snapshot::NEW_FILE);
        let written = (|| {
            let mut file = private().open(&new)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&new, self.snapshot_path())?;
            self.sync_directory()
        })();
        if written.is_err() {
            // Gives the room back; the old snapshot is untouched.
            let _ = fs::remove_file(&new);
        }
        written
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, ConsensusError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(ConsensusError::io("read", path)(e)),
    }
}

/// How new files are opened: the state within holds the cluster's private key.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    options.mode(0o600);
    options
}
