//! The state machine: applies what is committed, and writes and reads snapshots.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use holdfast_core::ClusterState;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use tokio::sync::watch;

use crate::error::ConsensusError;
use crate::medium::{Medium, is_full};
use crate::record::SnapshotHead;
use crate::snapshot::{self, Stored};
use crate::types::{LogId, Snapshot, SnapshotMeta, StoredMembership, Types};

/// How long to wait for room on a full disk before a snapshot is tried again.
const FULL_RETRY: Duration = Duration::from_millis(500);

/// The applied state and where it stands in the log.
///
/// The state lives in the watch channel alone: applying changes it in place and
/// copies it only if a reader keeps a reference.
pub(crate) struct Machine {
    medium: Arc<dyn Medium>,
    state: watch::Sender<Arc<ClusterState>>,
    applied: Option<LogId>,
    membership: StoredMembership,
    trouble: watch::Sender<Option<String>>,
}

impl Machine {
    /// Starts from the snapshot that is `stored`, if there is one.
    pub(crate) fn open(
        medium: Arc<dyn Medium>,
        stored: Option<Stored>,
        trouble: watch::Sender<Option<String>>,
    ) -> Result<Machine, ConsensusError> {
        let mut machine = Machine {
            medium,
            state: watch::Sender::new(Arc::default()),
            applied: None,
            membership: StoredMembership::default(),
            trouble,
        };
        if let Some(stored) = stored {
            let meta = stored.head.restore().map_err(|what| ConsensusError::Corrupt {
                file: machine.medium.snapshot_path(),
                offset: 0,
                what,
            })?;
            machine.adopt(&meta, stored.state);
        }
        Ok(machine)
    }

    /// The applied state.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.subscribe()
    }

    fn adopt(&mut self, meta: &SnapshotMeta, state: ClusterState) {
        self.state.send_replace(Arc::new(state));
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
    }
}

impl RaftStateMachine<Types> for Machine {
    /// The state as JSON.
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batch = Vec::new();
        while let Some(next) = entries.next().await {
            batch.push(next?);
        }
        let Some(last) = batch.last().map(|(entry, _)| entry.log_id) else {
            return Ok(());
        };
        let mut replies = Vec::with_capacity(batch.len());
        let membership = &mut self.membership;
        self.state.send_if_modified(|state| {
            let mut changed = false;
            for (entry, responder) in batch {
                let reply = match entry.payload {
                    EntryPayload::Blank => None,
                    EntryPayload::Normal(item) => {
                        changed = true;
                        Some(Arc::make_mut(state).apply(&item.0))
                    }
                    EntryPayload::Membership(members) => {
                        *membership = StoredMembership::new(Some(entry.log_id), members);
                        None
                    }
                };
                replies.extend(responder.map(|responder| (responder, reply)));
            }
            changed
        });
        self.applied = Some(last);
        // Only now: whoever has a reply finds its effect in the state.
        for (responder, reply) in replies {
            responder.send(reply);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        Builder {
            medium: self.medium.clone(),
            state: self.state.borrow().clone(),
            meta: SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() },
            trouble: self.trouble.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, bytes: Vec<u8>) -> Result<(), io::Error> {
        let (state, bytes) = aside(move || Ok((serde_json::from_slice(&bytes)?, bytes))).await?;
        store(&self.medium, meta, bytes, &self.trouble).await?;
        self.adopt(meta, state);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let medium = self.medium.clone();
        let Some(stored) = aside(move || snapshot::read(&*medium).map_err(io::Error::other)).await? else {
            return Ok(None);
        };
        Ok(Some(Snapshot { meta: stored.head.restore().map_err(io::Error::other)?, snapshot: stored.bytes }))
    }
}

/// Writes a snapshot while the state machine goes on.
pub(crate) struct Builder {
    medium: Arc<dyn Medium>,
    state: Arc<ClusterState>,
    meta: SnapshotMeta,
    trouble: watch::Sender<Option<String>>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let state = self.state.clone();
        let bytes = aside(move || Ok(serde_json::to_vec(&*state)?)).await?;
        store(&self.medium, &self.meta, bytes.clone(), &self.trouble).await?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot: bytes })
    }
}

/// Does what takes long, or waits for a disk, on another thread: heartbeats go
/// through this one.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Waits while the disk is full: an error here would stop the engine, and
/// nothing is lost by keeping the log longer.
async fn store(
    medium: &Arc<dyn Medium>,
    meta: &SnapshotMeta,
    state: Vec<u8>,
    trouble: &watch::Sender<Option<String>>,
) -> io::Result<()> {
    let head = SnapshotHead::from(meta);
    let state: Arc<[u8]> = state.into();
    let mut waited = false;
    loop {
        let (medium, head, state) = (medium.clone(), head.clone(), state.clone());
        match aside(move || snapshot::write(&*medium, &head, &state)).await {
            Err(e) if is_full(&e) => {
                if !waited {
                    tracing::error!("no room for a snapshot: {e}");
                    trouble.send_replace(Some(format!("no room for a snapshot of the cluster's state: {e}")));
                    waited = true;
                }
                tokio::time::sleep(FULL_RETRY).await;
            }
            outcome => {
                if waited {
                    trouble.send_replace(None);
                }
                return outcome;
            }
        }
    }
}
