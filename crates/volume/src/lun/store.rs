//! The description of a LUN's files, on the LUN: read, and changed so that a crash
//! at any moment leaves all of a change or nothing of it.
//!
//! Of the two areas, the one with the later complete snapshot counts, with the
//! frames of the same generation that follow it. A change is one more frame, and is
//! made when the device has flushed it. Where no frame fits any more, the other
//! area begins with a snapshot, under a later generation than any that was ever
//! seen; until its last frame is whole, the first one counts.
//!
//! A crash can leave one frame incomplete, the last, whose change nobody was told
//! of: it is passed over. A frame that is whole behind one that is not is damage.

use std::io;

use super::PAGE_BYTES;
use super::contents::{Contents, Wrong};
use super::frame::{self, Frame, Head, Kind, MOST_BYTES};
use super::geometry::{Geometry, SUPERBLOCK, SUPERBLOCK_COPY};
use super::op::Op;
use super::superblock::{Identity, NoSuperblock, Superblock};

/// A device that holds a LUN. Reads and writes are whole pages.
pub trait Device {
    /// Its size in bytes.
    ///
    /// # Errors
    /// The system's.
    fn bytes(&self) -> io::Result<u64>;

    /// Reads all of `into` from a position in bytes.
    ///
    /// # Errors
    /// The system's.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes all of `from` to a position in bytes.
    ///
    /// # Errors
    /// The system's; some of it may have been written.
    fn write(&self, at: u64, from: &[u8]) -> io::Result<()>;

    /// Returns when everything that was written is on stable storage.
    ///
    /// # Errors
    /// The system's; nobody can say what is on stable storage.
    fn flush(&self) -> io::Result<()>;
}

/// Why a LUN's description cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The device failed. What was being changed may have been, or may not.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was done.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// It is no volume.
    #[error("the device holds no volume of Holdfast")]
    NoVolume,
    /// It is one of a later version of Holdfast.
    #[error("the volume has format {0}, which is newer than this program knows: update this node")]
    Version(u32),
    /// It has become smaller.
    #[error(
        "the device has {has} bytes and the volume on it needs {needs}: it has become smaller, or is another device"
    )]
    Smaller {
        /// What the device has.
        has: u64,
        /// What the volume needs.
        needs: u64,
    },
    /// The device is too small for a volume.
    #[error("a device of {0} bytes is too small for a volume: 40 MiB is the least")]
    TooSmall(u64),
    /// What is written there contradicts itself.
    #[error(
        "the volume's description is damaged ({what}, at byte {at}): nothing was changed; `holdfast volume repair` in the cluster that it belongs to writes it anew"
    )]
    Damaged {
        /// What does not fit.
        what: &'static str,
        /// Where, in bytes.
        at: u64,
    },
    /// An earlier change failed half-way, so nobody knows how things stand.
    #[error("an earlier change may or may not have been made: open the volume again")]
    Unsure,
    /// A later owner has written meanwhile.
    #[error("epoch {ours} may not write: the volume is at epoch {theirs} already")]
    Outdated {
        /// The caller's.
        ours: u64,
        /// The volume's.
        theirs: u64,
    },
    /// No room for the description.
    #[error("the volume has no room to describe more files: remove some")]
    Full,
    /// A change that cannot be.
    #[error(transparent)]
    Wrong(#[from] Wrong),
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Io { action, source }
}

/// A LUN's description.
#[derive(Debug)]
pub struct Store<D> {
    device: D,
    superblock: Superblock,
    contents: Contents,
    /// The area that counts, its generation, and how far it is written.
    area: usize,
    generation: u64,
    sequence: u64,
    used: u64,
    /// The latest generation of which anything was ever seen.
    latest: u64,
    epoch: u64,
    revision: u64,
    unsure: bool,
    /// A superblock that could not be read, but did not have to be.
    superblock_lost: bool,
}

