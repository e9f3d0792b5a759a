//! Looks at all of a LUN's description, damaged or not, and changes nothing.

use super::contents::Contents;
use super::geometry::{SUPERBLOCK, SUPERBLOCK_COPY};
use super::store::{AreaFound, Device, StoreError, read_area};
use super::superblock::{NoSuperblock, Superblock};
use super::{PAGE_BYTES, Store};

/// How one of two copies is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Whole, and the one that counts or like it.
    Sound,
    /// Whole, and older than the one that counts.
    Older,
    /// There is none.
    Missing,
    /// There was one, and it is damaged.
    Damaged,
    /// Of a later version of the format.
    Version(u32),
}

/// How an area is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AreaState {
    /// Whole, and the one that counts or the one before it.
    Whole {
        /// Counts the times that an area was begun.
        generation: u64,
        /// The epoch of its last writer.
        epoch: u64,
        /// The revision that it leads to.
        revision: u64,
    },
    /// It holds no whole snapshot: not used yet, or given up half-way.
    Unused,
    /// It contradicts itself.
    Damaged {
        /// What does.
        what: &'static str,
        /// Where on the device, in bytes.
        at: u64,
    },
}

/// What was found on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// The size of the device in bytes.
    pub bytes: u64,
    /// The superblocks, the one at the beginning first.
    pub superblocks: [Condition; 2],
    /// The one that counts.
    pub superblock: Option<Superblock>,
    /// The areas, if it is known where they are.
    pub areas: Option<[AreaState; 2]>,
    /// The files, as far as a whole area says, with their revision.
    pub contents: Option<(Contents, u64)>,
}

impl Inspection {
    /// What is wrong with it, a line each, for people; nothing if nothing is.
    pub fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        for (condition, at) in self.superblocks.iter().zip([SUPERBLOCK, SUPERBLOCK_COPY]) {
            match condition {
                Condition::Sound => {}
                Condition::Older => findings.push(format!("the superblock at byte {at} is older than the other")),
                Condition::Missing => findings.push(format!("there is no superblock at byte {at}")),
                Condition::Damaged => findings.push(format!("the superblock at byte {at} is damaged")),
                Condition::Version(version) => findings.push(format!(
                    "the superblock at byte {at} has format {version}, which this program does not know"
                )),
            }
        }
        if let Some(superblock) = &self.superblock
            && self.bytes < superblock.geometry.end()
        {
            let needs = superblock.geometry.end();
            findings.push(format!("the device has {} bytes and the volume needs {needs}", self.bytes));
        }
        for area in self.areas.iter().flatten() {
            if let AreaState::Damaged { what, at } = area {
                findings.push(format!("the journal is damaged at byte {at}: {what}"));
            }
        }
        if self.areas.is_some() && self.contents.is_none() {
            findings.push("no snapshot of its files is whole".into());
        }
        findings
    }
}

/// Looks at a device. Where only the superblocks are lost, `known` says where the rest
/// is, if that is known from elsewhere.
///
/// # Errors
/// The device fails.
pub fn inspect(device: &impl Device, known: Option<&Superblock>) -> Result<Inspection, StoreError> {
    let io = |action| move |source| StoreError::Io { action, source };
    let bytes = device.bytes().map_err(io("look at the device"))?;
    let mut found = Vec::new();
    for at in [SUPERBLOCK, SUPERBLOCK_COPY] {
        let mut page = vec![0; PAGE_BYTES];
        device.read(at, &mut page).map_err(io("read a superblock"))?;
        found.push(Superblock::decode(&page));
    }
    let superblock = found.iter().flatten().max_by_key(|superblock| superblock.written).cloned();
    let condition = |found: &Result<Superblock, NoSuperblock>| match found {
        Ok(one) if superblock.as_ref().is_some_and(|counts| counts.written > one.written) => Condition::Older,
        Ok(_) => Condition::Sound,
        Err(NoSuperblock::Other) => Condition::Missing,
        Err(NoSuperblock::Damaged) => Condition::Damaged,
        Err(NoSuperblock::Version(version)) => Condition::Version(*version),
    };
    let superblocks = [condition(&found[0]), condition(&found[1])];
    let mut inspection = Inspection { bytes, superblocks, superblock, areas: None, contents: None };
    let fits = |superblock: &&Superblock| superblock.geometry.data_start() <= bytes;
    let Some(by) = inspection.superblock.as_ref().or(known).filter(fits) else { return Ok(inspection) };
    let areas = [read_area(device, by, 0)?, read_area(device, by, 1)?];
    let state = |area: &AreaFound, other: &AreaFound| match (&area.whole, area.damage.or(area.lost_snapshot(other))) {
        (_, Some((what, at))) => AreaState::Damaged { what, at },
        (Some(whole), None) => {
            let (generation, epoch, revision) = (whole.head.generation, whole.head.epoch, whole.head.revision);
            AreaState::Whole { generation, epoch, revision }
        }
        (None, None) => AreaState::Unused,
    };
    inspection.areas = Some([state(&areas[0], &areas[1]), state(&areas[1], &areas[0])]);
    let whole = areas.into_iter().filter_map(|area| area.whole).max_by_key(|area| area.head.generation);
    inspection.contents = whole.map(|area| (area.contents, area.head.revision));
    Ok(inspection)
}

impl<D: Device> Store<D> {
    /// Whether anything on the device, where a volume with this superblock has its
    /// journal, was written for it: tells the right device when both superblocks are lost.
    ///
    /// # Errors
    /// The device fails.
    pub fn leaves_traces(device: &D, superblock: &Superblock) -> Result<bool, StoreError> {
        Ok(read_area(device, superblock, 0)?.latest > 0 || read_area(device, superblock, 1)?.latest > 0)
    }
}
