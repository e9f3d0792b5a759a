//! Three hosts of a lab that run corosync and Pacemaker, each with the files of
//! these programs to itself.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_lab::cluster::GuestImages;
use holdfast_lab::{Host, HostProcess, HostSpec, InitProgram, Lab, Network, SplitBrainWatch};

use super::agent::{ADDRESS, BRIDGE, Resource};
use super::saturate;
use crate::bench::failover::Victim;
use crate::bench::stage::PATIENCE;
use crate::root;

const HOSTS: [&str; 3] = ["n1", "n2", "n3"];
/// How long the first formation may take: Pacemaker alone waits 20 s for others to
/// be coordinator already.
const FORM: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// The resource's id.
const VM: &str = "vm";
/// Where the packages put agents of this provider, and where ours stands instead.
const AGENTS: &str = "/usr/lib/ocf/resource.d/pacemaker";
/// Directories of which every host has its own; those that Pacemaker writes to
/// as its user are given to that.
const OWN: [(&str, bool); 3] = [("/etc/corosync", false), ("/var/lib/corosync", false), ("/var/lib/pacemaker", true)];
/// What Pacemaker wants to find below its directory.
const PARTS: [&str; 4] = ["blackbox", "cib", "cores", "pengine"];

/// A cluster of the peer with one VM.
pub struct Pacemaker {
    // Before the lab: they are in it.
    daemons: BTreeMap<String, [HostProcess; 2]>,
    watch: SplitBrainWatch,
    lab: Lab,
    uuid: &'static str,
}

