//! A host: a machine with its own processes, mounts, name, network and disk,
//! whose power can be cut.
//!
//! Its processes live in a PID namespace. When the init of that namespace is
//! killed, the kernel kills everything else in it at once, daemons and all:
//! that is the power cut. (What it cannot show: the page cache belongs to the
//! machine that carries the lab and survives.)

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;

use crate::init::HostArgs;
use crate::lab::Site;
use crate::machine::{Machine, ServiceEvent};
use crate::netns::Namespace;
use crate::network::Network;
use crate::process::HostProcess;
use crate::procfs::{self, Process};
use crate::sys;

/// How long [`Host::exec`] lets a command run.
pub const EXEC_DEADLINE: Duration = Duration::from_secs(60);
const BOOT_DEADLINE: Duration = Duration::from_secs(20);
const DEATH_DEADLINE: Duration = Duration::from_secs(20);
/// What an orderly shutdown may take beyond the service's own time.
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(10);

/// What a host is made from.
#[derive(Debug, Clone)]
pub struct HostSpec {
    /// Its name: of the host, and of its directory and its cables in the lab.
    pub name: String,
    /// The service's command line, kept running as systemd would with
    /// `Restart=always`; empty for a host without a service.
    pub service: Vec<OsString>,
    /// Whether the service starts when the host is powered on.
    pub autostart: bool,
    /// Environment variables of the service and of [`Host::exec`].
    pub env: Vec<(OsString, OsString)>,
    /// Directories (source, target) of which the host sees the source where the
    /// others see the target. Both must exist.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// How long the service may take to stop before it is killed.
    pub stop_timeout: Duration,
}

impl HostSpec {
    /// A host without a service.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            service: Vec::new(),
            autostart: true,
            env: Vec::new(),
            binds: Vec::new(),
            stop_timeout: Duration::from_secs(90),
        }
    }

    /// The same host with a service that starts at power-on.
    pub fn service(mut self, argv: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.service = argv.into_iter().map(Into::into).collect();
        self
    }
}

/// When the steps of a power cut happened.
#[derive(Debug, Clone, Copy)]
pub struct PowerCut {
    /// Just before the first cable went dark: the instant of the pulled plug.
    pub at: Instant,
    /// Just after the last cable went dark.
    pub dark: Instant,
    /// When SIGKILL had been sent.
    pub killed: Instant,
    /// When the last process on the host was gone.
    pub dead: Instant,
}

/// One host of a lab. Made by [`crate::Lab::add_host`].
#[derive(Debug)]
pub struct Host {
    spec: HostSpec,
    number: u8,
    site: Arc<Site>,
    power: Mutex<Power>,
}

#[derive(Debug)]
enum Power {
    Off,
    On {
        machine: Machine,
        /// Held for its drop: the host's interfaces, bridges and routes go with
        /// the power.
        _network: Namespace,
    },
    /// The lab is gone.
    Decommissioned,
}

impl Host {
    pub(crate) fn new(spec: HostSpec, number: u8, site: Arc<Site>) -> Result<Self> {
        let host = Self { spec, number, site, power: Mutex::new(Power::Off) };
        for part in ["etc", "var", "run", "log", "clusterstorage"] {
            fs::create_dir_all(host.directory().join(part))
                .with_context(|| format!("making the directory of host {}", host.name()))?;
        }
        Ok(host)
    }

    /// The host's name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The host's address on `network`; none on the production network.
    pub fn address(&self, network: Network) -> Option<std::net::Ipv4Addr> {
        network.host_address(self.number)
    }

    /// The name of the host's network namespace, which exists while it has power.
    pub fn namespace(&self) -> String {
        format!("{}-{}", self.site.tag, self.name())
    }

    /// What is on the host's disk, as this process sees it. Survives power
    /// cycles, except for `run/`, which is emptied.
    pub fn directory(&self) -> PathBuf {
        self.site.directory.join("hosts").join(self.name())
    }

    /// Puts one of its directories, such as `var`, onto a small disk in memory of
    /// so many bytes, which survives power cycles as a disk does. The host must
    /// have no power.
    ///
    /// # Errors
    /// When it has power, or the kernel refuses the mount.
    pub fn small_disk(&self, part: &str, bytes: u64) -> Result<()> {
        if self.is_on() {
            bail!("host {} has power: its disk cannot be exchanged", self.name());
        }
        let target = self.directory().join(part);
        let options = format!("size={bytes}");
        let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(None::<&str>, &target, Some("tmpfs"), plain, Some(options.as_str()))
            .with_context(|| format!("putting a small disk at {}", target.display()))
    }

    /// The log that the service's standard output and standard error go to.
    pub fn log_path(&self) -> PathBuf {
        self.directory().join("log/service.log")
    }

