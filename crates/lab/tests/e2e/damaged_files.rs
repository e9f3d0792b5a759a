//! A node whose files are damaged does not start, says which file and what to
//! do, and leaves the file as it is.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use holdfast_api::{AddSwitch, NodeState, ProfileName, SwitchKind};
use holdfast_lab::cluster::Cluster;

use crate::bench::{DEADLINE, eventually, form, spec, three_nodes};

type Damage = fn(&mut Vec<u8>);

#[test]
fn a_node_with_a_damaged_file_refuses_to_start() {
    let (cluster, _turn) = three_nodes();
    let node = cluster.followers().unwrap().remove(0);
    let damages: [(&str, Damage); 4] = [
        ("identity.json", |bytes| bytes.truncate(bytes.len() / 2)),
        ("identity.json", Vec::clear),
        ("consensus/log", |bytes| flip(bytes)),
        ("consensus/log", |bytes| bytes.truncate(bytes.len() / 2)),
    ];
    for (number, (file, damage)) in damages.into_iter().enumerate() {
        let damaged = refuses_to_start(&cluster, &node, file, damage);
        cluster.wait_node(&node, DEADLINE, |node| node.state == NodeState::Lost || node.silent_ms.is_some()).unwrap();
        // The others go on without it.
        let name = format!("after-{number}");
        let request = AddSwitch { name, kind: SwitchKind::Private, uplink: None };
        cluster.any().unwrap().add_switch(&request).unwrap();
        damaged.restore();
        cluster.wait_ready(DEADLINE).unwrap();
    }
}

#[test]
fn a_node_with_a_damaged_snapshot_refuses_to_start() {
    let mut spec = spec();
    spec.nodes = 1;
    let (cluster, _turn) = form(spec);
    // One is taken after so and so many changes.
    let snapshot = cluster.host("n1").unwrap().directory().join("var/consensus/snapshot");
    let until = Instant::now() + DEADLINE;
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while !snapshot.exists() {
                    assert!(Instant::now() < until, "no snapshot within {DEADLINE:?}");
                    cluster.client("n1").set_profile(ProfileName::Default).unwrap();
                }
            });
        }
    });
    let before = cluster.client("n1").cluster().unwrap();
    let damages: [Damage; 2] = [|bytes| flip(bytes), |bytes| bytes.truncate(bytes.len() / 2)];
    for damage in damages {
        refuses_to_start(&cluster, "n1", "consensus/snapshot", damage).restore();
        cluster.wait_ready(DEADLINE).unwrap();
        let after = cluster.client("n1").cluster().unwrap();
        assert!(after.id == before.id && after.revision >= before.revision, "{after:?} after {before:?}");
    }
}

fn flip(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
}

/// A file that was damaged, and what it was.
struct Damaged<'a> {
    cluster: &'a Cluster,
    node: &'a str,
    path: PathBuf,
    whole: Vec<u8>,
}

impl Damaged<'_> {
    fn restore(self) {
        let host = self.cluster.host(self.node).unwrap();
        host.stop_service().unwrap();
        fs::write(&self.path, &self.whole).unwrap();
        host.start_service().unwrap();
        self.cluster.wait_api(self.node, DEADLINE).unwrap();
    }
}

/// Damages a file of a node's state, and sees that the node says so and does not start.
fn refuses_to_start<'a>(cluster: &'a Cluster, node: &'a str, file: &str, damage: Damage) -> Damaged<'a> {
    let host = cluster.host(node).unwrap();
    host.stop_service().unwrap();
    let path = host.directory().join("var").join(file);
    let whole = fs::read(&path).unwrap();
    let mut bytes = whole.clone();
    damage(&mut bytes);
    assert_ne!(bytes, whole);
    fs::write(&path, &bytes).unwrap();
    let logged = fs::metadata(host.log_path()).unwrap().len();
    host.start_service().unwrap();
    let said = eventually("a refusal in the log", || {
        let log = fs::read(host.log_path()).unwrap();
        let log = String::from_utf8_lossy(&log[usize::try_from(logged).unwrap()..]).into_owned();
        // A line is there when its end is.
        log.split_inclusive('\n')
            .find(|line| line.ends_with('\n') && line.contains("the agent cannot go on"))
            .map(str::to_owned)
    });
    println!("{file}: {said}");
    assert!(said.contains(file), "{said}");
    let advised = ["remove", "restore", "Restore", "move"].iter().any(|word| said.contains(word));
    assert!(advised, "no advice: {said}");
    assert!(cluster.client(node).cluster().is_err(), "it answers");
    assert_eq!(fs::read(&path).unwrap(), bytes, "{file} was changed");
    Damaged { cluster, node, path, whole }
}
