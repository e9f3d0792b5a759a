//! What the lab's own tests share.
#![allow(dead_code, missing_docs)]

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use holdfast_lab::{InitProgram, Lab, in_netns};

/// Long enough for a busy machine; nothing waits this long unless it is broken.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// A datagram may be lost while a link comes up: another one is sent after this.
pub const AGAIN: Duration = Duration::from_millis(200);

pub fn lab() -> Lab {
    Lab::new(InitProgram::new(env!("CARGO_BIN_EXE_lab-init"))).expect("a lab (as root)")
}

/// Waits until `holds`, or fails saying `what` did not come true.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A UDP socket in the namespace `namespace`, bound to `address`.
pub fn socket(namespace: &str, address: Ipv4Addr) -> UdpSocket {
    let bound = SocketAddr::new(IpAddr::V4(address), 7777);
    in_netns(namespace, || UdpSocket::bind(bound)).expect("namespace").expect("bind")
}

/// Whether a datagram gets from `from` to `to` within `patience`.
pub fn passes(from: &UdpSocket, to: &UdpSocket, patience: Duration) -> bool {
    static COUNTER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    let token = COUNTER.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_be_bytes();
    // A link without carrier may refuse at once; that is "does not pass".
    if from.send_to(&token, to.local_addr().expect("address")).is_err() {
        return false;
    }
    let deadline = Instant::now() + patience;
    let mut buffer = [0; 64];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        to.set_read_timeout(Some(left)).expect("timeout");
        match to.recv(&mut buffer) {
            Ok(length) if buffer[..length] == token => return true,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return false;
            }
            Err(error) => panic!("receiving: {error}"),
        }
    }
}

/// The names of what a lab with this tag has left in the machine.
pub fn remains(tag: &str, directory: &std::path::Path) -> Vec<String> {
    let mut left: Vec<String> = std::fs::read_dir("/run/netns")
        .map(|entries| {
            entries
                .flatten()
                .filter_map(|entry| entry.file_name().into_string().ok())
                .filter(|name| name.starts_with(&format!("{tag}-")))
                .collect()
        })
        .unwrap_or_default();
    for path in [directory.to_owned(), std::path::Path::new("/run/holdfast-lab").join(tag)] {
        if path.exists() {
            left.push(path.display().to_string());
        }
    }
    left
}

/// The living processes of the machine whose command line contains `word`.
pub fn processes_with(word: &str) -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(word))
        })
        .collect()
}