    /// Whether the host has power.
    pub fn is_on(&self) -> bool {
        matches!(&*self.power(), Power::On { machine, .. } if !machine.is_dead())
    }

    /// Powers the host on and returns when its init is up. Pulled cables stay pulled.
    ///
    /// # Errors
    /// When it has power already, or the kernel refuses a namespace or a mount.
    pub fn power_on(&self) -> Result<()> {
        let mut power = self.power();
        match &*power {
            Power::Off => {}
            Power::On { machine, .. } if machine.is_dead() => self.clear_away(&mut power)?,
            Power::On { .. } => bail!("host {} is on already", self.name()),
            Power::Decommissioned => bail!("the lab of host {} is gone", self.name()),
        }
        self.empty_run_directory()?;
        let network = Namespace::create(&self.namespace())?;
        let machine = self.boot(&network).inspect_err(|_| {
            // The namespace takes the hosts' ends of the cables with it; make
            // sure of the other ends before the name is used again.
            let _ = self.site.fabric.detach(self.name());
        })?;
        self.site.names.insert(machine.pid_namespace(), self.name());
        *power = Power::On { machine, _network: network };
        Ok(())
    }

    /// Cuts the power: all cables dark at once, then every process killed.
    /// Returns when nothing of the host is left but its disk.
    ///
    /// # Errors
    /// When it has no power, or a process does not die within 20 s.
    pub fn power_off(&self) -> Result<PowerCut> {
        let mut power = self.power();
        let Power::On { machine, .. } = &mut *power else {
            bail!("host {} has no power to cut", self.name());
        };
        let at = Instant::now();
        let darkened = self.site.fabric.darken(self.name());
        let dark = Instant::now();
        machine.kill()?;
        let killed = Instant::now();
        let dead = machine.wait_dead(DEATH_DEADLINE)?;
        self.clear_away(&mut power)?;
        darkened?;
        Ok(PowerCut { at, dark, killed, dead })
    }

    /// Shuts the host down in order: the service is stopped, everything else is
    /// asked to end, then the power goes. Returns how long that took.
    ///
    /// # Errors
    /// When it has no power, or does not come to an end; it keeps its power then.
    pub fn shutdown(&self) -> Result<Duration> {
        let mut power = self.power();
        let Power::On { machine, .. } = &mut *power else {
            bail!("host {} is off already", self.name());
        };
        let begun = Instant::now();
        machine.command("poweroff")?;
        let dead = machine.wait_dead(self.spec.stop_timeout + SHUTDOWN_MARGIN)?;
        self.clear_away(&mut power)?;
        Ok(dead.saturating_duration_since(begun))
    }

    /// Starts the service if it is stopped, as `systemctl start` would.
    ///
    /// # Errors
    /// When the host has no power.
    pub fn start_service(&self) -> Result<()> {
        self.with_machine(|machine| machine.command("start"))
    }

    /// Asks the service to stop and returns when it has; it is not restarted.
    ///
    /// # Errors
    /// When the host has no power, or the service is not gone after its
    /// `stop_timeout` and SIGKILL.
    pub fn stop_service(&self) -> Result<()> {
        self.with_machine(|machine| {
            machine.command("stop")?;
            machine.wait_service(self.spec.stop_timeout + SHUTDOWN_MARGIN, |service| service.pid.is_none())?;
            Ok(())
        })
    }

    /// What has happened to the service since power-on.
    ///
    /// # Errors
    /// When the host has no power.
    pub fn service_event(&self) -> Result<ServiceEvent> {
        self.with_machine(|machine| Ok(machine.service()))
    }

    /// Waits until `wanted` holds of the service's state, such as
    /// `|service| service.starts == 2`.
    ///
    /// # Errors
    /// When that has not come true within `deadline`, or the host dies.
    pub fn wait_service(&self, deadline: Duration, wanted: impl Fn(&ServiceEvent) -> bool) -> Result<ServiceEvent> {
        // Without the lock on the power: it may be cut while somebody waits.
        let watcher = self.with_machine(|machine| Ok(machine.watcher()))?;
        watcher.wait_service(deadline, wanted)
    }

    /// Starts a command on the host, with pipes to its output.
    ///
    /// # Errors
    /// When the host has no power or there is no such program.
    pub fn spawn(&self, argv: &[impl AsRef<OsStr>]) -> Result<HostProcess> {
        let watcher = self.with_machine(|machine| Ok(machine.watcher()))?;
        HostProcess::spawn(&watcher, argv, &self.spec.env).with_context(|| format!("on host {}", self.name()))
    }

    /// Runs a command on the host and returns what it wrote and how it ended.
    ///
    /// # Errors
    /// When it cannot be started, or runs longer than [`EXEC_DEADLINE`].
    pub fn exec(&self, argv: &[impl AsRef<OsStr>]) -> Result<Output> {
        self.exec_within(argv, EXEC_DEADLINE)
    }

