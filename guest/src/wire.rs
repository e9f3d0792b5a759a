//! The counter service's UDP datagrams.
//!
//! All integers are little-endian. One request has one reply, which repeats the client's sequence
//! number, so that a client can tell a late answer from a current one.
//!
//! ```text
//! request  0  magic "HFGQ"   4  kind u8   5  zero [3]   8  sequence u64                      (16 bytes)
//! reply    0  magic "HFGR"   4  kind u8   5  outcome u8  6  durable u8  7  zero   8  sequence u64
//!          16 uptime_ms u64  24 boot_id u64  32 record u64  40 epoch u64
//!          48 dirty_mb_s u32  52 disk_errors u32                                            (56 bytes)
//! ```

/// The port, UDP and TCP alike, on which the guest serves.
pub const PORT: u16 = 7000;
/// Size of an encoded [`Request`] in bytes.
pub const REQUEST_BYTES: usize = 16;
/// Size of an encoded [`Reply`] in bytes.
pub const REPLY_BYTES: usize = 56;

const REQUEST_MAGIC: [u8; 4] = *b"HFGQ";
const REPLY_MAGIC: [u8; 4] = *b"HFGR";

/// Why a datagram is not one of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The datagram has the wrong size.
    #[error("the datagram has {actual} bytes, not {expected}: is the peer another version?")]
    Length {
        /// Bytes that the format asks for.
        expected: usize,
        /// Bytes that arrived.
        actual: usize,
    },
    /// The datagram does not start with the magic number.
    #[error("the datagram does not carry the guest's magic number: is something else on this port?")]
    Magic,
    /// The kind or the outcome is not known.
    #[error("the datagram's {field} has the unknown value {value}: is the peer another version?")]
    Unknown {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u8,
    },
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Answer at once.
    Ping = 1,
    /// Append one record to the disk and answer when it is on stable storage.
    Write = 2,
    /// Say how the guest is.
    Status = 3,
}

impl Kind {
    fn decode(value: u8) -> Result<Self, WireError> {
        match value {
            1 => Ok(Kind::Ping),
            2 => Ok(Kind::Write),
            3 => Ok(Kind::Status),
            value => Err(WireError::Unknown { field: "kind", value }),
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As asked.
    Done = 0,
    /// The guest has no record disk (none attached, or one that holds something else).
    NoDisk = 1,
    /// The disk returned an error; whether the record is on it is unknown.
    DiskError = 2,
    /// Too many writes wait; nothing was written.
    Busy = 3,
}

impl Outcome {
    fn decode(value: u8) -> Result<Self, WireError> {
        match value {
            0 => Ok(Outcome::Done),
            1 => Ok(Outcome::NoDisk),
            2 => Ok(Outcome::DiskError),
            3 => Ok(Outcome::Busy),
            value => Err(WireError::Unknown { field: "outcome", value }),
        }
    }
}

/// A client's datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub kind: Kind,
    /// The client's number, repeated in the reply.
    pub sequence: u64,
}

/// The guest's datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// What was asked for.
    pub kind: Kind,
    /// How it ended.
    pub outcome: Outcome,
    /// For [`Kind::Write`]: the record is on stable storage.
    pub durable: bool,
    /// The number that the request carried.
    pub sequence: u64,
    /// Milliseconds since the guest's kernel started.
    pub uptime_ms: u64,
    /// Random, new at every boot of the guest.
    pub boot_id: u64,
    /// For [`Kind::Write`] the number of the record written, else of the last durable one (0: none).
    pub record: u64,
    /// How often this disk was opened by a booting guest, this boot included (0: no disk).
    pub epoch: u64,
    /// MB/s of memory that the guest is asked to dirty.
    pub dirty_mb_s: u32,
    /// Errors that the disk returned since boot.
    pub disk_errors: u32,
}

impl Request {
    /// The datagram.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC);
        bytes[4] = self.kind as u8;
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes
    }

    /// Reads a datagram.
    ///
    /// # Errors
    /// [`WireError`] when it is not a request of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let bytes: &[u8; REQUEST_BYTES] = sized(bytes)?;
        if bytes[..4] != REQUEST_MAGIC {
            return Err(WireError::Magic);
        }
        Ok(Request { kind: Kind::decode(bytes[4])?, sequence: u64_at(bytes, 8) })
    }
}

impl Reply {
    /// The datagram.
    pub fn encode(&self) -> [u8; REPLY_BYTES] {
        let mut bytes = [0; REPLY_BYTES];
        bytes[..4].copy_from_slice(&REPLY_MAGIC);
        bytes[4] = self.kind as u8;
        bytes[5] = self.outcome as u8;
        bytes[6] = u8::from(self.durable);
        for (at, value) in
            [(8, self.sequence), (16, self.uptime_ms), (24, self.boot_id), (32, self.record), (40, self.epoch)]
        {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes[48..52].copy_from_slice(&self.dirty_mb_s.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.disk_errors.to_le_bytes());
        bytes
    }

    /// Reads a datagram.
    ///
    /// # Errors
    /// [`WireError`] when it is not a reply of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let bytes: &[u8; REPLY_BYTES] = sized(bytes)?;
        if bytes[..4] != REPLY_MAGIC {
            return Err(WireError::Magic);
        }
        Ok(Reply {
            kind: Kind::decode(bytes[4])?,
            outcome: Outcome::decode(bytes[5])?,
            durable: bytes[6] != 0,
            sequence: u64_at(bytes, 8),
            uptime_ms: u64_at(bytes, 16),
            boot_id: u64_at(bytes, 24),
            record: u64_at(bytes, 32),
            epoch: u64_at(bytes, 40),
            dirty_mb_s: u32_at(bytes, 48),
            disk_errors: u32_at(bytes, 52),
        })
    }
}

fn sized<const N: usize>(bytes: &[u8]) -> Result<&[u8; N], WireError> {
    bytes.try_into().map_err(|_| WireError::Length { expected: N, actual: bytes.len() })
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_has_the_documented_bytes() {
        let request = Request { kind: Kind::Write, sequence: 0x0102_0304_0506_0708 };
        assert_eq!(request.encode(), *b"HFGQ\x02\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01");
        assert_eq!(Request::decode(&request.encode()), Ok(request));
    }

    #[test]
    fn reply_survives_the_wire() {
        let reply = Reply {
            kind: Kind::Write,
            outcome: Outcome::Busy,
            durable: true,
            sequence: 1,
            uptime_ms: 2,
            boot_id: u64::MAX,
            record: 4,
            epoch: 5,
            dirty_mb_s: 6,
            disk_errors: 7,
        };
        let bytes = reply.encode();
        assert_eq!(&bytes[..8], b"HFGR\x02\x03\x01\0");
        assert_eq!((bytes[40], bytes[48], bytes[52]), (5, 6, 7));
        assert_eq!(Reply::decode(&bytes), Ok(reply));
    }

    #[test]
    fn foreign_datagrams_are_refused() {
        let good = Request { kind: Kind::Ping, sequence: 1 }.encode();
        assert_eq!(Request::decode(&good[..15]), Err(WireError::Length { expected: 16, actual: 15 }));
        assert_eq!(Request::decode(&[0; 16]), Err(WireError::Magic));
        let mut unknown = good;
        unknown[4] = 9;
        assert_eq!(Request::decode(&unknown), Err(WireError::Unknown { field: "kind", value: 9 }));
        assert_eq!(Reply::decode(&good), Err(WireError::Length { expected: 56, actual: 16 }));
    }
}
