//! Jobs, long work with progress; and events, what happened.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A piece of long work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobView {
    /// Its number.
    pub id: u64,
    /// What it does: `create`, `start`, `stop`, `restart`, `delete` or `migrate`.
    pub work: String,
    /// The VM that it works on.
    pub vm: String,
    /// A migration's source.
    pub from: Option<String>,
    /// A migration's target.
    pub to: Option<String>,
    /// Who asked for it.
    pub by: String,
    /// Whether it goes on or how it ended.
    pub state: JobState,
    /// 0 to 100.
    pub percent: u8,
    /// What it is doing, for a person.
    pub note: String,
    /// When it began.
    pub began_ms: u64,
    /// How it ended; absent while it goes on.
    pub outcome: Option<JobOutcome>,
    /// The figures of a migration that was done.
    pub moved: Option<Moved>,
}

/// The figures of a live migration, by the account of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Moved {
    /// From the start of the transfer to its end.
    pub total_ms: u64,
    /// How long the guest stood still.
    pub downtime_ms: u64,
}

/// Whether a job goes on or how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// It goes on.
    Running,
    /// It did what was asked.
    Done,
    /// It did not.
    Failed,
    /// It was stopped on request.
    Cancelled,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobOutcome {
    /// When.
    pub at_ms: u64,
    /// What stopped it, when it failed.
    pub why: Option<String>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts the cluster's events, from 1.
    pub index: u64,
    /// When.
    pub at_ms: u64,
    /// How bad it is.
    pub severity: Severity,
    /// What it happened to: `node n1`, `vm web`.
    pub subject: String,
    /// What happened, for a person.
    pub text: String,
}

/// How bad an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Somebody should look.
    Warning,
    /// Something is down.
    Error,
}
