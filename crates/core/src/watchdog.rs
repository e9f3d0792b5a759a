//! When a host's hardware watchdog is armed, fed and left alone (safety rule 2).
//!
//! ```text
//!              a VM is alive                    its lease is over for DEATH_MS, and
//!  disarmed ───────────────────▶ armed          it was not shown dead
//!     ▲  ▲                       fed every ──────────────────────────────▶ left alone
//!     │  └── no VM is alive ──── FEED_MS                                   │  │
//!     │                            ▲── they died, and others may run ──────┘  │
//!     └──────────────────────────────── they died ────────────────────────────┘
//! ```
//! A watchdog that is left alone resets its host. Only the death of the VMs takes that
//! back: a lease that is granted again while a VM of the last one may be alive does
//! not, because the keeper does not use it before (see the keeper's table).
//!
//! Whoever feeds may stand still itself, at any moment. So the watchdog's own time is
//! as long as a lease and [`DEATH_MS`] together: it never bites before a VM had that
//! long to be shown dead.

use serde::{Deserialize, Serialize};

use crate::lease::BootTime;

/// How long a VM whose lease is over may take to be shown dead, in milliseconds. A
/// process that was killed is gone after some, and after seconds when it has very
/// much memory to give back.
pub const DEATH_MS: u64 = 5_000;

/// How often an armed watchdog is fed, in milliseconds.
pub const FEED_MS: u64 = 1_000;

/// After a watchdog could not be armed, in milliseconds.
pub const RETRY_MS: u64 = 5_000;

/// The shortest time that a watchdog is set to, in seconds: what the VMs of a keeper
/// that died have until its successor has to have seen them dead.
const SHORTEST_S: u32 = 10;

/// The time that a watchdog is set to while leases are `lease_ms` long, in seconds.
pub fn timeout_s(lease_ms: u64) -> u32 {
    let longest = lease_ms.saturating_add(DEATH_MS).div_ceil(1_000);
    SHORTEST_S.max(u32::try_from(longest).unwrap_or(u32::MAX))
}

/// What the keeper sees of its lease and its VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// VMs may run.
    pub held: bool,
    /// When the lease of those that are alive ends, or ended.
    pub ends: BootTime,
    /// A VM is alive, or was not shown dead.
    pub alive: bool,
    /// How long a lease is, in milliseconds.
    pub lease_ms: u64,
}

/// What to do with the watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing.
    Rest,
    /// Arm it with this time, in seconds; then say [`Watchdog::armed`] or [`Watchdog::failed`].
    Arm(u32),
    /// Feed it.
    Feed,
    /// Set it to another time, in seconds, and feed it; then as for [`Act::Arm`].
    Retime(u32),
    /// Do not feed it any more: said once.
    Leave,
    /// Disarm it; then say [`Watchdog::disarmed`]. Until then it is to be fed.
    Disarm,
}

/// Decides about one watchdog.
#[derive(Clone, Copy, Debug, Default)]
pub struct Watchdog {
    /// The time that it is set to.
    armed: Option<u32>,
    left: bool,
    /// Since when there are VMs alive that may not be.
    over_since: Option<BootTime>,
    retry_at: BootTime,
}

impl Watchdog {
    /// What to do now. It is asked at least every [`FEED_MS`] while
    /// [`Watchdog::wake_ms`] says so.
    pub fn turn(&mut self, now: BootTime, seen: Seen) -> Act {
        self.over_since = match (seen.alive, seen.held) {
            (true, false) => Some(self.over_since.unwrap_or(now).min(seen.ends)),
            _ => None,
        };
        let undead = self.over_since.is_some_and(|since| now.ms_since(since) >= DEATH_MS);
        let wanted = timeout_s(seen.lease_ms);
        match self.armed {
            // Too late to begin: whoever was not watched is not reset either.
            None if !seen.alive || undead || now < self.retry_at => Act::Rest,
            None => Act::Arm(wanted),
            Some(_) if !seen.alive => Act::Disarm,
            Some(_) if undead && self.left => Act::Rest,
            Some(_) if undead => {
                self.left = true;
                Act::Leave
            }
            Some(set) => {
                self.left = false;
                // A lease that is over says nothing about those to come.
                if set < wanted || (set != wanted && seen.held) { Act::Retime(wanted) } else { Act::Feed }
            }
        }
    }

    /// It is armed, with the time that was wanted.
    pub fn armed(&mut self, timeout_s: u32) {
        *self = Watchdog { armed: Some(timeout_s), left: false, ..*self };
    }

    /// It is disarmed.
    pub fn disarmed(&mut self) {
        *self = Watchdog { armed: None, left: false, ..*self };
    }

    /// It could not be armed, and is disarmed.
    pub fn failed(&mut self, now: BootTime) {
        self.disarmed();
        self.retry_at = now.plus_ms(RETRY_MS);
    }

    /// When to ask again at the latest, if nothing is heard of VMs before.
    pub fn wake(&self, now: BootTime, seen: Seen) -> Option<BootTime> {
        match self.armed {
            Some(_) => Some(now.plus_ms(FEED_MS)),
            None => (seen.alive && self.retry_at > now).then_some(self.retry_at),
        }
    }
}

/// A host's watchdog.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its path.
    pub path: String,
    /// What it says that it is.
    pub identity: String,
}

/// How a host's watchdog stands, as its keeper says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// None is used.
    Absent {
        /// Why not; a clause.
        why: String,
    },
    /// It is armed when a VM runs.
    Ready {
        /// Which.
        device: Device,
    },
    /// It is fed.
    Armed {
        /// Which.
        device: Device,
        /// How long after the last feeding it resets the host, in seconds.
        timeout_s: u32,
    },
    /// It is not fed any more: it resets the host.
    Left {
        /// Which.
        device: Device,
        /// How long after the last feeding it does, in seconds.
        timeout_s: u32,
    },
}

impl Standing {
    /// The device that is used or would be.
    pub fn device(&self) -> Option<&Device> {
        match self {
            Standing::Absent { .. } => None,
            Standing::Ready { device } | Standing::Armed { device, .. } | Standing::Left { device, .. } => Some(device),
        }
    }
}

#[cfg(test)]
mod tests;
