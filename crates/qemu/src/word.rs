//! Who has the guest? The word of one end of a migration.
//!
//! A live migration is a commit protocol, and QEMU's own part of it is not
//! enough: a source that was cancelled, or lost its connection, in the very
//! last moment resumes its guest although the target has received all of it. So
//! a target starts with `-S` and holds the guest still when it has arrived.
//!
//! ```text
//!            source says            target says           who may run it
//!   ─────────────────────────────────────────────────────────────────────
//!            InFlight               Waiting | InFlight     the source
//!            InFlight               Arrived                the source
//!            Kept                   anything               the source; end the target
//!            Sent                   Arrived → Runs         the target: resume it
//!            fenced before `Sent`   anything but Runs      nobody: end the target, start afresh
//! ```
//!
//! A target that has everything and no word from a source that was fenced is worth
//! nothing: that source may have gone on with its guest after all, and have written
//! to the disks that this guest's memory knows nothing of.
//!
//! The source decides, once: `Sent` is said only after the target has confirmed
//! over the migration's return path that it holds the whole guest, and is never
//! taken back; `Kept` is said only when no migration is under way.

use std::time::Duration;

use tokio::time::sleep;

use crate::{MigrationStatus, QemuError, Qmp, RunState};

/// Which end of a migration a QEMU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It ran the guest when the migration began.
    Source,
    /// It was started to receive the guest.
    Target,
}

/// What one end of a migration says of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// Source: the guest is here, and no migration is under way.
    Kept,
    /// Source: the target has the guest; it never runs here again.
    Sent,
    /// Either end: it is being decided; ask again.
    InFlight,
    /// Target: nothing of the guest has come, it never ran here.
    Waiting,
    /// Target: the whole guest is here and was not continued here.
    Arrived,
    /// Target: the guest was continued here (or arrived in a state that needs
    /// no continuing, such as `shutdown`).
    Runs,
    /// Target: the migration failed; the guest never ran here and never will.
    Failed,
    /// QEMU is in a state that belongs to no migration of ours. Decide nothing.
    Unclear {
        /// Its run state.
        state: RunState,
        /// Its migration's state.
        migration: MigrationStatus,
    },
}

/// How often the two questions are asked until they fit together.
const ATTEMPTS: u32 = 10;

/// Asks one end of a migration who has the guest.
///
/// # Errors
/// [`QemuError::Gone`] when this QEMU has ended: then nothing runs here.
pub async fn word(qmp: &Qmp, role: Role) -> Result<Word, QemuError> {
    let mut state = qmp.query_status().await?.state;
    for _ in 0..ATTEMPTS {
        // Run state and migration state are two questions; only when the first
        // answer still holds after the second do they describe one moment.
        let migration = qmp.query_migrate().await?.status;
        let again = qmp.query_status().await?.state;
        if again == state {
            return Ok(decide(role, state, migration));
        }
        state = again;
        sleep(Duration::from_millis(1)).await;
    }
    Ok(Word::InFlight)
}

