//! `bench failover`: the power of a node is cut, and its VM comes back elsewhere.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_api::ProfileName;
use holdfast_lab::Host;
use holdfast_lab::cluster::GuestVm;
use holdfast_lab::guest::{Acknowledged, Writer};

use super::bare::Model;
use super::events;
use super::peer::saturate;
use super::stage::{PATIENCE, Stage};
use super::table::Row;

/// The guest is asked for the next record so long after it acknowledged one.
const WRITE_EVERY: Duration = Duration::from_millis(5);
/// So many records are acknowledged before the power goes.
const RECORDS: u64 = 50;
/// A write is asked for again after so long without an answer.
const WRITE_PATIENCE: Duration = Duration::from_millis(200);

/// Whose power is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// A node that does not coordinate.
    Follower,
    /// The node that coordinates.
    Coordinator,
}

impl Victim {
    /// As rows name it.
    pub fn name(self) -> &'static str {
        match self {
            Victim::Follower => "follower",
            Victim::Coordinator => "coordinator",
        }
    }
}

/// What was found, and what a peer is compared with.
pub struct Measured {
    /// All of it.
    pub rows: Vec<Row>,
    /// The command line of the VM's QEMU.
    pub model: Option<Model>,
    started: Vec<(ProfileName, Victim, Vec<Duration>)>,
    false_failovers: Vec<(ProfileName, f64)>,
}

impl Measured {
    /// The times until QEMU ran elsewhere.
    pub fn started(&self, profile: ProfileName, victim: Victim) -> &[Duration] {
        let found = self.started.iter().find(|(of, whom, _)| (*of, *whom) == (profile, victim));
        found.map(|(.., times)| times.as_slice()).unwrap_or_default()
    }

    /// How many nodes were declared lost, and VMs started, while nothing had failed
    /// but all cores were busy.
    pub fn false_failovers(&self, profile: ProfileName) -> f64 {
        self.false_failovers.iter().find(|(of, _)| *of == profile).map_or(0.0, |(_, count)| *count)
    }
}

/// A cluster whose nodes are lost, and what is acceptable for its follower, in
/// milliseconds.
struct Setting {
    name: &'static str,
    profile: ProfileName,
    /// Two nodes and a disk witness rather than three nodes.
    pair: bool,
    lost: Option<f64>,
    started: f64,
}

const SETTINGS: [Setting; 3] = [
    Setting { name: "default", profile: ProfileName::Default, pair: false, lost: Some(1700.0), started: 2000.0 },
    Setting { name: "fast", profile: ProfileName::Fast, pair: false, lost: Some(750.0), started: 1000.0 },
    Setting { name: "two and a witness", profile: ProfileName::Default, pair: true, lost: None, started: 2800.0 },
];

/// What is acceptable, in milliseconds.
struct Goals {
    lost: Option<f64>,
    started: f64,
    /// Whether serving has a goal: `started` and 1.2 times the guest's cold boot.
    serving: bool,
}

/// The times of one failover, from the pulled plug on.
#[derive(Default)]
struct Times {
    boot: Vec<Duration>,
    lost: Vec<Duration>,
    started: Vec<Duration>,
    serving: Vec<Duration>,
}

/// Measures `runs` losses of a follower and of the coordinator, under both profiles
/// and with two nodes and a witness, and counts false failovers while all cores are busy for `load`, if any.
///
/// # Errors
/// When a step does not come about in time, which no figure can stand for.
pub fn run(binary: &Path, runs: usize, load: Option<Duration>) -> Result<Measured> {
    let mut measured = Measured { rows: Vec::new(), model: None, started: Vec::new(), false_failovers: Vec::new() };
    let rows = &mut measured.rows;
    let (mut lost_records, mut split) = (Vec::new(), Vec::new());
    for Setting { name, profile, pair, lost, started } in SETTINGS {
        let stage = if pair { Stage::pair(binary, profile)? } else { Stage::form(binary, profile)? };
        let vm = stage.guest("bench", 100)?;
        let mut acknowledged = Vec::new();
        for victim in [Victim::Follower, Victim::Coordinator] {
            let whom = victim.name();
            // Two nodes have one limit, whichever of them is lost.
            let later = if victim == Victim::Coordinator && !pair { 600.0 } else { 0.0 };
            let mut times = Times::default();
            for run in 1..=runs {
                one(&stage, &vm, victim, &mut times, &mut acknowledged).with_context(|| {
                    let state = stage.cluster.diagnosis();
                    format!("{state}\n{name}, loss of the {whom}, run {run} of {runs}")
                })?;
                eprintln!("{name}, {whom} lost, run {run}: {}", times.last());
            }
            let goals = Goals {
                lost: lost.map(|lost| lost + later),
                started: started + later,
                serving: profile == ProfileName::Default,
            };
            rows.extend(times.rows(&format!("{name}, {whom} lost"), &goals));
            if !pair {
                measured.started.push((profile, victim, times.started));
            }
        }
        if let (Some(load), false) = (load, pair) {
            measured.model = Some(Model::of(&stage.cluster, &vm, &stage.cluster.node_of(&vm.name)?)?);
            measured.false_failovers.push((profile, under_load(&stage, &vm, load)?));
        }
        stage.cluster.switch_off(&vm.name)?;
        lost_records.push(vm.verify()?.lost(&acknowledged).len() as f64);
        eprintln!("{name}: {} records were acknowledged", acknowledged.len());
        split.push(stage.overlaps()?);
    }
    rows.push(Row::of("acknowledged records lost", &lost_records).worst_goal(0.0));
    rows.push(Row::of("two QEMUs of one VM alive together", &split).worst_goal(0.0));
    Ok(measured)
}