/// What an area holds.
#[derive(Debug)]
pub(super) struct Area {
    which: usize,
    pub head: Head,
    pub contents: Contents,
    used: u64,
}

/// What was found in an area.
#[derive(Debug)]
pub(super) struct AreaFound {
    /// What it holds, if its snapshot is whole.
    pub whole: Option<Area>,
    /// The latest generation of which there is anything in it.
    pub latest: u64,
    /// The latest generation of which there are changes in it: its snapshot was whole.
    changes: u64,
    /// Where it begins, in bytes.
    start: u64,
    /// What contradicts the rest of it, and where, in bytes.
    pub damage: Option<(&'static str, u64)>,
}

impl AreaFound {
    fn generation(&self) -> u64 {
        self.whole.as_ref().map_or(0, |whole| whole.head.generation)
    }

    /// Whether there are changes to a snapshot that is not whole any more, and later than
    /// what another area holds.
    pub fn lost_snapshot(&self, other: &AreaFound) -> Option<(&'static str, u64)> {
        let lost = self.whole.is_none() && self.damage.is_none() && self.changes > other.generation();
        lost.then_some(("there are changes to a snapshot, and it is not whole", self.start))
    }
}

fn damage([first, second]: &[AreaFound; 2]) -> Option<(&'static str, u64)> {
    let lost = first.lost_snapshot(second).or(second.lost_snapshot(first));
    first.damage.or(second.damage).or(lost)
}

impl<D: Device> Store<D> {
    /// Makes a volume on a device, whatever is on it.
    ///
    /// # Errors
    /// It is too small, or fails.
    pub fn format(
        device: D,
        identity: Identity,
        slab_bytes: Option<u64>,
        made_ms: u64,
        epoch: u64,
    ) -> Result<Store<D>, StoreError> {
        let bytes = device.bytes().map_err(failed("look at the device"))?;
        let geometry = Geometry::of(bytes, slab_bytes).ok_or(StoreError::TooSmall(bytes))?;
        // What was there before must not be found again: first of all its superblocks.
        let nothing = vec![0; PAGE_BYTES];
        for at in [SUPERBLOCK, SUPERBLOCK_COPY] {
            device.write(at, &nothing).map_err(failed("clear the device"))?;
        }
        let many = vec![0; 1 << 20];
        for which in [0, 1] {
            for at in (0..geometry.area_bytes).step_by(many.len()) {
                let length = many.len().min((geometry.area_bytes - at) as usize);
                device.write(geometry.area(which) + at, &many[..length]).map_err(failed("clear the device"))?;
            }
        }
        device.flush().map_err(failed("clear the device"))?;
        let superblock = Superblock { identity, geometry, made_ms, written: 0 };
        let mut store = Store {
            device,
            superblock,
            contents: Contents::new(geometry),
            area: 1,
            generation: 0,
            sequence: 0,
            used: 0,
            latest: 0,
            epoch,
            revision: 0,
            unsure: false,
            superblock_lost: false,
        };
        store.snapshot()?;
        store.write_superblocks()?;
        Ok(store)
    }

    /// Reads a volume; changes nothing.
    ///
    /// # Errors
    /// [`StoreError`] says what it is instead.
    pub fn open(device: D) -> Result<Store<D>, StoreError> {
        let (superblock, superblock_lost) = read_superblock(&device)?;
        let geometry = superblock.geometry;
        let has = device.bytes().map_err(failed("look at the device"))?;
        if has < geometry.end() {
            return Err(StoreError::Smaller { has, needs: geometry.end() });
        }
        let (first, second) = (read_area(&device, &superblock, 0)?, read_area(&device, &superblock, 1)?);
        let latest = first.latest.max(second.latest);
        let areas = [first, second];
        if let Some((what, at)) = damage(&areas) {
            return Err(StoreError::Damaged { what, at });
        }
        let found = areas.into_iter().filter_map(|area| area.whole).max_by_key(|area| area.head.generation);
        let no_snapshot = StoreError::Damaged { what: "no snapshot of its files is whole", at: geometry.area(0) };
        let Area { which, head, contents, used } = found.ok_or(no_snapshot)?;
        Ok(Store {
            device,
            superblock,
            contents,
            area: which,
            generation: head.generation,
            sequence: head.sequence,
            used,
            latest,
            epoch: head.epoch,
            revision: head.revision,
            unsure: false,
            superblock_lost,
        })
    }

