//! Power fencing: a host whose power is shown to be off is not waited for any
//! longer; a fence agent that hangs is not waited for either.

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use holdfast_api::{NodeState, SetFencing, Severity};
use holdfast_lab::Host;
use holdfast_lab::cluster::{Cluster, VmTemplate};
use nix::sys::stat::Mode;

use crate::bench::{DEADLINE, bring, elsewhere, eventually, refused, three_nodes};

/// What a machine's management board does for it: whoever writes to its pipe has
/// the host's power cut, really, and reads when that is done.
struct Board {
    directory: PathBuf,
    serving: Option<JoinHandle<()>>,
}

impl Board {
    fn install(cluster: &Cluster, host: Arc<Host>) -> Board {
        let directory = cluster.fence_agents_dir().join(host.name());
        fs::create_dir_all(&directory).unwrap();
        for pipe in ["ask", "answer"] {
            nix::unistd::mkfifo(&directory.join(pipe), Mode::S_IRWXU).unwrap();
        }
        fs::write(directory.join("power"), "on").unwrap();
        let script = "
            case $action in
                monitor) exit 0 ;;
                off) echo off > $board/ask && read -r answer < $board/answer && [ \"$answer\" = off ] ;;
                status) if [ \"$(cat $board/power)\" = on ]; then exit 0; else exit 2; fi ;;
            esac";
        agent(cluster, "fence_board", script);
        let serving = std::thread::spawn({
            let directory = directory.clone();
            move || {
                loop {
                    let mut asked = String::new();
                    let mut pipe = fs::File::open(directory.join("ask")).unwrap();
                    pipe.read_to_string(&mut asked).unwrap();
                    if asked != "off\n" {
                        return;
                    }
                    host.power_off().unwrap();
                    fs::write(directory.join("power"), "off").unwrap();
                    let mut answer = OpenOptions::new().write(true).open(directory.join("answer")).unwrap();
                    answer.write_all(b"off\n").unwrap();
                }
            }
        });
        Board { directory, serving: Some(serving) }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        // Only one that still listens can be told.
        if self.serving.as_ref().is_some_and(|serving| !serving.is_finished()) {
            let _ = fs::write(self.directory.join("ask"), "end");
        }
        let _ = self.serving.take().map(JoinHandle::join);
    }
}

/// Makes a fence agent that every host finds. It knows `$action` and `$board`, the
/// directory of the host that its option `plug` names.
fn agent(cluster: &Cluster, name: &str, script: &str) {
    let directory = cluster.fence_agents_dir();
    fs::create_dir_all(&directory).unwrap();
    let program = directory.join(name);
    let text = format!(
        "#!/bin/sh\nwhile IFS='=' read -r key value; do case $key in action) action=$value ;; plug) plug=$value ;; esac; done\nboard={}/$plug\n{script}\n",
        directory.display()
    );
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
}

fn plug(agent: &str, node: &str) -> SetFencing {
    SetFencing {
        agent: agent.into(),
        options: [("plug".to_owned(), node.to_owned())].into(),
        secrets: [("password".to_owned(), "open-sesame".to_owned())].into(),
    }
}

fn others<'a>(cluster: &'a Cluster, names: &'a [String], node: &str) -> Vec<&'a str> {
    assert_eq!(cluster.hosts().len(), names.len());
    names.iter().map(String::as_str).filter(|name| *name != node).collect()
}

