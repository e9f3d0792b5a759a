//! Disks of LUNs that are files, served to nobody.

use std::fs::File;

use holdfast_core::{Epoch, NodeId, NodeTerm, Tenure, VmId};
use holdfast_volume::lun::{Identity, Store, Superblock};

mod links;

use super::protocol::Known;
use super::protocol::{Answer, Ask};
use super::*;

const SLAB: u64 = 16 << 20;

struct World {
    dir: tempfile::TempDir,
    disks: Arc<Disks>,
}

impl World {
    fn new() -> World {
        let (lease, _) = LeasePage::create().unwrap();
        lease.ends.store(u64::MAX, Ordering::SeqCst);
        let (line, inbox) = channel();
        let theirs = line.clone();
        std::thread::spawn(move || slabs::run(&inbox, &theirs));
        let lease = Arc::new(lease);
        let dir = tempfile::tempdir().unwrap();
        let ways = Ways::new(lease.clone(), 0, dir.path().join(MARKS));
        let disks = Disks {
            server: Server::start(1).unwrap(),
            sockets: Arc::default(),
            lease,
            generation: 0,
            line,
            book: Mutex::default(),
            journals: Journals::default(),
            ways,
        };
        World { dir, disks: Arc::new(disks) }
    }

    /// A disk on a LUN of its own.
    fn disk(&self, number: u128) -> Disk {
        let device = self.dir.path().join(format!("lun-{number}"));
        File::create(&device).unwrap().set_len(128 << 20).unwrap();
        let volume_id = Uuid::from_u128(number);
        let identity = Identity { volume: volume_id, cluster: Uuid::nil(), name: "san".into() };
        Store::format(Lun::open(&device).unwrap(), identity, Some(SLAB), 0, 1).unwrap();
        let socket = self.dir.path().join(format!("socket-{number}"));
        self.disks.sockets.put(socket.clone(), UnixListener::bind(&socket).unwrap());
        let tenure = Tenure { node: NodeId(1), epoch: Epoch(1), term: NodeTerm(1) };
        let vm = VmId(volume_id);
        let parts = vec![(0, 1, 2).into()];
        let (volume, bytes) = ("san".into(), 4 * SLAB);
        Disk { vm, disk: 0, tenure, socket, volume, volume_id, device, bytes, parts, may_write: true }
    }

    fn call(&self, call: Call) -> anyhow::Result<()> {
        self.disks.finish(self.disks.begin(call))
    }

    fn served(&self) -> Vec<DiskId> {
        self.disks.book().served.keys().copied().collect()
    }
}

#[test]
fn a_lun_that_hangs_stops_no_other_and_a_withdrawal_overtakes_what_waits_for_it() {
    let world = World::new();
    let (hangs, other) = (world.disk(1), world.disk(2));
    let place = world.disks.book().luns.entry(hangs.volume_id).or_default().clone();
    let opening = place.lock().unwrap();
    let waits = world.disks.begin(Call::Serve(hangs.clone()));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| world.disks.finish(waits));
        world.call(Call::Serve(other.clone())).unwrap();
        assert_eq!(world.served(), [other.id()]);
        world.call(Call::Only(vec![other.id()])).unwrap();
        drop(opening);
        let outcome = waiting.join().unwrap().unwrap_err().to_string();
        assert!(outcome.contains("withdrawn meanwhile"), "{outcome}");
    });
    assert_eq!(world.served(), [other.id()]);
    // Nothing stands in the way of a later one.
    world.call(Call::Serve(hangs.clone())).unwrap();
    assert_eq!(world.served(), [hangs.id(), other.id()]);
}

#[test]
fn a_lun_is_let_go_of_with_its_last_disk() {
    let world = World::new();
    let disk = world.disk(1);
    let later = Disk { tenure: Tenure { epoch: Epoch(2), ..disk.tenure }, ..disk.clone() };
    world.call(Call::Serve(disk.clone())).unwrap();
    world.call(Call::Serve(later.clone())).unwrap();
    world.call(Call::Withdraw(disk.clone())).unwrap();
    assert_eq!(world.disks.book().luns.len(), 1);
    world.call(Call::Only(Vec::new())).unwrap();
    assert!(world.disks.book().luns.is_empty());
    // One that was never served here is not kept open either.
    world.call(Call::Withdraw(later)).unwrap();
    assert!(world.disks.book().luns.is_empty());
}

