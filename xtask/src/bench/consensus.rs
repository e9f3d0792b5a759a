//! `bench consensus`: writes as users of the API see them, with every flush, both
//! TLS hops and all, and how long nothing can be written when the coordinator goes:
//! by losing its power, by being stopped in order, by handing over.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use holdfast_api::{ProfileName, SetNetwork};
use holdfast_lab::Network;
use holdfast_lab::cluster::ApiClient;

use super::stage::{PATIENCE, Stage};
use super::table::{Row, millis, quantile};

/// Writes of one client.
const WRITES: usize = 500;
/// Clients that write at once, and the writes of each.
const CLIENTS: usize = 32;
const WRITES_EACH: usize = 50;
/// The writer that sees a hand-over has written so often before.
const WARM: usize = 20;

/// Measures writes once and losses of the coordinator `runs` times.
///
/// # Errors
/// When a write is refused or a coordinator is not replaced in time.
pub fn run(binary: &Path, runs: usize) -> Result<Vec<Row>> {
    let stage = Stage::form(binary, ProfileName::Default)?;
    let coordinator = stage.cluster.coordinator()?;
    let follower = stage.cluster.followers()?.first().context("no followers")?.clone();
    let mut rows = Vec::new();
    for (at, node) in [("coordinator", &coordinator), ("follower", &follower)] {
        let client = stage.cluster.client(node);
        let mut took = Vec::new();
        let mut asked = Vec::new();
        for number in 0..WRITES {
            let from = Instant::now();
            // A read on a connection of its own is what HTTP alone costs.
            client.jobs()?;
            asked.push(from.elapsed());
            took.push(write(&client, number)?);
        }
        let mut sorted = millis(&took);
        sorted.sort_by(f64::total_cmp);
        rows.push(Row::millis(&format!("a read at the {at}, 1 client"), &asked));
        rows.push(Row::millis(&format!("a write at the {at}, 1 client"), &took));
        rows.push(Row::of(format!("a write at the {at}, 1 client, p99, ms"), &[quantile(&sorted, 0.99)]));
    }
    rows.push(Row::of(format!("writes a second at the coordinator, {CLIENTS} clients"), &[together(&stage)?]));

    let (mut lost, mut stopped, mut asked, mut handed_over) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for run in 1..=runs {
        stage.settle()?;
        let host = stage.cluster.host(&stage.cluster.coordinator()?)?;
        let client = survivor(&stage)?;
        let cut = host.power_off()?;
        write_until_acknowledged(&client)?;
        lost.push(cut.at.elapsed());
        host.power_on()?;
        stage.settle()?;

        let host = stage.cluster.host(&stage.cluster.coordinator()?)?;
        let longest = longest_write(survivor(&stage)?, || host.stop_service())?;
        stopped.push(longest);
        host.start_service()?;
        stage.settle()?;

        let client = survivor(&stage)?;
        let mut took = Duration::ZERO;
        let meanwhile = longest_write(client.clone(), || {
            let from = Instant::now();
            client.hand_over(None)?;
            took = from.elapsed();
            Ok(())
        })?;
        asked.push(took);
        handed_over.push(meanwhile);
        let lost = lost.last().copied().unwrap_or_default();
        eprintln!("run {run}: lost {lost:?}, stopped in order {longest:?}, handed over in {took:?}, {meanwhile:?}");
    }
    rows.push(Row::millis("coordinator's power cut: first acknowledged write", &lost));
    rows.push(Row::millis("coordinator stopped in order: longest write meanwhile", &stopped));
    rows.push(Row::millis("hand-over that is asked for, until it is answered", &asked));
    rows.push(Row::millis("hand-over that is asked for: longest write meanwhile", &handed_over));
    Ok(rows)
}

fn survivor(stage: &Stage) -> Result<ApiClient> {
    Ok(stage.cluster.client(stage.cluster.followers()?.first().context("no followers")?))
}

/// One small write: another metric for a network that nothing uses it for.
fn write(client: &ApiClient, number: usize) -> Result<Duration> {
    let set = SetNetwork { metric: Some(100 + (number % 1000) as u32), ..SetNetwork::default() };
    let from = Instant::now();
    client.set_network(&Network::Storage.to_string(), &set)?;
    Ok(from.elapsed())
}

fn write_until_acknowledged(client: &ApiClient) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while let Err(error) = write(client, 0) {
        ensure!(Instant::now() < until, "no write was acknowledged: {error:#}");
    }
    Ok(())
}

/// Writes a second of many clients.
fn together(stage: &Stage) -> Result<f64> {
    let client = stage.cluster.client(&stage.cluster.coordinator()?);
    let from = Instant::now();
    thread::scope(|scope| {
        let writers: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let client = client.clone();
                scope.spawn(move || (0..WRITES_EACH).try_for_each(|number| write(&client, number).map(drop)))
            })
            .collect();
        writers.into_iter().try_for_each(|writer| writer.join().map_err(|_| anyhow!("a writer panicked"))?)
    })?;
    Ok((CLIENTS * WRITES_EACH) as f64 / from.elapsed().as_secs_f64())
}

/// The longest that a write took from shortly before something happened until
/// shortly after it was done.
fn longest_write(client: ApiClient, happens: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let stop = Arc::new(AtomicBool::new(false));
    let (told, warm) = std::sync::mpsc::channel();
    let stopped = Arc::clone(&stop);
    let writer = thread::spawn(move || -> Result<Duration> {
        let mut longest = Duration::ZERO;
        let mut since = Instant::now();
        let mut written = 0;
        while !stopped.load(Ordering::Relaxed) {
            match write(&client, written) {
                Ok(_) => {
                    longest = longest.max(since.elapsed());
                    since = Instant::now();
                    written += 1;
                }
                Err(error) => ensure!(since.elapsed() < PATIENCE, "no write was acknowledged: {error:#}"),
            }
            if written == WARM {
                let _ = told.send(());
            }
        }
        Ok(longest)
    });
    warm.recv_timeout(PATIENCE).context("the writer did not write")?;
    let done = happens();
    stop.store(true, Ordering::Relaxed);
    let longest = writer.join().map_err(|_| anyhow!("the writer panicked"))?;
    done?;
    longest
}
