//! Boots the guest for real, in a network namespace of the test's own.
//!
//! Needs root, QEMU and a built guest, so it runs on demand:
//! `guest/build.sh && cargo test -p holdfast-guest --test boot -- --ignored`

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use holdfast_lab::guest::{GuestClient, ImageFormat, PORT, Prober, TcpSession, Writer, verify_records};

const DEADLINE: Duration = Duration::from_secs(60);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
const APPEND: &str = "console=ttyS0 quiet panic=1 nokaslr mitigations=off tsc=reliable no_timer_check \
                      cryptomgr.notests random.trust_cpu=on 8250.nr_uarts=1 audit=0 \
                      rcupdate.rcu_expedited=1 acpi=noirq hf.ip=10.0.0.5/24";

fn run(command: &str) {
    let status = Command::new("sh").args(["-c", command]).status().unwrap();
    assert!(status.success(), "{command}");
}

/// A namespace with a tap for one guest, and a scratch directory.
struct Bench {
    netns: String,
    directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let netns = format!("hfgb{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        run(&format!(
            "ip netns add {netns} && ip -n {netns} link set lo up && \
             ip -n {netns} tuntap add tap0 mode tap && ip -n {netns} addr add 10.0.0.1/24 dev tap0 && \
             ip -n {netns} link set tap0 up"
        ));
        Self { netns, directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A disk of 64 MiB.
    fn disk(&self) -> PathBuf {
        let disk = self.path("disk.raw");
        std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        disk
    }

    fn boot(&self, kernel: &str, disk: Option<&Path>, append: &str) -> Qemu {
        let out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/guest");
        assert!(out.join(kernel).exists(), "run guest/build.sh first");
        let qmp = self.path("qmp");
        let _ = std::fs::remove_file(&qmp);
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns, "qemu-system-x86_64"]);
        command.args(["-accel", "tcg,thread=multi", "-M", "pc", "-cpu", "max,la57=off", "-m", "128"]);
        command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
        command.args(["-serial", &format!("file:{}", self.path("console").display())]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
        command.arg("-kernel").arg(out.join(kernel)).arg("-initrd").arg(out.join("initrd.cpio"));
        command.args(["-append", &format!("{APPEND} {append}")]);
        command.args(["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no"]);
        command.args(["-device", "virtio-net-pci,netdev=n,romfile="]);
        if let Some(disk) = disk {
            command.args(["-drive", &format!("file={},format=raw,if=none,id=d,cache=none", disk.display())]);
            command.args(["-device", "virtio-blk-pci,drive=d"]);
        }
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        Qemu { child, qmp, console: self.path("console") }
    }

    fn client(&self) -> GuestClient {
        GuestClient::connect(Some(&self.netns), ADDRESS).unwrap()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.netns]).status();
    }
}

struct Qemu {
    child: Child,
    qmp: PathBuf,
    console: PathBuf,
}

