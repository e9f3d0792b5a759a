//! Nodes with real files and an in-memory network.
#![allow(dead_code, reason = "each test uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use holdfast_consensus::{Consensus, ConsensusError, RpcKind, Settings, Standing, Transport, TransportError};
use holdfast_core::lease::BootTime;
use holdfast_core::{Cluster, ClusterState, Command, NewNode, NodeFacts, NodeId, Proposal, Reply, RequestId};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::time::timeout;

/// Everything that is waited for happens within this, or the test fails.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub fn boot_time() -> BootTime {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("a clock");
    BootTime(Duration::from(time).as_nanos() as u64)
}

pub fn proposal(command: Command) -> Proposal {
    Proposal { id: RequestId(uuid::Uuid::new_v4()), at_ms: 1, by: "a test".into(), command }
}

pub fn add_token(name: &str) -> Proposal {
    proposal(Command::AddApiToken { name: name.to_owned(), digest: "0".repeat(64) })
}

/// Founds the cluster, which the state wants before anything else.
pub fn found() -> Proposal {
    let cluster = Cluster { name: "a-cluster".into(), ..Cluster::default() };
    let node = NewNode {
        name: "one".into(),
        port: 1,
        heartbeat_port: 2,
        heartbeat_key: [0; 32],
        facts: NodeFacts::default(),
        site: None,
    };
    proposal(Command::Found { cluster, node })
}

#[derive(Default)]
struct Cables {
    nodes: RwLock<BTreeMap<u64, Consensus>>,
    cut: RwLock<BTreeSet<u64>>,
    ballot: Mutex<Option<Bytes>>,
    /// How many ballots each node has sent.
    ballots: watch::Sender<BTreeMap<u64, u64>>,
}

impl Cables {
    fn broken(&self, a: u64, b: u64) -> bool {
        let cut = self.cut.read().expect("no panic");
        cut.contains(&a) || cut.contains(&b)
    }
}

struct Wire {
    me: u64,
    cables: Arc<Cables>,
}

impl Transport for Wire {
    fn call(
        &self,
        target: NodeId,
        _address: &str,
        kind: RpcKind,
        body: Bytes,
        deadline: Duration,
    ) -> BoxFuture<'_, Result<Bytes, TransportError>> {
        async move {
            let target = target.0;
            if kind == RpcKind::Vote {
                *self.cables.ballot.lock().expect("no panic") = Some(body.clone());
                let count = |ballots: &mut BTreeMap<u64, u64>| {
                    *ballots.entry(self.me).or_default() += 1;
                };
                self.cables.ballots.send_modify(count);
            }
            if self.cables.broken(self.me, target) {
                // A cut cable answers nothing at all.
                tokio::time::sleep(deadline).await;
                return Err(TransportError::Deadline);
            }
            let node = self.cables.nodes.read().expect("no panic").get(&target).cloned();
            let node = node.ok_or_else(|| TransportError::Unreachable("nobody listens".into()))?;
            // What arrived is dealt with even if nobody waits for the answer.
            let handled = tokio::spawn(async move { node.handle(kind, body).await });
            let answer = match timeout(deadline, handled).await {
                Ok(Ok(answer)) => answer.map_err(|e| TransportError::Refused(e.to_string())),
                Ok(Err(e)) => Err(TransportError::Unreachable(e.to_string())),
                Err(_) => Err(TransportError::Deadline),
            };
            if self.cables.broken(self.me, target) {
                return Err(TransportError::Deadline);
            }
            answer
        }
        .boxed()
    }
}

pub struct Lab {
    root: TempDir,
    cables: Arc<Cables>,
    nodes: BTreeMap<u64, Consensus>,
    snapshot_every: u64,
    pub fast: bool,
}

impl Lab {
    pub fn new() -> Self {
        Lab {
            root: TempDir::new().expect("a directory"),
            cables: Arc::default(),
            nodes: BTreeMap::new(),
            snapshot_every: 2000,
            fast: false,
        }
    }

    pub fn with_snapshots_every(mut self, entries: u64) -> Self {
        self.snapshot_every = entries;
        self
    }

    /// A cluster of this many voters with node 1 as the coordinator.
    pub async fn cluster(voters: u64) -> Self {
        let mut lab = Self::new();
        lab.form(voters).await;
        lab
    }

    pub async fn form(&mut self, voters: u64) {
        for id in 1..=voters {
            self.start(id).await;
        }
        self.initialize(1).await;
        let ids: Vec<u64> = (1..=voters).collect();
        self.set_voters(1, &ids).await;
        for id in ids {
            self.wait(id, |standing| standing.coordinator == Some(NodeId(1)) && standing.last_applied > 0).await;
        }
    }

    pub async fn initialize(&self, id: u64) {
        let node = self.node(id);
        node.initialize(&format!("node-{id}")).await.expect("a new cluster");
        let reply = node.propose(found()).await;
        assert!(matches!(reply, Ok(Reply::Node(_))), "{reply:?}");
    }

    pub async fn set_voters(&self, coordinator: u64, voters: &[u64]) {
        let voters = voters.iter().map(|id| (NodeId(*id), format!("node-{id}"))).collect();
        let changed = self.node(coordinator).set_members(voters, BTreeMap::new()).await;
        changed.expect("the members change");
    }

    pub fn directory(&self, id: u64) -> PathBuf {
        self.root.path().join(id.to_string())
    }

