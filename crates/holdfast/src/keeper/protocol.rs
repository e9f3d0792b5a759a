//! What the agent asks of the keeper: one JSON document a line over
//! `keeper.sock`, a [`Call`] one way, a [`ToClient`] the other.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use holdfast_core::lease::BootTime;
use holdfast_core::watchdog::Standing;
use holdfast_core::{Epoch, Generation, Incarnation, NodeId, NodeTerm, VmId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::heartbeat::SecretKey;

/// The longest line in either direction, in bytes.
pub const LONGEST_LINE: usize = 1 << 20;

/// A request with the number that its reply will carry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the client.
    pub id: u64,
    /// What it wants.
    pub request: Request,
}

/// What a client can ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Who are you, and what is there? Answered by [`Reply::Hello`].
    Hello,
    /// Ask for the node's lease like this from now on. The keeper keeps nothing on
    /// disk, so every agent that starts says it again. Answered by [`Reply::Done`].
    Configure(Configuration),
    /// Start a VM's QEMU. Answered by [`Reply::Started`] when QEMU executes.
    Start(StartVm),
    /// This epoch will never be started here: makes "could not start" final.
    /// Answered by [`Reply::Done`].
    Retire(Tag),
    /// SIGKILL. Answered by [`Reply::Dead`] when the process is gone.
    Kill(Tag),
    /// Every process of this keeper's life that was not forgotten. Answered by [`Reply::Vms`].
    List,
    /// Drop an ended process from the list. Answered by [`Reply::Done`].
    Forget(Tag),
    /// End in order, as when the service is stopped: what starts next may serve another
    /// node. Answered by [`Reply::Done`] before that is done.
    End,
    /// Have the volume server serve a socket at this path, in every life of it.
    /// Answered by [`Reply::Done`].
    Listen {
        /// The path, absolute.
        path: PathBuf,
    },
    /// Nothing is served at this path any more. Answered by [`Reply::Done`].
    Unlisten {
        /// The path.
        path: PathBuf,
    },
    /// Send events from now on. Answered by [`Reply::Vms`] as of this moment, so
    /// that nothing falls between the list and the first event.
    Subscribe,
}

/// One permitted start of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tag {
    /// The VM.
    pub vm: VmId,
    /// Its epoch.
    pub epoch: Epoch,
}

/// How to ask for the node's lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// The cluster; stays the same for a keeper's whole life.
    pub cluster: Uuid,
    /// The generation that this node obeys: heartbeats of others are not understood.
    #[serde(default)]
    pub generation: Generation,
    /// This node; stays the same for a keeper's whole life.
    pub node: NodeId,
    /// This node's X25519 secret.
    pub secret: SecretKey,
    /// Where to send from; empty: any address and port. Each heartbeat leaves by
    /// the one that shares the longest prefix with its destination.
    #[serde(default)]
    pub bind: Vec<SocketAddr>,
    /// Everybody who may become coordinator, this node's own agent included.
    pub peers: Vec<PeerAddresses>,
    /// Time between two heartbeats in milliseconds, until a grant says otherwise.
    pub heartbeat_ms: u64,
}

/// Where a node's agent answers heartbeats.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerAddresses {
    /// The node.
    pub node: NodeId,
    /// Its X25519 public key.
    pub public: [u8; 32],
    /// Its addresses, one per network, at most [`crate::heartbeat::PATHS`].
    pub addresses: Vec<SocketAddr>,
}

/// A VM to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartVm {
    /// The VM.
    pub vm: VmId,
    /// Under which epoch.
    pub epoch: Epoch,
    /// In which of the node's terms.
    pub term: NodeTerm,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables on top of the keeper's environment.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// The directory of an existing cgroup to run in.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// Stdout and stderr are appended here.
    pub log: PathBuf,
    /// The working directory.
    pub run_dir: PathBuf,
}

/// What a client hears.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToClient {
    /// The answer to a call.
    Reply {
        /// The call's number.
        id: u64,
        /// What became of it.
        result: Result<Reply, Refusal>,
    },
    /// Something happened; only after [`Request::Subscribe`].
    Event(Event),
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello(Greeting),
    /// It is so now.
    Done,
    /// QEMU executes.
    Started {
        /// Its process id.
        pid: i32,
    },
    /// The process is gone.
    Dead {
        /// How it ended.
        exit: Exit,
    },
    /// To [`Request::List`] and [`Request::Subscribe`], ordered by VM and epoch.
    Vms(Vec<VmProcess>),
}

