//! Requests: what the storage does for each, piece by piece.
//!
//! A request is one piece where a disk is a file, and one for each slab that it
//! touches where a disk is on a LUN. One piece of it is under way at a time.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::{Engine, PARKED_AGAIN, Token};
use crate::buffer::Buffer;
use crate::device::{Reached, Storage};
use crate::export::{Export, Fence};
use crate::link::Until;
use crate::nbd::{Command, Errno, Extent, Head, MAX_REQUEST_BYTES, Request};
use crate::parts::{Asked, Place};
use crate::paths::{Begin, Luck};
use crate::piece::{Back, Op, Piece};
use crate::remote::LATE;
use crate::ring::Io;
use crate::tally::Waiting;

/// Extents in one answer.
const MOST_EXTENTS: usize = 512;
/// Zeroes that are written at once where the storage has no better way.
const ZEROES_BYTES: u64 = 1 << 20;

/// A request that is being served.
pub(super) struct Active {
    connection: usize,
    request: Request,
    export: Arc<Export>,
    doing: Doing,
    /// So many of its bytes are done.
    done: u64,
    /// Its data, while the storage does not have it.
    buffer: Option<Buffer>,
    /// The part of the disk in which something is under way.
    entered: Option<u32>,
    /// The part that it asked for last.
    asked: Option<u32>,
    waits: Waits,
    /// Its attempt that is under way, where there is more than one way.
    attempt: Option<usize>,
    luck: Luck,
}

/// What the storage does for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    /// Moves its data.
    Itself,
    /// Gives back whole slabs; whether that was asked for already.
    Release(bool),
    /// Zeroes by giving the space back.
    Punch,
    /// Zeroes by marking the space.
    Mark,
    /// Zeroes by writing.
    Zeroes,
    /// Brings to stable storage what was changed.
    Sync,
}

/// What a parked request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    Nothing,
    /// That the node may write.
    Fence,
    /// That a part has a slab. When it began to wait there had been so many refusals.
    Slab(u32, u64),
    /// That slabs are given back.
    Release,
    /// That there is a way to the storage.
    Way,
}

impl Waits {
    fn counted(self) -> Waiting {
        match self {
            Waits::Fence => Waiting::Fence,
            Waits::Way => Waiting::Way,
            Waits::Nothing | Waits::Slab(..) | Waits::Release => Waiting::Slabs,
        }
    }
}

impl Engine {
    pub(super) fn begin(&mut self, at: usize, request: Request, data: Option<Buffer>) -> io::Result<()> {
        let connection = &mut self.connections[at];
        if let Err(errno) = fits(&request, data.is_some(), &connection.export) {
            self.pool.put(data.unwrap_or_default());
            self.fail(at, &request, errno);
            return Ok(());
        }
        let export = connection.export.clone();
        let mut buffer = data;
        let doing = match request.command {
            Command::Read => {
                buffer = Some(self.pool.get(request.length as usize));
                Doing::Itself
            }
            Command::Write { .. } => Doing::Itself,
            Command::Flush => Doing::Sync,
            Command::Zero { may_free: false, .. } => Doing::Mark,
            Command::Trim { .. } | Command::Zero { .. } => Doing::Release(false),
            Command::Status { one } => {
                let most = if one { 1 } else { MOST_EXTENTS };
                match (export.extents(request.offset, request.length, most), connection.agreed().allocation) {
                    (Ok(extents), Some(context)) => {
                        let head = Head::status(request.cookie, context, extents.len());
                        let bytes = extents.into_iter().flat_map(Extent::encode).collect();
                        connection.answer_with(&request, head, bytes);
                    }
                    (Err(error), _) => self.fail(at, &request, Errno::of(&error)),
                    (_, None) => self.fail(at, &request, Errno::Invalid),
                }
                return Ok(());
            }
            Command::Disconnect => {
                connection.over = true;
                connection.requests -= 1;
                return Ok(());
            }
            Command::Unknown(_) => {
                self.fail(at, &request, Errno::Invalid);
                return Ok(());
            }
        };
        let active = Active {
            connection: at,
            request,
            export,
            doing,
            done: 0,
            buffer,
            entered: None,
            asked: None,
            waits: Waits::Nothing,
            attempt: None,
            luck: Luck::default(),
        };
        let at = self.active.insert(active);
        self.step(at)
    }

