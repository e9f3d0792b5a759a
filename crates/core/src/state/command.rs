//! Commands: every way in which the state can change.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::files::{Holding, Naming};
use crate::model::*;
use crate::plan::Decision;

/// A change to the state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Founds the cluster with its first node.
    Found {
        /// The cluster.
        cluster: Cluster,
        /// Its first node, which gets number 1.
        node: NewNode,
    },
    /// Makes a token with which one host may join.
    AddJoinToken {
        /// SHA-256 of the token, in hexadecimal.
        digest: String,
        /// From when on it is worth nothing, milliseconds since the Unix epoch.
        expires_ms: u64,
    },
    /// Lets a host join with a token, and uses the token up.
    Join {
        /// SHA-256 of the token, in hexadecimal.
        digest: String,
        /// The host.
        node: NewNode,
    },
    /// Removes a node. Unless it is lost, no VM may be on it.
    RemoveNode {
        /// Which.
        node: NodeId,
    },
    /// Empties a node for maintenance and keeps it empty, or not any more.
    DrainNode {
        /// Which.
        node: NodeId,
        /// Whether it is to be empty.
        drained: bool,
    },
    /// What a node says of itself.
    SetFacts {
        /// Which.
        node: NodeId,
        /// Its facts.
        facts: NodeFacts,
    },
    /// Says how a node's host can be switched off, or that it cannot.
    SetFencing {
        /// Which node.
        node: NodeId,
        /// How; `None`: not at all.
        fencing: Option<PowerFencing>,
    },
    /// A test of a node's power fencing has ended.
    FenceTested {
        /// Which node.
        node: NodeId,
        /// The fence agent that was tested.
        agent: String,
        /// What it showed.
        test: FenceTest,
    },
    /// Wants a node's host switched off, whether it is silent or not.
    AskFence {
        /// Which node.
        node: NodeId,
    },
    /// A host could not be shown to have lost its power.
    FenceFailed {
        /// Which node.
        node: NodeId,
        /// The node's term when the fence was ordered.
        term: NodeTerm,
        /// What went wrong.
        why: String,
    },
    /// A node does not feed its hardware watchdog any more: VMs of a lease that is over
    /// were not shown dead. Said by the node, if it still can.
    WatchdogLeft {
        /// Which node.
        node: NodeId,
        /// The watchdog.
        device: String,
        /// How long after its last feeding it resets the host, in seconds.
        timeout_s: u32,
    },
    /// Says where a node stands; votes are spread over sites.
    SetSite {
        /// Which.
        node: NodeId,
        /// The site's name; none takes it back.
        site: Option<String>,
    },
    /// A quorum was forced: one node goes on alone, by its own log. Only ever the
    /// first thing that happens in a new generation.
    ForceQuorum {
        /// The new generation.
        generation: Generation,
        /// The node that goes on.
        node: NodeId,
        /// Nodes that were up and come along.
        with: BTreeSet<NodeId>,
    },
    /// The votes have moved: consensus has these voters now.
    VotesMoved {
        /// All of them.
        voters: BTreeSet<NodeId>,
    },
    /// Makes a disk that every node was seen to reach the witness.
    SetWitness {
        /// Its path, the same on every node.
        disk: String,
        /// What was written on it.
        mark: Uuid,
    },
    /// Does without a witness.
    ClearWitness,
    /// Chooses how fast a lost node is noticed.
    SetProfile {
        /// The profile.
        profile: Profile,
    },
    /// Makes a token for the API.
    AddApiToken {
        /// Its name.
        name: String,
        /// SHA-256 of the token, in hexadecimal.
        digest: String,
    },
    /// Revokes a token for the API.
    RemoveApiToken {
        /// Its name.
        name: String,
    },
    /// Renames a network or changes its use.
    SetNetwork {
        /// Its current name or its subnet.
        network: String,
        /// Its new name.
        name: Option<String>,
        /// Its new use.
        roles: Option<Roles>,
        /// Its new metric.
        metric: Option<u32>,
    },
    /// Adds a virtual switch.
    AddSwitch {
        /// Its name.
        name: String,
        /// What it reaches.
        kind: SwitchKind,
    },
    /// Removes a virtual switch that no NIC uses.
    RemoveSwitch {
        /// Its name.
        name: String,
    },
    /// Adds a volume that every node was seen to reach.
    AddVolume {
        /// Its name.
        name: String,
        /// Its identity, already written on it.
        id: Uuid,
        /// What is behind it.
        kind: VolumeKind,
    },
    /// Removes a volume that no VM uses; what is on it stays.
    RemoveVolume {
        /// Its name.
        name: String,
    },
    /// Renames a volume of which no VM that runs has a file open.
    RenameVolume {
        /// Its name.
        name: String,
        /// Its new name.
        new: String,
    },
    /// Wants a volume on a LUN owned by a node.
    SetOwner {
        /// The volume.
        volume: String,
        /// The node.
        node: NodeId,
    },
    /// Wants a node to reach a volume on a LUN through its owner although it need not,
    /// or not any more.
    SetRedirect {
        /// The volume.
        volume: String,
        /// The node.
        node: NodeId,
        /// Whether it is to.
        redirect: bool,
    },
    /// Chooses after how long VMs leave a node that reaches their disks only through
    /// another.
    SetRedirectPatience {
        /// How long, in seconds.
        seconds: u64,
    },
    /// A node takes free slabs of a LUN, to zero them. Answered by [`Reply::Slabs`].
    TakeSlabs {
        /// The volume.
        volume: String,
        /// The node.
        node: NodeId,
        /// Its term: what it takes is its own as long as that lasts.
        term: NodeTerm,
        /// Those that it knows of: what it has taken besides, and forgotten, comes
        /// first.
        known: Vec<Slabs>,
        /// How many at most.
        most: u32,
    },
    /// Whoever may run a VM makes slabs that its node has zeroed parts of a disk.
    /// Answered by [`Reply::Mapped`].
    MapSlabs {
        /// The VM.
        vm: VmId,
        /// Which of its disks.
        disk: u32,
        /// The right under which it writes.
        tenure: Tenure,
        /// Which parts, in which slabs.
        wanted: Vec<Mapped>,
        /// For each of them, the taking that gave the slabs: one that the node has taken
        /// again since is being zeroed again. What was written before takings had
        /// numbers names none.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        takings: Vec<u64>,
    },
    /// Whoever may run a VM gives slabs of a disk back: the guest does not need what is in
    /// these parts, and no I/O to them is under way nor begins before this is decided.
    /// Answered by [`Reply::Unmapped`].
    UnmapSlabs {
        /// The VM.
        vm: VmId,
        /// Which of its disks.
        disk: u32,
        /// The right under which it writes.
        tenure: Tenure,
        /// How often the disk has given parts back: with another number nothing is done.
        number: u64,
        /// Which parts: the first, and how many.
        parts: Vec<(u32, u32)>,
    },
    /// A volume server of a node begins to serve disks: what an earlier life of it had
    /// asked to be unmapped, and was not decided yet, is void.
    VoidUnmaps {
        /// The node.
        node: NodeId,
    },
    /// The node that is to keep a LUN's journal begins to write it.
    ClaimJournal {
        /// The volume.
        volume: String,
        /// Who will write.
        writer: Writer,
    },
    /// What a writer has done with a LUN's journal.
    JournalWritten {
        /// The volume.
        volume: String,
        /// Who wrote.
        writer: Writer,
        /// The revision that is on stable storage there, or why it cannot be written.
        outcome: Result<u64, String>,
        /// It was written anew, as [`Command::RepairVolume`] wants it.
        repaired: bool,
        /// It does not write any more: nothing of it is under way.
        ends: bool,
    },
    /// Has a LUN's description written anew from the state.
    RepairVolume {
        /// The volume.
        name: String,
    },
    /// Adds a volume that is described on its LUN. Its files follow.
    ImportVolume {
        /// Its name here.
        name: String,
        /// Its identity, written on it.
        id: Uuid,
        /// What is behind it.
        kind: VolumeKind,
        /// The epoch and the revision of its journal.
        journal: (u64, u64),
    },
    /// Files of a volume that is being imported, or more parts of them.
    ImportFiles {
        /// The volume.
        volume: String,
        /// Sizes in bytes, and parts, by name.
        files: BTreeMap<String, (u64, Vec<Mapped>)>,
        /// There are no more.
        last: bool,
    },
    /// A node takes a file on a LUN into its hands.
    HoldFile {
        /// Names the hold.
        id: HoldId,
        /// The volume.
        volume: String,
        /// The node.
        node: NodeId,
        /// Its term: when that is over, so is the hold.
        term: NodeTerm,
        /// Which file, to do what.
        what: Holding,
    },
    /// A node has let go of a file: nothing of it is under way.
    EndHold {
        /// The hold.
        id: HoldId,
        /// The name that it gets, if it was made and is to stay.
        naming: Option<Naming>,
    },
    /// Removes a file from a LUN that no VM has and nobody has open.
    RemoveFile {
        /// The volume.
        volume: String,
        /// The file.
        name: String,
    },
    /// Creates a VM whose disks are still to be made.
    CreateVm {
        /// Its identity.
        id: VmId,
        /// Its name.
        name: String,
        /// Its hardware.
        spec: VmSpec,
        /// The node that makes its disks.
        node: NodeId,
        /// What to fill them from.
        sources: Sources,
    },
    /// Changes what the user wants of a VM.
    SetDesired {
        /// Which.
        vm: VmId,
        /// What is wanted.
        desired: Desired,
    },
    /// Shuts the guest down and starts it again.
    RestartVm {
        /// Which.
        vm: VmId,
    },
    /// Deletes a VM that is off, and its disks.
    DeleteVm {
        /// Which.
        vm: VmId,
        /// The node that deletes its disks.
        node: NodeId,
    },
    /// Moves a VM while it runs.
    MigrateVm {
        /// Which.
        vm: VmId,
        /// Where to; the node with the most room when none is named.
        to: Option<NodeId>,
    },
    /// Stops a job where that is possible.
    CancelJob {
        /// Which.
        job: JobId,
    },
    /// What the coordinator decided, all of it or nothing.
    Decide {
        /// The revision of the state that it was decided on.
        revision: u64,
        /// The decisions, in order.
        decisions: Vec<Decision>,
    },
}

