//! The one handle to consensus on a node.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use holdfast_core::{ClusterState, NodeId, Proposal, Reply};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest};
use openraft::{BasicNode, EntryPayload, ReadPolicy, ServerState};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::authority::Stamps;
use crate::error::{ConsensusError, ProposeError, RpcError};
use crate::log::Log;
use crate::machine::Machine;
use crate::medium::{Directory, Medium};
use crate::network::{Ballot, BarrierAnswer, Network, SnapshotCall, Wire};
use crate::record::Members;
use crate::settings::Settings;
use crate::snapshot::{self, Stored};
use crate::standing::{Node, Standing};
use crate::transport::{RpcKind, Transport};
use crate::types::{Engine, Item, Snapshot, Types};
use crate::wal::{self, Recovered, Wal};
use crate::witness::Gate;

/// The longest proposal, in bytes of its JSON. Larger ones are refused.
pub const MAX_PROPOSAL_BYTES: usize = 512 << 10;

/// A call from another node is given up after this long, for instance because the
/// disk is full; the caller has its own, shorter deadlines.
const HANDLE_DEADLINE: Duration = Duration::from_secs(5);
/// How long starting and stopping the engine may take.
const ENGINE_DEADLINE: Duration = Duration::from_secs(10);
/// The log is rewritten when it is larger than this and mostly obsolete.
const COMPACT_ABOVE_BYTES: u64 = 8 << 20;

/// Consensus on this node. Clones are handles to the same; it goes on until
/// [`Consensus::stop`], even when all of them are dropped.
#[derive(Clone)]
pub struct Consensus {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) settings: Settings,
    pub(crate) node: Arc<Node>,
    pub(crate) changing_members: tokio::sync::Mutex<()>,
    state: watch::Receiver<Arc<ClusterState>>,
    wal: Arc<Wal>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    /// Held for as long as the directory is in use.
    lock: Mutex<Option<File>>,
    /// Without its word no answer leaves.
    gate: Option<Gate>,
}

/// What consensus stands on.
pub(crate) struct Ground {
    pub(crate) medium: Arc<dyn Medium>,
    /// Held while the medium is in use.
    pub(crate) lock: Option<File>,
    /// The log is rewritten when it is larger than this and mostly obsolete.
    pub(crate) compact_above_bytes: u64,
    /// Without its word no answer leaves.
    pub(crate) gate: Option<Gate>,
}

impl Consensus {
    /// Opens the log in the settings' directory, or creates it, and takes part.
    ///
    /// Refuses damaged files without touching them. A node that was a voter before
    /// is silent for the settings' hold time.
    pub async fn start(settings: Settings, transport: Arc<dyn Transport>) -> Result<Consensus, ConsensusError> {
        settings.engine()?;
        let directory = &settings.directory;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(ConsensusError::io("create", directory))?;
        let ground = Ground {
            medium: Arc::new(Directory::new(directory)),
            lock: Some(lock(directory)?),
            compact_above_bytes: COMPACT_ABOVE_BYTES,
            gate: None,
        };
        Self::start_on(ground, settings, transport).await
    }

