//! `bench volume`: the volume server beside `qemu-storage-daemon`, which serves the
//! same file over NBD, beside the file itself, and disks on a LUN beside disks that
//! are files. `qemu-img bench` asks, for as many requests as fit into a second or so.
//!
//! Who comes first changes from run to run, so that a machine that becomes slower
//! is unfair to nobody. Figures are requests a second, or MiB a second.
//!
//! Parts that need a cluster in the lab are asked for by name: how long a guest stands
//! still when its volume server is killed, and when its node's path fails.

mod killed;
mod target;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use self::target::{Kind, Target};
use super::table::Row;
use crate::step::{Step, minutes};
use crate::{cuts, root};

/// Size of the disks.
const DISK_BYTES: u64 = 1 << 30;
/// A distance between requests that leads over the whole disk, every block once.
const STRIDE_BYTES: u64 = 100_003 * 4096;
const MIB: u64 = 1 << 20;

/// One way of asking.
#[derive(Clone, Copy)]
pub struct Load {
    name: &'static str,
    bytes: u64,
    stride: u64,
    depth: u32,
    writes: bool,
    requests: u64,
}

const fn random(name: &'static str, depth: u32, writes: bool, requests: u64) -> Load {
    Load { name, bytes: 4096, stride: STRIDE_BYTES, depth, writes, requests }
}

const fn sequential(name: &'static str, writes: bool) -> Load {
    Load { name, bytes: MIB, stride: MIB, depth: 8, writes, requests: DISK_BYTES / MIB }
}

const LOADS: [Load; 6] = [
    random("4 KiB random reads, depth 1", 1, false, 10_000),
    random("4 KiB random writes, depth 1", 1, true, 10_000),
    random("4 KiB random reads, depth 32", 32, false, 60_000),
    random("4 KiB random writes, depth 32", 32, true, 60_000),
    sequential("1 MiB sequential reads, depth 8", false),
    sequential("1 MiB sequential writes, depth 8", true),
];

/// What the server reaches at least of what `qemu-storage-daemon` does, a disk on a
/// LUN of what one that is a file does, and its first write of that of a new file.
const OF_PEER: f64 = 1.0;
const OF_FILE: f64 = 0.95;
const FIRST_WRITE: f64 = 0.8;
/// A LUN of so many slabs of 16 MiB is read, as before an import, within so many
/// milliseconds.
const SLABS: u64 = 100_000;
const READ_MS: f64 = 5000.0;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Every load, on a file and on a LUN.
    Io,
    /// The first write to a disk.
    First,
    /// Reading what stands on a LUN of 100,000 slabs.
    Description,
    /// The volume server is killed under a guest.
    Killed,
    /// A node's path is cut under a guest: as often as there are runs.
    Cuts,
}

/// What is measured when nothing is named: all that needs no cluster.
const ALONE: [Part; 3] = [Part::Io, Part::First, Part::Description];

/// Measures `parts`, all that need no cluster if none is named, `runs` times each.
/// `binary` says where the program is, for those that need one.
///
/// # Errors
/// When something cannot be built or started, or a request fails.
pub fn run(parts: &[Part], runs: usize, binary: impl Fn() -> Result<PathBuf>) -> Result<Vec<Row>> {
    let parts = if parts.is_empty() { &ALONE } else { parts };
    let dir = tempfile::tempdir_in(root().join("target")).context("a directory for the disks")?;
    let alone = parts.iter().any(|part| ALONE.contains(part));
    let server = if alone { build()? } else { PathBuf::new() };
    let mut rows = Vec::new();
    for part in parts {
        rows.extend(match part {
            Part::Io => io(&server, dir.path(), runs)?,
            Part::First => vec![first(&server, dir.path(), runs)?],
            Part::Description => vec![description(&server, &dir.path().join("described"), runs)?],
            Part::Killed => killed::run(&binary()?, runs)?,
            Part::Cuts => cuts::measure(&binary()?, u32::try_from(runs)?, 1)?,
        });
    }
    Ok(rows)
}

