//! NBD, the network block device protocol, as far as QEMU speaks it.
//!
//! Numbers and rules are those of the protocol's description, `doc/proto.md` of
//! the NetworkBlockDevice/nbd project. Everything here is bytes in, bytes out; the
//! sockets are the engine's and [`crate::remote`]'s.

pub(crate) mod client;
mod handshake;
mod reply;
mod request;

pub use handshake::{Handshake, Negotiated, Offer, Step};
pub use reply::{Extent, Head};
pub use request::{Command, HEADER_BYTES, Request};

/// The longest read or write that is served, in bytes.
pub const MAX_REQUEST_BYTES: u32 = 32 << 20;

/// What a request can fail with; the protocol's numbers, which are Linux's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: a write to what is read-only.
    Permission = 1,
    /// The storage failed.
    Io = 5,
    /// The request makes no sense.
    Invalid = 22,
    /// The storage is full.
    NoSpace = 28,
    /// It came after the lease of who asked for it.
    Late = 62,
    /// There is no path to the storage from here.
    NoPath = 67,
    /// Not as wished, and slower ways were ruled out.
    NotSupported = 95,
    /// The server goes away.
    Shutdown = 108,
}

impl Errno {
    /// What the system's error becomes on the wire.
    pub fn of(error: &std::io::Error) -> Errno {
        match error.raw_os_error().map(nix::errno::Errno::from_raw) {
            Some(nix::errno::Errno::ENOSPC | nix::errno::Errno::EDQUOT | nix::errno::Errno::EFBIG) => Errno::NoSpace,
            Some(nix::errno::Errno::EINVAL) => Errno::Invalid,
            Some(nix::errno::Errno::EOPNOTSUPP) => Errno::NotSupported,
            Some(nix::errno::Errno::EPERM | nix::errno::Errno::EROFS) => Errno::Permission,
            _ => Errno::Io,
        }
    }
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*first)
}

fn take_u16(bytes: &mut &[u8]) -> Option<u16> {
    take(bytes).map(u16::from_be_bytes)
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    take(bytes).map(u32::from_be_bytes)
}

fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    take(bytes).map(u64::from_be_bytes)
}