    pub(crate) async fn start_on(
        ground: Ground,
        settings: Settings,
        transport: Arc<dyn Transport>,
    ) -> Result<Consensus, ConsensusError> {
        let Ground { medium, lock, compact_above_bytes, gate } = ground;
        let place = medium.log_path();
        let stored = snapshot::read(&*medium)?;
        let last_in_snapshot = stored.as_ref().and_then(|stored| stored.head.last);
        let (mut recovered, end) = wal::recover(&*medium, settings.me, stored.is_none())?;
        if recovered.purged.map(|purged| purged.index) > last_in_snapshot.map(|last| last.index) {
            return Err(ConsensusError::Corrupt {
                file: medium.snapshot_path(),
                offset: 0,
                what: "it is missing or older than the log, which no longer holds what it would add".into(),
            });
        }
        let held = recovered.vote.is_some() || !recovered.entries.is_empty() || last_in_snapshot.is_some();
        let voters = last_members(&recovered, stored.as_ref()).voters;
        // Nobody can be elected without this node's vote, and nobody else relies on it,
        // unless it has voted for another: the last list of members that it has may
        // be older than the one by which that other was elected. It was the only
        // voter, began to give votes away, lost its power before the new list was on
        // its disk, came back, voted for a node that had the list, acknowledged its
        // heartbeats without having its log yet, and was restarted once more: by its
        // log it is the only voter still, but there is a coordinator that counts on it.
        let elected_none = recovered.vote.is_none_or(|vote| vote.node == settings.me.0);
        let sole = elected_none && voters == [BTreeSet::from([settings.me.0])];
        let held = held && !sole;
        let (trouble, troubled) = watch::channel(None);
        let machine = Machine::open(medium.clone(), stored, trouble.clone())?;
        let wal = Wal::start(medium, settings.me.0, end, &mut recovered, compact_above_bytes, trouble)
            .map_err(ConsensusError::io("write the log in", &place))?;
        let wal = Arc::new(wal);
        let wire = Arc::new(Wire {
            me: settings.me.0,
            transport,
            stamps: Stamps::default(),
            addresses: Default::default(),
            append_deadline: settings.hold().max(Duration::from_millis(500)),
        });
        let state = machine.watch();
        let starting = Engine::new(
            settings.me.0,
            settings.engine()?,
            Network(wire.clone()),
            Log::new(recovered, wal.clone()),
            machine,
        );
        let engine = timeout(ENGINE_DEADLINE, starting)
            .await
            .map_err(|_| ConsensusError::Unknown { action: "starting consensus" })?
            .map_err(|e| ConsensusError::Stopped(e.to_string()))?;
        let node = Arc::new(Node::new(engine, wire, troubled, settings.heartbeat(), settings.hold(), held));
        node.refresh();
        let tasks = vec![tokio::spawn(node.clone().follow()), tokio::spawn(node.clone().keep_pace())];
        let inner = Inner {
            settings,
            node,
            changing_members: tokio::sync::Mutex::new(()),
            state,
            wal,
            tasks: Mutex::new(tasks),
            lock: Mutex::new(lock),
            gate,
        };
        Ok(Consensus { inner: Arc::new(inner) })
    }

    /// Makes this node, at `address`, a cluster of its own and waits until it is
    /// the coordinator. Only on a log that has never held anything.
    pub async fn initialize(&self, address: &str) -> Result<(), ConsensusError> {
        let members = BTreeMap::from([(self.me(), BasicNode::new(address))]);
        match timeout(ENGINE_DEADLINE, self.engine().initialize(members)).await {
            Ok(Ok(())) => {}
            Ok(Err(RaftError::APIError(InitializeError::NotAllowed(_)))) => {
                return Err(ConsensusError::AlreadyInitialized);
            }
            Ok(Err(e)) => return Err(ConsensusError::Stopped(e.to_string())),
            Err(_) => return Err(unknown("starting a cluster")),
        }
        let mut standing = self.standing();
        match timeout(ENGINE_DEADLINE, standing.wait_for(Standing::is_coordinator)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(unknown("starting a cluster")),
        }
    }

    /// Commits a proposal and returns what became of it. Only on the coordinator.
    ///
    /// [`ProposeError::Unknown`] means that it may have been applied or may still
    /// be: retry with the same id, on whichever node coordinates then.
    pub async fn propose(&self, proposal: Proposal) -> Result<Reply, ProposeError> {
        let node = &self.inner.node;
        let metrics = node.metrics();
        if metrics.running_state.is_err() {
            return Err(ProposeError::Stopped);
        }
        let leads = metrics.state == ServerState::Leader;
        if !leads || node.wire.stamps.handed_over(metrics.current_term) {
            return Err(self.not_coordinator());
        }
        let length = match serde_json::to_vec(&proposal) {
            Ok(bytes) => bytes.len(),
            Err(e) => return Err(ProposeError::Unfit(e.to_string())),
        };
        if length > MAX_PROPOSAL_BYTES {
            return Err(ProposeError::Unfit(format!(
                "it is {length} bytes long and the limit is {MAX_PROPOSAL_BYTES}"
            )));
        }
        let write = self.engine().client_write(Item(Arc::new(proposal)));
        let deadline = self.inner.settings.propose_deadline();
        match timeout(deadline, write).await {
            Ok(Ok(written)) => written.data.ok_or(ProposeError::Unknown),
            // Not even appended here.
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => Err(self.not_coordinator()),
            Ok(Err(_)) | Err(_) => Err(ProposeError::Unknown),
        }
    }

