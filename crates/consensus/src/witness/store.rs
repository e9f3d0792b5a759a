//! The witness's log and snapshot on its disk.
//!
//! ```text
//!  pair    0        1        2        3          of areas, one after the other for
//!  area  ┌──┬──┐  ┌──┬──┐  ┌──┬──┐  ┌──┬──┐      each new owner
//!        │ A│ B│  │  │  │  │  │  │  │  │  │      an owner goes from A to B and back
//!        └──┴──┘  └──┴──┘  └──┴──┘  └──┴──┘
//!  area   = snapshot record*        each begins at a whole block
//!  record = head bytes of the log   one write; never written over while it counts
//! ```
//! An area begins with a copy of everything, and counts when its head is written,
//! which is last. So a crash leaves the area before it or the new one, whole. What a
//! former owner still has on its way to the disk lands in its own pair, which is
//! used again by the fourth owner after it at the earliest.
//!
//! A record that does not check out ends the log, if it is the last one: it was
//! being written and nobody was told that it was done. Less than what the owners'
//! blocks say is durable, or a whole record behind one that is not, is damage.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holdfast_core::NodeId;
use holdfast_core::witness::Kept;
use uuid::Uuid;

use super::disk::{Disk, DiskError};
use super::layout::{self, AREAS, AREAS_AT, AreaHead, BLOCK, RECORD_HEAD, RecordHead};
use crate::error::ConsensusError;
use crate::medium::{Medium, NotReplaced, failed};

/// Behind the end of the log so many bytes are searched for a record that must not
/// be there: more than one write can be.
const SEARCHED: usize = 2 << 20;
/// The log is read in such pieces.
const PIECE: usize = 256 << 10;

/// What a store writes on: a [`Disk`], or in tests one that loses its power.
pub(crate) trait Blocks: Send + Sync + 'static {
    fn path(&self) -> &Path;
    fn mark(&self) -> Uuid;
    /// Bytes of each area.
    fn area(&self) -> usize;
    fn heads(&self) -> io::Result<Vec<(usize, AreaHead)>>;
    fn read(&self, at: u64, bytes: usize) -> io::Result<Vec<u8>>;
    /// Durable when it returns.
    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()>;
}

impl Blocks for Disk {
    fn path(&self) -> &Path {
        Disk::path(self)
    }

    fn mark(&self) -> Uuid {
        Disk::mark(self)
    }

    fn area(&self) -> usize {
        Disk::area(self)
    }

    fn heads(&self) -> io::Result<Vec<(usize, AreaHead)>> {
        Disk::heads(self)
    }

    fn read(&self, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
        self.read_at(at, bytes)
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_aligned(bytes, at)
    }
}

/// The store of one owner, for as long as it owns.
pub(crate) struct Store {
    disk: Arc<dyn Blocks>,
    me: NodeId,
    epoch: u64,
    /// The areas that this owner uses.
    pair: usize,
    kept: Arc<Mutex<Kept>>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// `None` before anything was ever written.
    area: Option<Area>,
    log: Vec<u8>,
    snapshot: Option<Vec<u8>>,
    /// Once a head may or may not have been written, nobody knows what counts.
    broken: Option<String>,
}

struct Area {
    index: usize,
    head: AreaHead,
    /// Where the next record begins, in bytes behind the area's beginning.
    end: usize,
    sequence: u64,
}

impl Store {
    /// Takes over what is on the disk, for the owner of this epoch: everything is
    /// copied to an area of its own before this returns. `known` is what the blocks
    /// say, read after this node became the owner.
    pub(crate) fn open(
        disk: Arc<dyn Blocks>,
        me: NodeId,
        epoch: u64,
        known: Kept,
        kept: Arc<Mutex<Kept>>,
    ) -> Result<Store, DiskError> {
        let path = disk.path().to_owned();
        let damaged = |what: String| DiskError::Damaged { path: path.clone(), what };
        let unreadable = |source| DiskError::Io { action: "read", path: path.clone(), source };
        let last = disk.heads().map_err(unreadable)?.into_iter().max_by_key(|(_, head)| *head);
        let pair = last.map_or(0, |(index, _)| (index / 2 + 1) % (AREAS / 2));
        let store = Store { disk, me, epoch, pair, kept, inner: Mutex::default() };
        let Some((index, head)) = last else {
            return match known == Kept::default() {
                true => Ok(store),
                false => Err(damaged("what it held is gone".into())),
            };
        };
        if head.epoch >= epoch {
            return Err(damaged(format!("an area of epoch {} is there before its time", head.epoch)));
        }
        let (snapshot, log) = store.read_area(index, &head).map_err(|error| match error {
            Unread::Io(source) => unreadable(source),
            Unread::Damaged(what) => damaged(what),
        })?;
        let found = Kept { epoch: head.epoch, generation: head.generation, length: log.len() as u64 };
        if found < known {
            return Err(damaged(format!("{known:?} is to be there, but {found:?} is")));
        }
        let taken = store.switch(&mut store.inner(), log, snapshot);
        taken.map_err(|error| DiskError::Io { action: "write", path: path.clone(), source: error.into_io() })?;
        Ok(store)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // It changes only after what it says is on the disk.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, index: usize) -> Range<u64> {
        let begin = AREAS_AT + (index * self.disk.area()) as u64;
        begin..begin + self.disk.area() as u64
    }

