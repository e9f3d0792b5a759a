//! The agent: consensus, decisions, reconciling. May crash or be upgraded at
//! any time: no VM notices.
//!
//! ```text
//!  API ── execute ──▶ coordinator ── consensus ──▶ state ──▶ every agent
//!                         ▲  plan, check                       │ reconcile
//!          lease thread ──┘◀───────── reports ◀────────────────┘ (keeper, QEMU, disks)
//! ```

mod coordinator;
pub mod copies;
mod disks;
mod enter;
mod facts;
mod failure;
mod fencing;
mod files;
mod force;
mod guest;
mod guests;
mod imports;
mod journals;
mod keeper_link;
mod lane;
mod luns;
mod members;
mod mounts;
pub mod peers;
mod report;
mod routes;
pub mod rpc;
mod serving;
mod succession;
mod volumes;
mod witness;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use holdfast_consensus::{Consensus, ProposeError, Standing};
use holdfast_core::*;
use holdfast_vswitch::Vswitch;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::Config;
use crate::generation::Allegiance;
use crate::identity::{self, Identity};
use crate::leases::Leases;

pub use failure::Failure;
use keeper_link::KeeperLink;
use peers::{CallError, Peers};
pub use routes::Traffic;

/// How long a request may look for a coordinator and wait for its answer.
const EXECUTE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a request waits for what was agreed on before it.
const CATCH_UP: Duration = Duration::from_secs(1);
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(3);
/// The protocol of a console's byte stream.
pub const CONSOLE_PROTOCOL: &str = "holdfast-console";

/// A byte stream in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// The agent of this host. Cheap to clone.
#[derive(Clone)]
pub struct Agent(Arc<Inner>);

struct Inner {
    config: Config,
    /// Where consensus runs.
    engine: Handle,
    keeper: KeeperLink,
    vswitch: Vswitch,
    qemu: watch::Receiver<facts::Qemu>,
    /// The applied state; empty until this host is in a cluster.
    state: watch::Sender<Arc<ClusterState>>,
    /// Set once, for the rest of the process's life.
    member: OnceLock<&'static Member>,
    stop: CancellationToken,
    /// Held while this host founds or joins a cluster.
    entering: tokio::sync::Mutex<()>,
}

/// What there is of the agent once its host belongs to a cluster.
struct Member {
    me: NodeId,
    identity: Identity,
    consensus: Consensus,
    allegiance: Arc<Allegiance>,
    peers: Arc<Peers>,
    leases: Leases,
    lending: succession::Lending,
    reports: report::Reports,
    fences: fencing::Fences,
    roll: members::Roll,
    witnesses: Arc<witness::Seats>,
    guests: guests::Guests,
    serving: serving::Serving,
    holds: files::Holds,
    drafts: copies::Drafts,
}

impl Member {
    /// Who asks when this node itself does.
    fn by(&self) -> String {
        format!("node {}", self.me)
    }
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl Agent {
    /// Starts the agent of this host; when the host is in a cluster, takes up
    /// its part in it. Consensus runs on `engine`.
    ///
    /// # Errors
    /// The keeper cannot be reached, or a file that must be kept is damaged.
    pub async fn start(config: Config, engine: Handle, stop: CancellationToken) -> anyhow::Result<Agent> {
        let keeper = KeeperLink::connect(&config.keeper_socket()).await?;
        let vswitch = Vswitch::open()?;
        let qemu = facts::probe(&config);
        let inner = Inner {
            config,
            engine,
            keeper,
            vswitch,
            qemu,
            state: watch::Sender::new(Arc::default()),
            member: OnceLock::new(),
            entering: tokio::sync::Mutex::new(()),
            stop,
        };
        let agent = Agent(Arc::new(inner));
        if let Some(identity) = Identity::load(&agent.0.config.state_dir)? {
            agent.enter(identity).await?;
        }
        Ok(agent)
    }

    /// The state as this node has applied it; empty before it is in a cluster.
    pub fn state(&self) -> Arc<ClusterState> {
        self.0.state.borrow().clone()
    }

    /// One notification per applied batch.
    pub fn changes(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.0.state.subscribe()
    }

    /// This node, if it is in a cluster.
    pub fn me(&self) -> Option<NodeId> {
        self.0.member.get().map(|member| member.me)
    }

    /// Waits until this node was removed from its cluster.
    pub async fn removed(&self) {
        match self.0.member.get() {
            Some(member) => member.allegiance.over().await,
            None => std::future::pending().await,
        }
    }

    /// The coordinator, as far as this node knows.
    pub fn coordinator(&self) -> Option<NodeId> {
        self.0.member.get()?.consensus.standing().borrow().coordinator
    }

    /// Where this node stands in consensus; `None` before it is in a cluster.
    pub fn standing(&self) -> Option<Standing> {
        Some(self.0.member.get()?.consensus.standing().borrow().clone())
    }

    /// For how long after its last word to a quorum a coordinator has authority, in
    /// milliseconds; `None` before this host is in a cluster.
    pub fn authority_window_ms(&self) -> Option<u64> {
        Some(self.0.member.get()?.consensus.authority_window_ms())
    }

    fn member(&self) -> Result<&'static Member, Failure> {
        self.0.member.get().copied().ok_or_else(|| self.outside())
    }

