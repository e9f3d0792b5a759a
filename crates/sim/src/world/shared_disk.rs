//! The disk that the witness lives on: a block for each node that says who hosts,
//! and areas that hold its vote and log. Writes take time, may hang and land long
//! after their writer is gone, may be cut short; a disk can be out of reach for one
//! host or all, and can be exchanged for an older copy of itself.

use std::collections::BTreeMap;

use holdfast_core::NodeId;
use holdfast_core::witness::{Block, Kept, Look, Seen};

use crate::raft::Entry;

/// How many areas there are: whoever takes over goes on in another one.
const AREAS: usize = 4;

/// What is appended to an area.
#[derive(Clone, Debug)]
pub enum Frame {
    Vote((u64, Option<usize>)),
    /// Entries after so many that are there already.
    Entries(usize, Vec<Entry>),
}

/// What a host has the disk do.
#[derive(Clone, Debug)]
pub enum Transfer {
    Block(Block),
    /// A new area with everything that the one before it says; its head comes last.
    Begin {
        area: usize,
        head: (u64, u64),
        frames: Vec<Frame>,
    },
    /// One more, at this place.
    Frame {
        area: usize,
        head: (u64, u64),
        at: usize,
        frame: Frame,
    },
}

/// An area: whose it is, and what is in it.
#[derive(Clone, Debug, Default)]
pub struct Area {
    /// Epoch of its owner, and how often that one began an area.
    pub head: (u64, u64),
    pub frames: Vec<Frame>,
}

#[derive(Clone, Debug, Default)]
struct Content {
    blocks: BTreeMap<NodeId, Seen>,
    areas: [Area; AREAS],
}

/// The disk.
#[derive(Clone, Debug, Default)]
pub struct SharedDisk {
    content: Content,
    /// A copy from earlier.
    copy: Content,
    /// Who cannot reach it: a bit for each host.
    pub out_of_reach: u128,
    /// How long an access takes, in milliseconds; zero: as usual.
    pub slow_ms: u64,
    torn: u64,
}

impl SharedDisk {
    /// A disk with what the witness begins with.
    pub fn new(frames: Vec<Frame>) -> Self {
        let mut disk = SharedDisk::default();
        disk.content.areas[0] = Area { head: (0, 1), frames };
        disk.copy = disk.content.clone();
        disk
    }

    /// Whether a host reaches it.
    pub fn reached_by(&self, host: usize) -> bool {
        self.out_of_reach >> host & 1 == 0
    }

    /// Everything that says who hosts.
    pub fn look(&self) -> Look {
        let data_epoch = self.content.areas.iter().map(|area| area.head.0).max().unwrap_or(0);
        Look { blocks: self.content.blocks.clone(), data_epoch }
    }

    /// The area that counts, if it has all that is known to have been durable.
    pub fn newest(&self) -> Option<(usize, Area)> {
        let kept = self.look().kept();
        let areas = self.content.areas.iter().enumerate();
        let (at, area) = areas.max_by_key(|(_, area)| area.head)?;
        let has = Kept { epoch: area.head.0, generation: area.head.1, length: area.frames.len() as u64 };
        (has >= kept).then(|| (at, area.clone()))
    }

    /// The newest area, whatever it lacks.
    pub fn newest_unchecked(&self) -> Option<(usize, Area)> {
        self.content.areas.iter().cloned().enumerate().max_by_key(|(_, area)| area.head)
    }

    /// Where whoever takes over under `epoch` goes on.
    pub fn next_area(newest: usize, epoch: u64) -> usize {
        let area = epoch as usize % AREAS;
        if area == newest { (area + 1) % AREAS } else { area }
    }

    /// A transfer reaches the disk; one that is cut short leaves bytes that are nothing.
    pub fn land(&mut self, transfer: Transfer, cut_short: bool) {
        match transfer {
            Transfer::Block(block) => {
                self.torn += u64::from(cut_short);
                let seen = if cut_short { Seen::Torn(self.torn) } else { Seen::Block(block) };
                self.content.blocks.insert(block.node, seen);
            }
            Transfer::Begin { area, head, frames } => {
                let area = &mut self.content.areas[area];
                *area = if cut_short { Area::default() } else { Area { head, frames } };
            }
            Transfer::Frame { area, head, at, frame } => {
                let area = &mut self.content.areas[area];
                if area.head == head && area.frames.len() == at {
                    if !cut_short {
                        area.frames.push(frame);
                    }
                } else if at < area.frames.len() {
                    // It lies where another's is: neither that nor what follows can be read.
                    area.frames.truncate(at);
                }
            }
        }
    }

    /// Remembers what is on it now.
    pub fn copy(&mut self) {
        self.copy = self.content.clone();
    }

    /// The highest that the copy shows.
    pub fn copy_shows(&self) -> (u64, u64) {
        Look { blocks: self.copy.blocks.clone(), data_epoch: 0 }.highest()
    }

    /// It is exchanged for the copy.
    pub fn restore(&mut self) {
        self.content = self.copy.clone();
    }
}
