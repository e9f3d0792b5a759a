//! `holdfast volume serve`: serves the disks of this node's VMs that are on LUNs.
//!
//! ```text
//!  keeper ── lease (shared memory), sockets ──▶ ┌────────┐ ◀── NBD ── QEMU
//!  agent  ── disks, answers ──────────────────▶ │ server │
//!         ◀── questions: slabs, parts ───────── └────────┘ ── io_uring ──▶ LUN
//! ```
//! It keeps nothing: a new life of it gets its sockets from the keeper and its disks
//! from the agent, and QEMU, which only waited, sends again what had no answer.

mod journal;
mod link;
pub mod protocol;
mod returns;
mod routes;
mod slabs;
mod sockets;
mod supply;
#[cfg(test)]
mod tests;
pub mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use holdfast_core::lease::BootTime;
use holdfast_core::{Mapped, NodeTerm};
use holdfast_qemu::NBD_EXPORT as EXPORT;
use holdfast_volume::lun::Geometry;
use holdfast_volume::{Export, Fence, Lun, LunDisk, Server};

use uuid::Uuid;

use crate::realtime::{LeasePage, boot_time};
use journal::Journals;
pub use journal::agreed;
use protocol::{Call, Description, Disk, DiskId, LONGEST_LINE, Links, Routes, ToAgent, ToServer};
use routes::{Away, Through, Ways};
use slabs::{News, Slabs};
use sockets::Sockets;

/// Threads that do I/O at most.
const THREADS: usize = 4;
/// How long the keeper's socket may take to come here after the keeper has it.
const SOCKET_WITHIN: Duration = Duration::from_secs(5);
/// How long what an earlier life of this server had on its way may take.
const HOLD_WITHIN: Duration = Duration::from_secs(8);
/// How often the agent hears how much goes through other nodes.
const CARRIED_AGAIN: Duration = Duration::from_secs(1);
/// The directory, in the run directory, of marks that links may be in use.
const MARKS: &str = "links";
/// How long what is under way may take when a disk is withdrawn.
const WITHDRAW_WITHIN: Duration = Duration::from_secs(20);

/// The right to write to one disk: the node's lease as it was when this process was
/// started, and the word of whoever moves the VM.
struct Right {
    lease: Arc<LeasePage>,
    generation: u64,
    given: AtomicBool,
}

impl Fence for Right {
    fn may_write(&self) -> bool {
        self.given.load(Ordering::Acquire)
            && self.lease.generation.load(Ordering::SeqCst) == self.generation
            && boot_time() < BootTime(self.lease.ends.load(Ordering::SeqCst))
    }
}

struct Served {
    number: u64,
    order: Disk,
    right: Arc<Right>,
}

#[derive(Default)]
struct Book {
    served: BTreeMap<DiskId, Served>,
    /// Numbers of the server that were used.
    numbers: u64,
    /// By their numbers.
    under_way: BTreeMap<u64, UnderWay>,
    calls: u64,
    /// Hears of the end of the last withdrawal that was begun.
    withdrawal: Option<Receiver<()>>,
    /// By their volumes' identities; only those of disks that are served, and of calls
    /// that are under way.
    luns: BTreeMap<Uuid, Arc<MaybeOpen>>,
    /// Held while the part that this node plays for others changes, by volume.
    parts: BTreeMap<Uuid, Arc<Mutex<()>>>,
}

/// A call for a disk.
struct UnderWay {
    volume: Uuid,
    /// It is to be served, and no later call was to withdraw it.
    serves: Option<DiskId>,
}

impl Book {
    /// Disks that are not served from now on, nor will be by calls that came before.
    fn take_out(&mut self, which: impl Fn(&DiskId) -> bool) -> Withdrawal {
        for call in self.under_way.values_mut() {
            call.serves.take_if(|disk| which(disk));
        }
        let over: Vec<DiskId> = self.served.keys().filter(|disk| which(disk)).copied().collect();
        let gone = over.into_iter().filter_map(|disk| self.served.remove(&disk)).collect();
        let (over, heard) = channel();
        Withdrawal { gone, before: self.withdrawal.replace(heard), over }
    }

    fn begin(&mut self, disk: &Disk, serves: bool) -> u64 {
        self.need(disk.volume_id, serves.then(|| disk.id()))
    }

    /// A call needs a LUN, to serve a disk on it if one is named.
    fn need(&mut self, volume: Uuid, serves: Option<DiskId>) -> u64 {
        self.calls += 1;
        self.under_way.insert(self.calls, UnderWay { volume, serves });
        self.calls
    }
}

