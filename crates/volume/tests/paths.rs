//! Two nodes, each with a way of its own to one storage, and a link between them: ways
//! break, hang and heal while a guest writes.

mod common;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::breaking::{Breaking, Mode};
use common::*;
use holdfast_volume::link::{self, Dial, Guests, Lease, Link, Welcome};
use holdfast_volume::lun::Geometry;
use holdfast_volume::{
    Allocator, Export, Grant, Hosted, Lun, LunDisk, Open, Pipe, Reach, Refusal, Release, Server, Wanted,
};
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const LUN: u64 = 100 * MIB;
const SLAB: u64 = 16 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);
const EPOCH: u64 = 3;
/// The doors of the storage.
const OURS: usize = 0;
const OWNERS: usize = 1;

/// A lease that ends when the test says so.
struct Right {
    began: Instant,
    ends: AtomicU64,
}

impl Right {
    fn new() -> Arc<Right> {
        Arc::new(Right { began: Instant::now(), ends: AtomicU64::new(u64::MAX / 2) })
    }

    fn end(&self) {
        self.ends.store(self.now_ns(), Ordering::SeqCst);
    }
}

impl Lease for Right {
    fn now_ns(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64 + 1
    }

    fn ends_ns(&self) -> u64 {
        self.ends.load(Ordering::SeqCst)
    }
}

/// No disk here needs slabs: it has them all.
struct None;

impl Allocator for None {
    fn allocate(&self, _: Wanted, grant: Grant) {
        grant.refuse(Refusal::Unavailable);
    }

    fn release(&self, _: std::ops::Range<u32>, release: Release) {
        release.refuse();
    }
}

fn by_ways(address: &Path) -> (Lun, Receiver<Reach>) {
    let (tell, told) = channel();
    let theirs = address.to_owned();
    let opens = move || Lun::open(&theirs).map_err(io::Error::other);
    let direct = Lun::open(address).map_err(|error| error.to_string());
    let tell = Mutex::new(tell);
    let hears = Box::new(move |reach: &Reach| drop(tell.lock().unwrap().send(reach.clone())));
    (Lun::by_ways(address, direct, Option::None, opens, hears).unwrap(), told)
}

/// The node that owns the volume: one life of its server.
struct Owner {
    guests: Guests,
    lease: Arc<Right>,
    _server: Arc<Server>,
    stopped: Arc<AtomicBool>,
    socket: PathBuf,
}

impl Owner {
    fn start(address: &Path, dir: &Path) -> Owner {
        let socket = dir.join("owner");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let (lun, _) = by_ways(address);
        let (server, lease, guests) = (Arc::new(Server::start(2).unwrap()), Right::new(), Guests::default());
        guests.open(EPOCH);
        let hosted = Arc::new(Hosted::new(lun.clone(), lease.clone()));
        let stopped = Arc::new(AtomicBool::new(false));
        let (theirs, clock, let_in, over) = (server.clone(), lease.clone(), guests.clone(), stopped.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (server, clock, guests) = (theirs.clone(), clock.clone(), let_in.clone());
                let (hosted, block_bytes, bytes) = (hosted.clone(), lun.block_bytes(), lun.bytes());
                std::thread::spawn(move || {
                    stream.set_nonblocking(true).unwrap();
                    let mut pipe: Box<dyn Pipe> = Box::new(stream);
                    let Ok(hello) = link::hear(&mut *pipe, PATIENCE) else { return };
                    let socket = pipe.fd().try_clone_to_owned().unwrap();
                    let admitted = guests.admit(&hello, socket, PATIENCE);
                    let refused = admitted.as_ref().err().copied();
                    let welcome = Welcome { refused, block: block_bytes, bytes, stamp_ns: clock.now_ns() };
                    if link::answer(&mut *pipe, &welcome, PATIENCE).is_ok()
                        && let Ok(guest) = admitted
                    {
                        server.let_in(&hosted, pipe, guest);
                    }
                });
            }
        });
        Owner { guests, lease, _server: server, stopped, socket }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.socket);
        assert!(self.guests.close(PATIENCE));
    }
}

struct ToOwner(PathBuf);

impl Dial for ToOwner {
    fn dial(&mut self, _: Duration) -> io::Result<Box<dyn Pipe>> {
        let stream = UnixStream::connect(&self.0)?;
        stream.set_nonblocking(true)?;
        Ok(Box::new(stream))
    }

    fn in_use(&mut self, _: bool) {}
}

/// The node that has a guest.
struct Node {
    dir: tempfile::TempDir,
    storage: Breaking,
    owners: PathBuf,
    owner: Option<Owner>,
    lun: Lun,
    reach: Receiver<Reach>,
    lease: Arc<Right>,
    server: Server,
}

