//! One thread that serves disks: sockets and storage through one queue.
//!
//! ```text
//!  readable ─▶ requests ─▶ [fence] ─▶ storage ─▶ answers ─▶ socket
//!                            └ parked until the node may write again
//! ```
//! It never waits for one thing alone, allocates only for data on its way, and
//! bounds what each client can have under way.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use nix::fcntl::FallocateFlags;
use slab::Slab;

use crate::buffer::{Buffer, Pool};
use crate::connection::{Connection, Input};
use crate::export::Export;
use crate::nbd::{Command, Errno, Extent, Head, MAX_REQUEST_BYTES, Request};
use crate::order::{Line, Order};
use crate::ring::{Done, Io, Ring};

/// What one read of a socket takes at most.
const SCRATCH_BYTES: usize = 256 << 10;
/// How often a closed fence is looked at while writes wait for it.
const PARKED_AGAIN: Duration = Duration::from_millis(5);
/// After so long without anything to do, memory is for others.
const AT_REST: Duration = Duration::from_secs(1);
/// Extents in one answer.
const MOST_EXTENTS: usize = 512;
/// Zeroes that are written at once where the storage has no better way.
const ZEROES_BYTES: u64 = 1 << 20;

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

/// A request that is being served.
struct Active {
    connection: usize,
    request: Request,
    doing: Doing,
}

/// What the storage does for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// Moves its data, or flushes.
    Itself,
    /// Zeroes by giving the space back.
    Punch,
    /// Zeroes by marking the space.
    Mark,
    /// Zeroes by writing; so much is done.
    Zeroes(u64),
    /// Brings to stable storage what was changed.
    Sync,
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
    /// Writes that wait for the fence, oldest first.
    parked: VecDeque<(usize, Option<Buffer>)>,
    withdrawing: Vec<(Arc<Export>, SyncSender<()>)>,
    /// Connections that have something to send or to end.
    touched: Vec<usize>,
    begun: Vec<(Request, Option<Buffer>)>,
    pool: Pool,
    scratch: Vec<u8>,
    stopping: bool,
}

impl Engine {
    pub(crate) fn new(me: usize, orders: Receiver<Order>, lines: Arc<[Line]>) -> io::Result<Engine> {
        let mut ring = Ring::new()?;
        ring.push(Token::Bell, Io::Readable(lines[me].bell.as_raw_fd()))?;
        Ok(Engine {
            ring,
            orders,
            me,
            lines,
            listeners: Slab::new(),
            connections: Slab::new(),
            serial: 0,
            active: Slab::new(),
            parked: VecDeque::new(),
            withdrawing: Vec::new(),
            touched: Vec::new(),
            begun: Vec::new(),
            pool: Pool::default(),
            scratch: vec![0; SCRATCH_BYTES],
            stopping: false,
        })
    }

