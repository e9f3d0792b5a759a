//! What this host says of itself.

use std::path::Path;
use std::time::Duration;

use holdfast_core::watchdog::Standing;
use holdfast_core::*;
use holdfast_qemu::Binary;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::{Agent, Member};
use crate::config::{Config, parse_size};

/// Looked at at every change of an address, and this often.
const EVERY: Duration = Duration::from_secs(60);
/// Bridges that other software makes for itself on one host.
const HOST_ONLY: [&str; 4] = ["docker", "virbr", "cni", holdfast_vswitch::SWITCH_PREFIX];

/// What is known of this host's QEMU; probing takes a moment.
#[derive(Clone, Debug, Default)]
pub enum Qemu {
    /// Not probed yet.
    #[default]
    Unknown,
    /// It can be used.
    Usable(Binary),
    /// It is missing, or too old.
    Unusable(String),
}

/// Whether KVM works does not change while the host is up, and finding out can
/// take seconds, so it is remembered for as long as the program is the same.
#[derive(Serialize, Deserialize)]
struct Remembered {
    boot: String,
    program: String,
    path: std::path::PathBuf,
    version: (u32, u32, u32),
    machines: Vec<String>,
    accelerator: Accelerator,
    no_kvm: Option<String>,
    vhost_net: bool,
}

/// Probes QEMU in the background.
pub fn probe(config: &Config) -> watch::Receiver<Qemu> {
    let (known, watched) = watch::channel(Qemu::Unknown);
    let (program, memory) = (config.qemu.clone(), config.run_dir.join("qemu.json"));
    tokio::spawn(async move {
        let identity = fingerprint(&program);
        let remembered =
            std::fs::read(&memory).ok().and_then(|bytes| serde_json::from_slice::<Remembered>(&bytes).ok());
        if let (Some((boot, program)), Some(known_one)) = (&identity, remembered)
            && (boot, program) == (&known_one.boot, &known_one.program)
        {
            let Remembered { path, version, machines, accelerator, no_kvm, vhost_net, .. } = known_one;
            known.send_replace(Qemu::Usable(Binary { path, version, machines, accelerator, no_kvm, vhost_net }));
            return;
        }
        match Binary::probe(&program).await {
            Ok(binary) => {
                if let Some((boot, program)) = identity {
                    let Binary { path, version, machines, accelerator, no_kvm, vhost_net } = binary.clone();
                    let remembered =
                        Remembered { boot, program, path, version, machines, accelerator, no_kvm, vhost_net };
                    let _ = serde_json::to_vec(&remembered).map(|bytes| std::fs::write(&memory, bytes));
                }
                known.send_replace(Qemu::Usable(binary));
            }
            Err(error) => {
                tracing::error!(%error, "no VM can run on this host");
                known.send_replace(Qemu::Unusable(error.to_string()));
            }
        }
    });
    watched
}

/// The boot, and the program with its time of change: both the same, the same QEMU.
fn fingerprint(program: &Path) -> Option<(String, String)> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let search = std::env::var_os("PATH").unwrap_or_default();
    let found = if program.components().count() > 1 {
        program.to_owned()
    } else {
        std::env::split_paths(&search).map(|dir| dir.join(program)).find(|path| path.is_file())?
    };
    let metadata = std::fs::metadata(&found).ok()?;
    Some((boot, format!("{} {:?} {}", found.display(), metadata.modified().ok()?, metadata.len())))
}

impl Agent {
    /// QEMU of this host, once it was probed.
    pub(super) async fn usable_qemu(&self) -> Result<Binary, String> {
        let mut known = self.0.qemu.clone();
        let probed = known.wait_for(|qemu| !matches!(qemu, Qemu::Unknown)).await;
        match probed.map(|qemu| qemu.clone()) {
            Ok(Qemu::Usable(binary)) => Ok(binary),
            Ok(Qemu::Unusable(why)) => Err(why),
            Ok(Qemu::Unknown) | Err(_) => Err("QEMU could not be probed".into()),
        }
    }

