//! Disks that are made of slabs of a LUN.

mod common;

use std::fs::File;
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::*;
use holdfast_volume::lun::{Alone, FileId, Geometry, Identity, Op, Store};
use holdfast_volume::{Allocator, Export, Fence, Grant, Lun, LunDisk, Open, Refusal, Release, Server, Wanted};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const SLAB: u64 = 16 * MIB;
/// Three parts, the last of them shorter.
const DISK: u64 = 2 * SLAB + MIB;

/// A LUN with a volume on it that this process has for itself.
struct Volume {
    dir: tempfile::TempDir,
    alone: Alone,
    server: Server,
}

impl Volume {
    fn new(lun_bytes: u64) -> Volume {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        File::create(dir.path().join("lun")).unwrap().set_len(lun_bytes).unwrap();
        let lun = Lun::open(&dir.path().join("lun")).unwrap();
        let identity = Identity { volume: uuid::Uuid::from_u128(1), cluster: uuid::Uuid::nil(), name: "vol".into() };
        let store = Store::format(lun.clone(), identity, Some(SLAB), 0, 1).unwrap();
        Volume { dir, alone: Alone::new(lun, store).unwrap(), server: Server::start(2).unwrap() }
    }

    fn create(&self, number: u64, bytes: u64) {
        self.alone.commit(&[Op::Create { file: FileId(number), bytes, name: format!("disk-{number}") }]).unwrap();
    }

    fn serve(&self, number: u64) {
        let export = self.alone.open(&format!("disk-{number}"), Arc::new(Open)).unwrap();
        self.server.serve(number, UnixListener::bind(self.socket(number)).unwrap(), export);
    }

    fn socket(&self, number: u64) -> PathBuf {
        self.dir.path().join(format!("socket-{number}"))
    }

    fn client(&self, number: u64) -> Client {
        Client::connect(UnixStream::connect(self.socket(number)).unwrap())
    }

    fn withdraw(&self, number: u64) {
        assert!(self.server.withdraw(number, Duration::from_secs(60)));
        std::fs::remove_file(self.socket(number)).unwrap();
    }

    fn used(&self) -> u32 {
        self.alone.look(|contents| contents.used_slabs())
    }
}

#[test]
fn slabs_are_used_when_they_are_written_to_and_found_again() {
    let volume = Volume::new(200 * MIB);
    volume.create(1, DISK);
    volume.serve(1);
    let mut client = volume.client(1);
    assert_eq!(client.read(SLAB - 4096, 8192), [0; 8192]);
    assert_eq!(volume.used(), 0);
    client.write(SLAB - 512, &[7; 1024]);
    // Both sides of the edge, and perhaps already one more ahead.
    assert!((2..=3).contains(&volume.used()));
    assert_eq!(client.read(SLAB - 1024, 2048), [[0; 512], [7; 512], [7; 512], [0; 512]].concat());
    client.ask(FLUSH, 1, 0, 0, &[]);
    assert_eq!(client.answer(), (1, 0));
    volume.withdraw(1);
    let again = Store::open(Lun::open(&volume.dir.path().join("lun")).unwrap()).unwrap();
    assert!((2..=3).contains(&again.contents().used_slabs()));
    volume.serve(1);
    assert_eq!(volume.client(1).read(SLAB - 512, 1024), [7; 1024]);
    assert_eq!(volume.server.counters(1).unwrap().reads, 1);
}

#[test]
fn what_another_disk_held_is_never_read() {
    let volume = Volume::new(70 * MIB);
    volume.create(1, DISK);
    volume.serve(1);
    let mut client = volume.client(1);
    for at in (0..DISK).step_by(MIB as usize) {
        client.write(at, &vec![0xaa; MIB as usize]);
    }
    volume.withdraw(1);
    volume.alone.commit(&[Op::Remove { file: FileId(1) }]).unwrap();
    volume.create(2, DISK);
    volume.serve(2);
    let mut client = volume.client(2);
    for part in 0..3 {
        client.write(part * SLAB + 4096, &[1; 512]);
    }
    for at in (0..DISK).step_by(MIB as usize) {
        let bytes = client.read(at, MIB as u32);
        let ours = |(index, byte): (usize, &u8)| *byte == 0 || (4096..4608).contains(&index) && *byte == 1;
        assert!(bytes.iter().enumerate().all(ours), "at {at}");
    }
    assert_eq!(volume.used(), 3);
}

