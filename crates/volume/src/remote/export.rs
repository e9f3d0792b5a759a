//! The dialect of NBD servers.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

use super::{Certainty, Dialect, Remote};
use crate::nbd::client::{self, Address, Asking, Described, Server};
use crate::piece::{Op, Piece};
use crate::pipe::{Pipe, read_exact, write_all};

/// How long it may take to connect, the handshake included.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
/// How long what was sent may stay unacknowledged before the kernel ends a connection,
/// in milliseconds.
const UNACKNOWLEDGED_MS: u32 = 5_000;
/// What a server had taken in when a connection broke, it has done by then. The
/// protocol has no way to ask: see decision 0024.
pub const SETTLES_WITHIN: Duration = Duration::from_secs(1);
/// The same where the server's side ended the connection: it does not stand still, and a
/// process that was killed has its connections open until its threads' I/O is over (see
/// decision 0031).
const SETTLES_AFTER_END: Duration = Duration::from_millis(300);

/// An export, as it is connected to.
pub(crate) struct Export {
    address: Address,
    described: Described,
}

/// Connects to an export.
///
/// # Errors
/// It cannot be reached, or is none that several hosts can share.
pub(crate) fn connect(address: Address) -> io::Result<(Remote, Described)> {
    let (pipe, described) = open(&address, Instant::now() + CONNECT_WITHIN)?;
    let dialect = Export { address, described };
    Ok((Remote::start(dialect, Some(pipe))?, described))
}

fn open(address: &Address, until: Instant) -> io::Result<(Box<dyn Pipe>, Described)> {
    let mut pipe = reach(&address.server, until)?;
    let described = shake_hands(&mut *pipe, &address.export, until)?;
    match described.objection() {
        Some(objection) => Err(io::Error::new(io::ErrorKind::Unsupported, objection.to_string())),
        None => Ok((pipe, described)),
    }
}

fn reach(server: &Server, until: Instant) -> io::Result<Box<dyn Pipe>> {
    let (host, port) = match server {
        Server::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_nonblocking(true)?;
            return Ok(Box::new(stream));
        }
        Server::Tcp(host, port) => (host.as_str(), *port),
    };
    let mut failed = io::Error::new(io::ErrorKind::NotFound, format!("the host {host:?} has no address"));
    for address in (host, port).to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                setsockopt(&stream, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS)?;
                // When this process dies, nothing more of what it wrote leaves this host.
                Pipe::give_up(&stream);
                return Ok(Box::new(stream));
            }
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

fn shake_hands(pipe: &mut dyn Pipe, export: &str, until: Instant) -> io::Result<Described> {
    let mut greeting = [0; 18];
    read_exact(pipe, &mut greeting, until)?;
    let mut out = Vec::new();
    let mut asking = Asking::begin(&greeting, export, &mut out)?;
    write_all(pipe, &out, until)?;
    loop {
        let mut head = [0; 20];
        read_exact(pipe, &mut head, until)?;
        let (kind, length) = Asking::head(&head)?;
        let mut body = vec![0; length as usize];
        read_exact(pipe, &mut body, until)?;
        if let Some(described) = asking.reply(kind, &body)? {
            return Ok(described);
        }
    }
}

impl Dialect for Export {
    fn connect(&mut self, until: Instant) -> io::Result<Box<dyn Pipe>> {
        let (pipe, described) = open(&self.address, until)?;
        if described.size < self.described.size || described.block > self.described.block {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the export is another one now"));
        }
        self.described = Described { size: self.described.size, ..described };
        Ok(pipe)
    }

    fn request(&mut self, cookie: u64, piece: &Piece, out: &mut Vec<u8>) -> io::Result<()> {
        let length = u32::try_from(piece.length);
        match length {
            Ok(length) if self.described.knows(piece.op) => {
                let (at, length) = if piece.op == Op::Sync { (0, 0) } else { (piece.at, length) };
                out.extend(client::request(piece.op, self.described.knows_fua(), cookie, at, length));
                Ok(())
            }
            _ => Err(io::Error::from_raw_os_error(nix::libc::EOPNOTSUPP)),
        }
    }

    fn needs_sync(&self) -> bool {
        !self.described.knows_fua()
    }

    fn reply_bytes(&self) -> usize {
        client::REPLY_BYTES
    }

    fn reply(&mut self, head: &[u8]) -> io::Result<Option<(u64, io::Result<()>)>> {
        client::outcome(head.first_chunk().ok_or(io::ErrorKind::InvalidData)?)
    }

    fn certainty(&self) -> Certainty {
        Certainty::After { ended: SETTLES_AFTER_END, silent: SETTLES_WITHIN }
    }
}
