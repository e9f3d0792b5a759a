//! `vm create --image`: the disk has what the image has, and the image stays as it is.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use holdfast_api::{
    Allocation, ChangeKind, CreateVm, DiskDefinition, DiskFormat, JobState, JobView, VmDefinition, VmView,
};
use holdfast_lab::cluster::{Cluster, VOLUME, VmTemplate};

use crate::bench::DEADLINE;
use crate::shell::Shell;

/// Of the image; the disk made from it may be larger.
const IMAGE_BYTES: usize = 24 << 20;

pub fn disks_are_made_from_images(cluster: &Cluster) {
    let n1 = Shell::on(cluster, "n1");
    // A file that only this node has, and one on the volume.
    let raw = cluster.host("n1").unwrap().directory().join("etc/golden.raw");
    let raw_on_host = cluster.lab().host_directory().join("etc/golden.raw");
    let qcow2 = cluster.on_volume("golden.qcow2");
    fs::write(&raw, contents()).unwrap();
    qemu_img(&["convert", "-c", "-O", "qcow2", text(&raw), text(&qcow2)]);
    let before = [fs::read(&raw).unwrap(), fs::read(&qcow2).unwrap()];

    let golden = format!("{VOLUME}:golden.qcow2");
    for (name, image, format, size) in [
        ("a", text(&raw_on_host), "raw", ""),
        ("b", text(&raw_on_host), "qcow2", ":40M"),
        ("c", golden.as_str(), "raw", ":40M"),
        ("d", golden.as_str(), "qcow2", ""),
    ] {
        let disk = format!("{VOLUME}{size},format={format}");
        let create =
            ["vm", "create", name, "--memory", "128M", "--disk", &disk, "--image", image, "--no-wait", "--json"];
        let job: JobView = n1.json(&create);
        assert_eq!(job.work, "create");
        let job: JobView = n1.json(&["job", "show", &job.id.to_string(), "--follow", "--json"]);
        assert_eq!((job.state, job.percent), (JobState::Done, 100), "{job:?}");

        let vm = cluster.client("n2").vm(name).unwrap();
        assert_eq!(vm.disks[0].format, if format == "raw" { DiskFormat::Raw } else { DiskFormat::Qcow2 });
        let bytes = if size.is_empty() { IMAGE_BYTES } else { 40 << 20 };
        assert_eq!(vm.disks[0].size_bytes, bytes as u64);
        assert_eq!(seen_by_a_guest(cluster, &vm), padded(&before[0], bytes), "{name} from {image} as {format}{size}");
        assert!(vm.definition.disks[0].image.is_none(), "what is on the disk now is the guest's");
        n1.ok(&["vm", "delete", name]);
    }
    assert!([fs::read(&raw).unwrap(), fs::read(&qcow2).unwrap()] == before, "an image was changed");
    n1.ok(&["vm", "create", "e", "--memory", "128M", "--disk", VOLUME, "--image", &golden]);
    n1.ok(&["vm", "delete", "e"]);
    let small = n1.fails(&["vm", "create", "f", "--disk", &format!("{VOLUME}:1M"), "--image", &golden], 1);
    assert!(small.contains("24"), "{small}");

    its_progress_is_told(cluster, before[0].len());

    // An image that turns out to be damaged on the way: the job says so, nothing is left.
    let damaged = cluster.on_volume("damaged.qcow2");
    fs::write(&damaged, &before[1][..before[1].len() / 2]).unwrap();
    let why = n1.fails(&["vm", "create", "g", "--disk", VOLUME, "--image", &format!("{VOLUME}:damaged.qcow2")], 1);
    assert!(why.contains("damaged.qcow2"), "{why}");
    cluster
        .wait("no VM that was not made", DEADLINE, |client| {
            client.vms().ok()?.iter().all(|vm| vm.name == "web").then_some(())
        })
        .unwrap();
    let left: Vec<_> =
        fs::read_dir(cluster.on_volume("vms")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.len() == 1 && left[0].to_string_lossy().starts_with("web-"), "{left:?}");
    fs::remove_file(damaged).unwrap();
    fs::remove_file(qcow2).unwrap();
}

/// Copying something large is told step by step.
fn its_progress_is_told(cluster: &Cluster, share: usize) {
    let large = cluster.on_volume("large.raw");
    fs::write(&large, vec![0xa5; share * 8]).unwrap();
    let n1 = cluster.client("n1");
    let mut changes = n1.changes().unwrap();
    let disk = DiskDefinition {
        volume: VOLUME.into(),
        size: None,
        format: DiskFormat::Raw,
        allocate: Allocation::Thin,
        image: Some(format!("{VOLUME}:large.raw")),
        file: None,
    };
    let vm = VmDefinition { disks: vec![disk], boot: None, ..cluster.definition(&VmTemplate::new("large", 109)) };
    let job = n1.create_vm(&CreateVm { vm, start: false }).unwrap();
    let mut steps = vec![job];
    let until = Instant::now() + DEADLINE;
    while steps.last().is_some_and(|step| step.state == JobState::Running) {
        let left = until.saturating_duration_since(Instant::now());
        let change = changes.next(left).unwrap().expect("the job's end");
        if change.kind == ChangeKind::Job {
            steps.push(n1.job(steps[0].id).unwrap());
        }
    }
    assert!(steps.is_sorted_by_key(|step| step.percent), "{steps:?}");
    assert!(steps.iter().any(|step| step.note.starts_with("copying") && step.note.contains("large.raw")), "{steps:?}");
    assert_eq!(steps.last().map(|step| (step.state, step.percent)), Some((JobState::Done, 100)));
    cluster.job_done(&n1.delete_vm("large").unwrap(), DEADLINE).unwrap();
    fs::remove_file(large).unwrap();
}

/// Something, a hole, and something that does not repeat.
fn contents() -> Vec<u8> {
    let mut bytes = vec![0; IMAGE_BYTES];
    bytes[..16].copy_from_slice(b"the first block.");
    for (index, word) in bytes[IMAGE_BYTES / 2..].chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    bytes
}

fn padded(bytes: &[u8], to: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(to, 0);
    bytes
}

/// What a guest would read from its disk.
fn seen_by_a_guest(cluster: &Cluster, vm: &VmView) -> Vec<u8> {
    let scratch = tempfile::tempdir().unwrap();
    let plain = scratch.path().join("plain");
    let file = cluster.on_volume(&vm.disks[0].file);
    let format = match vm.disks[0].format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
        DiskFormat::Vhdx => "vhdx",
        DiskFormat::Vhd => "vpc",
    };
    qemu_img(&["convert", "-f", format, "-O", "raw", text(&file), text(&plain)]);
    fs::read(plain).unwrap()
}

fn qemu_img(words: &[&str]) {
    let output = Command::new("qemu-img").args(words).output().unwrap();
    assert!(output.status.success(), "qemu-img {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
