//! `bench crash`: QEMU dies, the agent dies.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_api::ProfileName;
use holdfast_lab::Host;
use holdfast_lab::cluster::GuestVm;

use super::stage::{PATIENCE, Stage};
use super::table::Row;

/// How often a VM may crash before it is moved: the default budget.
const CRASHES_IN_PLACE: usize = 3;
/// How often a dead agent is asked whether it answers again.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// A VM that misses no more than a few pings, which come every 5 ms, does not
/// notice: in milliseconds, on a machine whose processors others use as well.
const UNNOTICED: f64 = 100.0;

/// Kills QEMU and the agent `runs` times each.
///
/// # Errors
/// When what was killed does not come back in time.
pub fn run(binary: &Path, runs: usize) -> Result<Vec<Row>> {
    let stage = Stage::form(binary, ProfileName::Default)?;
    let mut again = Vec::new();
    let mut serving = Vec::new();
    let mut vm = stage.guest("bench0", 100)?;
    for run in 0..runs {
        if run > 0 && run.is_multiple_of(CRASHES_IN_PLACE) {
            stage.delete(&vm)?;
            vm = stage.guest(&format!("bench{run}"), 100)?;
        }
        let (qemu, guest) = kill_qemu(&stage, &vm).with_context(|| format!("QEMU killed, run {}", run + 1))?;
        eprintln!("QEMU killed, run {}: again {} ms, serving {} ms", run + 1, qemu.as_millis(), guest.as_millis());
        again.push(qemu);
        serving.push(guest);
    }

    let (mut follower, mut coordinator) = (Vec::new(), Vec::new());
    let mut gaps = Vec::new();
    for run in 0..runs {
        for coordinates in [false, true] {
            let host = pick(&stage, coordinates)?;
            // What the agent's death does to a VM shows on its own node.
            if stage.cluster.node_of(&vm.name)? != host.name() {
                stage.cluster.migrate(&vm.name, host.name(), PATIENCE)?;
            }
            let (answers, gap) =
                kill_agent(&stage, &vm, &host).with_context(|| format!("agent killed, run {}", run + 1))?;
            eprintln!("agent killed, run {}: answers {} ms, gap {} ms", run + 1, answers.as_millis(), gap.as_millis());
            if coordinates {
                coordinator.push(answers)
            } else {
                follower.push(answers)
            }
            gaps.push(gap);
            stage.settle()?;
        }
    }
    Ok(vec![
        Row::millis("QEMU killed: QEMU again in place", &again).goal(400.0),
        Row::millis("QEMU killed: guest answers", &serving),
        Row::millis("follower's agent killed: API answers", &follower).goal(2000.0),
        Row::millis("coordinator's agent killed: API answers", &coordinator).goal(2000.0),
        Row::millis("agent killed: longest time without an answer of its VM", &gaps).goal(UNNOTICED),
        Row::of("two QEMUs of one VM alive together", &[stage.overlaps()?]).worst_goal(0.0),
    ])
}

fn kill_qemu(stage: &Stage, vm: &GuestVm) -> Result<(Duration, Duration)> {
    let host = stage.cluster.host(&stage.cluster.node_of(&vm.name)?)?;
    let prober = vm.probe()?;
    let before = prober.wait_for(PATIENCE, |sample| sample.answered.is_some())?.boot_id;
    // Finding the process counts as well: it is a few milliseconds.
    let killed = Instant::now();
    stage.cluster.kill_qemu(host.name(), &vm.id)?;
    let qemu = stage.cluster.watch().wait_started(&vm.id, killed, PATIENCE)?;
    ensure!(qemu.host.as_deref() == Some(host.name()), "it started on {:?}, not in place", qemu.host);
    let first = prober.wait_for(PATIENCE, |sample| sample.sent > killed && sample.boot_id != before)?;
    Ok((qemu.first_seen - killed, first.answered.context("an answer without a time")? - killed))
}

/// Kills the agent; how long until the API answers on its node, and the longest
/// time meanwhile in which the VM there did not answer.
fn kill_agent(stage: &Stage, vm: &GuestVm, host: &Host) -> Result<(Duration, Duration)> {
    let prober = vm.probe()?;
    let before = prober.wait_for(PATIENCE, |sample| sample.answered.is_some())?.boot_id;
    let pid = stage.cluster.agent_pid(host.name())?;
    let from = Instant::now();
    stage.cluster.kill_agent(host.name())?;
    while stage.cluster.agent_pid(host.name()).ok() == Some(pid)
        || stage.cluster.client(host.name()).within(ASK_EVERY * 100).cluster().is_err()
    {
        ensure!(from.elapsed() < PATIENCE, "the agent on {} does not answer again", host.name());
        std::thread::sleep(ASK_EVERY);
    }
    let answers = from.elapsed();
    let until = Instant::now();
    let report = prober.stop();
    ensure!(report.boots() == [before], "the VM's guest booted anew");
    let gap = report.longest_gap_between(from, until).context("no time passed")?;
    Ok((answers, gap.length))
}

fn pick(stage: &Stage, coordinates: bool) -> Result<std::sync::Arc<Host>> {
    let coordinator = stage.cluster.coordinator()?;
    let found = stage.cluster.hosts().into_iter().find(|host| (host.name() == coordinator) == coordinates);
    found.context("a cluster of one node")
}
