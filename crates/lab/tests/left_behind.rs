//! A lab whose process is killed leaves nothing behind.

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use common::{DEADLINE, eventually, lab, processes_with, remains};
use holdfast_lab::HostSpec;

const VICTIM: &str = "HOLDFAST_LAB_TEST_VICTIM";

/// Not a test: what `a_killed_lab_...` runs in a process of its own.
#[test]
#[ignore = "is the process that the other test kills"]
fn victim() {
    let Ok(sleep) = std::env::var(VICTIM) else {
        return;
    };
    let lab = lab();
    let host = lab.add_host(HostSpec::new("n1").service(["sleep", &sleep])).expect("host");
    host.power_on().expect("power");
    host.wait_service(DEADLINE, |service| service.pid.is_some()).expect("service");
    host.exec(&["sh", "-c", &format!("setsid sleep {sleep} > /dev/null 2>&1 &")]).expect("exec");
    println!("\nvictim {} {}", lab.tag(), lab.directory().display());
    std::thread::sleep(std::time::Duration::from_secs(600));
}

fn kill_a_lab(signal: nix::sys::signal::Signal, number: u32) {
    let sleep = format!("{}{number:02}", 2_000_000 + std::process::id() % 1_000_000);
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "victim", "--ignored", "--nocapture"])
        .env(VICTIM, &sleep)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the victim");
    let output = BufReader::new(child.stdout.take().expect("its output"));
    let line = output
        .lines()
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("victim ").map(str::to_owned))
        .expect("the victim has built its lab");
    let (tag, directory) = line.split_once(' ').expect("tag and directory");
    let directory = std::path::Path::new(directory);
    eventually("service and daemon run", || processes_with(&format!("{sleep}\0")).len() >= 2);
    assert_eq!(remains(tag, directory).len(), 5);

    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, signal).expect("kill");
    child.wait().expect("wait");
    let killed = std::time::Instant::now();
    eventually("its processes are gone", || processes_with(&format!("{sleep}\0")).is_empty());
    println!("processes gone {:?} after the lab's", killed.elapsed());
    eventually("its namespaces and files are gone", || remains(tag, directory).is_empty());
    println!("everything gone {:?} after the lab's process", killed.elapsed());
    eventually("its guard is gone", || processes_with(&format!("guard\0{tag}\0")).is_empty());
}

#[test]
fn a_killed_lab_leaves_nothing_behind() {
    kill_a_lab(nix::sys::signal::Signal::SIGKILL, 1);
}

#[test]
fn an_interrupted_lab_leaves_nothing_behind() {
    kill_a_lab(nix::sys::signal::Signal::SIGINT, 2);
}