    /// Why there is nothing to ask this host for, while it is in no cluster.
    pub fn outside(&self) -> Failure {
        match identity::removed(&self.0.config.state_dir) {
            Some(kept) => Failure::Removed { kept },
            None => Failure::NotInCluster,
        }
    }

    /// Has a command agreed on, wherever the coordinator is, and waits until
    /// this node has applied it too.
    ///
    /// # Errors
    /// [`Failure::Refused`]: nothing changed. [`Failure::NoCoordinator`]: nothing
    /// was proposed. [`Failure::Unknown`]: it may have been applied or may still be.
    pub async fn execute(&self, by: &str, command: Command) -> Result<Reply, Failure> {
        let member = self.member()?;
        let proposal = Proposal { id: RequestId(Uuid::new_v4()), at_ms: now_ms(), by: by.to_owned(), command };
        let until = Instant::now() + EXECUTE_DEADLINE;
        let mut standing = member.consensus.place();
        // Once it was sent, it may have been applied. A retry carries the same id
        // and is applied once at most, so retrying is always safe.
        let mut sent = false;
        loop {
            let coordinator = standing.borrow_and_update().coordinator;
            let tried = match coordinator {
                None => Err(Attempt::NotSent),
                Some(node) if node == member.me => self.propose_here(member, &proposal).await,
                Some(node) => {
                    let succeeded = |now: &Standing| now.coordinator.is_some_and(|coordinator| coordinator != node);
                    tokio::select! {
                        tried = self.propose_at(member, node, &proposal) => tried,
                        // A coordinator that lost its power never answers; its successor may know.
                        Ok(_) = standing.wait_for(succeeded), if Instant::now() < until => {
                            sent = true;
                            continue;
                        }
                    }
                }
            };
            match tried {
                Ok(Proposed { outcome, revision }) => {
                    self.applied(revision, until).await;
                    return match outcome {
                        Reply::Refused(refusal) => Err(Failure::Refused(refusal)),
                        reply => Ok(reply),
                    };
                }
                Err(Attempt::Unfit(why)) => return Err(Failure::other("invalid", why)),
                Err(Attempt::NotSent) => {}
                Err(Attempt::Unknown) => sent = true,
            }
            // A retry waits for a sign of change, but not for long: a node that is
            // cut off keeps naming the last coordinator.
            let pause = (Instant::now() + Duration::from_millis(100)).min(until);
            let _ = timeout_at(pause, standing.changed()).await;
            if Instant::now() >= until {
                return Err(if sent {
                    Failure::Unknown
                } else {
                    Failure::NoCoordinator { seconds: EXECUTE_DEADLINE.as_secs() }
                });
            }
        }
    }

    async fn propose_here(&self, member: &Member, proposal: &Proposal) -> Result<Proposed, Attempt> {
        match member.consensus.propose(proposal.clone()).await {
            Ok(outcome) => Ok(Proposed { outcome, revision: member.consensus.state().borrow().revision }),
            Err(ProposeError::NotCoordinator { .. } | ProposeError::Stopped) => Err(Attempt::NotSent),
            Err(ProposeError::Unknown) => Err(Attempt::Unknown),
            Err(ProposeError::Unfit(why)) => Err(Attempt::Unfit(why)),
        }
    }

