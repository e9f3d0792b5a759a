//! The command lines, as reviewed: a change here is a change for every guest,
//! and one that a guest can see breaks migrations between versions.

mod common;

use std::path::Path;

use common::{disk, launch, nic, spec};
use holdfast_core::{Accelerator, Allocation, DirectBoot, DiskFormat};
use holdfast_qemu::{DiskAt, Kernel, Launch, QemuError};

/// One option and its value a line.
fn lines(launch: &Launch<'_>) -> String {
    let mut text = String::new();
    for word in launch.argv().expect("a command line") {
        let word = word.into_string().expect("text");
        let option = word.starts_with('-') && !word.contains(' ');
        text.push(if option { '\n' } else { ' ' });
        text.push_str(&word);
    }
    text.trim().to_owned()
}

fn file(path: &str) -> DiskAt {
    DiskAt::File(path.into())
}

#[test]
fn a_disk_that_is_served_waits_for_its_server() {
    let mut spec = spec();
    spec.disks = vec![disk(DiskFormat::Raw)];
    let mut launch = launch(Path::new("/usr/bin/qemu"), &spec, Path::new("/run/vm1"));
    launch.disks = vec![DiskAt::Socket("/run/vm1/disk0.sock".into())];
    let all = lines(&launch);
    let nbd = all.lines().find(|line| line.contains("nbd")).unwrap();
    for part in [r#""path":"/run/vm1/disk0.sock""#, r#""export":"disk""#, r#""reconnect-delay":300"#] {
        assert!(nbd.contains(part), "{nbd}");
    }
    launch.disks = vec![DiskAt::Socket(format!("/{}", "s".repeat(200)).into())];
    assert!(matches!(launch.argv(), Err(QemuError::Unfit { why }) if why.contains("socket")));
}

#[test]
fn from_its_disks() {
    let mut spec = spec();
    spec.cpus = 2;
    spec.disks = vec![disk(DiskFormat::Qcow2), disk(DiskFormat::Raw)];
    spec.nics = vec![nic(1), nic(2)];
    let mut launch = launch(Path::new("/usr/bin/qemu"), &spec, Path::new("/run/vm,1"));
    launch.accelerator = Accelerator::Kvm;
    launch.vhost_net = true;
    launch.disks = vec![file("/vol/a \"b\",c.qcow2"), file("/vol/data.raw")];
    launch.taps = vec!["hf1".into(), "hf2".into()];
    insta::assert_snapshot!(lines(&launch));
}

#[test]
fn a_fully_allocated_disk_does_not_offer_to_discard() {
    let mut spec = spec();
    spec.disks = vec![disk(DiskFormat::Raw); 2];
    spec.disks[1].allocation = Allocation::Full;
    let mut launch = launch(Path::new("/usr/bin/qemu"), &spec, Path::new("/run/vm1"));
    launch.disks = vec![file("/vol/thin.raw"), file("/vol/full.raw")];
    let all = lines(&launch);
    let line = |what: &str| all.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{what}: {all}"));
    assert!(line(r#""node-name":"disk0"}"#).contains(r#""discard":"unmap""#));
    assert!(line(r#""node-name":"disk1"}"#).contains(r#""discard":"ignore""#));
    assert!(!line(r#""drive":"disk0""#).contains("discard"));
    assert!(line(r#""drive":"disk1""#).contains(r#""discard":false"#));
}

#[test]
fn a_kernel_directly() {
    let mut spec = spec();
    spec.direct_boot = Some(DirectBoot {
        volume: "v".into(),
        kernel: "k".into(),
        initrd: Some("i".into()),
        append: "console=ttyS0, quiet".into(),
    });
    let mut launch = launch(Path::new("/usr/bin/qemu"), &spec, Path::new("/run/vm1"));
    launch.kernel = Some(Kernel { kernel: "/vol/vmlinuz".into(), initrd: Some("/vol/initrd,1".into()) });
    insta::assert_snapshot!(lines(&launch));
}

#[test]
fn a_target_is_the_same_machine_that_waits() {
    let spec = spec();
    let source = launch(Path::new("/usr/bin/qemu"), &spec, Path::new("/run/vm1"));
    let mut target = source.clone();
    target.incoming = true;
    let (source, target) = (lines(&source), lines(&target));
    let more: Vec<_> = target.lines().filter(|line| !source.lines().any(|other| other == *line)).collect();
    assert_eq!(more, ["-incoming defer", "-S"]);
    assert_eq!(source.lines().count() + 2, target.lines().count());
}

#[test]
fn what_does_not_fit_is_refused_with_a_reason() {
    let refused = |change: &dyn Fn(&mut holdfast_core::VmSpec, &mut Vec<DiskAt>), run_dir: &str| {
        let (mut spec, mut disks) = (spec(), Vec::new());
        change(&mut spec, &mut disks);
        let mut launch = launch(Path::new("/usr/bin/qemu"), &spec, Path::new(run_dir));
        launch.disks = disks;
        match launch.argv() {
            Err(QemuError::Unfit { why }) => why,
            other => panic!("not refused: {other:?}"),
        }
    };
    assert!(refused(&|spec, _| spec.machine = "q35".into(), "/r").contains("versioned pc-q35"));
    assert!(refused(&|spec, _| spec.machine = "pc-q35-7.2,x=on".into(), "/r").contains("no machine"));
    assert!(refused(&|spec, _| spec.memory_bytes = (64 << 20) + 1, "/r").contains("1 MiB"));
    assert!(refused(&|spec, _| spec.cpus = 0, "/r").contains("no processor"));
    assert!(refused(&|spec, _| spec.disks = vec![disk(DiskFormat::Raw)], "/r").contains("1 disks, and 0 were given"));
    let many = |spec: &mut holdfast_core::VmSpec, disks: &mut Vec<DiskAt>| {
        spec.disks = vec![disk(DiskFormat::Raw); 21];
        *disks = vec![file("/d"); 21];
    };
    assert!(refused(&many, "/r").contains("at most 20"));
    let relative = |spec: &mut holdfast_core::VmSpec, disks: &mut Vec<DiskAt>| {
        spec.disks = vec![disk(DiskFormat::Raw)];
        *disks = vec![file("json:{}")];
    };
    assert!(refused(&relative, "/r").contains("not absolute"));
    let deep = format!("/{}", "x".repeat(110));
    assert!(refused(&|_, _| {}, &deep).contains("shorter run directory"));
}

/// See `ram_bytes`: it decides whether a migration under TCG is a correct one.
#[test]
fn ram_is_whole_except_in_software_on_old_machines() {
    for (machine, accelerator, kib) in [
        ("pc-q35-7.2", Accelerator::Tcg, 65_528),
        ("pc-q35-8.2", Accelerator::Tcg, 65_528),
        ("pc-q35-9.0", Accelerator::Tcg, 65_536),
        ("pc-q35-10.0", Accelerator::Tcg, 65_536),
        ("pc-q35-7.2", Accelerator::Kvm, 65_536),
    ] {
        let mut spec = spec();
        spec.machine = machine.into();
        let mut launch = launch(Path::new("/usr/bin/qemu"), &spec, Path::new("/run/vm1"));
        launch.accelerator = accelerator;
        let lines = lines(&launch);
        assert!(lines.contains(&format!("-m size={kib}K")), "{lines}");
        assert!(lines.contains(&format!("\"size\":{}", kib << 10)), "{lines}");
    }
}
