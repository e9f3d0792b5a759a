//! The disk under a node's log is full: the cluster goes on without that node's
//! vote, nothing acknowledged is lost, and the node recovers when there is room.

use holdfast_api::{AddSwitch, SwitchKind, SwitchView};
use holdfast_lab::Host;
use holdfast_lab::cluster::Cluster;

use crate::bench::{DEADLINE, spec, turn};

fn add(cluster: &Cluster, name: &str) -> String {
    let request = AddSwitch { name: name.into(), kind: SwitchKind::Private, uplink: None };
    // A coordinator that cannot write gives way; whoever follows answers.
    cluster
        .wait(&format!("switch {name} added"), DEADLINE, |client| match client.add_switch(&request) {
            Ok(view) => Some(view.name),
            Err(error) if error.code() == "already_exists" => Some(name.to_owned()),
            Err(error) => {
                println!("{name}: {error}");
                None
            }
        })
        .unwrap()
}

/// Runs a command on a host; its error output.
fn on(host: &Host, argv: &[&str]) -> Result<(), String> {
    let output = host.exec(argv).unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn a_full_disk_under_the_log_costs_one_vote_and_nothing_else() {
    let _turn = turn();
    let mut cluster = Cluster::build(spec()).unwrap();
    cluster.power_on_all().unwrap();
    let state = cluster.lab().host_directory().join("var");
    let state = state.to_str().unwrap().to_owned();
    // Nodes with small disks: the one that will be the coordinator, and another.
    let small = ["n1", "n3"].map(|name| cluster.host(name).unwrap());
    for host in &small {
        host.stop_service().unwrap();
        on(host, &["mount", "-t", "tmpfs", "-o", "size=8m", "none", &state]).unwrap();
        host.start_service().unwrap();
    }
    for host in &small {
        cluster.wait_api(host.name(), DEADLINE).unwrap();
    }
    cluster.assemble().unwrap();
    assert_eq!(cluster.coordinator().unwrap(), "n1");

    let filler = format!("{state}/filler");
    let mut added = Vec::new();
    for host in small.iter().rev() {
        let name = host.name();
        let why = on(host, &["dd", "if=/dev/zero", &format!("of={filler}"), "bs=4k"]).unwrap_err();
        assert!(why.contains("No space left"), "{why}");
        added.extend((0..20).map(|n| add(&cluster, &format!("{name}-{n}"))));
        let warned = cluster
            .wait_on(name, "a warning", DEADLINE, |client| {
                client.cluster().ok()?.warnings.into_iter().find(|text| text.contains("space"))
            })
            .unwrap();
        println!("{name}: {warned}");
        on(host, &["rm", &filler]).unwrap();
        added.push(add(&cluster, &format!("{name}-after")));
        cluster.wait_ready(DEADLINE).unwrap();
    }
    for host in cluster.hosts() {
        cluster
            .wait_on(host.name(), "all switches", DEADLINE, |client| {
                let switches: Vec<SwitchView> = client.get("/api/v1/switches").ok()?;
                added.iter().all(|name| switches.iter().any(|switch| switch.name == *name)).then_some(())
            })
            .unwrap();
    }
}
