//! Live migration: both ends, each idempotent.
//!
//! ```text
//!  target: prepare_incoming ──▶ address      word: Waiting
//!  source: start(address)                    word: InFlight
//!  source: watch … Step::Switchover (the guest stands still)
//!          └─▶ Completed                     word: Sent    target: Arrived
//!  target: resume                                          target: Runs
//! ```
//!
//! The target never continues the guest by itself; [`crate::word`] says why and
//! when it may be told to. Calling [`start`] or [`watch`] again, after an agent
//! was restarted, attaches to what is under way.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::json;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep};

use crate::convergence::{Adjustment, Convergence, MigrationSettings};
use crate::word::{Role, Word, word};
use crate::{Event, MigrationProgress, MigrationStatus, QemuError, Qmp, RunState, Stamp};

/// How often progress is asked for; ends are learned from events at once.
const POLL: Duration = Duration::from_millis(100);

/// How long a source may take to settle after a failure or a cancellation.
const SETTLE: Duration = Duration::from_secs(5);

/// More than any network has: QEMU's own default would be 1 Gbit/s.
const UNLIMITED_BYTES_PER_S: u64 = 1 << 40;

/// How a migration ended, from the source's point of view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The target has the guest.
    Completed {
        /// From start to end.
        total: Duration,
        /// How long the guest stood still by QEMU's account, from its processors'
        /// standing still on; the target's resuming comes on top.
        downtime: Duration,
    },
    /// It failed.
    Failed {
        /// Why.
        reason: String,
        /// Whether the guest is certainly still at the source.
        guest_still_here: bool,
    },
    /// It was cancelled; the guest is at the source.
    Cancelled,
}

/// What happens during a migration.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// How far it is.
    Progress(MigrationProgress),
    /// The guest stands still at the source now, most likely because its last part
    /// is on its way.
    Switchover,
    /// It did not come to an end and is pressed harder: the guest may stand
    /// still for so long now.
    DowntimeLimit(Duration),
    /// It did not come to an end: the guest is slowed down by up to so many
    /// percent.
    Throttle(u8),
    /// It took too long and is being cancelled.
    GivingUp,
}

/// What became of a wish to cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    /// The guest is at the source.
    Kept,
    /// Too late: the target has it.
    TooLate,
}

/// Makes a QEMU that was started with [`crate::Launch::incoming`] listen on
/// `address`, at a port of its choice, and returns where. Listens only once,
/// whenever it is called.
///
/// # Errors
/// [`QemuError::Refused`] when the address is not this host's, or when this
/// QEMU does not wait for a guest.
pub async fn prepare_incoming(
    qmp: &Qmp,
    address: IpAddr,
    settings: &MigrationSettings,
) -> Result<SocketAddr, QemuError> {
    if let Some(listening) = listening(qmp).await? {
        return Ok(listening);
    }
    qmp.migrate_set_capabilities(&[
        ("events", true),
        ("return-path", true),
        ("multifd", settings.multifd_channels.is_some()),
    ])
    .await?;
    if let Some(channels) = settings.multifd_channels {
        qmp.migrate_set_parameters(json!({"multifd-channels": channels})).await?;
    }
    let uri = format!("tcp:{}", SocketAddr::new(address, 0));
    qmp.migrate_incoming(&uri).await?;
    listening(qmp).await?.ok_or_else(|| QemuError::Protocol {
        socket: qmp.socket().to_owned(),
        what: "it listens for a migration and does not say where".into(),
    })
}

async fn listening(qmp: &Qmp) -> Result<Option<SocketAddr>, QemuError> {
    let migration = qmp.query_migrate().await?;
    Ok(migration.socket_address.iter().find_map(|address| {
        let ip: IpAddr = address.host.parse().ok()?;
        let port = address.port.parse().ok()?;
        (address.kind == "inet").then_some(SocketAddr::new(ip, port))
    }))
}

/// A migration that was begun here, and all that QEMU told since.
#[derive(Debug)]
pub struct Begun {
    at: Stamp,
    events: Receiver<Event>,
}