/// A call of which the part was done that has to be in order.
enum Begun {
    Serve(u64, Disk),
    /// One disk, or others than some; and what was served of them.
    Withdraw(Option<(u64, Disk)>, Withdrawal),
    Describe(Box<Description>),
    EndDescription(Uuid),
    Links(Links),
    /// The call's number, if the LUN is needed for others.
    Routes(Option<u64>, Box<Routes>),
}

/// Disks that are to be withdrawn.
struct Withdrawal {
    gone: Vec<Served>,
    /// The one before this: it may be about the same disk, whose I/O is under way still.
    before: Option<Receiver<()>>,
    /// Dropped at the end of this one.
    over: Sender<()>,
}

/// A LUN, once it is open. Locked while this host's own way to it is opened, which may take
/// for ever where the kernel does.
type MaybeOpen = Mutex<Option<Opened>>;

struct Opened {
    lun: Lun,
    /// Once it was read.
    geometry: Option<Geometry>,
    /// What slabs are zeroed under.
    wipes: Arc<Right>,
    through: Through,
}

struct Disks {
    server: Server,
    sockets: Arc<Sockets>,
    lease: Arc<LeasePage>,
    generation: u64,
    line: Sender<News>,
    book: Mutex<Book>,
    journals: Journals,
    ways: Ways,
}

/// Serves until the keeper is gone or kills it.
///
/// # Errors
/// It was not started by a keeper, or the kernel does not give what is needed.
pub fn serve(channel_to_keeper: OwnedFd, control: &Path) -> anyhow::Result<()> {
    let (lease, sockets) = Sockets::receive(channel_to_keeper)?;
    let generation = lease.generation.load(Ordering::SeqCst);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    let server = Server::start(threads)?;
    let listener = sockets.wait(control, SOCKET_WITHIN)?;
    let (line, inbox) = channel();
    let theirs = line.clone();
    std::thread::Builder::new().name("slabs".into()).stack_size(256 << 10).spawn(move || {
        slabs::run(&inbox, &theirs);
    })?;
    let book = Mutex::default();
    let lease = Arc::new(lease);
    let marks = control.parent().unwrap_or(Path::new("/")).join(MARKS);
    let ways = Ways::new(lease.clone(), generation, marks);
    let disks = Arc::new(Disks { server, sockets, lease, generation, line, book, journals: Journals::default(), ways });
    let theirs = Arc::downgrade(&disks);
    std::thread::Builder::new().name("carried".into()).stack_size(128 << 10).spawn(move || {
        while let Some(disks) = theirs.upgrade() {
            disks.tell_carried();
            drop(disks);
            std::thread::sleep(CARRIED_AGAIN);
        }
    })?;
    obey(&disks, &listener)
}

/// Does what agents say, one after the other: each is another life of the same.
fn obey(disks: &Arc<Disks>, listener: &UnixListener) -> anyhow::Result<()> {
    loop {
        let (stream, _) = listener.accept()?;
        if let Err(error) = listen_to(disks, stream) {
            tracing::warn!(%error, "the agent left");
        }
    }
}

fn listen_to(disks: &Arc<Disks>, stream: UnixStream) -> io::Result<()> {
    let (say, words) = channel::<ToAgent>();
    let mut writing = stream.try_clone()?;
    std::thread::Builder::new().name("answers".into()).stack_size(128 << 10).spawn(move || {
        while let Ok(word) = words.recv() {
            let Ok(mut line) = serde_json::to_vec(&word) else { continue };
            line.push(b'\n');
            if writing.write_all(&line).is_err() {
                return;
            }
        }
    })?;
    let _ = disks.line.send(News::Agent(say.clone()));
    disks.ways.agent(say.clone());
    disks.tell_reach();
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        match serde_json::from_slice(&line)? {
            ToServer::Answer { id, answer } => drop(disks.line.send(News::Answered { id, answer })),
            ToServer::Call { id, call } => {
                // What is done may wait for a LUN that hangs, or for an answer that is
                // read here.
                let begun = disks.begin(call);
                let (disks, say) = (disks.clone(), say.clone());
                let body = move || {
                    let result = disks.finish(begun).map_err(|error| format!("{error:#}"));
                    let _ = say.send(ToAgent::Reply { id, result });
                };
                if let Err(error) = std::thread::Builder::new().name("call".into()).stack_size(256 << 10).spawn(body) {
                    // Disks are half withdrawn: the next life waits for their I/O.
                    tracing::error!(%error, "there can be no thread for a call");
                    std::process::abort();
                }
            }
        }
    }
}

