//! One client: what it sent and was not understood yet, and what it gets.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::buffer::{Buffer, Pool};
use crate::export::Export;
use crate::link::{Guest, Judge, REQUEST_BYTES};
use crate::nbd::{HEADER_BYTES, Handshake, Head, Negotiated, Request, Step};
use crate::pipe::Pipe;

/// Requests of one client that are served at a time; others wait in its socket.
const MOST_REQUESTS: usize = 128;
/// Bytes of data of one client that are on their way at a time.
const MOST_BYTES: usize = 64 << 20;
/// Pieces that one call sends.
const PIECES: usize = 64;

/// An answer that is not sent yet.
enum Answer {
    /// Part of the handshake, or extents.
    Bytes(Vec<u8>),
    /// A head and the data that follows it.
    Reply { head: Head, data: Option<Buffer> },
}

/// A write whose payload is coming in.
struct Incoming {
    request: Request,
    buffer: Buffer,
    filled: usize,
}

enum Phase {
    Handshake(Handshake),
    Transmission(Negotiated),
    /// Another node's link.
    Link,
}

/// Whom a link is from, and how its requests are judged.
pub(crate) struct Visit {
    pub(crate) guest: Guest,
    pub(crate) judge: Judge,
}

/// What a connection's bytes go through.
pub(crate) enum Stream {
    /// To QEMU, on this host.
    Local(UnixStream),
    /// To another node.
    Far(Box<dyn Pipe>),
}

impl Stream {
    pub(crate) fn fd(&self) -> RawFd {
        match self {
            Stream::Local(stream) => stream.as_raw_fd(),
            Stream::Far(pipe) => pipe.fd().as_raw_fd(),
        }
    }

    pub(crate) fn close(&self) {
        match self {
            Stream::Local(stream) => drop(stream.shutdown(std::net::Shutdown::Both)),
            Stream::Far(pipe) => pipe.give_up(),
        }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Local(stream) => stream.read(into),
            Stream::Far(pipe) => pipe.read(into),
        }
    }

    fn read_vectored(&mut self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Stream::Local(stream) => stream.read_vectored(into),
            Stream::Far(pipe) => pipe.read_vectored(into),
        }
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Local(stream) => stream.write_vectored(from),
            Stream::Far(pipe) => pipe.write_vectored(from),
        }
    }

    /// Whether less than was asked for means that there is no more for now.
    fn tells_its_end(&self) -> bool {
        matches!(self, Stream::Local(_))
    }
}

/// What a connection wants after its socket was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// All that was there was read.
    Drained,
    /// It has as much under way as it may: read on when something is done.
    Full,
    /// Nothing more comes.
    Over,
}