    fn read_area(&self, index: usize, head: &AreaHead) -> Result<(Option<Vec<u8>>, Vec<u8>), Unread> {
        let damaged = |what: &str| Err(Unread::Damaged(format!("area {index}: {what}")));
        let place = self.place(index);
        if head.snapshot > self.disk.area() as u64 {
            return damaged("its snapshot is longer than it");
        }
        let snapshot = match head.snapshot as usize {
            0 => None,
            bytes => Some(self.disk.read(place.start, bytes)?),
        };
        if snapshot.as_ref().is_some_and(|bytes| crc32fast::hash(bytes) != head.snapshot_crc) {
            return damaged("the checksum of its snapshot is wrong");
        }
        let mut records = Records {
            disk: &*self.disk,
            place: place.start + layout::whole(head.snapshot as usize) as u64..place.end,
            read: Vec::new(),
        };
        let (mut log, mut at, mut sequence) = (Vec::new(), 0, 0);
        while let Some((found, payload)) = records.at(at, head)? {
            if found.sequence != sequence || found.at != log.len() as u64 {
                return damaged("a record is out of order");
            }
            log.extend_from_slice(&payload);
            at += layout::whole(RECORD_HEAD + payload.len());
            sequence += 1;
        }
        if records.any_after(at + BLOCK, head, sequence)? {
            return damaged("a record in the middle of the log is damaged");
        }
        if (log.len() as u64) < head.log {
            return damaged("the beginning of its log is damaged");
        }
        Ok((snapshot, log))
    }

    /// Begins another area with all of this. On an error what counted before still
    /// does, unless it is [`NotReplaced::Unknown`].
    fn switch(&self, inner: &mut Inner, log: Vec<u8>, snapshot: Option<Vec<u8>>) -> Result<(), NotReplaced> {
        usable(inner)?;
        let mine = inner.area.as_ref().filter(|area| area.head.epoch == self.epoch);
        let index = mine.map_or(2 * self.pair, |area| area.index ^ 1);
        let head = AreaHead {
            epoch: self.epoch,
            generation: mine.map_or(1, |area| area.head.generation + 1),
            node: self.me,
            snapshot: snapshot.as_ref().map_or(0, |bytes| bytes.len() as u64),
            snapshot_crc: snapshot.as_ref().map_or(0, |bytes| crc32fast::hash(bytes)),
            log: log.len() as u64,
        };
        let mut bytes = snapshot.clone().unwrap_or_default();
        bytes.resize(layout::whole(bytes.len()), 0);
        bytes.extend(RecordHead::encode(self.disk.mark(), &head, 0, 0, &log));
        if bytes.len() > self.disk.area() {
            return Err(no_room().into());
        }
        self.disk.write(&bytes, self.place(index).start).map_err(|error| failed("writing an area", &error))?;
        if let Err(error) = self.disk.write(&head.encode(self.disk.mark()), layout::head_at(index)) {
            let text = format!("writing an area's head failed: {error}");
            inner.broken = Some(text.clone());
            return Err(NotReplaced::Unknown(text));
        }
        *inner = Inner { area: Some(Area { index, head, end: bytes.len(), sequence: 1 }), log, snapshot, broken: None };
        self.publish(inner);
        Ok(())
    }

    /// Lets the next renewal of the lease say what is durable.
    fn publish(&self, inner: &Inner) {
        let Some(area) = &inner.area else { return };
        let now = Kept { epoch: self.epoch, generation: area.head.generation, length: inner.log.len() as u64 };
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    fn io(&self, action: &'static str) -> impl FnOnce(NotReplaced) -> ConsensusError {
        let path = self.log_path();
        move |error| ConsensusError::Io { action, path, source: error.into_io() }
    }
}

enum Unread {
    Io(io::Error),
    Damaged(String),
}

impl From<io::Error> for Unread {
    fn from(error: io::Error) -> Self {
        Unread::Io(error)
    }
}

impl NotReplaced {
    fn into_io(self) -> io::Error {
        match self {
            NotReplaced::Kept(error) => error,
            NotReplaced::Unknown(what) => io::Error::other(what),
        }
    }
}

fn usable(inner: &Inner) -> io::Result<()> {
    inner.broken.as_ref().map_or(Ok(()), |broken| Err(io::Error::other(broken.clone())))
}

fn no_room() -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, "the witness's disk is too small for the cluster's log and state")
}

