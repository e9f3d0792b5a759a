//! The states of a guest and of a migration, as QEMU names them.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;

macro_rules! names {
    ($(#[$meta:meta])* $enum:ident { $($(#[$doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
        #[serde(from = "String")]
        #[non_exhaustive]
        pub enum $enum {
            $($(#[$doc])* $variant,)*
            /// One that this crate does not know.
            Other(String),
        }

        impl From<String> for $enum {
            fn from(text: String) -> Self {
                match text.as_str() {
                    $($text => $enum::$variant,)*
                    _ => $enum::Other(text),
                }
            }
        }

        impl fmt::Display for $enum {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $($enum::$variant => $text,)*
                    $enum::Other(text) => text,
                })
            }
        }
    };
}

names! {
    /// What the guest's processors do, and why.
    RunState {
        /// They run.
        Running = "running",
        /// They stand still because somebody asked, or because a guest that
        /// arrived by migration was not continued yet.
        Paused = "paused",
        /// They never ran: QEMU was started so.
        Prelaunch = "prelaunch",
        /// Devices are not even made yet.
        Preconfig = "preconfig",
        /// They stand still because a disk failed.
        IoError = "io-error",
        /// The guest powered itself off; QEMU waits to be ended.
        Shutdown = "shutdown",
        /// The guest's kernel panicked.
        GuestPanicked = "guest-panicked",
        /// The accelerator failed.
        InternalError = "internal-error",
        /// The guest's watchdog stopped it.
        Watchdog = "watchdog",
        /// The guest sleeps and can be woken.
        Suspended = "suspended",
        /// A debugger stopped them.
        Debug = "debug",
        /// Its state is being loaded from a checkpoint.
        RestoreVm = "restore-vm",
        /// Its state is being written to a checkpoint.
        SaveVm = "save-vm",
        /// It waits for, or receives, a guest from another QEMU.
        InMigrate = "inmigrate",
        /// The last part of the guest is on its way to another QEMU.
        FinishMigrate = "finish-migrate",
        /// The guest was handed to another QEMU.
        PostMigrate = "postmigrate",
        /// A replica of a guest elsewhere.
        Colo = "colo",
    }
}

names! {
    /// How far a migration is.
    MigrationStatus {
        /// There was none.
        None = "none",
        /// The connection is being made; on a target also: it listens.
        Setup = "setup",
        /// RAM moves.
        Active = "active",
        /// It waits for a hot-plugged device to be released.
        WaitUnplug = "wait-unplug",
        /// The guest stands still; waiting for leave to switch over.
        PreSwitchover = "pre-switchover",
        /// The guest stands still; the devices' states move.
        Device = "device",
        /// The guest runs at the target and fetches its RAM.
        PostcopyActive = "postcopy-active",
        /// … and the connection is broken.
        PostcopyPaused = "postcopy-paused",
        /// … and is being mended.
        PostcopyRecover = "postcopy-recover",
        /// It is being cancelled.
        Cancelling = "cancelling",
        /// It was cancelled.
        Cancelled = "cancelled",
        /// It is over, and well.
        Completed = "completed",
        /// It is over, and failed.
        Failed = "failed",
        /// It became a replication.
        Colo = "colo",
    }
}

impl RunState {
    /// Whether the guest can be continued here by this QEMU's own account.
    pub fn may_continue(&self) -> bool {
        !matches!(
            self,
            RunState::InMigrate
                | RunState::FinishMigrate
                | RunState::PostMigrate
                | RunState::Colo
                | RunState::RestoreVm
                | RunState::Other(_)
        )
    }
}

impl MigrationStatus {
    /// Whether it is over, one way or the other.
    pub fn is_over(&self) -> bool {
        matches!(
            self,
            MigrationStatus::None | MigrationStatus::Cancelled | MigrationStatus::Completed | MigrationStatus::Failed
        )
    }
}

/// The answer to `query-status`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// What the processors do.
    #[serde(rename = "status")]
    pub state: RunState,
    /// Whether they run.
    pub running: bool,
}

/// The answer to `query-migrate`: how a migration stands. Fields that QEMU
/// leaves out are zero.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct MigrationProgress {
    /// How far it is.
    pub status: MigrationStatus,
    /// What QEMU says of a failure.
    pub error_desc: String,
    #[serde(rename = "total-time")]
    total_time_ms: u64,
    #[serde(rename = "downtime")]
    downtime_ms: u64,
    #[serde(rename = "expected-downtime")]
    expected_downtime_ms: u64,
    #[serde(rename = "setup-time")]
    setup_time_ms: u64,
    /// How much RAM has moved.
    pub ram: RamProgress,
    /// By how much the guest's processors are slowed down, in percent.
    pub cpu_throttle_percentage: u64,
    pub(crate) socket_address: Vec<SocketAddress>,
}

/// The RAM's part of a migration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct RamProgress {
    /// The guest's RAM, in bytes.
    #[serde(rename = "total")]
    pub total_bytes: u64,
    /// What is still to be sent, in bytes; grows again with each pass.
    #[serde(rename = "remaining")]
    pub remaining_bytes: u64,
    /// What went over the wire, in bytes.
    #[serde(rename = "transferred")]
    pub transferred_bytes: u64,
    /// How fast the guest dirties its RAM, in pages a second.
    pub dirty_pages_rate: u64,
    /// Bytes in a page.
    #[serde(rename = "page-size")]
    pub page_bytes: u64,
    /// How fast it goes, in megabits a second.
    pub mbps: f64,
    /// How many passes over the RAM were begun.
    #[serde(rename = "dirty-sync-count")]
    pub passes: u64,
}

/// Where a target listens.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(crate) struct SocketAddress {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) host: String,
    #[serde(default)]
    pub(crate) port: String,
}

#[allow(clippy::derivable_impls, reason = "the variants come from a macro")]
impl Default for MigrationStatus {
    fn default() -> Self {
        MigrationStatus::None
    }
}

impl MigrationProgress {
    /// How long it took, or takes so far.
    pub fn total_time(&self) -> Duration {
        Duration::from_millis(self.total_time_ms)
    }

    /// How long the guest stood still, by QEMU's account.
    pub fn downtime(&self) -> Duration {
        Duration::from_millis(self.downtime_ms)
    }

    /// How long QEMU expects the guest to stand still.
    pub fn expected_downtime(&self) -> Duration {
        Duration::from_millis(self.expected_downtime_ms)
    }

    /// How long the setting up took.
    pub fn setup_time(&self) -> Duration {
        Duration::from_millis(self.setup_time_ms)
    }

    /// How fast the guest dirties its RAM, in bytes a second.
    pub fn dirty_bytes_per_s(&self) -> u64 {
        self.ram.dirty_pages_rate.saturating_mul(self.ram.page_bytes)
    }

    /// How far the RAM is, 0 to 1. Falls when a pass finds dirtied pages.
    pub fn fraction(&self) -> f64 {
        if self.status == MigrationStatus::Completed {
            return 1.0;
        }
        if self.ram.total_bytes == 0 {
            return 0.0;
        }
        1.0 - (self.ram.remaining_bytes as f64 / self.ram.total_bytes as f64).clamp(0.0, 1.0)
    }
}
