//! QEMU's own tools as clients: they check what the protocol promises.

mod common;

use std::process::Command;

use common::*;

#[test]
fn qemu_writes_zeroes_discards_and_reads_back() {
    let served = Served::new(1, false);
    let url = served.url();
    let io = |command: &str| run("qemu-io", &["-f", "raw", "-c", command, &url]);
    for command in [
        "write -P 0x11 0 1M",
        "read -P 0x11 0 1M",
        "write -f -P 0x22 512 512",
        "write -z 64k 64k",
        "read -P 0 64k 64k",
        "write -z -u 128k 64k",
        "discard 256k 64k",
        "aio_write -P 0x33 1M 4M",
        "flush",
    ] {
        io(command);
    }
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &url]);
    assert!(map.contains("\"data\": false") && map.contains("\"data\": true"), "{map}");
    let disk = served.disk();
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x33 1M 4M", disk.to_str().unwrap()]);
}

#[test]
fn an_image_goes_in_and_comes_out_the_same() {
    let served = Served::new(2, false);
    let image = served.dir.path().join("image");
    let mut bytes = vec![0_u8; SIZE as usize];
    for (index, byte) in bytes.iter_mut().enumerate().filter(|(index, _)| index / 65536 % 3 == 0) {
        *byte = (index * 2654435761) as u8;
    }
    std::fs::write(&image, &bytes).unwrap();
    let image = image.to_str().unwrap();
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", image, &served.url()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &served.url()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, served.disk().to_str().unwrap()]);
}

#[test]
fn a_qcow2_image_lives_inside_a_disk() {
    let served = Served::new(1, false);
    let url = served.url();
    run("qemu-img", &["create", "-f", "qcow2", &url, "8M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 1M 3M", &url]);
    run("qemu-img", &["check", "-f", "qcow2", &url]);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 0x5a 1M 3M", &url]);
}

#[test]
fn another_name_is_refused() {
    let served = Served::new(1, false);
    let url = served.url().replace("/disk?", "/other?");
    let output = Command::new("qemu-img").args(["info", &url]).output().unwrap();
    assert!(!output.status.success());
}