impl Pacemaker {
    /// Forms it and starts its VM.
    ///
    /// # Errors
    /// When a daemon does not start or they do not find together.
    pub fn form(binary: &Path, token_ms: Option<u32>, resource: Resource<'_>) -> Result<Self> {
        let lab = Lab::new(InitProgram { program: binary.to_owned(), args: vec!["lab-init".into()] })?;
        let shared = lab.shared_directory();
        let images = GuestImages::inside(&root().join("out/guest"))?;
        let disk = shared.join("peer.raw");
        fs::File::create(&disk)?.set_len(64 << 20)?;
        let ip = Network::Production.address_ending_in(ADDRESS);
        let agents = shared.join("agents");
        fs::create_dir(&agents)?;
        let agent = agents.join("qemu");
        fs::write(&agent, resource.agent(&disk, &images.kernel, &images.initrd, ip)?)?;
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755))?;
        for name in HOSTS {
            let mut spec = HostSpec::new(name);
            let own = lab.directory().join("hosts").join(name).join("peer");
            let log = own.join("pacemaker.log").into_os_string();
            spec.env = vec![("PCMK_logfile".into(), log), ("PCMK_logfacility".into(), "none".into())];
            spec.binds = OWN.map(|(path, _)| (own.join(path.trim_start_matches('/')), PathBuf::from(path))).to_vec();
            spec.binds.push((agents.clone(), AGENTS.into()));
            lab.add_host(spec)?;
            prepare(&own)?;
            fs::write(own.join("etc/corosync/corosync.conf"), configuration(&own, token_ms))?;
        }
        let watch = SplitBrainWatch::start(lab.host_names())?;
        let mut peer = Pacemaker { daemons: BTreeMap::new(), watch, lab, uuid: resource.uuid() };
        for host in peer.lab.hosts() {
            peer.power_on(&host)?;
        }
        peer.wait("three nodes", FORM, |peer| Ok(peer.online()? == HOSTS.len() && peer.coordinator().is_ok()))?;
        peer.configure()?;
        peer.wait("its VM", FORM, |peer| Ok(peer.place_of_vm().is_some()))?;
        Ok(peer)
    }

    /// Cuts the power of the node with the VM, which is or is not the coordinator,
    /// and returns how long after that another node's QEMU was there; then the
    /// node comes back.
    ///
    /// # Errors
    /// When a step does not come about.
    pub fn lose(&mut self, victim: Victim) -> Result<Duration> {
        let coordinator = self.coordinator()?;
        let here = self.place_of_vm().context("its VM runs nowhere")?;
        let fits = |node: &str| (node == coordinator) == (victim == Victim::Coordinator);
        let node = match fits(&here) {
            true => here,
            false => self.move_vm(HOSTS.into_iter().find(|name| fits(name)).context("no such node")?)?,
        };
        let host = self.lab.host(&node)?;
        let cut = host.power_off()?;
        let qemu = self.watch.wait_started(self.uuid, cut.at, PATIENCE)?;
        ensure!(qemu.host.as_deref() != Some(node.as_str()), "its QEMU started on the dead host");
        self.daemons.remove(&node);
        self.power_on(&host)?;
        self.settle()?;
        Ok(qemu.first_seen - cut.at)
    }

    /// Keeps all cores busy for so long, and returns how often the VM was started
    /// although nothing had failed.
    ///
    /// # Errors
    /// When it is no cluster any more afterwards, or two QEMUs of the VM were ever
    /// seen alive together.
    pub fn under_load(&self, length: Duration) -> Result<u32> {
        let before = self.watch.timeline().len();
        saturate(length)?;
        self.settle()?;
        let started = self.watch.timeline().into_iter().skip(before).filter(|seen| seen.vm == self.uuid).count();
        let ours = |overlap: &holdfast_lab::Overlap| overlap.newer.vm == self.uuid;
        ensure!(!self.watch.overlaps()?.iter().any(ours), "the peer ran its VM twice at one time");
        Ok(u32::try_from(started)?)
    }

    fn settle(&self) -> Result<()> {
        self.wait("three nodes and its VM", FORM, |peer| {
            Ok(peer.online()? == HOSTS.len() && peer.coordinator().is_ok() && peer.place_of_vm().is_some())
        })
    }

    fn power_on(&mut self, host: &Arc<Host>) -> Result<()> {
        host.power_on()?;
        let uplink = Network::Production.interface();
        for line in [
            format!("ip link add {BRIDGE} type bridge forward_delay 0"),
            format!("ip link set {uplink} master {BRIDGE}"),
            format!("ip link set {BRIDGE} up"),
        ] {
            run(host, &line.split(' ').collect::<Vec<_>>())?;
        }
        let corosync = host.spawn(&["corosync", "-f"])?;
        self.wait(&format!("corosync on {}", host.name()), PATIENCE, |_| {
            Ok(host.exec(&["corosync-cmapctl", "-g", "totem.cluster_name"])?.status.success())
        })
        .with_context(|| corosync.stderr())?;
        let pacemaker = host.spawn(&["pacemakerd"])?;
        self.daemons.insert(host.name().to_owned(), [corosync, pacemaker]);
        Ok(())
    }

    /// No fencing: a fence agent that answers at once would add some 30 ms.
    fn configure(&self) -> Result<()> {
        let properties = "<cluster_property_set id='options'>\
             <nvpair id='no-fencing' name='stonith-enabled' value='false'/></cluster_property_set>";
        // Where it is it stays until its node goes.
        let stickiness = "<meta_attributes id='stay'>\
             <nvpair id='stickiness' name='resource-stickiness' value='1000'/></meta_attributes>";
        let vm = format!(
            "<primitive id='{VM}' class='ocf' provider='pacemaker' type='qemu'><operations>\
             <op id='monitor' name='monitor' interval='10s' timeout='20s'/></operations></primitive>"
        );
        for (section, xml) in [("crm_config", properties), ("rsc_defaults", stickiness), ("resources", &vm)] {
            run(&*self.any()?, &["cibadmin", "--modify", "--allow-create", "-o", section, "--xml-text", xml])?;
        }
        Ok(())
    }

    fn any(&self) -> Result<Arc<Host>> {
        self.lab.hosts().into_iter().find(|host| host.is_on()).context("no host has power")
    }

    /// How many nodes are members, as the first host with power sees it.
    fn online(&self) -> Result<usize> {
        let said = run(&*self.any()?, &["crm_mon", "-1", "--output-as=xml"])?;
        let nodes = said.lines().filter(|line| line.trim_start().starts_with("<node ") && line.contains("type="));
        Ok(nodes.filter(|line| line.contains("online=\"true\"") && line.contains("pending=\"false\"")).count())
    }

    /// The designated coordinator.
    fn coordinator(&self) -> Result<String> {
        let said = run(&*self.any()?, &["crmadmin", "-D", "-q"])?;
        let name = said.split_whitespace().last().map(str::to_owned);
        name.filter(|name| HOSTS.contains(&name.as_str())).with_context(|| format!("no coordinator: {said}"))
    }

    /// Where a QEMU of the VM lives.
    fn place_of_vm(&self) -> Option<String> {
        self.watch.timeline().into_iter().find(|seen| seen.vm == self.uuid && seen.gone.is_none())?.host
    }

    fn move_vm(&self, to: &str) -> Result<String> {
        let begun = Instant::now();
        // While a host that came back is still asked what it runs, the resource seems to be in two places.
        self.wait("the move to be accepted", PATIENCE, |peer| {
            run(&*peer.any()?, &["crm_resource", "--resource", VM, "--move", "--node", to]).map(|_| true)
        })?;
        let moved = self.watch.wait_started(self.uuid, begun, PATIENCE)?;
        ensure!(moved.host.as_deref() == Some(to), "the VM was moved to {:?}, not {to}", moved.host);
        run(&*self.any()?, &["crm_resource", "--resource", VM, "--clear"])?;
        self.settle()?;
        Ok(to.to_owned())
    }

    /// Asks until it is so, or the deadline is over.
    fn wait(&self, what: &str, deadline: Duration, so: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let until = Instant::now() + deadline;
        loop {
            let now = so(self);
            if matches!(now, Ok(true)) {
                return Ok(());
            }
            if Instant::now() > until {
                now.with_context(|| format!("waiting for {what}"))?;
                bail!("not within {deadline:?}: {what}");
            }
            thread::sleep(LOOK_EVERY);
        }
    }
}