#[test]
fn a_disk_is_not_said_to_be_withdrawn_while_an_earlier_call_withdraws_it() {
    let world = World::new();
    let (one, other) = (world.disk(1), world.disk(2));
    for (disk, later) in [(one.clone(), Call::Withdraw(one)), (other, Call::Only(Vec::new()))] {
        world.call(Call::Serve(disk.clone())).unwrap();
        let number = world.disks.book().served[&disk.id()].number;
        let first = world.disks.begin(Call::Withdraw(disk.clone()));
        let second = world.disks.begin(later);
        let (started, start) = channel();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                started.send(()).unwrap();
                world.disks.finish(second).unwrap();
                assert!(world.disks.server.counters(number).is_none());
            });
            start.recv().unwrap();
            (0..1000).for_each(|_| std::thread::yield_now());
            world.disks.finish(first).unwrap();
            second.join().unwrap();
        });
    }
}

/// What is to be said of a LUN on which a disk was made.
fn description(disk: &Disk, epoch: u64, revision: u64, slabs: &[u32]) -> Description {
    let parts = slabs.iter().zip(0..).map(|(slab, part)| (part, *slab, 1).into()).collect();
    Description {
        volume: disk.volume.clone(),
        volume_id: disk.volume_id,
        cluster: Uuid::nil(),
        device: disk.device.clone(),
        epoch,
        revision,
        files: [("vms/web/disk0.raw".to_owned(), (4 * SLAB, parts))].into(),
        repair: None,
    }
}

/// The slabs of the one file that a LUN describes, and the epoch and the revision of that.
fn described(disk: &Disk) -> (Vec<u32>, u64, u64) {
    let store = Store::open(Lun::open(&disk.device).unwrap()).unwrap();
    let slabs = store.contents().files().flat_map(|(_, file)| file.parts().map(|(_, slab)| slab)).collect();
    (slabs, store.epoch(), store.revision())
}

#[test]
fn a_lun_is_described_as_it_is_agreed_on_and_never_as_it_was() {
    let world = World::new();
    let disk = world.disk(1);
    let say = |epoch, revision, slabs: &[u32]| world.call(Call::Describe(description(&disk, epoch, revision, slabs)));
    say(1, 5, &[3]).unwrap();
    assert_eq!(described(&disk), (vec![3], 1, 5));
    say(1, 7, &[2, 3]).unwrap();
    // An agent that has just come has not read of everything yet.
    say(1, 6, &[3]).unwrap();
    assert_eq!(described(&disk), (vec![2, 3], 1, 7));
    say(3, 8, &[4]).unwrap();
    assert_eq!(described(&disk), (vec![4], 3, 8));
    assert!(say(2, 9, &[5]).unwrap_err().to_string().contains("epoch"));
    world.call(Call::EndDescription { volume_id: disk.volume_id, epoch: 3 }).unwrap();
    assert!(say(3, 9, &[5]).is_err(), "it has ended");
    say(4, 9, &[5]).unwrap();
    assert_eq!(described(&disk), (vec![5], 4, 9));
    let renamed = Description { volume: "tank".into(), ..description(&disk, 4, 10, &[5]) };
    world.call(Call::Describe(renamed)).unwrap();
    assert_eq!(Superblock::read(&Lun::open(&disk.device).unwrap()).unwrap().identity.name, "tank");
    let theirs = Description { cluster: Uuid::from_u128(9), ..description(&disk, 5, 11, &[5]) };
    world.call(Call::EndDescription { volume_id: disk.volume_id, epoch: 4 }).unwrap();
    assert!(world.call(Call::Describe(theirs)).unwrap_err().to_string().contains("another cluster"));
}

#[test]
fn nothing_is_described_without_the_lease() {
    let world = World::new();
    let disk = world.disk(1);
    world.call(Call::Describe(description(&disk, 1, 1, &[3]))).unwrap();
    world.disks.lease.ends.store(0, Ordering::SeqCst);
    for _ in 0..2 {
        assert!(world.call(Call::Describe(description(&disk, 1, 2, &[4]))).is_err());
    }
    assert_eq!(described(&disk), (vec![3], 1, 1));
}

