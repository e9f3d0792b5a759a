//! `bench migration`: a live migration of ours beside one of bare QEMUs, turn and
//! turn about, and the blackout as a client sees it.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use holdfast_api::ProfileName;
use holdfast_lab::cluster::{Cluster, GuestVm, VmTemplate};
use holdfast_lab::guest::{self, GuestClient, Prober, TcpSession};
use holdfast_lab::touch_memory;

use super::bare::{Bare, Model};
use super::stage::{PATIENCE, Stage};
use super::table::{Row, millis};

const PING_EVERY: Duration = Duration::from_millis(5);
/// So much of the time after a migration still belongs to it: late answers, late announcements.
const AFTERMATH: Duration = Duration::from_millis(500);
/// The last byte of the guests' addresses.
const OURS: u8 = 100;
const BARE: u8 = 101;
/// A target that got memory which nobody had touched for a while took its guest 150 ms
/// later, on either side: both sides' targets find memory that was just used.
const TOUCHED_BYTES: usize = 1 << 30;
/// What the loaded guest does: the commands' lines.
const LOAD: [&str; 2] = ["dirty 50 24", "writer on 100"];
const NO_LOAD: &str = "idle";

/// What one side's migrations took.
#[derive(Default)]
struct Side {
    total: Vec<Duration>,
    downtime: Vec<Duration>,
    blackout: Vec<Duration>,
    lost: Vec<f64>,
    broken: Vec<f64>,
    /// From the request to the end of the job.
    whole: Vec<Duration>,
}

/// A client of one guest while it moves.
struct Client {
    prober: Prober,
    session: TcpSession,
    began: Instant,
}

/// Measures `runs` migrations of each side, of an idle guest and of a loaded one.
///
/// # Errors
/// When a migration fails, which no figure can stand for.
pub fn run(binary: &Path, runs: usize) -> Result<Vec<Row>> {
    let stage = Stage::form(binary, ProfileName::Default)?;
    let mut rows = measure(&stage, runs, "idle 128 MiB guest", 128, &[])?;
    // More memory, as what is dirtied must fit beside the kernel.
    rows.extend(measure(&stage, runs, "256 MiB guest that dirties 50 MB/s and writes", 256, &LOAD)?);
    rows.push(Row::of("two QEMUs of one VM alive together", &[stage.overlaps()?]).worst_goal(0.0));
    Ok(rows)
}

/// Measures both sides with guests of so many MiB under a load.
fn measure(stage: &Stage, runs: usize, name: &str, mib: u64, load: &[&str]) -> Result<Vec<Row>> {
    let vm = stage.cluster.create_vm(&VmTemplate::new("bench", OURS).memory(mib << 20))?;
    let bare_ip = Cluster::guest_address(BARE);
    let ends = ends(stage, &vm)?;
    // There and back, so that both nodes have the switch that the bare guest needs too.
    for end in [&ends[1], &ends[0]] {
        stage.cluster.migrate(&vm.name, end, PATIENCE)?;
    }
    let model = Model::of(&stage.cluster, &vm, &ends[0])?;
    let hosts = (stage.cluster.host(&ends[0])?, stage.cluster.host(&ends[1])?);
    let mut bare = Bare::boot(model, hosts, bare_ip)?;
    GuestClient::connect(Some(&vm.netns), bare_ip)?.ping(PATIENCE)?;
    let (mut ours, mut peer) = (Side::default(), Side::default());
    for run in 1..=runs {
        for side in [run % 2, (run + 1) % 2] {
            if side == 0 {
                under(&vm.netns, vm.ip, load, || move_ours(stage, &vm, &ends, &mut ours))
                    .with_context(|| format!("{name}, run {run}"))?;
            } else {
                under(&vm.netns, bare_ip, load, || move_bare(&vm.netns, bare_ip, &mut bare, &mut peer))
                    .with_context(|| format!("{name}, bare, run {run}"))?;
            }
        }
        eprintln!("{name}, run {run}: ours {}; bare {}", ours.last(), peer.last());
    }
    drop(bare);
    stage.delete(&vm)?;
    Ok(ours.rows(name, &peer))
}

/// The nodes between which the VM goes back and forth, its own one first. No
/// coordinator among them, so that its work does not count on one side only.
fn ends(stage: &Stage, vm: &GuestVm) -> Result<[String; 2]> {
    let followers = stage.cluster.followers()?;
    let [one, other] = <[String; 2]>::try_from(followers).ok().context("two followers are needed")?;
    let here = stage.cluster.node_of(&vm.name)?;
    if here == other {
        return Ok([other, one]);
    }
    if here != one {
        stage.cluster.migrate(&vm.name, &one, PATIENCE)?;
    }
    Ok([one, other])
}