#[test]
fn a_full_volume_is_told_and_goes_on_when_there_is_room() {
    let volume = Volume::new(60 * MIB);
    let slabs = u64::from(volume.alone.look(|contents| contents.geometry().slabs));
    volume.create(1, slabs * SLAB);
    volume.create(2, SLAB);
    volume.serve(1);
    volume.serve(2);
    let (mut one, mut two) = (volume.client(1), volume.client(2));
    for part in 0..slabs {
        one.write(part * SLAB, &[1; 512]);
    }
    two.ask(WRITE, 1, 0, 512, &[2; 512]);
    const NO_SPACE: u32 = 28;
    assert_eq!(two.answer(), (1, NO_SPACE));
    assert_eq!(two.read(0, 512), [0; 512]);
    // A whole part that is discarded is room for others.
    one.ask(TRIM, 2, 0, SLAB as u32, &[]);
    assert_eq!(one.answer(), (2, 0));
    assert_eq!(one.read(0, 512), [0; 512]);
    two.write(0, &[2; 512]);
    assert_eq!(two.read(0, 1024), [[2; 512], [0; 512]].concat());
}

#[test]
fn zeroes_that_may_not_be_holes_are_slabs() {
    let volume = Volume::new(200 * MIB);
    volume.create(1, DISK);
    volume.serve(1);
    let mut client = volume.client(1);
    client.ask(ZERO, 1, 0, DISK as u32, &[]);
    assert_eq!(client.answer(), (1, 0));
    assert_eq!(volume.used(), 0, "these may");
    const NO_HOLE: u16 = 1 << 1;
    client.ask_flagged(NO_HOLE, ZERO, 2, 0, DISK as u32, &[]);
    assert_eq!(client.answer(), (2, 0));
    assert_eq!(volume.used(), 3);
}

/// Keeps what it is asked for until the test answers.
struct Slow(Mutex<Sender<Call>>);

enum Call {
    Allocate(Wanted, Grant),
    Release(Range<u32>, Release),
}

impl Allocator for Slow {
    fn allocate(&self, wanted: Wanted, grant: Grant) {
        let _ = self.0.lock().unwrap().send(Call::Allocate(wanted, grant));
    }

    fn release(&self, parts: Range<u32>, release: Release) {
        let _ = self.0.lock().unwrap().send(Call::Release(parts, release));
    }
}

/// A disk of ten parts whose slabs the test gives by hand.
struct ByHand {
    dir: tempfile::TempDir,
    server: Server,
    calls: Receiver<Call>,
}

impl ByHand {
    fn new() -> ByHand {
        ByHand::behind(Arc::new(Open))
    }

    fn behind(fence: Arc<dyn Fence>) -> ByHand {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        File::create(dir.path().join("lun")).unwrap().set_len(400 * MIB).unwrap();
        let lun = Lun::open(&dir.path().join("lun")).unwrap();
        let geometry = Geometry::of(lun.bytes(), Some(SLAB)).unwrap();
        let (sender, calls) = channel();
        let disk =
            LunDisk { name: "disk".into(), lun, geometry, bytes: 10 * SLAB, read_only: false, parts: vec![(9, 0)] };
        let export = Export::on_lun(disk, Arc::new(Slow(Mutex::new(sender))), fence).unwrap();
        let server = Server::start(1).unwrap();
        server.serve(1, UnixListener::bind(dir.path().join("socket")).unwrap(), export);
        ByHand { dir, server, calls }
    }

    fn client(&self) -> Client {
        Client::connect(UnixStream::connect(self.dir.path().join("socket")).unwrap())
    }