/// A client's connection.
pub(crate) struct Connection {
    pub(crate) stream: Stream,
    /// It is another node's link.
    pub(crate) visit: Option<Visit>,
    pub(crate) export: Arc<Export>,
    phase: Phase,
    /// Bytes that are no whole message yet, or that wait while it is full.
    backlog: Vec<u8>,
    incoming: Option<Incoming>,
    /// Bytes of a payload that nobody wants.
    unwanted: usize,
    answers: VecDeque<Answer>,
    /// Of the first answer, so many bytes are sent.
    sent: usize,
    /// What the stream has taken is not all sent.
    unflushed: bool,
    /// Requests that are served.
    pub(crate) requests: usize,
    bytes: usize,
    /// Its socket was left unread because it was full.
    pub(crate) full: bool,
    /// No more input is taken; it ends when everything is answered.
    pub(crate) over: bool,
    /// The socket takes nothing more.
    pub(crate) broken: bool,
    /// Its socket is watched for room.
    pub(crate) waits_for_room: bool,
    /// The watch of its socket, for as long as it lives.
    pub(crate) watch: u64,
    /// Tells it from others that had its place before.
    pub(crate) serial: u64,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream, export: Arc<Export>, serial: u64) -> Connection {
        let mut greeting = Vec::new();
        let handshake = Handshake::begin(&mut greeting);
        let mut connection = Connection::of(Stream::Local(stream), export, serial, Phase::Handshake(handshake));
        connection.answers.push_back(Answer::Bytes(greeting));
        connection
    }

    /// Another node's link, which was let in.
    pub(crate) fn of_link(pipe: Box<dyn Pipe>, export: Arc<Export>, serial: u64, visit: Visit) -> Connection {
        let mut connection = Connection::of(Stream::Far(pipe), export, serial, Phase::Link);
        connection.visit = Some(visit);
        connection
    }

    fn of(stream: Stream, export: Arc<Export>, serial: u64, phase: Phase) -> Connection {
        Connection {
            stream,
            visit: None,
            export,
            phase,
            backlog: Vec::new(),
            incoming: None,
            unwanted: 0,
            answers: VecDeque::new(),
            sent: 0,
            unflushed: false,
            requests: 0,
            bytes: 0,
            full: false,
            over: false,
            broken: false,
            waits_for_room: false,
            watch: 0,
            serial,
        }
    }

    /// Whether it may have more under way.
    pub(crate) fn has_room(&self) -> bool {
        self.requests < MOST_REQUESTS && self.bytes < MOST_BYTES
    }

    /// How answers look.
    pub(crate) fn agreed(&self) -> Negotiated {
        match self.phase {
            Phase::Handshake(_) | Phase::Link => Negotiated::default(),
            Phase::Transmission(agreed) => agreed,
        }
    }

    /// Whether nothing more is to be done for it: nobody hears the answers.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken || self.visit.as_ref().is_some_and(|visit| visit.guest.is_over())
    }

    /// Says that this node is there, where that is to be said, unless something else does.
    pub(crate) fn ping(&mut self) -> bool {
        let Some(visit) = self.visit.as_ref().filter(|_| self.answers.is_empty() && !self.unflushed) else {
            return false;
        };
        let head = Head::done(crate::nbd::client::NOBODY, false).stamped(visit.judge.0.now_ns());
        self.answers.push_back(Answer::Reply { head, data: None });
        true
    }

    /// Whether nothing is left to do for it.
    pub(crate) fn is_done(&self) -> bool {
        self.requests == 0 && (self.broken || self.over && !self.has_answers())
    }

    /// Reads what the socket has, and puts whole requests, with the data of writes,
    /// into `begun`.
    pub(crate) fn read(
        &mut self,
        scratch: &mut [u8],
        pool: &mut Pool,
        begun: &mut Vec<(Request, Option<Buffer>)>,
    ) -> Input {
        if !self.backlog.is_empty() {
            let backlog = std::mem::take(&mut self.backlog);
            self.understand(&backlog, pool, begun);
        }
        loop {
            if self.over || self.broken {
                return Input::Over;
            }
            if !self.has_room() {
                return Input::Full;
            }
            // The beginning of a message that its rest will follow.
            let held = self.backlog.len();
            scratch[..held].copy_from_slice(&self.backlog);
            self.backlog.clear();
            let free = &mut scratch[held..];
            let wanted = self.incoming.as_mut().map(|incoming| &mut incoming.buffer.bytes_mut()[incoming.filled..]);
            let payload = wanted.as_ref().map_or(0, |wanted| wanted.len());
            let room = payload + free.len();
            let read = match wanted {
                None => self.stream.read(free),
                Some(wanted) => self.stream.read_vectored(&mut [IoSliceMut::new(wanted), IoSliceMut::new(free)]),
            };
            let count = match read {
                Ok(0) => return self.ended(),
                Ok(count) => count,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    self.backlog.extend_from_slice(&scratch[..held]);
                    if error.kind() == io::ErrorKind::WouldBlock {
                        return Input::Drained;
                    }
                    continue;
                }
                Err(_) => return self.ended(),
            };
            self.received(count.min(payload), begun);
            self.understand(&scratch[..held + count.saturating_sub(payload)], pool, begun);
            if count < room && self.has_room() && self.stream.tells_its_end() {
                // It was drained: the watch tells of what comes now.
                return Input::Drained;
            }
        }
    }

    fn ended(&mut self) -> Input {
        self.over = true;
        self.incoming = None;
        Input::Over
    }

    /// `count` more bytes of the payload that is coming in are in its buffer.
    fn received(&mut self, count: usize, begun: &mut Vec<(Request, Option<Buffer>)>) {
        let Some(mut incoming) = self.incoming.take() else { return };
        incoming.filled += count;
        if incoming.filled == incoming.buffer.bytes().len() {
            begun.push((incoming.request, Some(incoming.buffer)));
        } else {
            self.incoming = Some(incoming);
        }
    }

    fn understand(&mut self, input: &[u8], pool: &mut Pool, begun: &mut Vec<(Request, Option<Buffer>)>) {
        let mut rest = input;
        while !rest.is_empty() && !self.over {
            if self.unwanted > 0 {
                let skipped = self.unwanted.min(rest.len());
                self.unwanted -= skipped;
                rest = &rest[skipped..];
            } else if let Some(incoming) = &mut self.incoming {
                let target = &mut incoming.buffer.bytes_mut()[incoming.filled..];
                let count = target.len().min(rest.len());
                target[..count].copy_from_slice(&rest[..count]);
                rest = &rest[count..];
                self.received(count, begun);
            } else if let Phase::Handshake(_) = self.phase {
                match self.shake_hands(rest) {
                    0 => return,
                    used => rest = &rest[used..],
                }
            } else if !self.has_room() {
                break;
            } else {
                let Some(used) = self.next_request(rest, pool, begun) else { break };
                rest = &rest[used..];
            }
        }
        // At most one read's worth: reading stops while there is a backlog that is
        // not a mere beginning of a message.
        self.backlog.extend_from_slice(rest);
    }

    /// Takes the next messages of the handshake; says how many bytes are done with.
    fn shake_hands(&mut self, rest: &[u8]) -> usize {
        let Phase::Handshake(handshake) = &mut self.phase else { return 0 };
        let mut out = Vec::new();
        let (used, step) = handshake.take(&self.export.offer(), rest, &mut out);
        if !out.is_empty() {
            self.answers.push_back(Answer::Bytes(out));
        }
        match step {
            Step::More => {
                self.backlog.extend_from_slice(&rest[used..]);
                return 0;
            }
            Step::Transmit(agreed) => self.phase = Phase::Transmission(agreed),
            Step::Close => self.over = true,
        }
        used
    }

    /// Takes the next request's header; `None` when it is not whole.
    fn next_request(
        &mut self,
        rest: &[u8],
        pool: &mut Pool,
        begun: &mut Vec<(Request, Option<Buffer>)>,
    ) -> Option<usize> {
        let header = rest.first_chunk::<HEADER_BYTES>()?;
        let (used, until_ns) = match self.visit {
            None => (HEADER_BYTES, None),
            Some(_) => {
                let whole = rest.first_chunk::<REQUEST_BYTES>()?;
                (REQUEST_BYTES, whole.last_chunk().copied().map(u64::from_be_bytes))
            }
        };
        match Request::parse(header) {
            None => self.over = true,
            Some(mut request) => {
                request.until_ns = until_ns;
                let length = request.payload() as usize;
                self.requests += 1;
                self.bytes += request.data_bytes();
                if length == 0 {
                    begun.push((request, None));
                } else if length > crate::nbd::MAX_REQUEST_BYTES as usize {
                    self.unwanted = length;
                    begun.push((request, None));
                } else {
                    self.incoming = Some(Incoming { request, buffer: pool.get(length), filled: 0 });
                }
            }
        }
        Some(used)
    }

    /// A request is answered, and its data, if any, goes with the answer.
    pub(crate) fn answer(&mut self, request: &Request, head: Head, data: Option<Buffer>) {
        self.requests -= 1;
        if data.is_none() {
            self.bytes -= request.data_bytes();
        }
        let head = match &self.visit {
            None => head,
            Some(visit) => head.stamped(visit.judge.0.now_ns()),
        };
        self.answers.push_back(Answer::Reply { head, data });
    }

    /// As [`Connection::answer`], with bytes that follow the head.
    pub(crate) fn answer_with(&mut self, request: &Request, head: Head, bytes: Vec<u8>) {
        self.answer(request, head, None);
        self.answers.push_back(Answer::Bytes(bytes));
    }

    /// Sends as much as the socket takes.
    pub(crate) fn send(&mut self, pool: &mut Pool) {
        while !self.answers.is_empty() && !self.broken {
            let mut pieces = Vec::with_capacity(PIECES);
            for answer in self.answers.iter().take(PIECES / 2) {
                match answer {
                    Answer::Bytes(bytes) => pieces.push(IoSlice::new(bytes)),
                    Answer::Reply { head, data } => {
                        pieces.push(IoSlice::new(head.as_bytes()));
                        pieces.extend(data.iter().map(|data| IoSlice::new(data.bytes())));
                    }
                }
            }
            let mut pieces = &mut pieces[..];
            IoSlice::advance_slices(&mut pieces, self.sent);
            match self.stream.write_vectored(pieces) {
                Ok(count) => self.was_sent(count, pool),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.broken = true,
            }
        }
        if let Stream::Far(pipe) = &mut self.stream {
            match pipe.flush() {
                Ok(()) => self.unflushed = false,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.unflushed = true,
                Err(_) => self.broken = true,
            }
        }
    }

    fn was_sent(&mut self, count: usize, pool: &mut Pool) {
        self.sent += count;
        while let Some(first) = self.answers.front() {
            let length = match first {
                Answer::Bytes(bytes) => bytes.len(),
                Answer::Reply { head, data } => {
                    head.as_bytes().len() + data.as_ref().map_or(0, |data| data.bytes().len())
                }
            };
            if self.sent < length {
                return;
            }
            self.sent -= length;
            if let Some(Answer::Reply { data: Some(data), .. }) = self.answers.pop_front() {
                self.bytes -= data.bytes().len();
                pool.put(data);
            }
        }
    }

    /// Whether something waits to be sent.
    pub(crate) fn has_answers(&self) -> bool {
        !self.answers.is_empty() || self.unflushed
    }
}