impl Qemu {
    /// `kill -9`. `ip netns exec` becomes QEMU, so the child is QEMU itself.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Presses the power button and waits for QEMU to end.
    fn press_power_button(&mut self) {
        let mut qmp = UnixStream::connect(&self.qmp).unwrap();
        qmp.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut lines = BufReader::new(qmp.try_clone().unwrap()).lines();
        assert!(lines.next().unwrap().unwrap().contains("QMP"));
        qmp.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"system_powerdown\"}").unwrap();
        self.wait_for_end();
    }

    fn wait_for_end(&mut self) {
        let until = Instant::now() + DEADLINE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "QEMU does not end; console: {}", self.said());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    fn wait_for_console(&self, text: &str) {
        let until = Instant::now() + DEADLINE;
        while !self.said().contains(text) {
            assert!(Instant::now() < until, "no {text:?} on the console: {}", self.said());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs root, QEMU and guest/build.sh"]
fn acknowledged_records_survive_a_killed_qemu() {
    let bench = Bench::new();
    let disk = bench.disk();
    let mut acknowledged = Vec::new();
    let mut boots = Vec::new();
    let address = SocketAddrV4::new(ADDRESS, PORT);
    for boot in 1..=3 {
        let qemu = bench.boot("vmlinuz", Some(&disk), "");
        let started = bench.client().ping(DEADLINE).unwrap();
        boots.push(started.boot_id);
        // The first write waits until the guest has found the end of its records.
        let first = bench.client().write(DEADLINE).unwrap();
        assert_eq!(bench.client().status(DEADLINE).unwrap().epoch, boot);
        acknowledged.push(first);
        let writer = Writer::start(Some(&bench.netns), address, Duration::ZERO, DEADLINE).unwrap();
        let until = Instant::now() + DEADLINE;
        while writer.highest() < first.sequence + 200 {
            assert!(Instant::now() < until, "the guest writes too slowly");
            thread::sleep(Duration::from_millis(1));
        }
        qemu.kill();
        acknowledged.extend(writer.stop().unwrap().acknowledged);
    }
    boots.dedup();
    assert_eq!(boots.len(), 3, "every boot has an id of its own");
    assert!(acknowledged.len() >= 600);
    assert!(acknowledged.is_sorted_by_key(|write| write.sequence));
    let report = verify_records(&disk, ImageFormat::Raw).unwrap();
    assert_eq!(report.lost(&acknowledged), []);
    assert_eq!((report.missing.len(), report.corrupt_sectors.len()), (0, 0));
    assert_eq!(report.boots.into_values().collect::<Vec<_>>(), boots);
}

#[test]
#[ignore = "needs root, QEMU and guest/build.sh"]
fn power_button_ends_the_guest_in_order() {
    let bench = Bench::new();
    let disk = bench.disk();
    let mut qemu = bench.boot("vmlinuz", Some(&disk), "hf.writer=100");
    qemu.wait_for_console("holdfast-guest ready ip=10.0.0.5/24 boot_id=");
    // Numbers are given to whoever writes: between two of these, the guest's own
    // writer has written when one is missing.
    let mut client = bench.client();
    let mut write = client.write(DEADLINE).unwrap();
    let until = Instant::now() + DEADLINE;
    loop {
        let next = client.write(DEADLINE).unwrap();
        if next.sequence > write.sequence + 1 {
            write = next;
            break;
        }
        write = next;
        assert!(Instant::now() < until, "the guest's own writer writes nothing");
    }
    qemu.press_power_button();
    assert!(qemu.said().contains("reboot: Power down"), "{}", qemu.said());
    let report = verify_records(&disk, ImageFormat::Raw).unwrap();
    assert_eq!((report.lost(&[write]), report.corrupt_sectors.len()), (vec![], 0));
}

#[test]
#[ignore = "needs root, QEMU and guest/build.sh"]
fn load_and_sessions_run_side_by_side_without_a_disk() {
    let bench = Bench::new();
    let mut qemu = bench.boot("vmlinuz", None, "hf.dirty=20,8 hf.bogus=1");
    let mut client = bench.client();
    client.ping(DEADLINE).unwrap();
    let address = SocketAddrV4::new(ADDRESS, PORT);
    let netns = Some(bench.netns.as_str());
    qemu.wait_for_console("holdfast-guest ready");
    assert!(qemu.said().contains("cannot understand hf.bogus=1 on the command line"));
    assert_eq!(client.status(DEADLINE).unwrap().dirty_mb_s, 20);
    let prober = Prober::start(netns, address, Duration::from_millis(5)).unwrap();
    let sessions: Vec<TcpSession> =
        (0..3).map(|_| TcpSession::start(netns, address, Duration::from_millis(5), DEADLINE).unwrap()).collect();
    let error = client.write(DEADLINE).unwrap_err().to_string();
    assert!(error.contains("NoDisk"), "{error}");
    assert_eq!(client.command("fill 16", DEADLINE).unwrap(), "ok");
    assert!(client.command("fill 4000", DEADLINE).is_err());
    let until = Instant::now() + DEADLINE;
    while sessions.iter().any(|session| session.answered() < 50 && !session.broken()) {
        assert!(Instant::now() < until, "the sessions are too slow");
        thread::sleep(Duration::from_millis(1));
    }
    for session in sessions {
        let report = session.stop().unwrap();
        assert!(report.failure.is_none(), "{report:?}");
    }
    let probed = prober.stop();
    assert_eq!((probed.lost(), probed.boots().len()), (0, 1));
    assert_eq!(client.command("crash", DEADLINE).unwrap(), "ok");
    qemu.wait_for_end();
    assert!(qemu.said().contains("sysrq triggered crash"), "{}", qemu.said());
}
