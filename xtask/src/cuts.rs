//! `cargo xtask cuts`: a node's path to a LUN is cut and healed, at random and again and
//! again, under a guest that writes records with a flush after each.
//!
//! ```text
//!  records ─ cut ─ hold ─ [owner killed] ─ records ─ heal ─ direct again ─ records ─┐
//!     ▲                                                                            │
//!     └────────────────────────────────────────────────────────────────────────────┘
//! ```
//! A cut is an error at once (what serves the LUN to this node dies) or silence (the cable
//! is pulled). In some of them the volume's owner is killed, its volume server or its host.
//! The guest must see no error, and everything that it acknowledged must be on the LUN.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use holdfast_api::{AddVolume, PathState, VolumeView};
use holdfast_lab::cluster::{ApiClient, Cluster, ClusterSpec, VmTemplate};
use holdfast_lab::guest::Writer;
use holdfast_lab::{Network, San, records_on};

use crate::bench::table::{self, Row};
use crate::dice::{Dice, Drawn};
use crate::root;

const LUN: &str = "san";
const LUN_BYTES: u64 = 480 << 20;
const SLAB_BYTES: u64 = 16 << 20;
/// So small that the ring of records comes round: what is written late to a place that
/// was written to again since shows as well.
const DISK_BYTES: u64 = 256 << 10;
/// So often that a cut mostly finds a write under way.
const WRITE_EVERY: Duration = Duration::from_millis(1);
/// Whatever takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest stall where the error is immediate and nobody dies, in milliseconds.
const STALL_MS: f64 = 1000.0;

/// The options of `cargo xtask cuts`.
#[derive(Debug, Parser)]
pub struct Args {
    /// How many cuts.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    #[command(flatten)]
    drawn: Drawn,
}

/// Runs them; false when something was lost, an error was seen, or a goal was missed.
///
/// # Errors
/// When the cluster cannot be built, or does not come back after a cut.
pub fn run(args: &Args) -> Result<bool> {
    let (binary, seed) = (args.drawn.binary()?, args.drawn.seed()?);
    eprintln!("seed {seed}: `cargo xtask cuts --count {} --seed {seed}` draws the same cuts", args.count);
    let rows = measure(&binary, args.count, seed)?;
    println!("\n{}", table::table(&rows));
    if let Some(file) = &args.drawn.json {
        table::write_json(&rows, file)?;
    }
    Ok(rows.iter().all(|row| row.met != Some(false)))
}

/// How a path ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Error,
    Silence,
}

/// Who dies while the path is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Killed {
    Nobody,
    Server,
    Host,
}

/// One cut and its end.
#[derive(Debug, Clone, Copy)]
struct Cut {
    kind: Kind,
    killed: Killed,
    /// From the cut until the owner is killed.
    kill_after: Duration,
    /// From there until the path is healed, if the guest has written meanwhile.
    hold: Duration,
    /// It is healed even if it has not.
    hasty: bool,
}

impl Cut {
    fn draw(dice: &mut Dice) -> Cut {
        let kind = if dice.one_in(3) { Kind::Silence } else { Kind::Error };
        let killed = match dice.between(0, 9) {
            0 => Killed::Host,
            1 | 2 => Killed::Server,
            _ => Killed::Nobody,
        };
        Cut {
            kind,
            killed,
            kill_after: Duration::from_millis(dice.between(0, 1500)),
            hold: Duration::from_millis(dice.between(0, 1500)),
            hasty: dice.one_in(3),
        }
    }

    fn name(&self) -> String {
        let kind = match self.kind {
            Kind::Error => "a path fails at once",
            Kind::Silence => "a cable is pulled",
        };
        let killed = match self.killed {
            Killed::Nobody => "",
            Killed::Server => ", the owner's volume server is killed",
            Killed::Host => ", the owner's host is killed",
        };
        format!("{kind}{killed}: longest stall of each cut")
    }

    fn has_goal(&self) -> bool {
        (self.kind, self.killed) == (Kind::Error, Killed::Nobody)
    }
}

