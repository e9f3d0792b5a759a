//! A LUN that is an export of an NBD server: QEMU's own.

mod common;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use common::exported::{Exported, empty};
use common::*;
use holdfast_volume::lun::{Alone, FileId, Identity, Op, Store, Superblock};
use holdfast_volume::{Lun, Open, OpenError, Server};

const MIB: u64 = 1 << 20;
const LUN: u64 = 200 * MIB;
const DISK: u64 = 48 * MIB;
/// Any number of clients.
const SHARED: &str = "--shared=0";

/// A disk on a LUN, served at a socket of the directory.
fn serve(lun: &Path, dir: &Path) -> (Alone, Server) {
    let identity = Identity { volume: uuid::Uuid::from_u128(7), cluster: uuid::Uuid::nil(), name: "vol".into() };
    let lun = Lun::open(lun).unwrap();
    let store = Store::format(lun.clone(), identity, Some(16 * MIB), 0, 1).unwrap();
    let alone = Alone::new(lun, store).unwrap();
    alone.commit(&[Op::Create { file: FileId(1), bytes: DISK, name: "disk".into() }]).unwrap();
    let server = Server::start(2).unwrap();
    server.serve(1, UnixListener::bind(dir.join("socket")).unwrap(), alone.open("disk", Arc::new(Open)).unwrap());
    (alone, server)
}

fn client(dir: &Path) -> Client {
    Client::connect(UnixStream::connect(dir.join("socket")).unwrap())
}

fn served_like_a_device(exported: &Exported, file: &Path, dir: &Path) {
    let lun = Lun::open(&exported.address()).unwrap();
    assert_eq!(lun.bytes(), LUN);
    let (_alone, _server) = serve(&exported.address(), dir);
    // What is written on it is what another host's device would show.
    assert_eq!(Superblock::read(&Lun::open(file).unwrap()).unwrap().identity.name, "vol");
    let url = format!("nbd+unix:///disk?socket={}", dir.join("socket").display());
    let io = |command: &str| run("qemu-io", &["-f", "raw", "-c", command, &url]);
    for command in [
        "write -P 0x11 0 20M",
        "read -P 0x11 0 20M",
        "write -f -P 0x22 512 512",
        "write -z 64k 64k",
        "read -P 0 64k 64k",
        "write -z -u 128k 64k",
        "read -P 0 128k 64k",
        "read -P 0x11 192k 64k",
        "discard 256k 64k",
        "aio_write -P 0x33 1M 30M",
        "flush",
        "read -P 0x33 1M 30M",
    ] {
        io(command);
    }
}

#[test]
fn a_lun_at_a_socket_is_served_like_a_device() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = empty(dir.path(), LUN);
    served_like_a_device(&Exported::at_socket(&file, &[SHARED]), &file, dir.path());
}

#[test]
fn a_lun_on_the_network_is_served_like_a_device() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = empty(dir.path(), LUN);
    served_like_a_device(&Exported::on_port(&file, &[SHARED]), &file, dir.path());
}

#[test]
fn an_export_whose_server_was_killed_is_connected_to_again() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = empty(dir.path(), LUN);
    let mut exported = Exported::at_socket(&file, &[SHARED]);
    let (_alone, _server) = serve(&exported.address(), dir.path());
    let mut client = client(dir.path());
    client.write(0, &[1; 4096]);
    for round in 0..3 {
        exported.kill();
        const FAILED: u32 = 5;
        client.ask(READ, 1, 0, 4096, &[]);
        assert_eq!(client.answer(), (1, FAILED));
        exported.restart();
        // The first that come are too soon after the one that failed.
        let answer = loop {
            client.ask(READ, 2, 0, 4096, &[]);
            match client.answer() {
                (2, 0) => break client.payload(4096),
                other => assert_eq!(other, (2, FAILED)),
            }
        };
        assert_eq!(answer, [round + 1; 4096]);
        client.write(0, &[round + 2; 4096]);
    }
}

#[test]
fn what_hosts_cannot_share_is_no_lun() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = empty(dir.path(), LUN);
    let why = |address: &Path| match Lun::open(address) {
        Err(OpenError::Io { source, .. }) => source.to_string(),
        other => panic!("{other:?}"),
    };
    let alone = Exported::at_socket(&file, &[]);
    assert!(why(&alone.address()).contains("other connections"), "{}", why(&alone.address()));
    drop(alone);
    let read_only = Exported::at_socket(&file, &[SHARED, "--read-only"]);
    assert!(why(&read_only.address()).contains("read-only"));
    let other = read_only.address().to_str().unwrap().replace("/lun?", "/other?");
    assert!(why(Path::new(&other)).contains("refuses"));
    drop(read_only);
    assert!(matches!(Lun::open(Path::new("nbd://127.0.0.1:1/x")), Err(OpenError::Io { .. })));
}
