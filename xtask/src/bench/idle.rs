//! `bench idle`: what a node costs on which nothing happens.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_api::ProfileName;

use super::stage::Stage;
use super::table::Row;

/// A cluster that was just formed has work to do; it may take so long.
const CALM: Duration = Duration::from_secs(5);
/// The unit of times in proc(5), USER_HZ: the same on every Linux machine of today.
const TICKS_PER_S: f64 = 100.0;
const MIB: f64 = (1 << 20) as f64;

/// What one node's keeper and agent took.
struct Cost {
    rss_mib: f64,
    pss_mib: f64,
    /// Percent of a core.
    cpu: f64,
}

/// Measures each node of three for `length`, without VMs and with one.
///
/// # Errors
/// When the cluster cannot be formed or `/proc` cannot be read.
pub fn run(binary: &Path, length: Duration) -> Result<Vec<Row>> {
    let stage = Stage::form(binary, ProfileName::Default)?;
    let mut rows = measure(&stage, length, "no VMs")?;
    let vm = stage.guest("bench", 100)?;
    rows.extend(measure(&stage, length, "1 VM")?);
    drop(vm);
    Ok(rows)
}

fn measure(stage: &Stage, length: Duration, with: &str) -> Result<Vec<Row>> {
    stage.settle()?;
    thread::sleep(CALM);
    let hosts = stage.cluster.hosts();
    let mut pids = Vec::new();
    for host in &hosts {
        pids.push([stage.cluster.keeper_pid(host.name())?, stage.cluster.agent_pid(host.name())?]);
    }
    let began = Instant::now();
    let before: Vec<[f64; 2]> = pids.iter().map(times).collect::<Result<_>>()?;
    thread::sleep(length);
    let took = began.elapsed().as_secs_f64();
    let coordinator = stage.cluster.coordinator()?;
    let (mut first, mut others) = (Vec::new(), Vec::new());
    for ((host, pids), before) in hosts.iter().zip(&pids).zip(before) {
        let now = times(pids)?;
        let cpu = 100.0 * (now[0] + now[1] - before[0] - before[1]) / took;
        let (mut rss_mib, mut pss_mib) = (0.0, 0.0);
        for (pid, what) in pids.iter().zip(["keeper", "agent"]) {
            let (rss, pss) = (memory(*pid, "Rss:")?, memory(*pid, "Pss:")?);
            eprintln!("{with}, {} {what}: {rss:.1} MiB resident, {pss:.1} MiB in proportion", host.name());
            rss_mib += rss;
            pss_mib += pss;
        }
        let spent = [now[0] - before[0], now[1] - before[1]].map(|seconds| 100.0 * seconds / took);
        eprintln!("{with}, {}: keeper {:.2} %, agent {:.2} % of a core", host.name(), spent[0], spent[1]);
        let cost = Cost { rss_mib, pss_mib, cpu };
        if host.name() == coordinator { first.push(cost) } else { others.push(cost) }
    }
    let mut rows = Vec::new();
    for (who, costs) in [("coordinator", first), ("follower", others)] {
        let all = |value: fn(&Cost) -> f64| costs.iter().map(value).collect::<Vec<_>>();
        let name = |what: &str| format!("{who}, {with}: {what}");
        rows.push(Row::of(name("keeper + agent resident, MiB"), &all(|cost| cost.rss_mib)).worst_goal(60.0));
        rows.push(Row::of(name("the same, shared pages in proportion, MiB"), &all(|cost| cost.pss_mib)));
        rows.push(Row::of(name("processor time, % of a core"), &all(|cost| cost.cpu)).worst_goal(1.0));
    }
    Ok(rows)
}

/// The processor time of each process so far, in seconds.
fn times(pids: &[i32; 2]) -> Result<[f64; 2]> {
    Ok([time(pids[0])?, time(pids[1])?])
}

fn time(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    // proc(5): utime and stime are the 14th and 15th field; the name, the second, ends with a bracket.
    let rest = text.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(11).take(2));
    let ticks: Vec<f64> = rest.into_iter().flatten().filter_map(|word| word.parse().ok()).collect();
    ensure!(ticks.len() == 2, "{path} is not understood: {text}");
    Ok(ticks.iter().sum::<f64>() / TICKS_PER_S)
}

/// A line of proc(5)'s `smaps_rollup`, in MiB.
fn memory(pid: i32, key: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.with_context(|| format!("{path} has no {key}"))? * 1024.0 / MIB)
}
