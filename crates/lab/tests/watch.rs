//! The split-brain watch against real QEMU processes that run nothing.

mod common;

use std::io::Write;
use std::time::{Duration, Instant};

use common::{DEADLINE, eventually, lab};
use holdfast_lab::{Host, HostProcess, HostSpec, Overlap, SplitBrainWatch};
use nix::sys::signal::Signal;

fn qemu(host: &Host, vm: &str, more: &[&str]) -> HostProcess {
    let mut argv = vec!["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-S"];
    argv.extend(["-uuid", vm]);
    argv.extend(more);
    host.spawn(&argv).expect("QEMU")
}

fn kill(mut qemu: HostProcess) -> Instant {
    qemu.signal(Signal::SIGKILL).expect("kill");
    let killed = Instant::now();
    qemu.wait(DEADLINE).expect("dead");
    killed
}

/// A UUID of this process and `n`.
fn uuid(n: u32) -> String {
    format!("{:08X}-0000-4000-8000-{n:012x}", std::process::id())
}

#[test]
fn two_owners_are_seen_and_a_migration_is_none() {
    let lab = lab();
    let [n1, n2] = ["n1", "n2"].map(|name| lab.add_host(HostSpec::new(name)).expect("host"));
    n1.power_on().expect("power");
    n2.power_on().expect("power");
    let (vm, broken) = (uuid(1), uuid(2));
    let watch = SplitBrainWatch::start(lab.host_names()).expect("watch");

    // Started, then migrated from n1 to n2, then killed and started again on n1.
    let begun = Instant::now();
    let source = qemu(&n1, &vm, &[]);
    let seen = watch.wait_started(&vm, begun, DEADLINE).expect("seen");
    println!("seen {:?} after the start of the call that started it", seen.first_seen - begun);
    assert_eq!((seen.host.as_deref(), seen.pid, seen.incoming), (Some("n1"), source.pid(), false));
    let target = qemu(&n2, &vm, &["-incoming", "defer"]);
    let target_seen = watch.wait_started(&vm, seen.first_seen, DEADLINE).expect("seen");
    assert_eq!((target_seen.host.as_deref(), target_seen.running_since), (Some("n2"), None));
    let killed = kill(source);
    let took_over =
        watch.wait_for(DEADLINE, |s| s.pid == target.pid() && s.running_since.is_some()).expect("taken over");
    println!("end seen {:?} after the kill", took_over.running_since.expect("instant") - killed);
    kill(target);
    watch.wait_for(DEADLINE, |s| s.pid == target_seen.pid && s.gone.is_some()).expect("gone");
    let again = qemu(&n1, &vm, &[]);
    watch.wait_started(&vm, target_seen.first_seen, DEADLINE).expect("seen");
    assert_eq!(overlaps_of(&watch, &[&vm]), []);

    // A target that has taken over is an owner like any other.
    let second = qemu(&n2, &vm, &[]);
    watch.wait_for(DEADLINE, |s| s.pid == second.pid()).expect("seen");
    let overlaps = overlaps_of(&watch, &[&vm]);
    assert_eq!(overlaps.len(), 1);
    let (older, newer) = (&overlaps[0].older, &overlaps[0].newer);
    assert_eq!((older.pid, newer.pid), (again.pid(), second.pid()));
    assert_eq!((older.host.as_deref(), newer.host.as_deref()), (Some("n1"), Some("n2")));
    assert_eq!(newer.vm, vm.to_ascii_lowercase());

    let alone = qemu(&n1, &broken, &["-incoming", "defer"]);
    let promoted = watch.wait_for(DEADLINE, |s| s.pid == alone.pid()).expect("seen");
    assert!(promoted.running_since.is_some(), "it is alone");
    let rival = qemu(&n2, &broken, &[]);
    watch.wait_for(DEADLINE, |s| s.pid == rival.pid()).expect("seen");
    assert_eq!(overlaps_of(&watch, &[&vm, &broken]).len(), 2);
    assert_eq!(watch.timeline().iter().filter(|s| s.vm == vm.to_ascii_lowercase()).count(), 4);
}

