//! Hosts: their own world, their service, and their power.

mod common;

use std::time::Duration;

use common::{AGAIN, DEADLINE, eventually, lab, passes, processes_with, remains, socket};
use holdfast_lab::{HostSpec, Network};
use nix::sys::signal::Signal;

/// A duration for `sleep` that no other test or lab on this machine uses.
fn unique_sleep(n: u32) -> String {
    format!("{}{n:02}", 1_000_000 + std::process::id() % 1_000_000)
}

#[test]
fn a_host_has_a_world_of_its_own() {
    let lab = lab();
    let spec = |name: &str| HostSpec { env: vec![("LAB_TEST".into(), name.into())], ..HostSpec::new(name) };
    let hosts = ["n1", "n2"].map(|name| lab.add_host(spec(name)).expect("host"));
    for host in &hosts {
        host.power_on().expect("power");
        assert!(host.power_on().is_err(), "on already");
    }
    let run = |n: usize, script: &str| {
        let output = hosts[n].exec(&["sh", "-c", script]).expect("exec");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    };
    assert_eq!(run(0, "uname -n; echo $LAB_TEST"), "n1\nn1");
    assert_eq!(run(1, "uname -n"), "n2");

    // The same path, another directory; and a shared one.
    let here = lab.host_directory();
    let shared = lab.shared_directory();
    for n in [0, 1] {
        run(n, &format!("uname -n > {}/etc/name; uname -n >> {}/names", here.display(), shared.display()));
    }
    assert_eq!(run(0, &format!("cat {}/etc/name", here.display())), "n1");
    assert_eq!(std::fs::read_to_string(hosts[1].directory().join("etc/name")).expect("read"), "n2\n");
    assert_eq!(std::fs::read_to_string(shared.join("names")).expect("read"), "n1\nn2\n");
    assert!(!here.join("etc").exists(), "nobody else sees it");

    // Its own processes, /run and interfaces.
    assert_eq!(run(0, "ls -A /run | wc -l"), "0");
    assert_eq!(run(0, "tr '\\0' '\\n' < /proc/1/cmdline | head -n 2 | tail -n 1"), "host");
    let links = run(0, "ls /sys/class/net");
    for network in Network::ALL {
        assert!(links.contains(network.interface()), "{links}");
    }
    assert!(run(0, "ip -4 -o addr show dev prod0").is_empty(), "the uplink has no address");
    assert!(run(0, "ip -4 -o addr show dev stor0").contains("10.77.4.11/24"));

    let missing = hosts[0].exec(&["/no/such/program"]).expect_err("no such program");
    assert!(format!("{missing:#}").contains("/no/such/program"), "{missing:#}");
    let failed = hosts[0].exec(&["sh", "-c", "echo oops >&2; exit 3"]).expect("exec");
    assert_eq!((failed.status.code(), failed.stderr.as_slice()), (Some(3), &b"oops\n"[..]));
    let slow = hosts[0].exec_within(&["sleep", "1000"], Duration::from_millis(50));
    assert!(slow.is_err());
    eventually("the slow command was killed", || hosts[0].pids(&["sleep"]).is_empty());
}

#[test]
fn the_init_restarts_a_dead_service_and_reaps_orphans() {
    let lab = lab();
    let sleep = unique_sleep(1);
    let script = format!("echo begun; exec sleep {sleep}");
    let spec = HostSpec::new("n1").service(["sh", "-c", script.as_str()]);
    let host = lab.add_host(spec).expect("host");
    host.power_on().expect("power");
    host.wait_service(DEADLINE, |service| service.pid.is_some()).expect("started");
    // The shell's own command line names the sleep, too: what it says comes first.
    let log_is = |text: &str| std::fs::read_to_string(host.log_path()).is_ok_and(|log| log == text);
    eventually("the first life began", || log_is("begun\n"));
    let first = host.pids(&["sleep", &sleep])[0];

    host.kill(first, Signal::SIGKILL).expect("kill");
    let dead = host.wait_service(DEADLINE, |s| s.last_exit.is_some()).expect("died");
    let at = std::time::Instant::now();
    assert_eq!(dead.last_exit.as_deref(), Some("signal SIGKILL"));
    let again = host.wait_service(DEADLINE, |s| s.starts == 2 && s.pid.is_some()).expect("again");
    println!("restarted {:?} after its death", at.elapsed());
    assert!(at.elapsed() >= Duration::from_millis(80), "not at once");
    assert_eq!(again.starts, 2);
    eventually("the log has both lives", || log_is("begun\nbegun\n"));

    // An orphan becomes the init's child and leaves no zombie.
    host.exec(&["sh", "-c", "setsid sh -c 'sleep 0.05' > /dev/null 2>&1 &"]).expect("exec");
    eventually("init, service", || host.processes().len() == 2);
    assert!(host.processes().iter().all(|process| process.is_alive()));

    host.stop_service().expect("stop");
    assert!(host.pids(&["sleep", &sleep]).is_empty());
    assert_eq!(host.service_event().expect("event").last_exit.as_deref(), Some("signal SIGTERM"));
    host.start_service().expect("start");
    host.wait_service(DEADLINE, |service| service.starts == 3).expect("third life");
    assert!(host.kill(std::process::id() as i32, Signal::SIGTERM).is_err(), "not one of its own");
}

