//! Files on volumes: what is put through one node is got through another, on a LUN as in a
//! directory; what is cut off leaves nothing; what is in use stays.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use holdfast_api::{CreateVm, FileView};
use holdfast_lab::cluster::{Cluster, VOLUME, VmTemplate};
use holdfast_lab::guest::GuestClient;

use crate::bench::{DEADLINE, eventually, three_nodes};
use crate::shell::Shell;

const LUN: &str = "san";
const LUN_BYTES: u64 = 640 << 20;
const SLAB_BYTES: u64 = 16 << 20;
/// No multiple of anything: files are as long as they are.
const BYTES: u64 = 3 * SLAB_BYTES + 12_345;

/// Something, a slab of nothing, and something until the end.
fn image(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(BYTES).unwrap();
    for at in [0, 5 << 20, 2 * SLAB_BYTES + 4096, BYTES - 8] {
        file.write_all_at(&at.to_le_bytes().map(|byte| byte ^ 0x5a), at).unwrap();
    }
}

fn same(one: &Path, other: &Path) {
    let (one, other) = (std::fs::read(one).unwrap(), std::fs::read(other).unwrap());
    assert!(one == other, "{} bytes and {} that differ", one.len(), other.len());
}

fn used(cluster: &Cluster) -> u64 {
    let volumes = cluster.any().unwrap().volumes().unwrap();
    let lun = volumes.into_iter().find(|volume| volume.name == LUN).unwrap();
    lun.used_bytes.unwrap()
}

/// Begins to put a file through a node, and stops half way, with the connection open.
fn half_put(cluster: &Cluster, node: &str, name: &str) -> UnixStream {
    let socket = cluster.client(node).socket().to_owned();
    let mut stream = UnixStream::connect(socket).unwrap();
    let head = format!(
        "PUT /api/v1/volumes/{LUN}/files/{name} HTTP/1.1\r\nHost: holdfast\r\nContent-Length: {}\r\n\r\n",
        2 * SLAB_BYTES
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&vec![7; SLAB_BYTES as usize + (1 << 20)]).unwrap();
    stream
}

#[test]
fn files_are_put_and_got_through_any_node_and_are_whole_or_not_there() {
    let (cluster, _turn) = three_nodes();
    let lun = cluster.add_lun(LUN, LUN_BYTES).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let directory =
        cluster.any().unwrap().volumes().unwrap().into_iter().find(|volume| volume.name != LUN).unwrap().name;
    let (here, back) = (cluster.lab().directory().join("image.iso"), cluster.lab().directory().join("back.iso"));
    image(&here);
    let (here_text, back_text) = (here.to_str().unwrap(), back.to_str().unwrap());
    let [n1, n2, n3] = ["n1", "n2", "n3"].map(|host| Shell::on(&cluster, host));

    for volume in [LUN, directory.as_str()] {
        n1.ok(&["volume", "put", volume, here_text, "iso/a.iso"]);
        let files: Vec<FileView> = n2.json(&["volume", "ls", volume, "--json"]);
        let file = files.iter().find(|file| file.name == "iso/a.iso").unwrap();
        assert_eq!(file.size_bytes, BYTES);
        assert!(file.allocated_bytes < BYTES, "holes take no room: {file:?}");
        n2.ok(&["volume", "get", volume, "iso/a.iso", back_text]);
        same(&here, &back);
        assert!(std::fs::metadata(&back).unwrap().blocks() * 512 < BYTES / 2);
        assert!(n3.fails(&["volume", "put", volume, here_text, "iso/a.iso"], 1).contains("already"));
        n3.ok(&["volume", "put", volume, here_text, "iso/a.iso", "--replace"]);
        for name in ["../a.iso", "/a.iso", "iso//a.iso", "iso/", ".", "a/../b"] {
            let why = n1.fails(&["volume", "put", volume, here_text, name], 1);
            assert!(why.contains("cannot be the name"), "{name}: {why}");
        }
        assert!(n1.fails(&["volume", "get", volume, "iso/b.iso"], 1).contains("no"));
        n2.fails(&["volume", "rm", volume, "iso/b.iso"], 1);
    }
    n1.ok(&["volume", "cp", &format!("{directory}:iso/a.iso"), &format!("{LUN}:iso/b.iso")]);
    n3.ok(&["volume", "get", LUN, "iso/b.iso", back_text]);
    same(&here, &back);
    assert!(n1.fails(&["volume", "put", LUN, here_text, "iso"], 1).contains("iso/a.iso"));
    assert!(n1.fails(&["volume", "put", LUN, here_text, "iso/a.iso/b"], 1).contains("iso/a.iso"));
    let empty = cluster.lab().directory().join("empty");
    File::create(&empty).unwrap();
    n1.ok(&["volume", "put", LUN, empty.to_str().unwrap()]);
    n2.ok(&["volume", "get", LUN, "empty", back_text]);
    same(&empty, &back);

    // What breaks off, and what is put through a node that dies, was never there.
    let before = used(&cluster);
    let stream = half_put(&cluster, "n1", "cut");
    eventually("slabs of a file that is put", || (used(&cluster) > before).then_some(()));
    assert!(n2.fails(&["volume", "rm", LUN, "cut"], 1).contains("no file"));
    drop(stream);
    eventually("the room of a file that broke off", || (used(&cluster) == before).then_some(()));
    let dies = cluster.any().unwrap().nodes().unwrap().into_iter().find(|node| !node.coordinator).unwrap().name;
    let stream = half_put(&cluster, &dies, "cut");
    eventually("slabs of a file that is put", || (used(&cluster) > before).then_some(()));
    cluster.host(&dies).unwrap().power_off().unwrap();
    eventually("the room of a dead node's file", || (used(&cluster) == before).then_some(()));
    drop(stream);
    let left = Shell::on(&cluster, if dies == "n1" { "n2" } else { "n1" });
    let files: Vec<FileView> = left.json(&["volume", "ls", LUN, "--json"]);
    let names: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["empty", "iso/a.iso", "iso/b.iso"]);

    // A VM's disk is its own.
    let vm = cluster.create_vm(&VmTemplate::new("web", 101).disk(LUN, 64 << 20)).unwrap();
    vm.wait_answer(DEADLINE).unwrap();
    let api = cluster.any().unwrap();
    let disk = api.volume_files(LUN).unwrap().into_iter().find(|file| file.vm.is_some()).unwrap().name;
    assert!(left.fails(&["volume", "rm", LUN, &disk], 1).contains("web"));
    assert!(left.fails(&["volume", "put", LUN, here_text, &disk, "--replace"], 1).contains("web"));
    left.ok(&["volume", "rm", LUN, "iso/a.iso"]);
    assert!(left.fails(&["volume", "put", LUN, lun.to_str().unwrap(), "large"], 1).contains("bytes"));
    assert_eq!(api.check_volume(LUN).unwrap().findings, Vec::<String>::new());
    assert!(left.fails(&["volume", "remove", LUN], 1).contains("web"));
}

