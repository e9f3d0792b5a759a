//! The seam to the network: the binary carries opaque bodies between nodes.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use holdfast_core::NodeId;

use crate::error::TransportError;

/// The kinds of calls between nodes. Give heartbeats a connection of their own,
/// so that a large snapshot or a long batch never delays them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RpcKind {
    /// Log entries from the coordinator.
    Append,
    /// A sign of life from the coordinator.
    Heartbeat,
    /// A request for a vote, or for the prospect of one.
    Vote,
    /// The whole state, for a node whose log is too old.
    Snapshot,
    /// The coordinator hands over.
    Transfer,
    /// A follower asks the coordinator for a linearizable read point.
    Barrier,
}

impl RpcKind {
    /// All of them.
    pub const ALL: [RpcKind; 6] =
        [RpcKind::Append, RpcKind::Heartbeat, RpcKind::Vote, RpcKind::Snapshot, RpcKind::Transfer, RpcKind::Barrier];

    /// A stable lower-case name, fit for a URL.
    pub fn name(self) -> &'static str {
        match self {
            RpcKind::Append => "append",
            RpcKind::Heartbeat => "heartbeat",
            RpcKind::Vote => "vote",
            RpcKind::Snapshot => "snapshot",
            RpcKind::Transfer => "transfer",
            RpcKind::Barrier => "barrier",
        }
    }

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for RpcKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Carries calls to other nodes and hands them to [`crate::Consensus::handle`]
/// there. It must prove to both ends who the other is; consensus believes what arrives.
pub trait Transport: Send + Sync + 'static {
    /// Calls `target` at `address` and returns its answer. Gives up after
    /// `deadline`; a call that is dropped or given up may still have arrived.
    fn call(
        &self,
        target: NodeId,
        address: &str,
        kind: RpcKind,
        body: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Bytes, TransportError>>;
}
