//! Real migrations between two QEMUs of this host, over loopback.

mod common;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use common::{Guest, boot_disk, disk, spec, until, within};
use holdfast_core::DiskFormat;
use holdfast_qemu::{
    Arrival, Cancelled, DiskAt, MigrationSettings, Outcome, QemuError, Role, RunState, Step, Word, cancel,
    prepare_incoming, progress, start, watch, word,
};
use tempfile::TempDir;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// So slow that nothing ends by itself while a test looks.
fn slow() -> MigrationSettings {
    MigrationSettings { bandwidth_bytes_per_s: Some(64 << 10), ..Default::default() }
}

async fn says(guest: &Guest, role: Role) -> Word {
    word(&guest.qmp, role).await.expect("a word")
}

async fn target(settings: &MigrationSettings) -> (Guest, SocketAddr) {
    let target = Guest::start(&spec(), |launch| launch.incoming = true).await;
    assert_eq!(says(&target, Role::Target).await, Word::Waiting);
    let address = prepare_incoming(&target.qmp, LOOPBACK, settings).await.expect("an address");
    assert_ne!(address.port(), 0);
    (target, address)
}

async fn to_its_end(settings: &MigrationSettings) {
    let source = Guest::start(&spec(), |_| {}).await;
    let (target, address) = target(settings).await;
    // Asking again changes nothing.
    let again = prepare_incoming(&target.qmp, LOOPBACK, settings).await;
    assert_eq!(again.expect("the same address"), address);
    assert_eq!(says(&target, Role::Target).await, Word::Waiting);
    assert_eq!(says(&source, Role::Source).await, Word::Kept);
    // A guest that is not here must not be continued here.
    let arrival = Arrival::expect(&target.qmp);
    for refused in [target.qmp.resume().await, arrival.resume().await] {
        assert!(matches!(refused, Err(QemuError::NotHere { .. })));
    }

    let began = start(&source.qmp, address, settings).await.expect("started");
    assert!(began.is_some());
    assert!(start(&source.qmp, address, settings).await.expect("attached").is_none());
    let mut switchovers = 0;
    let outcome = watch(&source.qmp, settings, began, |step| {
        switchovers += u32::from(step == Step::Switchover);
    });
    let outcome = within("the migration", outcome).await.expect("an outcome");
    let Outcome::Completed { total, downtime } = outcome else {
        panic!("{outcome:?}");
    };
    assert!(downtime <= total);
    assert_eq!(switchovers, 1);
    let figures = progress(&source.qmp).await.expect("figures");
    println!("total {total:?}, downtime {downtime:?}; {:?}, {:?} when asked", figures.total_time(), figures.downtime());

    // The source has decided; the target holds the guest and does not run it.
    assert_eq!(says(&source, Role::Source).await, Word::Sent);
    assert_eq!(says(&target, Role::Target).await, Word::Arrived);
    for refused in [source.qmp.resume().await, source.qmp.reset().await] {
        assert!(matches!(refused, Err(QemuError::NotHere { .. })));
    }
    assert_eq!(cancel(&source.qmp).await.expect("a decision"), Cancelled::TooLate);
    start(&source.qmp, address, settings).await.expect("nothing to do");
    assert_eq!(says(&source, Role::Source).await, Word::Sent);

    arrival.resume().await.expect("running");
    assert_eq!(says(&target, Role::Target).await, Word::Runs);
    arrival.resume().await.expect("runs already");
    // What came can go on: as a source it has kept the guest.
    assert_eq!(says(&target, Role::Source).await, Word::Kept);
}

#[tokio::test]
async fn completes() {
    to_its_end(&MigrationSettings::default()).await;
}

#[tokio::test]
async fn completes_over_several_connections() {
    to_its_end(&MigrationSettings { multifd_channels: Some(2), ..Default::default() }).await;
}

