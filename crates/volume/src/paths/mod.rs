//! The ways to a LUN: this host's own, and through another node.
//!
//! ```text
//!  requests ─▶ [Table] which way? ─┬─ direct ─ io_uring or an export's connection
//!      ▲          ▲                └─ link ─── the owner's volume server
//!      │ again    │ probes, silence: the clock's thread
//!      └──────────┘
//! ```
//! What fails with its way is tried again on whichever works, and waits while none does:
//! whoever asked sees a slow answer and no error.

mod table;

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::EIO;

pub use table::Reach;
pub(crate) use table::{Begin, Luck, Way};

use self::table::{End, Table};
use crate::buffer::Pool;
use crate::device::Storage;
use crate::lun::PAGE_BYTES;
use crate::piece::{Ended, Op, Piece};
use crate::remote::{LATE, Remote};

/// How often requests that wait for a way are looked at again by those who block.
const AGAIN: Duration = Duration::from_millis(5);

/// Opens the LUN on this host anew.
pub(crate) type Opens = Box<dyn Fn() -> io::Result<Storage> + Send + Sync>;
/// Hears how the LUN is reached, each time that changes.
pub type Hears = Box<dyn Fn(&Reach) + Send>;

/// What went through another node so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Reads, writes and flushes.
    pub requests: u64,
    /// Bytes that were read and written.
    pub bytes: u64,
}

/// The ways to one LUN, until it is dropped.
pub(crate) struct Paths(Arc<Shared>);

struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
    opens: Opens,
}

struct Inner {
    table: Table,
    direct: Option<Storage>,
    link: Option<Arc<Remote>>,
    /// Links to earlier owners that may have something under way.
    earlier: Vec<Arc<Remote>>,
    carried: Carried,
    /// The clock's thread sleeps until it is woken.
    asleep: bool,
    ended: bool,
}

impl std::fmt::Debug for Paths {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.debug_struct("Paths").field("table", &self.0.inner().table).finish_non_exhaustive()
    }
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Paths {
    /// The ways to a LUN that this host has open, or why it has not.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(crate) fn new(direct: Result<Storage, String>, opens: Opens, hears: Hears) -> io::Result<Paths> {
        let (direct, known) = match direct {
            Ok(storage) => (Some(storage), Ok(())),
            Err(why) => (None, Err(why)),
        };
        let inner = Inner {
            table: Table::new(known, Instant::now()),
            direct,
            link: None,
            earlier: Vec::new(),
            carried: Carried::default(),
            asleep: false,
            ended: false,
        };
        let shared = Arc::new(Shared { inner: Mutex::new(inner), changed: Condvar::new(), opens });
        let theirs = shared.clone();
        std::thread::Builder::new().name("paths".into()).stack_size(256 << 10).spawn(move || watch(&theirs, &hears))?;
        Ok(Paths(shared))
    }

    /// Another node is to be gone through from now on, or none. `new_owner`: whatever
    /// earlier ones had been asked for is certainly over.
    pub(crate) fn set_link(&self, link: Option<Remote>, new_owner: bool) {
        let mut inner = self.0.inner();
        let before = std::mem::replace(&mut inner.link, link.map(Arc::new));
        inner.earlier.extend(before);
        if new_owner {
            inner.earlier.drain(..).for_each(|link| link.is_over());
            inner.table.set_held(false);
        }
        let exists = inner.link.is_some();
        inner.table.set_link(exists, Instant::now());
        self.0.changed.notify_all();
    }

    /// Whether the link is to be used although the direct way works.
    pub(crate) fn set_planned(&self, planned: bool) {
        self.0.inner().table.set_planned(planned);
        self.0.changed.notify_all();
    }

    /// Uses no direct way until the link has answered, or there is a new owner.
    pub(crate) fn hold(&self) {
        self.0.inner().table.set_held(true);
        self.0.changed.notify_all();
    }

    /// Waits until the direct way is not held any more; `false`: it still is.
    pub(crate) fn wait_unheld(&self, patience: Duration) -> bool {
        let held = |inner: &mut Inner| inner.table.is_held();
        let waited = self.0.changed.wait_timeout_while(self.0.inner(), patience, held);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// How the LUN is reached.
    pub(crate) fn reach(&self) -> Reach {
        self.0.inner().table.reach().clone()
    }

    /// What went through other nodes.
    pub(crate) fn carried(&self) -> Carried {
        self.0.inner().carried
    }

    /// Whether an attempt may begin, and with which storage: its number has to be given to
    /// [`Paths::over`] with its end. `alone`: not through another node.
    pub(crate) fn begin(&self, piece: &Piece, alone: bool, luck: &mut Luck) -> (Begin, Option<Storage>) {
        let mut inner = self.0.inner();
        let began = inner.table.begin(piece.op, (piece.at, piece.length), alone, luck, Instant::now());
        let storage = match began {
            Begin::Go(Way::Direct, _) => inner.direct.clone(),
            Begin::Go(Way::Link, _) => {
                inner.carried.requests += 1;
                inner.carried.bytes += piece.data().len() as u64;
                inner.link.clone().map(Storage::Remote)
            }
            _ => None,
        };
        if inner.asleep {
            inner.asleep = false;
            self.0.changed.notify_all();
        }
        (began, storage)
    }

    /// An attempt is over; says whether it is to be made again.
    pub(crate) fn over(&self, number: usize, outcome: &io::Result<u32>, luck: &mut Luck) -> bool {
        let mut inner = self.0.inner();
        let text;
        let end = match outcome {
            Err(error) if error.raw_os_error() == Some(LATE) => End::Late,
            // The owner has made sure that its path was not to blame.
            Err(error) if error.raw_os_error() == Some(EIO) && inner.table.way_of(number) == Way::Link => End::Told,
            Err(error) if is_of_the_way(error) => {
                text = error.to_string();
                End::WayFailed(&text)
            }
            _ => End::Told,
        };
        let again = inner.table.over(number, end, luck, Instant::now());
        if again {
            self.0.changed.notify_all();
        }
        again
    }

    /// Does something by whichever way works, however long none does; `None` if `may_go_on`
    /// said no before.
    pub(crate) fn perform(&self, mut piece: Piece, may_go_on: &dyn Fn() -> bool) -> Option<Ended> {
        let mut luck = Luck::default();
        loop {
            match self.begin(&piece, false, &mut luck) {
                (Begin::Go(_, number), Some(storage)) => {
                    let ended = storage.perform(piece);
                    if !self.over(number, &ended.outcome, &mut luck) {
                        return Some(ended);
                    }
                    piece = ended.piece;
                }
                (Begin::Refuse, _) => {
                    return Some(Ended { piece, outcome: Err(io::Error::from_raw_os_error(EIO)) });
                }
                _ => {}
            }
            if !may_go_on() {
                return None;
            }
            let inner = self.0.inner();
            drop(self.0.changed.wait_timeout(inner, AGAIN));
        }
    }
}