/// The records of an area, read as far as needed.
struct Records<'a> {
    disk: &'a dyn Blocks,
    place: Range<u64>,
    read: Vec<u8>,
}

impl Records<'_> {
    /// Makes sure that this much is read, if there is as much.
    fn upto(&mut self, end: usize) -> io::Result<()> {
        let room = (self.place.end - self.place.start) as usize;
        while self.read.len() < end.min(room) {
            let more = PIECE.min(room - self.read.len());
            self.read.extend(self.disk.read(self.place.start + self.read.len() as u64, more)?);
        }
        Ok(())
    }

    fn head(&mut self, at: usize, area: &AreaHead) -> io::Result<Option<RecordHead>> {
        self.upto(at + BLOCK)?;
        Ok(self.read.get(at..).and_then(|bytes| RecordHead::decode(self.disk.mark(), area, bytes)))
    }

    fn at(&mut self, at: usize, area: &AreaHead) -> io::Result<Option<(RecordHead, Vec<u8>)>> {
        let Some(head) = self.head(at, area)? else { return Ok(None) };
        let payload = at + head.payload().start..at + head.payload().end;
        self.upto(payload.end)?;
        let payload = self.read.get(payload).filter(|bytes| crc32fast::hash(bytes) == head.crc);
        Ok(payload.map(|bytes| (head, bytes.to_vec())))
    }

    fn any_after(&mut self, from: usize, area: &AreaHead, sequence: u64) -> io::Result<bool> {
        for at in (from..from + SEARCHED).step_by(BLOCK) {
            if at as u64 >= self.place.end - self.place.start {
                break;
            }
            if self.head(at, area)?.is_some_and(|head| head.sequence > sequence) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Medium for Store {
    fn log_path(&self) -> PathBuf {
        self.disk.path().to_owned()
    }

    fn snapshot_path(&self) -> PathBuf {
        self.disk.path().to_owned()
    }

    fn read_log(&self) -> Result<Option<Vec<u8>>, ConsensusError> {
        let inner = self.inner();
        Ok(inner.area.is_some().then(|| inner.log.clone()))
    }

    fn create_log(&self, bytes: &[u8]) -> Result<(), ConsensusError> {
        self.switch(&mut self.inner(), bytes.to_vec(), None).map_err(self.io("write"))
    }

    fn cut_log(&self, end: u64) -> Result<(), ConsensusError> {
        let mut inner = self.inner();
        let (log, snapshot) = (inner.log[..end as usize].to_vec(), inner.snapshot.clone());
        self.switch(&mut inner, log, snapshot).map_err(self.io("write"))
    }

    fn append(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut inner = self.inner();
        usable(&inner)?;
        let Some(area) = &inner.area else { return Err(io::Error::other("the log was never created")) };
        if at != inner.log.len() as u64 {
            return Err(io::Error::other(format!("a write at {at} of a log of {} bytes", inner.log.len())));
        }
        let record = RecordHead::encode(self.disk.mark(), &area.head, area.sequence, at, bytes);
        if area.end + record.len() > self.disk.area() {
            // Packed into one record the same log takes less room.
            let log = [inner.log.as_slice(), bytes].concat();
            let snapshot = inner.snapshot.clone();
            return self.switch(&mut inner, log, snapshot).map_err(NotReplaced::into_io);
        }
        let place = self.place(area.index).start + area.end as u64;
        // Whether it was written or not: like a failed flush, not like a full disk.
        let broken = |error: io::Error| io::Error::other(format!("writing failed: {error}"));
        self.disk.write(&record, place).map_err(broken)?;
        inner.log.extend_from_slice(bytes);
        if let Some(area) = &mut inner.area {
            area.end += record.len();
            area.sequence += 1;
        }
        self.publish(&inner);
        Ok(())
    }

    fn read_at(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        let inner = self.inner();
        let begin = at as usize;
        let wanted = inner.log.get(begin..begin + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(wanted);
        Ok(())
    }

    fn replace_log(&self, bytes: &[u8]) -> Result<(), NotReplaced> {
        let mut inner = self.inner();
        let snapshot = inner.snapshot.clone();
        self.switch(&mut inner, bytes.to_vec(), snapshot)
    }

    fn read_snapshot(&self) -> Result<Option<Vec<u8>>, ConsensusError> {
        Ok(self.inner().snapshot.clone())
    }

    fn write_snapshot(&self, bytes: &[u8]) -> io::Result<()> {
        let mut inner = self.inner();
        let log = inner.log.clone();
        self.switch(&mut inner, log, Some(bytes.to_vec())).map_err(NotReplaced::into_io)
    }
}