    fn fail(&mut self, at: usize, request: &Request, errno: Errno) {
        let connection = &mut self.connections[at];
        let head = Head::error(request.cookie, connection.agreed().structured, errno);
        connection.export.tally.failed();
        connection.answer(request, head, None);
        self.touched.push(at);
    }

    /// Does the next piece of a request, or answers it.
    fn step(&mut self, at: usize) -> io::Result<()> {
        loop {
            let active = &mut self.active[at];
            let connection = &self.connections[active.connection];
            if connection.is_broken() {
                // Nobody hears the answer; a withdrawn disk's fence never opens again.
                self.abandon(at);
                return Ok(());
            }
            let (request, export) = (active.request, &active.export);
            if let (Some(visit), Some(until)) = (&connection.visit, request.until_ns)
                && !visit.judge.may(until)
            {
                return self.failed(at, Errno::Late);
            }
            if active.doing == Doing::Sync {
                return self.hand_over(at, Piece::without_data(Op::Sync, 0, 0));
            }
            let left = u64::from(request.length) - active.done;
            if left == 0 {
                return self.worked(at);
            }
            if request.command != Command::Read && connection.visit.is_none() && !export.fence.may_write() {
                self.park(at, Waits::Fence);
                return Ok(());
            }
            if let Doing::Release(asked) = active.doing {
                let leaving = export.parts().is_some_and(|parts| {
                    let whole = parts.whole(request.offset, left, export.size_bytes());
                    if !asked {
                        parts.give_back(whole.clone());
                    }
                    parts.are_leaving(whole, &self.waker)
                });
                active.doing = if leaving { Doing::Release(true) } else { Doing::Punch };
                if leaving {
                    self.park(at, Waits::Release);
                    return Ok(());
                }
            }
            let offset = request.offset + active.done;
            let (place, length, part) = export.place(offset, left);
            let may_be_absent = match request.command {
                Command::Read | Command::Trim { .. } => true,
                Command::Zero { may_free, .. } => may_free,
                _ => false,
            };
            match (place, part) {
                (Place::Absent, _) if may_be_absent => {
                    if let Some(buffer) = &mut active.buffer {
                        buffer.bytes_mut()[active.done as usize..][..length as usize].fill(0);
                    }
                    active.done += length;
                }
                (Place::Absent, part) => {
                    let (Some(part), Some(parts)) = (part, export.parts()) else {
                        return self.failed(at, Errno::Io);
                    };
                    active.asked = Some(part);
                    if let Asked::Waits(refusals) = parts.ask(part, &self.waker) {
                        self.park(at, Waits::Slab(part, refusals));
                        return Ok(());
                    }
                }
                // A new slab is zero already.
                (Place::At(_), Some(part)) if active.asked == Some(part) && active.doing != Doing::Itself => {
                    if let Some(parts) = export.parts() {
                        parts.leave(part);
                    }
                    active.done += length;
                }
                (Place::At(place), part) => {
                    active.entered = part;
                    return self.submit(at, place, length);
                }
            }
        }
    }

    /// Hands a piece to the storage.
    fn submit(&mut self, at: usize, place: u64, length: u64) -> io::Result<()> {
        let active = &mut self.active[at];
        let piece = match (active.doing, active.request.command) {
            (Doing::Punch, Command::Trim { .. }) => Piece::without_data(Op::Trim, place, length),
            (Doing::Punch, _) => Piece::without_data(Op::Zero { may_free: true }, place, length),
            (Doing::Mark, _) => Piece::without_data(Op::Zero { may_free: false }, place, length),
            (Doing::Zeroes, _) => {
                let length = length.min(ZEROES_BYTES);
                let mut buffer = self.pool.get(length as usize);
                buffer.bytes_mut().fill(0);
                Piece { op: Op::Write { durable: false }, at: place, length, buffer, skip: 0 }
            }
            (_, command) => {
                let op = match command {
                    Command::Write { fua } => {
                        if let (Some(part), Some(parts)) = (active.entered, active.export.parts()) {
                            parts.touch(part);
                        }
                        Op::Write { durable: fua }
                    }
                    _ => Op::Read,
                };
                let buffer = active.buffer.take().unwrap_or_default();
                Piece { op, at: place, length, buffer, skip: active.done as usize }
            }
        };
        self.hand_over(at, piece)
    }

