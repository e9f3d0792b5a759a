//! `cargo xtask chaos`: a long random run of a cluster in the lab, with real guests.
//!
//! ```text
//!  round:  work begins ─ fault ─ fault ─ … ─ heal ─ judge ─┐
//!             ▲                                            │
//!             └────────────────────────────────────────────┘
//! ```
//! Faults come and go while guests write records, VMs move and the API is written
//! to. Then all faults end, and all must be in order again within a bound, with
//! nothing lost, nothing twice and nothing left behind.

mod fault;
mod judge;
mod report;
mod work;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use holdfast_api::VmState;
use holdfast_lab::cluster::{Cluster, ClusterSpec, GuestVm, VmTemplate};
use holdfast_lab::guest::{Acknowledged, Writer};

use self::fault::{Fault, Undo};
use self::report::Report;
use self::work::Written;
use crate::dice::{Dice, Drawn};
use crate::root;

/// A guest writes a record so long after it acknowledged one.
const WRITE_EVERY: Duration = Duration::from_millis(40);
/// A record is asked for again after so long.
const WRITE_PATIENCE: Duration = Duration::from_millis(500);
/// After so many rounds the guests' disks are looked at, for which they are switched off.
const AUDIT_EVERY: u64 = 6;
/// Of a disk that can be filled, in bytes.
const SMALL_DISK: u64 = 24 << 20;
const VMS: u8 = 4;

/// The options of `cargo xtask chaos`.
#[derive(Debug, Parser)]
pub struct Args {
    /// For how long, in minutes; a round that has begun is ended.
    #[arg(long, default_value_t = 20.0)]
    minutes: f64,
    /// How many nodes.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(3..=5))]
    nodes: u8,
    #[command(flatten)]
    drawn: Drawn,
}

