//! The link between the volume servers of two nodes: one does I/O on a LUN for the
//! other, which has no path to it.
//!
//! ```text
//!  asker ─ hello ─▶ owner        who asks, for which volume, under whose ownership
//!        ◀ welcome ─             when nothing is under way of the asker's earlier links
//!        ─ requests, deadline ─▶ as NBD has them, with a time of the owner's clock
//!        ◀ replies, stamp ─      as NBD has them, with the owner's clock
//!        ◀ pings, stamp ─        when there is nothing to reply to
//! ```
//! Nothing may be done for a node after its lease. The asker knows when that ends by its
//! own clock; the stamps tell it what that is by the owner's: a stamp was taken before it
//! came here, so what is left of the lease, added to it, is too early rather than too
//! late. The owner looks at the deadline, and at its own lease, before each piece that it
//! hands to its storage (docs/decisions/0024).

mod ask;
mod guests;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

pub use ask::{Dial, Link, Welcomed};
pub use guests::{Guest, Guests, Refused};

use crate::export::Fence;
use crate::nbd::HEADER_BYTES;
use crate::pipe::{Pipe, read_exact, write_all};

/// Length of the message with which a link begins.
pub const HELLO_BYTES: usize = 64;
/// Length of the answer to it.
pub const WELCOME_BYTES: usize = 32;
/// Length of a request without its data.
pub(crate) const REQUEST_BYTES: usize = HEADER_BYTES + 8;
/// Length of a reply without its data.
pub(crate) const REPLY_BYTES: usize = 16 + 8;

const HELLO: &[u8; 8] = b"HFLINK01";
const WELCOME: &[u8; 8] = b"HFLINK1W";

/// A node's lease, by its own clock. Asked before each piece: must neither block nor take
/// long.
pub trait Lease: Send + Sync + 'static {
    /// The time that has passed since this host was started, in nanoseconds.
    fn now_ns(&self) -> u64;
    /// When the lease ends by that clock; 0: there is none.
    fn ends_ns(&self) -> u64;
}

/// The first message of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The volume.
    pub volume: Uuid,
    /// Who asks.
    pub node: u64,
    /// In which of its terms.
    pub term: u64,
    /// The ownership that it knows of.
    pub epoch: u64,
    /// Greater than that of any earlier link of the node in this term.
    pub number: u64,
}

/// The answer to a [`Hello`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Why not, if so.
    pub refused: Option<Refused>,
    /// The LUN's block size in bytes.
    pub block: u32,
    /// The LUN's size in bytes.
    pub bytes: u64,
    /// The owner's clock.
    pub stamp_ns: u64,
}