    async fn propose_at(&self, member: &Member, node: NodeId, proposal: &Proposal) -> Result<Proposed, Attempt> {
        let asked: Result<Result<Proposed, Attempt>, CallError> =
            member.peers.ask(node, rpc::PROPOSE, proposal, ATTEMPT).await;
        asked.unwrap_or_else(|error| match error {
            CallError::Refused { .. } => Err(Attempt::NotSent),
            CallError::Unreachable(_) | CallError::Deadline => Err(Attempt::Unknown),
        })
    }

    /// Waits until this node has applied all that was agreed on before now, so that
    /// whoever was answered by another node finds here what it made there. Goes
    /// without when no majority can be asked: what follows will say so itself.
    pub async fn catch_up(&self) {
        let Some(member) = self.0.member.get() else { return };
        let caught_up = async {
            if let Ok(index) = member.consensus.barrier().await {
                member.consensus.wait_applied(index, CATCH_UP).await;
            }
            // The state that requests see follows in a task of its own.
            let revision = member.consensus.state().borrow().revision;
            self.applied(revision, Instant::now() + CATCH_UP).await;
        };
        let _ = tokio::time::timeout(CATCH_UP, caught_up).await;
    }

    /// Waits until this node has applied a revision, so that whoever was just
    /// answered finds here what was agreed on.
    async fn applied(&self, revision: u64, until: Instant) {
        let mut changes = self.changes();
        let _ = timeout_at(until, changes.wait_for(|state| state.revision >= revision)).await;
    }

    /// The serial console of a VM, wherever it runs.
    ///
    /// # Errors
    /// The VM does not run, or the node that runs it cannot be reached.
    pub async fn console(&self, vm: VmId) -> Result<Box<dyn Duplex>, Failure> {
        let member = self.member()?;
        let state = self.state();
        let known = state.vms.get(&vm).ok_or(Refusal::Unknown { what: "VM".into(), name: vm.to_string() })?;
        let off = || {
            Failure::other(
                "conflict",
                format!("VM {:?} does not run, so it has no console: start it first", known.name),
            )
        };
        let node = known.node().filter(|_| known.seen != Seen::Nothing).ok_or_else(off)?;
        if node == member.me {
            return Ok(Box::new(self.local_console(vm).await?));
        }
        let opened = member.peers.open(node, &rpc::console_path(vm), CONSOLE_PROTOCOL, ATTEMPT).await;
        let stream = opened.map_err(|error| {
            Failure::other(
                "unreachable",
                format!("the console of VM {:?} on {}: {error}", known.name, state.node_name(node)),
            )
        })?;
        Ok(Box::new(stream))
    }

    async fn local_console(&self, vm: VmId) -> Result<UnixStream, Failure> {
        let path = holdfast_qemu::Launch::console_socket(&self.0.config.vm_dir(vm));
        UnixStream::connect(&path).await.map_err(|error| {
            Failure::other("conflict", format!("the VM has no console on this node right now ({error})"))
        })
    }

    /// What the coordinator last heard from every node; not replicated.
    ///
    /// # Errors
    /// No coordinator answers.
    pub async fn observed(&self) -> Result<BTreeMap<NodeId, NodeObserved>, Failure> {
        let member = self.member()?;
        let none = Failure::NoCoordinator { seconds: ATTEMPT.as_secs() };
        let Some(coordinator) = self.coordinator() else { return Err(none) };
        if coordinator == member.me {
            return Ok(coordinator::observe(member).nodes);
        }
        member.peers.ask(coordinator, rpc::OBSERVED, &(), ATTEMPT).await.map_err(|_| none)
    }

    /// The absolute path of a file on a volume on this node.
    pub fn volume_path(&self, volume: &str, file: &str) -> PathBuf {
        self.0.config.volumes_dir.join(volume).join(file)
    }
}

/// A proposal's outcome and the revision that has it.
#[derive(serde::Serialize, serde::Deserialize)]
struct Proposed {
    outcome: Reply,
    revision: u64,
}

/// Why one attempt to propose gave no outcome.
#[derive(serde::Serialize, serde::Deserialize)]
enum Attempt {
    /// Certainly not proposed.
    NotSent,
    /// Perhaps proposed.
    Unknown,
    /// Never to be proposed.
    Unfit(String),
}