    /// What this host says of itself now.
    ///
    /// # Errors
    /// The interfaces cannot be listed.
    pub(super) async fn facts(&self) -> Result<NodeFacts, holdfast_vswitch::Error> {
        let config = &self.0.config;
        let qemu = self.usable_qemu().await.ok();
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32);
        let (accelerator, version, machines) = match qemu {
            Some(binary) => {
                let (major, minor, micro) = binary.version;
                (binary.accelerator, Some(format!("{major}.{minor}.{micro}")), binary.machines)
            }
            None => (Accelerator::Tcg, None, Vec::new()),
        };
        Ok(NodeFacts {
            cpus: if config.cpus == 0 { cpus } else { config.cpus },
            memory_bytes: memory_for_vms(config),
            accelerator,
            qemu: version,
            machines,
            addresses: self.addresses().await?,
            version: env!("CARGO_PKG_VERSION").into(),
            watchdog: self.watchdog().and_then(|standing| Some(standing.device()?.path.clone())),
            volume_port: config.volume_port,
        })
    }

    /// How this host's watchdog stands, by its keeper's word.
    fn watchdog(&self) -> Option<Standing> {
        self.0.keeper.watch().borrow().watchdog.clone()
    }

    /// Tells the coordinator how this host's watchdog stands, and everybody when it is
    /// about to reset the host.
    pub(super) async fn keep_watchdog(self, member: &'static Member) {
        let mut keeper = self.0.keeper.watch();
        loop {
            let standing = keeper.borrow_and_update().watchdog.clone();
            member.reports.say(|report| report.watchdog = standing.clone());
            if let Some(Standing::Left { device, timeout_s }) = &standing {
                let left =
                    Command::WatchdogLeft { node: member.me, device: device.path.clone(), timeout_s: *timeout_s };
                if let Err(error) = self.execute("agent", left).await {
                    tracing::warn!(%error, "the cluster was not told that the watchdog resets this host");
                }
            }
            if keeper.wait_for(|view| view.watchdog != standing).await.is_err() {
                return;
            }
        }
    }

    pub(super) async fn addresses(&self) -> Result<Vec<NodeAddress>, holdfast_vswitch::Error> {
        let mut addresses = Vec::new();
        for interface in self.0.vswitch.interfaces().await? {
            let host_only = HOST_ONLY.iter().any(|prefix| interface.name.starts_with(prefix));
            if host_only || self.0.config.ignore_interfaces.contains(&interface.name) {
                continue;
            }
            let usable = interface.addresses.iter().filter(|(ip, _)| match ip {
                std::net::IpAddr::V4(ip) => !ip.is_link_local() && !ip.is_loopback(),
                // The agent listens on IPv4.
                std::net::IpAddr::V6(_) => false,
            });
            addresses.extend(usable.map(|(ip, prefix)| NodeAddress {
                interface: interface.name.clone(),
                ip: *ip,
                prefix: *prefix,
            }));
        }
        addresses.sort();
        Ok(addresses)
    }

    /// Keeps what the cluster knows of this host true.
    pub(super) async fn keep_facts(self, member: &'static Member) {
        let mut changes = self.0.vswitch.watch().ok();
        loop {
            // What cannot be seen right now has not changed for that.
            let facts = match self.facts().await {
                Ok(facts) => facts,
                Err(error) => {
                    tracing::warn!(
                        error = format!("{:#}", anyhow::Error::from(error)),
                        "this host's interfaces cannot be listed"
                    );
                    sleep(Duration::from_secs(1)).await;
                    continue;
                }
            };
            let known = self.state().nodes.get(&member.me).map(|node| node.facts.clone());
            if let Some(known) = known
                && known != facts
                && let Err(error) = self.execute("agent", Command::SetFacts { node: member.me, facts }).await
            {
                tracing::warn!(%error, "the cluster was not told of a change of this host");
                sleep(Duration::from_secs(1)).await;
                continue;
            }
            let changed = async {
                match &mut changes {
                    Some(changes) => {
                        if changes.recv().await.is_none() {
                            std::future::pending::<()>().await;
                        }
                    }
                    None => std::future::pending().await,
                }
            };
            let _ = timeout(EVERY, changed).await;
        }
    }
}

/// What VMs may use: what the administrator says, or what the host has less the reserve.
fn memory_for_vms(config: &Config) -> u64 {
    if let Ok(bytes) = parse_size(&config.memory) {
        return bytes;
    }
    let reserve = parse_size(&config.reserve_memory).unwrap_or(0);
    let total = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))?
            .trim()
            .trim_end_matches("kB")
            .trim()
            .to_owned();
        line.parse::<u64>().ok()
    });
    (total.unwrap_or(0) << 10).saturating_sub(reserve)
}