#[test]
fn a_description_that_is_lost_is_written_anew_on_its_own_device_only() {
    let world = World::new();
    let (disk, other) = (world.disk(1), world.disk(2));
    world.call(Call::Describe(description(&disk, 1, 1, &[3]))).unwrap();
    world.call(Call::EndDescription { volume_id: disk.volume_id, epoch: 1 }).unwrap();
    let lun = Lun::open(&disk.device).unwrap();
    let geometry = Superblock::read(&lun).unwrap().geometry;
    for at in [0, 2 << 20] {
        lun.wipe(at, 4096).unwrap();
    }
    let known = Known { slab_bytes: geometry.slab_bytes, slabs: geometry.slabs, made_ms: 0 };
    let plain = description(&disk, 2, 2, &[3, 5]);
    assert!(world.call(Call::Describe(plain.clone())).is_err());
    let repair = Description { repair: Some(known), ..plain };
    let wrong = Description { device: other.device.clone(), ..repair.clone() };
    assert!(world.call(Call::Describe(wrong)).unwrap_err().to_string().contains("holds another volume"));
    let blank = world.dir.path().join("blank");
    File::create(&blank).unwrap().set_len(128 << 20).unwrap();
    let wrong = Description { device: blank, ..repair.clone() };
    assert!(world.call(Call::Describe(wrong)).unwrap_err().to_string().contains("nothing on"));
    let smaller = Known { slabs: known.slabs - 1, ..known };
    let wrong = Description { repair: Some(smaller), ..repair.clone() };
    assert!(world.call(Call::Describe(wrong)).unwrap_err().to_string().contains("both superblocks"));
    world.call(Call::Describe(repair)).unwrap();
    assert_eq!(described(&disk), (vec![3, 5], 2, 2));
    world.call(Call::Describe(description(&disk, 2, 3, &[3]))).unwrap();
    assert_eq!(described(&disk), (vec![3], 2, 3));
}

/// Answers what the server asks as the cluster would, from an account of the LUN.
fn answer_from(world: &World, account: &Arc<Mutex<holdfast_core::Lun>>) {
    let (say, words) = channel();
    let (line, account) = (world.disks.line.clone(), account.clone());
    line.send(News::Agent(say)).unwrap();
    std::thread::spawn(move || {
        while let Ok(ToAgent::Ask { id, ask }) = words.recv() {
            let (mut lun, node, term) = (account.lock().unwrap(), NodeId(1), NodeTerm(1));
            let answer = match ask {
                Ask::Take { known, most, .. } => Answer::Slabs(lun.take(node, term, &known, most)),
                Ask::Map { wanted, takings, .. } => Answer::Mapped(lun.map("disk", node, term, &wanted, &takings)),
                Ask::Unmap { number, parts, .. } => Answer::Unmapped(lun.unmap("disk", number, &parts)),
            };
            if line.send(News::Answered { id, answer }).is_err() {
                return;
            }
        }
    });
}

/// Has QEMU do things with a disk that is served.
fn qemu_io(disk: &Disk, commands: &[&str]) {
    let at = format!("nbd+unix:///{EXPORT}?socket={}", disk.socket.display());
    let mut program = std::process::Command::new("qemu-io");
    program.args(["-f", "raw", "-d", "unmap", "-t", "none"]);
    for command in commands {
        program.args(["-c", command]);
    }
    let output = program.arg(at).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("Pattern verification failed"), "{commands:?}: {said}");
}

#[test]
fn what_a_guest_discards_is_another_part_s_and_zeroed_before() {
    let world = World::new();
    let disk = world.disk(1);
    let mut lun = holdfast_core::Lun::new(SLAB, 7);
    lun.import_file("disk", disk.bytes, &[(0, 1, 2).into()]).unwrap();
    // All others are somebody else's.
    lun.import_file("other", 7 * SLAB, &[(0, 0, 1).into(), (1, 3, 4).into()]).unwrap();
    let account = Arc::new(Mutex::new(lun));
    answer_from(&world, &account);
    world.call(Call::Serve(disk.clone())).unwrap();
    qemu_io(&disk, &["write -P 7 0 32M", "discard 0 16M", "read -P 0 0 16M", "read -P 7 16M 16M"]);
    assert_eq!(account.lock().unwrap().files["disk"].parts, [(1, 2, 1).into()]);
    // A part of it is not given back, but zeroed.
    qemu_io(&disk, &["discard 16M 1M", "read -P 0 16M 1M", "read -P 7 17M 15M"]);
    qemu_io(&disk, &["write -P 9 48M 4k", "read -P 0 49156k 1M", "read -P 0 0 16M"]);
    assert_eq!(account.lock().unwrap().files["disk"].parts, [(1, 2, 1).into(), (3, 1, 1).into()]);
    // Zeroes may be holes, too.
    qemu_io(&disk, &["write -z -u 0 64M", "read -P 0 0 64M"]);
    assert_eq!(account.lock().unwrap().files["disk"].parts, []);
    world.call(Call::Withdraw(disk)).unwrap();
}