#[test]
fn a_power_cut_that_is_confirmed_makes_the_failover_earlier() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    let node = cluster.followers().unwrap().remove(0);
    bring(&cluster, "web", &node);
    let client = cluster.any().unwrap();

    let (code, _) = refused(client.test_fencing(&node));
    assert_eq!(code, "conflict");
    let _board = Board::install(&cluster, cluster.host(&node).unwrap());
    let view = client.set_fencing(&node, &plug("fence_board", &node)).unwrap();
    assert_eq!((view.secrets.as_slice(), view.test), (&["password".to_owned()][..], None));
    // Any node can be asked; it is never tried from the host itself.
    for asked in cluster.hosts() {
        let test = cluster.client(asked.name()).test_fencing(&node).unwrap();
        assert!(test.passed && test.from != node, "{test:?}");
    }
    assert!(cluster.host(&node).unwrap().is_on(), "a test switches nothing");
    let shown = cluster.any().unwrap().nodes().unwrap();
    let shown = shown.iter().find(|shown| shown.name == node).unwrap();
    assert!(shown.fencing.contains("fence_board (its last test passed)"), "{}", shown.fencing);
    assert!(!serde_json::to_string(&shown).unwrap().contains("sesame"));

    // It lives, and nobody hears it: its lease would be waited for.
    let since = cluster.last_event().unwrap();
    let names: Vec<_> = cluster.hosts().iter().map(|host| host.name().to_owned()).collect();
    let cut = Instant::now();
    cluster.lab().fabric().partition(&[&node], &others(&cluster, &names, &node)).unwrap();
    let subject = format!("node {node}");
    let lost = |event: &holdfast_api::Event| event.subject == subject && event.text.contains("is lost");
    let (told, at) = cluster.wait_event(since, DEADLINE, lost).unwrap();
    assert!(told.text.contains("fence_board"), "the lease ended before the fence was confirmed: {}", told.text);
    let started = cluster.watch().wait_started(&vm.id, cut, DEADLINE).unwrap();
    println!(
        "silent from 0, lost by its power after {:?}, QEMU elsewhere after {:?} (by its lease alone: 1.65 s)",
        at - cut,
        started.first_seen - cut
    );
    assert!(!cluster.host(&node).unwrap().is_on());
    cluster.wait_vm("web", DEADLINE, elsewhere(&node)).unwrap();
    let causes = cluster.any().unwrap().explain("web").unwrap().causes;
    assert!(causes.iter().any(|cause| cause.text.contains("fence_board")), "{causes:?}");

    cluster.lab().fabric().heal().unwrap();
    fs::write(cluster.fence_agents_dir().join(&node).join("power"), "on").unwrap();
    cluster.power_on_all().unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    let logs = cluster.hosts().iter().map(|host| fs::read_to_string(host.log_path()).unwrap()).collect::<String>();
    assert!(!logs.contains("sesame"), "a secret stands in a log");

    // By hand, on a host that is well.
    bring(&cluster, "web", &node);
    let since = cluster.last_event().unwrap();
    cluster.any().unwrap().fence(&node).unwrap();
    let (told, _) = cluster.wait_event(since, DEADLINE, lost).unwrap();
    assert!(told.text.contains("fence_board"), "{}", told.text);
    cluster.wait_vm("web", DEADLINE, elsewhere(&node)).unwrap();
    vm.wait_answer(DEADLINE).unwrap();
    cluster.assert_clean(&[(&vm, &writer.stop().unwrap().acknowledged)]).unwrap();
}

#[test]
fn a_fence_agent_that_hangs_delays_nothing_and_is_ended_when_the_node_is_back() {
    let (cluster, _turn) = three_nodes();
    let vm = cluster.create_vm(&VmTemplate::new("web", 101)).unwrap();
    let writer = vm.writer(Duration::from_millis(10)).unwrap();
    let node = cluster.followers().unwrap().remove(0);
    bring(&cluster, "web", &node);
    let client = cluster.any().unwrap();
    // Its device answers questions and never gets anything done.
    let script = "[ $action = off ] || exit 0
        echo $$ > $board/began
        exec sleep 100000";
    agent(&cluster, "fence_stuck", script);
    let board = cluster.fence_agents_dir().join(&node);
    fs::create_dir_all(&board).unwrap();
    client.set_fencing(&node, &plug("fence_stuck", &node)).unwrap();

    let since = cluster.last_event().unwrap();
    let names: Vec<_> = cluster.hosts().iter().map(|host| host.name().to_owned()).collect();
    let cut = Instant::now();
    cluster.lab().fabric().partition(&[&node], &others(&cluster, &names, &node)).unwrap();
    let subject = format!("node {node}");
    let about = |event: &holdfast_api::Event, text: &str| event.subject == subject && event.text.contains(text);
    let (told, at) = cluster.wait_event(since, DEADLINE, |event| about(event, "is lost")).unwrap();
    assert!(told.text.contains("lease"), "{}", told.text);
    let started = cluster.watch().wait_started(&vm.id, cut, DEADLINE).unwrap();
    println!("lost by its lease after {:?}, QEMU elsewhere after {:?}", at - cut, started.first_seen - cut);
    assert!(board.join("began").exists(), "the fence agent hung through all this");
    let hanging = |cluster: &Cluster| {
        let words = ["sleep", "100000"];
        cluster.hosts().iter().map(|host| host.pids(&words).len()).sum::<usize>()
    };
    assert_eq!(hanging(&cluster), 1);
    assert!(cluster.host(&node).unwrap().is_on());

    cluster.lab().fabric().heal().unwrap();
    let (told, _) = cluster.wait_event(since, DEADLINE, |event| about(event, "not shown to be off")).unwrap();
    assert_eq!(told.severity, Severity::Warning);
    assert!(told.text.contains("heard again"), "{}", told.text);
    eventually("the hanging fence agent to be gone", || (hanging(&cluster) == 0).then_some(()));
    cluster.wait_node(&node, DEADLINE, |node| node.state == NodeState::Up).unwrap();
    cluster.wait_ready(DEADLINE).unwrap();
    vm.wait_answer(DEADLINE).unwrap();
    cluster.assert_clean(&[(&vm, &writer.stop().unwrap().acknowledged)]).unwrap();
}