#[tokio::test]
async fn there_and_back_again() {
    let settings = MigrationSettings::default();
    let mut here = Guest::start(&spec(), |_| {}).await;
    let (mut before, mut came) = (None, None);
    for _ in 0..2 {
        let (there, address) = target(&settings).await;
        let arrival = Arrival::expect(&there.qmp);
        start(&here.qmp, address, &settings).await.expect("started");
        let outcome = within("the migration", watch(&here.qmp, &settings, None, |_| {})).await;
        assert!(matches!(outcome, Ok(Outcome::Completed { .. })));
        arrival.resume().await.expect("running");
        (before, here) = (Some((here, came)), there);
        came = Some(arrival);
    }
    assert!(here.qmp.query_status().await.expect("a status").running);
    // The guest came there and went on: a late wish to continue it must not be heard.
    let (_there, came) = before.expect("a source");
    let late = came.expect("an arrival").resume().await;
    assert!(matches!(late, Err(QemuError::NotHere { .. })));
}

#[tokio::test]
async fn cancelled_in_the_middle() {
    let settings = slow();
    let source = Guest::start(&spec(), |_| {}).await;
    let (mut target, address) = target(&settings).await;
    start(&source.qmp, address, &settings).await.expect("started");
    until("RAM to move", async || {
        let progress = progress(&source.qmp).await.expect("progress");
        (progress.ram.transferred_bytes > 0).then_some(())
    })
    .await;
    assert_eq!(says(&source, Role::Source).await, Word::InFlight);
    until("the target to receive", async || (says(&target, Role::Target).await == Word::InFlight).then_some(())).await;
    let watching = source.qmp.clone();
    let watched = tokio::spawn(async move { watch(&watching, &slow(), None, |_| {}).await });
    assert_eq!(cancel(&source.qmp).await.expect("a decision"), Cancelled::Kept);
    let outcome = within("the outcome", watched).await.expect("joined");
    assert_eq!(outcome.expect("an outcome"), Outcome::Cancelled);
    assert_eq!(says(&source, Role::Source).await, Word::Kept);
    assert!(source.qmp.query_status().await.expect("a status").running);
    // A target that was left alone ends, or says that it failed.
    target.process.ended().await;

    // And the guest can move after all.
    let settings = MigrationSettings::default();
    let (_second, address) = self::target(&settings).await;
    start(&source.qmp, address, &settings).await.expect("started");
    let outcome = within("the migration", watch(&source.qmp, &settings, None, |_| {})).await;
    assert!(matches!(outcome, Ok(Outcome::Completed { .. })));
}

#[tokio::test]
async fn a_paused_guest_stays_paused_when_its_migration_fails() {
    let settings = slow();
    let source = Guest::start(&spec(), |_| {}).await;
    source.qmp.pause().await.expect("paused");
    let (mut target, address) = target(&settings).await;
    start(&source.qmp, address, &settings).await.expect("started");
    // While it is on its way nobody continues it.
    assert!(matches!(source.qmp.resume().await, Err(QemuError::NotHere { .. })));
    target.process.kill();
    let outcome = within("the outcome", watch(&source.qmp, &settings, None, |_| {})).await;
    let outcome = outcome.expect("an outcome");
    assert!(
        matches!(&outcome, Outcome::Failed { reason, guest_still_here: true } if !reason.is_empty()),
        "{outcome:?}"
    );
    assert_eq!(says(&source, Role::Source).await, Word::Kept);
    assert!(!source.qmp.query_status().await.expect("a status").running);
    source.qmp.resume().await.expect("running again");
    assert!(source.qmp.query_status().await.expect("a status").running);
}

#[tokio::test]
async fn the_target_is_killed() {
    let settings = slow();
    let source = Guest::start(&spec(), |_| {}).await;
    let (mut target, address) = target(&settings).await;
    start(&source.qmp, address, &settings).await.expect("started");
    target.process.kill();
    let outcome = within("the outcome", watch(&source.qmp, &settings, None, |_| {})).await;
    assert!(matches!(outcome, Ok(Outcome::Failed { guest_still_here: true, .. })));
    let status = source.qmp.query_status().await.expect("a status");
    assert_eq!(status.state, RunState::Running);
}

#[tokio::test]
async fn nobody_listens() {
    let source = Guest::start(&spec(), |_| {}).await;
    let port = {
        let listener = std::net::TcpListener::bind((LOOPBACK, 0)).expect("a port");
        listener.local_addr().expect("its number").port()
    };
    let settings = MigrationSettings::default();
    let started = start(&source.qmp, SocketAddr::new(LOOPBACK, port), &settings).await;
    if started.is_ok() {
        let outcome = within("the outcome", watch(&source.qmp, &settings, None, |_| {})).await;
        assert!(matches!(outcome, Ok(Outcome::Failed { guest_still_here: true, .. })));
    }
    assert_eq!(says(&source, Role::Source).await, Word::Kept);
}