/// Cuts and heals so often; the rows tell of the stalls by what was done, and of what was
/// lost.
///
/// # Errors
/// When the cluster cannot be built, or does not come back after a cut.
pub fn measure(binary: &Path, count: u32, seed: u64) -> Result<Vec<Row>> {
    let mut spec = ClusterSpec::new(binary, root().join("out/guest"))?;
    spec.nodes = 3;
    let scene = Scene::build(spec)?;
    let vm = scene.cluster.create_vm(&VmTemplate::new("web", 101).memory(192 << 20).disk(LUN, DISK_BYTES))?;
    let boot = vm.wait_answer(PATIENCE)?.boot_id;
    let writer = vm.writer(WRITE_EVERY)?;
    writer.wait_more(50, PATIENCE)?;
    let mut dice = Dice::new(seed);
    let mut stalls = BTreeMap::<_, (Cut, Vec<Duration>)>::new();
    for number in 1..=count {
        let cut = Cut::draw(&mut dice);
        let stall =
            scene.cut(&writer, cut).with_context(|| format!("cut {number}, {cut:?}\n{}", scene.cluster.diagnosis()))?;
        eprintln!("cut {number}: {:?}, killed {:?}: {} ms", cut.kind, cut.killed, stall.as_millis());
        stalls.entry((cut.kind, cut.killed)).or_insert((cut, Vec::new())).1.push(stall);
    }
    let again = vm.wait_answer(PATIENCE)?.boot_id != boot;
    let report = writer.stop()?;
    scene.cluster.switch_off("web")?;
    let image = scene.cluster.lab().directory().join("web.raw");
    let found = records_on(scene.san.file(), SLAB_BYTES, &image)?;
    let lost = found.lost(&report.acknowledged).len() + found.missing.len() + found.corrupt_sectors.len();
    let mut rows: Vec<Row> = stalls
        .values()
        .map(|(cut, stalls)| {
            let row = Row::millis(&cut.name(), stalls);
            if cut.has_goal() { row.worst_goal(STALL_MS) } else { row }
        })
        .collect();
    rows.push(Row::of("records acknowledged", &[report.acknowledged.len() as f64]));
    rows.push(Row::of("errors that the guest saw", &[report.refused as f64]).worst_goal(0.0));
    rows.push(Row::of("records lost or out of order", &[lost as f64]).worst_goal(0.0));
    rows.push(Row::of("the guest booted anew", &[f64::from(u8::from(again))]).worst_goal(0.0));
    Ok(rows)
}

/// A cluster with a volume on a SAN's LUN.
struct Scene {
    // Before the cluster: its servers are in the lab's namespaces.
    san: San,
    cluster: Cluster,
}

impl Scene {
    fn build(spec: ClusterSpec) -> Result<Scene> {
        let cluster = Cluster::form(spec)?;
        let san = San::start(cluster.lab(), &cluster.lab().directory().join("lun"), LUN_BYTES)?;
        let request = AddVolume { name: LUN.into(), directory: None, lun: Some(san.lun()), erase: None };
        cluster.wait("the LUN is a volume", PATIENCE, |client| client.add_volume(&request).ok())?;
        let scene = Scene { san, cluster };
        scene.cluster.wait_ready(PATIENCE)?;
        scene.wait_direct()?;
        Ok(scene)
    }

    /// Cuts the path of the VM's node, and heals it; the longest stall meanwhile.
    fn cut(&self, writer: &Writer, cut: Cut) -> Result<Duration> {
        let cluster = &self.cluster;
        let home = cluster.node_of("web")?;
        let owner = cluster.wait("an owner", PATIENCE, |client| owner_of(&volume(client)?))?;
        if cut.killed != Killed::Nobody && owner == home {
            // Who dies is to be another than the VM's node.
            let other = cluster.hosts().iter().map(|host| host.name().to_owned()).find(|name| *name != home);
            let other = other.context("a cluster of one node")?;
            cluster.any()?.set_owner(LUN, &other)?;
            cluster.wait("another owner", PATIENCE, |client| owner_is(client, &other))?;
        }
        let owner = cluster.wait("an owner", PATIENCE, |client| owner_of(&volume(client)?))?;
        writer.wait_more(20, PATIENCE)?;
        writer.recent_gap();

        let fabric = cluster.lab().fabric();
        match cut.kind {
            Kind::Error => self.san.fail(&home)?,
            Kind::Silence => fabric.pull(&home, Network::Storage)?,
        }
        std::thread::sleep(cut.kill_after);
        match cut.killed {
            Killed::Nobody => {}
            Killed::Server => cluster.kill_volume_server(&owner)?,
            Killed::Host => drop(cluster.host(&owner)?.power_off()?),
        }
        std::thread::sleep(cut.hold);
        if !cut.hasty {
            writer.wait_more(20, PATIENCE)?;
        }
        match cut.kind {
            Kind::Error => self.san.mend(&home)?,
            Kind::Silence => fabric.plug(&home, Network::Storage)?,
        }
        writer.wait_more(20, PATIENCE)?;
        let dark: Vec<_> = cluster.hosts().into_iter().filter(|host| !host.is_on()).collect();
        for host in dark {
            host.power_on()?;
            cluster.wait_api(host.name(), PATIENCE)?;
        }
        cluster.wait_ready(PATIENCE)?;
        self.wait_direct()?;
        writer.wait_more(20, PATIENCE)?;
        Ok(writer.recent_gap())
    }

    fn wait_direct(&self) -> Result<()> {
        self.cluster.wait("every node's direct path", PATIENCE, |client| {
            let reach = volume(client)?.reach;
            reach.iter().all(|reach| reach.path == Some(PathState::Direct)).then_some(())
        })
    }
}

fn volume(client: &ApiClient) -> Option<VolumeView> {
    client.volumes().ok()?.into_iter().find(|volume| volume.name == LUN)
}

fn owner_of(volume: &VolumeView) -> Option<String> {
    volume.owner.as_ref().filter(|owner| !owner.leaving && owner.next.is_none()).map(|owner| owner.node.clone())
}

fn owner_is(client: &ApiClient, node: &str) -> Option<()> {
    (owner_of(&volume(client)?)? == node).then_some(())
}
