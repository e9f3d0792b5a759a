//! `holdfast volume serve`: serves the disks of this node's VMs that are on LUNs.
//!
//! ```text
//!  keeper ── lease (shared memory), sockets ──▶ ┌────────┐ ◀── NBD ── QEMU
//!  agent  ── disks, answers ──────────────────▶ │ server │
//!         ◀── questions: slabs, parts ───────── └────────┘ ── io_uring ──▶ LUN
//! ```
//! It keeps nothing: a new life of it gets its sockets from the keeper and its disks
//! from the agent, and QEMU, which only waited, sends again what had no answer.

pub mod protocol;
mod slabs;
mod sockets;
mod supply;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_core::Mapped;
use holdfast_core::lease::BootTime;
use holdfast_qemu::NBD_EXPORT as EXPORT;
use holdfast_volume::lun::{Geometry, Superblock};
use holdfast_volume::{Export, Fence, Lun, LunDisk, Server};

use uuid::Uuid;

use crate::realtime::{LeasePage, boot_time};
use protocol::{Call, Disk, DiskId, LONGEST_LINE, ToAgent, ToServer};
use slabs::{News, Slabs};
use sockets::Sockets;

/// Threads that do I/O at most.
const THREADS: usize = 4;
/// How long the keeper's socket may take to come here after the keeper has it.
const SOCKET_WITHIN: Duration = Duration::from_secs(5);
/// How long what an earlier life of this server had on its way may take.
const HOLD_WITHIN: Duration = Duration::from_secs(8);
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
    /// Those that are open, by their volumes' identities.
    luns: BTreeMap<Uuid, (Lun, Geometry)>,
}

struct Disks {
    server: Server,
    sockets: Arc<Sockets>,
    lease: Arc<LeasePage>,
    generation: u64,
    line: Sender<News>,
    book: Mutex<Book>,
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
    let disks = Arc::new(Disks { server, sockets, lease: Arc::new(lease), generation, line, book });
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
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        match serde_json::from_slice(&line)? {
            ToServer::Answer { id, answer } => drop(disks.line.send(News::Answered { id, answer })),
            ToServer::Call { id, call: Call::Serve(disk) } => {
                let result = disks.serve(disk).map_err(|error| format!("{error:#}"));
                let _ = say.send(ToAgent::Reply { id, result });
            }
            ToServer::Call { id, call } => {
                // What is under way may wait for an answer that is read here.
                let (disks, say) = (disks.clone(), say.clone());
                std::thread::Builder::new().name("withdraw".into()).stack_size(128 << 10).spawn(move || {
                    let result = disks.withdraw(&call).map_err(|error| format!("{error:#}"));
                    let _ = say.send(ToAgent::Reply { id, result });
                })?;
            }
        }
    }
}

impl Disks {
    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, disk: Disk) -> anyhow::Result<()> {
        let mut book = self.book();
        let parts: Vec<_> = disk.parts.iter().flat_map(one_by_one).collect();
        if let Some(known) = book.served.get_mut(&disk.id()) {
            if !self.server.add_parts(known.number, &parts) {
                anyhow::bail!("the disk has other slabs here than in the cluster's state");
            }
            if disk.may_write {
                known.right.given.store(true, Ordering::Release);
            }
            return Ok(());
        }
        let listener = self.sockets.wait(&disk.socket, SOCKET_WITHIN)?;
        let (lun, geometry) = self.open(&mut book, &disk)?;
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

    /// Opens the LUN that a disk is on, unless it is open.
    fn open(&self, book: &mut Book, disk: &Disk) -> anyhow::Result<(Lun, Geometry)> {
        if let Some((lun, geometry)) = book.luns.get(&disk.volume_id) {
            return Ok((lun.clone(), *geometry));
        }
        let lun = Lun::open(&disk.device)?;
        // What an earlier life of this server had on its way may still land. Nodes have
        // block devices of their own, but a file in the place of one they share, and with
        // it the lock.
        let block = std::fs::metadata(&disk.device)?.file_type().is_block_device();
        if block && !lun.hold(HOLD_WITHIN)? {
            anyhow::bail!("I/O of an earlier volume server is still under way on {}", disk.device.display());
        }
        let Superblock { identity, geometry, .. } = Superblock::read(&lun)?;
        if identity.volume != disk.volume_id {
            anyhow::bail!("{} holds another volume, {:?}", disk.device.display(), identity.name);
        }
        let (volume, name) = (disk.volume_id, disk.volume.clone());
        let lease = Arc::new(self.right(true));
        let _ = self.line.send(News::Opened { volume, name, lun: lun.clone(), geometry, lease });
        book.luns.insert(volume, (lun.clone(), geometry));
        Ok((lun, geometry))
    }

    fn withdraw(&self, call: &Call) -> anyhow::Result<()> {
        let gone: Vec<Served> = {
            let mut book = self.book();
            let over: Vec<DiskId> = match call {
                Call::Withdraw(disk) => {
                    // An earlier life may have served it: once the LUN is held here,
                    // nothing of that is under way.
                    self.open(&mut book, disk)?;
                    vec![disk.id()]
                }
                Call::Only(kept) => {
                    let kept: BTreeSet<_> = kept.iter().copied().collect();
                    book.served.keys().filter(|disk| !kept.contains(disk)).copied().collect()
                }
                Call::Serve(_) => Vec::new(),
            };
            over.into_iter().filter_map(|disk| book.served.remove(&disk)).collect()
        };
        let mut stuck = Vec::new();
        for served in gone {
            served.right.given.store(false, Ordering::Release);
            self.sockets.forget(&served.order.socket);
            if !self.server.withdraw(served.number, WITHDRAW_WITHIN) {
                stuck.push(served.order.id());
            }
        }
        if !stuck.is_empty() {
            // The next life waits for it before it does anything.
            tracing::error!(?stuck, "I/O of disks that nobody uses does not end: this process does");
            std::process::abort();
        }
        Ok(())
    }
}

fn one_by_one(run: &Mapped) -> impl Iterator<Item = (u32, u32)> + use<> {
    let run = *run;
    (0..run.count).map(move |step| (run.part + step, run.slab + step))
}
