//! The witness: a participant of consensus whose vote and log lie on a disk that the
//! nodes share, hosted by one node at a time.
//!
//! It is a participant like any other ([`Consensus`]) on another medium ([`store`]).
//! Who may host it is decided by the lease on the disk
//! ([`holdfast_core::witness::DiskLease`]), and two rules keep that safe here:
//!
//! * What it answers leaves only if the lease is held *after* all that the answer
//!   stands for is durable ([`Consensus::handle`]), and so does what it sends. An
//!   answer that is slow on its way stays true: whoever hosts later reads the disk
//!   later, and finds what was answered for.
//! * A new host begins by copying everything to an area that no other owner writes.
//!
//! It never coordinates for long: when it has to lead, because its host's log is
//! behind its own, it brings a node up to date and hands over to it.

mod disk;
mod layout;
mod store;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use holdfast_core::NodeId;
use holdfast_core::witness::Kept;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;

pub use disk::{Disk, DiskError};

use crate::consensus::{Consensus, Ground};
use crate::error::{ConsensusError, TransportError};
use crate::settings::Settings;
use crate::transport::{RpcKind, Transport};
use store::Store;

/// The log on the disk is rewritten when it is larger than this: whoever takes over
/// copies it before it answers.
const COMPACT_ABOVE_BYTES: u64 = 256 << 10;

/// Says whether the lease on the disk is held at this moment.
pub type Gate = Arc<dyn Fn() -> bool + Send + Sync>;

/// The right to host a witness, and where it lies.
#[derive(Clone)]
pub struct Seat {
    /// The disk.
    pub disk: Arc<Disk>,
    /// The node that hosts.
    pub host: NodeId,
    /// Its epoch on the disk.
    pub epoch: u64,
    /// What is durable, for the renewals to say.
    pub kept: Arc<Mutex<Kept>>,
    /// Whether this node speaks for the witness.
    pub held: Gate,
}

impl Consensus {
    /// Takes part as the witness `settings.me`, whose disk this node may use. The
    /// settings' directory is of no account.
    ///
    /// # Errors
    /// [`ConsensusError::Witness`]: the disk cannot be used.
    pub async fn start_witness(
        settings: Settings,
        seat: Seat,
        transport: Arc<dyn Transport>,
    ) -> Result<Consensus, ConsensusError> {
        let Seat { disk, host, epoch, kept, held } = seat;
        let path = disk.path().to_owned();
        let opening = tokio::task::spawn_blocking(move || {
            let known =
                disk.look().map_err(|source| DiskError::Io { action: "read", path: disk.path().into(), source })?;
            Store::open(disk, host, epoch, known.kept(), kept)
        });
        let store = opening.await.map_err(|e| ConsensusError::Stopped(e.to_string()))??;
        let transport = Arc::new(Gated { transport, held: held.clone() });
        let ground =
            Ground { medium: Arc::new(store), lock: None, compact_above_bytes: COMPACT_ABOVE_BYTES, gate: Some(held) };
        let consensus = Self::start_on(ground, settings, transport).await.map_err(|error| match error {
            ConsensusError::Corrupt { offset, what, .. } => {
                DiskError::Damaged { path, what: format!("at byte {offset} of its log, {what}") }.into()
            }
            other => other,
        })?;
        consensus.spawn(consensus.clone().step_aside());
        Ok(consensus)
    }

    /// Whenever the witness leads, hands the coordination to a node that has all of
    /// its log.
    async fn step_aside(self) {
        let mut metrics = self.engine().metrics();
        let mut silent = false;
        loop {
            let now = metrics.borrow_watched().clone();
            if now.running_state.is_err() {
                return;
            }
            if now.state == ServerState::Leader && !silent {
                let progress = now.replication.unwrap_or_default();
                let ready = |id: &u64| {
                    let matched = progress.get(id).copied().flatten();
                    !NodeId(*id).is_witness() && matched.map(|at| at.index) == now.last_log_index
                };
                let next = now.membership_config.voter_ids().find(ready);
                if let Some(next) = next {
                    tracing::info!(to = next, "the witness hands the coordination over");
                    if let Err(error) = self.transfer(NodeId(next), || {}).await {
                        // Nobody relies on it any more in this term. Its silence lets
                        // the nodes elect one of them.
                        tracing::warn!(%error, "the witness did not hand over and falls silent");
                        self.inner.node.mute.store(true, Ordering::Relaxed);
                        silent = true;
                    }
                }
            } else if silent && now.state != ServerState::Leader {
                self.inner.node.mute.store(false, Ordering::Relaxed);
                silent = false;
            }
            // A transfer may fail at first for want of an acknowledgement.
            let changed = tokio::time::timeout(Duration::from_millis(500), WatchReceiver::changed(&mut metrics)).await;
            if matches!(changed, Ok(Err(_))) {
                return;
            }
        }
    }
}

/// Lets calls out only while the lease is held.
struct Gated {
    transport: Arc<dyn Transport>,
    held: Gate,
}

impl Transport for Gated {
    fn call(
        &self,
        target: NodeId,
        address: &str,
        kind: RpcKind,
        body: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Bytes, TransportError>> {
        if (self.held)() {
            self.transport.call(target, address, kind, body, deadline)
        } else {
            Box::pin(async { Err(TransportError::Refused("the witness is not hosted here any more".into())) })
        }
    }
}
