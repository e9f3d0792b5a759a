//! Requests of the transmission phase.

use super::{take_u16, take_u32, take_u64};

/// Length of a request without its payload.
pub const HEADER_BYTES: usize = 28;

const MAGIC: u32 = 0x2560_9513;

const FLAG_FUA: u16 = 1;
const FLAG_NO_HOLE: u16 = 1 << 1;
const FLAG_DONT_FRAGMENT: u16 = 1 << 2;
const FLAG_ONE_EXTENT: u16 = 1 << 3;
const FLAG_FAST_ZERO: u16 = 1 << 4;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Data out.
    Read,
    /// Data in, which follows the header.
    Write {
        /// It is on stable storage before it is answered.
        fua: bool,
    },
    /// No more requests.
    Disconnect,
    /// Whatever was answered is on stable storage.
    Flush,
    /// The contents are not needed any more.
    Trim {
        /// It is on stable storage before it is answered.
        fua: bool,
    },
    /// The contents become zero.
    Zero {
        /// It is on stable storage before it is answered.
        fua: bool,
        /// The space may be given back.
        may_free: bool,
        /// Only if that is faster than writing zeroes.
        fast: bool,
    },
    /// What is allocated.
    Status {
        /// One extent is enough.
        one: bool,
    },
    /// Something else.
    Unknown(u16),
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// Names it in the answer.
    pub cookie: u64,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub length: u32,
    /// Over a link: not to be done after this, by the clock of who does it, nanoseconds.
    pub until_ns: Option<u64>,
}

impl Request {
    /// Reads a header; `None` if it is none, after which nothing that the client
    /// sends can be understood.
    pub fn parse(header: &[u8; HEADER_BYTES]) -> Option<Request> {
        let bytes = &mut &header[..];
        if take_u32(bytes)? != MAGIC {
            return None;
        }
        let flags = take_u16(bytes)?;
        let kind = take_u16(bytes)?;
        let (cookie, offset, length) = (take_u64(bytes)?, take_u64(bytes)?, take_u32(bytes)?);
        let fua = flags & FLAG_FUA != 0;
        let (command, known) = match kind {
            0 => (Command::Read, FLAG_DONT_FRAGMENT),
            1 => (Command::Write { fua }, 0),
            2 => (Command::Disconnect, 0),
            3 => (Command::Flush, 0),
            4 => (Command::Trim { fua }, 0),
            6 => {
                let (may_free, fast) = (flags & FLAG_NO_HOLE == 0, flags & FLAG_FAST_ZERO != 0);
                (Command::Zero { fua, may_free, fast }, FLAG_NO_HOLE | FLAG_FAST_ZERO)
            }
            7 => (Command::Status { one: flags & FLAG_ONE_EXTENT != 0 }, FLAG_ONE_EXTENT),
            other => (Command::Unknown(other), u16::MAX),
        };
        // Some clients set FUA on reads, where it means nothing.
        let strange = flags & !(known | FLAG_FUA) != 0;
        // A write's payload follows whatever its flags are.
        let command = if strange && kind != 1 { Command::Unknown(kind) } else { command };
        Some(Request { command, cookie, offset, length, until_ns: None })
    }

    /// How many bytes of payload follow the header.
    pub fn payload(&self) -> u32 {
        match self.command {
            Command::Write { .. } => self.length,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(flags: u16, kind: u16, offset: u64, length: u32) -> [u8; HEADER_BYTES] {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(77_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.try_into().unwrap()
    }

    #[test]
    fn commands_and_their_flags_are_told_apart() {
        let command = |flags, kind| Request::parse(&header(flags, kind, 512, 4096)).unwrap().command;
        assert_eq!(command(0, 0), Command::Read);
        assert_eq!(command(1, 1), Command::Write { fua: true });
        assert_eq!(command(0, 3), Command::Flush);
        assert_eq!(command(2, 6), Command::Zero { fua: false, may_free: false, fast: false });
        assert_eq!(command(16, 6), Command::Zero { fua: false, may_free: true, fast: true });
        assert_eq!(command(8, 7), Command::Status { one: true });
        assert_eq!(command(0, 9), Command::Unknown(9));
        assert_eq!(command(1 << 9, 4), Command::Unknown(4), "a flag that nobody knows");
    }

    #[test]
    fn only_a_write_has_a_payload() {
        assert_eq!(Request::parse(&header(0, 1, 0, 4096)).unwrap().payload(), 4096);
        assert_eq!(Request::parse(&header(1 << 9, 1, 0, 4096)).unwrap().payload(), 4096);
        assert_eq!(Request::parse(&header(0, 0, 0, 4096)).unwrap().payload(), 0);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: [u8; HEADER_BYTES]) {
            let parsed = Request::parse(&bytes);
            prop_assert!(parsed.is_none() || bytes[..4] == MAGIC.to_be_bytes());
        }
    }
}
