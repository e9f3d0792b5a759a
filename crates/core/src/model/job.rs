//! Jobs, long work with progress; and events, what happened.

use serde::{Deserialize, Serialize};

use super::{Epoch, JobId, NodeId, VmId};

/// A piece of long work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// What it does.
    pub work: Work,
    /// The VM that it works on.
    pub vm: VmId,
    /// That VM's name when the job began; the VM may be gone since.
    pub vm_name: String,
    /// Who asked for it.
    pub by: String,
    /// When it began, milliseconds since the Unix epoch.
    pub began_ms: u64,
    /// How far it is.
    pub progress: Progress,
    /// How it ended; `None` while it goes on.
    pub end: Option<JobEnd>,
    /// The figures of a migration that was done.
    #[serde(default)]
    pub moved: Option<Moved>,
}

/// The figures of a live migration, by the account of the source's QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// From the start of the transfer to its end, in milliseconds.
    pub total_ms: u64,
    /// How long the guest stood still, in milliseconds.
    pub downtime_ms: u64,
}

/// What a job does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Makes a VM's disks and starts it if so wished.
    Create {
        /// Start it afterwards.
        start: bool,
    },
    /// Starts it.
    Start,
    /// Lets its guest stand still.
    Pause,
    /// Lets its guest go on.
    Resume,
    /// Shuts it down.
    Stop,
    /// Shuts it down and starts it again; done in a later epoch than this one.
    Restart {
        /// The epoch that ends.
        epoch: Epoch,
    },
    /// Deletes it and its disks.
    Delete,
    /// Moves it while it runs.
    Migrate {
        /// From this node.
        from: NodeId,
        /// To this node.
        to: NodeId,
    },
}

/// How far a job is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// 0 to 100.
    pub percent: u8,
    /// What it is doing, for a person.
    pub note: String,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEnd {
    /// When, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// With what result.
    pub outcome: Outcome,
}

/// The result of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It did what was asked.
    Done,
    /// It did not, and nothing of it is left behind unless said otherwise.
    Failed {
        /// What stopped it.
        why: String,
    },
    /// It was stopped on request.
    Cancelled,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts the events of the cluster, from 1.
    pub index: u64,
    /// When, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// How bad it is.
    pub severity: Severity,
    /// What it happened to: `node n1`, `vm web`.
    pub subject: String,
    /// What happened, for a person.
    pub text: String,
}

/// How bad an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Somebody should look.
    Warning,
    /// Something is down.
    Error,
}
