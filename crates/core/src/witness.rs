//! Who hosts the witness: a lease on the disk itself.
//!
//! The witness is a participant of consensus whose vote and log lie on a disk that
//! the nodes share. Whatever it says must come from one host at a time, also while
//! the nodes cannot reach each other. So the right to speak for it is written on
//! the disk: one block for each node, and each node writes only its own.
//!
//! ```text
//!             nobody active                   still nobody active
//!  watching ───── write claim ──▶ claiming ── look, write own ──▶ owning ─┐ renews
//!     ▲  ▲                           │                              │ ▲───┘
//!     │  └──── conflict: write idle ─┘        lease ended, released │
//!     └──────────────────────────── write idle ─────────────────────┘
//! ```
//! * **One at a time.** A claim is durable before its writer looks again. Of two who
//!   claim at once, the later write is followed by a look that sees the earlier one;
//!   whoever sees another active withdraws.
//! * **The lease** counts from when the owner *issued* the last write that was done
//!   before the lease ended; a write that is done later revives nothing. A reader
//!   calls a block dead when it is unchanged for the length that stands in it and
//!   10 % more, counted from when it *had read* it to when it began to read it again.
//!   The owner's end comes first, if clocks differ in rate by less than 10 %.
//! * **Late writes** of a former owner land in its own block, under an epoch that is
//!   no longer the highest.
//! * A block that is torn may be an active one.
//! * **A disk that shows less than was seen on it before** was restored or exchanged:
//!   it is stale, and is neither hosted nor written, so that it stays recognisable.
//!
//! Whoever hosts lets an answer of the witness out only while [`DiskLease::held`]
//! *after* what it answers for is durable: whoever hosts later reads the disk later.
//!
//! Pure: the caller does one read or write at a time and says how it went.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::lease::{BootTime, LeaseTiming};
use crate::model::NodeId;

/// There is a block for each node up to this number; nodes beyond do not host.
pub const HOSTS: u64 = 256;

/// How long a lease on the disk is and what follows from that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskTiming {
    /// Its length in milliseconds.
    pub length_ms: u64,
}

impl DiskTiming {
    /// Two fifths of a node's lease: when a host dies, another one has to see that,
    /// host the witness and renew its own lease before that one ends.
    pub fn of(lease: LeaseTiming) -> Self {
        DiskTiming { length_ms: lease.length_ms * 2 / 5 }
    }

    /// Time between two renewals.
    pub fn renew_ms(self) -> u64 {
        self.length_ms / 5
    }

    /// Time between two looks of a node that may have to take over.
    pub fn watch_ms(self) -> u64 {
        self.length_ms / 3
    }

    /// By how much one waits longer than the one before it.
    pub fn stagger_ms(self) -> u64 {
        self.length_ms / 10
    }

    /// How long a block that was written for this length stays unchanged until its
    /// writer has certainly lost the lease.
    pub fn dead_after_ms(self) -> u64 {
        self.length_ms + self.length_ms.div_ceil(10)
    }
}

/// What a node's block says of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Use {
    /// It does not host and is not about to.
    #[default]
    Idle,
    /// It is about to host.
    Claim,
    /// It hosts.
    Own,
}

/// What is durable of the witness's log, as a lower bound: whoever takes over and
/// finds less has a damaged disk before it. The greatest of all blocks counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Kept {
    /// The epoch of the owner that wrote it.
    pub epoch: u64,
    /// How often that owner began a new area.
    pub generation: u64,
    /// Bytes of its log.
    pub length: u64,
}

/// A node's block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Its writer.
    pub node: NodeId,
    /// Counts the claims on this disk: each is one above the highest that was seen.
    pub epoch: u64,
    /// Counts this node's writes, so that no two are the same.
    pub counter: u64,
    /// What it says.
    pub state: Use,
    /// For how long, in milliseconds.
    pub length_ms: u64,
    /// What is durable of the witness's log.
    pub kept: Kept,
}

