//! A host with a hardware watchdog: it shows what it has, arms it while VMs run, and
//! is reset when its keeper stands still, so that its VMs run elsewhere although
//! nobody ended them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use holdfast_api::{NodeState, NodeView, WatchdogState};
use holdfast_lab::Host;
use holdfast_lab::cluster::{Cluster, VmTemplate};
use nix::sys::signal::Signal;

use crate::bench::{DEADLINE, bring, elsewhere, spec, turn};
use crate::shell::Shell;

// Some of it is for the keeper's own tests.
#[allow(dead_code)]
#[path = "../../../holdfast/src/keeper/watchdog/stand_in.rs"]
mod stand_in;

use stand_in::{Note, StandIn};

/// The host that has one.
const NODE: &str = "n3";

/// Puts the watchdog into a host: among its devices, and into what its kernel says of
/// them. The service that finds it there starts anew.
fn plug_in(host: &Host, device: &StandIn) {
    let root = device.root();
    let more = root.join("more");
    fs::create_dir(&more).unwrap();
    symlink(root.join("dev/watchdog0"), more.join("watchdog0")).unwrap();
    let devices = format!("lowerdir={}:/dev", more.display());
    let described = root.join("sys");
    run(host, &["mount", "-t", "overlay", "devices", "-o", &devices, "/dev"]);
    run(host, &["mount", "-t", "tmpfs", "shm", "/dev/shm"]);
    run(host, &["mount", "--bind", text(&described), "/sys/class/watchdog"]);
    host.stop_service().unwrap();
    host.start_service().unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn run(host: &Host, argv: &[&str]) {
    let output = host.exec(argv).unwrap();
    assert!(output.status.success(), "{argv:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn stands(state: WatchdogState) -> impl Fn(&NodeView) -> bool {
    move |node| node.watchdog.as_ref().is_some_and(|watchdog| watchdog.state == state)
}

#[test]
fn a_host_whose_keeper_stands_still_is_reset_by_its_watchdog() {
    let _turn = turn();
    // Before the hosts: what they see is what this thread sees when they boot.
    let device = StandIn::new("/no/record/is/looked/at".into());
    let mut cluster = Cluster::build(spec().configure(NODE, "watchdog", "auto")).unwrap();
    let host = cluster.host(NODE).unwrap();
    host.power_on().unwrap();
    plug_in(&host, &device);
    cluster.assemble().unwrap();

    let shell = Shell::on(&cluster, "n1");
    let ready = cluster.wait_node(NODE, DEADLINE, stands(WatchdogState::Ready)).unwrap();
    let watchdog = ready.watchdog.unwrap();
    assert_eq!((watchdog.device.as_deref(), watchdog.identity.as_deref()), (Some("/dev/watchdog0"), Some("Stand-in")));
    let shown = shell.ok(&["node", "show", NODE]);
    for words in [
        "by its lease: without an answer for 1500 ms it kills its VMs itself",
        "by its hardware watchdog /dev/watchdog0 (Stand-in), which is armed while VMs run",
        "its power cannot be switched off",
        "/dev/watchdog0, not armed: no VM runs",
    ] {
        assert!(shown.contains(words), "{words:?} is not in\n{shown}");
    }
    // The other hosts say that they have none.
    let other: NodeView = shell.json(&["node", "show", "n1", "--json"]);
    assert_eq!(other.watchdog.map(|watchdog| watchdog.state), Some(WatchdogState::Absent));
    assert!(other.fencing.contains("no hardware watchdog is used: the configuration says none"), "{}", other.fencing);

    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    bring(&cluster, "web", NODE);
    let old = vm.wait_answer(DEADLINE).unwrap().boot_id;
    device.wait("armed and fed", |state| state.feedings > 2);
    let armed = cluster.wait_node(NODE, DEADLINE, stands(WatchdogState::Armed)).unwrap();
    assert_eq!(armed.watchdog.and_then(|watchdog| watchdog.timeout_s), Some(10));
    let shown = shell.ok(&["node", "show", NODE]);
    assert!(shown.contains("which is armed: VMs that are not shown dead 5 s after their lease has ended"), "{shown}");
    assert!(shown.contains("/dev/watchdog0, armed with 10 s"), "{shown}");

    // The keeper stands still, so its VM outlives its lease; what ends it is the reset.
    let since = cluster.last_event().unwrap();
    host.kill(cluster.keeper_pid(NODE).unwrap(), Signal::SIGSTOP).unwrap();
    let notes = device.wait("the bite", |state| state.notes.contains(&Note::Bitten));
    assert!(!notes.contains(&Note::Disarmed) && !notes.contains(&Note::Abandoned), "{notes:?}");
    assert_eq!(vm.wait_answer(DEADLINE).unwrap().boot_id, old, "until then nothing else had the disk");
    host.power_off().unwrap();
    cluster.wait_vm("web", DEADLINE, elsewhere(NODE)).unwrap();
    assert_ne!(vm.wait_answer(DEADLINE).unwrap().boot_id, old);
    let subject = format!("node {NODE}");
    cluster.wait_event(since, DEADLINE, |event| event.subject == subject && event.text.contains("is lost")).unwrap();
    cluster.wait_node(NODE, DEADLINE, |node| node.state == NodeState::Lost).unwrap();
    vm.client().unwrap().write(DEADLINE).unwrap();
}
