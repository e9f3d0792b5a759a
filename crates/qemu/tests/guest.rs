//! Real QEMUs: starting, watching, ending.

mod common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use common::{Guest, Process, SOON, disk, nic, qemu, spec, until, vm_id, within};
use holdfast_core::{DiskFormat, Epoch};
use holdfast_qemu::{Binary, DiskAt, Event, Exit, ExitReason, Identity, Launch, QemuError, Qmp, RunState};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

async fn expect(events: &mut tokio::sync::broadcast::Receiver<Event>, wanted: impl Fn(&Event) -> bool) {
    within("an event", async { while !wanted(&events.recv().await.expect("an event")) {} }).await;
}

#[tokio::test]
async fn the_installed_qemu_describes_itself() {
    let binary = Binary::probe(&qemu()).await.expect("a QEMU");
    assert!(binary.version >= (7, 2, 0));
    assert!(binary.machine().starts_with("pc-q35-"));
    assert!(binary.machines.contains(&"pc-q35-7.2".to_owned()));
    assert_eq!(binary.no_kvm.is_none(), binary.accelerator == holdfast_core::Accelerator::Kvm);
}

#[tokio::test]
async fn what_is_no_qemu_is_called_so() {
    let missing = Binary::probe(Path::new("/nonexistent/qemu")).await;
    let text = missing.expect_err("missing").to_string();
    assert!(text.contains("install the package qemu-system-x86"), "{text}");
    let odd = Binary::probe(Path::new("/bin/echo")).await;
    assert!(matches!(odd, Err(QemuError::Odd { .. })));
}

#[tokio::test]
async fn a_life() {
    let mut guest = Guest::start(&spec(), |launch| launch.paused = true).await;
    let qmp = &guest.qmp;
    let mut events = qmp.events();
    let adopted = qmp.identity().await.expect("an identity");
    assert_eq!(adopted, Identity { vm: vm_id(), epoch: Some(Epoch(7)) });
    let status = qmp.query_status().await.expect("a status");
    assert_eq!(status.state, RunState::Prelaunch);

    qmp.resume().await.expect("running");
    expect(&mut events, |event| *event == Event::Resume).await;
    qmp.pause().await.expect("paused");
    expect(&mut events, |event| matches!(event, Event::Stop(_))).await;
    let status = qmp.query_status().await.expect("a status");
    assert_eq!(status.state, RunState::Paused);
    qmp.resume().await.expect("running");
    qmp.resume().await.expect("still running");
    qmp.reset().await.expect("reset");
    expect(&mut events, |event| *event == Event::Reset { guest: false }).await;
    qmp.powerdown().await.expect("asked");
    expect(&mut events, |event| *event == Event::Powerdown).await;

    // The second monitor serves a second client.
    let rescue = Launch::rescue_socket(guest.process.run_dir.path());
    let rescue = Qmp::connect(&rescue, SOON).await.expect("the rescue monitor");
    assert!(rescue.query_status().await.expect("a status").running);

    qmp.quit().await.expect("asked to end");
    let status = guest.process.ended().await;
    assert_eq!(status.code(), Some(0), "{}", guest.process.stderr());
    expect(&mut events, |event| *event == Event::Closed).await;
    assert!(guest.qmp.query_status().await.expect_err("gone").is_gone());
}

#[tokio::test]
async fn an_agent_that_was_away_meets_the_same_guest_again() {
    let guest = Guest::start(&spec(), |_| {}).await;
    let socket = guest.qmp.socket().to_owned();
    drop(guest.qmp);
    let again = Qmp::connect(&socket, SOON).await.expect("adopted");
    assert!(again.query_status().await.expect("a status").running);
}

#[tokio::test]
async fn killed() {
    let mut guest = Guest::start(&spec(), |_| {}).await;
    let mut events = guest.qmp.events();
    guest.process.kill();
    expect(&mut events, |event| *event == Event::Closed).await;
    assert!(guest.qmp.query_status().await.expect_err("gone").is_gone());
}

