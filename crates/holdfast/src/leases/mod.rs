//! The coordinator's side of leases: a real-time thread in the agent that answers
//! heartbeats, and calls a lease ended in the moment in which it certainly has.
//!
//! ```text
//!  tokio side                               lease thread
//!  become_coordinator, update ──queue────▶  slots: answer, condemn at their bound
//!  set_authority ─────────────atomic────▶   may it grant at all?
//!  snapshot, link_view ◀──try-locked copy── what changed
//!  changed() ◀── relay thread ◀──bell──────
//! ```
//! The thread never waits for one without real-time priority, asks for no memory
//! and writes no log. Every node runs it: on the others it grants nothing, but
//! knows which keepers are alive and over which networks it hears them.

mod thread;

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use holdfast_core::lease::{Authority, BootTime, LeaseTiming};
use holdfast_core::{Incarnation, NodeId, NodeTerm};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt};
use tokio::sync::watch;
use uuid::Uuid;

use self::thread::{AnsweringThread, Board, Lines, Peer, Told};
use crate::heartbeat::{Ends, Freshness, KeyError, Link, SecretKey, Side, draw};
use crate::realtime::{LEASE_PRIORITY, go_realtime};

/// How many nodes' leases and keepers are looked after.
pub const NODES: usize = 256;

/// How many addresses heartbeats are answered on.
pub const ADDRESSES: usize = 16;

const QUEUE: usize = 64;

/// Why heartbeats cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum LeasesError {
    /// An address is not there or taken.
    #[error(
        "cannot answer heartbeats on {address}: {source}: another agent may be running, or the address is not this host's"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Something that every Linux has.
    #[error("cannot start the thread that answers heartbeats: {0}")]
    System(#[from] std::io::Error),
    /// A key is no key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Too many of something.
    #[error("{count} {what} are more than this version can look after: at most {limit}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many are possible.
        limit: usize,
    },
    /// The thread does not take anything any more.
    #[error("the thread that answers heartbeats does not react: this node cannot be coordinator")]
    Stuck,
}

/// Who this node is, and where it answers.
#[derive(Clone, Debug)]
pub struct LeasesConfig {
    /// The cluster, of the generation that this node obeys
    /// ([`holdfast_core::Generation::scope`]).
    pub cluster: Uuid,
    /// This node.
    pub node: NodeId,
    /// This node's X25519 secret.
    pub secret: SecretKey,
    /// UDP addresses to answer on, one per network.
    pub bind: Vec<SocketAddr>,
    /// The nodes whose keepers are listened to.
    pub peers: Vec<PeerKey>,
}

/// A node whose keeper is listened to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerKey {
    /// The node.
    pub node: NodeId,
    /// Its X25519 public key.
    pub public: [u8; 32],
}

/// What the cluster has agreed on about a node's right to a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The node.
    pub node: NodeId,
    /// The keeper's life that was admitted.
    pub admitted: Incarnation,
    /// The node's term.
    pub term: NodeTerm,
    /// Whether it counts as up.
    pub up: bool,
    /// Whether it is being removed: it gets no lease any more.
    pub leaves: bool,
}

/// A lease as the coordinator sees it, or just a keeper on the other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// The node.
    pub node: NodeId,
    /// Its lease; `None` while this node is not coordinator or does not know it yet.
    pub lease: Option<LeaseSlotView>,
    /// The keeper's life that was heard last, proven to be alive then, and when.
    pub heard: Option<(Incarnation, BootTime)>,
}

/// A lease as the coordinator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseSlotView {
    /// The keeper's life that was admitted.
    pub admitted: Incarnation,
    /// The node's term.
    pub term: NodeTerm,
    /// Whether it counts as up.
    pub up: bool,
    /// Its lease has certainly ended, and it gets no other in this term.
    pub condemned: bool,
    /// No lease of it can last beyond this.
    pub bound: BootTime,
    /// When it was last answered (to the millisecond), or when this coordinator took over.
    pub answered: BootTime,
}

