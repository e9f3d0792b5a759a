//! The disk itself: a block device or a file that all nodes see.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_core::NodeId;
use holdfast_core::witness::{Block, DiskTiming, HOSTS, Look, Seen, Use};
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use uuid::Uuid;

use super::layout::{self, AREAS, AreaHead, BLOCK, FoundSuperblock, LOOK, LOOK_BYTES, Superblock};

/// A file is made so large, in bytes.
const NEW_BYTES: u64 = 64 << 20;
/// So much at the beginning of a disk is looked at before it is called blank.
const BLANK_BYTES: usize = 1 << 20;
/// No lease on a disk is longer, in milliseconds.
const LONGEST_MS: u64 = 4000;

/// What is wrong with a witness's disk, and what to do about it. The text is a
/// clause that follows a node's name.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be used.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The disk.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// There is nothing of that name.
    #[error("has nothing at {}: connect the disk there, or create the file's directory", path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// It holds something.
    #[error("finds {what} in {}: a witness needs a disk or file that is blank (all zeros); wipe it, or name another", path.display())]
    Used {
        /// The disk.
        path: PathBuf,
        /// What it looks like.
        what: String,
    },
    /// It is too small.
    #[error("finds only {bytes} bytes at {}: a witness needs {}", path.display(), layout::LEAST)]
    Small {
        /// The disk.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It is another one than it should be.
    #[error("finds {what} at {}: every node has to see the same disk under the same path", path.display())]
    Other {
        /// The disk.
        path: PathBuf,
        /// What is there instead.
        what: String,
    },
    /// A newer version of Holdfast made it.
    #[error("finds format {found} in {}, and reads up to {}: start the newer version of Holdfast again", path.display(), layout::VERSION)]
    TooNew {
        /// The disk.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// What was durable is not there.
    #[error("finds {} damaged: {what}. It is left alone and does not vote; set a witness anew", path.display())]
    Damaged {
        /// The disk.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// A witness's disk, opened.
pub struct Disk {
    path: PathBuf,
    file: File,
    mark: Uuid,
    area: u64,
    direct: bool,
    /// Which file it is: the path may come to name another one.
    identity: (u64, u64, u64),
}

impl Disk {
    /// Makes `path` a witness's disk with this mark. A file that is not there is
    /// created; whatever holds anything is refused, but for this cluster's former
    /// witnesses with one of the marks `former`, when nobody hosts them any more.
    /// Says whether a file was created.
    ///
    /// # Errors
    /// It is missing, too small, in use, or cannot be written.
    pub fn format(path: &Path, cluster: Uuid, mark: Uuid, former: &[Uuid]) -> Result<bool, DiskError> {
        let created = create(path)?;
        let formatted = write_format(path, cluster, mark, former);
        if formatted.is_err() && created {
            let _ = fs::remove_file(path);
        }
        formatted.map(|()| created)
    }

    /// Takes back what [`Disk::format`] did with this mark: the disk is blank again.
    ///
    /// # Errors
    /// It is another disk, or cannot be written.
    pub fn wipe(path: &Path, mark: Uuid) -> Result<(), DiskError> {
        let disk = Disk::open(path, mark)?;
        let zeros = vec![0; LOOK as usize + LOOK_BYTES];
        disk.write_aligned(&zeros, 0).map_err(io_error("wipe", path))
    }

    /// Opens the disk with this mark.
    ///
    /// # Errors
    /// It is missing, another one, or cannot be read.
    pub fn open(path: &Path, mark: Uuid) -> Result<Disk, DiskError> {
        let mut disk = Self::raw(path, mark)?;
        let mut newer = None;
        for at in layout::SUPERBLOCKS {
            match Superblock::decode(&disk.read_at(at, BLOCK).map_err(io_error("read", path))?) {
                FoundSuperblock::Valid(found) if found.mark == mark => {
                    disk.area = found.area;
                    return Ok(disk);
                }
                FoundSuperblock::Valid(found) => {
                    let what = format!("the disk of another witness ({})", found.mark);
                    return Err(DiskError::Other { path: path.to_owned(), what });
                }
                FoundSuperblock::Newer(version) => newer = Some(version),
                FoundSuperblock::None => {}
            }
        }
        Err(match newer {
            Some(found) => DiskError::TooNew { path: path.to_owned(), found },
            None => DiskError::Other { path: path.to_owned(), what: "no witness".into() },
        })
    }

    fn raw(path: &Path, mark: Uuid) -> Result<Disk, DiskError> {
        let open = |flags: OFlag| {
            OpenOptions::new().read(true).write(true).custom_flags((flags | OFlag::O_CLOEXEC).bits()).open(path)
        };
        // Some file systems have no O_DIRECT, and say so when it is opened.
        let (file, direct) = match open(OFlag::O_DIRECT | OFlag::O_DSYNC) {
            Err(error) if error.kind() == ErrorKind::InvalidInput => (open(OFlag::O_DSYNC), false),
            opened => (opened, true),
        };
        let file = file.map_err(|error| match error.kind() {
            ErrorKind::NotFound => DiskError::Missing { path: path.to_owned() },
            _ => io_error("open", path)(error),
        })?;
        let identity = identity(&file.metadata().map_err(io_error("look at", path))?);
        Ok(Disk { path: path.to_owned(), file, mark, area: 0, direct, identity })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn mark(&self) -> Uuid {
        self.mark
    }

    /// Bytes of each area.
    pub(super) fn area(&self) -> usize {
        self.area as usize
    }

    /// Reads all that tells who hosts.
    ///
    /// # Errors
    /// It cannot be read, or the path names another disk now.
    pub fn look(&self) -> io::Result<Look> {
        let bytes = self.look_bytes()?;
        let heads = self.heads_in(&bytes);
        let mut look =
            Look { data_epoch: heads.iter().map(|(_, head)| head.epoch).max().unwrap_or(0), ..Look::default() };
        for (index, block) in bytes.chunks(BLOCK).take(HOSTS as usize).enumerate() {
            let node = NodeId(index as u64 + 1);
            let seen = layout::decode_block(self.mark, node, block);
            if seen != Seen::Empty {
                look.blocks.insert(node, seen);
            }
        }
        Ok(look)
    }

    fn look_bytes(&self) -> io::Result<Vec<u8>> {
        self.still_there()?;
        self.read_at(LOOK, LOOK_BYTES)
    }

    fn heads_in(&self, look: &[u8]) -> Vec<(usize, AreaHead)> {
        let heads = look.chunks(BLOCK).skip(HOSTS as usize).enumerate();
        heads.filter_map(|(area, bytes)| AreaHead::decode(self.mark, bytes).map(|head| (area, head))).collect()
    }

    /// The heads of the areas that were ever written.
    pub(super) fn heads(&self) -> io::Result<Vec<(usize, AreaHead)>> {
        let bytes = self.read_at(layout::head_at(0), AREAS * BLOCK)?;
        let heads = bytes.chunks(BLOCK).enumerate();
        Ok(heads.filter_map(|(area, bytes)| AreaHead::decode(self.mark, bytes).map(|head| (area, head))).collect())
    }

    /// Writes a node's block; durable when this returns.
    ///
    /// # Errors
    /// It cannot be written, or the path names another disk now. Either way it may
    /// have been.
    pub fn write_block(&self, block: &Block) -> io::Result<()> {
        if block.node.0 == 0 || block.node.0 > HOSTS {
            return Err(io::Error::other(format!("node {} has no block: only the first {HOSTS} host", block.node)));
        }
        self.still_there()?;
        self.write_at(aligned(&layout::encode_block(self.mark, block)).bytes(), layout::block_at(block.node))
    }

    /// A file that was moved away is still open, and a renewal of a lease in it would
    /// be seen by nobody.
    fn still_there(&self) -> io::Result<()> {
        let now = fs::metadata(&self.path)?;
        match identity(&now) == self.identity {
            true => Ok(()),
            false => Err(io::Error::other(format!("{} is another file now", self.path.display()))),
        }
    }

    pub(super) fn read_at(&self, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut buffer = Aligned::new(layout::whole(bytes));
        if !self.direct {
            // What another host wrote must not be hidden by what is cached here.
            let _ = posix_fadvise(
                self.file.as_fd(),
                at as i64,
                buffer.len() as i64,
                PosixFadviseAdvice::POSIX_FADV_DONTNEED,
            );
        }
        self.file.read_exact_at(buffer.bytes_mut(), at)?;
        Ok(buffer.bytes()[..bytes].to_vec())
    }

    /// Writes whole blocks; durable when this returns.
    pub(super) fn write_aligned(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_at(aligned(bytes).bytes(), at)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }
}

fn identity(of: &fs::Metadata) -> (u64, u64, u64) {
    if of.file_type().is_block_device() { (0, 0, of.rdev()) } else { (of.dev(), of.ino(), 0) }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io { action, path, source }
}

/// Creates the file if nothing is there; says whether it did.
fn create(path: &Path) -> Result<bool, DiskError> {
    let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = match made {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(false),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(DiskError::Missing { path: path.to_owned() });
        }
        Err(error) => return Err(io_error("create", path)(error)),
    };
    // Written, not only reserved: a file system that has to turn a reserved block into
    // a written one takes much longer for a durable write, at times longer than a lease.
    let zeros = vec![0; BLANK_BYTES];
    let mut pieces = (0..NEW_BYTES).step_by(BLANK_BYTES);
    let grown = pieces.try_for_each(|at| file.write_all_at(&zeros, at)).and_then(|()| file.sync_all());
    if let Err(error) = grown {
        let _ = fs::remove_file(path);
        return Err(io_error("make room in", path)(error));
    }
    Ok(true)
}

fn write_format(path: &Path, cluster: Uuid, mark: Uuid, former: &[Uuid]) -> Result<(), DiskError> {
    let mut disk = Disk::raw(path, mark)?;
    let size = disk.file.seek(SeekFrom::End(0)).map_err(io_error("measure", path))?;
    if size < layout::LEAST {
        return Err(DiskError::Small { path: path.to_owned(), bytes: size });
    }
    let begin = disk.read_at(0, BLANK_BYTES).map_err(io_error("read", path))?;
    let reused = match Superblock::decode(&begin) {
        FoundSuperblock::Valid(found) => found.cluster == cluster && former.contains(&found.mark),
        _ => false,
    };
    if reused {
        unused(path, &begin)?;
    } else {
        let end = disk.read_at((size - BLANK_BYTES as u64) / BLOCK as u64 * BLOCK as u64, BLANK_BYTES);
        let end = end.map_err(io_error("read", path))?;
        if let Some(what) = looks_like(&begin).or_else(|| (!blank(&end)).then(|| "something at its end".into())) {
            return Err(DiskError::Used { path: path.to_owned(), what });
        }
    }
    disk.write_aligned(&vec![0; LOOK_BYTES], LOOK).map_err(io_error("write", path))?;
    disk.area = layout::area_bytes(size);
    let superblock = Superblock { cluster, mark, area: disk.area }.encode();
    for at in layout::SUPERBLOCKS {
        disk.write_aligned(&superblock, at).map_err(io_error("write", path))?;
    }
    Ok(())
}

/// Waits for as long as a lease on a former witness's disk may last, and refuses it
/// if a node changed its block meanwhile.
fn unused(path: &Path, begin: &[u8]) -> Result<(), DiskError> {
    let FoundSuperblock::Valid(former) = Superblock::decode(begin) else { return Ok(()) };
    let disk = Disk::open(path, former.mark)?;
    let look = || disk.look().map_err(io_error("read", path));
    let first = look()?;
    let active = |look: &Look| {
        let active = |seen: &Seen| match seen {
            Seen::Block(block) if block.state != Use::Idle => Some(block.length_ms),
            Seen::Torn(_) => Some(LONGEST_MS),
            _ => None,
        };
        look.blocks.values().filter_map(active).max()
    };
    let Some(length_ms) = active(&first) else { return Ok(()) };
    std::thread::sleep(Duration::from_millis(DiskTiming { length_ms }.dead_after_ms()));
    match look()? == first {
        true => Ok(()),
        false => Err(DiskError::Used { path: path.to_owned(), what: "a witness that a node still hosts".into() }),
    }
}

fn blank(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// What a disk seems to hold, by the marks that are known; `None` if it is blank.
/// Offsets are those of `libblkid` and of QEMU's `docs/interop`.
fn looks_like(begin: &[u8]) -> Option<String> {
    if blank(begin) {
        return None;
    }
    if let FoundSuperblock::Valid(found) = Superblock::decode(begin) {
        return Some(format!("a witness of cluster {} ({})", found.cluster, found.mark));
    }
    let marks: [(usize, &[u8], &str); 11] = [
        (0x438, &[0x53, 0xef], "an ext file system"),
        (0, b"XFSB", "an XFS file system"),
        (0x1_0040, b"_BHRfS_M", "a btrfs file system"),
        (0x218, b"LVM2 001", "an LVM physical volume"),
        (0x18, b"LVM2 001", "an LVM physical volume"),
        (0, b"LUKS\xba\xbe", "an encrypted (LUKS) disk"),
        (4086, b"SWAPSPACE2", "swap space"),
        (0, b"QFI\xfb", "a qcow2 image"),
        (0x200, b"EFI PART", "a partition table (GPT)"),
        (0x1fe, &[0x55, 0xaa], "a boot sector or partition table"),
        (0, b"#!", "a script"),
    ];
    let known = marks.iter().find(|(at, mark, _)| begin.get(*at..).is_some_and(|rest| rest.starts_with(mark)));
    Some(known.map_or_else(|| "something that is not zeros".to_owned(), |(.., what)| (*what).to_owned()))
}

/// Memory that a disk can be read into without the page cache.
struct Aligned {
    memory: Vec<u8>,
    begin: usize,
    length: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let memory = vec![0; length + BLOCK];
        let begin = memory.as_ptr().align_offset(BLOCK);
        Aligned { memory, begin, length }
    }

    fn len(&self) -> usize {
        self.length
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.begin..self.begin + self.length]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.begin..self.begin + self.length]
    }
}

/// A copy, zeros up to the next whole block.
fn aligned(bytes: &[u8]) -> Aligned {
    let mut copy = Aligned::new(layout::whole(bytes.len()));
    copy.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
    copy
}
