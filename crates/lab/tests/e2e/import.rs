//! A LUN that survives its cluster: another one takes it over with its disks. While the
//! first one lives, what is damaged of the LUN's description is found and mended.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use holdfast_api::{
    AddVolume, Allocation, CreateVm, DiskDefinition, DiskFormat, ImportVolume, VmDefinition, VolumeCheck,
};
use holdfast_lab::cluster::{Cluster, ClusterSpec, VmTemplate};
use holdfast_lab::guest::GuestClient;

use crate::bench::{DEADLINE, eventually, refused, spec, turn};

const LUN: &str = "san";
const LUN_BYTES: u64 = 480 << 20;
const DISK_BYTES: u64 = 64 << 20;
/// Where the superblocks and the areas of a LUN of this size are.
const SUPERBLOCKS: [u64; 2] = [0, 2 << 20];
const AREAS: [u64; 2] = [4 << 20, 8 << 20];

fn one_node() -> Cluster {
    Cluster::form(ClusterSpec { nodes: 1, ..spec() }).unwrap()
}

fn damage(device: &Path, places: &[u64]) {
    let lun = File::options().write(true).open(device).unwrap();
    for at in places {
        lun.write_all_at(&[0x5a; 512], at + 16).unwrap();
    }
}

fn check(cluster: &Cluster) -> VolumeCheck {
    cluster.any().unwrap().check_volume(LUN).unwrap()
}

/// `holdfast volume check --lun`, which needs no cluster.
fn look(binary: &Path, device: &Path) -> Output {
    Command::new(binary).args(["volume", "check", "--lun"]).arg(device).output().unwrap()
}

#[test]
fn a_lun_s_description_is_mended_while_its_disks_are_written_to() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let device = dir.path().join("lun");
    File::create(&device).unwrap().set_len(LUN_BYTES).unwrap();
    let lun = device.display().to_string();

    let cluster = one_node();
    let binary = cluster.spec().binary.clone();
    let api = cluster.any().unwrap();
    let add = AddVolume { name: LUN.into(), directory: None, lun: Some(lun.clone()), erase: None };
    api.add_volume(&add).unwrap();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101).disk(LUN, DISK_BYTES)).unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    eventually("records", || (writer.highest() >= 50).then_some(()));
    let sound = check(&cluster);
    assert_eq!((sound.findings, sound.files.len()), (Vec::new(), 1));
    assert!(sound.files[0].allocated_bytes > 0);

    // Each kind of damage is found and mended; the guest writes all the time.
    let both = [SUPERBLOCKS[0], SUPERBLOCKS[1], AREAS[0], AREAS[1]];
    for places in [&SUPERBLOCKS[..1], &SUPERBLOCKS[1..], &SUPERBLOCKS, &AREAS, &both] {
        damage(&device, places);
        let found = check(&cluster).findings;
        assert!(!found.is_empty(), "{places:?}");
        let looked = look(&binary, &device);
        assert!(!looked.status.success(), "{looked:?}");
        assert_eq!(api.repair_volume(LUN).unwrap().findings, Vec::<String>::new(), "{places:?}");
        let highest = writer.highest();
        eventually("records", || (writer.highest() > highest).then_some(()));
    }
    drop((vm, writer, cluster));
}

#[test]
fn a_lun_is_taken_over_with_its_disks_when_its_cluster_is_gone() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let device = dir.path().join("lun");
    File::create(&device).unwrap().set_len(LUN_BYTES).unwrap();
    let lun = device.display().to_string();
    let import =
        |take: Option<&str>| ImportVolume { name: "tank".into(), lun: lun.clone(), take: take.map(str::to_owned) };

    let first = one_node();
    let api = first.any().unwrap();
    assert_eq!(refused(api.import_volume(&import(None))).0, "bad_lun", "it holds nothing");
    let add = AddVolume { name: LUN.into(), directory: None, lun: Some(lun.clone()), erase: None };
    api.add_volume(&add).unwrap();
    let vm = first.create_vm(&VmTemplate::new("web", 101).disk(LUN, DISK_BYTES)).unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    eventually("records", || (writer.highest() >= 50).then_some(()));
    let report = writer.stop().unwrap();
    assert_eq!(check(&first).findings, Vec::<String>::new());
    assert_eq!(refused(api.import_volume(&import(None))).0, "conflict", "it is in use here");
    drop((vm, first));

    let second = one_node();
    let api = second.any().unwrap();
    let (code, why) = refused(api.import_volume(&import(None)));
    assert!(code == "lun_in_use" && why.contains("--take san") && why.contains("1 files"), "{code}: {why}");
    assert_eq!(refused(api.import_volume(&import(Some("tank")))).0, "lun_in_use");
    let looked = look(&second.spec().binary, &device);
    assert!(looked.status.success(), "{looked:?}");
    let volume = api.import_volume(&import(Some(LUN))).unwrap();
    assert_eq!((volume.name.as_str(), volume.vms.len()), ("tank", 0));
    let files = api.volume_files("tank").unwrap();
    assert_eq!((files.len(), files[0].vm.as_ref(), files[0].size_bytes), (1, None, DISK_BYTES));
    assert_eq!(refused(api.import_volume(&import(Some(LUN)))).0, "already_exists");

    // A VM goes on with the disk.
    let template = VmTemplate::new("web2", 102);
    let disk = |file: &str| DiskDefinition {
        volume: "tank".into(),
        size: None,
        format: DiskFormat::Raw,
        allocate: Allocation::Thin,
        image: None,
        file: Some(file.to_owned()),
    };
    let request = |file: &str| CreateVm {
        vm: VmDefinition { disks: vec![disk(file)], ..second.definition(&template) },
        start: true,
    };
    for file in ["../web", "vms//disk", "nothing"] {
        assert_eq!(refused(api.create_vm(&request(file))).0, "invalid");
    }
    let job = api.create_vm(&request(&files[0].name)).unwrap();
    second.job_done(&job, DEADLINE).unwrap();
    assert_eq!(refused(api.create_vm(&CreateVm { start: false, ..request(&files[0].name) })).0, "already_exists");
    let netns = second.lab().fabric().client().name().to_owned();
    let mut guest = GuestClient::connect(Some(&netns), template.ip).unwrap();
    guest.ping(DEADLINE).unwrap();
    let next = guest.write(DEADLINE).unwrap().sequence;
    let acknowledged = report.acknowledged.len() as u64;
    assert!(next > acknowledged, "{next} after {acknowledged} records");
    assert_eq!(api.check_volume("tank").unwrap().findings, Vec::<String>::new());
    assert_eq!(api.volume_files("tank").unwrap()[0].vm.as_deref(), Some("web2"));
}
