//! Storage that another process has, reached by a connection: an export of an NBD
//! server.
//!
//! ```text
//!  pieces ─▶ [Remote] ─ queue ─▶ [Worker] ─ requests ─▶ server
//!    ▲                              │
//!    └──────── ended ◀──────────────┴◀─────── replies ──
//! ```
//! A piece is told to be over when nothing of it can happen any more: one of which the
//! connection has left open whether the server has it, only when that is certain
//! ([`Certainty`]).

mod export;
mod worker;

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::export::Fence;
use crate::piece::{Back, Ended, Piece};
use crate::pipe::Pipe;

/// How a request ends that came after the right to do it.
pub(crate) const LATE: i32 = nix::libc::ETIME;

pub use export::SETTLES_WITHIN;
pub(crate) use export::connect;

/// When it is certain that a request whose connection broke is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Certainty {
    /// After so long: whatever the server had taken in, it has done by then.
    After {
        /// It ended the connection itself: it, or its host, was at work just then.
        ended: Duration,
        /// It was silent.
        silent: Duration,
    },
    /// When the server has let the next connection in: it does not before it has ended
    /// what came over earlier ones.
    NextConnection,
}

/// What is said on a connection.
pub(crate) trait Dialect: Send + 'static {
    /// Connects, and agrees on how to go on.
    ///
    /// # Errors
    /// That did not work, or not until then.
    fn connect(&mut self, until: Instant) -> io::Result<Box<dyn Pipe>>;

    /// The head of a request, in `out`; the data of a write follow it.
    ///
    /// # Errors
    /// It cannot be asked for.
    fn request(&mut self, cookie: u64, piece: &Piece, out: &mut Vec<u8>) -> io::Result<()>;

    /// Whether a write that is to be durable needs a [`Sync`](crate::piece::Op::Sync) after it.
    fn needs_sync(&self) -> bool;

    /// How long the head of a reply is, in bytes.
    fn reply_bytes(&self) -> usize;

    /// Whose reply it is, and what came of it; the data of a read that went well follow.
    /// `None`: nobody's, the server only says that it is there.
    ///
    /// # Errors
    /// It is none: nothing more can be understood.
    fn reply(&mut self, head: &[u8]) -> io::Result<Option<(u64, io::Result<()>)>>;

    /// When requests of a broken connection are over.
    fn certainty(&self) -> Certainty;

    /// How long it may take to connect again.
    fn connects_within(&self) -> Duration {
        Duration::from_millis(500)
    }

    /// A server that says nothing for so long is not there any more.
    fn silence(&self) -> Option<Duration> {
        None
    }

    /// A connection that nobody needed for so long is closed.
    fn rest(&self) -> Option<Duration> {
        None
    }

    /// The connection is closed in order, with nothing under way.
    fn closed(&mut self) {}
}

/// The way to a storage that another process has. When it is dropped, its connection
/// ends after everything that is under way.
#[derive(Debug)]
pub(crate) struct Remote(Arc<Shared>);

struct Shared {
    todo: Mutex<Todo>,
    bell: EventFd,
}

/// A piece that was asked for.
struct Asked {
    piece: Piece,
    /// Looked at when it is about to be sent.
    fence: Option<Arc<dyn Fence>>,
    back: Back,
}

#[derive(Default)]
struct Todo {
    pieces: VecDeque<Asked>,
    /// Nobody can ask for more.
    ended: bool,
    /// The connection is to be given up.
    give_up: bool,
    /// Whatever the server had is certainly over.
    is_over: bool,
}

impl Shared {
    fn todo(&self) -> MutexGuard<'_, Todo> {
        self.todo.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Remote {
    /// Starts a thread that keeps a connection, and makes it when it is needed.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(crate) fn start(dialect: impl Dialect, pipe: Option<Box<dyn Pipe>>) -> io::Result<Remote> {
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { todo: Mutex::default(), bell });
        let worker = worker::Worker::new(dialect, shared.clone(), pipe);
        std::thread::Builder::new().name("remote".into()).stack_size(1 << 20).spawn(move || worker.run())?;
        Ok(Remote(shared))
    }

    /// Asks for something; `back` hears of its end. It is not sent once `fence` is closed,
    /// and ends with [`LATE`] then.
    pub(crate) fn submit(&self, piece: Piece, fence: Option<Arc<dyn Fence>>, back: Back) {
        self.0.todo().pieces.push_back(Asked { piece, fence, back });
        let _ = self.0.bell.write(1);
    }

    /// Gives the connection up: what is under way comes to an end.
    pub(crate) fn give_up(&self) {
        self.0.todo().give_up = true;
        let _ = self.0.bell.write(1);
    }

    /// The server is gone, and nothing that it had can happen any more.
    pub(crate) fn is_over(&self) {
        self.0.todo().is_over = true;
        let _ = self.0.bell.write(1);
    }

    /// Asks for something and waits for its end.
    pub(crate) fn wait(&self, piece: Piece) -> Ended {
        let (tell, told) = sync_channel(1);
        let (op, at, length) = (piece.op, piece.at, piece.length);
        self.submit(piece, None, Back::Caller(tell));
        told.recv().unwrap_or_else(|_| Ended {
            piece: Piece::without_data(op, at, length),
            outcome: Err(io::ErrorKind::NotConnected.into()),
        })
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.0.todo().ended = true;
        let _ = self.0.bell.write(1);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::piece::Op;

    const NEVER: Duration = Duration::from_secs(3600);

    /// Says a request in one byte, and connects once.
    struct Toy(Certainty);

    impl Dialect for Toy {
        fn connect(&mut self, _: Instant) -> io::Result<Box<dyn Pipe>> {
            Err(io::ErrorKind::ConnectionRefused.into())
        }

        fn request(&mut self, _: u64, _: &Piece, out: &mut Vec<u8>) -> io::Result<()> {
            out.push(1);
            Ok(())
        }

        fn needs_sync(&self) -> bool {
            false
        }

        fn reply_bytes(&self) -> usize {
            1
        }

        fn reply(&mut self, _: &[u8]) -> io::Result<Option<(u64, io::Result<()>)>> {
            Ok(None)
        }

        fn certainty(&self) -> Certainty {
            self.0
        }
    }

    /// A change that the server has, and has not answered.
    fn asked(certainty: Certainty) -> (Remote, UnixStream, std::sync::mpsc::Receiver<Ended>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let remote = Remote::start(Toy(certainty), Some(Box::new(ours))).unwrap();
        let (tell, told) = sync_channel(1);
        remote.submit(Piece::without_data(Op::Trim, 0, 512), None, Back::Caller(tell));
        theirs.read_exact(&mut [0]).unwrap();
        (remote, theirs, told)
    }

    #[test]
    fn who_ends_a_connection_settles_sooner_than_who_is_silent() {
        let (_remote, theirs, told) = asked(Certainty::After { ended: Duration::ZERO, silent: NEVER });
        drop(theirs);
        assert!(told.recv().unwrap().outcome.is_err());

        let (remote, _theirs, told) = asked(Certainty::After { ended: NEVER, silent: Duration::ZERO });
        remote.give_up();
        assert!(told.recv().unwrap().outcome.is_err());
    }
}