#[tokio::test]
async fn the_console_is_logged_and_readable() {
    let guest = Guest::start(&spec(), |launch| launch.paused = true).await;
    let run_dir = guest.process.run_dir.path();
    let console = Launch::console_socket(run_dir);
    let mut stream = tokio::net::UnixStream::connect(&console).await.expect("the console");
    guest.qmp.resume().await.expect("running");
    let mut seen = Vec::new();
    within("the firmware's greeting", async {
        while !String::from_utf8_lossy(&seen).contains("SeaBIOS") {
            assert_ne!(stream.read_buf(&mut seen).await.expect("output"), 0);
        }
    })
    .await;
    let log = Launch::console_log(run_dir);
    until("the log", async || {
        let log = std::fs::read(&log).ok()?;
        String::from_utf8_lossy(&log).contains("SeaBIOS").then_some(())
    })
    .await;
}

/// A whole machine: disks of both formats and adapters. In a network namespace
/// of its own, in which QEMU makes the taps itself.
#[tokio::test]
async fn disks_and_adapters() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let file = common::boot_disk(directory.path(), &[0xf4]);
    let mut spec = spec();
    spec.cpus = 2;
    spec.disks = vec![disk(DiskFormat::Raw)];
    spec.nics = vec![nic(1), nic(2)];
    let process = Process::start_under(&["unshare", "--net"], &spec, |launch| {
        launch.disks = vec![DiskAt::File(file.clone())];
        launch.taps = vec!["hfq0".into(), "hfq1".into()];
    });
    let socket = Launch::monitor_socket(process.run_dir.path());
    let qmp = match Qmp::connect(&socket, SOON).await {
        Ok(qmp) => qmp,
        Err(error) => panic!("{error}; QEMU said: {}", process.stderr()),
    };
    let stats = qmp.block_stats().await.expect("statistics");
    assert_eq!(stats.len(), 1);
    assert_eq!(stats[0].disk, "disk0");
    until("the boot sector to be read", async || {
        let stats = qmp.block_stats().await.expect("statistics");
        (stats[0].reads > 0).then_some(())
    })
    .await;
    qmp.block_resize(0, 2 << 20).await.expect("resized");
    assert_eq!(file.metadata().expect("its size").len(), 2 << 20);
    qmp.announce_self(3, std::time::Duration::from_millis(50)).await.expect("announced");
}

/// What QEMU's last words mean, from QEMU itself.
#[tokio::test]
async fn why_it_did_not_start() {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let file = common::boot_disk(directory.path(), &[0xf4]);
    let mut with_disk = spec();
    with_disk.disks = vec![disk(DiskFormat::Raw)];
    let _holder = Guest::start(&with_disk, |launch| launch.disks = vec![DiskAt::File(file.clone())]).await;

    async fn reason(mut process: Process) -> ExitReason {
        let status = process.ended().await;
        let exit = match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, signal) => Exit::Signal(signal.expect("a signal")),
        };
        ExitReason::find(exit, &process.stderr())
    }
    let second = Process::start(&with_disk, |launch| launch.disks = vec![DiskAt::File(file.clone())]);
    assert_eq!(reason(second).await, ExitReason::ImageLocked { image: Some(file.display().to_string()) });
    let absent = directory.path().join("absent.raw");
    let missing = Process::start(&with_disk, |launch| launch.disks = vec![DiskAt::File(absent.clone())]);
    assert_eq!(reason(missing).await, ExitReason::FileMissing { file: absent.display().to_string() });
    let mut unknown = spec();
    unknown.machine = "pc-q35-99.1".into();
    assert_eq!(reason(Process::start(&unknown, |_| {})).await, ExitReason::MachineUnknown);
    let mut huge = spec();
    huge.memory_bytes = 1 << 47;
    assert_eq!(reason(Process::start(&huge, |_| {})).await, ExitReason::OutOfMemory);
}
