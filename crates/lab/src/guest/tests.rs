//! The clients against the guest's real service on loopback, with a file as its disk.

use std::net::TcpListener;
use std::sync::mpsc::sync_channel;

use holdfast_guest::disk::RecordDisk;
use holdfast_guest::service::Guest;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

/// A record disk of 1 MiB and the address of a service that writes to it.
fn serve(boot_id: u64) -> (Scratch, SocketAddrV4) {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = format!("holdfast-guest-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    let image = Scratch(std::env::temp_dir().join(name));
    fs::File::create(&image.0).unwrap().set_len(1 << 20).unwrap();
    let (power, _) = sync_channel(1);
    let (guest, queue) = Guest::new(boot_id, power);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    guest.serve_udp(UdpSocket::bind(address).unwrap()).unwrap();
    guest.serve_tcp(listener).unwrap();
    let disk = RecordDisk::open(&image.0, boot_id, false);
    thread::spawn(move || queue.run(&guest, disk));
    (image, address)
}

#[test]
fn client_writes_what_verification_finds() {
    let (image, address) = serve(7);
    let mut client = GuestClient::connect_to(None, address).unwrap();
    assert_eq!(client.ping(DEADLINE).unwrap().boot_id, 7);
    assert_eq!(client.write(DEADLINE).unwrap(), Acknowledged { sequence: 1, boot_id: 7 });
    assert_eq!(client.status(DEADLINE).unwrap().record, 1);
    assert_eq!(client.command("write", DEADLINE).unwrap(), "written 2 durable boot_id=0000000000000007");
    let error = client.command("dirty 0 1", DEADLINE).unwrap_err().to_string();
    assert!(error.contains("refused \"dirty 0 1\": the rate"), "{error}");

    let writer = Writer::start(None, address, Duration::ZERO, DEADLINE).unwrap();
    let until = Instant::now() + DEADLINE;
    while writer.highest() < 50 && Instant::now() < until {
        thread::yield_now();
    }
    let written = writer.stop().unwrap();
    assert!(written.highest() >= 50, "{written:?}");
    assert_eq!(written.refused, 0);

    let report = verify_records(&image.0, ImageFormat::Raw).unwrap();
    assert!(report.highest >= written.highest());
    assert_eq!((report.missing.len(), report.corrupt_sectors.len()), (0, 0));
    assert_eq!(report.lost(&written.acknowledged), []);
}

#[test]
fn qcow2_is_verified_through_a_copy() {
    let (image, address) = serve(9);
    let write = GuestClient::connect_to(None, address).unwrap().write(DEADLINE).unwrap();
    let qcow2 = Scratch(image.0.with_extension("qcow2"));
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&image.0, &qcow2.0])
        .status()
        .expect("qemu-img (package qemu-utils) is needed");
    assert!(converted.success());
    let report = verify_records(&qcow2.0, ImageFormat::Qcow2).unwrap();
    assert_eq!((report.highest, report.lost(&[write]).len()), (1, 0));
    assert!(verify_records(&qcow2.0, ImageFormat::Raw).is_err(), "a qcow2 file is no raw record disk");
    let error = verify_records(&image.0, ImageFormat::Qcow2).unwrap_err().to_string();
    assert!(error.contains("qemu-img cannot read"), "{error}");
}

#[test]
fn prober_sees_a_silent_time() {
    let (_image, address) = serve(11);
    let prober = Prober::start(None, address, Duration::from_millis(2)).unwrap();
    let first = prober.wait_for(DEADLINE, |_| true).unwrap();
    let later = first.sent + Duration::from_millis(100);
    prober.wait_for(DEADLINE, |sample| sample.sent > later).unwrap();
    assert!(prober.wait_for(Duration::from_millis(1), |sample| sample.boot_id != 11).is_err());
    let report = prober.stop();
    assert_eq!((report.lost(), report.boots()), (0, vec![11]));
    assert!(report.sent() > 10 && report.samples().len() == report.sent());
    let gap = report.longest_gap().unwrap();
    assert!(gap.length > Duration::ZERO && gap.length < DEADLINE, "{gap:?}");
    assert!(report.first_answer_after(later).unwrap() > later);
    assert!(report.first_answer_after(Instant::now()).is_none());
}

#[test]
fn prober_counts_pings_that_nobody_answers() {
    // Bound, so that the port is nobody else's, and never read.
    let deaf = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, deaf.local_addr().unwrap().port());
    let prober = Prober::start(None, address, Duration::from_millis(1)).unwrap();
    let mut bytes = [0; 64];
    for _ in 0..5 {
        assert_eq!(deaf.recv(&mut bytes).unwrap(), 16);
    }
    let report = prober.stop();
    assert!(report.sent() >= 5);
    assert_eq!((report.lost(), report.longest_gap(), report.boots()), (report.sent(), None, vec![]));
    let mut client = GuestClient::connect_to(None, address).unwrap();
    let error = client.ping(Duration::from_millis(50)).unwrap_err().to_string();
    assert!(error.contains("did not answer Ping within 50 ms"), "{error}");
}

#[test]
fn session_counts_pongs_and_notices_a_cut() {
    let (_image, address) = serve(13);
    let session = TcpSession::start(None, address, Duration::from_millis(1), DEADLINE).unwrap();
    let until = Instant::now() + DEADLINE;
    while session.answered() < 10 && Instant::now() < until {
        thread::yield_now();
    }
    let report = session.stop().unwrap();
    assert!(report.answered >= 10 && report.failure.is_none(), "{report:?}");

    // A peer that takes the connection, answers wrongly and hangs up.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port());
    let session = TcpSession::start(None, address, Duration::from_millis(1), DEADLINE).unwrap();
    listener.accept().unwrap().0.write_all(b"pong 2 boot_id=1\n").unwrap();
    let until = Instant::now() + DEADLINE;
    while !session.broken() && Instant::now() < until {
        thread::yield_now();
    }
    let report = session.stop().unwrap();
    assert!(report.failure.unwrap().contains("the answer to ping 1 was \"pong 2 boot_id=1\\n\""));
}

#[test]
fn missing_namespace_is_said() {
    let error = GuestClient::connect(Some("hf-nowhere"), Ipv4Addr::LOCALHOST).unwrap_err();
    assert!(format!("{error:#}").contains("hf-nowhere"), "{error:#}");
}