/// Starts to send the guest to the target that listens on `target`. Does
/// nothing when a migration is under way already, or has succeeded. Returns
/// what [`watch`] needs, unless somebody else had begun.
///
/// # Errors
/// [`QemuError::Refused`] when QEMU cannot migrate this guest now;
/// [`QemuError::NotHere`] when this is no source: it waits for a guest itself.
pub async fn start(qmp: &Qmp, target: SocketAddr, settings: &MigrationSettings) -> Result<Option<Begun>, QemuError> {
    match word(qmp, Role::Source).await? {
        Word::Kept => {}
        Word::InFlight | Word::Sent => return Ok(None),
        other => {
            return Err(QemuError::NotHere { socket: qmp.socket().to_owned(), state: format!("{other:?}") });
        }
    }
    qmp.migrate_set_capabilities(&[
        ("events", true),
        // Without it a source calls a migration completed that the target could
        // not load.
        ("return-path", true),
        ("validate-uuid", true),
        ("pause-before-switchover", false),
        ("auto-converge", settings.throttle),
        ("multifd", settings.multifd_channels.is_some()),
    ])
    .await?;
    let bandwidth = settings.bandwidth_bytes_per_s;
    let mut parameters = json!({
        "downtime-limit": millis(settings.first_downtime_limit()),
        "max-bandwidth": bandwidth.unwrap_or(UNLIMITED_BYTES_PER_S),
        // Auto-converge cannot be switched on later, so it is on and all but
        // idle until `Adjustment::Throttle` gives it room.
        "throttle-trigger-threshold": 100,
        "cpu-throttle-initial": 1,
        "cpu-throttle-increment": 1,
        "max-cpu-throttle": 1,
    });
    if let Some(channels) = settings.multifd_channels {
        parameters["multifd-channels"] = channels.into();
    }
    qmp.migrate_set_parameters(parameters).await?;
    let mut events = qmp.events();
    match qmp.migrate(&format!("tcp:{target}")).await {
        // QEMU tells of the beginning before it answers.
        Ok(()) => {
            let at = std::iter::from_fn(|| events.try_recv().ok()).find_map(|event| match event {
                Event::Migration(MigrationStatus::Setup, at) => Some(at),
                _ => None,
            });
            Ok(at.map(|at| Begun { at, events }))
        }
        // Somebody else was faster with the same wish.
        Err(QemuError::Refused { .. }) if !progress(qmp).await?.status.is_over() => Ok(None),
        Err(error) => Err(error),
    }
}

/// How the migration stands.
pub async fn progress(qmp: &Qmp) -> Result<MigrationProgress, QemuError> {
    qmp.query_migrate().await
}

/// Cancels a migration at its source and waits until it is decided who has the
/// guest. Harmless when none is under way.
///
/// # Errors
/// [`QemuError::Timeout`] when it is not decided within seconds: ask again.
pub async fn cancel(qmp: &Qmp) -> Result<Cancelled, QemuError> {
    qmp.migrate_cancel().await?;
    match settled(qmp).await? {
        Word::Sent => Ok(Cancelled::TooLate),
        Word::Kept => Ok(Cancelled::Kept),
        _ => Err(QemuError::Timeout { socket: qmp.socket().to_owned(), command: "migrate_cancel", after: SETTLE }),
    }
}

