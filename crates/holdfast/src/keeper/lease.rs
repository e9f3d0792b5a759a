//! The lease thread: asks for the node's lease on every network, and kills the
//! node's VMs when it ends (safety rules 1 and 2).
//!
//! ```text
//!           granted, and every VM of before is dead
//!   without ───────────────────────────────────────▶ held ─┐ renewed
//!      ▲                                              │  ▲─┘
//!      └──────────────────────────────────────────────┘
//!        it ended, or a new term was granted:
//!        close the table · [volume server] · SIGKILL · tell
//! ```
//! It asks the coordinator, which is whoever granted the lease last, and every node
//! when nobody has for a while: two missed answers are told from one that is late,
//! and are fewer than it takes to elect another coordinator, so that one is asked
//! from its first moment on. Now and then it asks everybody in any case: that is how
//! the others know over which networks they hear it.
//!
//! It has real-time priority, takes no lock, asks for no memory, touches no disk
//! and writes no log: what there is to say goes to the main thread.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use holdfast_core::lease::{BootTime, Grant, Granted, NodeLease};
use holdfast_core::{Incarnation, NodeTerm};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use super::protocol::Configuration;
use super::table::Table;
use crate::heartbeat::{DATAGRAM_BYTES, Ends, Header, KeyError, Link, Message, PATHS, Side};
use crate::realtime::{Alarm, boot_time};

/// How many datagrams are looked at between two heartbeats; a flood beyond that
/// waits, so that it cannot occupy a real-time thread.
const DATAGRAMS_PER_PERIOD: u32 = 2_048;

/// Every so many heartbeats go to all nodes.
const TO_ALL_EVERY: u64 = 10;

/// Bounds for the time between heartbeats, whatever a grant says, in milliseconds.
const PERIOD_MS: (u64, u64) = (10, 10_000);

/// Why heartbeats cannot be sent as configured.
#[derive(Debug, thiserror::Error)]
pub enum HeartbeatingError {
    /// A key is no key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A peer has more addresses than a heartbeat can tell apart.
    #[error("node {node} has {count} addresses: at most {PATHS} networks can carry heartbeats")]
    TooManyAddresses {
        /// The node.
        node: holdfast_core::NodeId,
        /// How many it has.
        count: usize,
    },
    /// An address is not there or taken.
    #[error("cannot send heartbeats from {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// Where and how to ask: built by the main thread, used by the lease thread.
pub struct Heartbeating {
    sockets: Vec<UdpSocket>,
    peers: Vec<Peer>,
    period_ms: u64,
}

struct Peer {
    link: Link,
    /// Destination, and the socket to send it from.
    addresses: Vec<(SocketAddr, usize)>,
    echo: u64,
    challenged: (u64, u64),
    /// The newest heartbeat whose answer arrived.
    acknowledged: u64,
    /// When a grant of it last renewed the lease.
    granted: Option<BootTime>,
}

impl Peer {
    /// Whether it grants leases, as far as can be known: it did so less than two and
    /// a half periods ago.
    fn grants(&self, now: BootTime, period_ms: u64) -> bool {
        self.granted.is_some_and(|at| now.ms_since(at) <= period_ms * 5 / 2)
    }
}

impl Heartbeating {
    /// Opens the sockets and derives the keys.
    pub fn new(configuration: &Configuration, life: Incarnation) -> Result<Heartbeating, HeartbeatingError> {
        let wanted = || configuration.peers.iter().flat_map(|peer| &peer.addresses);
        let mut bind = configuration.bind.clone();
        if bind.is_empty() {
            let any = [SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))];
            let used = |any: &SocketAddr| wanted().any(|to| to.is_ipv4() == any.is_ipv4());
            bind.extend(any.into_iter().filter(used));
        }
        let mut sockets = Vec::new();
        for address in &bind {
            let open = || {
                let socket = UdpSocket::bind(address)?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            };
            sockets.push(open().map_err(|source| HeartbeatingError::Bind { address: *address, source })?);
        }
        let mut peers = Vec::new();
        for peer in &configuration.peers {
            if peer.addresses.len() > PATHS {
                return Err(HeartbeatingError::TooManyAddresses { node: peer.node, count: peer.addresses.len() });
            }
            let ends = Ends {
                cluster: configuration.generation.scope(configuration.cluster),
                me: configuration.node,
                secret: &configuration.secret,
                peer: peer.node,
                public: peer.public,
            };
            let nearest = |to: &SocketAddr| {
                let shared = |(_, from): &(usize, &SocketAddr)| shared_prefix(from, to);
                // `rev`: of equal ones the last is the maximum, and the first should be.
                let best = bind.iter().enumerate().rev().max_by_key(shared);
                best.map_or(0, |(index, _)| index)
            };
            peers.push(Peer {
                link: Link::new(&ends, Side::Keeper, life.0)?,
                addresses: peer.addresses.iter().map(|to| (*to, nearest(to))).collect(),
                echo: 0,
                challenged: (0, 0),
                acknowledged: 0,
                granted: None,
            });
        }
        Ok(Heartbeating { sockets, peers, period_ms: configuration.heartbeat_ms.clamp(PERIOD_MS.0, PERIOD_MS.1) })
    }
}

