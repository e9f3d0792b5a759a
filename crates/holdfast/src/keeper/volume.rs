//! The keeper's child that serves disks on LUNs. The keeper holds the sockets on
//! which QEMU finds its disks, and hands them to each new life of the server: QEMU
//! connects again at once, and waits instead of failing.
//!
//! It runs only while the node has its lease, and is killed with the VMs when that
//! ends: nothing of it writes afterwards.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdfast_core::{Epoch, VmId};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socketpair};
use nix::sys::stat::{Mode, umask};

use super::leftovers::Records;
use super::protocol::{Exit, Tag};
use super::table::{Published, Table, Withdrawn};
use crate::realtime::{Image, Report, fork_gated};

/// Waiting time before a restart when it keeps dying, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// One that lived longer than this is started again at once.
const SETTLED: Duration = Duration::from_secs(1);
/// As the agent: after the VMs.
const OOM_SCORE: i16 = -500;
/// Sockets that one message hands over.
const AT_ONCE: usize = 64;
/// Its record stands beside those of the VMs, under a VM that cannot be.
const TAG: Tag = Tag { vm: VmId(uuid::Uuid::nil()), epoch: Epoch(0) };

/// The volume server's process, its sockets, and when to start the next.
pub struct VolumeServer {
    command: Vec<OsString>,
    sockets: BTreeMap<PathBuf, UnixListener>,
    state: State,
    pause: Duration,
    withdrawn: Vec<Withdrawn>,
}

enum State {
    Down { due: Instant },
    Up { pid: i32, published: Published, report: Report, channel: OwnedFd, since: Instant },
}

impl VolumeServer {
    /// Not started: nobody needs a socket yet. `command` gets the number of the
    /// descriptor on which the server hears from the keeper as its last argument.
    pub fn new(command: Vec<OsString>) -> VolumeServer {
        let state = State::Down { due: Instant::now() };
        VolumeServer { command, sockets: BTreeMap::new(), state, pause: Duration::ZERO, withdrawn: Vec::new() }
    }

    /// When it has to be started if the lease allows it; `None` while it lives or is
    /// not needed.
    pub fn due(&self) -> Option<Instant> {
        match self.state {
            State::Down { due } if !self.sockets.is_empty() => Some(due),
            _ => None,
        }
    }

