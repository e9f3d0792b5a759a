//! What is served: one disk, from one file or device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::unistd::Whence;

use crate::buffer::{ALIGNMENT, Pool};
use crate::nbd::{Extent, Offer};

/// Says whether writes may be submitted right now. Asked before each one, by the
/// threads that do I/O: it must neither block nor take long.
///
/// It speaks for one right to run one VM: writes wait while it is closed, and go on
/// if it opens again. Once that right is over it must never open again, whatever
/// right the node gets afterwards; then the disk is withdrawn.
pub trait Fence: Send + Sync + 'static {
    /// Whether this node may write.
    fn may_write(&self) -> bool;
}

/// No fence: for what is served outside a cluster.
#[derive(Clone, Copy, Debug, Default)]
pub struct Open;

impl Fence for Open {
    fn may_write(&self) -> bool {
        true
    }
}

/// How a disk is opened.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Its name in the protocol.
    pub name: String,
    /// The file or block device.
    pub path: PathBuf,
    /// It is not to be written to.
    pub read_only: bool,
}

/// Why a disk cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened or looked at.
    #[error("cannot open {path} as a disk: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is neither a file nor a block device.
    #[error("{path} is neither a file nor a block device")]
    Kind {
        /// What it is.
        path: PathBuf,
    },
    /// It has a size that no disk has.
    #[error("{path} has {bytes} bytes: a disk has at least 512, and a multiple of that")]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
}

/// A disk that is open.
pub struct Export {
    pub(crate) offer: Offer,
    pub(crate) file: Arc<File>,
    pub(crate) fence: Arc<dyn Fence>,
    /// Nobody is let in any more.
    pub(crate) withdrawn: AtomicBool,
    /// Holes can be asked for.
    sparse: bool,
}

impl Export {
    /// Opens a disk, past the page cache where the file system allows it.
    ///
    /// # Errors
    /// [`OpenError`] says what it is instead.
    pub fn open(spec: &DiskSpec, fence: Arc<dyn Fence>) -> Result<Export, OpenError> {
        let path = &spec.path;
        let failed = |source| OpenError::Io { path: path.clone(), source };
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind { path: path.clone() });
        }
        let (file, block) = open(path, !spec.read_only).map_err(failed)?;
        let size = nix::unistd::lseek(&file, 0, Whence::SeekEnd).map_err(|errno| failed(errno.into()))?;
        let size = u64::try_from(size).unwrap_or(0);
        if size == 0 || !size.is_multiple_of(512) {
            return Err(OpenError::Size { path: path.clone(), bytes: size });
        }
        // The last, shorter block cannot be had past the page cache.
        let (file, block) = if size.is_multiple_of(u64::from(block)) {
            (file, block)
        } else {
            (cached(path, !spec.read_only).map_err(failed)?, 512)
        };
        let offer =
            Offer { name: spec.name.clone(), size, read_only: spec.read_only, block, preferred: ALIGNMENT as u32 };
        Ok(Export { offer, file: Arc::new(file), fence, withdrawn: AtomicBool::new(false), sparse: kind.is_file() })
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.offer.size
    }

    /// What is allocated from `offset` on, for `length` bytes, in at most `most` runs.
    pub(crate) fn extents(&self, offset: u64, length: u32, most: usize) -> io::Result<Vec<Extent>> {
        if !self.sparse {
            return Ok(vec![Extent { length, hole: false }]);
        }
        let seek = |at: u64, whence| match nix::unistd::lseek(&*self.file, at as i64, whence) {
            Ok(found) => Ok(Some(found as u64)),
            // Nothing of the kind up to the end.
            Err(nix::errno::Errno::ENXIO) => Ok(None),
            Err(errno) => Err(io::Error::from(errno)),
        };
        let end = offset + u64::from(length);
        let (mut at, mut extents) = (offset, Vec::new());
        while at < end && extents.len() < most {
            let data = seek(at, Whence::SeekData)?.unwrap_or(end).min(end);
            let (hole, until) = if data > at {
                (true, data)
            } else {
                (false, seek(at, Whence::SeekHole)?.unwrap_or(end).clamp(at + 1, end))
            };
            extents.push(Extent { length: (until - at) as u32, hole });
            at = until;
        }
        Ok(extents)
    }
}

/// Opens past the page cache if possible, and says which block size that asks for.
fn open(path: &Path, write: bool) -> io::Result<(File, u32)> {
    let direct = OpenOptions::new().read(true).write(write).custom_flags(nix::libc::O_DIRECT).open(path);
    match direct {
        Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok((cached(path, write)?, 512)),
        Err(error) => Err(error),
        Ok(file) => {
            let mut probe = Pool::default().get(512);
            match file.read_at(probe.bytes_mut(), 512) {
                Err(error) if error.raw_os_error() == Some(nix::libc::EINVAL) => Ok((file, 4096)),
                Err(error) => Err(error),
                Ok(_) => Ok((file, 512)),
            }
        }
    }
}

fn cached(path: &Path, write: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).open(path)
}