    fn call(&self) -> Call {
        self.calls.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    fn wanted(&self) -> (Wanted, Grant) {
        let Call::Allocate(wanted, grant) = self.call() else { panic!("a slab is wanted") };
        (wanted, grant)
    }

    fn releases(&self) -> (Range<u32>, Release) {
        let Call::Release(parts, release) = self.call() else { panic!("parts are given back") };
        (parts, release)
    }
}

fn urgent(parts: Range<u32>) -> Wanted {
    Wanted { parts, urgent: true }
}

#[test]
fn a_write_that_waits_for_a_slab_holds_up_nobody() {
    let disk = ByHand::new();
    let (mut client, mut other) = (disk.client(), disk.client());
    client.ask(WRITE, 1, 3 * SLAB, 512, &[1; 512]);
    let (wanted, grant) = disk.wanted();
    assert_eq!(wanted, urgent(3..4));
    client.ask(WRITE, 2, 3 * SLAB + 512, 512, &[2; 512]);
    client.write(9 * SLAB, &[9; 512]);
    assert_eq!(client.read(9 * SLAB, 512), [9; 512]);
    assert_eq!(other.read(3 * SLAB, 1024), [0; 1024]);
    assert_eq!(disk.server.counters(1).unwrap().waiting_for_slabs, 2);
    // What was not asked for is not taken; the same slab, as it happens.
    grant.give(&[(4, 8), (3, 8)]);
    let mut answers = [client.answer(), client.answer()];
    answers.sort_unstable();
    assert_eq!(answers, [(1, 0), (2, 0)]);
    assert_eq!(other.read(3 * SLAB, 1024), [[1; 512], [2; 512]].concat());
    assert_eq!(other.read(4 * SLAB, 512), [0; 512]);
    assert_eq!(disk.server.counters(1).unwrap().waiting_for_slabs, 0);
}

#[test]
fn a_writer_that_streams_is_ahead_of_its_slabs() {
    let disk = ByHand::new();
    let mut client = disk.client();
    client.ask(WRITE, 1, 0, 512, &[1; 512]);
    let (wanted, grant) = disk.wanted();
    assert_eq!(wanted, urgent(0..1));
    grant.give(&[(0, 1)]);
    assert_eq!(client.answer(), (1, 0));
    client.ask(WRITE, 2, SLAB, 512, &[1; 512]);
    let (wanted, grant) = disk.wanted();
    assert_eq!(wanted, urgent(1..3));
    grant.give(&[(1, 2), (2, 3)]);
    assert_eq!(client.answer(), (2, 0));
    let (wanted, grant) = disk.wanted();
    assert_eq!(wanted, Wanted { parts: 3..7, urgent: false });
    client.write(2 * SLAB, &[2; 512]);
    client.ask(WRITE, 3, 3 * SLAB, 512, &[3; 512]);
    grant.give(&[(3, 4), (4, 5), (5, 6), (6, 7)]);
    assert_eq!(client.answer(), (3, 0));
    let (wanted, grant) = disk.wanted();
    assert_eq!(wanted, Wanted { parts: 7..9, urgent: false }, "the last one is there already");
    // Nothing for later is no reason to fail now.
    grant.refuse(Refusal::NoSpace);
    client.write(6 * SLAB, &[6; 512]);
}

#[test]
fn who_cannot_say_is_asked_again_and_who_has_nothing_says_so() {
    let disk = ByHand::new();
    let mut client = disk.client();
    client.ask(WRITE, 1, 0, 512, &[1; 512]);
    disk.wanted().1.refuse(Refusal::Unavailable);
    drop(disk.wanted().1);
    let (wanted, grant) = disk.wanted();
    assert_eq!(wanted, urgent(0..1));
    grant.refuse(Refusal::NoSpace);
    assert_eq!(client.answer(), (1, 28));
    // Whoever tries again asks again.
    client.ask(WRITE, 2, 0, 512, &[1; 512]);
    disk.wanted().1.give(&[(0, 1)]);
    assert_eq!(client.answer(), (2, 0));
    assert_eq!(client.read(0, 512), [1; 512]);
}

#[test]
fn a_disk_that_is_withdrawn_does_not_wait_for_its_slabs() {
    let disk = ByHand::new();
    let mut client = disk.client();
    client.ask(WRITE, 1, 0, 512, &[1; 512]);
    let (_, grant) = disk.wanted();
    assert!(disk.server.withdraw(1, Duration::from_secs(60)));
    grant.give(&[(0, 1)]);
    let lun = Lun::open(&disk.dir.path().join("lun")).unwrap();
    let mut bytes = vec![1; lun.bytes() as usize];
    holdfast_volume::lun::Device::read(&lun, 0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0), "nothing was written");
}

