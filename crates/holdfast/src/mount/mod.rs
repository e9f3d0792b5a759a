//! `holdfast volume mount`: shows the files of a volume on a LUN as plain files, through
//! FUSE. The agent starts one process for each volume and answers its questions
//! (`agent/mounts.rs`); what it reads of a file comes from the volume server.
//!
//! ```text
//!  cp, sha256sum ─ kernel ─ /dev/fuse ─ this process ─┬─ lines of JSON ─ agent: lists, holds
//!                                                     └─ NBD ─ volume server: the bytes
//! ```
//! It keeps nothing that somebody would miss: without its agent it ends, and whatever it
//! had open is let go of. What is open cannot change, so nothing that is read is stale;
//! the kernel keeps nothing of it.

mod line;
mod opened;
pub mod protocol;
mod tree;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::Context as _;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, MountOption,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyStatfs, Request,
};

use line::Line;
use opened::{Opened, Read};
use protocol::{Answer, Ask, Listing};
use tree::{Found, Numbers, within};

/// How the kernel names the source of a mount of ours, before the volume's name.
pub const SOURCE: &str = "holdfast:";
/// A list of files is as good as new for so long.
const FRESH: Duration = Duration::from_millis(200);
/// The kernel asks again each time.
const ASK_AGAIN: Duration = Duration::ZERO;
/// What a `stat` calls a block, in bytes.
const STAT_BLOCK_BYTES: u64 = 512;
const BLOCK_BYTES: u32 = 4096;