    /// What the LUN is.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The files.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// The revision that the last change led to.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The epoch of the last owner that wrote.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Whether one of the two superblocks is missing; [`Store::take_over`] mends it.
    pub fn superblock_lost(&self) -> bool {
        self.superblock_lost
    }

    /// Becomes the owner under an epoch: from here on everything is written where no
    /// earlier owner writes, so that what one of them still had on its way does no harm.
    ///
    /// # Errors
    /// A later owner was there, or the device fails.
    pub fn take_over(&mut self, epoch: u64) -> Result<(), StoreError> {
        if epoch <= self.epoch {
            return Err(StoreError::Outdated { ours: epoch, theirs: self.epoch });
        }
        self.epoch = epoch;
        self.snapshot()?;
        if self.superblock_lost {
            self.write_superblocks()?;
            self.superblock_lost = false;
        }
        Ok(())
    }

    /// Makes changes, all of them or none, that lead to a revision.
    ///
    /// # Errors
    /// [`StoreError::Wrong`]: nothing was changed. [`StoreError::Full`]: nothing was
    /// changed on the device. [`StoreError::Io`]: they may have been made. After the
    /// latter two the volume has to be opened again.
    pub fn commit(&mut self, revision: u64, ops: &[Op]) -> Result<(), StoreError> {
        if self.unsure {
            return Err(StoreError::Unsure);
        }
        let mut bytes = Vec::new();
        ops.iter().for_each(|op| op.encode(&mut bytes));
        for (done, op) in ops.iter().enumerate() {
            if let Err(wrong) = self.contents.apply(op) {
                if done > 0 {
                    self.unsure = true;
                    let again = read_area(&self.device, &self.superblock, self.area)?.whole;
                    self.contents = again.ok_or(StoreError::Unsure)?.contents;
                    self.unsure = false;
                }
                return Err(wrong.into());
            }
        }
        self.revision = revision;
        let frame = frame::encode(&self.head(Kind::Journal, self.generation, self.sequence), &bytes);
        if bytes.len() > MOST_BYTES || self.used + frame.len() as u64 > self.superblock.geometry.area_bytes {
            return self.snapshot();
        }
        self.unsure = true;
        self.device.write(self.position(self.area, self.used), &frame).map_err(failed("write the journal"))?;
        self.device.flush().map_err(failed("flush the journal"))?;
        self.unsure = false;
        self.used += frame.len() as u64;
        self.sequence += 1;
        Ok(())
    }

    fn head(&self, kind: Kind, generation: u64, sequence: u64) -> Head {
        Head {
            kind,
            volume: self.superblock.identity.volume,
            generation,
            sequence,
            epoch: self.epoch,
            revision: self.revision,
            last_file: self.contents.last_file(),
        }
    }

    fn position(&self, area: usize, offset: u64) -> u64 {
        self.superblock.geometry.area(area) + offset
    }

