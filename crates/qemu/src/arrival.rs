//! A target that knows by QEMU's own telling when the guest is there, so that
//! continuing it takes one command and no question.
//!
//! ```text
//!  Expected ──completed──▶ Arrived ──resume()──▶ Unsure
//!     └──── anything that does not belong here ────▲
//! ```
//!
//! QEMU would also continue a guest that was handed on long ago. What was seen of
//! this QEMU since it waited rules that out only once, and only while it is all that
//! happened; in every other case [`Qmp::resume`] asks first.

use std::sync::{Mutex, PoisonError};

use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;

use crate::{Event, MigrationStatus, QemuError, Qmp};

/// A QEMU that waits for a guest.
pub struct Arrival {
    qmp: Qmp,
    seen: Mutex<Seen>,
}

struct Seen {
    events: Receiver<Event>,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Expected,
    Arrived,
    Unsure,
}

impl Arrival {
    /// Of a QEMU that was started with [`crate::Launch::incoming`].
    pub fn expect(qmp: &Qmp) -> Self {
        let seen = Seen { events: qmp.events(), stage: Stage::Expected };
        Arrival { qmp: qmp.clone(), seen: Mutex::new(seen) }
    }

    /// Its monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Lets the guest go on here, which its source has sent for good: only on the
    /// source's word.
    ///
    /// # Errors
    /// As for [`Qmp::resume`].
    pub async fn resume(&self) -> Result<(), QemuError> {
        if self.take() { self.qmp.go_on().await } else { self.qmp.resume().await }
    }

    /// Whether the guest is here for certain; said once.
    fn take(&self) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let Seen { events, stage } = &mut *seen;
        loop {
            *stage = match events.try_recv() {
                Ok(event) => stage.after(&event),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Lagged(_) | TryRecvError::Closed) => Stage::Unsure,
            };
            if *stage == Stage::Unsure {
                return false;
            }
        }
        let arrived = *stage == Stage::Arrived;
        if arrived {
            *stage = Stage::Unsure;
        }
        arrived
    }
}

impl Stage {
    fn after(self, event: &Event) -> Stage {
        match (self, event) {
            (Stage::Expected, Event::Migration(MigrationStatus::Completed, _)) => Stage::Arrived,
            (Stage::Expected, Event::Migration(status, _)) if !status.is_over() => Stage::Expected,
            (_, Event::Migration(..) | Event::Stop(_) | Event::Resume | Event::Reset { .. } | Event::Closed) => {
                Stage::Unsure
            }
            (_, Event::Shutdown { .. } | Event::GuestPanicked) => Stage::Unsure,
            (stage, _) => stage,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Stamp;

    fn after(events: &[Event]) -> Stage {
        events.iter().fold(Stage::Expected, |stage, event| stage.after(event))
    }

    fn migration(status: MigrationStatus) -> Event {
        Event::Migration(status, Stamp::default())
    }

    #[test]
    fn a_guest_is_here_when_it_arrived_and_nothing_happened_since() {
        use MigrationStatus as M;
        let arriving = [migration(M::Setup), Event::MigrationPass(1), migration(M::Active)];
        assert!(after(&arriving) == Stage::Expected);
        let arrived = [arriving.as_slice(), &[migration(M::Completed)]].concat();
        assert!(after(&arrived) == Stage::Arrived);
        let others = [
            Event::Resume,
            Event::Stop(Stamp::default()),
            Event::Reset { guest: true },
            Event::Closed,
            migration(M::Setup),
            migration(M::Completed),
            migration(M::Failed),
        ];
        for other in others {
            let since = [arrived.as_slice(), std::slice::from_ref(&other)].concat();
            assert!(after(&since) == Stage::Unsure, "{other:?}");
            assert!(after(&[since.as_slice(), &[migration(M::Completed)]].concat()) == Stage::Unsure, "{other:?}");
        }
        assert!(after(&[migration(M::Failed), migration(M::Completed)]) == Stage::Unsure);
        assert!(after(&[Event::Resume, migration(M::Completed)]) == Stage::Unsure);
    }
}
