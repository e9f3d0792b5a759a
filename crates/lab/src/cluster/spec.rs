//! What a cluster in the lab is made from.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use holdfast_api::ProfileName;

/// The tiny guest, as `guest/build.sh` makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestImages {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial ramdisk.
    pub initrd: PathBuf,
}

impl GuestImages {
    /// The images in a directory; of the kernels the one that boots sooner.
    ///
    /// # Errors
    /// When an image is not there.
    pub fn inside(directory: &Path) -> Result<Self> {
        let directory = directory
            .canonicalize()
            .with_context(|| format!("there is no tiny guest at {}: run guest/build.sh", directory.display()))?;
        let unpacked = directory.join("vmlinux");
        let kernel = if unpacked.is_file() { unpacked } else { directory.join("vmlinuz") };
        let images = Self { kernel, initrd: directory.join("initrd.cpio") };
        for image in [&images.kernel, &images.initrd] {
            ensure!(image.is_file(), "{} is not there: run guest/build.sh", image.display());
        }
        Ok(images)
    }
}

/// What a [`super::Cluster`] is made from.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// How many nodes.
    pub nodes: usize,
    /// What the VMs of one node may use, as the configuration has it: `4G`.
    pub memory_per_node: String,
    /// The failover profile.
    pub profile: ProfileName,
    /// The built program `holdfast`; the path is absolute.
    pub binary: PathBuf,
    /// The guest that VMs boot.
    pub guest: GuestImages,
    /// What the nodes log.
    pub log: String,
    /// More lines, in TOML, for the configuration of the hosts with these names;
    /// they replace the lines with the same keys.
    pub configuration: BTreeMap<String, BTreeMap<String, String>>,
}

impl ClusterSpec {
    /// Three nodes with 4 GiB each, the default profile.
    ///
    /// # Errors
    /// When the program or the guest's images are not there.
    pub fn new(binary: impl AsRef<Path>, guest: impl AsRef<Path>) -> Result<Self> {
        let binary = binary.as_ref();
        Ok(Self {
            nodes: 3,
            memory_per_node: "4G".into(),
            profile: ProfileName::Default,
            binary: binary
                .canonicalize()
                .with_context(|| format!("{} is not there: cargo build -p holdfast", binary.display()))?,
            guest: GuestImages::inside(guest.as_ref())?,
            log: "info".into(),
            configuration: BTreeMap::new(),
        })
    }

    /// The same with one key of one host's configuration set; `value` is text.
    pub fn configure(mut self, host: &str, key: &str, value: &str) -> Self {
        self.configuration.entry(host.into()).or_default().insert(key.into(), value.into());
        self
    }

    /// The file of a host whose own directory is at `root`, and which finds fence
    /// agents in `fence_agents`.
    pub(super) fn configuration(&self, host: &str, root: &Path, fence_agents: &Path) -> String {
        let directory = |name: &str| root.join(name).display().to_string();
        let mut keys = BTreeMap::from([
            ("node_name".to_owned(), host.to_owned()),
            ("state_dir".to_owned(), directory("var")),
            ("run_dir".to_owned(), directory("run")),
            ("volumes_dir".to_owned(), directory("clusterstorage")),
            ("fence_agents_dir".to_owned(), fence_agents.display().to_string()),
            // All hosts are one machine, and that must not be reset.
            ("watchdog".to_owned(), "none".to_owned()),
            ("memory".to_owned(), self.memory_per_node.clone()),
            ("log".to_owned(), self.log.clone()),
        ]);
        keys.extend(self.configuration.get(host).cloned().unwrap_or_default());
        keys.iter().fold(String::new(), |mut text, (key, value)| {
            let _ = writeln!(text, "{key} = {value:?}");
            text
        })
    }
}