fn decide(role: Role, state: RunState, migration: MigrationStatus) -> Word {
    use MigrationStatus as M;
    use RunState as R;
    use Word::*;

    let handed_over = migration == M::Completed && matches!(state, R::PostMigrate | R::FinishMigrate);
    let unclear = |state: RunState, migration: MigrationStatus| Unclear { state, migration };
    match role {
        _ if handed_over => Sent,
        _ if matches!(state, R::Colo | R::Preconfig | R::RestoreVm | R::SaveVm | R::Other(_)) => {
            unclear(state, migration)
        }

        Role::Source => match (&state, &migration) {
            (R::InMigrate, _) => Waiting,
            (_, migration) if !migration.is_over() => InFlight,
            // It failed or was cancelled and is about to go on.
            (R::FinishMigrate, _) => InFlight,
            // A guest that was paused is left in this state by a failure.
            (R::PostMigrate, M::Failed | M::Cancelled) => Kept,
            (R::PostMigrate, _) => unclear(state, migration),
            // `completed` tells of the migration that brought it here, unless
            // somebody reset it after it was handed over.
            (R::Prelaunch, M::Completed) => unclear(state, migration),
            _ => Kept,
        },

        Role::Target => match (&state, &migration) {
            // QEMU 10 says `setup` as soon as it listens.
            (R::InMigrate, M::None | M::Setup) => Waiting,
            (R::InMigrate, M::Failed | M::Cancelled) => Failed,
            (R::InMigrate, _) => InFlight,
            (R::Paused, M::Completed) => Arrived,
            (R::PostMigrate | R::FinishMigrate, M::None) => unclear(state, migration),
            // The guest came here, and is on its way elsewhere already.
            (R::FinishMigrate, _) => InFlight,
            (_, M::None) => unclear(state, migration),
            _ => Runs,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::{MigrationStatus as M, RunState as R, *};

    const STATES: [R; 17] = [
        R::Running,
        R::Paused,
        R::Prelaunch,
        R::Preconfig,
        R::IoError,
        R::Shutdown,
        R::GuestPanicked,
        R::InternalError,
        R::Watchdog,
        R::Suspended,
        R::Debug,
        R::RestoreVm,
        R::SaveVm,
        R::InMigrate,
        R::FinishMigrate,
        R::PostMigrate,
        R::Colo,
    ];
    const STATUSES: [M; 14] = [
        M::None,
        M::Setup,
        M::Active,
        M::WaitUnplug,
        M::PreSwitchover,
        M::Device,
        M::PostcopyActive,
        M::PostcopyPaused,
        M::PostcopyRecover,
        M::Cancelling,
        M::Cancelled,
        M::Completed,
        M::Failed,
        M::Colo,
    ];

    #[test]
    fn a_source_says_sent_only_after_completion_and_kept_only_when_nothing_is_under_way() {
        for state in STATES {
            for migration in STATUSES {
                let word = decide(Role::Source, state.clone(), migration.clone());
                if word == Word::Sent {
                    assert_eq!(migration, M::Completed);
                    assert!(matches!(state, R::PostMigrate | R::FinishMigrate));
                }
                if word == Word::Kept {
                    assert!(migration.is_over(), "{state} {migration}");
                    assert!(!matches!(state, R::FinishMigrate | R::InMigrate));
                    assert!(!(state == R::PostMigrate && migration == M::Completed));
                }
                assert!(!matches!(word, Word::Arrived | Word::Runs | Word::Failed));
            }
        }
    }

    #[test]
    fn a_target_claims_the_guest_only_when_all_of_it_is_there() {
        for state in STATES {
            for migration in STATUSES {
                let word = decide(Role::Target, state.clone(), migration.clone());
                if word == Word::Arrived {
                    assert_eq!((state.clone(), migration), (R::Paused, M::Completed));
                } else if word == Word::Runs {
                    assert_ne!(state, R::InMigrate);
                    assert_ne!(migration, M::None);
                }
                assert_ne!(word, Word::Kept);
            }
        }
    }

    #[test]
    fn states_as_qemu_shows_them() {
        let source = |state, migration| decide(Role::Source, state, migration);
        assert_eq!(source(R::Running, M::None), Word::Kept);
        assert_eq!(source(R::Running, M::Active), Word::InFlight);
        assert_eq!(source(R::FinishMigrate, M::Active), Word::InFlight);
        assert_eq!(source(R::FinishMigrate, M::Device), Word::InFlight);
        assert_eq!(source(R::FinishMigrate, M::Completed), Word::Sent);
        assert_eq!(source(R::PostMigrate, M::Completed), Word::Sent);
        assert_eq!(source(R::Running, M::Cancelled), Word::Kept);
        assert_eq!(source(R::PostMigrate, M::Failed), Word::Kept);
        assert_eq!(source(R::FinishMigrate, M::Failed), Word::InFlight);
        // It came here by an earlier migration.
        assert_eq!(source(R::Running, M::Completed), Word::Kept);
        assert_eq!(source(R::Paused, M::Completed), Word::Kept);

        let target = |state, migration| decide(Role::Target, state, migration);
        assert_eq!(target(R::InMigrate, M::None), Word::Waiting);
        assert_eq!(target(R::InMigrate, M::Setup), Word::Waiting);
        assert_eq!(target(R::InMigrate, M::Active), Word::InFlight);
        assert_eq!(target(R::InMigrate, M::Failed), Word::Failed);
        assert_eq!(target(R::Paused, M::Completed), Word::Arrived);
        assert_eq!(target(R::Running, M::Completed), Word::Runs);
        assert_eq!(target(R::Running, M::Active), Word::Runs);
        assert_eq!(target(R::PostMigrate, M::Completed), Word::Sent);
    }

    #[test]
    fn states_of_a_future_qemu_decide_nothing() {
        let new = R::from("teleporting".to_owned());
        assert!(matches!(decide(Role::Source, new.clone(), M::None), Word::Unclear { .. }));
        assert_eq!(decide(Role::Source, R::Running, M::from("warping".to_owned())), Word::InFlight);
    }
}