fn io(server: &Path, dir: &Path, runs: usize) -> Result<Vec<Row>> {
    let disk = dir.join("disk");
    // Written to once: what a file system does at a first write is another story.
    let block: Vec<u8> = (0..MIB as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let file = fs::File::create(&disk).context("the disk")?;
    (0..DISK_BYTES / MIB).try_for_each(|_| std::io::Write::write_all(&mut &file, &block)).context("the disk")?;
    file.sync_all().context("the disk")?;

    let ours = Target::start(Kind::File, server, &disk)?;
    let peer = Target::start(Kind::Peer, server, &disk)?;
    let raw = Target::start(Kind::Raw, server, &disk)?;
    let lun = Target::start(Kind::Lun, server, &dir.join("lun"))?;
    lun.ask(&sequential("", true))?;
    let targets = [&ours, &peer, &raw, &lun];

    let mut rows = Vec::new();
    for load in &LOADS {
        let mut samples: [Vec<f64>; 4] = Default::default();
        for run in 0..runs {
            for turn in 0..targets.len() {
                let which = (run + turn) % targets.len();
                samples[which].push(targets[which].ask(load)?);
            }
        }
        let [file, peer, raw, lun] = samples;
        let row = |what: &str, samples: &[f64]| Row::of(format!("{}: {what}, {}", load.name, load.unit()), samples);
        rows.push(row("a file beside qemu-storage-daemon", &file).beside(&peer).at_least(OF_PEER));
        rows.push(row("a file beside itself without a server", &file).beside(&raw));
        rows.push(row("a LUN beside a file", &lun).beside(&file).at_least(OF_FILE));
        eprintln!("{}: done", load.name);
    }

    Ok(rows)
}

fn first(server: &Path, dir: &Path, runs: usize) -> Result<Row> {
    let (mut first, mut of_file) = (Vec::new(), Vec::new());
    for run in 0..runs {
        for turn in 0..2 {
            let (kind, samples) =
                if (run + turn) % 2 == 0 { (Kind::Lun, &mut first) } else { (Kind::File, &mut of_file) };
            let fresh = dir.join("fresh");
            let target = Target::start(kind, server, &fresh)?;
            samples.push(target.ask(&sequential("", true))?);
            drop(target);
            fs::remove_file(&fresh).context("removing a disk")?;
        }
    }
    let name = "1 MiB sequential first writes, depth 8: a LUN beside a new file, MiB/s";
    Ok(Row::of(name, &first).beside(&of_file).at_least(FIRST_WRITE))
}

/// Reads what stands on a LUN whose files are in as many pieces as can be.
fn description(server: &Path, lun: &Path, runs: usize) -> Result<Row> {
    // Nothing is written to most of it.
    fs::File::create(lun).and_then(|file| file.set_len((SLABS + 16) * (16 << 20))).context("a LUN")?;
    let slabs = SLABS.to_string();
    let made = Command::new(server).arg("pieces").arg(lun).arg(&slabs).status().context("the volume server")?;
    ensure!(made.success(), "the LUN could not be described");
    let mut samples = Vec::new();
    for _ in 0..runs {
        let began = Instant::now();
        let read = Command::new(server).arg("read").arg(lun).output().context("the volume server")?;
        samples.push(began.elapsed());
        ensure!(String::from_utf8_lossy(&read.stdout).trim() == slabs, "what stands on the LUN was not read");
    }
    let name = format!("reading a LUN's description, {SLABS} slabs in as many pieces");
    Ok(Row::millis(&name, &samples).goal(READ_MS))
}

impl Load {
    fn unit(&self) -> &'static str {
        if self.bytes == MIB { "MiB/s" } else { "requests/s" }
    }
}

fn build() -> Result<PathBuf> {
    let args = ["build", "--release", "-p", "holdfast-volume", "--bin", "serve-disks"];
    let built = Step::cargo("the volume server", &args).within(minutes(30)).run()?;
    ensure!(built.passed(), "the server could not be built: {}", built.failure.unwrap_or_default());
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    Ok(root().join(target).join("release/serve-disks"))
}
