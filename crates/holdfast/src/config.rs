//! `/etc/holdfast/config.toml`: every key is optional, and each can be set by an
//! environment variable `HOLDFAST_<KEY>` too, which wins over the file.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::keeper::watchdog::Choice;

/// Where the configuration is looked for when no file is named.
pub const DEFAULT_PATH: &str = "/etc/holdfast/config.toml";

/// What an administrator can set on one host. What concerns the whole cluster is
/// part of its state instead (`holdfast cluster profile`, `holdfast network set`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// This host's name in the cluster; its host name when empty.
    pub node_name: String,
    /// The site at which this host stands when it founds or joins a cluster; none
    /// when empty.
    pub site: String,
    /// What this host has to keep: identity and log.
    pub state_dir: PathBuf,
    /// Sockets, and everything that is worth nothing after a reboot.
    pub run_dir: PathBuf,
    /// Volumes appear below it, each under its name.
    pub volumes_dir: PathBuf,
    /// Other nodes and remote clients reach the agent on this TCP port, and
    /// heartbeats arrive on the UDP port of the same number.
    pub port: u16,
    /// The volume servers of other nodes reach this host's on this TCP port.
    pub volume_port: u16,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// Where the fence agents are, which switch other nodes' hosts off.
    pub fence_agents_dir: PathBuf,
    /// The hardware watchdog: `auto`, `none`, or a device like `/dev/watchdog0`.
    pub watchdog: String,
    /// Where LUNs are looked for that are not where they were on the node that added
    /// them.
    pub lun_dir: PathBuf,
    /// Whether the files of volumes on LUNs are shown below `volumes_dir`, for reading.
    pub mount_luns: bool,
    /// Memory that VMs may use, in bytes or as `12G`; what the host has, less
    /// `reserve_memory`, when empty.
    pub memory: String,
    /// Memory that is left to the host, in bytes or as `2G`.
    pub reserve_memory: String,
    /// Processors that VMs may use; all when 0.
    pub cpus: u32,
    /// Interfaces whose addresses are not used for the cluster.
    pub ignore_interfaces: Vec<String>,
    /// What is logged: `error`, `warn`, `info`, `debug`, or a tracing filter.
    pub log: String,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            node_name: String::new(),
            site: String::new(),
            state_dir: "/var/lib/holdfast".into(),
            run_dir: "/run/holdfast".into(),
            volumes_dir: "/clusterstorage".into(),
            port: 7470,
            volume_port: 7471,
            qemu: "qemu-system-x86_64".into(),
            fence_agents_dir: "/usr/sbin".into(),
            watchdog: "auto".into(),
            lun_dir: "/dev/disk/by-id".into(),
            mount_luns: true,
            memory: String::new(),
            reserve_memory: "1G".into(),
            cpus: 0,
            ignore_interfaces: Vec::new(),
            log: "info".into(),
        }
    }
}

