//! The kernel's queue of I/O (io_uring), with everything that an operation needs
//! kept alive until the kernel is done with it. The only unsafe code of this crate.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::fcntl::FallocateFlags;
use nix::libc::{EBUSY, EINTR, ETIME};
use slab::Slab;

use crate::piece::{Op, Piece};

/// Operations that the queue holds before the kernel takes them.
const ENTRIES: u32 = 128;
/// Names the wish to end another operation, whose own end nobody needs to know.
const CANCELLED: u64 = u64::MAX;
/// Names of operations never have all bits set.
const COUNTED: u32 = u32::MAX >> 1;

/// One operation and what it needs.
#[derive(Debug)]
pub(crate) enum Io {
    /// Does something with the bytes of a file.
    Storage {
        /// Of this one.
        file: Arc<File>,
        /// What, and with which memory.
        piece: Piece,
    },
    /// Tells each time that a descriptor becomes readable, until told otherwise.
    Readable(RawFd),
    /// Tells once that a descriptor is writable.
    Writable(RawFd),
}

/// An operation that is done.
#[derive(Debug)]
pub(crate) struct Done<T> {
    /// As it was given.
    pub token: T,
    /// What came of it.
    pub outcome: io::Result<u32>,
    /// What it needed; `None`: it goes on and will tell again.
    pub io: Option<Io>,
}

/// The queue. It belongs to one thread.
pub(crate) struct Ring<T> {
    ring: IoUring,
    pending: Slab<(T, Io)>,
    /// Counts operations: their places are used again, their names are not.
    count: u32,
    done: VecDeque<cqueue::Entry>,
}

impl<T: Copy> Ring<T> {
    /// A queue for the calling thread.
    ///
    /// # Errors
    /// The kernel has none (before 5.6), or does not allow it.
    pub fn new() -> io::Result<Ring<T>> {
        let best = IoUring::builder().setup_single_issuer().setup_coop_taskrun().setup_defer_taskrun().build(ENTRIES);
        // Before Linux 6.1.
        let ring = best.or_else(|_| IoUring::new(ENTRIES))?;
        Ok(Ring { ring, pending: Slab::new(), count: 0, done: VecDeque::new() })
    }

    /// Queues an operation; the kernel sees it at the next [`Ring::enter`]. The
    /// number that comes back names it for [`Ring::cancel`].
    ///
    /// # Errors
    /// The kernel takes nothing.
    pub fn push(&mut self, token: T, io: Io) -> io::Result<u64> {
        let key = self.pending.insert((token, io));
        self.count = self.count.wrapping_add(1) & COUNTED;
        let name = u64::from(self.count) << 32 | key as u64;
        let entry = entry(&mut self.pending[key].1).user_data(name);
        match self.submit(&entry) {
            Ok(()) => Ok(name),
            Err(error) => {
                self.pending.remove(key);
                Err(error)
            }
        }
    }

    /// Ends an operation early; it is told of as done, with an error.
    ///
    /// # Errors
    /// The kernel takes nothing.
    pub fn cancel(&mut self, name: u64) -> io::Result<()> {
        self.submit(&opcode::AsyncCancel::new(name).build().user_data(CANCELLED))
    }

    fn submit(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: what the entry points to is owned by `pending` and stays
            // where it is (a buffer's memory is on the heap, and files are counted)
            // until the kernel has said that it is done: entries are only removed
            // in `next` after their last completion, and `drop` waits for all.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            retried(|| self.ring.submit())?;
        }
    }

    /// Hands over what is queued and waits until something is done, or until
    /// `patience` is over.
    ///
    /// # Errors
    /// The kernel takes nothing.
    pub fn enter(&mut self, patience: Option<Duration>) -> io::Result<()> {
        let entered = match patience {
            None => self.ring.submit_and_wait(1),
            Some(patience) => {
                let until = Timespec::from(patience);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&until))
            }
        };
        match entered {
            Err(error) if !matches!(error.raw_os_error(), Some(ETIME | EINTR | EBUSY)) => Err(error),
            _ => {
                self.done.extend(self.ring.completion());
                Ok(())
            }
        }
    }

    /// The next operation that is done.
    pub fn next(&mut self) -> Option<Done<T>> {
        let entry = loop {
            let entry = self.done.pop_front()?;
            if entry.user_data() != CANCELLED {
                break entry;
            }
        };
        let key = place(&entry);
        let outcome = match entry.result() {
            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            count => Ok(count.unsigned_abs()),
        };
        if cqueue::more(entry.flags()) {
            return Some(Done { token: self.pending[key].0, outcome, io: None });
        }
        let (token, io) = self.pending.remove(key);
        Some(Done { token, outcome, io: Some(io) })
    }
}

/// Where the operation that is told of is kept.
fn place(entry: &cqueue::Entry) -> usize {
    (entry.user_data() & u64::from(u32::MAX)) as usize
}

