//! Kinds of disks: what is made is what was asked for, and what cannot be is refused.

use std::os::unix::fs::MetadataExt as _;

use holdfast_api::{Allocation, VmView, VolumeView};
use holdfast_lab::cluster::{Cluster, VOLUME};

use crate::bench::{DEADLINE, three_nodes};
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