    fn hand_over(&mut self, at: usize, piece: Piece) -> io::Result<()> {
        let active = &mut self.active[at];
        let visit = self.connections[active.connection].visit.as_ref();
        let visit = visit.map(|visit| (visit.judge.clone(), active.request.until_ns.unwrap_or(0)));
        let storage = match active.export.reached() {
            Reached::Plain(storage) => storage.clone(),
            Reached::Ways(paths) => match paths.begin(&piece, active.export.alone, &mut active.luck) {
                (Begin::Go(_, attempt), Some(storage)) => {
                    active.attempt = Some(attempt);
                    storage
                }
                (began, _) => {
                    self.take_back(at, piece.buffer);
                    return match began {
                        Begin::NoPath => self.failed(at, Errno::NoPath),
                        Begin::Refuse => self.failed(at, Errno::Io),
                        Begin::Go(..) | Begin::Wait => {
                            self.park(at, Waits::Way);
                            Ok(())
                        }
                    };
                }
            },
        };
        match storage {
            Storage::File(file) => {
                let io = Io::Storage { file, piece };
                self.ring.push(Token::Request(at), io).map(drop)
            }
            Storage::Remote(remote) => {
                let fence: Option<Arc<dyn Fence>> = match (visit, active.request.command) {
                    (Some((judge, until_ns)), _) => Some(Arc::new(Until { judge, until_ns })),
                    (None, Command::Read | Command::Flush) => None,
                    (None, _) => Some(active.export.fence.clone()),
                };
                remote.submit(piece, fence, Back::Thread(self.waker.clone(), at));
                Ok(())
            }
        }
    }

    /// The storage has done a piece of a request.
    pub(super) fn stored(&mut self, at: usize, piece: Piece, outcome: io::Result<u32>) -> io::Result<()> {
        let active = &mut self.active[at];
        let attempt = active.attempt.take();
        let again = match (active.export.reached(), attempt) {
            (Reached::Ways(paths), Some(attempt)) => paths.over(attempt, &outcome, &mut active.luck),
            _ => false,
        };
        // Of the kind that needs no data.
        let marked = match piece.op {
            Op::Trim | Op::Zero { .. } => piece.length,
            _ => 0,
        };
        self.take_back(at, piece.buffer);
        if again {
            self.park(at, Waits::Way);
            return Ok(());
        }
        if outcome.as_ref().is_err_and(|error| error.raw_os_error() == Some(LATE)) {
            // The fence was closed meanwhile.
            return self.step(at);
        }
        let active = &mut self.active[at];
        match (outcome, active.request.command) {
            (Err(error), _) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            (Err(error), command) if marked > 0 && error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => {
                active.doing = match (command, active.doing) {
                    // It was only a hint.
                    (Command::Trim { .. }, _) => {
                        active.done += marked;
                        Doing::Punch
                    }
                    (_, Doing::Punch) => Doing::Mark,
                    (Command::Zero { fast: true, .. }, _) => return self.failed(at, Errno::NotSupported),
                    _ => Doing::Zeroes,
                };
            }
            (Err(error), _) => return self.failed(at, Errno::of(&error)),
            (Ok(_), _) if active.doing == Doing::Sync => return self.succeeded(at),
            // Past the end of a file that is shorter than its disk.
            (Ok(0), Command::Read) if active.export.parts().is_none() => {
                if let Some(buffer) = &mut active.buffer {
                    buffer.bytes_mut()[active.done as usize..].fill(0);
                }
                active.done = u64::from(active.request.length);
            }
            (Ok(0), _) if marked == 0 => return self.failed(at, Errno::Io),
            (Ok(count), _) => active.done += marked.max(u64::from(count)),
        }
        self.step(at)
    }

    /// A piece is not under way any more.
    fn take_back(&mut self, at: usize, buffer: Buffer) {
        let active = &mut self.active[at];
        if let (Some(part), Some(parts)) = (active.entered.take(), active.export.parts()) {
            parts.leave(part);
        }
        if active.doing == Doing::Itself {
            active.buffer = Some(buffer);
        } else {
            self.pool.put(buffer);
        }
    }