impl Command {
    /// Whether it changes only who has which slab and what is written about it. Nothing
    /// that the coordinator decides stands on that, and doing it twice does no harm.
    pub fn is_bookkeeping(&self) -> bool {
        use Command::{ClaimJournal, JournalWritten, MapSlabs, TakeSlabs, UnmapSlabs, VoidUnmaps};
        let slabs = matches!(self, TakeSlabs { .. } | MapSlabs { .. } | UnmapSlabs { .. } | VoidUnmaps { .. });
        slabs || matches!(self, ClaimJournal { .. } | JournalWritten { .. })
    }
}

/// A host that becomes a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewNode {
    /// Its name.
    pub name: String,
    /// Where its agent answers other nodes: TLS over TCP.
    pub port: u16,
    /// Where its lease thread answers heartbeats: UDP.
    pub heartbeat_port: u16,
    /// Its X25519 public key.
    pub heartbeat_key: [u8; 32],
    /// What it says of itself.
    pub facts: NodeFacts,
    /// Where it stands.
    #[serde(default)]
    pub site: Option<String>,
}

/// A command on its way through consensus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// A retry carries the same id and is applied once.
    pub id: RequestId,
    /// When it was proposed, milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Who asked for it.
    pub by: String,
    /// What to change.
    pub command: Command,
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// Applied.
    Done,
    /// Applied; this job does the rest.
    Job(JobId),
    /// Applied; the host is this node now.
    Node(NodeId),
    /// Applied; these are the node's now.
    Slabs(Taking),
    /// Applied; the parts that were asked for are here now, those that are missing
    /// nowhere.
    Mapped(Vec<Mapped>),
    /// Applied, or not: this says so.
    Unmapped(Unmapped),
    /// Refused; nothing changed.
    Refused(Refusal),
}