#[test]
fn a_power_cut_kills_everything_at_once_and_the_disk_stays() {
    let lab = lab();
    let sleep = unique_sleep(2);
    let host = lab.add_host(HostSpec::new("n1").service(["sleep", &sleep])).expect("host");
    let other = lab.add_host(HostSpec::new("n2")).expect("host");
    assert!(host.power_off().is_err(), "it has no power");
    other.power_on().expect("power");
    for round in 0..3 {
        host.power_on().expect("power");
        let near = socket(&other.namespace(), other.address(Network::Heartbeat).expect("address"));
        let far = socket(&host.namespace(), host.address(Network::Heartbeat).expect("address"));
        eventually("they talk", || passes(&near, &far, AGAIN));
        // The network's state of an earlier life is gone with it.
        host.exec(&["ip", "link", "add", "br0", "type", "bridge"]).expect("bridge");
        // Daemons that ignore every signal they can, in sessions of their own.
        let daemon = format!(
            "trap '' TERM HUP INT; setsid sh -c \"trap '' TERM HUP INT; sleep {sleep} & sleep {sleep} & wait\" > /dev/null 2>&1 &"
        );
        host.exec(&["sh", "-c", &daemon]).expect("daemons");
        let held = host.spawn(&["sleep", &sleep]).expect("spawn");
        let disk = lab.host_directory();
        host.exec(&["sh", "-c", &format!("echo {round} >> {0}/var/kept; echo x > {0}/run/lost", disk.display())])
            .expect("write");
        eventually("all of them run", || host.pids(&[&sleep]).len() == 5);

        let cut = host.power_off().expect("cut");
        println!(
            "cables dark after {:?}, killed after {:?}, dead after {:?}",
            cut.dark - cut.at,
            cut.killed - cut.at,
            cut.dead - cut.at
        );
        assert!(processes_with(&sleep).is_empty());
        assert!(!host.is_on() && host.processes().is_empty());
        assert!(host.exec(&["true"]).is_err());
        drop(held);
        assert!(!std::path::Path::new("/run/netns").join(host.namespace()).exists());
    }
    assert_eq!(std::fs::read_to_string(host.directory().join("var/kept")).expect("read"), "0\n1\n2\n");
    host.power_on().expect("power");
    assert!(!host.directory().join("run/lost").exists());
}

#[test]
fn a_shutdown_stops_the_service_in_order() {
    let lab = lab();
    let done = lab.shared_directory().join("done");
    let script = format!(
        "trap 'sleep 0.2; echo stopped > {}; exit 0' TERM; echo ready; while :; do sleep 0.01; done",
        done.display()
    );
    let host = lab.add_host(HostSpec::new("n1").service(["sh", "-c", &script])).expect("host");
    host.power_on().expect("power");
    eventually("the trap is set", || std::fs::read_to_string(host.log_path()).is_ok_and(|log| log.contains("ready")));
    let took = host.shutdown().expect("shutdown");
    assert_eq!(std::fs::read_to_string(done).expect("the trap ran"), "stopped\n");
    assert!(took >= Duration::from_millis(200) && took < Duration::from_secs(10), "{took:?}");
    assert!(!host.is_on());
    host.power_on().expect("and on again");
}

#[test]
fn pulled_cables_stay_pulled_through_a_power_cycle() {
    let lab = lab();
    let hosts = ["n1", "n2"].map(|name| lab.add_host(HostSpec::new(name)).expect("host"));
    lab.fabric().pull("n1", Network::Storage).expect("pull a cable of a dark host");
    hosts.iter().for_each(|host| host.power_on().expect("power"));
    let ends = |network: Network| {
        hosts.each_ref().map(|host| socket(&host.namespace(), host.address(network).expect("address")))
    };
    let [a, b] = ends(Network::Heartbeat);
    eventually("plugged in", || passes(&a, &b, AGAIN));
    let [a, b] = ends(Network::Storage);
    assert!(!passes(&a, &b, Duration::from_millis(150)));
    lab.fabric().plug("n1", Network::Storage).expect("plug");
    eventually("plugged in", || passes(&a, &b, Duration::from_millis(50)));
}

#[test]
fn nothing_is_left_after_the_end_and_two_labs_do_not_meet() {
    let sleep = unique_sleep(3);
    let labs = [lab(), lab()];
    assert_ne!(labs[0].tag(), labs[1].tag());
    let mut kept = Vec::new();
    for lab in &labs {
        let host = lab.add_host(HostSpec::new("n1").service(["sleep", &sleep])).expect("host");
        host.power_on().expect("power");
        host.wait_service(DEADLINE, |service| service.pid.is_some()).expect("service");
        kept.push(host);
    }
    eventually("both services run", || processes_with(&sleep).len() >= 2);
    for lab in labs {
        let (tag, directory) = (lab.tag().to_owned(), lab.directory().to_owned());
        assert_eq!(remains(&tag, &directory).len(), 5, "three namespaces, a directory, an entry");
        drop(lab);
        assert_eq!(remains(&tag, &directory), Vec::<String>::new());
    }
    assert!(processes_with(&sleep).is_empty());
    assert!(kept[0].power_on().is_err(), "its lab is gone");
}