/// Lets one piece of a request through, when it is told to.
struct Once {
    used: AtomicBool,
    asked: Mutex<Sender<()>>,
    go: Mutex<Receiver<()>>,
}

impl Fence for Once {
    fn may_write(&self) -> bool {
        if self.used.swap(true, Ordering::SeqCst) {
            return false;
        }
        let _ = self.asked.lock().unwrap().send(());
        self.go.lock().unwrap().recv().is_ok()
    }
}

#[test]
fn a_disk_is_withdrawn_in_the_middle_of_a_request() {
    for (kind, at, length) in [(WRITE, 9 * SLAB - 512, 1024), (TRIM, 8 * SLAB + MIB, SLAB as u32)] {
        let ((asked, question), (tell, go)) = (channel(), channel());
        let once = Once { used: false.into(), asked: Mutex::new(asked), go: Mutex::new(go) };
        let disk = ByHand::behind(Arc::new(once));
        assert!(disk.server.learn_parts(1, &[(8, 1)]));
        let mut client = disk.client();
        client.ask(kind, 1, at, length, &vec![1; if kind == WRITE { length as usize } else { 0 }]);
        question.recv().unwrap();
        std::thread::scope(|scope| {
            let withdrawn = scope.spawn(|| disk.server.withdraw(1, Duration::from_secs(60)));
            // The thread that serves it stands still until then, and finds that it is
            // withdrawn as soon as the first of two pieces is under way.
            while disk.server.counters(1).is_some() {
                std::thread::yield_now();
            }
            tell.send(()).unwrap();
            assert!(withdrawn.join().unwrap());
        });
    }
}

#[test]
fn parts_that_are_leaving_are_not_written_to_until_they_are_gone() {
    let disk = ByHand::new();
    let (mut client, mut other) = (disk.client(), disk.client());
    client.write(9 * SLAB, &[9; 512]);
    client.ask(TRIM, 1, 8 * SLAB, 2 * SLAB as u32, &[]);
    let (parts, release) = disk.releases();
    assert_eq!(parts, 9..10);
    assert_eq!(other.read(9 * SLAB, 512), [0; 512]);
    other.ask(WRITE, 2, 9 * SLAB, 512, &[2; 512]);
    assert_eq!(other.read(0, 512), [0; 512]);
    release.done();
    assert_eq!(client.answer(), (1, 0));
    let (wanted, grant) = disk.wanted();
    assert_eq!(wanted, urgent(9..10));
    grant.give(&[(9, 5)]);
    assert_eq!(other.answer(), (2, 0));
    assert_eq!(client.read(9 * SLAB, 512), [2; 512]);
    // What cannot be given back is zeroed where it is.
    client.ask(ZERO, 3, 9 * SLAB, SLAB as u32, &[]);
    disk.releases().1.refuse();
    assert_eq!(client.answer(), (3, 0));
    assert_eq!(client.read(9 * SLAB, 512), [0; 512]);
    client.write(9 * SLAB, &[4; 512]);
    assert_eq!(client.read(9 * SLAB, 512), [4; 512]);
}

#[test]
fn a_disk_grows_and_learns_of_parts_while_it_is_served() {
    let disk = ByHand::new();
    let mut client = disk.client();
    client.ask(READ, 1, 10 * SLAB, 512, &[]);
    assert_eq!(client.answer(), (1, 22));
    disk.server.resize(1, 11 * SLAB).unwrap();
    assert!(disk.server.resize(1, 10 * SLAB).is_err() && disk.server.resize(2, 11 * SLAB).is_err());
    assert_eq!(client.read(10 * SLAB, 512), [0; 512]);
    assert!(disk.server.learn_parts(1, &[(10, 3), (9, 0)]));
    assert!(!disk.server.learn_parts(1, &[(11, 4)]) && !disk.server.learn_parts(1, &[(1, 99)]), "outside");
    client.write(10 * SLAB, &[5; 512]);
    client.write(9 * SLAB, &[6; 512]);
    // One was given back elsewhere, the other one, too, and is somewhere else now.
    assert!(disk.server.learn_parts(1, &[(10, 0)]));
    assert_eq!(client.read(10 * SLAB, 512), [6; 512]);
    assert_eq!(client.read(9 * SLAB, 512), [0; 512]);
    assert!(disk.server.learn_parts(1, &[(10, 3)]));
    assert_eq!(client.read(10 * SLAB, 512), [5; 512]);
    let mut stream = UnixStream::connect(disk.dir.path().join("socket")).unwrap();
    assert_eq!(Client::shake_hands(&mut stream), 11 * SLAB);
}

