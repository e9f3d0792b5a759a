//! What a storage is asked for, whichever way leads to it.

use std::io;
use std::sync::mpsc::SyncSender;

use crate::buffer::Buffer;
use crate::order::Waker;

/// What is done with bytes of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// They are read.
    Read,
    /// They are written.
    Write {
        /// They are on stable storage when it is done.
        durable: bool,
    },
    /// Everything that was written is on stable storage when it is done.
    Sync,
    /// They are not needed any more.
    Trim,
    /// They become zero.
    Zero {
        /// The space may be given back.
        may_free: bool,
    },
}

/// One operation and the memory that it moves.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) op: Op,
    /// Where, in bytes.
    pub(crate) at: u64,
    /// How much, in bytes.
    pub(crate) length: u64,
    /// Where the data are, if data move.
    pub(crate) buffer: Buffer,
    /// So many bytes of the buffer are passed over.
    pub(crate) skip: usize,
}

impl Piece {
    /// One that moves no data.
    pub(crate) fn without_data(op: Op, at: u64, length: u64) -> Piece {
        Piece { op, at, length, buffer: Buffer::default(), skip: 0 }
    }

    /// The data that move.
    pub(crate) fn data(&self) -> &[u8] {
        match self.op {
            Op::Read | Op::Write { .. } => &self.buffer.bytes()[self.skip..][..self.length as usize],
            _ => &[],
        }
    }

    /// The data that move, to change them.
    pub(crate) fn data_mut(&mut self) -> &mut [u8] {
        match self.op {
            Op::Read | Op::Write { .. } => &mut self.buffer.bytes_mut()[self.skip..][..self.length as usize],
            _ => &mut [],
        }
    }
}

/// A piece that is over, and what came of it: how many bytes, or why not.
pub(crate) struct Ended {
    pub(crate) piece: Piece,
    pub(crate) outcome: io::Result<u32>,
}

/// Who is told that a piece is over.
pub(crate) enum Back {
    /// A thread that serves disks; it knows the piece by this number.
    Thread(Waker, usize),
    /// Somebody who waits for it.
    Caller(SyncSender<Ended>),
}

impl Back {
    pub(crate) fn tell(self, ended: Ended) {
        match self {
            Back::Thread(waker, token) => waker.ended(token, ended),
            // Whoever does not wait any more does not need it.
            Back::Caller(caller) => drop(caller.send(ended)),
        }
    }
}