/// Leading bits that two addresses have in common, `None` for different families.
fn shared_prefix(one: &SocketAddr, other: &SocketAddr) -> Option<u32> {
    match (one, other) {
        (SocketAddr::V4(one), SocketAddr::V4(other)) => {
            Some((one.ip().to_bits() ^ other.ip().to_bits()).leading_zeros())
        }
        (SocketAddr::V6(one), SocketAddr::V6(other)) => {
            Some((one.ip().to_bits() ^ other.ip().to_bits()).leading_zeros())
        }
        _ => None,
    }
}

/// From the main thread to the lease thread.
pub enum ToLease {
    /// Ask like this from now on.
    Ask(Box<Heartbeating>),
    /// Give the lease up and end.
    Stop,
}

/// From the lease thread to the main thread.
pub enum FromLease {
    /// VMs may run.
    Gained {
        /// In which term.
        term: NodeTerm,
    },
    /// VMs may not run any more and were sent SIGKILL.
    Lost {
        /// In which term.
        term: NodeTerm,
        /// How many were alive.
        killed: u32,
        /// How long after the lease's end the last was sent its signal, in microseconds.
        late_us: u64,
    },
    /// Not needed any more: freeing it is not the lease thread's business.
    Retired(#[expect(dead_code, reason = "received only to be dropped")] Box<Heartbeating>),
}

/// The lease thread's state.
pub struct LeaseThread {
    table: Arc<Table>,
    lease: NodeLease,
    asking: Option<Box<Heartbeating>>,
    /// From the newest grant.
    period_ms: Option<u64>,
    sequence: u64,
    next_heartbeat: BootTime,
    budget: u32,
    stopping: bool,
    epoll: Epoll,
    alarm: Alarm,
    inbox: Receiver<ToLease>,
    wake: Arc<EventFd>,
    outbox: SyncSender<FromLease>,
    notify: Arc<EventFd>,
}

/// The ends of the queues and their bells that the lease thread gets.
pub struct Lines {
    /// What it is told.
    pub inbox: Receiver<ToLease>,
    /// Rung when there is something in `inbox`, or when the table became empty.
    pub wake: Arc<EventFd>,
    /// What it tells; when it is full, the oldest truth is in the table.
    pub outbox: SyncSender<FromLease>,
    /// Rung when there is something in `outbox`.
    pub notify: Arc<EventFd>,
}

impl LeaseThread {
    /// For a keeper's life that just began.
    pub fn new(life: Incarnation, table: Arc<Table>, lines: Lines) -> std::io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let alarm = Alarm::new()?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll.add(&alarm, readable)?;
        epoll.add(&*lines.wake, readable)?;
        Ok(LeaseThread {
            table,
            lease: NodeLease::new(life),
            asking: None,
            period_ms: None,
            sequence: 0,
            next_heartbeat: BootTime(0),
            budget: DATAGRAMS_PER_PERIOD,
            stopping: false,
            epoll,
            alarm,
            inbox: lines.inbox,
            wake: lines.wake,
            outbox: lines.outbox,
            notify: lines.notify,
        })
    }