impl Node {
    fn new() -> Node {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let storage = Breaking::new(LUN, 2);
        let (ours, owners) = (storage.open(OURS, dir.path()), storage.open(OWNERS, dir.path()));
        let owner = Owner::start(&owners, dir.path());
        let (lun, reach) = by_ways(&ours);
        let lease = Right::new();
        let dial = Box::new(ToOwner(owner.socket.clone()));
        let volume = Uuid::from_u128(1);
        let link = Link { dial, lease: lease.clone(), volume, node: 1, term: 1, epoch: EPOCH };
        lun.go_through(Some(link), true).unwrap();
        let server = Server::start(2).unwrap();
        let geometry = Geometry::of(lun.bytes(), Some(SLAB)).unwrap();
        let parts = (0..4).map(|part| (part, part)).collect();
        let disk =
            LunDisk { name: "disk".into(), lun: lun.clone(), geometry, bytes: 4 * SLAB, read_only: false, parts };
        let export = Export::on_lun(disk, Arc::new(None), Arc::new(Open)).unwrap();
        server.serve(1, UnixListener::bind(dir.path().join("socket")).unwrap(), export);
        Node { dir, storage, owners, owner: Some(owner), lun, reach, lease, server }
    }

    fn client(&self) -> Client {
        Client::connect(UnixStream::connect(self.dir.path().join("socket")).unwrap())
    }

    fn wait(&self, what: impl Fn(&Reach) -> bool) -> Reach {
        loop {
            // What is told may be old: it says when to look.
            let reach = self.lun.reach().0;
            if what(&reach) {
                return reach;
            }
            self.reach.recv_timeout(PATIENCE).expect("it is reached in another way");
        }
    }

    fn wait_redirected(&self) -> Reach {
        self.wait(|reach| matches!(reach, Reach::Redirected { .. }))
    }

    fn wait_direct(&self) {
        self.wait(|reach| *reach == Reach::Direct);
    }

    fn wait_unavailable(&self) -> Reach {
        self.wait(|reach| matches!(reach, Reach::Unavailable { .. }))
    }
}

fn record(number: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&number.to_be_bytes()));
    bytes
}

#[test]
fn a_way_that_fails_is_left_and_taken_again_when_it_works() {
    let node = Node::new();
    let mut client = node.client();
    client.write(0, &record(1));
    node.storage.set(OURS, Mode::Fails);
    client.write(0, &record(2));
    let Reach::Redirected { why } = node.wait_redirected() else { unreachable!() };
    assert!(why.contains("nput/output"), "{why}");
    client.ask(FLUSH, 1, 0, 0, &[]);
    assert_eq!(client.answer(), (1, 0));
    client.write(4096, &record(3));
    assert_eq!(client.read(0, 4096), record(2));
    let carried = node.lun.reach().1;
    assert!(carried.requests >= 4 && carried.bytes >= 3 * 4096, "{carried:?}");
    node.storage.set(OURS, Mode::Works);
    node.wait_direct();
    client.write(0, &record(4));
    assert_eq!(node.lun.reach().1, carried);
    let log: Vec<u64> = node.storage.log().iter().map(|(_, number)| *number).collect();
    assert_eq!(log, [1, 2, 3, 4]);
}

#[test]
fn a_write_that_hangs_is_not_made_again_before_it_is_over() {
    let node = Node::new();
    let (mut one, mut two) = (node.client(), node.client());
    node.storage.set(OURS, Mode::Hangs);
    one.ask(WRITE, 1, 0, 4096, &record(1));
    node.storage.wait_kept(1);
    two.write(8192, &record(2));
    node.wait_redirected();
    assert_eq!(two.read(8192, 4096), record(2), "others go on");
    assert_eq!(one.answer(), (1, 0));
    two.write(0, &record(3));
    assert_eq!(one.read(0, 4096), record(3));
}

#[test]
fn without_any_way_requests_wait() {
    let node = Node::new();
    let mut client = node.client();
    node.storage.set(OURS, Mode::Fails);
    node.storage.set(OWNERS, Mode::Fails);
    client.ask(WRITE, 1, 0, 4096, &record(1));
    client.ask(READ, 2, 0, 4096, &[]);
    let Reach::Unavailable { why } = node.wait_unavailable() else { unreachable!() };
    assert!(why.contains("through the owner"), "{why}");
    assert_eq!(node.server.counters(1).unwrap().failed, 0);
    node.storage.set(OWNERS, Mode::Works);
    let mut answered = Vec::new();
    for _ in 0..2 {
        let (cookie, error) = client.answer();
        if cookie == 2 {
            client.payload(4096);
        }
        answered.push((cookie, error));
    }
    answered.sort_unstable();
    assert_eq!(answered, [(1, 0), (2, 0)]);
    node.wait_redirected();
}

#[test]
fn a_block_that_is_bad_is_an_error_and_no_lost_way() {
    let node = Node::new();
    let mut client = node.client();
    // Beyond the end of what the door lets through: nothing is wrong with the way.
    node.storage.spoil(SLAB * 2 + Geometry::of(LUN, Some(SLAB)).unwrap().slab(0));
    client.ask(READ, 1, SLAB * 2, 4096, &[]);
    assert_eq!(client.answer(), (1, 5));
    assert_eq!(node.lun.reach().0, Reach::Direct);
    client.write(0, &record(1));

    // Nor with the way through the owner, which has tried often enough.
    node.storage.set(OURS, Mode::Fails);
    client.write(0, &record(2));
    node.wait_redirected();
    client.ask(READ, 2, SLAB * 2, 4096, &[]);
    assert_eq!(client.answer(), (2, 5));
    assert!(matches!(node.lun.reach().0, Reach::Redirected { .. }));
    client.write(0, &record(3));
}

