//! The client's half of the protocol: where an export is, the handshake, requests and
//! simple replies.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::handshake::{ACK, GREETING, INFO, INFO_BLOCK_SIZE, INFO_EXPORT, OPT_GO, OPTION, REPLY};
use super::handshake::{HAS_FLAGS, MULTI_CONN, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_ZEROES};
use super::{MAX_REQUEST_BYTES, take_u16, take_u32, take_u64};
use crate::piece::Op;

/// The port that IANA gave to the protocol.
const PORT: u16 = 10809;
/// Length of a simple reply without its data.
pub(crate) const REPLY_BYTES: usize = 16;
/// The longest reply to an option that is read.
pub(crate) const MAX_OPTION_REPLY_BYTES: u32 = 4096;

/// The name that no request has.
pub(crate) const NOBODY: u64 = 0;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// An export of an NBD server, as its address says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) server: Server,
    /// The export's name.
    pub(crate) export: String,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// A host's name or address, and a TCP port.
    Tcp(String, u16),
    /// A unix socket.
    Unix(PathBuf),
}

impl Address {
    /// Understands `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`; `None`:
    /// it is a path to a file or device.
    ///
    /// # Errors
    /// It begins like an address of an export and is none.
    pub(crate) fn parse(text: &Path) -> Option<io::Result<Address>> {
        let text = text.to_str()?;
        let wrong = || {
            let text = format!(
                "{text:?} is no address of an export: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
            );
            io::Error::new(io::ErrorKind::InvalidInput, text)
        };
        if let Some(rest) = text.strip_prefix("nbd://") {
            return Some(Address::tcp(rest).ok_or_else(wrong));
        }
        let rest = text.strip_prefix("nbd+unix://")?;
        let unix = || {
            let (export, socket) = rest.strip_prefix('/')?.split_once("?socket=")?;
            let socket = PathBuf::from(decoded(socket)?);
            socket.is_absolute().then_some(Address { server: Server::Unix(socket), export: decoded(export)? })
        };
        Some(unix().ok_or_else(wrong))
    }

    fn tcp(rest: &str) -> Option<Address> {
        let (server, export) = rest.split_once('/').unwrap_or((rest, ""));
        // An address of IP version 6 stands in brackets.
        let (host, port) = match server.strip_prefix('[') {
            Some(inside) => inside.split_once(']')?,
            None => server.find(':').map_or((server, ""), |at| server.split_at(at)),
        };
        let port = match port {
            "" => PORT,
            port => port.strip_prefix(':')?.parse().ok()?,
        };
        let plain = !host.is_empty() && !host.contains(['@', '?', '#']) && !export.contains(['?', '#']);
        plain.then_some(Address { server: Server::Tcp(host.into(), port), export: decoded(export)? })
    }
}

/// With `%20` and the like replaced by what they stand for.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                (digit(rest.next())? << 4 | digit(rest.next())?) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// What a server says of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Described {
    /// In bytes.
    pub(crate) size: u64,
    /// Requests have to be multiples of it, in bytes.
    pub(crate) block: u32,
    /// What it can do; 0: nothing is known.
    pub(crate) flags: u16,
    /// What it takes at a time, in bytes.
    pub(crate) most: u32,
}

impl Described {
    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn knows_fua(&self) -> bool {
        self.has(SEND_FUA)
    }

    /// Whether the server can be asked for this.
    pub(crate) fn knows(&self, op: Op) -> bool {
        match op {
            Op::Trim => self.has(SEND_TRIM),
            Op::Zero { .. } => self.has(SEND_ZEROES),
            Op::Read | Op::Write { .. } | Op::Sync => true,
        }
    }

    /// Why the export cannot be what several hosts share, if so.
    pub(crate) fn objection(&self) -> Option<Objection> {
        match self {
            _ if self.has(READ_ONLY) => Some(Objection::ReadOnly),
            _ if !self.has(SEND_FLUSH) => Some(Objection::NoFlush),
            _ if !self.has(MULTI_CONN) => Some(Objection::OneConnection),
            _ if self.most < MAX_REQUEST_BYTES => Some(Objection::Small(self.most)),
            _ => None,
        }
    }
}

/// Why an export is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Objection {
    ReadOnly,
    NoFlush,
    OneConnection,
    Small(u32),
}

impl fmt::Display for Objection {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Objection::ReadOnly => to.write_str("the export is read-only"),
            Objection::NoFlush => to.write_str("the export's server cannot flush"),
            Objection::OneConnection => to.write_str(
                "the export's server does not promise that a flush reaches what came over other connections: \
                 let it serve several clients (qemu-nbd --shared=0)",
            ),
            Objection::Small(most) => {
                write!(to, "the export's server takes {most} bytes at a time, and {MAX_REQUEST_BYTES} are needed")
            }
        }
    }
}