/// The source's word, once it is given.
async fn settled(qmp: &Qmp) -> Result<Word, QemuError> {
    let until = Instant::now() + SETTLE;
    loop {
        let word = word(qmp, Role::Source).await?;
        if word != Word::InFlight || Instant::now() >= until {
            return Ok(word);
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// Follows a migration at its source to its end, pressing it harder when it
/// does not come to one, and cancelling it when it takes too long. `began` is what
/// [`start`] returned.
///
/// Dropping the future leaves the migration as it is; calling again goes on.
///
/// # Errors
/// [`QemuError::Gone`] when the source's QEMU ended: ask the target who has the
/// guest. [`QemuError::Timeout`] when it hangs: nothing is known.
pub async fn watch(
    qmp: &Qmp,
    settings: &MigrationSettings,
    began: Option<Begun>,
    mut on: impl FnMut(Step) + Send,
) -> Result<Outcome, QemuError> {
    // Whether the migration was seen to be under way: its end is then known for it.
    let mut under_way = began.is_some();
    let (began, mut events) = match began {
        Some(Begun { at, events }) => (Some(at), events),
        None => (None, qmp.events()),
    };
    let started = Instant::now();
    let mut convergence = Convergence::new(settings);
    // Since when the guest stands still, for whatever reason; and for this one.
    let mut stopped: Option<(Stamp, Instant)> = None;
    let mut still_since: Option<Instant> = None;
    let mut gave_up: Option<&'static str> = None;
    let mut poll = tokio::time::interval(POLL);
    poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);

    loop {
        // The first tick comes at once: what happened before the subscription
        // is found by asking. When the guest stands still nothing is asked for a
        // while: QEMU answers when it has time, and what it says by itself
        // would wait behind that.
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Ok(Event::Stop(at)) => {
                    stopped = Some((at, Instant::now()));
                    poll.reset();
                    on(Step::Switchover);
                    continue;
                }
                Ok(Event::Resume) => {
                    (stopped, still_since) = (None, None);
                    continue;
                }
                // The end of what was seen to be under way: the target has confirmed
                // that it holds the guest, and the guest never goes on here.
                Ok(Event::Migration(MigrationStatus::Completed, at)) if under_way => {
                    let since = |earlier: Option<Stamp>| earlier.and_then(|earlier| at.since(earlier));
                    let stopped = stopped.map(|(at, _)| at);
                    if let (Some(total), Some(downtime)) = (since(began), since(stopped)) {
                        return Ok(Outcome::Completed { total, downtime });
                    }
                }
                Ok(Event::Migration(status, _)) if !status.is_over() => continue,
                Ok(Event::Migration(..) | Event::Closed) | Err(RecvError::Lagged(_)) => {}
                Ok(_) => continue,
                Err(RecvError::Closed) => return Err(QemuError::Gone {
                    socket: qmp.socket().to_owned(),
                }),
            },
            _ = poll.tick() => {}
        }
        let progress = progress(qmp).await?;
        if progress.status.is_over() {
            on(Step::Progress(progress.clone()));
            return finish(qmp, progress, gave_up).await;
        }
        under_way = true;
        if still_since.is_none() {
            still_since = match stopped {
                Some((_, at)) => is_switchover(qmp).await?.then_some(at),
                // A lost event must not lose the switchover.
                None if progress.status == MigrationStatus::Device => {
                    on(Step::Switchover);
                    Some(Instant::now())
                }
                None => None,
            };
        }
        if gave_up.is_none() {
            let stuck = still_since.is_some_and(|at| at.elapsed() >= settings.switchover_deadline);
            if stuck {
                gave_up = Some("the target did not take the guest in time");
            } else if started.elapsed() >= settings.deadline {
                gave_up = Some("it did not come to an end in time");
            }
            if gave_up.is_some() {
                on(Step::GivingUp);
                qmp.migrate_cancel().await?;
            }
        }
        if let Some(adjustment) = convergence.adjust(started.elapsed(), &progress) {
            on(press(qmp, adjustment).await?);
        }
        on(Step::Progress(progress));
    }
}

/// Whether the processors stopped for the switchover, and not for a user's
/// pause or a failed disk.
async fn is_switchover(qmp: &Qmp) -> Result<bool, QemuError> {
    let state = qmp.query_status().await?.state;
    Ok(matches!(state, RunState::FinishMigrate | RunState::PostMigrate))
}

async fn press(qmp: &Qmp, adjustment: Adjustment) -> Result<Step, QemuError> {
    match adjustment {
        Adjustment::DowntimeLimit(limit) => {
            qmp.migrate_set_parameters(json!({"downtime-limit": millis(limit)})).await?;
            Ok(Step::DowntimeLimit(limit))
        }
        Adjustment::Throttle(percent) => {
            qmp.migrate_set_parameters(json!({
                "throttle-trigger-threshold": 50,
                "max-cpu-throttle": percent,
                "cpu-throttle-initial": 20.min(percent),
                "cpu-throttle-increment": 10.min(percent),
            }))
            .await?;
            Ok(Step::Throttle(percent))
        }
    }
}

async fn finish(qmp: &Qmp, progress: MigrationProgress, gave_up: Option<&'static str>) -> Result<Outcome, QemuError> {
    // The guest stands still: the common end takes one question. A source whose
    // migration is completed and whose state is this one has handed the guest over.
    if progress.status == MigrationStatus::Completed && qmp.query_status().await?.state == RunState::PostMigrate {
        return Ok(Outcome::Completed { total: progress.total_time(), downtime: progress.downtime() });
    }
    let word = settled(qmp).await?;
    Ok(match (&progress.status, word) {
        (MigrationStatus::Completed, Word::Sent) => {
            Outcome::Completed { total: progress.total_time(), downtime: progress.downtime() }
        }
        (MigrationStatus::Cancelled, Word::Kept) if gave_up.is_none() => Outcome::Cancelled,
        (status, word) => Outcome::Failed {
            reason: match (gave_up, progress.error_desc.as_str()) {
                (Some(why), _) => why.into(),
                // `completed` may tell of the migration that brought the guest here.
                (None, "") if matches!(status, MigrationStatus::None | MigrationStatus::Completed) => {
                    "no migration was under way".into()
                }
                (None, "") => "the connection to the target was lost".into(),
                (None, said) => said.to_owned(),
            },
            guest_still_here: word == Word::Kept,
        },
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