    /// The contents are as wished; perhaps they have to be on stable storage too.
    fn worked(&mut self, at: usize) -> io::Result<()> {
        let active = &mut self.active[at];
        match active.request.command {
            Command::Trim { fua: true } | Command::Zero { fua: true, .. } => {
                active.doing = Doing::Sync;
                self.step(at)
            }
            _ => self.succeeded(at),
        }
    }

    fn succeeded(&mut self, at: usize) -> io::Result<()> {
        let Active { request, connection, .. } = self.active[at];
        let structured = self.connections[connection].agreed().structured;
        let head = match request.command {
            Command::Read => Head::data(request.cookie, structured, request.offset, request.length),
            _ => Head::done(request.cookie, structured),
        };
        self.active[at].export.tally.done(&request);
        self.finish(at, head, request.command == Command::Read);
        Ok(())
    }

    fn failed(&mut self, at: usize, errno: Errno) -> io::Result<()> {
        let Active { request, connection, ref export, .. } = self.active[at];
        let disk = &export.offer.name;
        if matches!(errno, Errno::Late | Errno::NoPath) {
            tracing::debug!(disk, offset = request.offset, ?errno, "nothing is done for another node");
        } else {
            tracing::warn!(disk, offset = request.offset, length = request.length, ?errno, "a request failed");
        }
        export.tally.failed();
        let head = Head::error(request.cookie, self.connections[connection].agreed().structured, errno);
        self.finish(at, head, false);
        Ok(())
    }

    fn finish(&mut self, at: usize, head: Head, with_data: bool) {
        let Active { request, connection, mut buffer, .. } = self.active.remove(at);
        if !with_data {
            self.pool.put(buffer.take().unwrap_or_default());
        }
        self.connections[connection].answer(&request, head, buffer);
        self.touched.push(connection);
    }

    fn park(&mut self, at: usize, waits: Waits) {
        if self.parked.is_empty() {
            self.again = Instant::now() + PARKED_AGAIN;
        }
        self.active[at].waits = waits;
        self.active[at].export.tally.waits(waits.counted(), true);
        self.parked.push(at);
    }

    /// Goes on with requests for which what they wait for may have come.
    pub(super) fn try_parked(&mut self) -> io::Result<()> {
        self.again = Instant::now() + PARKED_AGAIN;
        for at in std::mem::take(&mut self.parked) {
            let active = &mut self.active[at];
            let waits = std::mem::replace(&mut active.waits, Waits::Nothing);
            active.export.tally.waits(waits.counted(), false);
            let full = match (waits, active.export.parts()) {
                (Waits::Slab(part, before), Some(parts)) => parts.refusals(part).is_some_and(|now| now > before),
                _ => false,
            };
            if full {
                self.failed(at, Errno::NoSpace)?;
            } else {
                self.step(at)?;
            }
        }
        Ok(())
    }

    /// Requests that wait on connections that are over are not served any more.
    pub(super) fn abandon_parked(&mut self) {
        for at in std::mem::take(&mut self.parked) {
            let active = &self.active[at];
            if self.connections[active.connection].is_broken() {
                active.export.tally.waits(active.waits.counted(), false);
                self.abandon(at);
            } else {
                self.parked.push(at);
            }
        }
    }

    /// Ends a request on a connection that is over, between two pieces of it.
    fn abandon(&mut self, at: usize) {
        let Active { request, connection, mut buffer, .. } = self.active.remove(at);
        self.pool.put(buffer.take().unwrap_or_default());
        self.connections[connection].answer(&request, Head::error(request.cookie, false, Errno::Shutdown), None);
        self.touched.push(connection);
    }
}

/// Whether a request makes sense for a disk.
fn fits(request: &Request, has_data: bool, export: &Export) -> Result<(), Errno> {
    let (offer, size) = (&export.offer, export.size_bytes());
    let (offset, length) = (request.offset, u64::from(request.length));
    let aligned = (offset | length).is_multiple_of(u64::from(offer.block));
    let inside = offset.checked_add(length).is_some_and(|end| end <= size);
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
