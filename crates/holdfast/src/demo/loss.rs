//! The fourth act: the plug of a node is pulled.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use holdfast_api::{ChangeKind, NodeState, VmState};
use holdfast_lab::cluster::{ApiClient, ChangeStream, Cluster, GuestVm};

use super::figures::{Failover, milliseconds};
use super::{Actor, Story};

/// How long everything may take to be back, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);
/// A change of the node that was missed is looked for this often.
const LOOK_EVERY: Duration = Duration::from_millis(100);

impl Story {
    /// Cuts the power of the node that runs the first VM.
    pub(super) fn pull_the_plug(&self, cluster: &Cluster, actors: &[Actor]) -> Result<Failover> {
        self.narrator.act("A pulled plug");
        let vm = &actors.first().context("there are no VMs")?.vm;
        let victim = cluster.node_of(&vm.name)?;
        let views = cluster.any()?.vms()?;
        let on_it: Vec<&GuestVm> = actors
            .iter()
            .map(|actor| &actor.vm)
            .filter(|vm| views.iter().any(|view| view.name == vm.name && view.node.as_deref() == Some(&victim)))
            .collect();
        let boot = vm.wait_answer(DEADLINE)?.boot_id;
        let survivor =
            cluster.hosts().into_iter().find(|host| host.name() != victim).context("there is no other node")?;
        let witness = cluster.client(survivor.name());
        let changes = witness.changes()?;
        let prober = vm.probe()?;
        prober.wait_for(DEADLINE, |_| true)?;
        self.interruption.check()?;

        let names: Vec<&str> = on_it.iter().map(|vm| vm.name.as_str()).collect();
        let host = cluster.host(&victim)?;
        let role = if cluster.coordinator()? == victim { ", which coordinates" } else { "" };
        let step = self.narrator.begin(&format!(
            "pulling the plug of {victim}{role}: all cables dark, SIGKILL to everything; {} ran there",
            names.join(", ")
        ));
        let lost = {
            let victim = victim.clone();
            thread::spawn(move || await_lost(&witness, changes, &victim))
        };
        let cut = host.power_off()?;
        let detected = lost.join().map_err(|_| anyhow!("watching the node panicked"))??;
        let started = cluster.watch().wait_started(&vm.id, cut.at, DEADLINE)?;
        self.interruption.check()?;
        let serving = prober.wait_for(DEADLINE, |sample| sample.sent > cut.at && sample.boot_id != boot)?;
        let serving = serving.answered.context("an answer without its time")?;
        let since = |at: Instant| milliseconds(at.saturating_duration_since(cut.at));
        let figures = Failover {
            detected_ms: since(detected),
            started_ms: since(started.first_seen),
            serving_ms: since(serving),
            lost_records: 0,
        };
        step.done(&format!(
            "{victim} declared lost after {} ms; {} starts on {} after {} ms and answers after {} ms",
            figures.detected_ms,
            vm.name,
            started.host.as_deref().unwrap_or("no host"),
            figures.started_ms,
            figures.serving_ms
        ));
        for other in &on_it {
            self.back_elsewhere(cluster, other, &victim)?;
        }
        let all = cut.at.elapsed().as_secs_f64();
        self.narrator
            .tell(&format!("all VMs of {victim} answer again after {all:.1} s: {}", self.whereabouts(cluster)?));
        self.explain(cluster, vm)?;
        self.go_on_writing(actors)?;
        Ok(figures)
    }

    fn back_elsewhere(&self, cluster: &Cluster, vm: &GuestVm, victim: &str) -> Result<()> {
        self.interruption.check()?;
        cluster.wait_vm(&vm.name, DEADLINE, |view| {
            view.state == VmState::Running && view.node.as_deref().is_some_and(|node| node != victim)
        })?;
        vm.wait_answer(DEADLINE)?;
        Ok(())
    }

    /// The chain of causes, as `holdfast explain vm` tells it.
    fn explain(&self, cluster: &Cluster, vm: &GuestVm) -> Result<()> {
        let explanation = cluster.any()?.explain(&vm.name)?;
        self.narrator.tell(&format!("`holdfast explain vm {}`: {}", vm.name, explanation.standing));
        for cause in &explanation.causes {
            self.narrator.tell(&format!("  {}", cause.text));
        }
        Ok(())
    }

    /// Every writer has to get on with its guest's new life before it counts.
    fn go_on_writing(&self, actors: &[Actor]) -> Result<()> {
        for writer in actors.iter().filter_map(|actor| actor.writer.as_ref()) {
            let before = writer.highest();
            self.interruption
                .wait("another acknowledged record", DEADLINE, || (writer.highest() > before).then_some(()))?;
        }
        Ok(())
    }
}

/// When a surviving node told that `victim` is lost.
fn await_lost(witness: &ApiClient, mut changes: ChangeStream, victim: &str) -> Result<Instant> {
    let until = Instant::now() + DEADLINE;
    while Instant::now() < until {
        let change = changes.next(LOOK_EVERY).context("the stream of changes broke off")?;
        // Taken before the question, so that asking does not count.
        let at = Instant::now();
        if change.is_some_and(|change| change.kind != ChangeKind::Node || change.name != victim) {
            continue;
        }
        let nodes = witness.nodes()?;
        let node = nodes.iter().find(|node| node.name == victim);
        if node.is_some_and(|node| node.state == NodeState::Lost) {
            return Ok(at);
        }
    }
    ensure!(false, "{victim} was not declared lost within {} s", DEADLINE.as_secs());
    Ok(until)
}
