//! One LUN, three nodes: a VM writes to it while its volume server is killed, while it
//! moves, and until its node loses its power; nothing of what was acknowledged is lost,
//! and what it leaves behind is read by nobody.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use holdfast_api::{AddVolume, CreateVm, DiskFormat, VmState, VolumeKind};
use holdfast_lab::cluster::{Cluster, GuestVm, VmTemplate};
use holdfast_lab::guest::Writer;
use holdfast_lab::records_on;

use crate::bench::{DEADLINE, elsewhere, eventually, refused, three_nodes};

const LUN: &str = "san";
const LUN_BYTES: u64 = 480 << 20;
const SLAB_BYTES: u64 = 16 << 20;

/// A LUN that was used for something else before: all of it is something.
fn used_lun(path: &Path) {
    let file = File::create(path).unwrap();
    let junk = vec![0xaa; 1 << 20];
    for at in (0..LUN_BYTES).step_by(junk.len()) {
        file.write_all_at(&junk, at).unwrap();
    }
    file.write_all_at(b"\x53\xef", 0x438).unwrap();
}

/// Ends a guest that has written all the time: it saw no error, and what was acknowledged
/// is on the LUN.
pub fn nothing_is_lost(cluster: &Cluster, device: &Path, vm: &GuestVm, writer: Writer) {
    let report = writer.stop().unwrap();
    println!("{} records, longest gap {:?}", report.acknowledged.len(), report.longest_gap);
    assert_eq!(report.refused, 0, "the guest saw an error");
    cluster.switch_off(&vm.name).unwrap();
    let image = cluster.lab().directory().join(format!("{}.raw", vm.name));
    let found = records_on(device, SLAB_BYTES, &image).unwrap();
    assert!(found.missing.is_empty() && found.corrupt_sectors.is_empty(), "{found:?}");
    assert_eq!(found.lost(&report.acknowledged), []);
}

fn add(device: &Path, erase: Option<&str>) -> AddVolume {
    AddVolume {
        name: LUN.into(),
        directory: None,
        lun: Some(device.display().to_string()),
        erase: erase.map(str::to_owned),
    }
}

#[test]
fn a_vm_on_a_lun_survives_its_volume_server_a_move_and_its_node() {
    let (cluster, _turn) = three_nodes();
    let device = cluster.lab().directory().join("lun");
    used_lun(&device);
    let api = cluster.any().unwrap();
    let (code, why) = refused(api.add_volume(&add(&device, None)));
    assert_eq!(code, "lun_in_use", "{why}");
    assert!(why.contains("--erase ext"), "{why}");
    assert_eq!(refused(api.add_volume(&add(&device, Some("xfs")))).0, "lun_in_use");
    let volume = api.add_volume(&add(&device, Some("ext"))).unwrap();
    assert_eq!((volume.kind, volume.size_bytes), (VolumeKind::Lun, volume.free_bytes));
    assert!(volume.size_bytes.unwrap() < LUN_BYTES);
    cluster.wait_ready(DEADLINE).unwrap();
    let again = AddVolume { name: "other".into(), ..add(&device, Some(LUN)) };
    assert_eq!(refused(api.add_volume(&again)).0, "conflict");
    let qcow2 = VmTemplate { format: DiskFormat::Qcow2, ..VmTemplate::new("web", 101).disk(LUN, SLAB_BYTES) };
    let request = CreateVm { vm: cluster.definition(&qcow2), start: false };
    assert!(refused(api.create_vm(&request)).1.contains("format=raw"));

    let template = VmTemplate::new("web", 101).memory(192 << 20).disk(LUN, SLAB_BYTES);
    let vm = cluster.create_vm(&template).unwrap();
    let boot = vm.wait_answer(DEADLINE).unwrap().boot_id;
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    let wrote = |count: u64| {
        let wanted = writer.highest() + count;
        eventually("records", || (writer.highest() >= wanted).then_some(()));
    };
    wrote(50);

    // Its volume server dies: the guest's writes wait, and go on.
    let home = cluster.node_of("web").unwrap();
    for _ in 0..3 {
        let server = cluster.volume_server_pid(&home).unwrap();
        let began = Instant::now();
        cluster.host(&home).unwrap().kill(server, nix::sys::signal::Signal::SIGKILL).unwrap();
        wrote(1);
        println!("a record {:?} after the volume server was killed", began.elapsed());
        wrote(50);
        assert_ne!(cluster.volume_server_pid(&home).unwrap(), server);
    }

    // It moves while it writes.
    let away = cluster.hosts().iter().map(|host| host.name().to_owned()).find(|name| *name != home).unwrap();
    let job = cluster.migrate("web", &away, DEADLINE).unwrap();
    println!("moved: {:?}", job.moved);
    assert_eq!(vm.wait_answer(DEADLINE).unwrap().boot_id, boot);
    wrote(50);

    // Its node loses its power.
    cluster.host(&away).unwrap().power_off().unwrap();
    let view = cluster.wait_vm("web", DEADLINE, elsewhere(&away)).unwrap();
    assert_ne!(view.node.as_ref(), Some(&away));
    assert_ne!(vm.wait_answer(DEADLINE).unwrap().boot_id, boot);
    wrote(50);
    nothing_is_lost(&cluster, &device, &vm, writer);
    assert!(cluster.watch().overlaps().unwrap().iter().all(|overlap| overlap.older.host.is_none()));

    // Whoever gets its slabs reads zeroes: a guest takes no other disk for its own.
    let api = cluster.any().unwrap();
    let job = api.delete_vm("web").unwrap();
    cluster.job_done(&job, DEADLINE).unwrap();
    let volume = api.volumes().unwrap().into_iter().find(|volume| volume.name == LUN).unwrap();
    assert_eq!((volume.promised_bytes, volume.free_bytes), (Some(0), volume.size_bytes));
    for number in 0..3 {
        let template = VmTemplate::new(&format!("next{number}"), 110 + number).disk(LUN, SLAB_BYTES);
        let next = cluster.create_vm(&template).unwrap();
        assert_eq!(next.client().unwrap().write(DEADLINE).unwrap().sequence, 1);
        cluster.wait_vm(&next.name, DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    }
}
