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

use crate::piece::{Back, Ended, Piece};
use crate::pipe::Pipe;

pub(crate) use export::{SETTLES_WITHIN, connect};

/// When it is certain that a request whose connection broke is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Certainty {
    /// After so long: whatever the server had taken in, it has done by then.
    After(Duration),
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
    ///
    /// # Errors
    /// It is none: nothing more can be understood.
    fn reply(&mut self, head: &[u8]) -> io::Result<(u64, io::Result<()>)>;

    /// When requests of a broken connection are over.
    fn certainty(&self) -> Certainty;
}

/// The way to a storage that another process has. When it is dropped, its connection
/// ends after everything that is under way.
#[derive(Debug)]
pub(crate) struct Remote(Arc<Shared>);

struct Shared {
    todo: Mutex<Todo>,
    bell: EventFd,
}

#[derive(Default)]
struct Todo {
    pieces: VecDeque<(Piece, Back)>,
    /// Nobody can ask for more.
    ended: bool,
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
        std::thread::Builder::new().name("remote".into()).stack_size(256 << 10).spawn(move || worker.run())?;
        Ok(Remote(shared))
    }

    /// Asks for something; `back` hears of its end.
    pub(crate) fn submit(&self, piece: Piece, back: Back) {
        self.0.todo().pieces.push_back((piece, back));
        let _ = self.0.bell.write(1);
    }

    /// Asks for something and waits for its end.
    pub(crate) fn wait(&self, piece: Piece) -> Ended {
        let (tell, told) = sync_channel(1);
        let (op, at, length) = (piece.op, piece.at, piece.length);
        self.submit(piece, Back::Caller(tell));
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