/// Mounts a volume at a directory, and shows its files until the agent ends or somebody
/// unmounts it.
///
/// # Errors
/// It cannot be mounted.
pub fn run(volume: &str, at: &Path) -> anyhow::Result<()> {
    let agent = Line::open()?;
    let mut config = fuser::Config::default();
    config.mount_options = vec![
        MountOption::FSName(format!("{SOURCE}{volume}")),
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    let files = Files::new(agent)?;
    fuser::mount(files, at, &config).with_context(|| format!("cannot show volume {volume:?} at {}", at.display()))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is done one after the other, so that a file that was just closed can be removed.
enum Order {
    Open { name: String, reply: ReplyOpen },
    Release { handle: u64, reply: ReplyEmpty },
    Remove { name: String, reply: ReplyEmpty },
}

/// The files of the volume.
struct Files {
    agent: Arc<Line>,
    numbers: Mutex<Numbers>,
    listed: Mutex<Option<(Instant, Arc<Listing>)>>,
    opened: Arc<Opened>,
    orders: Sender<Order>,
}

impl Files {
    fn new(agent: Arc<Line>) -> std::io::Result<Files> {
        let (orders, receive) = channel();
        let opened = Arc::new(Opened::default());
        let (line, files) = (agent.clone(), opened.clone());
        std::thread::Builder::new().name("orders".into()).spawn(move || {
            for order in receive {
                carry_out(&line, &files, order);
            }
        })?;
        Ok(Files { agent, numbers: Mutex::default(), listed: Mutex::default(), opened, orders })
    }

    /// What is on the volume, as it was a moment ago at most.
    fn listing(&self) -> Result<Arc<Listing>, Errno> {
        let known = locked(&self.listed).clone();
        match known {
            Some((since, listing)) if since.elapsed() < FRESH => Ok(listing),
            _ => self.list(),
        }
    }

    /// What is on the volume now.
    fn list(&self) -> Result<Arc<Listing>, Errno> {
        let since = Instant::now();
        let Answer::Listing(listing) = self.agent.ask(Ask::List)? else { return Err(Errno::EIO) };
        let listing = Arc::new(listing);
        *locked(&self.listed) = Some((since, listing.clone()));
        Ok(listing)
    }

    fn name(&self, number: INodeNo) -> Result<String, Errno> {
        locked(&self.numbers).name(number.0).map(str::to_owned).ok_or(Errno::ENOENT)
    }

    fn name_in(&self, folder: INodeNo, name: &OsStr) -> Result<String, Errno> {
        // All names on a LUN are text.
        Ok(within(&self.name(folder)?, name.to_str().ok_or(Errno::ENOENT)?))
    }

    /// What `stat` says of a name. What was not there a moment ago is looked for again.
    fn look(&self, name: &str) -> Result<FileAttr, Errno> {
        let mut listing = self.listing()?;
        if listing.find(name).is_none() {
            listing = self.list()?;
        }
        let found = listing.find(name).ok_or(Errno::ENOENT)?;
        let number = locked(&self.numbers).of(name);
        Ok(attributes(number, found, &listing))
    }

    fn order(&self, order: Order) {
        // Whoever takes orders lives as long as this process.
        let _ = self.orders.send(order);
    }
}

fn attributes(number: u64, found: Found, listing: &Listing) -> FileAttr {
    let time = UNIX_EPOCH + Duration::from_millis(listing.since_ms);
    let (kind, perm, size, allocated) = match found {
        Found::Folder => (FileType::Directory, 0o700, 0, 0),
        Found::File(size) => (FileType::RegularFile, 0o400, size.bytes, size.allocated),
    };
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: allocated / STAT_BLOCK_BYTES,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

fn carry_out(agent: &Line, opened: &Opened, order: Order) {
    match order {
        Order::Open { name, reply } => match opened.open(agent, name) {
            // Past the kernel's cache: it would be read from there when the file is
            // another one already.
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
            Err(errno) => reply.error(errno),
        },
        Order::Release { handle, reply } => {
            opened.close(agent, handle);
            reply.ok();
        }
        Order::Remove { name, reply } => match agent.ask(Ask::Remove { name }) {
            Ok(_) => reply.ok(),
            Err(errno) => reply.error(errno),
        },
    }
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.name_in(parent, name).and_then(|name| self.look(&name)) {
            Ok(attributes) => reply.entry(&ASK_AGAIN, &attributes, Generation(0)),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.name(ino).and_then(|name| self.look(&name)) {
            Ok(mut attributes) => {
                if let Some(bytes) = handle.and_then(|handle| self.opened.bytes(handle.0)) {
                    attributes.size = bytes;
                }
                reply.attr(&ASK_AGAIN, &attributes);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        // One pass through a folder sees one list, if it does not take long.
        let listing = if offset == 0 { self.list() } else { self.listing() };
        let (folder, listing) = match self.name(ino).and_then(|folder| Ok((folder, listing?))) {
            Ok(found) => found,
            Err(errno) => return reply.error(errno),
        };
        let parent = folder.rsplit_once('/').map_or("", |(parent, _)| parent);
        let mut numbers = locked(&self.numbers);
        let dots = [(numbers.of(&folder), Found::Folder, "."), (numbers.of(parent), Found::Folder, "..")];
        let dots = dots.map(|(number, found, name)| (number, found, name.to_owned()));
        let entries = listing.entries(&folder).into_iter();
        let entries = entries.map(|(name, found)| (numbers.of(&within(&folder, &name)), found, name));
        let all = dots.into_iter().chain(entries).zip(1..);
        for ((number, found, name), next) in all.skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
            let kind = if found == Found::Folder { FileType::Directory } else { FileType::RegularFile };
            if reply.add(INodeNo(number), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.0 & libc::O_ACCMODE != libc::O_RDONLY || flags.0 & libc::O_TRUNC != 0 {
            return reply.error(Errno::EROFS);
        }
        match self.name(ino) {
            Ok(name) => self.order(Order::Open { name, reply }),
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.opened.read(handle.0, Read { offset, size, reply });
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.order(Order::Release { handle: handle.0, reply });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        *locked(&self.listed) = None;
        match self.name_in(parent, name) {
            Ok(name) => self.order(Order::Remove { name, reply }),
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.listing() {
            Ok(listing) => {
                let blocks = |bytes: u64| bytes / u64::from(BLOCK_BYTES);
                let (all, free) = (blocks(listing.size), blocks(listing.free));
                reply.statfs(all, free, free, listing.files.len() as u64, 0, BLOCK_BYTES, 255, BLOCK_BYTES);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        // One that is there has files in it.
        reply.error(Errno::ENOTEMPTY);
    }

    fn rename(&self, _: &Request, _: INodeNo, _: &OsStr, _: INodeNo, _: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }
}