/// A disk of a VM that has written records, on this machine as qcow2.
fn golden(cluster: &Cluster) -> (std::path::PathBuf, u64) {
    let vm = cluster.create_vm(&VmTemplate::new("golden", 110)).unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    eventually("records", || (writer.highest() >= 20).then_some(()));
    let records = writer.stop().unwrap().acknowledged.len() as u64;
    cluster.switch_off("golden").unwrap();
    let image = cluster.lab().directory().join("golden.qcow2");
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    let made = Command::new("qemu-img").args(convert).arg(&vm.image).arg(&image).status().unwrap();
    assert!(made.success());
    (image, records)
}

#[test]
fn vms_are_made_from_images_to_luns_and_from_luns() {
    let (cluster, _turn) = three_nodes();
    cluster.add_lun(LUN, LUN_BYTES).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let (image, records) = golden(&cluster);
    let n1 = Shell::on(&cluster, "n1");
    n1.ok(&["volume", "put", LUN, image.to_str().unwrap(), "images/golden.qcow2"]);
    let cut = std::fs::read(&image).unwrap();
    // Its last cluster is missing, and qemu-img sees that.
    let half = cluster.lab().directory().join("half.qcow2");
    std::fs::write(&half, &cut[..cut.len() - 70_000]).unwrap();
    n1.ok(&["volume", "put", LUN, half.to_str().unwrap(), "images/half.qcow2"]);

    // From a LUN to a LUN, and from a LUN to a directory: the guest goes on with its records.
    for (name, last, volume) in [("one", 111, LUN), ("two", 112, VOLUME)] {
        let template = VmTemplate::new(name, last);
        let mut vm = cluster.definition(&template);
        vm.disks[0].volume = volume.into();
        vm.disks[0].image = Some(format!("{LUN}:images/golden.qcow2"));
        let job = cluster.any().unwrap().create_vm(&CreateVm { vm, start: true }).unwrap();
        cluster.job_done(&job, DEADLINE).unwrap();
        let netns = cluster.lab().fabric().client().name().to_owned();
        let mut guest = GuestClient::connect(Some(&netns), template.ip).unwrap();
        guest.ping(DEADLINE).unwrap();
        let next = guest.write(DEADLINE).unwrap().sequence;
        assert!(next > records, "{next} after {records} records");
    }
    let files: Vec<FileView> = n1.json(&["volume", "ls", LUN, "--json"]);
    let disk = files.iter().find(|file| file.vm.as_deref() == Some("one")).unwrap();
    assert!(disk.allocated_bytes <= disk.size_bytes);

    // A damaged one makes nothing, and neither leaves anything in use.
    let before = used(&cluster);
    let disk = format!("{LUN}:64M,format=raw");
    let create = ["vm", "create", "three", "--memory", "128M", "--disk", &disk, "--image"];
    let half = format!("{LUN}:images/half.qcow2");
    n1.fails(&[&create[..], &[half.as_str()]].concat(), 1);
    let missing = format!("{LUN}:images/missing.qcow2");
    assert!(n1.fails(&[&create[..], &[missing.as_str()]].concat(), 1).contains("images/missing.qcow2"));
    n1.fails(&["vm", "show", "three"], 1);
    eventually("the room of a VM that was not made", || (used(&cluster) == before).then_some(()));
    for image in ["images/half.qcow2", "images/golden.qcow2"] {
        eventually("an image that nobody has open", || {
            n1.run(&["volume", "rm", LUN, image]).status.success().then_some(())
        });
    }
    assert_eq!(cluster.any().unwrap().check_volume(LUN).unwrap().findings, Vec::<String>::new());
}
