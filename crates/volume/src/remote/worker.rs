//! The thread that keeps the connection to a storage elsewhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::{Asked, Certainty, Dialect, LATE, Shared};
use crate::export::Fence;
use crate::nbd::client::NOBODY;
use crate::piece::{Back, Ended, Op, Piece};
use crate::pipe::{Pipe, ready};

/// After a connection could not be made, none is tried for so long.
const CONNECT_AGAIN: Duration = Duration::from_millis(100);
/// What one read of the connection takes at most.
const SCRATCH_BYTES: usize = 64 << 10;

/// A request that the server may have.
struct Sent {
    piece: Piece,
    fence: Option<Arc<dyn Fence>>,
    back: Back,
    /// The data are written, and a flush is under way.
    syncs: bool,
}

pub(super) struct Worker<D> {
    dialect: D,
    shared: Arc<Shared>,
    pipe: Option<Box<dyn Pipe>>,
    /// No connection is tried before.
    not_before: Option<Instant>,
    cookies: u64,
    sent: BTreeMap<u64, Sent>,
    /// Requests that are to be sent, in order, and how far the first of them is.
    out: VecDeque<u64>,
    head: Vec<u8>,
    out_at: usize,
    full: bool,
    /// Requests of broken connections, of which nobody knows whether the server has them,
    /// and when that does not matter any more, where time alone tells.
    unsure: VecDeque<(Option<Instant>, Sent)>,
    /// Nothing that the server had can happen any more, and it is not to be asked again.
    over: bool,
    /// When the server was heard last, and when somebody needed it last.
    heard: Instant,
    used: Instant,
    input: Vec<u8>,
    taken: usize,
    /// The read whose data come in, and how many bytes of them have.
    filling: Option<(u64, usize)>,
    scratch: Vec<u8>,
}

impl<D: Dialect> Worker<D> {
    pub(super) fn new(dialect: D, shared: Arc<Shared>, pipe: Option<Box<dyn Pipe>>) -> Worker<D> {
        Worker {
            dialect,
            shared,
            pipe,
            not_before: None,
            cookies: NOBODY,
            sent: BTreeMap::new(),
            out: VecDeque::new(),
            head: Vec::new(),
            out_at: 0,
            full: false,
            unsure: VecDeque::new(),
            over: false,
            heard: Instant::now(),
            used: Instant::now(),
            input: Vec::new(),
            taken: 0,
            filling: None,
            scratch: vec![0; SCRATCH_BYTES],
        }
    }

    pub(super) fn run(mut self) {
        loop {
            let (pieces, ended, give_up) = {
                let mut todo = self.shared.todo();
                self.over |= todo.is_over;
                (std::mem::take(&mut todo.pieces), todo.ended, std::mem::take(&mut todo.give_up))
            };
            if self.pipe.is_some() && (give_up || self.over) {
                self.lose(&not_connected());
            }
            pieces.into_iter().for_each(|asked| self.take(asked));
            if let Err(error) = self.send().and_then(|()| self.receive()).and_then(|()| self.hear()) {
                self.lose(&error);
            }
            self.settle();
            if ended && self.sent.is_empty() && self.unsure.is_empty() {
                // Without a connection of this life, an earlier one's may be under way.
                if self.pipe.is_some() {
                    self.close();
                }
                return;
            }
            if let Err(error) = self.sleep() {
                tracing::error!(%error, "a connection to storage cannot be watched: this process ends");
                std::process::abort();
            }
        }
    }

    /// A server that is silent is lost; one that nobody needs is left alone.
    fn hear(&mut self) -> io::Result<()> {
        let now = Instant::now();
        if self.pipe.is_none() {
            return Ok(());
        }
        if self.dialect.silence().is_some_and(|silence| now >= self.heard + silence) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let rests = self.dialect.rest().is_some_and(|rest| now >= self.used + rest);
        if rests && self.sent.is_empty() && self.unsure.is_empty() {
            self.close();
        }
        Ok(())
    }

    /// Ends the connection, with nothing under way.
    fn close(&mut self) {
        self.pipe = None;
        self.dialect.closed();
    }

