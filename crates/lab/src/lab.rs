//! The lab as a whole: its switches, its hosts and its directory.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::fabric::{CLIENT, Fabric};
use crate::host::{Host, HostSpec};
use crate::network::MAX_HOSTS;
use crate::registry::{self, Registration};
use crate::watch::HostNames;

/// Where labs are by default: on a real disk, where a flush costs what it costs.
const DEFAULT_BASE: &str = "/var/tmp";
/// The longest name that leaves room for `-mgmt` in an interface's 15 bytes.
const MAX_HOST_NAME: usize = 10;
const GUARD_MAY_TAKE: Duration = Duration::from_secs(10);

/// The program whose [`crate::init::main`] becomes PID 1 of the hosts.
#[derive(Debug, Clone)]
pub struct InitProgram {
    /// The executable; the path must be absolute.
    pub program: PathBuf,
    /// What stands before the arguments for [`crate::init::main`], such as the
    /// name of a hidden subcommand.
    pub args: Vec<OsString>,
}

impl InitProgram {
    /// A program that does nothing but call [`crate::init::main`].
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), args: Vec::new() }
    }

    pub(crate) fn command(&self, mode: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).arg(mode);
        command
    }
}

/// What every host of a lab needs to know of it.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) init: InitProgram,
    pub(crate) tag: String,
    pub(crate) directory: PathBuf,
    pub(crate) fabric: Fabric,
    pub(crate) names: HostNames,
}

/// A rack of hosts on one machine. Everything in it ends and vanishes with this
/// value, and with the process that holds it, however that dies.
///
/// Its directory, which all hosts see at the same path:
/// ```text
/// hosts/NAME/   what is on the disk of host NAME: etc/ var/ run/ log/ clusterstorage/
/// host/         on a host: its own hosts/NAME; empty elsewhere
/// shared/       the same for all: shared storage
/// ```
#[derive(Debug)]
pub struct Lab {
    // In this order: hosts, then the network, then the directory and the entry.
    hosts: Mutex<Vec<Arc<Host>>>,
    site: Arc<Site>,
    registration: Option<Registration>,
    guard: Child,
}

impl Lab {
    /// Builds a lab without hosts in a directory below `/var/tmp`.
    ///
    /// # Errors
    /// As for [`Lab::inside`].
    pub fn new(init: InitProgram) -> Result<Self> {
        Self::inside(Path::new(DEFAULT_BASE), init)
    }

    /// Builds a lab without hosts in a new directory inside `base`, after
    /// sweeping up what dead labs left on this machine.
    ///
    /// # Errors
    /// When this process is not root, `ip` is missing or the kernel refuses.
    pub fn inside(base: &Path, init: InitProgram) -> Result<Self> {
        if !init.program.is_absolute() {
            bail!("the path of the lab's init is not absolute: {}", init.program.display());
        }
        registry::sweep()?;
        let registration = Registration::new(base)?;
        let guard = init
            .command("guard")
            .arg(registration.tag())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("starting the lab's guard, {}", init.program.display()))?;
        let directory = registration.directory().to_owned();
        // From here on a failure leaves its remains to the guard and to `Registration`.
        for part in ["hosts", "host", "shared"] {
            fs::create_dir(directory.join(part)).context("filling the lab's directory")?;
        }
        let fabric = Fabric::create(registration.tag())?;
        let site = Site { init, tag: registration.tag().to_owned(), directory, fabric, names: HostNames::default() };
        Ok(Self { hosts: Mutex::default(), site: Arc::new(site), registration: Some(registration), guard })
    }

    /// Adds a host, without power as yet. The first gets the addresses .11, the
    /// second .12, and so on.
    ///
    /// # Errors
    /// When the name is taken or unfit for an interface's name (1 to 10 small
    /// letters and digits), or its directory cannot be made.
    pub fn add_host(&self, spec: HostSpec) -> Result<Arc<Host>> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let name = spec.name.as_str();
        let fit = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        if name.is_empty() || name.len() > MAX_HOST_NAME || !name.chars().all(fit) {
            bail!("{name:?} cannot be a host's name: 1 to {MAX_HOST_NAME} of a-z and 0-9");
        }
        if [CLIENT, "fabric"].contains(&name) || hosts.iter().any(|host| host.name() == name) {
            bail!("the name {name} is taken");
        }
        let number = u8::try_from(hosts.len()).unwrap_or(u8::MAX);
        if number >= MAX_HOSTS {
            bail!("a lab has addresses for {MAX_HOSTS} hosts");
        }
        let host = Arc::new(Host::new(spec, number, Arc::clone(&self.site))?);
        hosts.push(Arc::clone(&host));
        Ok(host)
    }

    /// The hosts in the order in which they were added.
    pub fn hosts(&self) -> Vec<Arc<Host>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The host called `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn host(&self, name: &str) -> Result<Arc<Host>> {
        let found = self.hosts().into_iter().find(|host| host.name() == name);
        found.with_context(|| format!("the lab has no host {name}"))
    }

    /// Switches, cables and the client.
    pub fn fabric(&self) -> &Fabric {
        &self.site.fabric
    }

    /// What the names of this lab's namespaces start with.
    pub fn tag(&self) -> &str {
        &self.site.tag
    }

    /// The lab's directory.
    pub fn directory(&self) -> &Path {
        &self.site.directory
    }

    /// A directory that is the same for all hosts and for this process.
    pub fn shared_directory(&self) -> PathBuf {
        self.site.directory.join("shared")
    }

    /// Where each host finds its own directory: the same path on all of them.
    pub fn host_directory(&self) -> PathBuf {
        self.site.host_directory()
    }

    /// Tells which host a process belongs to, for [`crate::SplitBrainWatch`].
    pub fn host_names(&self) -> HostNames {
        self.site.names.clone()
    }
}

impl Site {
    pub(crate) fn host_directory(&self) -> PathBuf {
        self.directory.join("host")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for host in self.hosts() {
            // Somebody may still hold the host; its power ends all the same.
            host.decommission();
        }
        self.registration = None;
        // The guard finds the entry gone and ends.
        let deadline = Instant::now() + GUARD_MAY_TAKE;
        while matches!(self.guard.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.guard.kill();
                let _ = self.guard.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
