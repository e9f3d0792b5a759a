//! `holdfast demo`: told to its end, it writes the figures that programs rely on;
//! interrupted, it stops. Either way it leaves nothing behind.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::bench::{spec, turn};

type Good = fn(&Value) -> bool;

/// Where each figure is, and what it must be.
const FIGURES: [(&str, Good); 15] = [
    ("/nodes", |value| *value == 3),
    ("/vms", |value| *value == 4),
    ("/accelerator", |value| *value == "tcg" || *value == "kvm"),
    ("/cluster_ready_ms", is_positive),
    ("/vm_boot_ms", is_positive),
    ("/migration/total_ms", is_positive),
    ("/migration/downtime_ms", Value::is_u64),
    ("/migration/blackout_ms", is_positive),
    ("/migration/lost_packets", Value::is_u64),
    ("/migration/tcp_survived", |value| *value == true),
    ("/failover/detected_ms", is_positive),
    ("/failover/started_ms", is_positive),
    ("/failover/serving_ms", is_positive),
    ("/failover/lost_records", |value| *value == 0),
    ("/split_brain", |value| *value == false),
];

fn is_positive(value: &Value) -> bool {
    value.as_u64().is_some_and(|value| value > 0)
}

#[test]
fn the_demo_writes_its_figures_and_leaves_nothing() {
    let _turn = turn();
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("figures.json");
    let mut demo = begin(&["--json", file.to_str().unwrap()]);
    let told = rest(&mut demo);
    assert!(demo.wait().unwrap().success(), "{told}");
    let figures: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for (at, good) in FIGURES {
        let figure = figures.pointer(at).unwrap_or_else(|| panic!("no {at} in {figures}"));
        assert!(good(figure), "{at} is {figure}: {told}");
    }
    assert!(told.contains("failover, serving") && told.contains("split brain"), "no table: {told}");
    left_nothing(&demo);

    let mut demo = begin(&[]);
    // It has a lab once it tells of its first act.
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("A cluster")));
    kill(Pid::from_raw(demo.id().cast_signed()), Signal::SIGINT).unwrap();
    lines.for_each(drop);
    assert_eq!(demo.wait().unwrap().code(), Some(130));
    left_nothing(&demo);
}

fn begin(words: &[&str]) -> Child {
    let spec = spec();
    Command::new(&spec.binary)
        .arg("demo")
        .args(words)
        .env("HOLDFAST_GUEST", spec.guest.kernel.parent().unwrap())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn rest(demo: &mut Child) -> String {
    let mut text = String::new();
    demo.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
    text
}

/// Whatever a lab makes has the number of its process in its name.
fn left_nothing(demo: &Child) {
    let mark = format!("hf{}-", demo.id());
    for directory in ["/run/netns", "/var/tmp", "/run/holdfast-lab"] {
        let entries = std::fs::read_dir(Path::new(directory)).into_iter().flatten().flatten();
        let mut left = entries.map(|entry| entry.file_name()).filter(|name| name.to_string_lossy().starts_with(&mark));
        assert_eq!(left.next(), None, "left in {directory}");
    }
}