#[test]
fn what_the_owner_has_not_begun_when_the_lease_ends_is_not_done() {
    let node = Node::new();
    let mut client = node.client();
    node.storage.set(OURS, Mode::Fails);
    client.write(0, &record(1));
    node.wait_redirected();
    // The owner's own lease does not let it through.
    let owner = node.owner.as_ref().unwrap();
    owner.lease.end();
    node.lease.ends.store(node.lease.now_ns() + 300_000_000, Ordering::SeqCst);
    client.ask(WRITE, 2, 0, 4096, &record(2));
    client.ask(READ, 3, 0, 4096, &[]);
    while node.lease.now_ns() < node.lease.ends_ns() {
        std::thread::yield_now();
    }
    // Afterwards ours does not.
    owner.lease.ends.store(u64::MAX / 2, Ordering::SeqCst);
    client.ask(WRITE, 4, 4096, 4096, &record(4));
    assert!(node.server.withdraw(1, PATIENCE));
    assert_eq!(node.storage.log().len(), 1, "{:?}", node.storage.log());
}

#[test]
fn an_owner_that_starts_again_is_found_again() {
    let mut node = Node::new();
    let mut client = node.client();
    node.storage.set(OURS, Mode::Fails);
    client.write(0, &record(1));
    for number in 2..5 {
        client.ask(WRITE, number, 0, 4096, &record(number));
        drop(node.owner.take());
        node.owner = Some(Owner::start(&node.owners, node.dir.path()));
        assert_eq!(client.answer(), (number, 0));
        assert_eq!(client.read(0, 4096), record(number));
    }
}

#[test]
fn a_redirection_that_is_planned_goes_and_comes() {
    let node = Node::new();
    let mut client = node.client();
    node.lun.plan(true);
    assert_eq!(node.wait_redirected(), Reach::Redirected { why: "planned".into() });
    client.write(0, &record(1));
    assert!(node.lun.reach().1.bytes >= 4096);
    // One that does not come about keeps nobody from the storage.
    node.storage.set(OWNERS, Mode::Fails);
    client.write(0, &record(2));
    node.lun.plan(false);
    node.wait_direct();
    client.write(0, &record(3));
    let log: Vec<u64> = node.storage.log().iter().map(|(_, number)| *number).collect();
    assert_eq!(log, [1, 2, 3]);
}

/// Sixteen blocks are written over and over, the ways break and heal at random, and the
/// owner starts again now and then: nothing fails, and no write comes after a later one.
#[test]
fn nothing_is_lost_or_overtaken_over_many_cuts_and_heals() {
    const BLOCKS: u64 = 16;
    let mut node = Node::new();
    let stop = AtomicBool::new(false);
    let socket = node.dir.path().join("socket");
    let mut seed = 7_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    let written = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut client = Client::connect(UnixStream::connect(&socket).unwrap());
            let mut numbers = vec![0_u64; BLOCKS as usize];
            let mut number = 0;
            while !stop.load(Ordering::SeqCst) {
                for block in 0..BLOCKS {
                    number += 1;
                    numbers[block as usize] = number;
                    client.ask(WRITE, block, block * 4096, 4096, &record(number));
                }
                for _ in 0..BLOCKS {
                    assert_eq!(client.answer().1, 0);
                }
                client.ask(FLUSH, 99, 0, 0, &[]);
                assert_eq!(client.answer(), (99, 0));
            }
            numbers
        });
        for cut in 0..40 {
            let mode = if random() % 4 == 0 { Mode::Hangs } else { Mode::Fails };
            node.storage.set(OURS, mode);
            node.wait_redirected();
            if cut % 8 == 5 {
                drop(node.owner.take());
                node.owner = Some(Owner::start(&node.owners, node.dir.path()));
                node.wait_redirected();
            }
            if cut % 5 == 2 {
                node.storage.set(OWNERS, Mode::Fails);
                node.wait_unavailable();
                node.storage.set(OWNERS, Mode::Works);
            }
            node.storage.set(OURS, Mode::Works);
            node.wait_direct();
        }
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap()
    });
    let start = Geometry::of(LUN, Some(SLAB)).unwrap().slab(0);
    let mut last = std::collections::BTreeMap::new();
    for (at, number) in node.storage.log() {
        let before = last.insert(at, number).unwrap_or(0);
        assert!(before <= number, "at {at}: {number} came after {before}");
    }
    for (block, number) in (0..).zip(written) {
        assert_eq!(node.storage.read(start + block * 4096, 4096), record(number));
    }
}