/// Who the keeper is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// This life of the keeper.
    pub incarnation: Incarnation,
    /// Holdfast's version.
    pub version: String,
    /// The node's lease.
    pub lease: LeaseView,
    /// Processes of an earlier keeper that are not dead yet: no lease before they are.
    pub leftovers: Vec<String>,
    /// How this host's watchdog stands.
    pub watchdog: Standing,
    /// As in [`Reply::Vms`].
    pub vms: Vec<VmProcess>,
}

/// The node's lease as the keeper sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseView {
    /// Whether VMs may run.
    pub held: bool,
    /// The node's term of the last grant.
    pub term: NodeTerm,
    /// How much is left of it, in milliseconds; zero when it is not held.
    pub ends_in_ms: u64,
    /// When a lease ended last: how long after its end the last VM was sent SIGKILL,
    /// in microseconds.
    pub last_late_us: Option<u64>,
}

/// A QEMU that this keeper started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmProcess {
    /// The VM.
    pub vm: VmId,
    /// Under which epoch.
    pub epoch: Epoch,
    /// In which of the node's terms.
    pub term: NodeTerm,
    /// Its process id; means nothing once it has ended.
    pub pid: i32,
    /// How it fares.
    pub state: ProcessState,
}

/// How a process fares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcessState {
    /// It lives.
    Running,
    /// It is gone.
    Exited {
        /// How it ended.
        exit: Exit,
        /// When that was seen, on this host's CLOCK_BOOTTIME.
        at: BootTime,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// By itself, with this status.
    Status(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Status(status) => write!(f, "exit status {status}"),
            Exit::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Something that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A VM's process is gone.
    Exited {
        /// The VM.
        vm: VmId,
        /// Under which epoch.
        epoch: Epoch,
        /// How it ended.
        exit: Exit,
    },
    /// VMs may run.
    LeaseGained {
        /// In which term.
        term: NodeTerm,
    },
    /// VMs may not run any more.
    LeaseLost {
        /// In which term.
        term: NodeTerm,
        /// How many were killed for it.
        killed: u32,
    },
    /// The watchdog stands otherwise: [`Request::Hello`] tells how.
    WatchdogChanged,
}

/// Why a request was not granted. Nothing changed, except where it says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The node may not run VMs now.
    #[error("this node holds no lease, so no VM may start here: wait until the coordinator grants one")]
    NoLease,
    /// The right to start was given in another term of the node.
    #[error("the start was permitted in another term of this node, which is in term {current} now")]
    WrongTerm {
        /// The current one.
        current: NodeTerm,
    },
    /// Each epoch starts once, and never after a later one.
    #[error("this epoch of the VM cannot be started any more: epoch {last} was used already")]
    EpochUsed {
        /// The last one that was used.
        last: Epoch,
    },
    /// One process per VM.
    #[error("the VM's process of epoch {epoch} is still alive: kill it and wait for its end first")]
    AlreadyRunning {
        /// Under which epoch it runs.
        epoch: Epoch,
    },
    /// There is none.
    #[error("this keeper started no such process, or it was forgotten")]
    NotFound,
    /// Too many VMs.
    #[error("this keeper already runs {limit} VMs, which is its limit")]
    Full {
        /// How many it can hold.
        limit: u32,
    },
    /// QEMU could not be started; the epoch is used.
    #[error("the VM's process could not {step}: {error}")]
    StartFailed {
        /// At which step.
        step: String,
        /// The system's reason.
        error: String,
    },
    /// There can be no socket at a path.
    #[error("cannot listen at {path}: {why}")]
    NoSocket {
        /// Where.
        path: PathBuf,
        /// The system's reason.
        why: String,
    },
    /// The keeper is on its way out.
    #[error("the keeper is stopping")]
    Stopping,
    /// A keeper belongs to one node of one cluster.
    #[error("this keeper serves node {node} of cluster {cluster}: restart it to serve another")]
    OtherIdentity {
        /// The cluster that it serves.
        cluster: Uuid,
        /// The node that it serves.
        node: NodeId,
    },
    /// The configuration cannot be used; the earlier one stays in force.
    #[error("the heartbeat configuration is not usable: {why}")]
    Unusable {
        /// Why.
        why: String,
    },
    /// The line was not a request.
    #[error("the request was not understood: {why}")]
    Malformed {
        /// Why.
        why: String,
    },
}