#[tokio::test]
async fn the_source_is_killed_before_the_guest_has_arrived() {
    let settings = slow();
    let mut source = Guest::start(&spec(), |_| {}).await;
    let (mut target, address) = target(&settings).await;
    start(&source.qmp, address, &settings).await.expect("started");
    until("the target to receive", async || (says(&target, Role::Target).await == Word::InFlight).then_some(())).await;
    source.process.kill();
    let outcome = watch(&source.qmp, &settings, None, |_| {}).await;
    assert!(outcome.expect_err("gone").is_gone());
    target.process.ended().await;
}

/// A boot sector that writes 512 KiB over and over:
/// `mov ax,1000h; seg: mov es,ax; xor di,di; mov cx,8000h; cld; rep stosw;
/// add ax,1000h; cmp ax,9000h; jb seg; jmp start`.
const DIRTIER: [u8; 23] = [
    0xb8, 0x00, 0x10, 0x8e, 0xc0, 0x31, 0xff, 0xb9, 0x00, 0x80, 0xfc, 0xf3, 0xab, 0x05, 0x00, 0x10, 0x3d, 0x00, 0x90,
    0x72, 0xee, 0xeb, 0xe9,
];

/// A guest that dirties its RAM faster than the network carries it.
async fn restless(settings: &MigrationSettings) -> (Vec<Step>, Outcome, Guest, TempDir) {
    let directory = TempDir::with_prefix("hfq-").expect("a directory");
    let file = boot_disk(directory.path(), &DIRTIER);
    let mut spec = spec();
    spec.disks = vec![disk(DiskFormat::Raw)];
    let source = Guest::start(&spec, |launch| launch.disks = vec![DiskAt::File(file.clone())]).await;
    let target = Guest::start(&spec, |launch| {
        launch.disks = vec![DiskAt::File(file.clone())];
        launch.incoming = true;
    })
    .await;
    until("the boot sector to be read", async || {
        let stats = source.qmp.block_stats().await.expect("statistics");
        (stats[0].reads > 0).then_some(())
    })
    .await;
    let address = prepare_incoming(&target.qmp, LOOPBACK, settings).await.expect("an address");
    start(&source.qmp, address, settings).await.expect("started");
    let mut steps = Vec::new();
    let outcome = watch(&source.qmp, settings, None, |step| {
        if !matches!(step, Step::Progress(_)) {
            steps.push(step);
        }
    });
    let outcome = within("the migration", outcome).await.expect("an outcome");
    (steps, outcome, source, directory)
}

#[tokio::test]
async fn a_restless_guest_is_given_a_longer_stop() {
    let settings = MigrationSettings {
        downtime_limits: vec![Duration::from_millis(50), Duration::from_secs(2)],
        bandwidth_bytes_per_s: Some(1 << 20),
        ..Default::default()
    };
    let (steps, outcome, ..) = restless(&settings).await;
    assert!(matches!(outcome, Outcome::Completed { .. }), "{outcome:?}");
    assert_eq!(steps, [Step::DowntimeLimit(Duration::from_secs(2)), Step::Switchover]);
}

#[tokio::test]
async fn a_guest_that_is_too_restless_stays() {
    let settings = MigrationSettings {
        downtime_limits: vec![Duration::from_millis(50)],
        bandwidth_bytes_per_s: Some(1 << 20),
        deadline: Duration::from_secs(6),
        ..Default::default()
    };
    let (steps, outcome, source, _directory) = restless(&settings).await;
    assert_eq!(steps.first(), Some(&Step::Throttle(60)), "{steps:?}");
    assert_eq!(steps.last(), Some(&Step::GivingUp), "{steps:?}");
    assert!(matches!(&outcome, Outcome::Failed { guest_still_here: true, .. }), "{outcome:?}");
    assert!(source.qmp.query_status().await.expect("a status").running);
}
