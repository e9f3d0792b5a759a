//! Links to the volume servers of other nodes: TCP with mutual TLS, by the certificates
//! that the agents use.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdfast_core::NodeId;
use holdfast_volume::Pipe;
use holdfast_volume::link::{Dial, Hello, hear};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

use crate::identity::{node_host, node_of_certificate};

/// What a connection takes before it is sent, in bytes.
const UNSENT_BYTES: usize = 256 << 10;
/// One address is tried for so long at least, if there are several.
const TRY_WITHIN: Duration = Duration::from_millis(150);
/// How long a node that connects may take until it has said what it wants.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// How long what was sent may stay unacknowledged, in milliseconds.
const UNACKNOWLEDGED_MS: u32 = 5_000;
/// Nodes that may be about to say what they want at one time.
const GREETED: usize = 64;
/// How long accepting pauses when the process is out of descriptors.
const BREATH: Duration = Duration::from_millis(100);

/// A connection with TLS that never blocks.
struct Tls {
    connection: Connection,
    stream: TcpStream,
}

impl Tls {
    /// Shakes hands on a socket that blocks, and has it block no more.
    fn new(mut connection: Connection, mut stream: TcpStream, until: Instant) -> io::Result<Tls> {
        stream.set_nodelay(true)?;
        setsockopt(&stream, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS)?;
        connection.set_buffer_limit(Some(UNSENT_BYTES));
        while connection.is_handshaking() || connection.wants_write() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_read_timeout(Some(left))?;
            stream.set_write_timeout(Some(left))?;
            connection.complete_io(&mut stream)?;
        }
        stream.set_nonblocking(true)?;
        Ok(Tls { connection, stream })
    }

    fn peer(&self) -> Option<NodeId> {
        self.connection.peer_certificates().and_then(<[_]>::first).and_then(node_of_certificate)
    }

    fn send(&mut self) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut self.stream) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Read for Tls {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome,
            }
            if self.connection.read_tls(&mut self.stream)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let taken = self.connection.process_new_packets();
            taken.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

impl Write for Tls {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let would_block = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock => Ok(()),
            _ => Err(error),
        };
        let mut taken = self.connection.writer().write(from)?;
        self.send().or_else(would_block)?;
        if taken == 0 {
            taken = self.connection.writer().write(from)?;
            self.send().or_else(would_block)?;
        }
        match taken {
            0 if !from.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
            taken => Ok(taken),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

impl Pipe for Tls {
    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn give_up(&self) {
        self.stream.give_up();
    }
}

/// Makes connections to the owner of one volume.
pub struct ToOwner {
    /// This node's certificate.
    pub tls: Arc<ClientConfig>,
    /// The owner.
    pub node: NodeId,
    /// Where its volume server answers, the best first; may change.
    pub addresses: Arc<Mutex<Vec<SocketAddr>>>,
    /// A file that is there while something may be under way at the owner: a life of this
    /// server that does not know of it has to ask.
    pub mark: PathBuf,
    /// It is.
    pub marked: bool,
}

impl Dial for ToOwner {
    fn dial(&mut self, within: Duration) -> io::Result<Box<dyn Pipe>> {
        let until = Instant::now() + within;
        let addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut failed = io::Error::new(io::ErrorKind::NotFound, "no address of the owner is known");
        let host = ServerName::try_from(node_host(self.node)).map_err(io::Error::other)?;
        for (turn, address) in addresses.iter().enumerate() {
            let left = until.saturating_duration_since(Instant::now());
            let share = (left / (addresses.len() - turn) as u32).max(TRY_WITHIN);
            let connected = TcpStream::connect_timeout(address, share).and_then(|stream| {
                let connection = ClientConnection::new(self.tls.clone(), host.clone()).map_err(io::Error::other)?;
                Tls::new(connection.into(), stream, Instant::now() + share)
            });
            match connected {
                Ok(tls) => return Ok(Box::new(tls)),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    fn in_use(&mut self, is: bool) {
        if is != self.marked {
            let done = match is {
                true => std::fs::write(&self.mark, []),
                false => std::fs::remove_file(&self.mark),
            };
            match done {
                Ok(()) => self.marked = is,
                Err(error) => tracing::warn!(mark = %self.mark.display(), %error, "a link is not marked as it is"),
            }
        }
    }
}

/// Lets nodes in at a port, for ever; `met` gets each with what it wants, in a thread of
/// its own.
///
/// # Errors
/// The port is not free.
pub fn listen(
    port: u16,
    tls: Arc<ServerConfig>,
    met: impl Fn(Hello, Box<dyn Pipe>) + Clone + Send + 'static,
) -> io::Result<()> {
    let any = |address: IpAddr| TcpListener::bind((address, port));
    let listener = any(Ipv6Addr::UNSPECIFIED.into()).or_else(|_| any(Ipv4Addr::UNSPECIFIED.into()))?;
    let greeted = Arc::new(AtomicUsize::new(0));
    let body = move || {
        loop {
            let Ok((stream, _)) = listener.accept() else {
                std::thread::sleep(BREATH);
                continue;
            };
            if greeted.fetch_add(1, Ordering::SeqCst) >= GREETED {
                greeted.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (tls, met, theirs) = (tls.clone(), met.clone(), greeted.clone());
            let greet = move || {
                let greeting = greet(tls, stream);
                theirs.fetch_sub(1, Ordering::SeqCst);
                match greeting {
                    Ok((hello, pipe)) => met(hello, pipe),
                    Err(error) => tracing::debug!(%error, "a link that did not come about"),
                }
            };
            if std::thread::Builder::new().name("link".into()).stack_size(1 << 20).spawn(greet).is_err() {
                greeted.fetch_sub(1, Ordering::SeqCst);
            }
        }
    };
    std::thread::Builder::new().name("links".into()).stack_size(128 << 10).spawn(body).map(drop)
}

fn greet(tls: Arc<ServerConfig>, stream: TcpStream) -> io::Result<(Hello, Box<dyn Pipe>)> {
    let connection = ServerConnection::new(tls).map_err(io::Error::other)?;
    let mut tls = Tls::new(connection.into(), stream, Instant::now() + HELLO_WITHIN)?;
    let node = tls.peer().ok_or_else(|| io::Error::other("it shows no certificate of a node"))?;
    let hello = hear(&mut tls, HELLO_WITHIN)?;
    if hello.node != node.0 {
        return Err(io::Error::other(format!("node {node} says that it is node {}", hello.node)));
    }
    Ok((hello, Box::new(tls)))
}
