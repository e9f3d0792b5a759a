//! A cluster in the lab: real nodes, one shared volume, one external switch,
//! driven over the API of whichever node answers.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use std::time::Duration;
//! use holdfast_api::VmState;
//! use holdfast_lab::cluster::{Cluster, ClusterSpec, VmTemplate};
//!
//! let cluster = Cluster::form(ClusterSpec::new("/usr/bin/holdfast", "out/guest")?)?;
//! let web = cluster.create_vm(&VmTemplate::new("web", 101))?;
//! let host = cluster.host(&cluster.node_of(&web.name)?)?;
//! host.power_off()?;
//! cluster.wait_vm("web", Duration::from_secs(20), |vm| {
//!     vm.state == VmState::Running && vm.node.as_deref() != Some(host.name())
//! })?;
//! # Ok(())
//! # }
//! ```

mod client;
mod diagnosis;
mod http;
mod processes;
mod spec;
mod stream;
mod vm;
mod wait;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_api as api;

pub use self::client::{ApiClient, ApiError};
pub use self::http::Console;
pub use self::spec::{ClusterSpec, GuestImages};
pub use self::stream::{ChangeStream, EventStream};
pub use self::vm::{GuestVm, VmTemplate};
use crate::{Host, HostSpec, InitProgram, Lab, Network, SplitBrainWatch};

/// The name of the one volume.
pub const VOLUME: &str = "vol1";
/// The name of the one external switch.
pub const SWITCH: &str = "prod";
/// How long a service may take from its start until its API answers.
const API_DEADLINE: Duration = Duration::from_secs(30);
/// How long the whole cluster may take until everything about it is in order.
const FORM_DEADLINE: Duration = Duration::from_secs(60);

/// How long the steps of forming a cluster took, each counted from power-on.
#[derive(Debug, Clone, Copy, Default)]
pub struct FormTimes {
    /// Every node's API answered.
    pub booted: Duration,
    /// The first node had founded the cluster.
    pub founded: Duration,
    /// The last node had joined.
    pub joined: Duration,
    /// Every node was up and acknowledged, the votes were settled, the volume reached.
    pub ready: Duration,
}

/// A cluster whose nodes are hosts of a lab. Everything of it is gone when it is
/// dropped; when that happens in a panic, the ends of the nodes' logs are printed.
#[derive(Debug)]
pub struct Cluster {
    // Before the lab: it looks at the lab's processes.
    watch: SplitBrainWatch,
    lab: Lab,
    spec: ClusterSpec,
    times: FormTimes,
}

impl Cluster {
    /// Builds the lab and its hosts, each with its configuration, without power.
    ///
    /// # Errors
    /// When the lab cannot be built: not root, or something is not installed.
    pub fn build(spec: ClusterSpec) -> Result<Self> {
        let init = InitProgram { program: spec.binary.clone(), args: vec!["lab-init".into()] };
        let lab = Lab::new(init)?;
        let watch = SplitBrainWatch::start(lab.host_names())?;
        let cluster = Self { watch, lab, spec, times: FormTimes::default() };
        for number in 1..=cluster.spec.nodes {
            cluster.add_host(&format!("n{number}"))?;
        }
        Ok(cluster)
    }

    /// Builds the lab, powers all hosts on, forms the cluster and waits until all
    /// about it is in order.
    ///
    /// # Errors
    /// When a step fails or takes too long.
    pub fn form(spec: ClusterSpec) -> Result<Self> {
        let mut cluster = Self::build(spec)?;
        cluster.assemble().map_err(|error| cluster.with_logs(error))?;
        Ok(cluster)
    }

    /// Forms the cluster of the hosts that were built: powers on those that are
    /// off, and waits until all is in order.
    ///
    /// # Errors
    /// When a step fails or takes too long.
    pub fn assemble(&mut self) -> Result<()> {
        let begun = Instant::now();
        self.power_on_all()?;
        self.times.booted = begun.elapsed();
        let names: Vec<String> = self.hosts().iter().map(|host| host.name().to_owned()).collect();
        let (first, others) = names.split_first().context("a cluster needs a node")?;
        self.found(first)?;
        self.times.founded = begun.elapsed();
        for name in others {
            self.join(name)?;
        }
        self.times.joined = begun.elapsed();
        let client = self.client(first);
        if self.spec.profile != api::ProfileName::Default {
            client.set_profile(self.spec.profile)?;
        }
        self.name_networks(first, names.len())?;
        let directory = self.lab.shared_directory().display().to_string();
        client.add_volume(&api::AddVolume {
            name: VOLUME.into(),
            directory: Some(directory),
            lun: None,
            erase: None,
        })?;
        let uplink = Some(Network::Production.interface().to_owned());
        client.add_switch(&api::AddSwitch { name: SWITCH.into(), kind: api::SwitchKind::External, uplink })?;
        self.wait_ready(FORM_DEADLINE)?;
        self.times.ready = begun.elapsed();
        Ok(())
    }

