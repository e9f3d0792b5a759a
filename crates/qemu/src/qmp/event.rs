//! What QEMU reports by itself.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::MigrationStatus;

/// When something happened by the clock of QEMU's host, since 1970: right as far as
/// that clock is, good for differences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(from = "RawStamp")]
pub struct Stamp(Duration);

#[derive(Deserialize)]
struct RawStamp {
    #[serde(default)]
    seconds: i64,
    #[serde(default)]
    microseconds: i64,
}

impl From<RawStamp> for Stamp {
    /// QEMU says -1 when it cannot read its clock.
    fn from(raw: RawStamp) -> Self {
        let part = |number: i64| u64::try_from(number).unwrap_or(0);
        Stamp(Duration::from_secs(part(raw.seconds)) + Duration::from_micros(part(raw.microseconds)))
    }
}

impl Stamp {
    /// How much later than `earlier` it was; `None` when the clock was set back, or
    /// told nothing.
    pub fn since(self, earlier: Stamp) -> Option<Duration> {
        (earlier != Stamp::default()).then(|| self.0.checked_sub(earlier.0)).flatten()
    }
}

/// An event. One that this crate does not know, or whose data look different
/// from what it knows, is [`Event::Other`] and no error.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The processors stand still since then. On the source of a migration this
    /// is the moment of the switchover.
    Stop(Stamp),
    /// The processors run now.
    Resume,
    /// The guest was reset.
    Reset {
        /// The guest itself asked for it.
        guest: bool,
    },
    /// The power button was pressed.
    Powerdown,
    /// The guest powered itself off, or QEMU was asked to end. QEMU stays in
    /// state `shutdown` until it is told to quit.
    Shutdown {
        /// The guest itself asked for it.
        guest: bool,
    },
    /// A disk's request failed. QEMU limits the rate of these: the state
    /// `io-error` is what counts.
    BlockIoError {
        /// The disk's id (`disk0`), or empty.
        device: String,
        /// Whether it was for want of space.
        no_space: bool,
        /// The operating system's reason.
        reason: String,
    },
    /// The guest's kernel said that it panicked.
    GuestPanicked,
    /// The guest's watchdog fired.
    Watchdog,
    /// The guest sleeps.
    Suspend,
    /// The guest woke up.
    Wakeup,
    /// A migration changed its state then.
    Migration(MigrationStatus, Stamp),
    /// A migration started its n-th pass over the RAM.
    MigrationPass(u64),
    /// The connection ended; no event follows.
    Closed,
    /// Something else.
    Other {
        /// The event's name.
        name: String,
        /// What came with it.
        data: Value,
    },
}

impl Event {
    pub(super) fn decode(name: String, data: Value, at: Stamp) -> Event {
        let guest = || data.get("guest").and_then(Value::as_bool).unwrap_or(false);
        let text = |key: &str| data.get(key).and_then(Value::as_str).map(str::to_owned);
        match name.as_str() {
            "STOP" => Event::Stop(at),
            "RESUME" => Event::Resume,
            "RESET" => Event::Reset { guest: guest() },
            "POWERDOWN" => Event::Powerdown,
            "SHUTDOWN" => Event::Shutdown { guest: guest() },
            "BLOCK_IO_ERROR" => Event::BlockIoError {
                // `device` is empty for a disk that was made with -blockdev; the
                // device's path ends with its id then.
                device: text("qom-path")
                    .or_else(|| text("device"))
                    .and_then(|path| {
                        path.split('/').rfind(|part| *part != "virtio-backend" && !part.is_empty()).map(str::to_owned)
                    })
                    .unwrap_or_default(),
                no_space: data.get("nospace").and_then(Value::as_bool).unwrap_or(false),
                reason: text("reason").unwrap_or_default(),
            },
            "GUEST_PANICKED" => Event::GuestPanicked,
            "WATCHDOG" => Event::Watchdog,
            "SUSPEND" | "SUSPEND_DISK" => Event::Suspend,
            "WAKEUP" => Event::Wakeup,
            "MIGRATION" => match text("status") {
                Some(status) => Event::Migration(MigrationStatus::from(status), at),
                None => Event::Other { name, data },
            },
            "MIGRATION_PASS" => match data.get("pass").and_then(Value::as_u64) {
                Some(pass) => Event::MigrationPass(pass),
                None => Event::Other { name, data },
            },
            _ => Event::Other { name, data },
        }
    }
}
