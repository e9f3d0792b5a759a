//! The command line, as a person uses it on a node.

use holdfast_api::{JobState, JobView, VmDefinition, VmState, VmView};
use holdfast_lab::cluster::{Cluster, VmTemplate};

use crate::bench::{DEADLINE, spec, turn};
use crate::shell::Shell;

#[test]
fn a_cluster_is_run_from_the_command_line() {
    let _turn = turn();
    let cluster = Cluster::build(spec()).unwrap();
    cluster.power_on_all().unwrap();
    let on = |host| Shell::on(&cluster, host);
    let n1 = on("n1");

    assert!(n1.fails(&["vm", "list"], 1).contains("cluster"));
    let line = n1.ok(&["cluster", "init", "--name", "lab"]);
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.windows(2).position(|pair| pair == ["node", "join"]).expect("a join line");
    on("n2").ok(&words[at..at + 5]);
    assert!(on("n3").fails(&words[at..at + 5], 1).contains("used"));
    let line: holdfast_api::JoinLine = n1.json(&["node", "token", "--json"]);
    on("n3").ok(&["node", "join", &line.address, "--token", &line.token]);
    n1.fails(&["cluster", "init", "--name", "again"], 1);
    let directory = cluster.on_volume("").display().to_string();
    cluster.wait_node("n3", DEADLINE, |node| node.voter && node.state == holdfast_api::NodeState::Up).unwrap();
    n1.ok(&["volume", "add", "vol1", "--directory", &directory]);
    n1.ok(&["switch", "add", "prod", "--uplink", "prod0"]);
    cluster.wait_ready(DEADLINE).unwrap();
    for words in [["cluster", "status"], ["node", "list"], ["network", "list"], ["volume", "list"], ["job", "list"]] {
        assert!(!n1.ok(&words).trim().is_empty());
        let _: serde_json::Value = n1.json(&[words[0], words[1], "--json"]);
    }

    let guest = &cluster.spec().guest;
    let append = cluster.definition(&VmTemplate::new("web", 101)).boot.unwrap().append;
    let create = [
        "vm",
        "create",
        "web",
        "--cpus",
        "1",
        "--memory",
        "128M",
        "--disk",
        "vol1:64M,format=raw",
        "--nic",
        "prod",
        "--kernel",
        guest.kernel.to_str().unwrap(),
        "--initrd",
        guest.initrd.to_str().unwrap(),
        "--append",
        &append,
        "--priority",
        "high",
        "--start",
    ];
    n1.ok(&create);
    assert!(n1.fails(&create, 1).contains("web"));
    let view: VmView = on("n2").json(&["vm", "show", "web", "--json"]);
    assert!(matches!(view.state, VmState::Running | VmState::Starting), "{view:?}");
    cluster.wait_vm("web", DEADLINE, |vm| vm.state == VmState::Running).unwrap();
    let home = cluster.node_of("web").unwrap();
    let away = if home == "n2" { "n3" } else { "n2" };
    n1.ok(&["vm", "migrate", "web", "--to", away]);
    assert_eq!(cluster.node_of("web").unwrap(), away);
    assert!(n1.ok(&["explain", "vm", "web"]).contains(away));
    n1.ok(&["vm", "pause", "web"]);
    n1.fails(&["vm", "start", "web"], 1);
    n1.ok(&["vm", "resume", "web"]);
    assert!(n1.ok(&["vm", "list"]).contains("web"));
    assert!(n1.ok(&["events"]).contains("web"));

    // What is printed can be created from again.
    let yaml = n1.ok(&["vm", "show", "web", "-o", "yaml"]);
    n1.ok(&["vm", "stop", "web", "--force"]);
    n1.ok(&["vm", "delete", "web"]);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &yaml).unwrap();
    n1.ok(&["vm", "create", "-f", file.path().to_str().unwrap()]);
    assert_eq!(n1.ok(&["vm", "show", "web", "-o", "yaml"]), yaml);
    let definition: VmDefinition = n1.json(&["vm", "show", "web", "-o", "json"]);
    assert_eq!(definition.name, "web");

    let job: JobView = n1.json(&["vm", "start", "web", "--no-wait", "--json"]);
    let job: JobView = n1.json(&["job", "show", &job.id.to_string(), "--follow", "--json"]);
    assert_eq!(job.state, JobState::Done);
    n1.ok(&["vm", "stop", "web", "--force"]);
    n1.ok(&["vm", "delete", "web"]);

    assert!(n1.fails(&["vm", "show", "nobody"], 1).contains("nobody"));
    n1.fails(&["vm", "create", "x", "--disk", "vol1:0"], 1);
    n1.fails(&["vm", "create", "x", "--disk", "vol9:1G"], 1);
    n1.fails(&["vm", "create", "x", "--memory", "much"], 2);
    n1.fails(&["no-such-thing"], 2);
    cluster.host("n3").unwrap().power_off().unwrap();
    assert!(on("n3").fails(&["vm", "list"], 1).contains("agent.sock"));
}