/// The client's side of a handshake: what to read next, and what to answer.
#[derive(Debug)]
pub(crate) struct Asking {
    described: Described,
    has_size: bool,
}

impl Asking {
    /// Takes the 18 bytes with which a server begins, and puts the question into `out`.
    ///
    /// # Errors
    /// They are another protocol's, or an older one's.
    pub(crate) fn begin(greeting: &[u8; 18], export: &str, out: &mut Vec<u8>) -> io::Result<Asking> {
        let bytes = &mut &greeting[..];
        let (first, second, flags) = (take_u64(bytes), take_u64(bytes), take_u16(bytes).unwrap_or(0));
        if (first, second) != (Some(GREETING), Some(OPTION)) || flags & 1 == 0 {
            return Err(strange("what answers there is no NBD server that knows the fixed newstyle handshake"));
        }
        // Fixed newstyle, and no zeroes if the server can leave them out.
        out.extend(u32::from(flags & 3).to_be_bytes());
        out.extend(OPTION.to_be_bytes());
        out.extend(OPT_GO.to_be_bytes());
        let asked = INFO_BLOCK_SIZE;
        out.extend((export.len() as u32 + 4 + 4).to_be_bytes());
        out.extend((export.len() as u32).to_be_bytes());
        out.extend(export.as_bytes());
        out.extend(1_u16.to_be_bytes());
        out.extend(asked.to_be_bytes());
        let described = Described { size: 0, block: 512, flags: 0, most: MAX_REQUEST_BYTES };
        Ok(Asking { described, has_size: false })
    }

    /// Takes the 20 bytes at the head of a reply; says of which kind it is, and how many
    /// bytes follow.
    ///
    /// # Errors
    /// It is no reply to what was asked.
    pub(crate) fn head(head: &[u8; 20]) -> io::Result<(u32, u32)> {
        let bytes = &mut &head[..];
        match (take_u64(bytes), take_u32(bytes), take_u32(bytes), take_u32(bytes)) {
            (Some(REPLY), Some(OPT_GO), Some(kind), Some(length)) if length <= MAX_OPTION_REPLY_BYTES => {
                Ok((kind, length))
            }
            _ => Err(strange("the server's answer to the handshake is none")),
        }
    }

    /// Takes a whole reply; says what is served there when that is known.
    ///
    /// # Errors
    /// The export is not there, or the server does not say what it is.
    pub(crate) fn reply(&mut self, kind: u32, body: &[u8]) -> io::Result<Option<Described>> {
        let bytes = &mut &body[..];
        match kind {
            ACK if self.has_size => return Ok(Some(self.described)),
            INFO => match take_u16(bytes) {
                Some(INFO_EXPORT) => {
                    let (Some(size), Some(flags)) = (take_u64(bytes), take_u16(bytes)) else {
                        return Err(strange("the server does not say how large the export is"));
                    };
                    self.described.size = size;
                    self.described.flags = if flags & HAS_FLAGS == 0 { 0 } else { flags };
                    self.has_size = true;
                }
                Some(INFO_BLOCK_SIZE) => {
                    let (least, _, most) = (take_u32(bytes), take_u32(bytes), take_u32(bytes));
                    self.described.block = least.unwrap_or(512).max(512);
                    self.described.most = most.unwrap_or(MAX_REQUEST_BYTES);
                }
                _ => {}
            },
            ACK => return Err(strange("the server does not say how large the export is")),
            error if error >> 31 == 1 => {
                let text = String::from_utf8_lossy(body);
                return Err(io::Error::other(format!(
                    "the server refuses the export: error {}: {text}",
                    error & 0xffff
                )));
            }
            _ => {}
        }
        Ok(None)
    }
}