    /// The applied state; one notification per applied batch. Holding on to an
    /// `Arc` makes the next batch copy the state.
    pub fn state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.inner.state.clone()
    }

    /// Where this node stands.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.inner.node.standing.subscribe()
    }

    /// Where this node stands, for those who need not know of every
    /// acknowledgement: [`Standing::quorum_acked`] is as old as the rest.
    pub fn place(&self) -> watch::Receiver<Standing> {
        self.inner.node.place.subscribe()
    }

    /// For how many milliseconds from [`Standing::quorum_acked`] no other
    /// coordinator can exist; the crate's head says why.
    pub fn authority_window_ms(&self) -> u64 {
        self.inner.settings.election_ms.0
    }

    /// A linearizable read point, on any node: whoever waits with
    /// [`Consensus::wait_applied`] for the returned index reads everything that
    /// was committed when this was called. A majority confirms it;
    /// [`ProposeError::Unknown`] means that it did not in time.
    pub async fn barrier(&self) -> Result<u64, ProposeError> {
        let deadline = self.inner.settings.propose_deadline();
        match timeout(deadline, self.barrier_anywhere(deadline)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ProposeError::Unknown),
        }
    }

    async fn barrier_anywhere(&self, deadline: Duration) -> Result<u64, ProposeError> {
        let node = &self.inner.node;
        let metrics = node.metrics();
        if metrics.running_state.is_err() {
            return Err(ProposeError::Stopped);
        }
        if metrics.state == ServerState::Leader {
            return self.barrier_here().await;
        }
        let leader = metrics.current_leader.filter(|leader| *leader != self.me());
        let Some((leader, address)) = leader.and_then(|leader| Some((leader, node.wire.address(leader)?))) else {
            return Err(ProposeError::NotCoordinator { coordinator: None });
        };
        let answer = node
            .wire
            .transport
            .call(NodeId(leader), &address, RpcKind::Barrier, Bytes::new(), deadline)
            .await
            .map_err(|_| ProposeError::Unknown)?;
        match serde_json::from_slice(&answer) {
            Ok(BarrierAnswer::Index(index)) => Ok(index),
            Ok(BarrierAnswer::NotCoordinator(coordinator)) => {
                Err(ProposeError::NotCoordinator { coordinator: coordinator.map(NodeId) })
            }
            Ok(BarrierAnswer::Unknown) | Err(_) => Err(ProposeError::Unknown),
        }
    }

    async fn barrier_here(&self) -> Result<u64, ProposeError> {
        let engine = self.engine();
        match engine.get_read_linearizer(ReadPolicy::ReadIndex).await {
            Ok(point) => Ok(point.read_log_id().index()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_))) => Err(self.not_coordinator()),
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => Err(ProposeError::Unknown),
            Err(RaftError::Fatal(_)) => Err(ProposeError::Stopped),
        }
    }

    /// Whether this node only listens: it does not campaign, whatever its log says of
    /// who votes. For one that has set its log aside and reads again, from the
    /// beginning, of a time in which it voted.
    pub fn only_listen(&self, only: bool) {
        self.inner.node.only_listens.store(only, std::sync::atomic::Ordering::Relaxed);
    }

    /// Term and index of the last entry of this node's log, committed or not.
    pub fn log_end(&self) -> (u64, u64) {
        let last = self.engine().data_metrics().borrow_watched().last_log;
        last.map_or((0, 0), |last| (last.leader_id.term, last.index))
    }

    /// For how long this node has accepted nothing from a coordinator, or has run
    /// without one since its start.
    pub fn unheard_for(&self) -> Duration {
        self.inner.node.last_heard().elapsed()
    }

    /// Waits until `index` is applied here; `false` if that does not happen within `deadline`.
    pub async fn wait_applied(&self, index: u64, deadline: Duration) -> bool {
        let mut standing = self.standing();
        let applied = standing.wait_for(|standing| standing.last_applied >= index);
        matches!(timeout(deadline, applied).await, Ok(Ok(_)))
    }

    /// Answers a call from another node.
    pub async fn handle(&self, kind: RpcKind, body: Bytes) -> Result<Bytes, RpcError> {
        let answer = timeout(HANDLE_DEADLINE, self.answer(kind, &body));
        let answer = answer.await.map_err(|_| RpcError::Deadline)?;
        // Only now: what the answer stands for is durable, and whoever may host next
        // has not begun to read.
        if self.inner.gate.as_ref().is_some_and(|held| !held()) {
            return Err(RpcError::NotHosted);
        }
        answer
    }

    /// Runs a task until consensus is stopped.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        lock_of(&self.inner.tasks).push(tokio::spawn(task));
    }

    async fn answer(&self, kind: RpcKind, body: &[u8]) -> Result<Bytes, RpcError> {
        let node = &self.inner.node;
        let engine = self.engine();
        let stopped = |_| RpcError::Stopped;
        match kind {
            RpcKind::Append | RpcKind::Heartbeat => {
                let request: AppendEntriesRequest<Types> = read(kind, body)?;
                let answer = engine.append_entries(request).await.map_err(|_| RpcError::Stopped)?;
                if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
                    node.heard();
                }
                write(kind, &answer)
            }
            RpcKind::Vote => {
                let ballot: Ballot = read(kind, body)?;
                // The coordinator itself asked for an election that follows a hand-over.
                if !ballot.request.leadership_transfer && node.withholds_vote() {
                    return Err(RpcError::VoteWithheld);
                }
                let answer = match ballot.prospect {
                    true => engine.pre_vote(ballot.request).await,
                    false => engine.vote(ballot.request).await,
                };
                write(kind, &answer.map_err(|_| RpcError::Stopped)?)
            }
            RpcKind::Snapshot => {
                let malformed = |reason: String| RpcError::Malformed { kind, reason };
                let (call, state) = SnapshotCall::decode(body).map_err(malformed)?;
                let meta = call.head.restore().map_err(malformed)?;
                // Found here, an unreadable state is the sender's problem; found
                // while it is installed, it would stop this node.
                serde_json::from_slice::<ClusterState>(&state).map_err(|e| malformed(e.to_string()))?;
                let snapshot = Snapshot { meta, snapshot: state };
                let installed = engine.install_full_snapshot(call.vote, snapshot);
                let answer = installed.await.map_err(stopped)?;
                if answer.vote == call.vote {
                    node.heard();
                }
                write(kind, &answer)
            }
            RpcKind::Transfer => {
                let request: TransferLeaderRequest<Types> = read(kind, body)?;
                let answer = engine.handle_transfer_leader(request).await;
                write(kind, &answer.map_err(stopped)?)
            }
            RpcKind::Barrier => {
                let answer = match self.barrier_here().await {
                    Ok(index) => BarrierAnswer::Index(index),
                    Err(ProposeError::NotCoordinator { coordinator }) => {
                        BarrierAnswer::NotCoordinator(coordinator.map(|node| node.0))
                    }
                    Err(_) => BarrierAnswer::Unknown,
                };
                write(kind, &answer)
            }
        }
    }

    /// Stops taking part and closes the files. Everything acknowledged stays; the
    /// directory can be opened again when this returns.
    pub async fn stop(&self) {
        let inner = &self.inner;
        if timeout(ENGINE_DEADLINE, inner.node.engine.shutdown()).await.is_err() {
            tracing::warn!("consensus did not stop in time; closing its files");
        }
        let tasks = std::mem::take(&mut *lock_of(&inner.tasks));
        for task in &tasks {
            task.abort();
        }
        for task in tasks {
            let _ = task.await;
        }
        inner.node.refresh();
        let wal = inner.wal.clone();
        // Joins the log's thread, which may be in the middle of a flush.
        let _ = tokio::task::spawn_blocking(move || wal.close()).await;
        lock_of(&inner.lock).take();
    }

    pub(crate) fn me(&self) -> u64 {
        self.inner.settings.me.0
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.inner.node.engine
    }

    fn not_coordinator(&self) -> ProposeError {
        ProposeError::NotCoordinator { coordinator: self.other_coordinator() }
    }

    /// Who coordinates, if it is known and not this node.
    pub(crate) fn other_coordinator(&self) -> Option<NodeId> {
        let leader = self.inner.node.metrics().current_leader;
        leader.filter(|leader| *leader != self.me()).map(NodeId)
    }
}

