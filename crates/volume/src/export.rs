//! What is served: one disk, from one file or device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::unistd::Whence;

use crate::buffer::{ALIGNMENT, Pool};
use crate::device::{Lun, Reached, Storage};
use crate::lun::Geometry;
use crate::nbd::{Extent, Offer};
use crate::parts::{Allocator, Parts, Place};
use crate::tally::Tally;

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

/// How a disk on a LUN is opened.
pub struct LunDisk {
    /// Its name in the protocol.
    pub name: String,
    /// The LUN.
    pub lun: Lun,
    /// Where things are on it.
    pub geometry: Geometry,
    /// Size of the disk in bytes.
    pub bytes: u64,
    /// It is not to be written to.
    pub read_only: bool,
    /// Its parts that have slabs (the first number), and which (the second).
    pub parts: Vec<(u32, u32)>,
}

/// A disk that is open.
pub struct Export {
    pub(crate) offer: Offer,
    pub(crate) fence: Arc<dyn Fence>,
    /// Nobody is let in any more.
    pub(crate) withdrawn: AtomicBool,
    pub(crate) tally: Tally,
    /// It is served to other nodes: none of them does anything for it.
    pub(crate) alone: bool,
    /// In bytes; it may grow.
    size: AtomicU64,
    backing: Backing,
}

/// What a disk is made of.
enum Backing {
    File {
        file: Arc<File>,
        /// The same.
        reached: Reached,
        /// Holes can be asked for.
        sparse: bool,
    },
    Lun(Arc<Parts>),
    /// All of a LUN, for nodes that have no path to it.
    Whole(Lun),
}

