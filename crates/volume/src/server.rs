//! Serves disks to QEMU on this host.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::connection::Visit;
use crate::device::Lun;
use crate::engine::Engine;
use crate::export::Export;
use crate::link::{Guest, Judge, Lease};
use crate::order::{Line, Order};
use crate::pipe::Pipe;
use crate::tally::Counters;

/// Orders that a thread has not read yet.
const QUEUE: usize = 256;

/// Threads that serve disks.
pub struct Server {
    lines: Arc<[Line]>,
    threads: Vec<JoinHandle<()>>,
    served: Mutex<BTreeMap<u64, (usize, Arc<Export>)>>,
    /// The thread that serves the next link.
    next: AtomicUsize,
}

/// A LUN on which this node does I/O for others.
pub struct Hosted {
    export: Arc<Export>,
    lease: Arc<dyn Lease>,
}

impl Hosted {
    /// Does so while it has a lease.
    pub fn new(lun: Lun, lease: Arc<dyn Lease>) -> Hosted {
        Hosted { export: Arc::new(Export::whole(lun)), lease }
    }

    /// What was done for others, and what of it waits.
    pub fn counters(&self) -> Counters {
        self.export.tally.counters()
    }
}

impl Server {
    /// Starts so many threads.
    ///
    /// # Errors
    /// The kernel gives no threads, or no I/O queue (io_uring) to one of them.
    pub fn start(threads: usize) -> io::Result<Server> {
        let mut inboxes = Vec::new();
        let mut lines = Vec::new();
        for _ in 0..threads.max(1) {
            let (orders, inbox) = sync_channel(QUEUE);
            let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
            lines.push(Line { orders, bell, ended: Mutex::default() });
            inboxes.push(inbox);
        }
        let lines: Arc<[Line]> = lines.into();
        let mut running = Vec::new();
        for (me, inbox) in inboxes.into_iter().enumerate() {
            let (lines, (tell, told)) = (lines.clone(), sync_channel(1));
            let body = move || {
                let engine = Engine::new(me, inbox, lines);
                let _ = tell.send(engine.as_ref().map(drop).map_err(|error| io::Error::from(error.kind())));
                if let Ok(engine) = engine
                    && let Err(error) = engine.run()
                {
                    // Its disks would hang for ever: whoever started us starts us again.
                    tracing::error!(%error, "the kernel takes no I/O any more");
                    std::process::abort();
                }
            };
            running.push(std::thread::Builder::new().name(format!("disks-{me}")).stack_size(1 << 20).spawn(body)?);
            told.recv().unwrap_or_else(|_| Err(io::Error::other("the thread ended at once")))?;
        }
        Ok(Server { lines, threads: running, served: Mutex::default(), next: AtomicUsize::new(0) })
    }

    /// Serves a disk to whoever connects to `listener`, under a number that was not
    /// used yet.
    pub fn serve(&self, id: u64, listener: UnixListener, export: Export) {
        let export = Arc::new(export);
        let home = id as usize % self.lines.len();
        self.served().insert(id, (home, export.clone()));
        self.lines[home].tell(Order::Serve(id, listener, export));
    }

    /// Does I/O on a LUN for another node, whose link was let in.
    pub fn let_in(&self, hosted: &Hosted, pipe: Box<dyn Pipe>, guest: Guest) {
        let visit = Visit { guest, judge: Judge(hosted.lease.clone()) };
        let next = self.next.fetch_add(1, Ordering::Relaxed) % self.lines.len();
        self.lines[next].tell(Order::Visit(pipe, hosted.export.clone(), visit));
    }

    /// Serves a disk no more, and returns when nothing of it is under way; `false`
    /// if that did not happen within `patience`, or there is no such disk.
    pub fn withdraw(&self, id: u64, patience: Duration) -> bool {
        let Some((_, export)) = self.served().remove(&id) else { return false };
        export.withdrawn.store(true, Ordering::Release);
        let (tell, told) = sync_channel(self.lines.len());
        for line in self.lines.iter() {
            line.tell(Order::Withdraw(id, export.clone(), tell.clone()));
        }
        let until = std::time::Instant::now() + patience;
        self.lines.iter().all(|_| told.recv_timeout(until.saturating_duration_since(std::time::Instant::now())).is_ok())
    }

    /// Lets a disk grow to a size in bytes. Who connects from now on sees the new size;
    /// who is connected already may use it.
    ///
    /// # Errors
    /// There is no such disk, it would shrink, or the file behind it is smaller.
    pub fn resize(&self, id: u64, bytes: u64) -> io::Result<()> {
        let export = self.served().get(&id).map(|(_, export)| export.clone());
        export.ok_or(io::ErrorKind::NotFound)?.grow(bytes)
    }

    /// Tells a disk on a LUN that has not been written to here which of its parts (the
    /// first number) are in which slabs (the second) by now, and that all others are
    /// nowhere: another node has written to it since it was opened here, as happens
    /// before a VM arrives. What [`Grant::give`](crate::Grant::give) asks of slabs holds
    /// for these too. `false`, and nothing is changed: there is no such disk, part or
    /// slab, or it is being written to.
    pub fn learn_parts(&self, id: u64, parts: &[(u32, u32)]) -> bool {
        let export = self.served().get(&id).map(|(_, export)| export.clone());
        export.is_some_and(|export| export.parts().is_some_and(|known| known.learn(parts)))
    }

    /// What a disk has done, and what it waits for; `None` if it is not served.
    pub fn counters(&self, id: u64) -> Option<Counters> {
        self.served().get(&id).map(|(_, export)| export.tally.counters())
    }

    fn served(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, (usize, Arc<Export>)>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for line in self.lines.iter() {
            line.tell(Order::Stop);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