/// Runs it; false when something was violated.
///
/// # Errors
/// When the cluster cannot be built, which says nothing about it.
pub fn run(args: &Args) -> Result<bool> {
    let (binary, seed) = (args.drawn.binary()?, args.drawn.seed()?);
    eprintln!("seed {seed}: `cargo xtask chaos --nodes {} --seed {seed}` draws the same faults", args.nodes);
    let mut chaos = Chaos::form(&binary, usize::from(args.nodes), seed)?;
    let until = Instant::now() + Duration::from_secs_f64(args.minutes.clamp(0.1, 10_000.0) * 60.0);
    let begun = Instant::now();
    while Instant::now() < until && chaos.report.violations.is_empty() {
        if let Err(error) = chaos.round() {
            chaos.violated(format!("{error:#}"));
        }
    }
    if chaos.report.violations.is_empty()
        && let Err(error) = chaos.audit()
    {
        chaos.violated(format!("{error:#}"));
    }
    chaos.report.seconds = begun.elapsed().as_secs();
    let report = chaos.close();
    println!("\n{report}");
    if let Some(file) = &args.drawn.json {
        fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(report.violations.is_empty())
}

/// A run.
struct Chaos {
    /// The guests' writers, and what those before them were told.
    writers: Vec<Writer>,
    acknowledged: Vec<Vec<Acknowledged>>,
    vms: Vec<GuestVm>,
    small: Vec<String>,
    nodes: Vec<String>,
    dice: Dice,
    report: Report,
    settled: Vec<u64>,
    /// Sightings of QEMUs that were counted already.
    seen: usize,
    kept: PathBuf,
    cluster: Cluster,
}

impl Chaos {
    fn form(binary: &Path, count: usize, seed: u64) -> Result<Self> {
        let mut spec = ClusterSpec::new(binary, root().join("out/guest"))?;
        spec.nodes = count;
        let mut cluster = Cluster::build(spec)?;
        let nodes: Vec<String> = cluster.hosts().iter().map(|host| host.name().to_owned()).collect();
        // Not on all: a disk in memory flushes sooner than a disk.
        let small: Vec<String> = nodes.iter().step_by(2).cloned().collect();
        for name in &small {
            cluster.host(name)?.small_disk("var", SMALL_DISK)?;
        }
        cluster.assemble()?;
        let mut vms = Vec::new();
        for number in 0..VMS {
            vms.push(cluster.create_vm(&VmTemplate::new(&format!("vm{number}"), 101 + number))?);
        }
        let report = Report { seed, nodes: count, ..Report::default() };
        let kept = std::env::temp_dir().join(format!("holdfast-chaos-{seed}"));
        let mut chaos = Chaos {
            writers: Vec::new(),
            acknowledged: vec![Vec::new(); vms.len()],
            vms,
            small,
            nodes,
            dice: Dice::new(seed),
            report,
            settled: Vec::new(),
            seen: 0,
            kept,
            cluster,
        };
        chaos.seen = chaos.cluster.watch().timeline().len();
        chaos.begin_writing()?;
        Ok(chaos)
    }

    /// Faults, while everybody works; then peace, and judgement.
    fn round(&mut self) -> Result<()> {
        self.report.rounds += 1;
        let round = self.report.rounds;
        let names: Vec<String> = self.vms.iter().map(|vm| vm.name.clone()).collect();
        let faults: Vec<(u64, Fault)> = (0..self.dice.between(1, 3))
            .map(|_| (self.dice.between(0, 1500), Fault::draw(&mut self.dice, &self.nodes, &names, &self.small)))
            .collect();
        let hold = Duration::from_millis(self.dice.between(300, 6000));
        let moved = self.dice.one_in(2).then(|| self.dice.one_of(&names).clone());
        let spare = self.dice.one_in(3).then(|| format!("spare{round}"));
        let clients: Vec<_> = self.dice.shuffled(&self.nodes).iter().map(|node| self.cluster.client(node)).collect();

        let (cluster, vms) = (&self.cluster, &self.vms);
        let stop = AtomicBool::new(false);
        let mut undo = Undo::default();
        let (mut injected, mut jobs) = (Vec::new(), Vec::new());
        let (healed, written) = thread::scope(|scope| {
            let writing = scope.spawn(|| work::write(&clients, round, &stop));
            if let Some(vm) = &moved {
                jobs.extend(cluster.any().ok().and_then(|client| client.migrate_vm(vm, None).ok()).map(|job| job.id));
            }
            if let Some(spare) = &spare {
                drop(work::create_spare(cluster, &clients[0], spare));
            }
            for (pause, fault) in &faults {
                thread::sleep(Duration::from_millis(*pause));
                match fault.inject(cluster, vms, &mut undo) {
                    Ok(()) => injected.push(fault.clone()),
                    Err(error) => eprintln!("round {round}: not now: {fault:?}: {error:#}"),
                }
            }
            thread::sleep(hold);
            let healed = undo.heal(cluster);
            stop.store(true, Ordering::Relaxed);
            (healed, writing.join())
        });
        let written: Written = written.map_err(|_| anyhow::anyhow!("the API's writer panicked"))?;
        for fault in &injected {
            *self.report.faults.entry(fault.kind()).or_default() += 1;
        }
        healed.context("after the faults a node did not come back")?;

        let begun = Instant::now();
        self.judge(&written, spare.as_deref()).with_context(|| format!("round {round}, after {injected:?}"))?;
        self.count_migrations(moved.is_some(), &jobs);
        let took = u64::try_from(begun.elapsed().as_millis())?;
        self.settled.push(took);
        if took > self.report.slowest_ms {
            (self.report.slowest_ms, self.report.slowest_round) = (took, round);
        }
        let (ok, unknown) = (written.acknowledged.len(), written.unknown);
        self.report.writes_acknowledged += ok;
        self.report.writes_unknown += unknown;
        let kinds: Vec<_> = injected.iter().map(Fault::kind).collect();
        eprintln!("round {round}: {}; in order after {took} ms; {ok} writes, {unknown} unknown", kinds.join(", "));
        if round.is_multiple_of(AUDIT_EVERY) {
            self.audit().with_context(|| format!("the records after round {round}"))?;
        }
        Ok(())
    }

    fn count_migrations(&mut self, asked: bool, jobs: &[u64]) {
        self.report.migrations.0 += u64::from(asked);
        let done = |id: &&u64| {
            let job = self.cluster.any().ok().and_then(|client| client.job(**id).ok());
            job.is_some_and(|job| job.state == holdfast_api::JobState::Done)
        };
        self.report.migrations.1 += jobs.iter().filter(done).count() as u64;
    }

    fn begin_writing(&mut self) -> Result<()> {
        for vm in &self.vms {
            self.writers.push(Writer::start(Some(&vm.netns), vm.address(), WRITE_EVERY, WRITE_PATIENCE)?);
        }
        Ok(())
    }

    /// Switches all VMs off, looks for every record on their disks, and goes on.
    fn audit(&mut self) -> Result<()> {
        self.count_starts();
        for (writer, all) in self.writers.drain(..).zip(&mut self.acknowledged) {
            all.extend(writer.stop()?.acknowledged);
        }
        let pairs: Vec<_> = self.vms.iter().zip(&self.acknowledged).map(|(vm, all)| (vm, all.as_slice())).collect();
        self.cluster.assert_clean(&pairs)?;
        self.report.records = self.acknowledged.iter().map(Vec::len).sum();
        for vm in &self.vms {
            let job = self.cluster.any()?.start_vm(&vm.name)?;
            self.cluster.job_done(&job, judge::BOUND)?;
            self.cluster.wait_vm(&vm.name, judge::BOUND, |vm| vm.state == VmState::Running)?;
        }
        for vm in &self.vms {
            vm.wait_answer(judge::BOUND)?;
        }
        self.seen = self.cluster.watch().timeline().len();
        self.begin_writing()
    }

    /// Counts the QEMUs that came since the last time.
    fn count_starts(&mut self) {
        let all = self.cluster.watch().timeline();
        for (index, seen) in all.iter().enumerate().skip(self.seen) {
            let before = all[..index].iter().rfind(|before| before.vm == seen.vm && before.running_since.is_some());
            if let Some(before) = before.filter(|_| !seen.incoming) {
                self.report.restarts += 1;
                self.report.failovers += usize::from(before.host != seen.host);
            }
        }
        self.seen = all.len();
    }

    /// Keeps what a person needs to find out why.
    fn violated(&mut self, text: String) {
        let keep = || -> Result<()> {
            fs::create_dir_all(&self.kept)?;
            fs::write(self.kept.join("what.txt"), format!("{text}\n\n{}", self.cluster.diagnosis()))?;
            let watch = format!("{:#?}", self.cluster.watch().timeline());
            fs::write(self.kept.join("qemus.txt"), watch)?;
            for host in self.cluster.hosts() {
                fs::copy(host.log_path(), self.kept.join(format!("{}.log", host.name())))?;
            }
            Ok(())
        };
        match keep() {
            Ok(()) => eprintln!("the logs are kept in {}", self.kept.display()),
            Err(error) => eprintln!("the logs could not be kept in {}: {error:#}", self.kept.display()),
        }
        let first = text.lines().take(6).collect::<Vec<_>>().join("\n  ");
        self.report.violations.push(first);
    }

    fn close(mut self) -> Report {
        self.count_starts();
        self.settled.sort_unstable();
        self.report.median_ms = self.settled.get(self.settled.len() / 2).copied().unwrap_or_default();
        self.report
    }
}
