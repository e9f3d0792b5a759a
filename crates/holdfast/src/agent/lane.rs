//! Carries the Raft engine's calls: to nodes, and to the witness, wherever it is
//! hosted.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use holdfast_consensus::{Consensus, RpcError, RpcKind, Transport, TransportError};
use holdfast_core::NodeId;
use tokio::time::timeout;

use super::peers::{CallError, Lane, Peers};
use super::rpc;
use super::witness::Seats;

/// The node that hosts the witness is asked alone for so long; then all are.
const ALONE: Duration = Duration::from_millis(50);

/// The way of one participant to the others.
pub struct ConsensusLane {
    /// The way to other nodes.
    pub peers: Arc<Peers>,
    /// The witnesses that are hosted here.
    pub witnesses: Arc<Seats>,
    /// This node.
    pub me: NodeId,
    /// Its own participant, for the calls of a witness that it hosts.
    pub home: Option<Consensus>,
}

impl Transport for ConsensusLane {
    fn call(
        &self,
        target: NodeId,
        address: &str,
        kind: RpcKind,
        body: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Bytes, TransportError>> {
        let address = address.to_owned();
        Box::pin(async move {
            if target.is_witness() {
                return self.to_witness(target, kind, body, deadline).await;
            }
            if let Some(home) = self.home.clone().filter(|_| target == self.me) {
                return here(home, kind, body, deadline).await.map_err(refused);
            }
            let path = format!("/node/consensus/{}", kind.name());
            let answer = self.peers.call(target, Lane::Consensus, Some(&address), &path, body, deadline).await;
            answer.map_err(told)
        })
    }
}

impl ConsensusLane {
    /// Asks here, then the node that hosted it last, then everybody: whoever does not
    /// host it says so at once, and only one does.
    async fn to_witness(
        &self,
        witness: NodeId,
        kind: RpcKind,
        body: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, TransportError> {
        if let Some(hosted) = self.witnesses.here(witness) {
            match here(hosted, kind, body.clone(), deadline).await {
                Err(RpcError::NotHosted) => {}
                answered => return answered.map_err(refused),
            }
        }
        let path = rpc::witness_path(witness, kind);
        let last = self.witnesses.elsewhere(witness);
        let ask = |node: NodeId| {
            let (path, body) = (&path, body.clone());
            async move {
                if last.is_some_and(|last| last != node) {
                    tokio::time::sleep(ALONE).await;
                }
                (node, self.peers.call(node, Lane::Witness, None, path, body, deadline).await)
            }
        };
        let mut asked: FuturesUnordered<_> = self.peers.others(self.me).into_iter().map(ask).collect();
        let mut why = TransportError::Unreachable("no node hosts the witness".into());
        let answering = async {
            while let Some((node, answer)) = asked.next().await {
                match answer {
                    Ok(answer) => {
                        self.witnesses.found(witness, node);
                        return Ok(answer);
                    }
                    Err(error) => why = told(error),
                }
            }
            Err(why)
        };
        timeout(deadline, answering).await.unwrap_or(Err(TransportError::Deadline))
    }
}

/// A call within this process. What has arrived is dealt with even if nobody waits.
async fn here(to: Consensus, kind: RpcKind, body: Bytes, deadline: Duration) -> Result<Bytes, RpcError> {
    let handled = tokio::spawn(async move { to.handle(kind, body).await });
    match timeout(deadline, handled).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Err(RpcError::Stopped),
        Err(_) => Err(RpcError::Deadline),
    }
}

fn refused(error: RpcError) -> TransportError {
    match error {
        RpcError::Deadline => TransportError::Deadline,
        error => TransportError::Refused(error.to_string()),
    }
}

fn told(error: CallError) -> TransportError {
    match error {
        CallError::Unreachable(why) => TransportError::Unreachable(why),
        CallError::Deadline => TransportError::Deadline,
        CallError::Refused { text, .. } => TransportError::Refused(text),
    }
}