/// Makes a host's own directories.
fn prepare(own: &Path) -> Result<()> {
    for (path, of_pacemaker) in OWN {
        let path = own.join(path.trim_start_matches('/'));
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        if !of_pacemaker {
            continue;
        }
        // As the package has it: its daemons run as this user.
        let (uid, gid) = pacemaker_user()?;
        for part in PARTS.map(|part| path.join(part)).iter().chain([&path]) {
            fs::create_dir_all(part)?;
            chown(part, Some(uid), Some(gid)).with_context(|| format!("giving {} away", part.display()))?;
        }
    }
    Ok(())
}

fn pacemaker_user() -> Result<(u32, u32)> {
    let users = fs::read_to_string("/etc/passwd").context("reading /etc/passwd")?;
    let line = users.lines().find(|line| line.starts_with("hacluster:")).context("there is no user hacluster")?;
    let mut numbers = line.split(':').skip(2).map_while(|word| word.parse().ok());
    numbers.next().zip(numbers.next()).context("the user hacluster has no number")
}

/// corosync.conf(5): over both networks that carry our heartbeats as well.
fn configuration(own: &Path, token_ms: Option<u32>) -> String {
    // Without the coefficient the token is what it says, also with three nodes.
    let token = token_ms.map(|ms| format!("    token: {ms}\n    token_coefficient: 0\n")).unwrap_or_default();
    let mut text = format!(
        "totem {{\n    version: 2\n    cluster_name: peer\n    transport: knet\n    crypto_cipher: none\n    \
         crypto_hash: none\n{token}}}\nquorum {{\n    provider: corosync_votequorum\n}}\nlogging {{\n    \
         to_syslog: no\n    to_stderr: no\n    to_logfile: yes\n    logfile: {}\n}}\nnodelist {{\n",
        own.join("corosync.log").display()
    );
    for (number, name) in (0..).zip(HOSTS) {
        let _ = write!(text, "    node {{\n        nodeid: {}\n        name: {name}\n", number + 1);
        for (ring, network) in [Network::Heartbeat, Network::Management].into_iter().enumerate() {
            if let Some(address) = network.host_address(number) {
                let _ = writeln!(text, "        ring{ring}_addr: {address}");
            }
        }
        text.push_str("    }\n");
    }
    text + "}\n"
}

/// Runs a command on a host and returns what it wrote.
fn run(host: &Host, argv: &[&str]) -> Result<String> {
    let output = host.exec(argv)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{} on {}: {said}", argv.join(" "), host.name());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