#[test]
fn a_source_that_sent_its_guest_is_no_owner_unless_the_guest_runs_on() {
    let lab = lab();
    let host = lab.add_host(HostSpec::new("n1")).expect("host");
    host.power_on().expect("power");
    let vm = uuid(5);
    let watch = SplitBrainWatch::start(lab.host_names()).expect("watch");
    let monitor = host.directory().join("run/qmp");
    let argv = ["qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none"];
    let listens = format!("unix:{},server=on,wait=off", monitor.display());
    let more = ["-name", "source,debug-threads=on", "-S", "-uuid", &vm, "-qmp", &listens];
    // A guest that stands still, as one that was sent away does.
    let source = host.spawn(&argv.into_iter().chain(more).collect::<Vec<_>>()).expect("QEMU");
    watch.wait_for(DEADLINE, |s| s.pid == source.pid()).expect("seen");
    let processor = || std::fs::read_dir(format!("/proc/{}/task", source.pid())).into_iter().flatten().flatten();
    let named = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    eventually("it has a processor", || processor().map(named).any(|name| name.starts_with("CPU ")));
    eventually("its monitor listens", || monitor.exists());
    let target = qemu(&host, &vm, &["-incoming", "defer"]);
    watch.wait_for(DEADLINE, |s| s.pid == target.pid()).expect("seen");
    kill(target);
    watch.wait_for(DEADLINE, |s| s.incoming && s.vm == vm.to_ascii_lowercase() && s.gone.is_some()).expect("gone");
    let successor = qemu(&host, &vm, &[]);
    watch.wait_for(DEADLINE, |s| s.pid == successor.pid()).expect("seen");
    assert_eq!(overlaps_of(&watch, &[&vm]), []);

    let mut monitor = std::os::unix::net::UnixStream::connect(&monitor).expect("the monitor");
    monitor.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"cont\"}").expect("told");
    eventually("that it runs on is seen", || overlaps_of(&watch, &[&vm]).len() == 1);
    assert_eq!(overlaps_of(&watch, &[&vm])[0].older.pid, source.pid());
}

#[test]
fn the_caller_can_excuse_an_overlap() {
    let lab = lab();
    let host = lab.add_host(HostSpec::new("n1")).expect("host");
    host.power_on().expect("power");
    let vm = uuid(3);
    let excused = vm.to_ascii_lowercase();
    let watch =
        SplitBrainWatch::start_with(lab.host_names(), move |overlap| overlap.newer.vm == excused).expect("watch");
    let both = [qemu(&host, &vm, &[]), qemu(&host, &vm, &[])];
    for qemu in &both {
        watch.wait_for(DEADLINE, |s| s.pid == qemu.pid()).expect("seen");
    }
    assert_eq!(overlaps_of(&watch, &[&vm]), []);
}

#[test]
fn a_quick_succession_is_no_overlap_and_the_watch_is_cheap() {
    let lab = lab();
    let host = lab.add_host(HostSpec::new("n1")).expect("host");
    host.power_on().expect("power");
    let vm = uuid(4);
    let watch = SplitBrainWatch::start(lab.host_names()).expect("watch");
    let begun = Instant::now();
    for _ in 0..20 {
        let begun = Instant::now();
        let qemu = qemu(&host, &vm, &[]);
        watch.wait_started(&vm, begun, DEADLINE).expect("seen");
        kill(qemu);
    }
    assert_eq!(overlaps_of(&watch, &[&vm]), []);
    let share = thread_time("split-brain wat").as_secs_f64() / begun.elapsed().as_secs_f64();
    println!("the watch used {:.1} % of a core", share * 100.0);
    assert!(share < 0.5, "the watch used {:.0} % of a core", share * 100.0);
}

/// What the watch saw of these VMs: it also sees those of the tests beside this one.
fn overlaps_of(watch: &SplitBrainWatch, vms: &[&str]) -> Vec<Overlap> {
    let mut overlaps = watch.overlaps().expect("watch");
    overlaps.retain(|overlap| vms.iter().any(|vm| overlap.newer.vm.eq_ignore_ascii_case(vm)));
    overlaps
}

/// The processor time of this process's thread called `name`.
fn thread_time(name: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("tasks");
    for task in tasks.flatten().map(|task| task.path()) {
        let comm = std::fs::read_to_string(task.join("comm")).unwrap_or_default();
        if comm.trim() == name {
            let line = std::fs::read_to_string(task.join("schedstat")).expect("schedstat");
            let ns = line.split_whitespace().next().and_then(|ns| ns.parse().ok());
            return Duration::from_nanos(ns.expect("a number"));
        }
    }
    panic!("there is no thread {name}");
}