impl Disks {
    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What of a call has to be done in the order of calls.
    fn begin(&self, call: Call) -> Begun {
        let mut book = self.book();
        match call {
            Call::Serve(disk) => {
                let number = book.begin(&disk, true);
                Begun::Serve(number, disk)
            }
            Call::Withdraw(disk) => {
                let gone = book.take_out(|id| *id == disk.id());
                let number = book.begin(&disk, false);
                Begun::Withdraw(Some((number, disk)), gone)
            }
            Call::Only(kept) => {
                let kept: BTreeSet<_> = kept.into_iter().collect();
                Begun::Withdraw(None, book.take_out(|id| !kept.contains(id)))
            }
            Call::Describe(description) => Begun::Describe(Box::new(description)),
            Call::EndDescription { volume_id, epoch } => {
                self.journals.end(volume_id, epoch);
                Begun::EndDescription(volume_id)
            }
            Call::Links(links) => Begun::Links(links),
            Call::Routes(routes) => {
                self.ways.learn(routes.clone());
                let number = routes.mine.or(routes.leaves).map(|_| book.need(routes.volume_id, None));
                Begun::Routes(number, Box::new(routes))
            }
        }
    }

    fn finish(self: &Arc<Disks>, begun: Begun) -> anyhow::Result<()> {
        let (number, done) = match begun {
            Begun::Describe(description) => return self.journals.write(Arc::new(self.right(true)), &description),
            Begun::EndDescription(volume) => {
                self.journals.close(volume);
                return Ok(());
            }
            Begun::Links(links) => {
                let theirs = Arc::downgrade(self);
                return self.ways.links(&links, move |hello, pipe| {
                    if let Some(disks) = theirs.upgrade() {
                        disks.ways.met(&disks.server, hello, pipe);
                    }
                });
            }
            Begun::Routes(number, routes) => (number, self.route(&routes)),
            Begun::Serve(number, disk) => (Some(number), self.serve(number, disk)),
            Begun::Withdraw(None, gone) => (None, self.withdraw(None, gone)),
            Begun::Withdraw(Some((number, disk)), gone) => (Some(number), self.withdraw(Some(&disk), gone)),
        };
        let mut book = self.book();
        if let Some(number) = number {
            book.under_way.remove(&number);
        }
        self.close_unused(&mut book);
        done
    }

    /// Lets go of LUNs that nobody needs here: somebody may want to remove them.
    fn close_unused(&self, book: &mut Book) {
        let Book { served, under_way, luns, .. } = book;
        let served = served.values().map(|served| served.order.volume_id);
        let used: BTreeSet<Uuid> = served.chain(under_way.values().map(|call| call.volume)).collect();
        luns.retain(|volume, place| {
            let used = used.contains(volume) || self.ways.is_mine(*volume);
            // Whoever opens it, and keeps it locked, is under way.
            if !used && let Some(opened) = place.lock().unwrap_or_else(PoisonError::into_inner).take() {
                opened.wipes.given.store(false, Ordering::Release);
                let _ = self.line.send(News::Closed { volume: *volume });
                self.ways.tell_closed(*volume);
            }
            used
        });
    }

    fn serve(&self, call: u64, disk: Disk) -> anyhow::Result<()> {
        let parts: Vec<_> = disk.parts.iter().copied().flat_map(Mapped::one_by_one).collect();
        let known = self.book().served.contains_key(&disk.id());
        let listener = if known { None } else { Some(self.sockets.wait(&disk.socket, SOCKET_WITHIN)?) };
        let (lun, geometry) = self.open(disk.volume_id, &disk.device)?;
        let mut book = self.book();
        if book.under_way.get(&call).is_none_or(|call| call.serves.is_none()) {
            bail!("the disk was withdrawn meanwhile");
        }
        if let Some(known) = book.served.get_mut(&disk.id()) {
            if !known.right.given.load(Ordering::Acquire) {
                if !self.server.learn_parts(known.number, &parts) {
                    bail!("the disk cannot have the slabs that it has in the cluster's state");
                }
                known.right.given.store(disk.may_write, Ordering::Release);
            }
            return Ok(());
        }
        let listener = listener.context("the disk is not served any more")?;
        let right = Arc::new(self.right(disk.may_write));
        let on_lun = LunDisk { name: EXPORT.into(), lun, geometry, bytes: disk.bytes, read_only: false, parts };
        let slabs = Slabs { volume: disk.volume_id, disk: disk.id(), line: self.line.clone() };
        let export = Export::on_lun(on_lun, Arc::new(slabs), right.clone())?;
        book.numbers += 1;
        let number = book.numbers;
        self.server.serve(number, listener, export);
        book.served.insert(disk.id(), Served { number, order: disk, right });
        Ok(())
    }

    fn right(&self, given: bool) -> Right {
        Right { lease: self.lease.clone(), generation: self.generation, given: given.into() }
    }

