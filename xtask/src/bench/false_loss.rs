//! `bench false-loss`: a busy machine must not look dead.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use holdfast_api::ProfileName;
use holdfast_lab::CpuHogs;
use holdfast_lab::guest::Prober;

use super::events::is_loss;
use super::stage::Stage;
use super::table::Row;

/// Saturates every processor for so long, and counts the nodes that were declared lost.
///
/// # Errors
/// When the cluster cannot be formed, or is no cluster any more at the end.
pub fn run(binary: &Path, length: Duration) -> Result<Vec<Row>> {
    let stage = Stage::form(binary, ProfileName::Default)?;
    let vm = stage.guest("bench", 100)?;
    let prober = Prober::start(Some(&vm.netns), vm.address(), Duration::from_millis(50))?;
    let cores = thread::available_parallelism()?.get();
    let (before, term) = (stage.events.last(), stage.term()?);
    let hogs = CpuHogs::start(cores)?;
    let until = Instant::now() + length;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        thread::sleep(left.min(Duration::from_secs(60)));
        eprintln!("{} s left, {} events so far", left.as_secs(), stage.events.since(before).len());
    }
    drop(hogs);
    let told = stage.events.since(before);
    for told in &told {
        eprintln!("{}: {}", told.event.subject, told.event.text);
    }
    let losses = told.iter().filter(|told| is_loss(&told.event)).count();
    let terms = stage.term()?.saturating_sub(term);
    let gap = prober.stop().longest_gap().map(|gap| gap.length).unwrap_or_default();
    let name = format!("nodes declared lost in {} min with {cores} of {cores} cores busy", length.as_secs() / 60);
    Ok(vec![
        Row::of(name, &[losses as f64]).worst_goal(0.0),
        Row::of("elections", &[terms as f64]),
        Row::of("two QEMUs of one VM alive together", &[stage.overlaps()?]).worst_goal(0.0),
        Row::millis("longest time without an answer of the guest", &[gap]),
    ])
}
