//! The engine's calls to other nodes, carried by the [`Transport`] as JSON.
//!
//! JSON for the reason given in record.rs: nodes of neighbouring versions talk to
//! each other while a cluster is upgraded.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use holdfast_core::NodeId;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use openraft::{BasicNode, OptionalSend, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::authority::{Stamps, boot_time};
use crate::error::TransportError;
use crate::record::SnapshotHead;
use crate::transport::{RpcKind, Transport};
use crate::types::{Snapshot, Types, Vote};

/// How long a whole snapshot may take to arrive and be stored.
pub(crate) const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(30);

/// A request for a vote, or for the prospect of one.
#[derive(Serialize, Deserialize)]
pub(crate) struct Ballot {
    pub(crate) prospect: bool,
    pub(crate) request: VoteRequest<Types>,
}

/// The answer to a barrier.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BarrierAnswer {
    /// Wait until this index is applied.
    Index(u64),
    /// Ask that node, if it is known.
    NotCoordinator(Option<u64>),
    /// It could not be confirmed.
    Unknown,
}

/// What precedes the state in the body of a snapshot call.
#[derive(Serialize, Deserialize)]
pub(crate) struct SnapshotCall {
    pub(crate) vote: Vote,
    pub(crate) head: SnapshotHead,
}

impl SnapshotCall {
    /// `length:u32 (little-endian) call state`.
    pub(crate) fn encode(&self, state: &[u8]) -> serde_json::Result<Bytes> {
        let call = serde_json::to_vec(self)?;
        let mut body = Vec::with_capacity(4 + call.len() + state.len());
        body.extend_from_slice(&(call.len() as u32).to_le_bytes());
        body.extend_from_slice(&call);
        body.extend_from_slice(state);
        Ok(body.into())
    }

    pub(crate) fn decode(body: &[u8]) -> Result<(SnapshotCall, Vec<u8>), String> {
        let (length, rest) = body.split_first_chunk::<4>().ok_or("it is too short")?;
        let (call, state) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or("it is too short")?;
        let call = serde_json::from_slice(call).map_err(|e| e.to_string())?;
        Ok((call, state.to_vec()))
    }
}

/// What all connections share.
pub(crate) struct Wire {
    pub(crate) me: u64,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) stamps: Stamps,
    /// The newest known addresses; they may change while a connection lives.
    pub(crate) addresses: RwLock<BTreeMap<u64, String>>,
    /// After this long without an answer an append is given up.
    pub(crate) append_deadline: Duration,
}

impl Wire {
    pub(crate) fn address(&self, node: u64) -> Option<String> {
        let addresses = self.addresses.read().unwrap_or_else(PoisonError::into_inner);
        addresses.get(&node).cloned()
    }

    pub(crate) fn set_addresses(&self, new: BTreeMap<u64, String>) {
        let mut addresses = self.addresses.write().unwrap_or_else(PoisonError::into_inner);
        if *addresses != new {
            *addresses = new;
        }
    }
}

/// Makes connections for the engine.
pub(crate) struct Network(pub(crate) Arc<Wire>);

impl RaftNetworkFactory<Types> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer { wire: self.0.clone(), target, address: node.addr.clone(), append: RpcKind::Append }
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer { append: RpcKind::Heartbeat, ..self.new_client(target, node).await }
    }
}

/// The engine's connection to one node.
pub(crate) struct Peer {
    wire: Arc<Wire>,
    target: u64,
    /// Used until the member list names another.
    address: String,
    append: RpcKind,
}

impl Peer {
    fn address(&self) -> String {
        self.wire.address(self.target).unwrap_or_else(|| self.address.clone())
    }

    fn lost(&self, action: RPCTypes, timeout: Duration, error: TransportError) -> RPCError<Types> {
        match error {
            TransportError::Unreachable(_) => RPCError::Unreachable(Unreachable::new(&error)),
            TransportError::Refused(_) => RPCError::Network(NetworkError::new(&error)),
            TransportError::Deadline => {
                RPCError::Timeout(Timeout { action, id: self.wire.me, target: self.target, timeout })
            }
        }
    }

    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        kind: RpcKind,
        action: RPCTypes,
        request: &Q,
        deadline: Duration,
    ) -> Result<A, RPCError<Types>> {
        let body = serde_json::to_vec(request).map_err(|e| NetworkError::new(&e))?;
        let answer = self
            .wire
            .transport
            .call(NodeId(self.target), &self.address(), kind, body.into(), deadline)
            .await
            .map_err(|e| self.lost(action, deadline, e))?;
        serde_json::from_slice(&answer).map_err(|e| NetworkError::new(&e).into())
    }
}

impl RaftNetworkV2<Types> for Peer {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        let body: Bytes = serde_json::to_vec(&request).map_err(|e| NetworkError::new(&e))?.into();
        let term = request.vote.leader_id.term;
        let (wire, target, kind, address) = (self.wire.clone(), self.target, self.append, self.address());
        let deadline = wire.append_deadline;
        // On its own task: the engine drops the call after one heartbeat interval,
        // but a late answer still proves that the other node held still from when
        // it was sent. The deadline bounds how many such tasks there can be.
        let call = tokio::spawn(async move {
            let sent = boot_time();
            let answer = wire.transport.call(NodeId(target), &address, kind, body, deadline).await?;
            let answer: AppendEntriesResponse<Types> = serde_json::from_slice(&answer)
                .map_err(|e| TransportError::Refused(format!("the answer cannot be read: {e}")))?;
            // Any other answer comes after the other node took the term for
            // current and began to wait (src/engine/handler/vote_handler/mod.rs,
            // `update_vote`), even one that reports a gap in its log.
            if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
                wire.stamps.acknowledged(term, target, sent);
            }
            Ok(answer)
        });
        match call.await {
            Ok(answer) => answer.map_err(|e| self.lost(RPCTypes::AppendEntries, deadline, e)),
            Err(e) => Err(NetworkError::new(&e).into()),
        }
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let ballot = Ballot { prospect: false, request };
        self.call(RpcKind::Vote, RPCTypes::Vote, &ballot, option.hard_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let ballot = Ballot { prospect: true, request };
        self.call(RpcKind::Vote, RPCTypes::Vote, &ballot, option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let head = SnapshotHead::from(&snapshot.meta);
        let body = SnapshotCall { vote, head }.encode(&snapshot.snapshot).map_err(|e| NetworkError::new(&e))?;
        let address = self.address();
        let call = self.wire.transport.call(NodeId(self.target), &address, RpcKind::Snapshot, body, SNAPSHOT_DEADLINE);
        let answer = tokio::select! {
            answer = call => answer.map_err(|e| {
                StreamingError::from(self.lost(RPCTypes::InstallSnapshot, SNAPSHOT_DEADLINE, e))
            })?,
            closed = cancel => return Err(closed.into()),
        };
        serde_json::from_slice(&answer).map_err(|e| NetworkError::new(&e).into())
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        self.call(RpcKind::Transfer, RPCTypes::TransferLeader, &request, option.hard_ttl()).await
    }
}
