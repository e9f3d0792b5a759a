//! The half of a link that asks.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Hello, Lease, REPLY_BYTES, REQUEST_BYTES, WELCOME_BYTES, Welcome, deadline};
use crate::nbd::client;
use crate::piece::{Op, Piece};
use crate::pipe::{Pipe, read_exact, write_all};
use crate::remote::{Certainty, Dialect, LATE, Remote};

/// An owner that says nothing for so long is not there any more: it says something each
/// 100 ms.
const SILENCE: Duration = Duration::from_secs(1);
/// A link that nobody needed for so long is closed.
const REST: Duration = Duration::from_secs(10);

/// Makes connections to the owner of a volume.
pub trait Dial: Send + 'static {
    /// Connects, by whichever of its addresses answers, and makes sure who it is.
    ///
    /// # Errors
    /// None does, or not within so long.
    fn dial(&mut self, within: Duration) -> io::Result<Box<dyn Pipe>>;

    /// There may be something under way at the owner from now on; or nothing any more.
    fn in_use(&mut self, is: bool);
}

/// How the owner of a volume is asked.
pub struct Link {
    /// Makes the connections.
    pub dial: Box<dyn Dial>,
    /// This node's lease.
    pub lease: Arc<dyn Lease>,
    /// The volume.
    pub volume: Uuid,
    /// This node.
    pub node: u64,
    /// Its term.
    pub term: u64,
    /// The ownership.
    pub epoch: u64,
}

/// What an owner says of a LUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcomed {
    /// The LUN's block size in bytes.
    pub block: u32,
    /// Its size in bytes.
    pub bytes: u64,
}

impl Link {
    /// Asks what the LUN is like; whatever this node had asked for over earlier links is
    /// over when this is answered.
    ///
    /// # Errors
    /// The owner cannot be reached, or refuses.
    pub fn look(&mut self, within: Duration) -> io::Result<Welcomed> {
        let (_, Welcome { block, bytes, .. }, _) = self.greet(Instant::now() + within)?;
        Ok(Welcomed { block, bytes })
    }

    fn greet(&mut self, until: Instant) -> io::Result<(Box<dyn Pipe>, Welcome, u64)> {
        let mut pipe = self.dial.dial(until.saturating_duration_since(Instant::now()))?;
        let Link { volume, node, term, epoch, .. } = *self;
        let hello = Hello { volume, node, term, epoch, number: self.lease.now_ns() };
        write_all(&mut *pipe, &hello.encode(), until)?;
        let mut answer = [0; WELCOME_BYTES];
        read_exact(&mut *pipe, &mut answer, until)?;
        let came = self.lease.now_ns();
        let welcome = Welcome::decode(&answer).ok_or(io::ErrorKind::InvalidData)?;
        match welcome.refused {
            Some(why) => Err(io::Error::new(io::ErrorKind::PermissionDenied, why)),
            None => Ok((pipe, welcome, came)),
        }
    }

    pub(crate) fn start(self) -> io::Result<Remote> {
        Remote::start(Asking { link: self, stamp_ns: 0, came_ns: 0 }, None)
    }
}

struct Asking {
    link: Link,
    /// The owner's clock, as it was when the last message was written, and this node's
    /// when that came.
    stamp_ns: u64,
    came_ns: u64,
}

impl Dialect for Asking {
    fn connect(&mut self, until: Instant) -> io::Result<Box<dyn Pipe>> {
        let (pipe, welcome, came) = self.link.greet(until)?;
        (self.stamp_ns, self.came_ns) = (welcome.stamp_ns, came);
        Ok(pipe)
    }

    fn request(&mut self, cookie: u64, piece: &Piece, out: &mut Vec<u8>) -> io::Result<()> {
        let late = || io::Error::from_raw_os_error(LATE);
        let until = deadline(&*self.link.lease, self.stamp_ns, self.came_ns).ok_or_else(late)?;
        let length = u32::try_from(piece.length).map_err(|_| io::Error::from_raw_os_error(nix::libc::EOPNOTSUPP))?;
        let (at, length) = if piece.op == Op::Sync { (0, 0) } else { (piece.at, length) };
        self.link.dial.in_use(true);
        out.extend(client::request(piece.op, true, cookie, at, length));
        out.extend(until.to_be_bytes());
        debug_assert_eq!(out.len(), REQUEST_BYTES);
        Ok(())
    }

    fn needs_sync(&self) -> bool {
        false
    }

    fn reply_bytes(&self) -> usize {
        REPLY_BYTES
    }

    fn reply(&mut self, head: &[u8]) -> io::Result<Option<(u64, io::Result<()>)>> {
        let (head, stamp) = head.split_first_chunk().ok_or(io::ErrorKind::InvalidData)?;
        let stamp = stamp.first_chunk().ok_or(io::ErrorKind::InvalidData)?;
        (self.stamp_ns, self.came_ns) = (u64::from_be_bytes(*stamp), self.link.lease.now_ns());
        client::outcome(head)
    }

    fn certainty(&self) -> Certainty {
        Certainty::NextConnection
    }

    fn connects_within(&self) -> Duration {
        Duration::from_secs(2)
    }

    fn silence(&self) -> Option<Duration> {
        Some(SILENCE)
    }

    fn rest(&self) -> Option<Duration> {
        Some(REST)
    }

    fn closed(&mut self) {
        self.link.dial.in_use(false);
    }
}