    /// Runs until it is told to stop.
    pub fn run(mut self) {
        self.rehearse();
        while !self.stopping {
            self.wait();
            self.turn();
        }
        self.end_lease(boot_time());
    }

    /// Goes once through what must not wait for a page of the program to come
    /// from disk later: from here on they are locked in memory.
    fn rehearse(&mut self) {
        self.table.kill_all();
        let _ = crate::realtime::pidfd_kill(-1);
        self.notify_main();
    }

    pub(super) fn wait(&mut self) {
        let mut events = [EpollEvent::empty(); 8];
        // An error here can only be EINTR: the next turn waits again.
        let _ = match self.budget {
            0 => {
                let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
                let mut fds = [readable(self.alarm.as_fd()), readable(self.wake.as_fd())];
                poll(&mut fds, PollTimeout::NONE).map(drop)
            }
            _ => self.epoll.wait(&mut events, EpollTimeout::NONE).map(drop),
        };
    }

    /// Everything that is due, and the alarm for what is due next.
    pub(super) fn turn(&mut self) {
        let _ = self.wake.read();
        self.read_inbox();
        self.receive();
        let now = boot_time();
        if self.table.open() && !self.lease.held(now) {
            self.end_lease(now);
        }
        if !self.table.open() && self.lease.held(now) && self.table.all_dead() {
            self.begin_lease();
        }
        if now >= self.next_heartbeat {
            self.beat(now);
        }
        let ends = self.lease.ends().filter(|_| self.table.open());
        let beat = self.asking.is_some().then_some(self.next_heartbeat);
        // It fails only for times that are no times.
        let _ = self.alarm.set(ends.into_iter().chain(beat).min());
    }

