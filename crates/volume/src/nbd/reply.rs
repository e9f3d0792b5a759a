//! Answers of the transmission phase.

use super::Errno;

const SIMPLE: u32 = 0x6744_6698;
const STRUCTURED: u32 = 0x668e_33ef;
const DONE: u16 = 1;

const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = (1 << 15) + 1;

const HOLE: u32 = 1;
const ZERO: u32 = 2;

/// What precedes the data of an answer, at most 28 bytes, and is all of most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    bytes: [u8; 28],
    length: u8,
}

/// A run of bytes that is allocated, or is not and reads as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How long it is, in bytes.
    pub length: u32,
    /// Nothing is stored there.
    pub hole: bool,
}

impl Head {
    fn of(parts: &[&[u8]]) -> Head {
        let mut head = Head { bytes: [0; 28], length: 0 };
        for part in parts {
            let at = usize::from(head.length);
            head.bytes[at..at + part.len()].copy_from_slice(part);
            head.length += part.len() as u8;
        }
        head
    }

    fn chunk(kind: u16, cookie: u64, length: u32, start: &[u8]) -> Head {
        let parts: [&[u8]; 6] = [
            &STRUCTURED.to_be_bytes(),
            &DONE.to_be_bytes(),
            &kind.to_be_bytes(),
            &cookie.to_be_bytes(),
            &length.to_be_bytes(),
            start,
        ];
        Head::of(&parts)
    }

    /// Everything went well and there is no data.
    pub fn done(cookie: u64, structured: bool) -> Head {
        if structured { Head::chunk(CHUNK_NONE, cookie, 0, &[]) } else { Head::simple(cookie, 0) }
    }

    fn simple(cookie: u64, error: u32) -> Head {
        Head::of(&[&SIMPLE.to_be_bytes(), &error.to_be_bytes(), &cookie.to_be_bytes()])
    }

    /// `length` bytes of data from `offset` follow.
    pub fn data(cookie: u64, structured: bool, offset: u64, length: u32) -> Head {
        if structured {
            Head::chunk(CHUNK_DATA, cookie, length + 8, &offset.to_be_bytes())
        } else {
            Head::simple(cookie, 0)
        }
    }

    /// It failed.
    pub fn error(cookie: u64, structured: bool, error: Errno) -> Head {
        let code = error as u32;
        if structured {
            let [a, b, c, d] = code.to_be_bytes();
            // The error and an empty text.
            Head::chunk(CHUNK_ERROR, cookie, 6, &[a, b, c, d, 0, 0])
        } else {
            Head::simple(cookie, code)
        }
    }

    /// With a clock's time at its end.
    pub(crate) fn stamped(mut self, now_ns: u64) -> Head {
        let at = usize::from(self.length);
        self.bytes[at..at + 8].copy_from_slice(&now_ns.to_be_bytes());
        self.length += 8;
        self
    }

    /// Extents follow, as [`Extent::encode`] writes them.
    pub fn status(cookie: u64, context: u32, extents: usize) -> Head {
        Head::chunk(CHUNK_STATUS, cookie, 4 + 8 * extents as u32, &context.to_be_bytes())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl Extent {
    /// As it stands after [`Head::status`].
    pub fn encode(self) -> [u8; 8] {
        let flags = if self.hole { HOLE | ZERO } else { 0 };
        let ([a, b, c, d], [e, f, g, h]) = (self.length.to_be_bytes(), flags.to_be_bytes());
        [a, b, c, d, e, f, g, h]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_as_long_as_the_protocol_says() {
        assert_eq!(Head::done(1, false).as_bytes().len(), 16);
        assert_eq!(Head::done(1, true).as_bytes().len(), 20);
        assert_eq!(Head::data(1, true, 0, 4096).as_bytes().len(), 28);
        assert_eq!(Head::error(1, true, Errno::NoSpace).as_bytes().len(), 26);
        assert_eq!(Head::status(1, 0, 3).as_bytes().len(), 24);
    }

    #[test]
    fn a_chunk_of_data_counts_its_offset() {
        let head = Head::data(0x0102_0304_0506_0708, true, 512, 4096);
        let bytes = head.as_bytes();
        assert_eq!(&bytes[..8], &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
        assert_eq!(&bytes[8..16], &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(&bytes[16..20], &4104_u32.to_be_bytes());
        assert_eq!(&bytes[20..28], &512_u64.to_be_bytes());
    }
}