    /// Begins the other area with everything that there is.
    fn snapshot(&mut self) -> Result<(), StoreError> {
        let mut parts = vec![Vec::new()];
        for op in self.contents.rebuild() {
            let mut bytes = Vec::new();
            op.encode(&mut bytes);
            match parts.last_mut() {
                Some(part) if part.len() + bytes.len() <= MOST_BYTES => part.extend(bytes),
                _ => parts.push(bytes),
            }
        }
        let (area, generation, last) = (1 - self.area, self.latest + 1, parts.len() - 1);
        let frames: Vec<_> = parts
            .iter()
            .enumerate()
            .map(|(at, ops)| {
                let kind = if at == last { Kind::Last } else { Kind::Part };
                frame::encode(&self.head(kind, generation, at as u64), ops)
            })
            .collect();
        let length = frames.iter().map(Vec::len).sum::<usize>() as u64;
        self.unsure = true;
        if length > self.superblock.geometry.area_bytes {
            return Err(StoreError::Full);
        }
        self.still_ours(area)?;
        // Whatever comes of it, this generation is not used again.
        self.latest = generation;
        let mut used = 0;
        for frame in &frames {
            self.device.write(self.position(area, used), frame).map_err(failed("write a snapshot"))?;
            used += frame.len() as u64;
        }
        self.device.flush().map_err(failed("flush a snapshot"))?;
        (self.area, self.generation, self.sequence, self.used) = (area, generation, frames.len() as u64, used);
        self.unsure = false;
        Ok(())
    }

    /// Refuses to begin an area that a later owner has begun.
    fn still_ours(&self, area: usize) -> Result<(), StoreError> {
        let mut begin = vec![0; frame::LONGEST.min(self.superblock.geometry.area_bytes as usize)];
        self.device.read(self.position(area, 0), &mut begin).map_err(failed("read the journal"))?;
        let head = frame::decode(&begin).map(|frame| frame.head);
        match head.filter(|head| head.volume == self.superblock.identity.volume && head.epoch > self.epoch) {
            Some(head) => Err(StoreError::Outdated { ours: self.epoch, theirs: head.epoch }),
            None => Ok(()),
        }
    }

    /// Writes everything anew from what is known elsewhere, whatever is there: the
    /// superblocks, and the files where the journal is damaged. An area that is whole is
    /// only overwritten when both are.
    ///
    /// # Errors
    /// The device is smaller than the volume, has no room, or fails.
    pub fn rebuild(
        device: D,
        superblock: Superblock,
        contents: Contents,
        (epoch, revision): (u64, u64),
    ) -> Result<Store<D>, StoreError> {
        let has = device.bytes().map_err(failed("look at the device"))?;
        if has < superblock.geometry.end() {
            return Err(StoreError::Smaller { has, needs: superblock.geometry.end() });
        }
        let found = [read_area(&device, &superblock, 0)?, read_area(&device, &superblock, 1)?];
        // The snapshot goes into the other one.
        let stays = usize::from(found[1].generation() > found[0].generation());
        let latest = found[0].latest.max(found[1].latest);
        let last_file = found.iter().flat_map(|area| &area.whole).map(|whole| whole.head.last_file).max();
        let mut store = Store {
            device,
            superblock,
            contents,
            area: stays,
            generation: 0,
            sequence: 0,
            used: 0,
            latest,
            epoch,
            revision,
            unsure: false,
            superblock_lost: false,
        };
        store.contents.set_last_file(last_file.unwrap_or_default());
        store.write_superblocks()?;
        store.snapshot()?;
        if found[stays].whole.is_none() {
            // What is left of it contradicts itself, or nobody needs it.
            let nothing = vec![0; PAGE_BYTES];
            store.device.write(store.position(stays, 0), &nothing).map_err(failed("clear an area"))?;
            store.device.flush().map_err(failed("clear an area"))?;
        }
        Ok(store)
    }

    /// Gives the volume another name or another cluster.
    ///
    /// # Errors
    /// The device fails; the volume has to be opened again.
    pub fn identify(&mut self, identity: Identity) -> Result<(), StoreError> {
        self.superblock.identity = Identity { volume: self.superblock.identity.volume, ..identity };
        self.write_superblocks()
    }