impl SlotView {
    /// The life of a keeper that was heard within the last `recent_ms`.
    pub fn heard_within(&self, recent_ms: u64, now: BootTime) -> Option<Incarnation> {
        self.heard.filter(|(_, at)| now.ms_since(*at) <= recent_ms).map(|(life, _)| life)
    }
}

/// A network on which a keeper was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkView {
    /// Whose keeper.
    pub node: NodeId,
    /// On which of this node's addresses.
    pub local: SocketAddr,
    /// From where it came last.
    pub remote: SocketAddr,
    /// When it came last.
    pub heard: BootTime,
}

/// The running thread; it ends when this is dropped.
pub struct Leases {
    config: LeasesConfig,
    life: u64,
    outbox: SyncSender<Told>,
    wake: Arc<EventFd>,
    /// That of the current coordinatorship.
    authority: Mutex<Arc<AtomicU64>>,
    board: Arc<Mutex<Board>>,
    changed: watch::Receiver<u64>,
    over: Arc<AtomicBool>,
    bell: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Leases {
    /// Binds the addresses and starts answering: no grants before this node is
    /// coordinator and has authority.
    pub fn start(config: LeasesConfig) -> Result<Leases, LeasesError> {
        at_most("addresses", config.bind.len(), ADDRESSES)?;
        let life = draw()?;
        let peers = build_peers(&config, life, &config.peers)?;
        let mut sockets = Vec::new();
        for address in &config.bind {
            let open = || {
                let socket = bind(*address)?;
                socket.set_nonblocking(true)?;
                let local = socket.local_addr()?;
                Ok((socket, local))
            };
            sockets.push(open().map_err(|source| LeasesError::Bind { address: *address, source })?);
        }
        let (wake, bell) = (eventfd(EfdFlags::EFD_NONBLOCK)?, eventfd(EfdFlags::empty())?);
        let (outbox, inbox) = sync_channel(QUEUE);
        let (retire, retired) = sync_channel(QUEUE);
        let board = Arc::new(Mutex::new(Board::with_room()));
        let lines = Lines { inbox, wake: wake.clone(), retire, bell: bell.clone(), board: board.clone() };
        let thread = AnsweringThread::new(sockets, peers, lines)?;
        let over = Arc::new(AtomicBool::new(false));
        let (changes, changed) = watch::channel(0);
        let relay = spawn("leases-relay", {
            let (bell, over) = (bell.clone(), over.clone());
            move || relay(&bell, &over, &changes, &retired)
        })?;
        let mut leases = Leases {
            config,
            life,
            outbox,
            wake,
            authority: Mutex::default(),
            board,
            changed,
            over,
            bell,
            threads: vec![relay],
        };
        leases.threads.push(spawn("leases", move || {
            if let Err(error) = go_realtime(LEASE_PRIORITY) {
                tracing::warn!(%error, "no real-time priority for the thread that answers heartbeats: on a busy host other nodes may lose their leases (needs CAP_SYS_NICE)");
            }
            // An agent that cannot answer heartbeats must not stay coordinator: the
            // keeper starts another, and meanwhile another node takes over.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| thread.run()));
            if outcome.is_err() {
                std::process::abort();
            }
        })?);
        Ok(leases)
    }

    /// The addresses that heartbeats are answered on.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.board().local.clone()
    }

    /// Listens to these nodes' keepers from now on; what is known of those that
    /// stay is kept.
    pub fn set_peers(&self, peers: &[PeerKey]) -> Result<(), LeasesError> {
        let peers = build_peers(&self.config, self.life, peers)?;
        self.tell(Told::Peers(peers))
    }

    /// This node took over at `since`; an earlier coordinator may have granted
    /// leases of `longest` up to then. Grants nothing without [`Leases::set_authority`].
    pub fn become_coordinator(
        &self,
        since: BootTime,
        nodes: &[Admission],
        timing: LeaseTiming,
        longest: LeaseTiming,
    ) -> Result<(), LeasesError> {
        at_most("nodes", nodes.len(), NODES)?;
        let (nodes, slots) = (nodes.to_vec(), Vec::with_capacity(NODES));
        let authority = Arc::new(AtomicU64::new(Authority::NONE.until.0));
        self.set_authority(Authority::NONE);
        *self.authority.lock().unwrap_or_else(PoisonError::into_inner) = authority.clone();
        self.tell(Told::Coordinate(Box::new(thread::Coordination { since, nodes, timing, longest, slots, authority })))
    }

