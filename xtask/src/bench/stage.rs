//! What every benchmark stands on: a cluster of three nodes in the lab, built as
//! users build it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use holdfast_api::ProfileName;
use holdfast_lab::cluster::{Cluster, ClusterSpec, GuestVm, VmTemplate};

use super::events::Events;
use crate::root;
use crate::step::{Step, minutes};

/// Whatever takes longer has failed and is no figure.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster and its events as they are told.
pub struct Stage {
    /// The cluster.
    pub cluster: Cluster,
    /// What happens in it.
    pub events: Events,
}

/// Builds what is measured, the program as it is released and the tiny guest, and
/// returns where the program is.
///
/// # Errors
/// When it cannot be built.
pub fn build() -> Result<PathBuf> {
    let guest = Step::new("the tiny guest", root().join("guest/build.sh")).within(minutes(20)).run()?;
    ensure!(guest.passed(), "the tiny guest could not be built: {}", guest.failure.unwrap_or_default());
    let binary = Step::cargo("the released program", &["build", "--release", "-p", "holdfast"]);
    let binary = binary.within(minutes(60)).run()?;
    ensure!(binary.passed(), "the program could not be built: {}", binary.failure.unwrap_or_default());
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    Ok(root().join(target).join("release/holdfast"))
}

impl Stage {
    /// Forms a cluster of three nodes that run `binary`, under a failover profile.
    ///
    /// # Errors
    /// When it cannot be formed: not root, or something is not installed.
    pub fn form(binary: &Path, profile: ProfileName) -> Result<Self> {
        Stage::of(binary, profile, 3)
    }

    /// Forms a cluster of two nodes and a disk witness.
    ///
    /// # Errors
    /// When it cannot be formed, or the witness does not come to vote.
    pub fn pair(binary: &Path, profile: ProfileName) -> Result<Self> {
        let stage = Stage::of(binary, profile, 2)?;
        let disk = stage.cluster.on_volume("witness.disk");
        stage.cluster.any()?.set_witness(&disk.to_string_lossy())?;
        stage.cluster.wait("the witness's vote", PATIENCE, |client| {
            client.witness().ok().filter(|witness| witness.votes && witness.healthy)
        })?;
        stage.settle()?;
        Ok(stage)
    }

    fn of(binary: &Path, profile: ProfileName, nodes: usize) -> Result<Self> {
        let spec = ClusterSpec { nodes, profile, ..ClusterSpec::new(binary, root().join("out/guest"))? };
        let cluster = Cluster::form(spec)?;
        let nodes = cluster.hosts().iter().map(|host| cluster.client(host.name())).collect();
        let events = Events::follow(nodes)?;
        Ok(Stage { cluster, events })
    }

    /// Creates a VM with the guest's address .`last` and waits until it answers.
    ///
    /// # Errors
    /// When a node refuses or it does not come up.
    pub fn guest(&self, name: &str, last: u8) -> Result<GuestVm> {
        self.cluster.create_vm(&VmTemplate::new(name, last))
    }

    /// Switches a VM off and deletes it.
    ///
    /// # Errors
    /// When a node refuses or it takes too long.
    pub fn delete(&self, vm: &GuestVm) -> Result<()> {
        self.cluster.switch_off(&vm.name)?;
        let job = self.cluster.any()?.delete_vm(&vm.name)?;
        self.cluster.job_done(&job, PATIENCE)?;
        Ok(())
    }

    /// Waits until every node is up, votes and reaches the volume.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn settle(&self) -> Result<()> {
        let dark: Vec<_> = self.cluster.hosts().into_iter().filter(|host| !host.is_on()).collect();
        ensure!(dark.is_empty(), "{} hosts have no power", dark.len());
        self.cluster.wait_ready(PATIENCE)
    }

    /// How often two QEMUs of one VM were seen alive together in this cluster; the
    /// watch sees other labs on the machine as well.
    ///
    /// # Errors
    /// When the watch has failed and cannot say.
    pub fn overlaps(&self) -> Result<f64> {
        let overlaps = self.cluster.watch().overlaps()?;
        let here = overlaps.iter().filter(|overlap| overlap.older.host.is_some() || overlap.newer.host.is_some());
        Ok(here.count() as f64)
    }

    /// The term of consensus.
    ///
    /// # Errors
    /// When no node answers.
    pub fn term(&self) -> Result<u64> {
        Ok(self.cluster.any()?.cluster()?.term)
    }
}
