//! Who is let in by the owner of a volume: of each node one link at a time, and none
//! before everything that came over its earlier ones is over.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};

use super::Hello;

/// Why a link is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u32)]
pub enum Refused {
    /// This node does not own the volume, not under that epoch, or not any more.
    #[error("the node that was asked does not own the volume")]
    NotOwner = 1,
    /// A later link of the node was there already.
    #[error("a later link was there already")]
    Outdated = 2,
    /// What came over an earlier link does not end.
    #[error("what came over an earlier link is still under way")]
    Busy = 3,
}

impl Refused {
    pub(super) fn of(number: u32) -> Option<Refused> {
        [Refused::NotOwner, Refused::Outdated, Refused::Busy].into_iter().find(|why| *why as u32 == number)
    }
}

/// The links of other nodes to one volume that this node owns.
#[derive(Clone, Default)]
pub struct Guests(Arc<Shared>);

#[derive(Default)]
struct Shared {
    book: Mutex<Book>,
    left: Condvar,
}

#[derive(Default)]
struct Book {
    /// The ownership under which links are let in.
    epoch: Option<u64>,
    nodes: BTreeMap<u64, Node>,
}

#[derive(Default)]
struct Node {
    /// Term and number of the last link.
    last: (u64, u64),
    /// Links that have something under way, or may have.
    links: Vec<(Arc<AtomicBool>, OwnedFd)>,
}

impl Node {
    /// Its links take nothing more.
    fn end(&self) {
        for (over, socket) in &self.links {
            over.store(true, Ordering::Release);
            // Whoever serves it notices.
            let _ = shutdown(std::os::fd::AsRawFd::as_raw_fd(socket), Shutdown::Both);
        }
    }
}

/// One link that was let in, until everything that came over it is over and this is
/// dropped.
pub struct Guest {
    shared: Arc<Shared>,
    node: u64,
    over: Arc<AtomicBool>,
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guests {
    /// Links that name this ownership are let in from now on.
    pub fn open(&self, epoch: u64) {
        self.0.book().epoch = Some(epoch);
    }

    /// No link is let in any more, and those that are there end; returns when nothing is
    /// under way that came over one, `false` if it still is after `patience`.
    pub fn close(&self, patience: Duration) -> bool {
        let mut book = self.0.book();
        book.epoch = None;
        book.nodes.values().for_each(Node::end);
        let busy = |book: &mut Book| book.nodes.values().any(|node| !node.links.is_empty());
        let (_book, waited) =
            self.0.left.wait_timeout_while(book, patience, busy).unwrap_or_else(PoisonError::into_inner);
        !waited.timed_out()
    }

    /// Lets a link in whose socket is `socket`: the node's earlier ones end, and it is let
    /// in when nothing of them is under way.
    ///
    /// # Errors
    /// [`Refused`] says why not.
    pub fn admit(&self, hello: &Hello, socket: OwnedFd, patience: Duration) -> Result<Guest, Refused> {
        let until = Instant::now() + patience;
        let mut book = self.0.book();
        if book.epoch != Some(hello.epoch) {
            return Err(Refused::NotOwner);
        }
        let node = book.nodes.entry(hello.node).or_default();
        let number = (hello.term, hello.number);
        if number <= node.last {
            return Err(Refused::Outdated);
        }
        node.last = number;
        node.end();
        loop {
            if book.epoch != Some(hello.epoch) {
                return Err(Refused::NotOwner);
            }
            let node = book.nodes.entry(hello.node).or_default();
            if node.last != number {
                return Err(Refused::Outdated);
            }
            if node.links.is_empty() {
                let over = Arc::new(AtomicBool::new(false));
                node.links.push((over.clone(), socket));
                return Ok(Guest { shared: self.0.clone(), node: hello.node, over });
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Refused::Busy);
            }
            book = self.0.left.wait_timeout(book, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Guest {
    /// Whether nothing more is to be done for it.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut book = self.shared.book();
        if let Some(node) = book.nodes.get_mut(&self.node) {
            node.links.retain(|(over, _)| !Arc::ptr_eq(over, &self.over));
        }
        self.shared.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use uuid::Uuid;

    use super::*;

    fn socket() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    fn hello(node: u64, term: u64, number: u64) -> Hello {
        Hello { volume: Uuid::nil(), node, term, epoch: 5, number }
    }

    #[test]
    fn a_later_link_is_let_in_when_the_earlier_one_has_ended() {
        let guests = Guests::default();
        let admit = |hello: &Hello, patience| guests.admit(hello, socket(), patience).map_err(|why| why as u32);
        assert_eq!(admit(&hello(1, 1, 10), Duration::ZERO).err(), Some(Refused::NotOwner as u32));
        guests.open(5);
        let first = admit(&hello(1, 1, 10), Duration::ZERO).unwrap();
        let _other = admit(&hello(2, 1, 10), Duration::ZERO).unwrap();
        assert_eq!(admit(&hello(1, 1, 10), Duration::ZERO).err(), Some(Refused::Outdated as u32));
        assert!(!first.is_over());
        std::thread::scope(|scope| {
            let second = scope.spawn(|| admit(&hello(1, 1, 11), Duration::from_secs(60)).map(|_| ()));
            while !first.is_over() {
                std::thread::yield_now();
            }
            assert!(!second.is_finished());
            drop(first);
            second.join().unwrap().unwrap();
        });
        // A later term begins to count anew.
        assert!(admit(&hello(1, 2, 3), Duration::ZERO).is_ok());
        assert!(!guests.close(Duration::ZERO));
    }

    #[test]
    fn whoever_gives_ownership_up_has_nothing_under_way() {
        let guests = Guests::default();
        guests.open(5);
        let guest = guests.admit(&hello(1, 1, 1), socket(), Duration::ZERO).ok().unwrap();
        assert!(!guests.close(Duration::ZERO) && guest.is_over());
        drop(guest);
        assert!(guests.close(Duration::ZERO));
        assert_eq!(guests.admit(&hello(1, 1, 2), socket(), Duration::ZERO).err(), Some(Refused::NotOwner));
    }
}