/// Nodes declared lost and QEMUs started while all cores are busy for so long.
fn under_load(stage: &Stage, vm: &GuestVm, length: Duration) -> Result<f64> {
    let (last, seen) = (stage.events.last(), stage.cluster.watch().timeline().len());
    saturate(length)?;
    stage.settle()?;
    let lost = stage.events.since(last).iter().filter(|told| events::is_loss(&told.event)).count();
    let started = stage.cluster.watch().timeline().into_iter().skip(seen).filter(|seen| seen.vm == vm.id).count();
    Ok((lost + started) as f64)
}

impl Times {
    fn rows(&self, of: &str, goals: &Goals) -> Vec<Row> {
        let boot = Row::millis(&format!("{of}: the guest's cold boot"), &self.boot);
        let serving = Row::millis(&format!("{of}: guest answers"), &self.serving);
        let serving = match goals.serving {
            true => serving.goal(goals.started + 1.2 * boot.ours),
            false => serving,
        };
        let lost = Row::millis(&format!("{of}: declared lost"), &self.lost);
        vec![
            match goals.lost {
                Some(goal) => lost.goal(goal),
                None => lost,
            },
            Row::millis(&format!("{of}: QEMU elsewhere"), &self.started).goal(goals.started),
            serving,
            boot,
        ]
    }

    fn last(&self) -> String {
        let millis = |all: &[Duration]| all.last().map_or(0, Duration::as_millis);
        format!(
            "lost {}, QEMU {}, serving {} (cold boot {}) ms",
            millis(&self.lost),
            millis(&self.started),
            millis(&self.serving),
            millis(&self.boot)
        )
    }
}

fn one(
    stage: &Stage,
    vm: &GuestVm,
    victim: Victim,
    times: &mut Times,
    acknowledged: &mut Vec<Acknowledged>,
) -> Result<()> {
    times.boot.push(cold_boot(stage, vm)?);
    let host = place(stage, vm, victim)?;
    let prober = vm.probe()?;
    let writer = Writer::start(Some(&vm.netns), vm.address(), WRITE_EVERY, WRITE_PATIENCE)?;
    let before = prober.wait_for(PATIENCE, |sample| sample.answered.is_some())?.boot_id;
    wait_written(&writer)?;
    let last_event = stage.events.last();

    let cut = host.power_off()?;

    let lost = stage.events.wait(last_event, PATIENCE, events::lost(host.name()))?;
    let qemu = stage.cluster.watch().wait_started(&vm.id, cut.at, PATIENCE)?;
    let serving = prober.wait_for(PATIENCE, |sample| sample.sent > cut.at && sample.boot_id != before)?;
    let serving = serving.answered.context("an answer without a time")?;
    ensure!(qemu.host.as_deref() != Some(host.name()), "its QEMU started on the dead host");
    ensure!(stage.cluster.coordinator()? != host.name(), "the dead host still coordinates");
    times.lost.push(lost.at - cut.at);
    times.started.push(qemu.first_seen - cut.at);
    times.serving.push(serving - cut.at);

    acknowledged.extend(writer.stop()?.acknowledged);
    drop(prober.stop());
    host.power_on()?;
    stage.settle()
}

/// Switches the VM off and starts it: from QEMU's start to the guest's first answer.
fn cold_boot(stage: &Stage, vm: &GuestVm) -> Result<Duration> {
    stage.cluster.switch_off(&vm.name)?;
    let from = Instant::now();
    let prober = vm.probe()?;
    stage.cluster.any()?.start_vm(&vm.name)?;
    let qemu = stage.cluster.watch().wait_started(&vm.id, from, PATIENCE)?;
    let first = prober.wait_for(PATIENCE, |sample| sample.sent > qemu.first_seen && sample.boot_id != 0)?;
    Ok(first.answered.context("an answer without a time")? - qemu.first_seen)
}

/// Brings the VM to a host that is or is not the coordinator's.
fn place(stage: &Stage, vm: &GuestVm, victim: Victim) -> Result<Arc<Host>> {
    let coordinator = stage.cluster.coordinator()?;
    let here = stage.cluster.node_of(&vm.name)?;
    let fits = |node: &str| (node == coordinator) == (victim == Victim::Coordinator);
    if !fits(&here) {
        let hosts = stage.cluster.hosts();
        let target = hosts.iter().find(|host| fits(host.name())).context("a cluster of one node")?;
        stage.cluster.migrate(&vm.name, target.name(), PATIENCE)?;
    }
    stage.cluster.host(&stage.cluster.node_of(&vm.name)?)
}

/// Waits until enough records are promised: none can be lost otherwise.
fn wait_written(writer: &Writer) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    let mut first = 0;
    while first == 0 || writer.highest() < first + RECORDS {
        ensure!(Instant::now() < until, "the guest acknowledges no records, or too few");
        std::thread::sleep(WRITE_EVERY);
        first = if first == 0 { writer.highest() } else { first };
    }
    Ok(())
}