    fn read_inbox(&mut self) {
        while let Ok(message) = self.inbox.try_recv() {
            match message {
                ToLease::Ask(asking) => {
                    for socket in &asking.sockets {
                        let _ = self.epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, 0));
                    }
                    let before = self.asking.replace(asking);
                    if let Some(before) = before {
                        for socket in &before.sockets {
                            let _ = self.epoll.delete(socket);
                        }
                        self.tell(FromLease::Retired(before));
                    }
                    self.next_heartbeat = BootTime(0);
                }
                ToLease::Stop => self.stopping = true,
            }
        }
    }

    fn receive(&mut self) {
        let Some(mut asking) = self.asking.take() else {
            return;
        };
        let mut bytes = [0; DATAGRAM_BYTES + 1];
        for index in 0..asking.sockets.len() {
            while self.budget > 0 {
                let Ok((length, _)) = asking.sockets[index].recv_from(&mut bytes) else {
                    break;
                };
                self.budget -= 1;
                self.take_in(&mut asking, &mut bytes[..length]);
            }
        }
        self.asking = Some(asking);
    }

    fn take_in(&mut self, asking: &mut Heartbeating, datagram: &mut [u8]) {
        let Some(header) = Header::parse(datagram) else {
            return;
        };
        let Heartbeating { sockets, peers, .. } = asking;
        let Some(peer) = peers.iter_mut().find(|peer| peer.link.peer() == header.from) else {
            return;
        };
        match peer.link.open(&header, datagram) {
            Some(Message::Grant(grant)) => {
                if grant.incarnation == self.lease.incarnation() {
                    peer.acknowledged = peer.acknowledged.max(grant.sequence);
                }
                let now = boot_time();
                // One that is played back a second time renews nothing.
                if self.granted(&grant, now) != Granted::Ignored {
                    peer.granted = Some(now);
                }
            }
            Some(Message::Probe { incarnation, sequence }) => {
                if incarnation == self.lease.incarnation() {
                    peer.acknowledged = peer.acknowledged.max(sequence);
                }
            }
            Some(Message::Challenge { incarnation, challenge }) => {
                let (life, counter) = peer.challenged;
                let replayed = life == header.life && header.counter <= counter;
                if incarnation != self.lease.incarnation() || replayed {
                    return;
                }
                peer.challenged = (header.life, header.counter);
                if peer.echo != challenge {
                    peer.echo = challenge;
                    // At once: a keeper or an agent just started, and somebody waits.
                    self.sequence += 1;
                    send(sockets, peer, self.sequence, boot_time());
                }
            }
            Some(Message::Heartbeat { .. }) | None => {}
        }
    }

    fn granted(&mut self, grant: &Grant, now: BootTime) -> Granted {
        // A lease that ran out has ended, even if this thread comes late to it.
        if self.table.open() && !self.lease.held(now) {
            self.end_lease(now);
        }
        let granted = self.lease.grant(grant, now);
        if granted != Granted::Ignored {
            self.table.lasting(grant.timing.length_ms);
        }
        match granted {
            Granted::Ignored => return granted,
            // VMs of an earlier term have to be dead before the new one counts.
            Granted::NewTerm if self.table.open() => self.end_lease(now),
            Granted::NewTerm => {}
            Granted::Renewed if self.table.open() => {
                if let Some(ends) = self.lease.ends() {
                    self.table.renew(ends);
                }
            }
            Granted::Renewed => {}
        }
        self.period_ms = Some(grant.timing.heartbeat_ms.clamp(PERIOD_MS.0, PERIOD_MS.1));
        granted
    }

    fn begin_lease(&mut self) {
        let Some(ends) = self.lease.ends() else {
            return;
        };
        self.table.gain(self.lease.term(), ends);
        let term = self.lease.term();
        self.tell(FromLease::Gained { term });
    }

    /// The order is safety rule 2.
    fn end_lease(&mut self, now: BootTime) {
        if !self.table.open() {
            return;
        }
        let term = self.table.view().term;
        let ended = self.lease.ends().unwrap_or(now).min(now);
        self.table.close();
        // The volume server submits no write from here on, before any VM is killed: the
        // table's lease is in memory that it reads before each. Then it is killed, too.
        let killed = self.table.kill_all();
        let late_us = boot_time().0.saturating_sub(ended.0) / 1_000;
        self.table.ended(late_us);
        self.tell(FromLease::Lost { term, killed, late_us });
    }

    fn beat(&mut self, now: BootTime) {
        self.budget = DATAGRAMS_PER_PERIOD;
        if !self.table.open() && !self.table.all_dead() {
            self.table.kill_all();
        }
        let Some(asking) = &self.asking else {
            return;
        };
        self.sequence += 1;
        let period_ms = self.period_ms.unwrap_or(asking.period_ms);
        let to_all =
            self.sequence.is_multiple_of(TO_ALL_EVERY) || !asking.peers.iter().any(|peer| peer.grants(now, period_ms));
        for peer in asking.peers.iter().filter(|peer| to_all || peer.grants(now, period_ms)) {
            send(&asking.sockets, peer, self.sequence, now);
        }
        // Heartbeats that were missed are not made up for.
        self.next_heartbeat = self.next_heartbeat.plus_ms(period_ms);
        if self.next_heartbeat <= now {
            self.next_heartbeat = now.plus_ms(period_ms);
        }
    }

    fn tell(&self, message: FromLease) {
        // Full only when the main thread has not run for very long; the table
        // tells it the truth when it does.
        let _ = self.outbox.try_send(message);
        self.notify_main();
    }

    fn notify_main(&self) {
        let _ = self.notify.write(1);
    }
}

/// An address that cannot be reached right now is tried again at the next beat.
fn send(sockets: &[UdpSocket], peer: &Peer, sequence: u64, now: BootTime) {
    for (path, (address, socket)) in (0..).zip(&peer.addresses) {
        let message = Message::Heartbeat { sent: now, echo: peer.echo, acknowledged: peer.acknowledged };
        let sealed = peer.link.seal(path, sequence, &message);
        if let Some(socket) = sockets.get(*socket) {
            while socket
                .send_to(sealed.as_bytes(), address)
                .err()
                .is_some_and(|error| error.raw_os_error() == Some(Errno::EINTR as i32))
            {}
        }
    }
}
