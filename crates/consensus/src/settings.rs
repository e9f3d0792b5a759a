//! The settings of consensus and what they imply.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use holdfast_core::NodeId;
use openraft::{Config, SnapshotPolicy, StepDownPolicy};

use crate::error::ConsensusError;

/// Entries that one message and one write may carry: with
/// [`crate::MAX_PROPOSAL_BYTES`] it bounds both to 32 MiB.
const MAX_ENTRIES: u64 = 64;

/// How consensus runs on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// This node.
    pub me: NodeId,
    /// Where the log and the snapshot are kept; created if missing, used by one
    /// process at a time.
    pub directory: PathBuf,
    /// `(window, hold)` in milliseconds. A voter that accepted a coordinator's
    /// message elects nobody else for `hold`; the coordinator relies on it for
    /// `window` from when it sent that message. The difference pays for clocks
    /// that run at different rates.
    pub election_ms: (u64, u64),
    /// Time between two heartbeats in milliseconds; at most a third of the window.
    pub heartbeat_ms: u64,
    /// A snapshot is taken after this many entries.
    pub snapshot_every: u64,
    /// How long [`crate::Consensus::propose`] and [`crate::Consensus::barrier`]
    /// wait, in milliseconds.
    pub propose_deadline_ms: u64,
}

impl Settings {
    /// The default profile: a new coordinator about 0.4 s after the loss of the last one.
    pub fn new(me: NodeId, directory: impl Into<PathBuf>) -> Self {
        Settings {
            me,
            directory: directory.into(),
            election_ms: (320, 360),
            heartbeat_ms: 100,
            snapshot_every: 2000,
            propose_deadline_ms: 2000,
        }
    }

    /// The profile for quiet dedicated networks: about 0.25 s.
    pub fn fast(me: NodeId, directory: impl Into<PathBuf>) -> Self {
        Settings { election_ms: (200, 225), heartbeat_ms: 50, ..Self::new(me, directory) }
    }

    /// The profile between sites: about 2.5 s.
    pub fn wan(me: NodeId, directory: impl Into<PathBuf>) -> Self {
        Settings { election_ms: (2200, 2450), heartbeat_ms: 400, propose_deadline_ms: 6000, ..Self::new(me, directory) }
    }

    pub(crate) fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    pub(crate) fn hold(&self) -> Duration {
        Duration::from_millis(self.election_ms.1)
    }

    pub(crate) fn propose_deadline(&self) -> Duration {
        Duration::from_millis(self.propose_deadline_ms)
    }

    /// The engine's configuration.
    pub(crate) fn engine(&self) -> Result<Arc<Config>, ConsensusError> {
        let (window, hold) = self.election_ms;
        if self.heartbeat_ms == 0 || window < self.heartbeat_ms * 3 {
            return Err(ConsensusError::Settings(format!(
                "heartbeats every {} ms leave no room for a lost one in a window of {window} ms",
                self.heartbeat_ms
            )));
        }
        if hold <= window {
            return Err(ConsensusError::Settings(format!(
                "the hold ({hold} ms) must be longer than the window ({window} ms)"
            )));
        }
        if self.snapshot_every == 0 || self.propose_deadline_ms == 0 {
            return Err(ConsensusError::Settings("snapshot_every and propose_deadline_ms must not be 0".into()));
        }
        let config = Config {
            cluster_name: "holdfast".into(),
            heartbeat_interval: self.heartbeat_ms,
            election_timeout_min: window,
            // Also the length of the voters' lease (src/engine/engine_config.rs).
            election_timeout_max: hold,
            install_snapshot_timeout: crate::network::SNAPSHOT_DEADLINE.as_millis() as u64,
            max_payload_entries: MAX_ENTRIES,
            max_append_entries: Some(MAX_ENTRIES),
            replication_lag_threshold: self.snapshot_every * 2,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_every),
            max_in_snapshot_log_to_keep: self.snapshot_every / 4,
            purge_batch_size: 64,
            api_channel_size: Some(1024),
            notification_channel_size: Some(4096),
            state_machine_channel_size: Some(256),
            // What is due when, pace.rs says.
            enable_tick: false,
            // A removed coordinator would hand over by itself, without asking
            // whether this node still relies on its authority. It is not allowed
            // to be removed (Consensus::set_members), so this never applies.
            removed_leader_step_down: StepDownPolicy::Never,
            enable_pre_vote: Some(true),
            // A node that comes back is found within 300 ms.
            backoff: "20ms 40ms 80ms ..300ms".into(),
            // A restarted coordinator must win an election like everybody else:
            // the others may have waited out its silence.
            enable_leader_restore: Some(false),
            ..Config::default()
        };
        let config = config.validate().map_err(|e| ConsensusError::Settings(e.to_string()))?;
        Ok(Arc::new(config))
    }
}