impl Request {
    /// The data that moves for it, in bytes.
    fn data_bytes(&self) -> usize {
        match self.command {
            crate::nbd::Command::Read => (self.length as usize).min(crate::nbd::MAX_REQUEST_BYTES as usize),
            _ => self.payload() as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::{DiskSpec, Open};
    use crate::nbd::Command;

    fn message(flags: u16, kind: u16, cookie: u64, length: u32) -> Vec<u8> {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(0_u64.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    #[test]
    fn messages_may_come_in_pieces_of_any_size() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let spec = DiskSpec { name: "disk".into(), path: file.path().into(), read_only: false };
        let export = Arc::new(Export::open(&spec, Arc::new(Open)).unwrap());
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        bytes.extend(b"IHAVEOPT");
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 4]);
        bytes.extend(b"disk");
        for cookie in 0..3 {
            bytes.extend(message(0, 1, cookie, 700));
            bytes.extend([cookie as u8 + 1; 700]);
            bytes.extend(message(0, 3, 10 + cookie, 0));
        }
        for size in [1, 5, 28, 333, bytes.len()] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let mut connection = Connection::new(ours, export.clone(), 0);
            let (mut scratch, mut pool, mut begun) = (vec![0; 4096], Pool::default(), Vec::new());
            for piece in bytes.chunks(size) {
                theirs.write_all(piece).unwrap();
                assert_eq!(connection.read(&mut scratch, &mut pool, &mut begun), Input::Drained);
            }
            let cookies: Vec<_> = begun.iter().map(|(request, _)| request.cookie).collect();
            assert_eq!(cookies, [0, 10, 1, 11, 2, 12], "in pieces of {size}");
            for (request, data) in begun {
                match data {
                    None => assert_eq!(request.command, Command::Flush),
                    Some(data) => assert!(data.bytes().iter().all(|byte| *byte == request.cookie as u8 + 1)),
                }
            }
        }
    }
}
