//! `holdfast demo`: a cluster of three nodes on this machine, a live migration
//! under load, a pulled plug, and what users of the VMs saw of it.
//!
//! The nodes are hosts of the lab: namespaces with cables to pull. What runs on
//! them is this same binary, with real QEMUs; everything is done over the API and
//! seen from outside, as a user of the cluster or of a guest would.

mod figures;
mod interrupt;
mod keep;
mod loss;
mod migration;
mod narrator;

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_lab::cluster::{Cluster, ClusterSpec, GuestVm, VmTemplate};
use holdfast_lab::guest::Writer;
use nix::unistd::Uid;

use crate::cli::args::DemoArgs;
use figures::{Figures, milliseconds};
use interrupt::{Interrupted, Interruption};
use narrator::Narrator;

/// Names the directory of the tiny guest, where it is not found by itself.
const GUEST: &str = "HOLDFAST_GUEST";
/// How long a VM may take until its guest answers, on a busy machine.
const BOOT: Duration = Duration::from_secs(60);
/// Between two records that a guest is asked to write.
const WRITE_EVERY: Duration = Duration::from_millis(5);

/// The VMs: name, last byte of the guest's address, whether it is kept writing.
const VMS: [(&str, u8, bool); 4] = [("web", 101, true), ("db", 102, true), ("mail", 103, false), ("files", 104, false)];