impl Export {
    /// Opens a disk that is a file or a device of its own, past the page cache where
    /// the file system allows it.
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
        let size = end(&file).map_err(failed)?;
        if size == 0 || !size.is_multiple_of(512) {
            return Err(OpenError::Size { path: path.clone(), bytes: size });
        }
        // The last, shorter block cannot be had past the page cache.
        let (file, block) = if size.is_multiple_of(u64::from(block)) {
            (file, block)
        } else {
            (cached(path, !spec.read_only).map_err(failed)?, 512)
        };
        let file = Arc::new(file);
        let backing =
            Backing::File { reached: Reached::Plain(Storage::File(file.clone())), file, sparse: kind.is_file() };
        Ok(Export::of(spec.name.clone(), size, spec.read_only, block, fence, backing))
    }

    /// Opens a disk that is made of slabs of a LUN. Those that it does not have yet
    /// come from `allocator`.
    ///
    /// # Errors
    /// [`OpenError::Size`]: a size that no disk has, or a part or slab that is not there.
    pub fn on_lun(disk: LunDisk, allocator: Arc<dyn Allocator>, fence: Arc<dyn Fence>) -> Result<Export, OpenError> {
        let LunDisk { name, lun, geometry, bytes, read_only, parts } = disk;
        let block = lun.block;
        let count = bytes.div_ceil(geometry.slab_bytes);
        let inside = |(part, slab): &(u32, u32)| u64::from(*part) < count && *slab < geometry.slabs;
        let sound = bytes > 0 && bytes.is_multiple_of(u64::from(block)) && count < u64::from(u32::MAX);
        if !sound || geometry.end() > lun.bytes() || !parts.iter().all(inside) {
            return Err(OpenError::Size { path: lun.path().into(), bytes });
        }
        let backing = Backing::Lun(Arc::new(Parts::new(lun, geometry, bytes, &parts, allocator)));
        Ok(Export::of(name, bytes, read_only, block, fence, backing))
    }

    /// All of a LUN that this node owns, for the links of other nodes.
    pub(crate) fn whole(lun: Lun) -> Export {
        let (bytes, block, name) = (lun.bytes(), lun.block, lun.path().display().to_string());
        let mut export = Export::of(name, bytes, false, block, Arc::new(Open), Backing::Whole(lun));
        export.alone = true;
        export
    }

    fn of(name: String, size: u64, read_only: bool, block: u32, fence: Arc<dyn Fence>, backing: Backing) -> Export {
        Export {
            offer: Offer { name, size, read_only, block, preferred: ALIGNMENT as u32 },
            fence,
            withdrawn: AtomicBool::new(false),
            tally: Tally::default(),
            alone: false,
            size: AtomicU64::new(size),
            backing,
        }
    }

    /// As [`Lun::hold`], for the file or device that the disk is on. Not for file
    /// systems whose locks reach to other nodes, where a VM that moves is open twice.
    ///
    /// # Errors
    /// The system's.
    pub fn hold(&self, patience: Duration) -> io::Result<bool> {
        match &self.backing {
            Backing::File { file, .. } => crate::device::hold(file, patience),
            Backing::Lun(parts) => parts.lun.hold(patience),
            Backing::Whole(lun) => lun.hold(patience),
        }
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// What a client is offered now.
    pub(crate) fn offer(&self) -> Offer {
        Offer { size: self.size_bytes(), ..self.offer.clone() }
    }

    /// Grows to a size in bytes, which a file or device has to have already.
    pub(crate) fn grow(&self, bytes: u64) -> io::Result<()> {
        let wrong = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        if !bytes.is_multiple_of(u64::from(self.offer.block)) || bytes < self.size_bytes() {
            return wrong("a disk grows, to a multiple of its block size");
        }
        match &self.backing {
            Backing::File { file, .. } if end(file)? < bytes => {
                return wrong("the file is smaller than its disk is to be");
            }
            Backing::File { .. } => {}
            Backing::Lun(parts) => parts.grow(bytes),
            Backing::Whole(_) => return wrong("a LUN does not grow"),
        }
        self.size.fetch_max(bytes, Ordering::AcqRel);
        Ok(())
    }

    /// Where its bytes are.
    pub(crate) fn reached(&self) -> &Reached {
        match &self.backing {
            Backing::File { reached, .. } => reached,
            Backing::Lun(parts) => &parts.lun.reached,
            Backing::Whole(lun) => &lun.reached,
        }
    }

    /// Its parts, where it is on a LUN.
    pub(crate) fn parts(&self) -> Option<&Arc<Parts>> {
        match &self.backing {
            Backing::File { .. } | Backing::Whole(_) => None,
            Backing::Lun(parts) => Some(parts),
        }
    }

    /// Where `length` bytes from `offset` on begin, how many of them are together
    /// there, and in which part: that part has been entered if it is present.
    pub(crate) fn place(&self, offset: u64, length: u64) -> (Place, u64, Option<u32>) {
        match &self.backing {
            Backing::File { .. } | Backing::Whole(_) => (Place::At(offset), length, None),
            Backing::Lun(parts) => {
                let (part, rest) = parts.part_of(offset);
                (parts.enter(offset), length.min(rest), Some(part))
            }
        }
    }

    /// What is allocated from `offset` on, for `length` bytes, in at most `most` runs.
    pub(crate) fn extents(&self, offset: u64, length: u32, most: usize) -> io::Result<Vec<Extent>> {
        match &self.backing {
            Backing::File { sparse: false, .. } | Backing::Whole(_) => Ok(vec![Extent { length, hole: false }]),
            Backing::File { file, sparse: true, .. } => holes(file, offset, length, most),
            Backing::Lun(parts) => {
                let (mut at, end) = (offset, offset + u64::from(length));
                let mut extents = Vec::<Extent>::new();
                while at < end {
                    let (part, rest) = parts.part_of(at);
                    let (length, hole) = (rest.min(end - at), !parts.is_present(part));
                    let room = extents.len() < most;
                    match extents.last_mut() {
                        Some(last) if last.hole == hole => last.length += length as u32,
                        _ if room => extents.push(Extent { length: length as u32, hole }),
                        _ => break,
                    }
                    at += length;
                }
                Ok(extents)
            }
        }
    }
}

/// The holes of a file and what is between them.
fn holes(file: &File, offset: u64, length: u32, most: usize) -> io::Result<Vec<Extent>> {
    let seek = |at: u64, whence| match nix::unistd::lseek(file, at as i64, whence) {
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

/// Size of a file or device in bytes.
pub(crate) fn end(file: &File) -> io::Result<u64> {
    Ok(u64::try_from(nix::unistd::lseek(file, 0, Whence::SeekEnd)?).unwrap_or(0))
}

/// Opens past the page cache if possible, and says which block size that asks for.
pub(crate) fn open(path: &Path, write: bool) -> io::Result<(File, u32)> {
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