/// What is read where a node's block should be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Seen {
    /// Nothing was ever written.
    #[default]
    Empty,
    /// A whole block.
    Block(Block),
    /// Bytes that are no block, by a checksum of them: a write that was cut short,
    /// of somebody who may be active.
    Torn(u64),
}

/// Everything that one look at the disk shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// The blocks, by node; one that is missing is empty.
    pub blocks: BTreeMap<NodeId, Seen>,
    /// The highest epoch in the heads of the areas that hold the log.
    pub data_epoch: u64,
}

impl Look {
    /// The greatest epoch and counter of all blocks.
    pub fn highest(&self) -> (u64, u64) {
        self.whole().map(|block| (block.epoch, block.counter)).max().unwrap_or_default()
    }

    /// What must be durable of the witness's log.
    pub fn kept(&self) -> Kept {
        self.whole().map(|block| block.kept).max().unwrap_or_default()
    }

    fn whole(&self) -> impl Iterator<Item = &Block> {
        self.blocks.values().filter_map(|seen| match seen {
            Seen::Block(block) => Some(block),
            _ => None,
        })
    }

    fn torn(&self) -> u64 {
        self.blocks.values().filter(|seen| matches!(seen, Seen::Torn(_))).count() as u64
    }
}

/// What this node has to do with hosting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Want {
    /// Nothing: it gives the lease up if it has it.
    #[default]
    Nothing,
    /// It should host: it claims as soon as nobody is active.
    Host,
    /// It hosts if nobody else does.
    StandIn {
        /// How many go before it.
        rank: u64,
    },
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read all blocks, then call [`DiskLease::looked`] or [`DiskLease::failed`].
    Look,
    /// Write this node's block durably, then call [`DiskLease::wrote`] or
    /// [`DiskLease::failed`].
    Write(Block),
    /// Nothing before this moment.
    Wait(BootTime),
}

/// The highest that was seen on a disk; a disk that shows less is stale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Memory {
    /// The highest epoch.
    pub epoch: u64,
    /// The highest counter in that epoch.
    pub counter: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Watching,
    /// The claim is to be written, or is being written.
    Claiming,
    /// The claim is durable since; to look again.
    Claimed {
        issued: BootTime,
    },
    /// Nobody else was active when it looked; to write that it owns.
    Taking {
        until: BootTime,
    },
    Owning {
        until: BootTime,
    },
}

#[derive(Clone, Copy, Debug)]
struct Watched {
    seen: Seen,
    /// When these bytes had first been read.
    since: BootTime,
    dead: bool,
}

/// One node's part in deciding who hosts the witness.
#[derive(Clone, Debug)]
pub struct DiskLease {
    me: NodeId,
    timing: DiskTiming,
    /// The longest that any writer's lease may be, for blocks that do not say it.
    longest_ms: u64,
    want: Want,
    phase: Phase,
    /// The last block that this node wrote or tried to write.
    mine: Block,
    kept: Kept,
    /// This node's block on the disk may say that it is active.
    dirty: bool,
    watched: BTreeMap<NodeId, Watched>,
    memory: Memory,
    /// Epochs to leave out, because a torn block may hide one.
    gap: u64,
    stale: bool,
    free_since: Option<BootTime>,
    /// A dead one was active last, and did not leave in order.
    died: bool,
    look_at: BootTime,
    claim_at: BootTime,
    renew_at: BootTime,
    issued: BootTime,
    conflicts: u64,
}

impl DiskLease {
    /// For a node that has just started; `longest_ms` is the length of the longest
    /// lease that may be in use on the disk, `memory` what was seen on it before.
    pub fn new(me: NodeId, timing: DiskTiming, longest_ms: u64, memory: Memory) -> Self {
        DiskLease {
            me,
            timing,
            longest_ms: longest_ms.max(timing.length_ms),
            want: Want::Nothing,
            phase: Phase::Watching,
            mine: Block { node: me, ..Block::default() },
            kept: Kept::default(),
            dirty: false,
            watched: BTreeMap::new(),
            memory,
            gap: 0,
            stale: false,
            free_since: None,
            died: false,
            look_at: BootTime(0),
            claim_at: BootTime(0),
            renew_at: BootTime(0),
            issued: BootTime(0),
            conflicts: 0,
        }
    }

