//! The real-time thread behind [`super::Leases`].

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, TryLockError};

use holdfast_core::lease::{Answer, Authority, BootTime, LeaseSlot, LeaseTiming};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use super::{ADDRESSES, Admission, LeaseSlotView, LinkView, NODES, SlotView};
use crate::heartbeat::{DATAGRAM_BYTES, Freshness, Header, Link, Message, Verdict};
use crate::realtime::{Alarm, boot_time};

/// How many datagrams are looked at in one window; a flood beyond that waits, so
/// that it cannot occupy a real-time thread.
const DATAGRAMS_PER_WINDOW: u32 = 8_192;
const WINDOW_MS: u64 = 100;

/// Times on the board are this old at most, while heartbeats come in.
const BOARD_MS: u64 = 50;

/// When the board could not be written because somebody read it.
const BOARD_RETRY_MS: u64 = 1;

/// A node's keeper.
pub struct Peer {
    link: Link,
    seen: Freshness,
    heard: Option<BootTime>,
    networks: [Option<(SocketAddr, BootTime)>; ADDRESSES],
}

impl Peer {
    /// Never heard yet.
    pub fn new(link: Link, seen: Freshness) -> Self {
        Peer { link, seen, heard: None, networks: [None; ADDRESSES] }
    }
}

/// What the lease thread is told. It sends each of them back to be freed.
pub enum Told {
    /// Listen to these.
    Peers(Vec<Peer>),
    /// Be the coordinator.
    Coordinate(Box<Coordination>),
    /// The cluster has agreed on this.
    Update(Box<(Vec<Admission>, LeaseTiming)>),
    /// Be an ordinary node.
    StepDown,
}

/// A life that is not the admitted one has to prove anew that it is alive: it may be
/// one that this node heard last before its successor was admitted elsewhere, and a
/// late heartbeat of it must not look like a restart.
fn doubt_other_lives(peers: &mut [Peer], nodes: &[Admission]) {
    for peer in peers {
        let admitted = nodes.iter().find(|node| node.node == peer.link.peer()).map(|node| node.admitted);
        if peer.seen.life() != admitted {
            peer.heard = None;
            if let Ok(doubting) = Freshness::new() {
                peer.seen = doubting;
            }
        }
    }
}

/// One coordinatorship.
pub struct Coordination {
    /// When it began.
    pub since: BootTime,
    /// Who has a right to a lease.
    pub nodes: Vec<Admission>,
    /// How long leases are.
    pub timing: LeaseTiming,
    /// The longest that a predecessor may have granted.
    pub longest: LeaseTiming,
    /// With room for [`NODES`].
    pub slots: Vec<Slot>,
    /// [`Authority::until`] of this coordinatorship alone, in nanoseconds: a later
    /// one's can never make an earlier one's slots grant anything.
    pub authority: Arc<AtomicU64>,
}

/// A node's lease within one coordinatorship.
pub struct Slot {
    lease: LeaseSlot,
    /// It was condemned, and this was made known.
    condemned: bool,
}

/// What the tokio side can read.
pub struct Board {
    /// Leases and keepers.
    pub slots: Vec<SlotView>,
    /// Networks.
    pub links: Vec<LinkView>,
    /// Where heartbeats are answered.
    pub local: Vec<SocketAddr>,
}

impl Board {
    /// Empty, with all the memory that it will ever need.
    pub fn with_room() -> Self {
        Board {
            slots: Vec::with_capacity(2 * NODES),
            links: Vec::with_capacity(NODES * ADDRESSES),
            local: Vec::with_capacity(ADDRESSES),
        }
    }
}

/// What the thread shares with the others.
pub struct Lines {
    /// What it is told; the thread ends when nobody can tell it anything.
    pub inbox: Receiver<Told>,
    /// Rung when there is something in `inbox`.
    pub wake: Arc<EventFd>,
    /// What is to be freed.
    pub retire: SyncSender<Told>,
    /// Rung when there is something to look at.
    pub bell: Arc<EventFd>,
    /// What there is to look at.
    pub board: Arc<Mutex<Board>>,
}

/// The thread's state.
pub struct AnsweringThread {
    sockets: Vec<(UdpSocket, SocketAddr)>,
    peers: Vec<Peer>,
    coordination: Option<Box<Coordination>>,
    counter: u64,
    budget: u32,
    window_ends: BootTime,
    /// Something that others wait for changed since the board was written.
    changed: bool,
    /// Times changed since the board was written.
    stale: bool,
    written: BootTime,
    over: bool,
    epoll: Epoll,
    alarm: Alarm,
    lines: Lines,
}