fn retried(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

fn entry(io: &mut Io) -> squeue::Entry {
    match io {
        Io::Storage { file, piece } => on_file(Fd(file.as_raw_fd()), piece),
        Io::Readable(fd) => opcode::PollAdd::new(Fd(*fd), nix::libc::POLLIN as u32).multi(true).build(),
        Io::Writable(fd) => opcode::PollAdd::new(Fd(*fd), nix::libc::POLLOUT as u32).build(),
    }
}

fn on_file(file: Fd, piece: &mut Piece) -> squeue::Entry {
    let (at, length) = (piece.at, piece.length);
    let allocate = |mode: FallocateFlags| {
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        opcode::Fallocate::new(file, length).offset(at).mode(mode.bits()).build()
    };
    match piece.op {
        Op::Read => {
            let bytes = piece.data_mut();
            opcode::Read::new(file, bytes.as_mut_ptr(), bytes.len() as u32).offset(at).build()
        }
        Op::Write { durable } => {
            let bytes = piece.data();
            let flags = if durable { nix::libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(file, bytes.as_ptr(), bytes.len() as u32).offset(at).rw_flags(flags).build()
        }
        Op::Sync => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        Op::Trim | Op::Zero { may_free: true } => allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE),
        Op::Zero { may_free: false } => allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE),
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // The kernel may still write into buffers: not before it is done are they
        // given back.
        let _ = self.ring.submit();
        let _ = self.ring.submitter().register_sync_cancel(None, CancelBuilder::any());
        self.done.extend(self.ring.completion());
        loop {
            while let Some(entry) = self.done.pop_front() {
                if !cqueue::more(entry.flags()) && entry.user_data() != CANCELLED {
                    self.pending.try_remove(place(&entry));
                }
            }
            if self.pending.is_empty() {
                return;
            }
            if retried(|| self.ring.submit_and_wait(1)).is_err() {
                // Nobody can say when it is done: better lost than overwritten.
                std::mem::forget(std::mem::take(&mut self.pending));
                return;
            }
            self.done.extend(self.ring.completion());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::buffer::Pool;

    fn done<T: Copy>(ring: &mut Ring<T>) -> Done<T> {
        loop {
            if let Some(done) = ring.next() {
                return done;
            }
            ring.enter(None).unwrap();
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut ring = Ring::new().unwrap();
        let mut pool = Pool::default();
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut buffer = pool.get(8192);
        buffer.bytes_mut().fill(7);
        let piece = Piece { op: Op::Write { durable: true }, at: 4096, length: 8192, buffer, skip: 0 };
        ring.push(1, Io::Storage { file: file.clone(), piece }).unwrap();
        assert_eq!(done(&mut ring).outcome.unwrap(), 8192);
        ring.push(2, Io::Storage { file: file.clone(), piece: Piece::without_data(Op::Sync, 0, 0) }).unwrap();
        assert!(done(&mut ring).outcome.is_ok());
        let piece = Piece { op: Op::Read, at: 0, length: 12288, buffer: pool.get(12288), skip: 0 };
        ring.push(3, Io::Storage { file, piece }).unwrap();
        let read = done(&mut ring);
        assert_eq!((read.token, read.outcome.unwrap()), (3, 12288));
        let Some(Io::Storage { piece, .. }) = read.io else { panic!("the buffer comes back") };
        assert!(piece.data()[..4096].iter().all(|byte| *byte == 0));
        assert!(piece.data()[4096..].iter().all(|byte| *byte == 7));
    }

    #[test]
    fn more_operations_than_the_queue_holds_are_taken() {
        let mut ring = Ring::new().unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        for token in 0..ENTRIES * 3 {
            let piece = Piece::without_data(Op::Sync, 0, 0);
            ring.push(token, Io::Storage { file: file.clone(), piece }).unwrap();
        }
        let mut seen: Vec<_> = (0..ENTRIES * 3).map(|_| done(&mut ring).token).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..ENTRIES * 3).collect::<Vec<_>>());
        assert!(ring.pending.is_empty());
    }

    #[test]
    fn a_descriptor_is_watched_until_the_end() {
        let mut ring = Ring::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ring.push((), Io::Readable(ours.as_raw_fd())).unwrap();
        for _ in 0..3 {
            theirs.write_all(b"x").unwrap();
            assert!(done(&mut ring).io.is_none(), "it goes on");
        }
        // With a watch still on: must end.
        drop(ring);
    }

    #[test]
    fn a_watch_can_be_ended() {
        let mut ring = Ring::new().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let watch = ring.push((), Io::Readable(ours.as_raw_fd())).unwrap();
        ring.enter(Some(Duration::ZERO)).unwrap();
        ring.cancel(watch).unwrap();
        let ended = done(&mut ring);
        assert!(ended.outcome.is_err() && ended.io.is_some());
        assert!(ring.pending.is_empty());
    }

    #[test]
    fn waiting_ends_when_patience_does() {
        let mut ring = Ring::<()>::new().unwrap();
        ring.enter(Some(Duration::from_millis(1))).unwrap();
        assert!(ring.next().is_none());
    }
}
