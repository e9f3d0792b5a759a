//! What must hold once all faults are over.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_api::{JobState, SwitchView, VmState};

use super::Chaos;
use super::work::Written;

/// Everything must be in order again within this: several guests boot at once, on
/// two busy processors, without KVM.
pub const BOUND: Duration = Duration::from_secs(90);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A VM whose QEMU was killed too often stays off and says so; a person starts it.
const FAILED_IS_FAIR: &str = "crash";

impl Chaos {
    /// Judges the cluster after a round.
    pub fn judge(&self, written: &Written, spare: Option<&str>) -> Result<()> {
        let cluster = &self.cluster;
        ensure!(written.wrong.is_empty(), "answers that no fault explains: {:?}", written.wrong);
        cluster.wait_ready(BOUND)?;
        for vm in &self.vms {
            let view = cluster.wait_vm(&vm.name, BOUND, |vm| matches!(vm.state, VmState::Running | VmState::Failed))?;
            if view.state == VmState::Failed {
                let why = view.hold.unwrap_or_default();
                ensure!(why.contains(FAILED_IS_FAIR), "VM {} stays off: {why}", vm.name);
                let job = cluster.any()?.start_vm(&vm.name)?;
                cluster.job_done(&job, BOUND)?;
            }
            vm.wait_answer(BOUND).with_context(|| format!("VM {} does not answer", vm.name))?;
        }
        let running = |job: &holdfast_api::JobView| job.state == JobState::Running;
        cluster
            .wait("the end of every job", BOUND, |client| (!client.jobs().ok()?.iter().any(running)).then_some(()))?;
        self.judge_writes(written)?;
        if let Some(spare) = spare {
            self.remove_spare(spare)?;
        }
        self.nothing_left_behind()?;
        let overlaps = cluster.watch().overlaps()?;
        let here = overlaps.iter().filter(|overlap| self.vms.iter().any(|vm| vm.id == overlap.newer.vm));
        ensure!(here.count() == 0, "a VM ran twice at one time: {overlaps:#?}");
        Ok(())
    }

    /// Every node has every write that was acknowledged, each once.
    fn judge_writes(&self, written: &Written) -> Result<()> {
        let mut all = BTreeSet::new();
        for node in &self.nodes {
            self.cluster
                .wait_on(node, "the writes that were acknowledged", BOUND, |client| {
                    let switches: Vec<SwitchView> = client.get("/api/v1/switches").ok()?;
                    let names: Vec<String> = switches.into_iter().map(|switch| switch.name).collect();
                    let distinct: BTreeSet<String> = names.iter().cloned().collect();
                    (names.len() == distinct.len() && written.acknowledged.is_subset(&distinct))
                        .then(|| all.extend(distinct))
                })
                .with_context(|| format!("acknowledged: {:?}", written.acknowledged))?;
        }
        // Gone again, those of which nobody knew as well.
        for name in all.iter().filter(|name| name.starts_with('c')) {
            self.cluster.wait(&format!("switch {name} removed"), BOUND, |client| {
                match client.delete(&format!("/api/v1/switches/{name}")) {
                    Ok(()) => Some(()),
                    Err(error) if error.code() == "not_found" => Some(()),
                    Err(_) => None,
                }
            })?;
        }
        Ok(())
    }

    fn remove_spare(&self, name: &str) -> Result<()> {
        let api = self.cluster.any()?;
        match api.delete_vm(name) {
            Ok(job) => drop(self.cluster.job_done(&job, BOUND)?),
            Err(error) if error.code() == "not_found" => {}
            Err(error) => bail!("VM {name} cannot be deleted: {error}"),
        }
        Ok(())
    }

    /// Each node has the QEMUs and taps of the VMs that it runs, and no others;
    /// the volume has the directories of the VMs that there are.
    fn nothing_left_behind(&self) -> Result<()> {
        let until = Instant::now() + BOUND;
        loop {
            let left = self.left_behind()?;
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < until, "left behind: {left:?}");
            thread::sleep(LOOK_EVERY);
        }
    }

    fn left_behind(&self) -> Result<Vec<String>> {
        let vms = self.cluster.any()?.vms()?;
        let mut left = Vec::new();
        for node in &self.nodes {
            let host = self.cluster.host(node)?;
            let expected = vms.iter().filter(|vm| vm.node.as_ref() == Some(node)).count();
            let qemus = host.processes().into_iter().filter(|process| {
                process.is_alive() && process.argv.first().is_some_and(|program| program.contains("qemu-system"))
            });
            let qemus = qemus.count();
            let links = String::from_utf8(host.exec(&["ip", "-o", "tuntap", "show"])?.stdout)?;
            let taps = links.lines().count();
            if (qemus, taps) != (expected, expected) {
                left.push(format!("{node}: {qemus} QEMUs and {taps} taps for {expected} VMs"));
            }
        }
        let directories = fs::read_dir(self.cluster.on_volume("vms"))?.flatten().count();
        if directories != vms.len() {
            left.push(format!("the volume: {directories} directories for {} VMs", vms.len()));
        }
        Ok(left)
    }
}