    /// Adds one more host, without power.
    ///
    /// # Errors
    /// As for [`Lab::add_host`].
    pub fn add_host(&self, name: &str) -> Result<Arc<Host>> {
        let config = self.lab.host_directory().join("etc/config.toml");
        let binary = self.spec.binary.clone().into_os_string();
        let host = self.lab.add_host(HostSpec::new(name).service([
            binary,
            "keeper".into(),
            "--config".into(),
            config.into(),
        ]))?;
        let settings = self.spec.configuration(name, &self.lab.host_directory(), &self.fence_agents_dir());
        fs::write(host.directory().join("etc/config.toml"), settings).context("writing a host's configuration")?;
        Ok(host)
    }

    /// Powers on every host that has no power, all at once, and waits until their
    /// APIs answer.
    ///
    /// # Errors
    /// When a host does not come up.
    pub fn power_on_all(&self) -> Result<()> {
        let dark: Vec<Arc<Host>> = self.hosts().into_iter().filter(|host| !host.is_on()).collect();
        std::thread::scope(|scope| {
            let powering: Vec<_> = dark.iter().map(|host| scope.spawn(|| host.power_on())).collect();
            powering.into_iter().try_for_each(|one| one.join().unwrap_or_else(|_| panic!("powering on panicked")))
        })?;
        dark.iter().try_for_each(|host| self.wait_api(host.name(), API_DEADLINE))
    }

    /// Founds the cluster on a host.
    ///
    /// # Errors
    /// When the host refuses or does not answer.
    pub fn found(&self, name: &str) -> Result<api::Founded, ApiError> {
        self.client(name).found("lab")
    }

    /// Has a host join, by a token that any member makes.
    ///
    /// # Errors
    /// When a node refuses or does not answer.
    pub fn join(&self, name: &str) -> Result<api::NodeView, ApiError> {
        let line = self.any()?.make_join_token(&api::MakeJoinToken::default())?;
        self.client(name).join(&api::JoinCluster { address: line.address, token: line.token, site: None })
    }

    fn name_networks(&self, node: &str, hosts: usize) -> Result<()> {
        let uses = [
            (Network::Management, true, false, 20),
            (Network::Heartbeat, true, false, 30),
            (Network::Migration, false, true, 10),
            (Network::Storage, false, false, 40),
        ];
        let client = self.client(node);
        for (network, cluster, migration, metric) in uses {
            let subnet = network.subnet();
            self.wait_on(node, &format!("network {subnet} with {hosts} nodes"), FORM_DEADLINE, |client| {
                let networks = client.networks().ok()?;
                networks.iter().any(|known| known.subnet == subnet && known.nodes.len() == hosts).then_some(())
            })?;
            let set = api::SetNetwork {
                name: Some(network.to_string()),
                cluster: Some(cluster),
                migration: Some(migration),
                metric: Some(metric),
            };
            client.set_network(&subnet.replace('/', "-"), &set)?;
        }
        Ok(())
    }