/// What a node that connected wants.
///
/// # Errors
/// It does not say, or not within so long.
pub fn hear(pipe: &mut dyn Pipe, within: Duration) -> io::Result<Hello> {
    let mut bytes = [0; HELLO_BYTES];
    read_exact(pipe, &mut bytes, Instant::now() + within)?;
    Hello::decode(&bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Answers it. The guest that was let in goes with its pipe to
/// [`Server::let_in`](crate::Server::let_in) afterwards.
///
/// # Errors
/// It does not take the answer, or not within so long.
pub fn answer(pipe: &mut dyn Pipe, welcome: &Welcome, within: Duration) -> io::Result<()> {
    write_all(pipe, &welcome.encode(), Instant::now() + within)
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

impl Hello {
    /// As it travels.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..8].copy_from_slice(HELLO);
        bytes[8..24].copy_from_slice(self.volume.as_bytes());
        for (at, value) in [(24, self.node), (32, self.term), (40, self.epoch), (48, self.number)] {
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        bytes
    }

    /// Understands it; `None` if it is none.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Hello> {
        let value = |at| number(bytes, at).map(u64::from_be_bytes);
        (bytes[..8] == HELLO[..]).then_some(())?;
        let volume = Uuid::from_bytes(number(bytes, 8)?);
        Some(Hello { volume, node: value(24)?, term: value(32)?, epoch: value(40)?, number: value(48)? })
    }
}

impl Welcome {
    /// As it travels.
    pub fn encode(&self) -> [u8; WELCOME_BYTES] {
        let mut bytes = [0; WELCOME_BYTES];
        bytes[..8].copy_from_slice(WELCOME);
        bytes[8..12].copy_from_slice(&self.refused.map_or(0, |why| why as u32).to_be_bytes());
        bytes[12..16].copy_from_slice(&self.block.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.bytes.to_be_bytes());
        bytes[24..].copy_from_slice(&self.stamp_ns.to_be_bytes());
        bytes
    }

    /// Understands it; `None` if it is none.
    pub fn decode(bytes: &[u8; WELCOME_BYTES]) -> Option<Welcome> {
        let value = |at| number(bytes, at).map(u64::from_be_bytes);
        (bytes[..8] == WELCOME[..]).then_some(())?;
        let refused = match number(bytes, 8).map(u32::from_be_bytes)? {
            0 => None,
            why => Some(Refused::of(why)?),
        };
        let block = number(bytes, 12).map(u32::from_be_bytes)?;
        Some(Welcome { refused, block, bytes: value(16)?, stamp_ns: value(24)? })
    }
}

/// The last moment, by the owner's clock, at which something may be done for this node:
/// `None` when its lease is over. A message with the owner's `stamp_ns` came when this
/// node's clock was at `came_ns`.
pub(crate) fn deadline(lease: &dyn Lease, stamp_ns: u64, came_ns: u64) -> Option<u64> {
    let ends = lease.ends_ns();
    (lease.now_ns() < ends && came_ns <= ends).then(|| stamp_ns.saturating_add(ends - came_ns))
}

/// How requests of a link are judged by who does them.
#[derive(Clone)]
pub(crate) struct Judge(pub(crate) Arc<dyn Lease>);

impl Judge {
    /// Whether something that is not to be done after `until_ns` may be done now.
    pub(crate) fn may(&self, until_ns: u64) -> bool {
        let now = self.0.now_ns();
        now < until_ns && now < self.0.ends_ns()
    }
}

/// The right to do one request of a link.
pub(crate) struct Until {
    pub(crate) judge: Judge,
    pub(crate) until_ns: u64,
}

impl Fence for Until {
    fn may_write(&self) -> bool {
        self.judge.may(self.until_ns)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn greetings_are_read_as_they_were_written() {
        let hello = Hello { volume: Uuid::from_u128(9), node: 1, term: 2, epoch: 3, number: 4 };
        assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        for refused in [None, Some(Refused::NotOwner), Some(Refused::Outdated), Some(Refused::Busy)] {
            let welcome = Welcome { refused, block: 512, bytes: 1 << 40, stamp_ns: 77 };
            assert_eq!(Welcome::decode(&welcome.encode()), Some(welcome));
        }
        assert_eq!(Hello::decode(&[0; HELLO_BYTES]), None);
    }

    struct At(u64, u64);

    impl Lease for At {
        fn now_ns(&self) -> u64 {
            self.0
        }

        fn ends_ns(&self) -> u64 {
            self.1
        }
    }

    proptest! {
        /// Whatever the clocks show and however long a message takes: no deadline is after
        /// the lease.
        #[test]
        fn a_deadline_is_never_after_the_lease(
            owner_ahead in 0..1_000_000_u64,
            sent in 0..1_000_000_u64,
            travels in 0..1_000_000_u64,
            waits in 0..1_000_000_u64,
            ends in 0..4_000_000_u64,
        ) {
            let (came, now) = (sent + travels, sent + travels + waits);
            if let Some(until) = deadline(&At(now, ends), sent + owner_ahead, came) {
                prop_assert!(now < ends);
                prop_assert!(until <= ends + owner_ahead);
            } else {
                prop_assert!(now >= ends);
            }
        }
    }
}