    /// Takes over what the cluster has agreed on since.
    pub fn update(&self, nodes: &[Admission], timing: LeaseTiming) -> Result<(), LeasesError> {
        at_most("nodes", nodes.len(), NODES)?;
        self.tell(Told::Update(Box::new((nodes.to_vec(), timing))))
    }

    /// This node is not coordinator any more: nothing is granted from here on.
    pub fn step_down(&self) -> Result<(), LeasesError> {
        self.set_authority(Authority::NONE);
        self.tell(Told::StepDown)
    }

    /// Until when leases may be granted in this coordinatorship. Takes effect at once.
    pub fn set_authority(&self, authority: Authority) {
        let current = self.authority.lock().unwrap_or_else(PoisonError::into_inner);
        current.store(authority.until.0, SeqCst);
    }

    /// Every node's lease and keeper. Condemnations and new lives are in it at once,
    /// times may be 100 ms old.
    pub fn snapshot(&self) -> Vec<SlotView> {
        self.board().slots.clone()
    }

    /// Over which networks which keepers are heard; times may be 100 ms old.
    pub fn link_view(&self) -> Vec<LinkView> {
        self.board().links.clone()
    }

    /// Changes when a lease was condemned, a new life of a keeper was heard, or an
    /// update took effect: look at the [`Leases::snapshot`] then.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.clone()
    }

    fn board(&self) -> std::sync::MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, message: Told) -> Result<(), LeasesError> {
        let sent = self.outbox.try_send(message);
        let _ = self.wake.write(1);
        match sent {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(LeasesError::Stuck),
        }
    }
}

/// A socket for one address beside one for all addresses: the kernel gives a
/// datagram to the more exact one, and wants both to agree to share the port.
fn bind(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket.into())
}

impl Drop for Leases {
    fn drop(&mut self) {
        self.set_authority(Authority::NONE);
        self.over.store(true, SeqCst);
        // The thread ends when its queue has no sender any more.
        let (closed, _) = sync_channel(0);
        self.outbox = closed;
        let _ = self.wake.write(1);
        let _ = self.bell.write(1);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn at_most(what: &'static str, count: usize, limit: usize) -> Result<(), LeasesError> {
    if count > limit {
        return Err(LeasesError::TooMany { what, count, limit });
    }
    Ok(())
}

fn build_peers(config: &LeasesConfig, life: u64, peers: &[PeerKey]) -> Result<Vec<Peer>, LeasesError> {
    at_most("nodes", peers.len(), NODES)?;
    let build = |peer: &PeerKey| {
        let ends = Ends {
            cluster: config.cluster,
            me: config.node,
            secret: &config.secret,
            peer: peer.node,
            public: peer.public,
        };
        let link = Link::new(&ends, Side::Agent, life)?;
        Ok(Peer::new(link, Freshness::new()?))
    };
    peers.iter().map(build).collect()
}

fn eventfd(flags: EfdFlags) -> std::io::Result<Arc<EventFd>> {
    let fd = EventFd::from_flags(flags | EfdFlags::EFD_CLOEXEC)?;
    Ok(Arc::new(fd))
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).stack_size(256 << 10).spawn(body)
}

/// Waking tasks takes locks that ordinary threads hold, and freeing memory takes
/// the allocator's: this ordinary thread does both for the lease thread.
fn relay(bell: &EventFd, over: &AtomicBool, changes: &watch::Sender<u64>, retired: &Receiver<Told>) {
    while !over.load(SeqCst) {
        if bell.read().is_ok() {
            changes.send_modify(|count| *count += 1);
        }
        while let Ok(told) = retired.try_recv() {
            drop(told);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