    /// One after the other, so that one of them is whole at any time.
    fn write_superblocks(&mut self) -> Result<(), StoreError> {
        self.superblock.written += 1;
        let page = self.superblock.encode();
        for at in [SUPERBLOCK_COPY, SUPERBLOCK] {
            self.device.write(at, &page).map_err(failed("write a superblock"))?;
            self.device.flush().map_err(failed("flush a superblock"))?;
        }
        Ok(())
    }
}

impl Superblock {
    /// Reads what a LUN is, and nothing else of it.
    ///
    /// # Errors
    /// [`StoreError`] says what it is instead.
    pub fn read(device: &impl Device) -> Result<Superblock, StoreError> {
        read_superblock(device).map(|(superblock, _)| superblock)
    }
}

/// The superblock that counts, and whether the other is missing.
fn read_superblock(device: &impl Device) -> Result<(Superblock, bool), StoreError> {
    let mut found = Vec::new();
    let mut damaged = None;
    for at in [SUPERBLOCK, SUPERBLOCK_COPY] {
        let mut page = vec![0; PAGE_BYTES];
        device.read(at, &mut page).map_err(failed("read a superblock"))?;
        match Superblock::decode(&page) {
            Ok(superblock) => found.push(superblock),
            Err(NoSuperblock::Version(version)) => return Err(StoreError::Version(version)),
            Err(NoSuperblock::Damaged) => damaged = Some(at),
            Err(NoSuperblock::Other) => {}
        }
    }
    let lost = found.len() < 2;
    match (found.into_iter().max_by_key(|superblock| superblock.written), damaged) {
        (Some(superblock), _) => Ok((superblock, lost)),
        (None, Some(at)) => Err(StoreError::Damaged { what: "its superblock", at }),
        (None, None) => Err(StoreError::NoVolume),
    }
}

/// Reads an area.
pub(super) fn read_area(device: &impl Device, superblock: &Superblock, which: usize) -> Result<AreaFound, StoreError> {
    let geometry = superblock.geometry;
    let start = geometry.area(which);
    let mut bytes = vec![0; geometry.area_bytes as usize];
    device.read(start, &mut bytes).map_err(failed("read the journal"))?;
    let ours = |at: usize| {
        bytes.get(at..).and_then(frame::decode).filter(|frame: &Frame| frame.head.volume == superblock.identity.volume)
    };
    let pages = (0..bytes.len()).step_by(PAGE_BYTES);
    let heads: Vec<_> = pages.filter_map(|at| Some((at, ours(at)?.head))).collect();
    let latest = heads.iter().map(|(_, head)| head.generation).max().unwrap_or(0);
    let changes = heads.iter().map(|(_, head)| head).filter(|head| head.kind == Kind::Journal);
    let changes = changes.map(|head| head.generation).max().unwrap_or(0);

    let found = |whole, damage| Ok(AreaFound { whole, latest, changes, start, damage });
    let damaged = |what, at: usize| found(None, Some((what, start + at as u64)));
    let mut contents = Contents::new(geometry);
    let (mut used, mut last, mut whole) = (0, None::<Head>, false);
    while let Some(Frame { head, ops, length }) = ours(used) {
        let follows = match &last {
            None => head.sequence == 0 && head.kind != Kind::Journal,
            Some(last) => {
                head.generation == last.generation
                    && head.sequence == last.sequence + 1
                    && whole == (head.kind == Kind::Journal)
            }
        };
        if !follows {
            break;
        }
        for op in &ops {
            if contents.apply(op).is_err() {
                return damaged("a change that contradicts those before it", used);
            }
        }
        contents.set_last_file(head.last_file);
        whole |= head.kind == Kind::Last;
        used += length;
        last = Some(head);
    }
    let Some(last) = last.filter(|_| whole) else { return found(None, None) };
    let behind = heads
        .iter()
        .find(|(at, head)| *at >= used && head.generation == last.generation && head.sequence > last.sequence);
    if let Some((at, _)) = behind {
        return damaged("a change is missing before one that is there", *at);
    }
    let head = Head { sequence: last.sequence + 1, ..last };
    found(Some(Area { which, head, contents, used: used as u64 }), None)
}

#[cfg(test)]
mod tests;
