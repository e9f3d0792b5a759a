//! Kinds of disks: what is made is what was asked for, and what cannot be is refused.

use std::os::unix::fs::MetadataExt as _;
use std::process::Command;
use std::time::Duration;

use holdfast_api::{Allocation, DiskFormat, VmView, VolumeView};
use holdfast_lab::cluster::{Cluster, VOLUME, VmTemplate};

use crate::bench::{DEADLINE, elsewhere, eventually, refused, three_nodes};
use crate::shell::Shell;

const LUN: &str = "san";
const LUN_BYTES: u64 = 480 << 20;
const MIB: u64 = 1 << 20;

fn used(cluster: &Cluster) -> u64 {
    let volumes: Vec<VolumeView> = cluster.any().unwrap().volumes().unwrap();
    volumes.into_iter().find(|volume| volume.name == LUN).unwrap().used_bytes.unwrap()
}

#[test]
fn a_fully_allocated_disk_has_its_room_from_the_start() {
    let (cluster, _turn) = three_nodes();
    cluster.add_lun(LUN, LUN_BYTES).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let n1 = Shell::on(&cluster, "n1");
    let create = |name: &'static str, disk: &str| {
        let disk = disk.to_owned();
        n1.ok(&["vm", "create", name, "--memory", "128M", "--disk", &disk]);
        n1.json::<VmView>(&["vm", "show", name, "--json"])
    };

    assert_eq!(used(&cluster), 0);
    let vm = create("a", &format!("{LUN}:100M,format=raw,allocate=full"));
    assert_eq!((vm.disks[0].allocate, used(&cluster)), (Allocation::Full, 112 * MIB));
    assert_eq!(vm.definition.disks[0].allocate, Allocation::Full);
    assert_eq!(create("b", &format!("{LUN}:100M,format=raw")).disks[0].allocate, Allocation::Thin);
    assert_eq!(used(&cluster), 112 * MIB);
    let why = n1.fails(&["vm", "create", "c", "--disk", &format!("{LUN}:400M,format=raw,allocate=full")], 1);
    assert!(why.contains("fully allocated") && why.contains("free"), "{why}");

    // A definition that was printed makes one like it, filled from an image.
    let image = cluster.on_volume("image.raw");
    std::fs::write(&image, vec![7; 3 * MIB as usize]).unwrap();
    let from = ["--image", &format!("{VOLUME}:image.raw")];
    let disk = format!("{LUN}:40M,format=raw,allocate=full");
    n1.ok(&["vm", "create", "c", "--memory", "128M", "--disk", &disk, from[0], from[1]]);
    assert_eq!(used(&cluster), (112 + 48) * MIB);
    n1.ok(&["vm", "delete", "c"]);

    for format in ["raw", "qcow2"] {
        let vm = create("d", &format!("{VOLUME}:32M,format={format},allocate=full"));
        let taken = std::fs::metadata(cluster.on_volume(&vm.disks[0].file)).unwrap().blocks() * 512;
        assert!(taken >= 32 * MIB, "{format}: {taken}");
        let why =
            n1.fails(&["vm", "create", "e", "--disk", &format!("{VOLUME}:900T,format={format},allocate=full")], 1);
        assert!(why.contains("free"), "{why}");
        n1.ok(&["vm", "delete", "d"]);
    }
}

#[test]
fn guests_run_from_vhdx_and_vhd_and_start_elsewhere_but_do_not_move() {
    let (cluster, _turn) = three_nodes();
    cluster.wait_ready(DEADLINE).unwrap();
    let vms = [(DiskFormat::Vhdx, "x", 101), (DiskFormat::Vhd, "v", 102)].map(|(format, name, address)| {
        let vm = cluster.create_vm(&VmTemplate { format, ..VmTemplate::new(name, address) }).unwrap();
        let writer = vm.writer(Duration::from_millis(10)).unwrap();
        eventually("records", || (writer.highest() >= 30).then_some(()));
        let home = cluster.node_of(name).unwrap();
        let (code, why) = refused(cluster.any().unwrap().migrate_vm(name, None));
        assert_eq!(code, "conflict");
        assert!(why.contains("cannot hand over its disk 0"), "{why}");
        (vm, writer, home)
    });
    // The node of one of them is lost while it writes: the format is repaired where it starts again.
    let lost = vms[0].2.clone();
    cluster.host(&lost).unwrap().power_off().unwrap();
    for (vm, writer, home) in vms {
        if home == lost {
            cluster.wait_vm(&vm.name, DEADLINE, elsewhere(&lost)).unwrap();
            vm.wait_answer(DEADLINE).unwrap();
        }
        let wanted = writer.highest() + 30;
        eventually("records", || (writer.highest() >= wanted).then_some(()));
        let report = writer.stop().unwrap();
        cluster.switch_off(&vm.name).unwrap();
        let found = vm.verify().unwrap();
        assert!(found.missing.is_empty() && found.corrupt_sectors.is_empty(), "{}: {found:?}", vm.name);
        assert_eq!(found.lost(&report.acknowledged), [], "{}", vm.name);
    }

    // Images from elsewhere, by what is in them and not by their names.
    let content: Vec<u8> = (0..(6 * MIB + 512) as u32).map(|at| (at / 509) as u8).collect();
    let plain = cluster.lab().directory().join("plain");
    std::fs::write(&plain, &content).unwrap();
    let survivor = cluster.any().unwrap().nodes().unwrap().into_iter().find(|node| node.name != lost).unwrap().name;
    let shell = Shell::on(&cluster, &survivor);
    for (name, format, options) in [
        ("i1", "vhdx", "subformat=dynamic"),
        ("i2", "vpc", "subformat=fixed,force_size=on"),
        ("i3", "vpc", "force_size=on"),
    ] {
        let image = cluster.on_volume(name);
        let convert = ["convert", "-f", "raw", "-O", format, "-o", options];
        assert!(Command::new("qemu-img").args(convert).args([&plain, &image]).status().unwrap().success());
        let disk = format!("{VOLUME},format=raw");
        shell.ok(&["vm", "create", name, "--memory", "128M", "--disk", &disk, "--image", &format!("{VOLUME}:{name}")]);
        let vm: VmView = shell.json(&["vm", "show", name, "--json"]);
        assert!(std::fs::read(cluster.on_volume(&vm.disks[0].file)).unwrap() == content, "{name}");
    }
    let why = shell.fails(&["vm", "create", "e", "--disk", &format!("{VOLUME}:1M,format=vmdk")], 2);
    assert!(why.contains("vhdx"), "{why}");
}