    /// Runs a command on the host; it is killed when it runs longer than `deadline`.
    ///
    /// # Errors
    /// When it cannot be started, or had to be killed.
    pub fn exec_within(&self, argv: &[impl AsRef<OsStr>], deadline: Duration) -> Result<Output> {
        self.spawn(argv)?.output(deadline).with_context(|| format!("on host {}", self.name()))
    }

    /// The processes on the host, its init among them. Empty without power.
    pub fn processes(&self) -> Vec<Process> {
        let Ok(namespace) = self.with_machine(|machine| Ok(machine.pid_namespace())) else {
            return Vec::new();
        };
        procfs::all_pids()
            .into_iter()
            .filter(|pid| procfs::pid_namespace(*pid) == Some(namespace))
            .filter_map(procfs::process)
            .collect()
    }

    /// The pids, as this process sees them, of the living processes on the host
    /// in whose command lines each of `words` occurs. The init is left out:
    /// its command line contains the service's.
    pub fn pids(&self, words: &[&str]) -> Vec<i32> {
        self.processes()
            .into_iter()
            .filter(|process| process.is_alive() && process.host_pid != 1 && process.mentions(words))
            .map(|process| process.pid)
            .collect()
    }

    /// Sends a signal to the process `pid` (as this process sees it) of the host.
    ///
    /// # Errors
    /// When `pid` is no process of this host.
    pub fn kill(&self, pid: i32, signal: Signal) -> Result<()> {
        let namespace = self.with_machine(|machine| Ok(machine.pid_namespace()))?;
        // Held before the question whose it is, so that the answer stays true.
        let pidfd =
            sys::pidfd_open(pid).with_context(|| format!("there is no process {pid} on host {}", self.name()))?;
        if procfs::pid_namespace(pid) != Some(namespace) {
            bail!("process {pid} is not one of host {}", self.name());
        }
        sys::pidfd_send_signal(&pidfd, signal).with_context(|| format!("signalling process {pid}"))
    }

    /// Ends the host for good; its lab is going.
    pub(crate) fn decommission(&self) {
        let mut power = self.power();
        if let Power::On { machine, .. } = &mut *power {
            let _ = machine.kill();
            let _ = machine.wait_dead(DEATH_DEADLINE);
            let _ = self.clear_away(&mut power);
        }
        *power = Power::Decommissioned;
    }

    fn boot(&self, network: &Namespace) -> Result<Machine> {
        self.site.fabric.attach(self.name(), self.number, network)?;
        let own = (self.directory(), self.site.host_directory());
        let args = HostArgs {
            hostname: self.name().into(),
            binds: std::iter::once(own).chain(self.spec.binds.iter().cloned()).collect(),
            scratch: self.scratch_directories(),
            log: self.log_path(),
            stop_timeout: self.spec.stop_timeout,
            service: self.spec.service.clone(),
            start: self.spec.autostart && !self.spec.service.is_empty(),
        };
        let mut command = self.site.init.command("host");
        command.args(args.to_args()).envs(self.spec.env.iter().cloned());
        Machine::boot(command, network.name(), BOOT_DEADLINE)
            .with_context(|| format!("powering on host {}", self.name()))
    }

    /// `/run` and `/dev/shm`, unless the lab itself is in there.
    fn scratch_directories(&self) -> Vec<PathBuf> {
        ["/run", "/dev/shm"]
            .into_iter()
            .map(PathBuf::from)
            .filter(|path| path.is_dir() && !self.site.directory.starts_with(path))
            .collect()
    }

    fn empty_run_directory(&self) -> Result<()> {
        let run = self.directory().join("run");
        let context = || format!("emptying {}", run.display());
        match fs::remove_dir_all(&run) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(context);
            }
            _ => {}
        }
        fs::create_dir(Path::new(&run)).with_context(context)
    }

    /// Removes what is left of a machine that is dead.
    fn clear_away(&self, power: &mut Power) -> Result<()> {
        if let Power::On { machine, .. } = &*power {
            self.site.names.remove(machine.pid_namespace());
        }
        // The cables first: the end of the namespace takes them away too, but at
        // a moment of the kernel's choosing.
        let detached = self.site.fabric.detach(self.name());
        *power = Power::Off;
        detached
    }

    fn with_machine<T>(&self, f: impl FnOnce(&Machine) -> Result<T>) -> Result<T> {
        match &*self.power() {
            Power::On { machine, .. } if !machine.is_dead() => f(machine),
            _ => bail!("host {} has no power", self.name()),
        }
    }

    fn power(&self) -> MutexGuard<'_, Power> {
        self.power.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
