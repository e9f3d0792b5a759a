//! What the keeper hands to the volume server: the node's lease, and the sockets on
//! which QEMU and the agent find it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::realtime::{LeasePage, receive};

/// The longest message: as many of the longest paths as come at once.
const LONGEST: usize = 64 * 4096;

/// The sockets that have come so far.
#[derive(Default)]
pub struct Sockets {
    come: Mutex<BTreeMap<PathBuf, UnixListener>>,
    more: Condvar,
}

impl Sockets {
    /// Takes the lease from the keeper's channel, and from then on sockets, until the
    /// keeper is gone: this process ends with it.
    ///
    /// # Errors
    /// What comes is not from a keeper.
    pub fn receive(channel: OwnedFd) -> io::Result<(LeasePage, Arc<Sockets>)> {
        let mut bytes = vec![0; LONGEST];
        let (_, fds) = receive(&channel, &mut bytes)?;
        let none = || io::Error::new(io::ErrorKind::InvalidData, "the keeper gave no lease");
        let lease = LeasePage::open(fds.first().ok_or_else(none)?)?;
        let sockets = Arc::new(Sockets::default());
        let theirs = sockets.clone();
        std::thread::Builder::new().name("sockets".into()).stack_size(128 << 10).spawn(move || {
            while let Ok((length @ 1.., fds)) = receive(&channel, &mut bytes) {
                // The first byte says only that there is a message.
                let paths =
                    bytes[1..length].split(|byte| *byte == b'\n').map(|path| Path::new(OsStr::from_bytes(path)));
                paths.zip(fds).for_each(|(path, fd)| theirs.put(path.to_owned(), fd.into()));
            }
            std::process::exit(0);
        })?;
        Ok((lease, sockets))
    }

    /// A socket has come.
    pub fn put(&self, path: PathBuf, socket: UnixListener) {
        self.come.lock().unwrap_or_else(PoisonError::into_inner).insert(path, socket);
        self.more.notify_all();
    }

    /// The socket at a path, once it has come.
    ///
    /// # Errors
    /// It did not come within `patience`.
    pub fn wait(&self, path: &Path, patience: Duration) -> io::Result<UnixListener> {
        let come = self.come.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = |come: &mut BTreeMap<PathBuf, UnixListener>| !come.contains_key(path);
        let (come, _) = self.more.wait_timeout_while(come, patience, missing).unwrap_or_else(PoisonError::into_inner);
        match come.get(path) {
            Some(socket) => socket.try_clone(),
            None => Err(io::Error::other(format!("the keeper does not listen at {}", path.display()))),
        }
    }

    /// Nobody will ask for it any more.
    pub fn forget(&self, path: &Path) {
        self.come.lock().unwrap_or_else(PoisonError::into_inner).remove(path);
    }
}