impl Drop for Paths {
    fn drop(&mut self) {
        self.0.inner().ended = true;
        self.0.changed.notify_all();
    }
}

/// Whether an error is about how storage is reached rather than about what was asked.
fn is_of_the_way(error: &io::Error) -> bool {
    let Some(number) = error.raw_os_error() else { return false };
    matches!(
        Errno::from_raw(number),
        Errno::EIO
            | Errno::ENXIO
            | Errno::ENODEV
            | Errno::ENOTCONN
            | Errno::ECONNRESET
            | Errno::ECONNABORTED
            | Errno::EPIPE
            | Errno::ETIMEDOUT
            | Errno::ENOLINK
            | Errno::EREMOTEIO
            | Errno::EHOSTUNREACH
            | Errno::EHOSTDOWN
            | Errno::ENETUNREACH
            | Errno::ESHUTDOWN
    )
}

/// Probes ways, and tells how the LUN is reached, until nobody needs it any more.
fn watch(shared: &Arc<Shared>, hears: &Hears) {
    let mut told = None::<Reach>;
    let mut inner = shared.inner();
    while !inner.ended {
        let probes = inner.table.tick(Instant::now());
        if inner.table.direct_hangs()
            && let Some(Storage::Remote(remote)) = &inner.direct
        {
            // What waits for it comes to an end, and the probe with it.
            remote.give_up();
        }
        let reach = inner.table.reach().clone();
        let news = told.as_ref() != Some(&reach);
        if news || !probes.is_empty() {
            drop(inner);
            if news {
                hears(&reach);
                told = Some(reach);
            }
            for way in probes {
                probe(shared, way);
            }
            inner = shared.inner();
            continue;
        }
        inner = match inner.table.wakes_in(Instant::now()) {
            Some(patience) => {
                let patience = patience.max(Duration::from_millis(1));
                shared.changed.wait_timeout(inner, patience).unwrap_or_else(PoisonError::into_inner).0
            }
            None => {
                inner.asleep = true;
                shared.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
            }
        };
    }
}

/// Reads by one way, in a thread of its own: it may hang.
fn probe(shared: &Arc<Shared>, way: Way) {
    let theirs = shared.clone();
    let body = move || {
        let (storage, idle) = {
            let inner = theirs.inner();
            match way {
                Way::Direct => (inner.direct.clone(), inner.table.direct_is_idle()),
                Way::Link => (inner.link.clone().map(Storage::Remote), false),
            }
        };
        let read = |storage: &Storage| {
            let buffer = Pool::default().get(PAGE_BYTES);
            let piece = Piece { op: Op::Read, at: 0, length: PAGE_BYTES as u64, buffer, skip: 0 };
            storage.perform(piece).outcome.map(drop)
        };
        let mut found = storage.as_ref().map_or(Err(io::ErrorKind::NotConnected.into()), read);
        // Perhaps the device is another one now. What an old one had under way is over.
        if found.is_err() && way == Way::Direct && idle {
            match (theirs.opens)() {
                Ok(storage) => {
                    found = read(&storage);
                    theirs.inner().direct = Some(storage);
                }
                Err(error) if storage.is_none() => found = Err(error),
                Err(_) => {}
            }
        }
        theirs.inner().table.probed(way, found.map_err(|error| error.to_string()), Instant::now());
        theirs.changed.notify_all();
    };
    if let Err(error) = std::thread::Builder::new().name("probe".into()).stack_size(128 << 10).spawn(body) {
        shared.inner().table.probed(way, Err(format!("no thread to try it with: {error}")), Instant::now());
    }
}
