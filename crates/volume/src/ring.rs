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
use nix::libc::{EBUSY, EINTR, ETIME};
use slab::Slab;

use crate::buffer::Buffer;

/// Operations that the queue holds before the kernel takes them.
const ENTRIES: u32 = 128;
/// Names the wish to end another operation, whose own end nobody needs to know.
const CANCELLED: u64 = u64::MAX;
/// Names of operations never have all bits set.
const COUNTED: u32 = u32::MAX >> 1;

/// One operation and what it needs.
#[derive(Debug)]
pub enum Io {
    /// Fills `length` bytes of a buffer from `skip` on.
    Read {
        /// From here.
        file: Arc<File>,
        /// Into this.
        buffer: Buffer,
        /// So many of its bytes are left as they are.
        skip: usize,
        /// So many are filled.
        length: usize,
        /// Position in the file of the first byte to read.
        at: u64,
    },
    /// Writes `length` bytes of a buffer from `skip` on.
    Write {
        /// To here.
        file: Arc<File>,
        /// From this.
        buffer: Buffer,
        /// So many of its bytes are passed over.
        skip: usize,
        /// So many are written.
        length: usize,
        /// Position in the file of the first byte to write.
        at: u64,
        /// It is on stable storage when it is done.
        durable: bool,
    },
    /// Everything that was written is on stable storage when it is done.
    Sync {
        /// Of this file.
        file: Arc<File>,
    },
    /// `fallocate`.
    Allocate {
        /// In this file.
        file: Arc<File>,
        /// Its mode.
        mode: i32,
        /// From here, in bytes.
        at: u64,
        /// So much, in bytes.
        length: u64,
    },
    /// Tells each time that a descriptor becomes readable, until told otherwise.
    Readable(RawFd),
    /// Tells once that a descriptor is writable.
    Writable(RawFd),
}

/// An operation that is done.
#[derive(Debug)]
pub struct Done<T> {
    /// As it was given.
    pub token: T,
    /// What came of it.
    pub outcome: io::Result<u32>,
    /// What it needed; `None`: it goes on and will tell again.
    pub io: Option<Io>,
}

/// The queue. It belongs to one thread.
pub struct Ring<T> {
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
        Io::Read { file, buffer, skip, length, at } => {
            let bytes = &mut buffer.bytes_mut()[*skip..][..*length];
            opcode::Read::new(Fd(file.as_raw_fd()), bytes.as_mut_ptr(), bytes.len() as u32).offset(*at).build()
        }
        Io::Write { file, buffer, skip, length, at, durable } => {
            let bytes = &buffer.bytes()[*skip..][..*length];
            let flags = if *durable { nix::libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(Fd(file.as_raw_fd()), bytes.as_ptr(), bytes.len() as u32)
                .offset(*at)
                .rw_flags(flags)
                .build()
        }
        Io::Sync { file } => opcode::Fsync::new(Fd(file.as_raw_fd())).flags(FsyncFlags::DATASYNC).build(),
        Io::Allocate { file, mode, at, length } => {
            opcode::Fallocate::new(Fd(file.as_raw_fd()), *length).offset(*at).mode(*mode).build()
        }
        Io::Readable(fd) => opcode::PollAdd::new(Fd(*fd), nix::libc::POLLIN as u32).multi(true).build(),
        Io::Writable(fd) => opcode::PollAdd::new(Fd(*fd), nix::libc::POLLOUT as u32).build(),
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
        ring.push(1, Io::Write { file: file.clone(), buffer, skip: 0, length: 8192, at: 4096, durable: true }).unwrap();
        assert_eq!(done(&mut ring).outcome.unwrap(), 8192);
        ring.push(2, Io::Sync { file: file.clone() }).unwrap();
        assert!(done(&mut ring).outcome.is_ok());
        ring.push(3, Io::Read { file, buffer: pool.get(12288), skip: 0, length: 12288, at: 0 }).unwrap();
        let read = done(&mut ring);
        assert_eq!((read.token, read.outcome.unwrap()), (3, 12288));
        let Some(Io::Read { buffer, .. }) = read.io else { panic!("the buffer comes back") };
        assert!(buffer.bytes()[..4096].iter().all(|byte| *byte == 0));
        assert!(buffer.bytes()[4096..].iter().all(|byte| *byte == 7));
    }

    #[test]
    fn more_operations_than_the_queue_holds_are_taken() {
        let mut ring = Ring::new().unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        for token in 0..ENTRIES * 3 {
            ring.push(token, Io::Sync { file: file.clone() }).unwrap();
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