    /// Waits for something to do.
    fn sleep(&mut self) -> io::Result<()> {
        let settled = match self.unsure.front() {
            None => None,
            Some((Some(_), _)) => self.unsure.iter().filter_map(|(then, _)| *then).min(),
            Some((None, _)) => Some(self.not_before.unwrap_or_else(Instant::now)),
        };
        let connected = self.pipe.as_ref().map(|_| ());
        let silent = connected.and(self.dialect.silence()).map(|silence| self.heard + silence);
        let idle = self.sent.is_empty() && self.unsure.is_empty();
        let rests = connected.filter(|()| idle).and(self.dialect.rest()).map(|rest| self.used + rest);
        let until = [settled, silent, rests].into_iter().flatten().min();
        let bell = (self.shared.bell.as_fd(), PollFlags::POLLIN);
        let rung = match &self.pipe {
            None => ready([bell], until)?[0],
            Some(pipe) => {
                let room = if self.full { PollFlags::POLLOUT } else { PollFlags::empty() };
                ready([bell, (pipe.fd(), PollFlags::POLLIN | room)], until)?[0]
            }
        };
        if rung {
            let _ = self.shared.bell.read();
        }
        Ok(())
    }

    fn take(&mut self, Asked { piece, fence, back }: Asked) {
        self.used = Instant::now();
        // To connect takes time, after which it may be too late for a change.
        let connected = match (&self.pipe, piece.op) {
            (None, Op::Read) => self.be_connected(),
            (None, _) => Err(not_connected()),
            (Some(_), _) => Ok(()),
        };
        if let Err(error) = connected {
            return back.tell(Ended { piece, outcome: Err(error) });
        }
        self.cookies += 1;
        self.sent.insert(self.cookies, Sent { piece, fence, back, syncs: false });
        self.out.push_back(self.cookies);
    }

    fn be_connected(&mut self) -> io::Result<()> {
        if self.pipe.is_some() {
            return Ok(());
        }
        let now = Instant::now();
        if self.over || self.not_before.is_some_and(|then| now < then) {
            return Err(not_connected());
        }
        match self.dialect.connect(now + self.dialect.connects_within()) {
            Ok(pipe) => {
                self.pipe = Some(pipe);
                self.not_before = None;
                self.heard = Instant::now();
                if self.dialect.certainty() == Certainty::NextConnection {
                    self.tell_unsure(self.unsure.len());
                }
                Ok(())
            }
            Err(error) => {
                tracing::debug!(%error, "storage elsewhere cannot be reached");
                self.not_before = Some(Instant::now() + CONNECT_AGAIN);
                Err(not_connected())
            }
        }
    }

    /// Sends as much as the connection takes.
    fn send(&mut self) -> io::Result<()> {
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        self.full = false;
        while let Some(first) = self.out.front() {
            let Some(sent) = self.sent.get(first) else {
                self.out.pop_front();
                continue;
            };
            if self.head.is_empty() {
                let flush;
                let piece = if sent.syncs {
                    flush = Piece::without_data(Op::Sync, 0, 0);
                    &flush
                } else {
                    &sent.piece
                };
                let late = sent.fence.as_ref().is_some_and(|fence| !fence.may_write());
                let asked = match late {
                    true => Err(io::Error::from_raw_os_error(LATE)),
                    false => self.dialect.request(*first, piece, &mut self.head),
                };
                if let Err(error) = asked {
                    self.head.clear();
                    let cookie = *first;
                    self.out.pop_front();
                    self.end(cookie, Err(error));
                    return self.send();
                }
            }
            let data = match sent.piece.op {
                Op::Write { .. } if !sent.syncs => sent.piece.data(),
                _ => &[],
            };
            let rest = match self.head.get(self.out_at..).filter(|rest| !rest.is_empty()) {
                Some(rest) => rest,
                None => &data[self.out_at - self.head.len()..],
            };
            if rest.is_empty() {
                (self.out_at, _) = (0, self.head.clear());
                self.out.pop_front();
                continue;
            }
            match pipe.write(rest) {
                Ok(count) => self.out_at += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.full = true;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        match pipe.flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.full = true;
                Ok(())
            }
            outcome => outcome,
        }
    }

