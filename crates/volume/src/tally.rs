//! What a disk has done so far, and what it waits for.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::nbd::{Command, Request};

/// What a disk has done since it is served, and what it waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads that were answered.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes that were answered.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Requests that failed, those that made no sense among them.
    pub failed: u64,
    /// Requests that wait until this node may write.
    pub waiting_for_fence: u64,
    /// Requests that wait for slabs, or until slabs are given back.
    pub waiting_for_slabs: u64,
    /// Requests that wait until there is a way to the storage.
    pub waiting_for_way: u64,
}

/// What a request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// That this node may write.
    Fence,
    /// Slabs, or that some are given back.
    Slabs,
    /// A way to the storage.
    Way,
}

/// Counts while the disk is served.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    failed: AtomicU64,
    fence: AtomicU64,
    slabs: AtomicU64,
    way: AtomicU64,
}

impl Tally {
    pub(crate) fn done(&self, request: &Request) {
        let (count, bytes) = match request.command {
            Command::Read => (&self.reads, &self.read_bytes),
            Command::Write { .. } => (&self.writes, &self.written_bytes),
            _ => return,
        };
        count.fetch_add(1, Ordering::Relaxed);
        bytes.fetch_add(u64::from(request.length), Ordering::Relaxed);
    }

    pub(crate) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// A request begins to wait, or does so no more.
    pub(crate) fn waits(&self, what: Waiting, begins: bool) {
        let count = match what {
            Waiting::Fence => &self.fence,
            Waiting::Slabs => &self.slabs,
            Waiting::Way => &self.way,
        };
        match begins {
            true => count.fetch_add(1, Ordering::Relaxed),
            false => count.fetch_sub(1, Ordering::Relaxed),
        };
    }

    pub(crate) fn counters(&self) -> Counters {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counters {
            reads: of(&self.reads),
            read_bytes: of(&self.read_bytes),
            writes: of(&self.writes),
            written_bytes: of(&self.written_bytes),
            failed: of(&self.failed),
            waiting_for_fence: of(&self.fence),
            waiting_for_slabs: of(&self.slabs),
            waiting_for_way: of(&self.way),
        }
    }
}