#[derive(Clone, Debug)]
enum Change {
    Write(u8),
    Zero,
    Trim,
    Read,
}

fn change() -> impl Strategy<Value = (u64, u64, u32, Change)> {
    // Near the edges of slabs, where it matters; some of it long.
    let place = (0..4_u64, 0..400_u64).prop_map(|(part, block)| (part * SLAB + block * 512).saturating_sub(200 * 512));
    let length = prop_oneof![4 => 1_u32..400, 1 => Just(33 * 2048)];
    let kind =
        prop_oneof![any::<u8>().prop_map(Change::Write), Just(Change::Zero), Just(Change::Trim), Just(Change::Read)];
    (1..3_u64, place, length, kind)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn disks_on_one_lun_are_as_arrays_of_bytes(changes in proptest::collection::vec(change(), 1..40)) {
        let volume = Volume::new(200 * MIB);
        let mut models = [vec![0_u8; DISK as usize], vec![0_u8; DISK as usize]];
        for number in [1, 2] {
            volume.create(number, DISK);
            volume.serve(number);
        }
        let mut clients = [volume.client(1), volume.client(2)];
        for (number, at, blocks, change) in changes {
            let (client, model) = (&mut clients[number as usize - 1], &mut models[number as usize - 1]);
            let at = at.min(DISK - 512);
            let length = (u64::from(blocks) * 512).min(DISK - at);
            let most = length.min(32 * MIB);
            let range = |length: u64| at as usize..(at + length) as usize;
            match change {
                Change::Write(byte) => {
                    client.write(at, &vec![byte; most as usize]);
                    model[range(most)].fill(byte);
                }
                Change::Zero | Change::Trim => {
                    let kind = if matches!(change, Change::Zero) { ZERO } else { TRIM };
                    client.ask(kind, 4, at, length as u32, &[]);
                    prop_assert_eq!(client.answer(), (4, 0));
                    // A file's holes read as zero, so here a trim is one too.
                    model[range(length)].fill(0);
                }
                Change::Read => prop_assert!(client.read(at, most as u32) == model[range(most)]),
            }
        }
        for (client, model) in clients.iter_mut().zip(&models) {
            for at in (0..DISK).step_by(MIB as usize) {
                prop_assert!(client.read(at, MIB as u32) == model[at as usize..][..MIB as usize]);
            }
        }
    }
}

#[test]
fn qemu_s_tools_find_no_difference_to_a_file() {
    let volume = Volume::new(300 * MIB);
    volume.create(1, 64 * MIB);
    volume.serve(1);
    let url = format!("nbd+unix:///disk-1?socket={}", volume.socket(1).display());
    let image = volume.dir.path().join("image");
    let mut bytes = vec![0_u8; 64 << 20];
    for (index, byte) in bytes.iter_mut().enumerate().filter(|(index, _)| index >> 20 & 16 == 0) {
        *byte = ((index * 2654435761) >> 7) as u8;
    }
    std::fs::write(&image, &bytes).unwrap();
    let image = image.to_str().unwrap();
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", image, &url]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &url]);
    assert_eq!(volume.used(), 2, "what is zero takes no room");
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &url]);
    assert!(
        map.contains(r#""start": 16777216, "length": 16777216, "depth": 0, "present": false"#)
            || map.contains("\"data\": false"),
        "{map}"
    );
    run("qemu-io", &["-f", "raw", "-d", "unmap", "-c", "discard 0 16M", "-c", "read -P 0 0 16M", "-c", "flush", &url]);
    assert_eq!(volume.used(), 1);
}
