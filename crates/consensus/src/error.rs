//! What can go wrong, and what to do about it.

use std::io;
use std::path::PathBuf;

use holdfast_core::NodeId;

use crate::transport::RpcKind;
use crate::witness::DiskError;

/// Why consensus could not start or change its members.
#[derive(Debug, thiserror::Error)]
pub enum ConsensusError {
    /// A file of the log is damaged.
    #[error(
        "{} is damaged at byte {offset}: {what}. \
         This node does not start, because it could forget what it promised to the other nodes, and it leaves \
         the file untouched. Repair the disk or restore the file; if that is impossible, remove this node \
         from the cluster, move its consensus directory away and join it again",
        file.display()
    )]
    Corrupt {
        /// The damaged file.
        file: PathBuf,
        /// Where the damage starts, in bytes from the beginning of the file.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// A file was written by a newer version of Holdfast.
    #[error("{} has format {found}, this version of Holdfast reads up to {known}: start the newer version again", file.display())]
    TooNew {
        /// The file.
        file: PathBuf,
        /// The version in the file.
        found: u8,
        /// The newest version that can be read.
        known: u8,
    },
    /// The files belong to another node.
    #[error("{} belongs to node {found}, not to node {expected}: give each node a directory of its own", file.display())]
    OtherNode {
        /// The file.
        file: PathBuf,
        /// The node in the file.
        found: NodeId,
        /// The node that was to start.
        expected: NodeId,
    },
    /// Another process uses the directory.
    #[error("{} is in use by another process: stop the other agent of this node first", directory.display())]
    InUse {
        /// The directory.
        directory: PathBuf,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The settings contradict each other.
    #[error("the consensus settings cannot work: {0}")]
    Settings(String),
    /// The log already holds a cluster.
    #[error("this node already belongs to a cluster; remove it from there before it starts another one")]
    AlreadyInitialized,
    /// There is no log to go on from.
    #[error("the log of this node holds nothing that it could go on from")]
    NothingKnown,
    /// Only the coordinator can do this.
    #[error("this node is not the coordinator{}", hint(coordinator))]
    NotCoordinator {
        /// Who is, if known.
        coordinator: Option<NodeId>,
    },
    /// The coordinator cannot remove its own vote.
    #[error("the coordinator cannot give up its own vote: transfer the coordination to another voter first")]
    RemovesCoordinator,
    /// Another change of the members is under way.
    #[error("another change of the members is under way: try again when it is done")]
    Busy,
    /// A node that was to become a voter did not catch up with the log.
    #[error(
        "node {node} did not catch up with the log within {waited_ms} ms and stays without a vote: check that it runs and can be reached at {address}, then try again"
    )]
    CatchUp {
        /// The slow node.
        node: NodeId,
        /// Its address.
        address: String,
        /// How long it was waited for, in milliseconds.
        waited_ms: u64,
    },
    /// The node that was to become the coordinator cannot.
    #[error("node {node} cannot become the coordinator: {why}")]
    CannotTransfer {
        /// The node.
        node: NodeId,
        /// Why not.
        why: &'static str,
    },
    /// The coordination was handed over, but somebody else got it.
    #[error("the coordination was handed over, but another node was elected{}", hint(coordinator))]
    ElectedInstead {
        /// Who coordinates now, if known.
        coordinator: Option<NodeId>,
    },
    /// The outcome is not known.
    #[error(
        "{action} did not finish in time and may still happen: look at the members and the coordinator before trying again"
    )]
    Unknown {
        /// What was tried.
        action: &'static str,
    },
    /// Consensus has stopped.
    #[error("consensus has stopped on this node: {0}")]
    Stopped(String),
    /// The witness's disk cannot be used.
    #[error("this node {0}")]
    Witness(#[from] DiskError),
}

/// Why a proposal or a barrier gave no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Nothing was proposed: this node cannot.
    #[error("this node is not the coordinator{}; nothing was changed", hint(coordinator))]
    NotCoordinator {
        /// Who is, if known.
        coordinator: Option<NodeId>,
    },
    /// It may have been applied or may still be: ask, or retry with the same id.
    #[error("the outcome is unknown: it may have been applied. Ask, or try again with the same request id")]
    Unknown,
    /// Nothing was proposed: it cannot be stored.
    #[error("the proposal cannot be stored: {0}; nothing was changed")]
    Unfit(String),
    /// Consensus has stopped on this node, before anything was proposed.
    #[error("consensus has stopped on this node; nothing was changed")]
    Stopped,
}

/// Why a call to another node gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// It could not be reached, or the connection broke.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// No answer came before the deadline.
    #[error("no answer before the deadline")]
    Deadline,
    /// It answered with an error.
    #[error("refused: {0}")]
    Refused(String),
}

/// Why a call from another node was not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RpcError {
    /// The body is not what this version understands.
    #[error("the {kind} request cannot be read: {reason}")]
    Malformed {
        /// The kind of the request.
        kind: RpcKind,
        /// What is wrong with it.
        reason: String,
    },
    /// No vote is given now: the coordinator that this node follows, or followed
    /// before it was restarted, may still rely on it.
    #[error("no vote is given while a coordinator may still rely on this node")]
    VoteWithheld,
    /// The log could not take it in time, for instance because the disk is full.
    #[error("not done before the deadline")]
    Deadline,
    /// Consensus has stopped on this node.
    #[error("consensus has stopped on this node")]
    Stopped,
    /// This node does not host the witness that was called, or no longer.
    #[error("the witness is not hosted here")]
    NotHosted,
}

fn hint(coordinator: &Option<NodeId>) -> String {
    match coordinator {
        Some(node) => format!(", node {node} is"),
        None => ", and none is known".to_owned(),
    }
}

impl ConsensusError {
    pub(crate) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| ConsensusError::Io { action, path, source }
    }
}
