//! Hosts as network namespaces that a test makes and that go with it, also when it panics.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::fs::File;
use std::future::Future;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use holdfast_vswitch::{Switch, SwitchKind, Tap, Vswitch, attach_tap};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};

/// Longest wait for anything.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Bytes of `virtio_net_hdr` before each frame of a tap.
const VNET_HEADER: usize = 10;

pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new() -> Namespace {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("hfvs-{}-{number}", std::process::id());
        run("ip", &["netns", "add", &name]);
        let namespace = Namespace { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `body` on a thread of its own in this namespace, with its own runtime.
    pub fn run<T: Send, F: Future<Output = T>>(&self, body: impl FnOnce(Vswitch) -> F + Send) -> T {
        let path = format!("/run/netns/{}", self.name);
        let outcome = thread::scope(|scope| {
            scope
                .spawn(|| {
                    let namespace = File::open(path).expect("namespace file");
                    setns(namespace, CloneFlags::CLONE_NEWNET).expect("setns, as root");
                    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(
                        async {
                            let vswitch = Vswitch::open().expect("netlink");
                            body(vswitch).await
                        },
                    )
                })
                .join()
        });
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// `ip -n NAMESPACE ...`
    pub fn ip(&self, words: &str) -> String {
        let mut arguments = vec!["-n", &self.name];
        arguments.extend(words.split_whitespace());
        run("ip", &arguments)
    }

    /// `ip -j -d -n NAMESPACE link show NAME`, which must be there.
    pub fn link(&self, name: &str) -> serde_json::Value {
        let text = self.ip(&format!("-j -d link show {name}"));
        let mut list: Vec<serde_json::Value> = serde_json::from_str(&text).expect("ip's JSON");
        list.remove(0)
    }

    pub fn has(&self, name: &str) -> bool {
        let arguments = ["-n", &self.name, "link", "show", name];
        Command::new("ip").args(arguments).output().expect("ip").status.success()
    }

    /// Whether bridges here can filter VLANs: kernels may be built without that.
    pub fn kernel_filters_vlans(&self) -> bool {
        let words = "link add probe type bridge vlan_filtering 1";
        let mut arguments = vec!["-n", &self.name];
        arguments.extend(words.split(' '));
        let made = Command::new("ip").args(arguments).output().expect("ip").status.success();
        if made {
            self.ip("link del probe");
        }
        made
    }

    pub fn bridge(&self, words: &str) -> serde_json::Value {
        let mut arguments = vec!["-n", &self.name, "-j"];
        arguments.extend(words.split_whitespace());
        let text = run("bridge", &arguments);
        serde_json::from_str(if text.trim().is_empty() { "[]" } else { &text }).expect("bridge's JSON")
    }

    /// The ports that the bridges of this namespace know `mac` behind, with the VLAN.
    pub fn learned(&self, mac: [u8; 6]) -> Vec<(String, Option<u64>)> {
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let entries = self.bridge("fdb show");
        entries
            .as_array()
            .expect("a list")
            .iter()
            .filter(|entry| entry["mac"] == mac.as_str())
            .map(|entry| {
                let port = entry["ifname"].as_str().expect("port").to_owned();
                (port, entry["vlan"].as_u64())
            })
            .collect()
    }

    /// The VLANs of a port as (id, is untagged).
    pub fn vlans(&self, port: &str) -> Vec<(u64, bool)> {
        let list = self.bridge(&format!("vlan show dev {port}"));
        list[0]["vlans"]
            .as_array()
            .map(|vlans| {
                let untagged = |vlan: &serde_json::Value| vlan["flags"].to_string().contains("Egress Untagged");
                vlans.iter().map(|vlan| (vlan["vlan"].as_u64().expect("id"), untagged(vlan))).collect()
            })
            .unwrap_or_default()
    }

    /// A cable: `name` here, `peer` there, both up.
    pub fn cable(&self, name: &str, other: &Namespace, peer: &str) {
        let there = &other.name;
        self.ip(&format!("link add {name} type veth peer name {peer} netns {there}"));
        self.ip(&format!("link set {name} up"));
        other.ip(&format!("link set {peer} up"));
    }

    /// Attaches to a tap here in a guest's place.
    pub fn guest(&self, tap: &str) -> Guest {
        let tap = tap.to_owned();
        Guest(self.run(|_| async move { File::from(attach_tap(&tap).expect("tap")) }))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// What stands in for a guest: the other end of its tap.
pub struct Guest(File);

impl Guest {
    pub fn send(&mut self, frame: &[u8]) {
        let mut bytes = vec![0; VNET_HEADER];
        bytes.extend(frame);
        self.0.write_all(&bytes).expect("send a frame");
    }

    /// Whether a frame that ends with `mark` arrives before the deadline.
    pub fn receives(&mut self, mark: &[u8], within: Duration) -> bool {
        let deadline = Instant::now() + within;
        let mut bytes = [0; 2048];
        loop {
            match self.0.read(&mut bytes) {
                Ok(length) if bytes[..length].ends_with(mark) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    let timeout = PollTimeout::try_from(left).expect("timeout");
                    let mut wait = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
                    poll(&mut wait, timeout).expect("poll");
                }
                Err(error) => panic!("read a frame: {error}"),
            }
        }
    }
}

/// A frame with a body of its own (ethertype 0x88b5, for experiments).
pub fn frame(to: [u8; 6], from: [u8; 6], body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(to);
    frame.extend(from);
    frame.extend([0x88, 0xb5]);
    frame.resize(60, 0);
    frame.extend(body);
    frame
}

/// Waits until `what` comes true; the state of another namespace sends us no events.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        thread::yield_now();
    }
}

pub fn external(name: &str, uplink: &str) -> Switch {
    Switch { name: name.into(), kind: SwitchKind::External { uplink: uplink.into() } }
}

pub fn tap(name: &str, bridge: &str, vlan: Option<u16>) -> Tap {
    Tap { name: name.into(), bridge: bridge.into(), mtu: None, vlan }
}
