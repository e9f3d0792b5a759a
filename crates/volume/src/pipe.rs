//! What bytes travel through between this host and others.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A connection that never blocks: where it would, it says so
/// ([`WouldBlock`](io::ErrorKind::WouldBlock)), and its descriptor becomes ready later.
/// What `write` has taken and not sent yet, `flush` sends.
pub trait Pipe: Read + Write + Send {
    /// What to watch.
    fn fd(&self) -> BorrowedFd<'_>;

    /// What was written and has not left this host is not sent any more once the
    /// connection is closed, by whomever.
    fn give_up(&self);
}

impl Pipe for UnixStream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn give_up(&self) {
        let _ = self.shutdown(std::net::Shutdown::Both);
    }
}

impl Pipe for TcpStream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn give_up(&self) {
        // Closed like this, the kernel drops what it has and says so to the other end.
        let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        let _ = nix::sys::socket::setsockopt(self, nix::sys::socket::sockopt::Linger, &at_once);
    }
}

/// Waits until something of these descriptors is ready, or it is too late: then all are
/// said not to be.
pub(crate) fn ready<const N: usize>(
    watched: [(BorrowedFd<'_>, PollFlags); N],
    until: Option<Instant>,
) -> io::Result<[bool; N]> {
    let mut fds = watched.map(|(fd, flags)| PollFd::new(fd, flags));
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        // Rounded up: never a moment before it.
        let patience = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, patience) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) => return Ok(fds.map(|fd| fd.any().unwrap_or(true))),
        }
    }
}

/// Fills all of `into`.
pub(crate) fn read_exact(pipe: &mut dyn Pipe, into: &mut [u8], until: Instant) -> io::Result<()> {
    let mut filled = 0;
    while filled < into.len() {
        match pipe.read(&mut into[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) => wait_for(pipe, error, PollFlags::POLLIN, until)?,
        }
    }
    Ok(())
}

/// Sends all of `bytes`.
pub(crate) fn write_all(pipe: &mut dyn Pipe, bytes: &[u8], until: Instant) -> io::Result<()> {
    let mut rest = bytes;
    loop {
        let step = if rest.is_empty() { pipe.flush().map(|()| 0) } else { pipe.write(rest) };
        match step {
            Ok(_) if rest.is_empty() => return Ok(()),
            Ok(count) => rest = &rest[count..],
            Err(error) => wait_for(pipe, error, PollFlags::POLLOUT, until)?,
        }
    }
}

fn wait_for(pipe: &dyn Pipe, error: io::Error, flags: PollFlags, until: Instant) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock if Instant::now() >= until => Err(io::ErrorKind::TimedOut.into()),
        io::ErrorKind::WouldBlock => ready([(pipe.fd(), flags)], Some(until)).map(drop),
        _ => Err(error),
    }
}