/// Runs the demo. Fails when a record was lost or a VM ran twice at one time, and
/// whenever the story could not be told to its end.
pub fn main(args: DemoArgs) -> ExitCode {
    let interruption = Interruption::default();
    let teller = interruption.clone();
    let told = interrupt::watching(&interruption, move || Story::new(teller, args)?.tell());
    match told {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("holdfast: the demo was interrupted; nothing of it is left");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("holdfast: the demo broke off: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A VM of the demo, and what writes to its disk.
struct Actor {
    vm: GuestVm,
    writer: Option<Writer>,
}

/// What the whole story needs.
struct Story {
    narrator: Narrator,
    interruption: Interruption,
    json: Option<PathBuf>,
    keep: bool,
    spec: ClusterSpec,
}

impl Story {
    /// Looks whether everything is there before anything is built.
    fn new(interruption: Interruption, args: DemoArgs) -> Result<Self> {
        ensure!(
            Uid::effective().is_root(),
            "the demo builds hosts from network namespaces, which needs root: run it with sudo"
        );
        for program in ["qemu-system-x86_64", "qemu-img", "ip", "nft"] {
            ensure!(
                is_installed(program),
                "{program} is not installed: apt-get install qemu-system-x86 qemu-utils iproute2 nftables"
            );
        }
        if let Some(file) = &args.json {
            is_writable(file)?;
        }
        let binary = std::env::current_exe().context("looking for this program")?;
        let guest = guest_directory(&binary)?;
        let spec = ClusterSpec::new(&binary, guest)?;
        Ok(Self { narrator: Narrator::new(), interruption, json: args.json, keep: args.keep, spec })
    }

    /// Tells the story; false when a record was lost or a VM ran twice.
    fn tell(self) -> Result<bool> {
        let mut figures = Figures::default();
        self.narrator.say("Holdfast: three hosts become one cluster of virtual machines, on this machine.");
        let cluster = self.form(&mut figures)?;
        let mut actors = self.boot(&cluster, &mut figures)?;
        figures.migration = self.migrate(&cluster, &actors)?;
        figures.failover = self.pull_the_plug(&cluster, &actors)?;
        self.count_records(&cluster, &mut actors, &mut figures)?;
        self.narrator.figures(&figures);
        if let Some(file) = &self.json {
            figures.write(file)?;
            self.narrator.say(&format!("The figures are in {}.", file.display()));
        }
        if self.keep {
            self.leave_up(&cluster, &actors)?;
        }
        let clearing = self.narrator.begin("clearing up: hosts, namespaces, disks");
        drop((actors, cluster));
        clearing.done("nothing is left of it");
        Ok(figures.is_sound())
    }

    /// The first act: hosts, a cluster, networks, a volume, a switch.
    fn form(&self, figures: &mut Figures) -> Result<Cluster> {
        self.narrator.act("A cluster");
        let step = self.narrator.begin("powering on three hosts; the first founds the cluster, the others join");
        let cluster = Cluster::form(self.spec.clone())?;
        self.interruption.check()?;
        let times = cluster.times();
        let client = cluster.any()?;
        let nodes = client.nodes()?;
        figures.nodes = nodes.len();
        figures.cluster_ready_ms = milliseconds(times.ready);
        figures.accelerator = nodes.first().map(|node| node.accelerator.clone()).unwrap_or_default();
        step.done(&format!(
            "{} nodes are up and voting, {:.1} s after power-on",
            nodes.len(),
            times.ready.as_secs_f64()
        ));
        let qemu = nodes.first().and_then(|node| node.qemu.clone()).unwrap_or_default();
        self.narrator.tell(&format!(
            "{} coordinates; QEMU {qemu} with {}; volume {} and switch {} on every node",
            cluster.coordinator()?,
            figures.accelerator,
            holdfast_lab::cluster::VOLUME,
            holdfast_lab::cluster::SWITCH,
        ));
        let networks = client.networks()?;
        let names: Vec<String> =
            networks.iter().map(|network| format!("{} {}", network.name, network.subnet)).collect();
        self.narrator.tell(&format!("networks: {}; production carries the guests", names.join(", ")));
        Ok(cluster)
    }

    /// The second act: VMs boot, two of them are kept writing.
    fn boot(&self, cluster: &Cluster, figures: &mut Figures) -> Result<Vec<Actor>> {
        self.narrator.act("Virtual machines");
        let mut vms = Vec::new();
        for (name, last, _) in VMS {
            let step = self.narrator.begin(&format!("creating and booting {name}"));
            let asked = Instant::now();
            let vm = cluster.create_vm_unawaited(&VmTemplate::new(name, last))?;
            let started = cluster.watch().wait_started(&vm.id, asked, BOOT)?;
            vm.wait_answer(BOOT)?;
            let boot = started.first_seen.elapsed();
            // The first has the machine to itself: the boot that others are held against.
            if vms.is_empty() {
                figures.vm_boot_ms = milliseconds(boot);
            }
            step.done(&format!("{name} answers at {}, {:.1} s after its QEMU started", vm.ip, boot.as_secs_f64()));
            vms.push(vm);
            self.interruption.check()?;
        }
        figures.vms = vms.len();
        let mut actors = Vec::new();
        for (vm, (_, _, writes)) in vms.into_iter().zip(VMS) {
            let writer = writes.then(|| vm.writer(WRITE_EVERY)).transpose()?;
            actors.push(Actor { vm, writer });
        }
        self.narrator.tell(&self.whereabouts(cluster)?);
        Ok(actors)
    }

    /// Which VM is where, in a line.
    fn whereabouts(&self, cluster: &Cluster) -> Result<String> {
        let vms = cluster.any()?.vms()?;
        let places: Vec<String> =
            vms.iter().map(|vm| format!("{} on {}", vm.name, vm.node.as_deref().unwrap_or("no node"))).collect();
        Ok(places.join(", "))
    }

    /// Every record that was acknowledged has to be on its disk.
    fn count_records(&self, cluster: &Cluster, actors: &mut [Actor], figures: &mut Figures) -> Result<()> {
        self.narrator.act("The records");
        let step = self.narrator.begin("switching the writing VMs off and reading their disks");
        let mut acknowledged = 0;
        for actor in actors.iter_mut() {
            self.interruption.check()?;
            let Some(writer) = actor.writer.take() else { continue };
            let report = writer.stop()?;
            cluster.switch_off(&actor.vm.name)?;
            let disk = actor.vm.verify()?;
            acknowledged += report.acknowledged.len();
            figures.failover.lost_records += disk.lost(&report.acknowledged).len();
            ensure!(
                disk.corrupt_sectors.is_empty(),
                "the disk of {} holds {} sectors that are no records",
                actor.vm.name,
                disk.corrupt_sectors.len()
            );
        }
        figures.split_brain = !cluster.watch().overlaps()?.is_empty();
        let lost = figures.failover.lost_records;
        step.done(&format!("{acknowledged} records were acknowledged as durable, {lost} of them are lost"));
        self.narrator.tell(match figures.split_brain {
            false => "no VM was ever seen running twice at one time",
            true => "A VM WAS SEEN RUNNING TWICE AT ONE TIME",
        });
        Ok(())
    }
}

/// The tiny guest: where the environment says, below the working directory, or
/// below the checkout that this program was built in.
fn guest_directory(binary: &Path) -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os(GUEST) {
        return Ok(directory.into());
    }
    let checkouts = std::iter::once(Path::new(".")).chain(binary.ancestors().skip(1));
    let mut places = checkouts.map(|checkout| checkout.join("out/guest"));
    match places.find(|place| place.join("initrd.cpio").is_file()) {
        Some(place) => Ok(place),
        None => bail!("the tiny guest is not built: run `make guest`, or name its directory in {GUEST}"),
    }
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Finds out before the demo, not after it, that its figures cannot be written.
fn is_writable(file: &Path) -> Result<()> {
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(parent.is_dir(), "{} cannot be written: there is no directory {}", file.display(), parent.display());
    match File::options().write(true).open(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be written", file.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_cannot_be_written_are_refused_before_the_demo() {
        let directory = tempfile::tempdir().unwrap();
        assert!(is_writable(&directory.path().join("new.json")).is_ok());
        assert!(is_writable(directory.path()).is_err());
        let error = is_writable(&directory.path().join("missing/out.json")).unwrap_err();
        assert!(error.to_string().contains("there is no directory"), "{error}");
    }

    #[test]
    fn the_guest_is_found_below_the_checkout_of_the_program() {
        let checkout = tempfile::tempdir().unwrap();
        let guest = checkout.path().join("out/guest");
        std::fs::create_dir_all(&guest).unwrap();
        std::fs::write(guest.join("initrd.cpio"), "").unwrap();
        let found = guest_directory(&checkout.path().join("target/release/holdfast"));
        // The working directory of tests may be below a checkout with a guest of its own.
        assert!(found.is_ok_and(|found| found == guest || found == Path::new("./out/guest")));
    }
}