    /// Waits until every node is up and reaches every volume, and the votes are where
    /// they belong.
    ///
    /// # Errors
    /// When that does not come true within `deadline`.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        self.wait("every node up and acknowledging, the votes settled, every volume reached", deadline, |client| {
            let nodes = client.nodes().ok()?;
            let up = nodes.iter().all(|node| node.state == api::NodeState::Up);
            let volumes = client.volumes().ok()?;
            let reached = volumes.iter().all(|volume| {
                volume.reach.len() == nodes.len() && volume.reach.iter().all(|reach| reach.ok == Some(true))
            });
            let quorum = client.quorum().ok()?;
            // An odd number of votes, five at most, the witness where the nodes are even.
            let witness = quorum.seats.iter().any(|seat| seat.witness && seat.present == Some(true));
            let votes = match (nodes.len().min(5), witness) {
                (even, witness) if even % 2 == 0 => {
                    if witness {
                        even + 1
                    } else {
                        even - 1
                    }
                }
                (odd, _) => odd,
            };
            let full = quorum.settled && quorum.votes == votes && quorum.present == votes;
            let there = quorum.seats.iter().all(|seat| seat.witness || seat.present == Some(true));
            (up && reached && full && there).then_some(())
        })
    }

    /// How long forming it took.
    pub fn times(&self) -> FormTimes {
        self.times
    }

    /// What it was made from.
    pub fn spec(&self) -> &ClusterSpec {
        &self.spec
    }

    /// The lab that it is in.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The hosts, with and without power.
    pub fn hosts(&self) -> Vec<Arc<Host>> {
        self.lab.hosts()
    }

    /// The host called `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn host(&self, name: &str) -> Result<Arc<Host>> {
        self.lab.host(name)
    }

    /// Who ran which VM when, since before the first host had power.
    pub fn watch(&self) -> &SplitBrainWatch {
        &self.watch
    }

    /// The unix socket on which the agent of a host answers, as this process sees it.
    pub fn socket(&self, host: &str) -> PathBuf {
        self.lab.directory().join("hosts").join(host).join("run/agent.sock")
    }

    /// A client of one host's API.
    pub fn client(&self, host: &str) -> ApiClient {
        ApiClient::new(self.socket(host))
    }

    /// The coordinator, as the nodes with a quorum know it.
    ///
    /// # Errors
    /// When there is none right now.
    pub fn coordinator(&self) -> Result<String> {
        self.wait("a coordinator", FORM_DEADLINE, |client| client.cluster().ok()?.coordinator)
    }

    /// Hosts other than the coordinator, in the order of their names.
    ///
    /// # Errors
    /// When there is no coordinator right now.
    pub fn followers(&self) -> Result<Vec<String>> {
        let coordinator = self.coordinator()?;
        let names = self.hosts().iter().map(|host| host.name().to_owned()).collect::<Vec<_>>();
        Ok(names.into_iter().filter(|name| *name != coordinator).collect())
    }

    /// The node that may run a VM.
    ///
    /// # Errors
    /// When the VM is unknown or on no node.
    pub fn node_of(&self, vm: &str) -> Result<String> {
        let view = self.any()?.vm(vm)?;
        view.node.with_context(|| format!("VM {vm} is on no node: {}", view.standing))
    }

    /// Checks what must hold in every run: no VM ever ran twice at one time, and
    /// every acknowledged record is on its disk. VMs that run are switched off.
    ///
    /// # Errors
    /// Says what did not hold.
    pub fn assert_clean(&self, acknowledged: &[(&GuestVm, &[crate::guest::Acknowledged])]) -> Result<()> {
        for (vm, _) in acknowledged {
            self.switch_off(&vm.name)?;
        }
        let mut overlaps = self.watch.overlaps()?;
        // The watch sees the machine's other labs as well.
        overlaps.retain(|overlap| overlap.older.host.is_some() || overlap.newer.host.is_some());
        ensure!(overlaps.is_empty(), "a VM ran twice at one time: {overlaps:#?}");
        for (vm, acknowledged) in acknowledged {
            let report = vm.verify()?;
            let lost = report.lost(acknowledged);
            ensure!(
                lost.is_empty() && report.missing.is_empty() && report.corrupt_sectors.is_empty(),
                "VM {}: of {} acknowledged records {} are lost ({lost:?}); missing on its disk: {:?}; corrupt sectors: {:?}",
                vm.name,
                acknowledged.len(),
                lost.len(),
                report.missing,
                report.corrupt_sectors
            );
        }
        Ok(())
    }

    /// The address .`last` of the production network, for a guest.
    pub fn guest_address(last: u8) -> Ipv4Addr {
        Network::Production.address_ending_in(last)
    }

    /// Where the hosts look for fence agents: on the shared storage, empty at first.
    pub fn fence_agents_dir(&self) -> PathBuf {
        self.lab.shared_directory().join("fence-agents")
    }

    /// Makes an empty LUN that all nodes see, a file in the lab's directory, a volume.
    ///
    /// # Errors
    /// When the file cannot be made, or no node takes it.
    pub fn add_lun(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let device = self.lab.directory().join("lun");
        fs::File::create(&device).and_then(|file| file.set_len(bytes)).context("making a LUN")?;
        let lun = Some(device.display().to_string());
        self.any()?.add_volume(&api::AddVolume { name: name.into(), directory: None, lun, erase: None })?;
        Ok(device)
    }

    /// Where a file of the volume is, as this process sees it.
    pub fn on_volume(&self, file: impl AsRef<Path>) -> PathBuf {
        self.lab.shared_directory().join(file)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tails());
        }
    }
}
