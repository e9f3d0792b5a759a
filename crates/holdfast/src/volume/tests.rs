//! Disks of LUNs that are files, served to nobody.

use std::fs::File;

use holdfast_core::{Epoch, NodeId, NodeTerm, Tenure, VmId};
use holdfast_volume::lun::{Identity, Store};

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
        let disks = Disks {
            server: Server::start(1).unwrap(),
            sockets: Arc::default(),
            lease: Arc::new(lease),
            generation: 0,
            line,
            book: Mutex::default(),
        };
        World { dir: tempfile::tempdir().unwrap(), disks: Arc::new(disks) }
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