/// Why a command was refused. The text says what to do; [`Refusal::code`] is
/// for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// There is a cluster already.
    #[error("this host already belongs to cluster {name:?}: a host can be in one cluster only")]
    AlreadyFounded {
        /// Its name.
        name: String,
    },
    /// No such thing.
    #[error("there is no {what} {name:?}")]
    Unknown {
        /// `vm`, `node` ...
        what: String,
        /// What was asked for.
        name: String,
    },
    /// The name is taken.
    #[error("there is already a {what} {name:?}: choose another name")]
    Duplicate {
        /// `vm`, `node` ...
        what: String,
        /// The name.
        name: String,
    },
    /// A name, a number or a combination that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The token was never issued, or expired, or was used.
    #[error("{0}")]
    Token(String),
    /// Its state does not allow it.
    #[error("{0}")]
    Conflict(String),
    /// No node has room for it.
    #[error("{vm:?} fits no node: {why}")]
    NoRoom {
        /// The VM.
        vm: String,
        /// What each node lacks.
        why: String,
    },
    /// Decided on a state that has changed since.
    #[error("decided on revision {planned}, but the state is at {current}: decide again")]
    Stale {
        /// The revision of the plan.
        planned: u64,
        /// The revision now.
        current: u64,
    },
}

impl Refusal {
    /// A word for programs, stable across versions.
    pub fn code(&self) -> &'static str {
        match self {
            Refusal::AlreadyFounded { .. } => "already_in_cluster",
            Refusal::Unknown { .. } => "not_found",
            Refusal::Duplicate { .. } => "already_exists",
            Refusal::Invalid(_) => "invalid",
            Refusal::Token(_) => "bad_token",
            Refusal::Conflict(_) => "conflict",
            Refusal::NoRoom { .. } => "no_room",
            Refusal::Stale { .. } => "stale",
        }
    }

    pub(crate) fn unknown(what: &str, name: impl ToString) -> Self {
        Refusal::Unknown { what: what.into(), name: name.to_string() }
    }

    pub(crate) fn duplicate(what: &str, name: &str) -> Self {
        Refusal::Duplicate { what: what.into(), name: name.into() }
    }
}