    pub fn settings(&self, id: u64) -> Settings {
        let settings = match self.fast {
            true => Settings::fast(NodeId(id), self.directory(id)),
            false => Settings::new(NodeId(id), self.directory(id)),
        };
        Settings { snapshot_every: self.snapshot_every, ..settings }
    }

    pub fn wire(&self, id: u64) -> Arc<dyn Transport> {
        Arc::new(Wire { me: id, cables: self.cables.clone() })
    }

    pub async fn try_start(&mut self, id: u64) -> Result<(), ConsensusError> {
        let node = Consensus::start(self.settings(id), self.wire(id)).await?;
        self.cables.cut.write().expect("no panic").remove(&id);
        self.cables.nodes.write().expect("no panic").insert(id, node.clone());
        self.nodes.insert(id, node);
        Ok(())
    }

    /// Lets a participant that the lab does not look after be reached.
    pub fn connect(&self, id: u64, participant: Consensus) {
        self.cables.nodes.write().expect("no panic").insert(id, participant);
    }

    pub async fn start(&mut self, id: u64) {
        if let Some(old) = self.nodes.remove(&id) {
            old.stop().await;
        }
        self.try_start(id).await.expect("the node starts");
    }

    pub fn node(&self, id: u64) -> Consensus {
        self.nodes.get(&id).expect("it was started").clone()
    }

    /// From now on nobody hears of it; its files stay as they are.
    pub fn kill(&mut self, id: u64) {
        self.cables.cut.write().expect("no panic").insert(id);
    }

    pub fn isolate(&self, id: u64) {
        self.cables.cut.write().expect("no panic").insert(id);
    }

    pub fn reunite(&self, id: u64) {
        self.cables.cut.write().expect("no panic").remove(&id);
    }

    /// The last request for a vote that anybody sent.
    pub fn last_ballot(&self) -> Option<Bytes> {
        self.cables.ballot.lock().expect("no panic").clone()
    }

    /// Waits until a node has asked this often for a vote.
    pub async fn ballots(&self, id: u64, count: u64) {
        let mut ballots = self.cables.ballots.subscribe();
        let enough = ballots.wait_for(|sent| sent.get(&id).is_some_and(|sent| *sent >= count));
        let met = timeout(DEADLINE, enough).await;
        assert!(matches!(met, Ok(Ok(_))), "node {id} did not campaign");
    }

    pub fn standing(&self, id: u64) -> Standing {
        self.node(id).standing().borrow().clone()
    }

    pub async fn wait(&self, id: u64, condition: impl Fn(&Standing) -> bool) {
        let mut standing = self.node(id).standing();
        let met = timeout(DEADLINE, standing.wait_for(condition)).await;
        if !matches!(met, Ok(Ok(_))) {
            panic!("node {id} stands at {:?}", self.standing(id));
        }
    }

    /// The node among these that becomes the coordinator first.
    pub async fn coordinator_among(&self, nodes: &[u64]) -> u64 {
        let waiting = nodes.iter().map(|id| {
            let mut standing = self.node(*id).standing();
            async move {
                standing.wait_for(Standing::is_coordinator).await.expect("it runs");
                *id
            }
            .boxed()
        });
        let first = timeout(DEADLINE, futures_util::future::select_all(waiting)).await;
        first.expect("somebody becomes the coordinator").0
    }

    pub async fn propose(&self, id: u64, tokens: &[&str]) {
        for token in tokens {
            let reply = self.node(id).propose(add_token(token)).await;
            assert_eq!(reply, Ok(Reply::Done), "{token} on node {id}");
        }
    }

    /// The state of a node once it has all these tokens.
    pub async fn state_with(&self, id: u64, tokens: &[&str]) -> Arc<ClusterState> {
        let mut state = self.node(id).state();
        let all = |state: &Arc<ClusterState>| tokens.iter().all(|token| state.api_tokens.contains_key(*token));
        let met = timeout(DEADLINE, state.wait_for(all)).await.map(|state| state.expect("it runs").clone());
        met.unwrap_or_else(|_| panic!("node {id} lacks some of {} tokens: {:?}", tokens.len(), self.standing(id)))
    }

    pub async fn stop(&self) {
        for node in self.nodes.values() {
            node.stop().await;
        }
    }
}

/// A tmpfs of one megabyte, unmounted when dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    pub fn mount(at: PathBuf) -> Option<Self> {
        fs::create_dir_all(&at).expect("a mount point");
        let flags = nix::mount::MsFlags::empty();
        let mounted = nix::mount::mount(Some("tmpfs"), &at, Some("tmpfs"), flags, Some("size=1m"));
        mounted.ok().map(|()| SmallDisk(at))
    }

    fn ballast(&self) -> PathBuf {
        Path::new(&self.0).join("ballast")
    }

    /// Leaves no room but what is free in the last pages of its files.
    pub fn fill(&self) {
        let mut size = 1 << 20;
        while size > 0 {
            let mut bytes = fs::read(self.ballast()).unwrap_or_default();
            bytes.resize(bytes.len() + size, 1);
            let old = bytes.len() - size;
            if fs::write(self.ballast(), &bytes).is_err() {
                fs::write(self.ballast(), &bytes[..old]).expect("it fitted before");
                size /= 2;
                if size < 4096 {
                    break;
                }
            }
        }
    }

    pub fn empty(&self) {
        fs::remove_file(self.ballast()).expect("a ballast");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}