    /// Takes in what the connection has.
    fn receive(&mut self) -> io::Result<()> {
        loop {
            let Some(pipe) = &mut self.pipe else { return Ok(()) };
            if let Some((cookie, filled)) = self.filling {
                let sent = self.sent.get_mut(&cookie).ok_or(io::ErrorKind::InvalidData)?;
                let data = &mut sent.piece.data_mut()[filled..];
                if data.is_empty() {
                    self.filling = None;
                    self.end(cookie, Ok(()));
                    continue;
                }
                let waiting = &self.input[self.taken..];
                let count = if waiting.is_empty() {
                    match pipe.read(data) {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(count) => {
                            self.heard = Instant::now();
                            count
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                        Err(error) => return Err(error),
                    }
                } else {
                    let count = waiting.len().min(data.len());
                    data[..count].copy_from_slice(&waiting[..count]);
                    self.taken += count;
                    count
                };
                self.filling = Some((cookie, filled + count));
                continue;
            }
            let head = self.input[self.taken..].get(..self.dialect.reply_bytes());
            if let Some(head) = head {
                self.taken += head.len();
                if let Some((cookie, outcome)) = self.dialect.reply(head)? {
                    self.replied(cookie, outcome)?;
                }
                continue;
            }
            self.input.drain(..self.taken);
            self.taken = 0;
            match pipe.read(&mut self.scratch) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.heard = Instant::now();
                    self.input.extend_from_slice(&self.scratch[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn replied(&mut self, cookie: u64, outcome: io::Result<()>) -> io::Result<()> {
        let sent = self.sent.get_mut(&cookie).ok_or(io::ErrorKind::InvalidData)?;
        if self.out.contains(&cookie) {
            // What it answers was not asked yet.
            return Err(io::ErrorKind::InvalidData.into());
        }
        match (outcome, sent.piece.op) {
            (Ok(()), Op::Read) => self.filling = Some((cookie, 0)),
            (Ok(()), Op::Write { durable: true }) if !sent.syncs && self.dialect.needs_sync() => {
                sent.syncs = true;
                self.out.push_back(cookie);
                self.send()?;
            }
            (outcome, _) => self.end(cookie, outcome),
        }
        Ok(())
    }

    fn end(&mut self, cookie: u64, outcome: io::Result<()>) {
        if let Some(Sent { piece, back, .. }) = self.sent.remove(&cookie) {
            let outcome = outcome.map(|()| u32::try_from(piece.length).unwrap_or(u32::MAX));
            back.tell(Ended { piece, outcome });
        }
    }

    /// The connection is over. What was not sent yet did not happen; what reads or flushes
    /// may as well not have; of the rest nobody knows.
    fn lose(&mut self, error: &io::Error) {
        tracing::info!(%error, "the connection to storage elsewhere is lost");
        if let Some(pipe) = self.pipe.take() {
            pipe.give_up();
        }
        let unsent: BTreeSet<u64> = self.out.iter().skip(usize::from(self.out_at > 0)).copied().collect();
        let settles = match self.dialect.certainty() {
            Certainty::After { ended, .. } if ended_it(error) => Some(ended),
            Certainty::After { silent, .. } => Some(silent),
            Certainty::NextConnection => None,
        };
        let certain = settles.map(|settles| Instant::now() + settles);
        for (cookie, sent) in std::mem::take(&mut self.sent) {
            let harmless = matches!(sent.piece.op, Op::Read | Op::Sync);
            if harmless || unsent.contains(&cookie) && !sent.syncs {
                sent.back.tell(Ended { piece: sent.piece, outcome: Err(not_connected()) });
            } else {
                self.unsure.push_back((certain, sent));
            }
        }
        self.out.clear();
        self.head.clear();
        self.input.clear();
        (self.out_at, self.taken, self.filling, self.full) = (0, 0, None, false);
    }

    /// Tells of requests of broken connections that are certainly over.
    fn settle(&mut self) {
        if self.over {
            return self.tell_unsure(self.unsure.len());
        }
        if self.unsure.front().is_some_and(|(certain, _)| certain.is_none()) {
            // The one that comes next tells.
            let _ = self.be_connected();
        }
        let now = Instant::now();
        // Those of a later connection may be certain sooner.
        while let Some(at) = self.unsure.iter().position(|(certain, _)| certain.is_some_and(|then| then <= now)) {
            if let Some((_, sent)) = self.unsure.remove(at) {
                sent.back.tell(Ended { piece: sent.piece, outcome: Err(not_connected()) });
            }
        }
    }

    fn tell_unsure(&mut self, count: usize) {
        for (_, sent) in self.unsure.drain(..count) {
            sent.back.tell(Ended { piece: sent.piece, outcome: Err(not_connected()) });
        }
    }
}

/// Whether a connection broke because the server's side ended it, which it can only do
/// while it is at work.
fn ended_it(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn not_connected() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::ENOTCONN)
}