    /// Says what this node has to do with hosting from now on.
    pub fn want(&mut self, want: Want) {
        if want != self.want && (self.want == Want::Nothing || want == Want::Host) {
            // While there was nothing to do it looked seldom, and may have missed much.
            self.free_since = None;
            if self.phase == Phase::Watching {
                self.look_at = BootTime::default();
            }
        }
        self.want = want;
    }

    /// Leases are of another length from the next write on.
    pub fn set_timing(&mut self, timing: DiskTiming, longest_ms: u64) {
        self.timing = timing;
        self.longest_ms = longest_ms.max(timing.length_ms);
    }

    /// It was agreed on that this epoch was reached: a disk that shows less is stale.
    pub fn agreed(&mut self, epoch: u64) {
        self.seen_by_another(Memory { epoch, counter: 0 });
    }

    /// So much was seen by another node: a disk that shows less is stale.
    pub fn seen_by_another(&mut self, seen: Memory) {
        self.memory = self.memory.max(seen);
    }

    /// What is durable of the log, for the next renewal to say.
    pub fn keep(&mut self, kept: Kept) {
        self.kept = self.kept.max(kept);
    }

    /// What to do next. The one before must be done.
    pub fn next(&mut self, now: BootTime) -> Step {
        if let Phase::Owning { until } = self.phase
            && (now >= until || self.want == Want::Nothing || self.stale)
        {
            self.withdraw(now, 0);
        }
        match self.phase {
            Phase::Watching if now < self.look_at => Step::Wait(self.look_at),
            // Not on a stale disk: with what it writes that would show more than before.
            Phase::Watching if self.dirty && !self.stale => self.write(now, Use::Idle, self.mine.epoch),
            Phase::Watching => {
                self.issued = now;
                Step::Look
            }
            Phase::Claiming => {
                let epoch = self.memory.epoch + 1 + self.gap;
                self.write(now, Use::Claim, epoch)
            }
            Phase::Claimed { .. } => {
                self.issued = now;
                Step::Look
            }
            Phase::Taking { .. } => self.write(now, Use::Own, self.mine.epoch),
            Phase::Owning { .. } if now >= self.renew_at => self.write(now, Use::Own, self.mine.epoch),
            Phase::Owning { .. } if now >= self.look_at => {
                self.issued = now;
                Step::Look
            }
            Phase::Owning { .. } => Step::Wait(self.renew_at.min(self.look_at)),
        }
    }

    fn write(&mut self, now: BootTime, state: Use, epoch: u64) -> Step {
        self.issued = now;
        self.renew_at = now.plus_ms(self.timing.renew_ms());
        self.mine = Block {
            node: self.me,
            epoch,
            counter: self.mine.counter + 1,
            state,
            length_ms: self.timing.length_ms,
            kept: self.kept,
        };
        // Until it is known to say otherwise.
        self.dirty = true;
        Step::Write(self.mine)
    }

    /// A look was done at `done`; it was begun when [`DiskLease::next`] asked for it.
    pub fn looked(&mut self, done: BootTime, look: &Look) {
        self.remember(look);
        self.watch(done, look);
        let others_active = self.active().is_some();
        match self.phase {
            Phase::Watching => self.consider(done, others_active),
            Phase::Claimed { issued } => {
                let until = issued.plus_ms(self.timing.length_ms);
                // It may have slept since it chose its epoch, and others hosted meanwhile.
                let beaten =
                    look.blocks.iter().any(|(node, seen)| *node != self.me && Self::rank(seen).0 >= self.mine.epoch);
                let beaten = beaten || look.data_epoch >= self.mine.epoch;
                if others_active || beaten || self.stale || done >= until || self.want == Want::Nothing {
                    // Perhaps each saw the other. Different numbers differ in one of
                    // these digits, so not all conflicts of two go on.
                    let digit = (self.me.0 >> (3 * (self.conflicts % 3))) % 8;
                    self.conflicts += 1;
                    self.withdraw(done, self.timing.stagger_ms() * (digit + 1));
                } else {
                    self.phase = Phase::Taking { until };
                }
            }
            Phase::Owning { .. } => {
                self.look_at = done.plus_ms(self.timing.length_ms * 5);
                let epoch = self.mine.epoch;
                let beaten =
                    |seen: &Seen| matches!(seen, Seen::Block(block) if block.state == Use::Own && block.epoch > epoch);
                if self.watched.values().any(|watched| beaten(&watched.seen)) {
                    self.withdraw(done, 0);
                }
            }
            Phase::Claiming | Phase::Taking { .. } => {}
        }
    }

