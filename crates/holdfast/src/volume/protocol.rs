//! What the agent and the volume server say to each other: one JSON document a line
//! over `volume.sock`, a [`ToServer`] one way, a [`ToAgent`] the other. The server
//! keeps nothing: whatever it has to serve, the agent says again to each new life.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use holdfast_core::{LunPath, Mapped, NodeId, NodeTerm, Slabs, Taking, Tenure, Unmapped, VmId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The name of the volume server's socket in the run directory.
pub const SOCKET: &str = "volume.sock";
/// The longest line in either direction, in bytes.
pub const LONGEST_LINE: u64 = 16 << 20;

/// A disk of a VM, under one right to run it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DiskId {
    /// The VM.
    pub vm: VmId,
    /// Which of its disks.
    pub disk: u32,
    /// The epoch of the right.
    pub epoch: u64,
}

/// A disk to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The VM.
    pub vm: VmId,
    /// Which of its disks.
    pub disk: u32,
    /// The right under which it is written to.
    pub tenure: Tenure,
    /// Where the keeper listens for QEMU.
    pub socket: PathBuf,
    /// The volume's name.
    pub volume: String,
    /// Its identity, also written on it.
    pub volume_id: Uuid,
    /// The device that it is on, here.
    pub device: PathBuf,
    /// What the guest sees, in bytes.
    pub bytes: u64,
    /// Where its parts are.
    pub parts: Vec<Mapped>,
    /// Whether writes are let through; a migration's target writes nothing before the
    /// source's word.
    pub may_write: bool,
}

impl Disk {
    /// Which disk it is.
    pub fn id(&self) -> DiskId {
        DiskId { vm: self.vm, disk: self.disk, epoch: self.tenure.epoch.0 }
    }
}

/// Who this node is to the volume servers of others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Links {
    /// Where this node's certificate and key are: the key itself does not travel.
    pub state_dir: PathBuf,
    /// This node.
    pub node: NodeId,
    /// Where others reach this server.
    pub port: u16,
}

/// Another way to a LUN than this node's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routes {
    /// The volume's name.
    pub volume: String,
    /// Its identity, also written on it.
    pub volume_id: Uuid,
    /// The device that it is on, here.
    pub device: PathBuf,
    /// The owner, if it is another node.
    pub owner: Option<Peer>,
    /// This node's term: the two that follow are rights of it, and void in a server that
    /// lives under a lease of another.
    pub term: NodeTerm,
    /// The epoch under which this node is the owner: it does I/O for others that name it.
    pub mine: Option<u64>,
    /// This node was the owner under this epoch and is to leave. Done when nothing of
    /// others is under way, nor of what an earlier life of the server did for them.
    pub leaves: Option<u64>,
    /// This node goes through the owner although its own path may work.
    pub planned: bool,
}

/// The owner of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Which node.
    pub node: NodeId,
    /// In which of its terms.
    pub term: NodeTerm,
    /// Under which epoch.
    pub epoch: u64,
    /// Where its volume server answers, the best network first.
    pub addresses: Vec<SocketAddr>,
}

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToServer {
    /// Do something.
    Call {
        /// The number that the reply will carry.
        id: u64,
        /// What.
        call: Call,
    },
    /// The answer to an [`Ask`].
    Answer {
        /// The question's number.
        id: u64,
        /// What came of it.
        answer: Answer,
    },
}

/// What the agent can call for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// Serve a disk. One that is served already and may not be written to learns where
    /// its parts are by now, and gets the right to write if that is given; of one that
    /// may be written to the server itself knows best.
    Serve(Disk),
    /// Serve it no more. Done when nothing of it is under way, nor of what an earlier
    /// life of the server had been asked.
    Withdraw(Disk),
    /// Serve no others than these. Done when nothing of others is under way.
    Only(Vec<DiskId>),
    /// Who this node is; said first to each life of the server.
    Links(Links),
    /// Said of every LUN of the cluster to each life of the server, before any of its
    /// disks, and again when something of it changes; of one that is not a volume any
    /// more without an owner.
    Routes(Routes),
    /// Describe a LUN's files on it. Done when that is on stable storage.
    Describe(Description),
    /// Describe it no more under this epoch. Done when nothing of it is under way.
    EndDescription {
        /// The volume's identity.
        volume_id: Uuid,
        /// The epoch of its journal.
        epoch: u64,
    },
}

/// What a LUN's journal is to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The volume's name.
    pub volume: String,
    /// Its identity, also written on it.
    pub volume_id: Uuid,
    /// The cluster that it belongs to.
    pub cluster: Uuid,
    /// The device that it is on, here.
    pub device: PathBuf,
    /// The epoch under which it is written.
    pub epoch: u64,
    /// The revision of the files: one that is older than what is there is not written.
    pub revision: u64,
    /// The files by name: their sizes in bytes, and where their parts are.
    pub files: BTreeMap<String, (u64, Vec<Mapped>)>,
    /// Write all of it anew, whatever is there.
    pub repair: Option<Known>,
}

/// What is known of a LUN elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The size of its slabs in bytes.
    pub slab_bytes: u64,
    /// How many there are.
    pub slabs: u32,
    /// When it became a volume, milliseconds since the Unix epoch.
    pub made_ms: u64,
}

/// What came of a question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// These slabs are the node's; none: there are none.
    Slabs(Taking),
    /// The parts that were asked for are here, those that are missing nowhere.
    Mapped(Vec<Mapped>),
    /// What became of parts that were to be given back.
    Unmapped(Unmapped),
    /// Nobody knows what came of it.
    Unknown,
}

/// From the volume server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToAgent {
    /// The answer to a call.
    Reply {
        /// The call's number.
        id: u64,
        /// What became of it; the error says what stands in the way.
        result: Result<(), String>,
    },
    /// How this node reaches a LUN that is open here: said to each agent that comes, and
    /// when it changes.
    Path {
        /// The volume.
        volume_id: Uuid,
        /// How; `None`: it is not open here any more.
        path: Option<LunPath>,
    },
    /// What this life of the server has done through other nodes in all; said once a
    /// second at most, while it grows.
    Redirected {
        /// The volume.
        volume_id: Uuid,
        /// How many requests.
        requests: u64,
        /// How many bytes were read and written.
        bytes: u64,
    },
    /// A question to the cluster.
    Ask {
        /// The number that the answer will carry.
        id: u64,
        /// What.
        ask: Ask,
    },
}

/// What the volume server asks of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Slabs to zero.
    Take {
        /// The volume's identity: its name may change.
        volume_id: Uuid,
        /// Those that the server knows of: others that are the node's come first.
        known: Vec<Slabs>,
        /// How many at most.
        most: u32,
    },
    /// Zeroed slabs are to be parts of a disk.
    Map {
        /// The disk.
        disk: DiskId,
        /// Which parts, in which slabs.
        wanted: Vec<Mapped>,
        /// For each of them, the taking that gave the slab.
        takings: Vec<u64>,
    },
    /// Parts of a disk are to have no slabs any more. Nobody uses them before the answer.
    Unmap {
        /// The disk.
        disk: DiskId,
        /// How often it has given parts back, as far as the server knows.
        number: u64,
        /// Which: the first, and how many.
        parts: Vec<(u32, u32)>,
    },
}