    /// Serves until it is told to stop and nothing is under way.
    pub(crate) fn run(mut self) -> io::Result<()> {
        while !(self.stopping && self.active.is_empty() && self.withdrawing.is_empty()) {
            let patience = match (self.parked.is_empty(), self.pool.is_empty()) {
                (false, _) => Some(PARKED_AGAIN),
                (true, false) => Some(AT_REST),
                (true, true) => None,
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
            self.try_parked()?;
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
                while let Ok(order) = self.orders.try_recv() {
                    self.obey(order)?;
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
                if let Some(io) = done.io {
                    self.stored(at, io, done.outcome)?;
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
                let _ = connection.stream.shutdown(std::net::Shutdown::Both);
                self.touched.push(at);
            }
        }
        // What waits for the fence is not written any more.
        let Engine { parked, active, connections, pool, .. } = self;
        parked.retain_mut(|(at, buffer)| {
            let connection = &mut connections[active[*at].connection];
            if !connection.broken {
                return true;
            }
            let gone = active.remove(*at);
            connection.answer(&gone.request, Head::error(gone.request.cookie, false, Errno::Shutdown), None);
            pool.put(buffer.take().unwrap_or_default());
            false
        });
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
        let watched = Io::Readable(stream.as_raw_fd());
        self.serial += 1;
        let serial = self.serial;
        let at = self.connections.insert(Connection::new(stream, export, serial));
        self.connections[at].watch = self.ring.push(Token::Readable(at, serial), watched)?;
        self.touched.push(at);
        Ok(())
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

    fn begin(&mut self, at: usize, request: Request, data: Option<Buffer>) -> io::Result<()> {
        let connection = &mut self.connections[at];
        if let Err(errno) = fits(&request, data.is_some(), &connection.export) {
            self.pool.put(data.unwrap_or_default());
            self.fail(at, &request, errno);
            return Ok(());
        }
        let export = connection.export.clone();
        let file = export.file.clone();
        let mut start = |doing| self.active.insert(Active { connection: at, request, doing });
        match request.command {
            Command::Read => {
                let token = start(Doing::Itself);
                let buffer = self.pool.get(request.length as usize);
                self.storage(token, Io::Read { file, buffer, skip: 0, at: request.offset })
            }
            Command::Flush => {
                let token = start(Doing::Itself);
                self.storage(token, Io::Sync { file })
            }
            Command::Write { .. } | Command::Trim { .. } | Command::Zero { .. } => {
                let active = start(match request.command {
                    Command::Write { .. } => Doing::Itself,
                    Command::Zero { may_free: false, .. } => Doing::Mark,
                    _ => Doing::Punch,
                });
                self.write(active, data)
            }
            Command::Status { one } => {
                let most = if one { 1 } else { MOST_EXTENTS };
                let connection = &mut self.connections[at];
                match (export.extents(request.offset, request.length, most), connection.agreed().allocation) {
                    (Ok(extents), Some(context)) => {
                        let head = Head::status(request.cookie, context, extents.len());
                        let bytes = extents.into_iter().flat_map(Extent::encode).collect();
                        connection.answer_with(&request, head, bytes);
                    }
                    (Err(error), _) => self.fail(at, &request, Errno::of(&error)),
                    (_, None) => self.fail(at, &request, Errno::Invalid),
                }
                Ok(())
            }
            Command::Disconnect => {
                connection.over = true;
                connection.requests -= 1;
                Ok(())
            }
            Command::Unknown(_) => {
                self.fail(at, &request, Errno::Invalid);
                Ok(())
            }
        }
    }

    fn fail(&mut self, at: usize, request: &Request, errno: Errno) {
        let connection = &mut self.connections[at];
        let head = Head::error(request.cookie, connection.agreed().structured, errno);
        connection.answer(request, head, None);
        self.touched.push(at);
    }

    /// Submits something that changes the disk, unless the node may not.
    fn write(&mut self, at: usize, data: Option<Buffer>) -> io::Result<()> {
        let export = &self.connections[self.active[at].connection].export;
        if !self.parked.is_empty() || !export.fence.may_write() {
            self.parked.push_back((at, data));
            return Ok(());
        }
        self.submit_write(at, data)
    }

    fn submit_write(&mut self, at: usize, data: Option<Buffer>) -> io::Result<()> {
        let Active { request, doing, connection } = self.active[at];
        let file = self.connections[connection].export.file.clone();
        let (offset, length) = (request.offset, u64::from(request.length));
        let io = match (request.command, doing) {
            (Command::Write { fua }, _) => {
                let buffer = data.unwrap_or_default();
                Io::Write { file, buffer, skip: 0, at: offset, durable: fua }
            }
            (_, Doing::Sync | Doing::Itself) => Io::Sync { file },
            (_, Doing::Punch) => {
                let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                Io::Allocate { file, mode: mode.bits(), at: offset, length }
            }
            (_, Doing::Mark) => {
                let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                Io::Allocate { file, mode: mode.bits(), at: offset, length }
            }
            (_, Doing::Zeroes(done)) => {
                let mut buffer = self.pool.get((length - done).min(ZEROES_BYTES) as usize);
                buffer.bytes_mut().fill(0);
                Io::Write { file, buffer, skip: 0, at: offset + done, durable: false }
            }
        };
        self.storage(at, io)
    }

    fn storage(&mut self, at: usize, io: Io) -> io::Result<()> {
        self.ring.push(Token::Request(at), io).map(drop)
    }

    fn try_parked(&mut self) -> io::Result<()> {
        while let Some((at, _)) = self.parked.front() {
            let export = &self.connections[self.active[*at].connection].export;
            if !export.fence.may_write() {
                return Ok(());
            }
            if let Some((at, data)) = self.parked.pop_front() {
                self.submit_write(at, data)?;
            }
        }
        Ok(())
    }

    /// The storage has done a part of a request.
    fn stored(&mut self, at: usize, io: Io, outcome: io::Result<u32>) -> io::Result<()> {
        let again = |error: &io::Error| matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
        let Active { request, doing, connection } = self.active[at];
        match (io, outcome) {
            (Io::Write { buffer, .. }, Err(error)) if again(&error) => self.write_again(at, buffer),
            (Io::Allocate { .. }, Err(error)) if again(&error) => self.write(at, None),
            (io, Err(error)) if again(&error) => self.storage(at, io),
            (Io::Read { file, mut buffer, skip, at: from }, Ok(count)) => {
                let skip = skip + count as usize;
                if count == 0 {
                    // Past the end of a file that is shorter than its disk.
                    buffer.bytes_mut()[skip..].fill(0);
                } else if skip < buffer.bytes().len() {
                    return self.storage(at, Io::Read { file, buffer, skip, at: from + u64::from(count) });
                }
                let structured = self.connections[connection].agreed().structured;
                let head = Head::data(request.cookie, structured, request.offset, request.length);
                self.finish(at, head, Some(buffer));
                Ok(())
            }
            (Io::Write { buffer, .. }, Ok(0)) => {
                self.pool.put(buffer);
                self.failed(at, Errno::Io)
            }
            (Io::Write { file, buffer, skip, at: from, durable }, Ok(count)) => {
                let skip = skip + count as usize;
                if skip < buffer.bytes().len() {
                    return match self.connections[connection].export.fence.may_write() {
                        true => {
                            self.storage(at, Io::Write { file, buffer, skip, at: from + u64::from(count), durable })
                        }
                        // From its beginning: the same bytes go to the same place.
                        false => self.write_again(at, buffer),
                    };
                }
                let written = buffer.bytes().len() as u64;
                self.pool.put(buffer);
                match doing {
                    Doing::Zeroes(done) if done + written < u64::from(request.length) => {
                        self.do_now(at, Doing::Zeroes(done + written))
                    }
                    Doing::Zeroes(_) => self.changed(at),
                    _ => self.succeeded(at),
                }
            }
            (Io::Allocate { .. }, Ok(_)) => self.changed(at),
            (Io::Allocate { .. }, Err(error)) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {
                match (request.command, doing) {
                    // It was only a hint.
                    (Command::Trim { .. }, _) => self.succeeded(at),
                    (_, Doing::Punch) => self.do_now(at, Doing::Mark),
                    (Command::Zero { fast: true, .. }, _) => self.failed(at, Errno::NotSupported),
                    _ => self.do_now(at, Doing::Zeroes(0)),
                }
            }
            (Io::Write { buffer, .. } | Io::Read { buffer, .. }, Err(error)) => {
                self.pool.put(buffer);
                self.failed(at, Errno::of(&error))
            }
            (_, Err(error)) => self.failed(at, Errno::of(&error)),
            (_, Ok(_)) => self.succeeded(at),
        }
    }

    /// Writes the same again, when the node may.
    fn write_again(&mut self, at: usize, buffer: Buffer) -> io::Result<()> {
        match self.active[at].doing {
            Doing::Itself => self.write(at, Some(buffer)),
            _ => {
                self.pool.put(buffer);
                self.write(at, None)
            }
        }
    }

    fn do_now(&mut self, at: usize, doing: Doing) -> io::Result<()> {
        self.active[at].doing = doing;
        self.write(at, None)
    }

    /// The contents are as wished; perhaps they have to be on stable storage too.
    fn changed(&mut self, at: usize) -> io::Result<()> {
        match self.active[at].request.command {
            Command::Trim { fua: true } | Command::Zero { fua: true, .. } => self.do_now(at, Doing::Sync),
            _ => self.succeeded(at),
        }
    }

    fn succeeded(&mut self, at: usize) -> io::Result<()> {
        let Active { request, connection, .. } = self.active[at];
        let head = Head::done(request.cookie, self.connections[connection].agreed().structured);
        self.finish(at, head, None);
        Ok(())
    }

    fn failed(&mut self, at: usize, errno: Errno) -> io::Result<()> {
        let Active { request, connection, .. } = self.active[at];
        let disk = &self.connections[connection].export.offer.name;
        tracing::warn!(disk, offset = request.offset, length = request.length, ?errno, "a request failed");
        let head = Head::error(request.cookie, self.connections[connection].agreed().structured, errno);
        self.finish(at, head, None);
        Ok(())
    }

    fn finish(&mut self, at: usize, head: Head, data: Option<Buffer>) {
        let Active { request, connection, .. } = self.active.remove(at);
        self.connections[connection].answer(&request, head, data);
        self.touched.push(connection);
    }

    /// Sends what is to be sent, reads on where that was put off, ends what is over.
    fn settle(&mut self, at: usize) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(at) else { return Ok(()) };
        connection.send(&mut self.pool);
        if connection.is_done() {
            let watch = connection.watch;
            self.connections.remove(at);
            return self.ring.cancel(watch);
        }
        if connection.has_answers() && !connection.waits_for_room && !connection.broken {
            connection.waits_for_room = true;
            let watched = Io::Writable(connection.stream.as_raw_fd());
            let token = Token::Room(at, connection.serial);
            self.ring.push(token, watched)?;
        }
        if self.connections[at].full && self.connections[at].has_room() {
            self.read(at)?;
        }
        Ok(())
    }
}

/// Whether a request makes sense for a disk.
fn fits(request: &Request, has_data: bool, export: &Export) -> Result<(), Errno> {
    let offer = &export.offer;
    let (offset, length) = (request.offset, u64::from(request.length));
    let aligned = (offset | length).is_multiple_of(u64::from(offer.block));
    let inside = offset.checked_add(length).is_some_and(|end| end <= offer.size);
    match request.command {
        Command::Read | Command::Write { .. } if length > u64::from(MAX_REQUEST_BYTES) => Err(Errno::Invalid),
        Command::Write { .. } | Command::Trim { .. } | Command::Zero { .. } if offer.read_only => {
            Err(Errno::Permission)
        }
        Command::Write { .. } if !has_data => Err(Errno::Invalid),
        Command::Write { .. } | Command::Zero { .. } if !inside => Err(Errno::NoSpace),
        Command::Read | Command::Trim { .. } | Command::Status { .. } if !inside => Err(Errno::Invalid),
        Command::Read | Command::Write { .. } | Command::Trim { .. } | Command::Zero { .. }
            if length == 0 || !aligned =>
        {
            Err(Errno::Invalid)
        }
        Command::Status { .. } if length == 0 => Err(Errno::Invalid),
        _ => Ok(()),
    }
}