    fn consider(&mut self, done: BootTime, others_active: bool) {
        // From when nobody was seen active, not from when somebody last was: a node
        // that looks seldom would go before the one that should host.
        self.free_since = (!others_active).then(|| self.free_since.unwrap_or(done));
        let free = self.free_since.unwrap_or(done);
        let stagger = self.timing.stagger_ms();
        let patience = match self.want {
            Want::Nothing => None,
            Want::Host => Some(0),
            // The one that should host goes first, unless it is the one that died: it
            // looks every so often.
            Want::StandIn { rank } if self.died => Some(stagger * rank),
            Want::StandIn { rank } => Some(stagger * rank + 2 * self.timing.watch_ms()),
        };
        let due = patience.map(|patience| free.plus_ms(patience).max(self.claim_at));
        let pause = match self.want {
            Want::Host => self.timing.watch_ms(),
            Want::StandIn { rank } => self.timing.watch_ms() * (rank + 1).min(8),
            Want::Nothing => self.timing.length_ms * 8,
        };
        let later = done.plus_ms(pause);
        self.look_at = match due {
            Some(_) if others_active => {
                self.watched.values().filter_map(|watched| self.dies_at(watched)).min().unwrap_or(later).min(later)
            }
            Some(due) if !self.stale => due.min(later),
            _ => later,
        };
        if !others_active && !self.stale && due.is_some_and(|due| done >= due) {
            self.phase = Phase::Claiming;
        }
    }

    /// When this active one is to be looked at again to call it dead.
    fn dies_at(&self, watched: &Watched) -> Option<BootTime> {
        let active = Self::says_active(&watched.seen) && !watched.dead;
        active.then(|| watched.since.plus_ms(self.dead_after_ms(&watched.seen)))
    }

    fn dead_after_ms(&self, seen: &Seen) -> u64 {
        let length_ms = match seen {
            Seen::Block(block) => block.length_ms,
            _ => self.longest_ms,
        };
        DiskTiming { length_ms }.dead_after_ms()
    }

    fn says_active(seen: &Seen) -> bool {
        match seen {
            Seen::Empty => false,
            Seen::Block(block) => block.state != Use::Idle,
            Seen::Torn(_) => true,
        }
    }

    /// The others' blocks, and since when they are what they are.
    fn watch(&mut self, done: BootTime, look: &Look) {
        for (node, seen) in look.blocks.iter().filter(|(node, _)| **node != self.me) {
            let before = self.watched.get(node).filter(|watched| watched.seen == *seen);
            let since = before.map_or(done, |watched| watched.since);
            let dead = before.is_some_and(|watched| watched.dead)
                || self.issued >= since.plus_ms(self.dead_after_ms(seen)) && Self::says_active(seen);
            self.watched.insert(*node, Watched { seen: *seen, since, dead });
        }
        self.watched.retain(|node, _| look.blocks.contains_key(node));
        let last = self.watched.values().max_by_key(|watched| Self::rank(&watched.seen));
        self.died = last.is_some_and(|watched| watched.dead);
        // An earlier life of this node may have written its block; nothing of that
        // life is alive.
        match look.blocks.get(&self.me) {
            Some(Seen::Block(block)) => {
                self.mine.counter = self.mine.counter.max(block.counter);
                self.kept = self.kept.max(block.kept);
                if self.phase == Phase::Watching {
                    self.mine.epoch = self.mine.epoch.max(block.epoch);
                    self.dirty |= block.state != Use::Idle;
                }
            }
            Some(Seen::Torn(_)) if self.phase == Phase::Watching => {
                self.mine.epoch = self.mine.epoch.max(self.memory.epoch + self.gap);
                self.dirty = true;
            }
            _ => {}
        }
    }

