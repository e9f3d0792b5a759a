//! One thread that serves disks: sockets and storage through one queue.
//!
//! ```text
//!  readable ─▶ requests ─▶ [fence] ─▶ [slab] ─▶ storage ─▶ answers ─▶ socket
//!                            └──────────┴ parked until the node may write, or has one
//! ```
//! It never waits for one thing alone, allocates only for data on its way, and
//! bounds what each client can have under way.

mod work;

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use slab::Slab;

use self::work::Active;
use crate::buffer::{Buffer, Pool};
use crate::connection::{Connection, Input};
use crate::export::Export;
use crate::nbd::Request;
use crate::order::{Line, Order, Waker};
use crate::piece::Ended;
use crate::ring::{Done, Io, Ring};

/// What one read of a socket takes at most.
const SCRATCH_BYTES: usize = 256 << 10;
/// How often requests that wait are looked at again, if nobody says so before.
const PARKED_AGAIN: Duration = Duration::from_millis(5);
/// After so long without anything to do, memory is for others.
const AT_REST: Duration = Duration::from_secs(1);
/// How often another node hears of this one, if of nothing else.
const PING: Duration = Duration::from_millis(100);
/// What a socket holds of answers, so that one with data goes at once.
const SEND_BYTES: usize = 2 << 20;

/// What an operation is for. Places are used again, so those that may be told of
/// late carry a number that is not.
#[derive(Clone, Copy, Debug)]
enum Token {
    Bell,
    Listener(usize, u64),
    Readable(usize, u64),
    Room(usize, u64),
    Request(usize),
}

struct Listening {
    id: u64,
    listener: UnixListener,
    export: Arc<Export>,
    /// The thread that gets the next connection.
    next: usize,
    serial: u64,
    watch: u64,
}

pub(crate) struct Engine {
    ring: Ring<Token>,
    orders: Receiver<Order>,
    me: usize,
    lines: Arc<[Line]>,
    listeners: Slab<Listening>,
    connections: Slab<Connection>,
    serial: u64,
    active: Slab<Active>,
    /// Requests that wait for something, oldest first, and when they are looked at again.
    parked: Vec<usize>,
    again: Instant,
    /// Something is new for who waits.
    rung: bool,
    waker: Waker,
    withdrawing: Vec<(Arc<Export>, SyncSender<()>)>,
    /// Connections that have something to send or to end.
    touched: Vec<usize>,
    begun: Vec<(Request, Option<Buffer>)>,
    pool: Pool,
    scratch: Vec<u8>,
    stopping: bool,
    /// Links of other nodes, and when they are to hear something again.
    links: usize,
    ping_at: Instant,
}

impl Engine {
    pub(crate) fn new(me: usize, orders: Receiver<Order>, lines: Arc<[Line]>) -> io::Result<Engine> {
        let mut ring = Ring::new()?;
        ring.push(Token::Bell, Io::Readable(lines[me].bell.as_raw_fd()))?;
        let waker = Waker::new(lines.clone(), me);
        Ok(Engine {
            ring,
            orders,
            me,
            lines,
            listeners: Slab::new(),
            connections: Slab::new(),
            serial: 0,
            active: Slab::new(),
            parked: Vec::new(),
            again: Instant::now(),
            rung: false,
            waker,
            withdrawing: Vec::new(),
            touched: Vec::new(),
            begun: Vec::new(),
            pool: Pool::default(),
            scratch: vec![0; SCRATCH_BYTES],
            stopping: false,
            links: 0,
            ping_at: Instant::now(),
        })
    }

    /// Serves until it is told to stop and nothing is under way.
    pub(crate) fn run(mut self) -> io::Result<()> {
        while !(self.stopping && self.active.is_empty() && self.withdrawing.is_empty()) {
            let patience = match (self.parked.is_empty(), self.links, self.pool.is_empty()) {
                (false, ..) => Some(PARKED_AGAIN),
                (true, 1.., _) => Some(PING),
                (true, 0, false) => Some(AT_REST),
                (true, 0, true) => None,
            };
            self.ring.enter(patience)?;
            let mut slept = true;
            while let Some(done) = self.ring.next() {
                self.done(done)?;
                slept = false;
            }
            if slept && self.active.is_empty() {
                self.pool.clear();
            }
            if !self.parked.is_empty() && (self.rung || Instant::now() >= self.again) {
                self.try_parked()?;
            }
            self.rung = false;
            self.ping();
            while let Some(at) = self.touched.pop() {
                self.settle(at)?;
            }
            self.tell_withdrawn();
        }
        Ok(())
    }

    fn done(&mut self, done: Done<Token>) -> io::Result<()> {
        match done.token {
            Token::Bell => {
                let _ = self.lines[self.me].bell.read();
                self.rung = true;
                while let Ok(order) = self.orders.try_recv() {
                    self.obey(order)?;
                }
                let ended =
                    std::mem::take(&mut *self.lines[self.me].ended.lock().unwrap_or_else(PoisonError::into_inner));
                for (at, Ended { piece, outcome }) in ended {
                    self.stored(at, piece, outcome)?;
                }
                if let Some(io) = done.io {
                    self.ring.push(Token::Bell, io)?;
                }
            }
            Token::Listener(at, serial) => {
                if self.listeners.get(at).is_some_and(|listening| listening.serial == serial) {
                    if let Some(io) = done.io {
                        self.listeners[at].watch = self.ring.push(done.token, io)?;
                    }
                    self.accept(at)?;
                }
            }
            Token::Readable(at, serial) => {
                if let Some(connection) = self.connections.get_mut(at).filter(|found| found.serial == serial) {
                    if let Some(io) = done.io {
                        connection.watch = self.ring.push(done.token, io)?;
                    }
                    self.read(at)?;
                }
            }
            Token::Room(at, serial) => {
                if let Some(connection) = self.connections.get_mut(at).filter(|found| found.serial == serial) {
                    connection.waits_for_room = false;
                    self.touched.push(at);
                }
            }
            Token::Request(at) => {
                if let Some(Io::Storage { piece, .. }) = done.io {
                    self.stored(at, piece, done.outcome)?;
                }
            }
        }
        Ok(())
    }