pub(crate) fn unknown(action: &'static str) -> ConsensusError {
    ConsensusError::Unknown { action }
}

fn lock_of<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn lock(directory: &std::path::Path) -> Result<File, ConsensusError> {
    let path = directory.join("lock");
    let file = File::create(&path).map_err(ConsensusError::io("create", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ConsensusError::InUse { directory: directory.to_owned() }),
        Err(TryLockError::Error(e)) => Err(ConsensusError::io("lock", &path)(e)),
    }
}

/// The members that the log, or else the snapshot, names last.
pub(crate) fn last_members(recovered: &Recovered, stored: Option<&Stored>) -> Members {
    let in_log = recovered.entries.values().rev().find_map(|entry| match &entry.payload {
        EntryPayload::Membership(membership) => Some(Members::from(membership)),
        _ => None,
    });
    in_log.or_else(|| stored.map(|stored| stored.head.members.clone())).unwrap_or_default()
}

fn read<T: DeserializeOwned>(kind: RpcKind, body: &[u8]) -> Result<T, RpcError> {
    serde_json::from_slice(body).map_err(|e| RpcError::Malformed { kind, reason: e.to_string() })
}

fn write<T: Serialize>(kind: RpcKind, answer: &T) -> Result<Bytes, RpcError> {
    let body = serde_json::to_vec(answer).map_err(|e| RpcError::Malformed { kind, reason: e.to_string() })?;
    Ok(body.into())
}