    fn rank(seen: &Seen) -> (u64, u64) {
        match seen {
            Seen::Block(block) => (block.epoch, block.counter),
            _ => (0, 0),
        }
    }

    fn remember(&mut self, look: &Look) {
        let (epoch, counter) = look.highest();
        let shown = Memory { epoch, counter };
        self.gap = look.torn();
        let epochs = epoch.max(look.data_epoch);
        // A torn block may be the one that shows the most.
        self.stale = if self.gap == 0 { shown < self.memory } else { epochs + self.gap < self.memory.epoch };
        if !self.stale {
            self.memory = self.memory.max(shown);
            self.agreed(look.data_epoch);
        }
    }

    /// The write that [`DiskLease::next`] asked for is durable since `done`.
    pub fn wrote(&mut self, done: BootTime) {
        let seen = Memory { epoch: self.mine.epoch, counter: self.mine.counter };
        self.memory = self.memory.max(seen);
        let renewed = self.issued.plus_ms(self.timing.length_ms);
        match self.phase {
            Phase::Watching => self.dirty = false,
            Phase::Claiming => self.phase = Phase::Claimed { issued: self.issued },
            Phase::Taking { until } | Phase::Owning { until } if done < until => {
                if matches!(self.phase, Phase::Taking { .. }) {
                    self.look_at = done.plus_ms(self.timing.length_ms * 5);
                }
                self.phase = Phase::Owning { until: renewed };
            }
            Phase::Taking { .. } | Phase::Owning { .. } => self.withdraw(done, 0),
            Phase::Claimed { .. } => {}
        }
    }

    /// What [`DiskLease::next`] asked for failed; a write may have happened.
    pub fn failed(&mut self, done: BootTime) {
        match self.phase {
            Phase::Owning { until } if done < until => {
                self.renew_at = done.plus_ms(self.timing.renew_ms() / 2);
                self.look_at = self.look_at.max(done.plus_ms(self.timing.renew_ms()));
            }
            Phase::Watching => {
                // Nothing is known of the others any more.
                self.look_at = done.plus_ms(self.timing.watch_ms());
                self.free_since = None;
            }
            _ => self.withdraw(done, self.timing.length_ms),
        }
    }

    fn withdraw(&mut self, now: BootTime, pause_ms: u64) {
        self.phase = Phase::Watching;
        self.free_since = None;
        self.look_at = now;
        self.claim_at = now.plus_ms(pause_ms);
    }

    /// Whether this node speaks for the witness at `now`.
    pub fn held(&self, now: BootTime) -> bool {
        self.until().is_some_and(|until| now < until)
    }

    /// Until when this node speaks for the witness, if it does.
    pub fn until(&self) -> Option<BootTime> {
        match self.phase {
            Phase::Owning { until } => Some(until),
            _ => None,
        }
    }

    /// The epoch under which this node claimed last.
    pub fn epoch(&self) -> u64 {
        self.mine.epoch
    }

    /// What was seen on this disk, to be remembered beyond this process's life.
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// Whether the last look showed less than was seen before.
    pub fn stale(&self) -> bool {
        self.stale
    }

    /// The other node that is active by the last look: the one with the highest epoch.
    pub fn active(&self) -> Option<NodeId> {
        let active = self.watched.iter().filter(|(_, watched)| Self::says_active(&watched.seen) && !watched.dead);
        active.max_by_key(|(_, watched)| Self::rank(&watched.seen)).map(|(node, _)| *node)
    }
}

#[cfg(test)]
#[path = "witness/tests.rs"]
mod tests;