    fn obey(&mut self, order: Order) -> io::Result<()> {
        match order {
            Order::Serve(id, listener, export) => {
                listener.set_nonblocking(true)?;
                let watched = Io::Readable(listener.as_raw_fd());
                self.serial += 1;
                let serial = self.serial;
                let at = self.listeners.insert(Listening { id, listener, export, next: self.me, serial, watch: 0 });
                self.listeners[at].watch = self.ring.push(Token::Listener(at, serial), watched)?;
            }
            Order::Adopt(stream, export) => self.adopt(stream, export)?,
            Order::Visit(pipe, export, visit) => {
                self.serial += 1;
                let connection = Connection::of_link(pipe, export, self.serial, visit);
                self.links += 1;
                self.watch(connection)?;
            }
            Order::Withdraw(id, export, tell) => {
                self.stop_listening(|listening| listening.id == id)?;
                self.close_where(|connection| Arc::ptr_eq(&connection.export, &export));
                self.withdrawing.push((export, tell));
            }
            Order::Stop => {
                self.stopping = true;
                self.stop_listening(|_| true)?;
                self.close_where(|_| true);
            }
        }
        Ok(())
    }

    fn stop_listening(&mut self, which: impl Fn(&Listening) -> bool) -> io::Result<()> {
        let ended: Vec<_> = self.listeners.iter().filter(|(_, one)| which(one)).map(|(at, _)| at).collect();
        for at in ended {
            let listening = self.listeners.remove(at);
            self.ring.cancel(listening.watch)?;
        }
        Ok(())
    }

    fn close_where(&mut self, which: impl Fn(&Connection) -> bool) {
        for (at, connection) in &mut self.connections {
            if which(connection) {
                connection.broken = true;
                connection.stream.close();
                self.touched.push(at);
            }
        }
        self.abandon_parked();
    }

    fn tell_withdrawn(&mut self) {
        let connections = &self.connections;
        self.withdrawing.retain(|(export, tell)| {
            let left = connections.iter().any(|(_, connection)| Arc::ptr_eq(&connection.export, export));
            if !left {
                let _ = tell.try_send(());
            }
            left
        });
    }

    fn accept(&mut self, at: usize) -> io::Result<()> {
        loop {
            let Some(listening) = self.listeners.get_mut(at) else { return Ok(()) };
            match listening.listener.accept() {
                Ok((stream, _)) => {
                    // Several connections of one disk are spread over the threads.
                    let (export, to) = (listening.export.clone(), listening.next % self.lines.len());
                    listening.next += 1;
                    let refused = match to == self.me {
                        true => Some(Order::Adopt(stream, export)),
                        false => self.lines[to].offer(Order::Adopt(stream, export)),
                    };
                    if let Some(Order::Adopt(stream, export)) = refused {
                        self.adopt(stream, export)?;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, "a client could not be let in");
                    return Ok(());
                }
            }
        }
    }

    fn adopt(&mut self, stream: UnixStream, export: Arc<Export>) -> io::Result<()> {
        if self.stopping || export.withdrawn.load(Ordering::Acquire) {
            return Ok(());
        }
        stream.set_nonblocking(true)?;
        // Whoever may not have more gets what the system gives.
        let _ = nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::SndBufForce, &SEND_BYTES);
        self.serial += 1;
        self.watch(Connection::new(stream, export, self.serial))
    }

    fn watch(&mut self, connection: Connection) -> io::Result<()> {
        let (watched, serial) = (Io::Readable(connection.stream.fd()), connection.serial);
        let at = self.connections.insert(connection);
        self.connections[at].watch = self.ring.push(Token::Readable(at, serial), watched)?;
        self.touched.push(at);
        Ok(())
    }

    /// Lets nodes know that this one is there.
    fn ping(&mut self) {
        let now = Instant::now();
        if self.links > 0 && now >= self.ping_at {
            self.ping_at = now + PING;
            for (at, connection) in &mut self.connections {
                if connection.ping() {
                    self.touched.push(at);
                }
            }
        }
    }

    fn read(&mut self, at: usize) -> io::Result<()> {
        let mut begun = std::mem::take(&mut self.begun);
        let connection = &mut self.connections[at];
        let input = connection.read(&mut self.scratch, &mut self.pool, &mut begun);
        connection.full = input == Input::Full;
        self.touched.push(at);
        for (request, data) in begun.drain(..) {
            self.begin(at, request, data)?;
        }
        self.begun = begun;
        Ok(())
    }

    /// Sends what is to be sent, reads on where that was put off, ends what is over.
    fn settle(&mut self, at: usize) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(at) else { return Ok(()) };
        connection.send(&mut self.pool);
        if connection.is_done() {
            let watch = connection.watch;
            self.links -= usize::from(self.connections.remove(at).visit.is_some());
            return self.ring.cancel(watch);
        }
        if connection.has_answers() && !connection.waits_for_room && !connection.broken {
            connection.waits_for_room = true;
            let watched = Io::Writable(connection.stream.fd());
            let token = Token::Room(at, connection.serial);
            self.ring.push(token, watched)?;
        }
        if self.connections[at].full && self.connections[at].has_room() {
            self.read(at)?;
        }
        Ok(())
    }
}
