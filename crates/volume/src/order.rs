//! What the threads that serve disks are told, and how.

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::EventFd;

use crate::connection::Visit;
use crate::export::Export;
use crate::piece::Ended;
use crate::pipe::Pipe;

/// What a thread is told.
pub(crate) enum Order {
    /// Serve a disk to whoever connects here; this names it.
    Serve(u64, UnixListener, Arc<Export>),
    /// Serve this client.
    Adopt(UnixStream, Arc<Export>),
    /// Serve this link of another node.
    Visit(Box<dyn Pipe>, Arc<Export>, Visit),
    /// Serve it no more, end its connections, and tell when no I/O of it is left.
    Withdraw(u64, Arc<Export>, SyncSender<()>),
    /// End.
    Stop,
}

/// Where a thread is told things.
pub(crate) struct Line {
    pub(crate) orders: SyncSender<Order>,
    pub(crate) bell: EventFd,
    /// Pieces that were done elsewhere for this thread, by its own numbers. There are
    /// never more than it has asked for.
    pub(crate) ended: Mutex<Vec<(usize, Ended)>>,
}

impl Line {
    pub(crate) fn tell(&self, order: Order) {
        // A full queue makes the teller wait; a thread that is gone serves nothing.
        if self.orders.send(order).is_ok() {
            let _ = self.bell.write(1);
        }
    }

    /// As [`Line::tell`], but gives the order back when the queue is full: threads
    /// must not wait for each other.
    pub(crate) fn offer(&self, order: Order) -> Option<Order> {
        match self.orders.try_send(order) {
            Ok(()) => {
                let _ = self.bell.write(1);
                None
            }
            Err(TrySendError::Full(order) | TrySendError::Disconnected(order)) => Some(order),
        }
    }
}

/// Wakes a thread that something changed for.
#[derive(Clone)]
pub(crate) struct Waker {
    lines: Arc<[Line]>,
    thread: usize,
}

impl Waker {
    pub(crate) fn new(lines: Arc<[Line]>, thread: usize) -> Waker {
        Waker { lines, thread }
    }

    /// A piece that the thread had asked for is over.
    pub(crate) fn ended(&self, token: usize, ended: Ended) {
        self.lines[self.thread].ended.lock().unwrap_or_else(PoisonError::into_inner).push((token, ended));
        self.wake();
    }

    pub(crate) fn wake(&self) {
        let _ = self.lines[self.thread].bell.write(1);
    }
}

impl PartialEq for Waker {
    fn eq(&self, other: &Waker) -> bool {
        self.thread == other.thread && Arc::ptr_eq(&self.lines, &other.lines)
    }
}
