//! The volume server is killed under a guest that writes a record and flushes, one after
//! the other.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use holdfast_api::ProfileName;
use holdfast_lab::cluster::VmTemplate;

use crate::bench::stage::{PATIENCE, Stage};
use crate::bench::table::Row;

const LUN: &str = "san";
const LUN_BYTES: u64 = 480 << 20;
const DISK_BYTES: u64 = 16 << 20;
const WRITE_EVERY: Duration = Duration::from_millis(1);
/// Records before and after each death.
const RECORDS: u64 = 50;
/// One that dies within a second of its start is taken for one that cannot live, and is
/// not started again at once: each lives longer than that.
const LIVES: Duration = Duration::from_millis(1500);
/// The longest stall, in milliseconds.
const STALL_MS: f64 = 100.0;

/// Kills it `runs` times.
///
/// # Errors
/// When the cluster cannot be formed, or the guest does not go on.
pub fn run(binary: &Path, runs: usize) -> Result<Vec<Row>> {
    let stage = Stage::form(binary, ProfileName::Default)?;
    let cluster = &stage.cluster;
    cluster.add_lun(LUN, LUN_BYTES)?;
    stage.settle()?;
    let vm = cluster.create_vm(&VmTemplate::new("bench", 101).memory(192 << 20).disk(LUN, DISK_BYTES))?;
    let home = cluster.node_of(&vm.name)?;
    let writer = vm.writer(WRITE_EVERY)?;
    let mut stalls = Vec::new();
    for run in 1..=runs {
        writer.wait_more(RECORDS, PATIENCE)?;
        let before = cluster.volume_server_pid(&home)?;
        writer.recent_gap();
        cluster.kill_volume_server(&home)?;
        writer.wait_more(RECORDS, PATIENCE)?;
        let stall = writer.recent_gap();
        eprintln!("volume server killed, run {run}: {} ms", stall.as_millis());
        stalls.push(stall);
        cluster.wait("another volume server", PATIENCE, |_| {
            cluster.volume_server_pid(&home).ok().filter(|pid| *pid != before)
        })?;
        std::thread::sleep(LIVES);
        stage.settle()?;
    }
    let report = writer.stop()?;
    Ok(vec![
        Row::millis("volume server killed, one writer: longest stall", &stalls).worst_goal(STALL_MS),
        Row::of("volume server killed: errors that the guest saw", &[report.refused as f64]).worst_goal(0.0),
    ])
}
