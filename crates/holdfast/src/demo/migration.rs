//! The third act: a VM moves while its users work.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use holdfast_api::JobState;
use holdfast_lab::cluster::Cluster;

use super::figures::{Migration, milliseconds};
use super::{Actor, Story};

/// How long the migration may take, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long the guest may take to answer.
const ANSWER: Duration = Duration::from_secs(30);
/// So many answers on the TCP connection after the migration show that it goes on.
const ANSWERS_AFTER: u64 = 5;
/// The guest changes 20 MB of its memory a second, round and round in 32 MB.
const LOAD: &str = "dirty 20 32";

impl Story {
    /// Moves the first VM, under load, to another node, and not to the
    /// coordinator: the plug that is pulled next is a follower's.
    pub(super) fn migrate(&self, cluster: &Cluster, actors: &[Actor]) -> Result<Migration> {
        self.narrator.act("A live migration under load");
        let vm = &actors.first().context("there are no VMs")?.vm;
        let from = cluster.node_of(&vm.name)?;
        let followers = cluster.followers()?;
        let to = followers.into_iter().find(|name| *name != from).context("there is no other node")?;
        vm.client()?.command(LOAD, ANSWER)?;
        let session = vm.session()?;
        let prober = vm.probe()?;
        prober.wait_for(ANSWER, |_| true)?;
        self.narrator
            .tell("it writes records, changes 20 MB of memory a second, serves a TCP connection and a ping every 5 ms");

        let step = self.narrator.begin_bar(&format!("moving {} from {from} to {to}", vm.name));
        let begun = Instant::now();
        let client = cluster.any()?;
        let job = client.migrate_vm(&vm.name, Some(&to))?;
        let ended = self.interruption.wait("the migration's end", DEADLINE, || {
            let job = client.job(job.id).ok()?;
            step.progress(job.percent, &job.note);
            (job.state != JobState::Running).then_some(job)
        })?;
        let over = Instant::now();
        let moved = ended.moved.with_context(|| {
            let why = ended.outcome.and_then(|outcome| outcome.why).unwrap_or_default();
            format!("{} did not move: {why}", vm.name)
        })?;

        let answered = session.answered();
        let goes_on = self.interruption.wait("the TCP connection's answers", ANSWER, || {
            (session.broken() || session.answered() >= answered + ANSWERS_AFTER).then(|| !session.broken())
        });
        prober.wait_for(ANSWER, |sample| sample.sent > over)?;
        let tcp_survived = goes_on.unwrap_or(false) && session.stop()?.failure.is_none();
        let seen = prober.stop();
        vm.client()?.command("idle", ANSWER)?;
        let figures = Migration {
            total_ms: moved.total_ms,
            downtime_ms: moved.downtime_ms,
            blackout_ms: seen.longest_gap_between(begun, over).map_or(0, |gap| milliseconds(gap.length)),
            lost_packets: seen.samples().iter().filter(|ping| ping.sent >= begun && ping.answered.is_none()).count(),
            tcp_survived,
        };
        step.done(&format!(
            "{} runs on {to} after {} ms; a client had no answer for {} ms, {}",
            vm.name,
            figures.total_ms,
            figures.blackout_ms,
            if tcp_survived { "its TCP connection goes on" } else { "its TCP connection broke" },
        ));
        Ok(figures)
    }
}