    /// Whether it lives.
    pub fn alive(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// Listens at a path from now on, for every life of the server.
    pub fn listen(&mut self, path: &Path) -> io::Result<()> {
        if self.sockets.contains_key(path) {
            // Whoever asks again may have let go of it.
            self.hand_over(&[path.to_owned()]);
            return Ok(());
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        umask(before);
        self.sockets.insert(path.to_owned(), listener?);
        self.hand_over(&[path.to_owned()]);
        Ok(())
    }

    /// Does not listen there any more; without any socket the server is not needed.
    pub fn unlisten(&mut self, path: &Path) {
        if self.sockets.remove(path).is_some() {
            let _ = fs::remove_file(path);
        }
        if self.sockets.is_empty() {
            self.kill();
        }
    }

    /// Starts it when it is due and the node has its lease.
    pub fn start_if_due(&mut self, table: &Table, records: &Records) {
        let now = Instant::now();
        if self.due().is_none_or(|due| due > now) || table.permit_now().is_err() {
            return;
        }
        match self.start(table, records) {
            Ok(()) => self.hand_over(&self.sockets.keys().cloned().collect::<Vec<_>>()),
            Err(error) => {
                tracing::error!(%error, "cannot start the volume server");
                self.state = State::Down { due: now + self.longer_pause() };
            }
        }
    }

    /// The order is that of a VM: see [`super::table`].
    fn start(&mut self, table: &Table, records: &Records) -> io::Result<()> {
        let permit = table.permit_now().map_err(io::Error::other)?;
        let flags = SockFlag::SOCK_CLOEXEC;
        let (channel, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let mut command = self.command.clone();
        command.push(theirs.as_raw_fd().to_string().into());
        let image = Image::new(&command, &[])?.oom_score(OOM_SCORE).inherits(&theirs);
        let gated = fork_gated(&image)?;
        let pid = gated.pid;
        records.write(TAG, pid)?;
        let published = table
            .publish(gated.pidfd.try_clone()?)
            .map_err(|_| io::Error::other("this keeper runs as many processes as it can"))?;
        let opened = if table.lasts(permit) { gated.open() } else { Err(io::Error::other("the lease has ended")) };
        let report = match opened {
            Ok((_, report)) => report,
            Err(error) => {
                self.withdrawn.push(table.withdraw(published));
                records.remove(TAG);
                return Err(error);
            }
        };
        tracing::info!(pid, "volume server started");
        let told = send(&channel, b"", &[table.lease_fd().as_raw_fd()]);
        self.state = State::Up { pid, published, report, channel, since: Instant::now() };
        if let Err(error) = told {
            tracing::warn!(%error, "the volume server does not take the lease: it is started again");
            self.kill();
        }
        Ok(())
    }

    /// Gives sockets to the server, if it lives.
    fn hand_over(&self, paths: &[PathBuf]) {
        let State::Up { channel, .. } = &self.state else { return };
        for some in paths.chunks(AT_ONCE) {
            let fds: Vec<_> = some.iter().filter_map(|path| Some(self.sockets.get(path)?.as_raw_fd())).collect();
            let names: Vec<_> = some.iter().map(|path| path.as_os_str().as_bytes()).collect();
            if let Err(error) = send(channel, &names.join(&b'\n'), &fds) {
                // The next one gets all of them.
                tracing::warn!(%error, "the volume server takes no sockets: it is started again");
                self.kill();
            }
        }
    }

    /// Takes note of a child's end; `false` when it was another child.
    pub fn ended(&mut self, ended: i32, exit: Exit, table: &Table, records: &Records) -> bool {
        if !matches!(self.state, State::Up { pid, .. } if pid == ended) {
            return false;
        }
        let down = State::Down { due: Instant::now() };
        let State::Up { published, mut report, since, .. } = std::mem::replace(&mut self.state, down) else {
            return false;
        };
        self.withdrawn.push(table.withdraw(published));
        records.remove(TAG);
        let pause = if since.elapsed() > SETTLED {
            self.pause = Duration::ZERO;
            Duration::ZERO
        } else {
            self.longer_pause()
        };
        match report.read() {
            Some(Err(failure)) => {
                let reason = io::Error::from_raw_os_error(failure.errno);
                tracing::error!("the volume server could not {}: {reason}", failure.step);
            }
            _ => tracing::warn!(%exit, ?pause, "the volume server ended"),
        }
        self.state = State::Down { due: Instant::now() + pause };
        true
    }

    /// This pause; the next one is twice as long.
    fn longer_pause(&mut self) -> Duration {
        let pause = self.pause.max(PAUSES.0);
        self.pause = (pause * 2).min(PAUSES.1);
        pause
    }

    /// Ends it.
    pub fn kill(&self) {
        if let State::Up { published, .. } = &self.state
            && let Err(error) = published.kill()
        {
            tracing::warn!(%error, "cannot kill the volume server");
        }
    }

    /// Closes the pidfds that no killing pass uses any more.
    pub fn tidy(&mut self, table: &Table) {
        self.withdrawn.retain(|withdrawn| !table.passed(withdrawn));
    }
}

impl Drop for VolumeServer {
    fn drop(&mut self) {
        for path in self.sockets.keys() {
            let _ = fs::remove_file(path);
        }
    }
}

/// One message with descriptors, without waiting.
fn send(channel: &OwnedFd, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    // An empty message would look like the end.
    let bytes = [IoSlice::new(b"\n"), IoSlice::new(bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(channel.as_raw_fd(), &bytes, &[ControlMessage::ScmRights(fds)], flags, None)?;
    Ok(())
}