    /// Opens a LUN, unless it is open.
    fn open(&self, volume: Uuid, device: &Path) -> anyhow::Result<(Lun, Geometry)> {
        let place = self.book().luns.entry(volume).or_default().clone();
        let lock = || place.lock().unwrap_or_else(PoisonError::into_inner);
        let mut opened = lock();
        let (lun, shown) = match &*opened {
            Some(Opened { lun, geometry: Some(geometry), .. }) => return Ok((lun.clone(), *geometry)),
            Some(Opened { lun, .. }) => (lun.clone(), None),
            None => {
                let (lun, shown, through) = self.ways.open(volume, device, HOLD_WITHIN)?;
                let wipes = Arc::new(self.right(true));
                *opened = Some(Opened { lun: lun.clone(), geometry: None, wipes, through });
                (lun, shown)
            }
        };
        // What comes through an owner may need the next one, of whom is heard meanwhile.
        let looked = match shown {
            Some(geometry) => Ok(geometry),
            None => {
                drop(opened);
                let looked = Ways::look(volume, &lun);
                opened = lock();
                looked
            }
        };
        let place = opened.as_mut().context("the LUN was closed meanwhile")?;
        if let Some(geometry) = place.geometry {
            return Ok((place.lun.clone(), geometry));
        }
        match looked {
            Ok(geometry) => {
                place.geometry = Some(geometry);
                let (lun, lease) = (place.lun.clone(), place.wipes.clone());
                let _ = self.line.send(News::Opened { volume, lun: lun.clone(), geometry, lease });
                Ok((lun, geometry))
            }
            Err(why) => {
                *opened = None;
                self.ways.tell_closed(volume);
                Err(why)
            }
        }
    }

    /// Does what the agent said last about the ways to a LUN.
    fn route(&self, routes: &Routes) -> anyhow::Result<()> {
        let volume = routes.volume_id;
        let place = self.book().luns.get(&volume).cloned();
        if let Some(place) = place
            && let Some(Opened { lun, through, .. }) = &mut *place.lock().unwrap_or_else(PoisonError::into_inner)
        {
            self.ways.follow(volume, lun, through)?;
        }
        let part = self.book().parts.entry(volume).or_default().clone();
        let Ok(_part) = part.try_lock() else { bail!("an earlier call for the volume's owner is under way") };
        let routes = self.ways.known(volume).unwrap_or_else(|| routes.clone());
        let term = NodeTerm(self.lease.term.load(Ordering::SeqCst));
        match (routes.mine, routes.leaves) {
            (Some(_), _) if routes.term != term => bail!("this server lives under another term of the node's"),
            (Some(epoch), _) => {
                let (lun, _) = self.open(volume, &routes.device)?;
                self.ways.host(volume, epoch, &lun);
            }
            (None, leaves) => {
                let hosted = self.ways.host_no_more(volume);
                // An earlier life may have: once the LUN is held here, be it that it cannot
                // be read, nothing of that is under way.
                if !hosted && leaves.is_some() {
                    match self.open(volume, &routes.device) {
                        Err(why) if !why.is::<Away>() => return Err(why),
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn each_open(&self, does: impl Fn(Uuid, &mut Opened)) {
        let luns: Vec<_> = self.book().luns.iter().map(|(volume, place)| (*volume, place.clone())).collect();
        for (volume, place) in luns {
            // One that is being opened will tell by itself.
            if let Ok(mut place) = place.try_lock()
                && let Some(opened) = &mut *place
            {
                does(volume, opened);
            }
        }
    }

    fn tell_reach(&self) {
        self.each_open(|volume, opened| self.ways.tell(volume, &opened.lun));
    }

    fn tell_carried(&self) {
        self.each_open(|volume, opened| self.ways.tell_carried(volume, &opened.lun, &mut opened.through));
    }

    fn withdraw(&self, disk: Option<&Disk>, Withdrawal { gone, before, over }: Withdrawal) -> anyhow::Result<()> {
        let mut stuck = Vec::new();
        for served in gone {
            served.right.given.store(false, Ordering::Release);
            self.sockets.forget(&served.order.socket);
            if !self.server.withdraw(served.number, WITHDRAW_WITHIN) {
                stuck.push(served.order.id());
            }
            let _ = self.line.send(News::Gone { volume: served.order.volume_id, disk: served.order.id() });
        }
        if !stuck.is_empty() {
            // The next life waits for it before it does anything.
            tracing::error!(?stuck, "I/O of disks that nobody uses does not end: this process does");
            std::process::abort();
        }
        if let Some(before) = before {
            let _ = before.recv();
        }
        drop(over);
        if let Some(disk) = disk {
            // An earlier life may have served it: once the LUN is held here, and its owner
            // has answered if that was gone through, nothing of that is under way.
            let (lun, _) = self.open(disk.volume_id, &disk.device)?;
            if !lun.wait_direct(HOLD_WITHIN) {
                bail!("what an earlier volume server asked of the volume's owner may be under way still");
            }
        }
        Ok(())
    }
}