fn strange(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// A request's head; the data of a write follow it.
pub(crate) fn request(op: Op, fua: bool, cookie: u64, at: u64, length: u32) -> [u8; super::HEADER_BYTES] {
    let (kind, flags): (u16, u16) = match op {
        Op::Read => (0, 0),
        Op::Write { durable } => (1, u16::from(durable && fua)),
        Op::Sync => (3, 0),
        Op::Trim => (4, 0),
        Op::Zero { may_free } => (6, if may_free { 0 } else { 1 << 1 }),
    };
    let mut head = [0; super::HEADER_BYTES];
    head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    head[4..6].copy_from_slice(&flags.to_be_bytes());
    head[6..8].copy_from_slice(&kind.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..24].copy_from_slice(&at.to_be_bytes());
    head[24..].copy_from_slice(&length.to_be_bytes());
    head
}

/// Which request a simple reply is of, and what came of that; `None` for the name that no
/// request has.
///
/// # Errors
/// It is none, after which nothing that the server sends can be understood.
pub(crate) fn outcome(head: &[u8; REPLY_BYTES]) -> io::Result<Option<(u64, io::Result<()>)>> {
    let bytes = &mut &head[..];
    let (Some(REPLY_MAGIC), Some(error), Some(cookie)) = (take_u32(bytes), take_u32(bytes), take_u64(bytes)) else {
        return Err(strange("what the server sends is no reply"));
    };
    // The protocol's numbers are those of Linux.
    let outcome = match i32::try_from(error) {
        Ok(0) => Ok(()),
        number => Err(io::Error::from_raw_os_error(number.unwrap_or(nix::libc::EIO))),
    };
    Ok((cookie != NOBODY).then_some((cookie, outcome)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nbd::{Command, Handshake, Offer, Request};

    fn address(text: &str) -> Option<io::Result<Address>> {
        Address::parse(Path::new(text))
    }

    fn is(text: &str, server: Server, export: &str) {
        assert_eq!(address(text).unwrap().unwrap(), Address { server, export: export.into() }, "{text}");
    }

    #[test]
    fn addresses_are_told_from_paths() {
        is("nbd://10.0.0.1/lun", Server::Tcp("10.0.0.1".into(), 10809), "lun");
        is("nbd://san.example:7000/a%20b", Server::Tcp("san.example".into(), 7000), "a b");
        is("nbd://[fd00::1]:7/x", Server::Tcp("fd00::1".into(), 7), "x");
        is("nbd://[fd00::1]", Server::Tcp("fd00::1".into(), 10809), "");
        is("nbd+unix:///lun?socket=/run/nbd", Server::Unix("/run/nbd".into()), "lun");
        assert!(address("/dev/disk/by-id/wwn-0x5000").is_none());
        for wrong in ["nbd://", "nbd:///x", "nbd://h:port/x", "nbd://h/x?y", "nbd+unix:///x", "nbd+unix:///x?socket=y"]
        {
            assert!(address(wrong).unwrap().is_err(), "{wrong}");
        }
    }

    fn offer() -> Offer {
        Offer { name: "lun".into(), size: 1 << 30, read_only: false, block: 4096, preferred: 4096 }
    }

    /// A handshake with this crate's server.
    fn asked(export: &str, offer: &Offer) -> io::Result<Described> {
        let mut said = Vec::new();
        let mut server = Handshake::begin(&mut said);
        let mut out = Vec::new();
        let mut asking = Asking::begin(said[..18].try_into().unwrap(), export, &mut out)?;
        let mut said = Vec::new();
        server.take(offer, &out, &mut said);
        let mut rest = &said[..];
        loop {
            let (head, body) = rest.split_first_chunk::<20>().unwrap();
            let (kind, length) = Asking::head(head)?;
            if let Some(described) = asking.reply(kind, &body[..length as usize])? {
                return Ok(described);
            }
            rest = &body[length as usize..];
        }
    }

    #[test]
    fn what_a_server_offers_is_understood() {
        let found = asked("lun", &offer()).unwrap();
        assert_eq!((found.size, found.block, found.objection()), (1 << 30, 4096, None));
        assert!(found.knows_fua() && found.knows(Op::Trim) && found.knows(Op::Zero { may_free: true }));
        assert!(asked("other", &offer()).unwrap_err().to_string().contains("refuses"));
        let read_only = Offer { read_only: true, ..offer() };
        assert_eq!(asked("lun", &read_only).unwrap().objection(), Some(Objection::ReadOnly));
    }

    #[test]
    fn requests_are_what_a_server_takes_them_for() {
        let command = |op| Request::parse(&request(op, true, 7, 512, 4096)).unwrap().command;
        assert_eq!(command(Op::Read), Command::Read);
        assert_eq!(command(Op::Write { durable: true }), Command::Write { fua: true });
        assert_eq!(command(Op::Sync), Command::Flush);
        assert_eq!(command(Op::Zero { may_free: false }), Command::Zero { fua: false, may_free: false, fast: false });
        let parsed = Request::parse(&request(Op::Trim, true, 7, 512, 4096)).unwrap();
        assert_eq!((parsed.cookie, parsed.offset, parsed.length), (7, 512, 4096));
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(head: [u8; 20], kind: u32, body: Vec<u8>, reply_head: [u8; 16]) {
            let _ = Asking::head(&head);
            let mut out = Vec::new();
            let mut greeting = [0; 18];
            greeting[..8].copy_from_slice(&GREETING.to_be_bytes());
            greeting[8..16].copy_from_slice(&OPTION.to_be_bytes());
            greeting[17] = 3;
            let _ = Asking::begin(&greeting, "lun", &mut out).unwrap().reply(kind, &body);
            let _ = outcome(&reply_head);
        }
    }
}