impl AnsweringThread {
    /// Hears `peers` on `sockets`.
    pub fn new(sockets: Vec<(UdpSocket, SocketAddr)>, peers: Vec<Peer>, lines: Lines) -> std::io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let alarm = Alarm::new()?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll.add(&alarm, readable)?;
        epoll.add(&*lines.wake, readable)?;
        for (socket, _) in &sockets {
            epoll.add(socket, readable)?;
        }
        if let Ok(mut board) = lines.board.lock() {
            board.local.extend(sockets.iter().map(|(_, local)| *local));
        }
        Ok(AnsweringThread {
            sockets,
            peers,
            coordination: None,
            counter: 0,
            budget: DATAGRAMS_PER_WINDOW,
            window_ends: BootTime(0),
            changed: false,
            stale: true,
            written: BootTime(0),
            over: false,
            epoll,
            alarm,
            lines,
        })
    }

    /// Runs until nobody can tell it anything any more.
    pub fn run(mut self) {
        while !self.over {
            self.wait();
            self.turn();
        }
    }

    pub(super) fn wait(&mut self) {
        let mut events = [EpollEvent::empty(); ADDRESSES + 2];
        // An error here can only be EINTR: the next turn waits again.
        let _ = match self.budget {
            0 => {
                let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
                let mut fds = [readable(self.alarm.as_fd()), readable(self.lines.wake.as_fd())];
                poll(&mut fds, PollTimeout::NONE).map(drop)
            }
            _ => self.epoll.wait(&mut events, EpollTimeout::NONE).map(drop),
        };
    }

    /// Everything that is due, and the alarm for what is due next.
    pub(super) fn turn(&mut self) {
        let _ = self.lines.wake.read();
        self.read_inbox();
        // What came in before a bound was passed counts, however late this thread is.
        self.receive();
        let now = boot_time();
        let next_bound = self.condemn(now);
        let write = self.changed || (self.stale && now.ms_since(self.written) >= BOARD_MS);
        let blocked = write && !self.write_board(now);
        let alarm =
            [next_bound, blocked.then(|| now.plus_ms(BOARD_RETRY_MS)), (self.budget == 0).then_some(self.window_ends)];
        // It fails only for times that are no times.
        let _ = self.alarm.set(alarm.into_iter().flatten().min());
    }

    fn read_inbox(&mut self) {
        loop {
            let told = match self.lines.inbox.try_recv() {
                Ok(told) => told,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.over = true;
                    return;
                }
            };
            self.changed = true;
            let retired = match told {
                Told::Peers(peers) => Some(self.replace_peers(peers)),
                Told::Coordinate(mut new) => {
                    let (since, longest) = (new.since, new.longest);
                    let Coordination { nodes, slots, .. } = &mut *new;
                    slots.extend(nodes.iter().map(|node| assumed(node, since, longest)));
                    doubt_other_lives(&mut self.peers, nodes);
                    self.coordination.replace(new).map(Told::Coordinate)
                }
                Told::Update(update) => {
                    self.update(&update.0, update.1);
                    Some(Told::Update(update))
                }
                Told::StepDown => self.coordination.take().map(Told::Coordinate),
            };
            if let Some(retired) = retired {
                // When nobody takes it, freeing it here is the lesser evil.
                let _ = self.lines.retire.try_send(retired);
                let _ = self.lines.bell.write(1);
            }
        }
    }

    fn replace_peers(&mut self, mut peers: Vec<Peer>) -> Told {
        for peer in peers.iter_mut() {
            let same =
                |other: &&Peer| other.link.peer() == peer.link.peer() && other.link.public() == peer.link.public();
            if let Some(before) = self.peers.iter().find(same) {
                (peer.seen, peer.heard) = (before.seen, before.heard);
                peer.networks = before.networks;
            }
        }
        Told::Peers(std::mem::replace(&mut self.peers, peers))
    }

    fn update(&mut self, nodes: &[Admission], timing: LeaseTiming) {
        let Some(coordination) = &mut self.coordination else {
            return;
        };
        let now = boot_time();
        // A node whose leases were longer before must be waited for that long.
        if timing.length_ms > coordination.longest.length_ms {
            coordination.longest = timing;
        }
        coordination.timing = timing;
        let (slots, longest) = (&mut coordination.slots, coordination.longest);
        slots.retain(|slot| nodes.iter().any(|node| node.node == slot.lease.node));
        for node in nodes {
            let known = slots.iter().position(|slot| slot.lease.node == node.node);
            match known {
                Some(at) if slots[at].lease.term == node.term => {
                    slots[at].lease.admit(node.admitted, node.term, node.up);
                    slots[at].lease.retire(node.leaves);
                }
                // A new term starts with the time that a keeper needs to be heard:
                // the bound of the last one has passed, and would condemn it at once.
                Some(at) => slots[at] = assumed(node, now, longest),
                None if slots.len() < NODES => slots.push(assumed(node, now, longest)),
                None => {}
            }
        }
    }

    fn receive(&mut self) {
        let mut now = boot_time();
        if now >= self.window_ends {
            self.window_ends = now.plus_ms(WINDOW_MS);
            self.budget = DATAGRAMS_PER_WINDOW;
        }
        let mut bytes = [0; DATAGRAM_BYTES + 1];
        for index in 0..self.sockets.len() {
            while self.budget > 0 {
                let Ok((length, from)) = self.sockets[index].0.recv_from(&mut bytes) else {
                    break;
                };
                self.budget -= 1;
                now = now.max(boot_time());
                self.take_in(&mut bytes[..length], index, from, now);
            }
        }
    }

    fn take_in(&mut self, datagram: &mut [u8], socket: usize, from: SocketAddr, now: BootTime) {
        let Some(header) = Header::parse(datagram) else {
            return;
        };
        let Some(peer) = self.peers.iter_mut().find(|peer| peer.link.peer() == header.from) else {
            return;
        };
        let Some(Message::Heartbeat { sent, echo, acknowledged }) = peer.link.open(&header, datagram) else {
            return;
        };
        let heartbeat = header.heartbeat(sent, acknowledged);
        let answer = match peer.seen.judge(&header, echo) {
            Ok(Verdict::Fresh(new_life)) => {
                self.changed |= new_life;
                self.stale = true;
                peer.networks[socket] = Some((from, now));
                let Some(coordination) = &mut self.coordination else {
                    peer.heard = Some(now);
                    return;
                };
                let mut slots = coordination.slots.iter_mut();
                let Some(slot) = slots.find(|slot| slot.lease.node == header.from) else {
                    peer.heard = Some(now);
                    return;
                };
                // The last moment: what follows takes microseconds, the margin pays for them.
                let until = BootTime(coordination.authority.load(SeqCst));
                let (timing, authority) = (coordination.timing, Authority { until });
                let answer = slot.lease.answer(&heartbeat, timing, authority, boot_time());
                // Who hears nothing is not admitted for being heard.
                if slot.lease.heard_within(0, now).is_some() {
                    peer.heard = Some(now);
                }
                match answer {
                    Answer::Grant(grant) => Message::Grant(grant),
                    Answer::Probe => {
                        Message::Probe { incarnation: heartbeat.incarnation, sequence: heartbeat.sequence }
                    }
                    Answer::Silence => return,
                }
            }
            Ok(Verdict::Challenge(challenge)) => Message::Challenge { incarnation: heartbeat.incarnation, challenge },
            Ok(Verdict::Stale) | Err(_) => return,
        };
        self.counter += 1;
        let sealed = peer.link.seal(0, self.counter, &answer);
        // Not sent is like lost: the keeper asks again.
        let _ = self.sockets[socket].0.send_to(sealed.as_bytes(), from);
    }

    /// Condemns the leases that have ended; says when the next one will.
    fn condemn(&mut self, now: BootTime) -> Option<BootTime> {
        let coordination = self.coordination.as_mut()?;
        let mut next: Option<BootTime> = None;
        for slot in &mut coordination.slots {
            let bound = slot.lease.bound();
            if !slot.lease.up {
                continue;
            }
            if !slot.lease.condemn_if_ended(now) {
                next = Some(next.map_or(bound, |next| next.min(bound)));
            } else if !std::mem::replace(&mut slot.condemned, true) {
                self.changed = true;
            }
        }
        next
    }

    /// `false` when somebody is reading it right now.
    fn write_board(&mut self, now: BootTime) -> bool {
        let mut board = match self.lines.board.try_lock() {
            Ok(board) => board,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        board.slots.clear();
        board.links.clear();
        for peer in self.peers.iter() {
            let heard = peer.heard.and_then(|at| Some((peer.seen.life()?, at)));
            board.slots.push(SlotView { node: peer.link.peer(), lease: None, heard });
            for ((_, local), network) in self.sockets.iter().zip(peer.networks) {
                if let Some((remote, heard)) = network {
                    board.links.push(LinkView { node: peer.link.peer(), local: *local, remote, heard });
                }
            }
        }
        for slot in self.coordination.iter().flat_map(|all| &all.slots) {
            let Slot { lease, condemned } = slot;
            let view = LeaseSlotView {
                admitted: lease.admitted,
                term: lease.term,
                up: lease.up,
                condemned: *condemned,
                bound: lease.bound(),
                answered: BootTime(now.0.saturating_sub(lease.silent_ms(now) * 1_000_000)),
            };
            match board.slots.iter_mut().find(|view| view.node == lease.node) {
                Some(known) => known.lease = Some(view),
                None => board.slots.push(SlotView { node: lease.node, lease: Some(view), heard: None }),
            }
        }
        drop(board);
        self.written = now;
        self.stale = false;
        if std::mem::take(&mut self.changed) {
            let _ = self.lines.bell.write(1);
        }
        true
    }
}

fn assumed(node: &Admission, since: BootTime, longest: LeaseTiming) -> Slot {
    let Admission { node, admitted, term, up, leaves } = *node;
    let mut lease = LeaseSlot::assumed(node, admitted, term, up, since, longest);
    lease.retire(leaves);
    Slot { lease, condemned: false }
}