impl Config {
    /// Reads the file, then the environment. A file that was named must be
    /// there; the default one need not.
    ///
    /// # Errors
    /// The file cannot be read or holds an unknown key or a bad value.
    pub fn load(path: Option<&Path>) -> Result<Config> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read the configuration {}", file.display()));
            }
        };
        let mut config: Config =
            toml::from_str(&text).with_context(|| format!("the configuration {} is not valid", file.display()))?;
        config.overlay(|key| std::env::var(key).ok())?;
        config.check().with_context(|| format!("the configuration {} is not valid", file.display()))?;
        Ok(config)
    }

    fn overlay(&mut self, variable: impl Fn(&str) -> Option<String>) -> Result<()> {
        let set = |key: &str, field: &mut String| {
            if let Some(value) = variable(key) {
                *field = value;
            }
        };
        set("HOLDFAST_NODE_NAME", &mut self.node_name);
        set("HOLDFAST_SITE", &mut self.site);
        set("HOLDFAST_WATCHDOG", &mut self.watchdog);
        set("HOLDFAST_MEMORY", &mut self.memory);
        set("HOLDFAST_RESERVE_MEMORY", &mut self.reserve_memory);
        set("HOLDFAST_LOG", &mut self.log);
        let set = |key: &str, field: &mut PathBuf| {
            if let Some(value) = variable(key) {
                *field = value.into();
            }
        };
        set("HOLDFAST_STATE_DIR", &mut self.state_dir);
        set("HOLDFAST_RUN_DIR", &mut self.run_dir);
        set("HOLDFAST_VOLUMES_DIR", &mut self.volumes_dir);
        set("HOLDFAST_QEMU", &mut self.qemu);
        set("HOLDFAST_FENCE_AGENTS_DIR", &mut self.fence_agents_dir);
        set("HOLDFAST_LUN_DIR", &mut self.lun_dir);
        if let Some(value) = variable("HOLDFAST_PORT") {
            self.port = value.parse().with_context(|| format!("HOLDFAST_PORT={value:?} is not a port"))?;
        }
        if let Some(value) = variable("HOLDFAST_VOLUME_PORT") {
            self.volume_port =
                value.parse().with_context(|| format!("HOLDFAST_VOLUME_PORT={value:?} is not a port"))?;
        }
        if let Some(value) = variable("HOLDFAST_MOUNT_LUNS") {
            self.mount_luns =
                value.parse().with_context(|| format!("HOLDFAST_MOUNT_LUNS={value:?} is neither true nor false"))?;
        }
        if let Some(value) = variable("HOLDFAST_CPUS") {
            self.cpus = value.parse().with_context(|| format!("HOLDFAST_CPUS={value:?} is not a number"))?;
        }
        if let Some(value) = variable("HOLDFAST_IGNORE_INTERFACES") {
            self.ignore_interfaces = value.split(',').map(str::to_owned).collect();
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        for (key, path) in
            [("state_dir", &self.state_dir), ("run_dir", &self.run_dir), ("volumes_dir", &self.volumes_dir)]
        {
            if !path.is_absolute() {
                bail!("{key} = {:?} is not an absolute path", path.display());
            }
        }
        if self.port == 0 {
            bail!("port = 0: choose a port from 1 to 65535");
        }
        if self.volume_port == 0 || self.volume_port == self.port {
            bail!("volume_port = {}: choose a port from 1 to 65535 that is not `port`", self.volume_port);
        }
        if !self.memory.is_empty() {
            parse_size(&self.memory)?;
        }
        parse_size(&self.reserve_memory)?;
        self.watchdog()?;
        Ok(())
    }

    /// Which hardware watchdog the keeper uses.
    ///
    /// # Errors
    /// Says what can be chosen.
    pub fn watchdog(&self) -> Result<Choice> {
        self.watchdog.parse().map_err(anyhow::Error::msg)
    }

    /// The site at which this host stands, if it was said.
    pub fn site(&self) -> Option<String> {
        (!self.site.is_empty()).then(|| self.site.clone())
    }

    /// This host's name in the cluster.
    pub fn name(&self) -> String {
        if !self.node_name.is_empty() {
            return self.node_name.clone();
        }
        let name = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.split('.').next().filter(|name| !name.is_empty()).unwrap_or("host").to_owned()
    }

    /// Where the agent's API answers on this host.
    pub fn agent_socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// Where the sockets and logs of a VM that runs here are.
    pub fn vm_dir(&self, vm: holdfast_core::VmId) -> PathBuf {
        self.run_dir.join("guests").join(vm.to_string())
    }

    /// Where the keeper answers on this host.
    pub fn keeper_socket(&self) -> PathBuf {
        self.run_dir.join("keeper.sock")
    }
}

/// Reads a size in bytes: `512M`, `20G`, `1T`, or a plain number. Units are
/// powers of 1024.
///
/// # Errors
/// Says what a size looks like.
pub fn parse_size(text: &str) -> Result<u64> {
    let trimmed = text.trim().trim_end_matches(['B', 'b']).trim_end_matches('i');
    let (digits, shift) = match trimmed.char_indices().last() {
        Some((at, 'K' | 'k')) => (&trimmed[..at], 10),
        Some((at, 'M' | 'm')) => (&trimmed[..at], 20),
        Some((at, 'G' | 'g')) => (&trimmed[..at], 30),
        Some((at, 'T' | 't')) => (&trimmed[..at], 40),
        _ => (trimmed, 0),
    };
    let number: Option<u64> = digits.trim().parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .with_context(|| format!("{text:?} is not a size: write it like 512M, 20G or 1T"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("4K", 4096), ("512M", 512 << 20), ("20GiB", 20 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "G", "-1G", "1.5G", "20X", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_environment_wins_and_unknown_keys_are_refused() {
        let mut config: Config = toml::from_str("port = 1000\nmemory = \"4G\"").unwrap();
        config.overlay(|key| (key == "HOLDFAST_PORT").then(|| "2000".into())).unwrap();
        assert_eq!((config.port, config.memory.as_str()), (2000, "4G"));
        assert!(config.overlay(|key| (key == "HOLDFAST_PORT").then(|| "x".into())).is_err());
        assert!(toml::from_str::<Config>("prot = 1000").is_err());
    }

    #[test]
    fn only_a_watchdog_is_taken_for_one() {
        let chosen = |watchdog: &str| Config { watchdog: watchdog.into(), ..Config::default() }.watchdog();
        assert_eq!(chosen("auto").unwrap(), Choice::Auto);
        assert_eq!(chosen("none").unwrap(), Choice::Never);
        assert_eq!(chosen("/dev/watchdog").unwrap(), Choice::Named("watchdog0".into()));
        assert_eq!(chosen("/dev/watchdog7").unwrap(), Choice::Named("watchdog7".into()));
        for other in ["", "yes", "/dev/sda", "/dev/watchdog0/../sda", "watchdog0"] {
            assert!(chosen(other).is_err(), "{other}");
        }
    }

    #[test]
    fn the_packaged_example_holds_the_defaults() {
        let example: Config = toml::from_str(include_str!("../../../packaging/config.toml")).unwrap();
        assert_eq!(example, Config::default());
    }
}