/// Does something while a guest is under load, and lets it rest afterwards.
fn under(netns: &str, ip: Ipv4Addr, load: &[&str], work: impl FnOnce() -> Result<()>) -> Result<()> {
    let client = GuestClient::connect(Some(netns), ip)?;
    for line in load {
        client.command(line, PATIENCE)?;
    }
    let done = work();
    if !load.is_empty() {
        client.command(NO_LOAD, PATIENCE)?;
    }
    done
}

fn move_ours(stage: &Stage, vm: &GuestVm, ends: &[String; 2], side: &mut Side) -> Result<()> {
    let here = stage.cluster.node_of(&vm.name)?;
    let target = ends.iter().find(|end| **end != here).context("no other end")?;
    // Asked where the VM is not: an agent that answers requests does it beside the migration.
    let node = stage.cluster.client(&stage.cluster.coordinator()?);
    let client = Client::start(&vm.netns, vm.ip)?;
    touch_memory(TOUCHED_BYTES)?;
    let began = Instant::now();
    let job = node.migrate_vm(&vm.name, Some(target))?;
    let job = node.job_ended(job.id, PATIENCE)?;
    side.whole.push(began.elapsed());
    let moved = job.moved.with_context(|| format!("the migration has no figures: {job:?}"))?;
    side.total.push(Duration::from_millis(moved.total_ms));
    side.downtime.push(Duration::from_millis(moved.downtime_ms));
    client.stop(side)
}

fn move_bare(netns: &str, ip: Ipv4Addr, bare: &mut Bare, side: &mut Side) -> Result<()> {
    let client = Client::start(netns, ip)?;
    touch_memory(TOUCHED_BYTES)?;
    let began = Instant::now();
    bare.migrate(|moved| {
        side.whole.push(began.elapsed());
        side.total.push(moved.total);
        side.downtime.push(moved.downtime);
        client.stop(side)
    })
}

impl Client {
    fn start(netns: &str, ip: Ipv4Addr) -> Result<Self> {
        let address = SocketAddrV4::new(ip, guest::PORT);
        let session = TcpSession::start(Some(netns), address, PING_EVERY, PATIENCE)?;
        let prober = Prober::start(Some(netns), address, PING_EVERY)?;
        prober.wait_for(PATIENCE, |sample| sample.answered.is_some())?;
        Ok(Client { prober, session, began: Instant::now() })
    }

    /// The migration is over: sees it out and notes what the client saw.
    fn stop(self, side: &mut Side) -> Result<()> {
        let over = Instant::now() + AFTERMATH;
        self.prober.wait_for(PATIENCE, |sample| sample.sent > over)?;
        let report = self.prober.stop();
        let gap = report.longest_gap_between(self.began, over).context("no time passed")?;
        side.blackout.push(gap.length);
        side.lost.push(report.lost() as f64);
        let session = self.session.stop()?;
        if let Some(failure) = &session.failure {
            eprintln!("the TCP connection broke: {failure}");
        }
        side.broken.push(f64::from(u8::from(session.failure.is_some())));
        Ok(())
    }
}

impl Side {
    fn rows(&self, name: &str, bare: &Side) -> Vec<Row> {
        let beside = |what: &str, ours: &[Duration], peer: &[Duration]| {
            Row::millis(&format!("{name}: {what}"), ours).beside(&millis(peer))
        };
        vec![
            beside("total", &self.total, &bare.total).goal(1.15),
            beside("blackout seen by a client", &self.blackout, &bare.blackout).goal(1.1),
            beside("downtime by QEMU's account", &self.downtime, &bare.downtime),
            beside("from the request to its end", &self.whole, &bare.whole),
            Row::of(format!("{name}: pings lost"), &self.lost).beside(&bare.lost),
            Row::of(format!("{name}: TCP connections broken"), &self.broken).worst_goal(0.0),
        ]
    }

    fn last(&self) -> String {
        let last = |all: &[Duration]| all.last().map_or(0, Duration::as_millis);
        format!(
            "total {} ms, downtime {} ms, blackout {} ms, {} pings lost",
            last(&self.total),
            last(&self.downtime),
            last(&self.blackout),
            self.lost.last().copied().unwrap_or_default()
        )
    }
}
