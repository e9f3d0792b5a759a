//! What can be written after `holdfast vm`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use holdfast_api as api;

/// `holdfast vm`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Create a VM.
    Create(Box<CreateArgs>),
    /// List the VMs.
    List,
    /// Show a VM.
    Show {
        /// Its name.
        name: String,
        /// Print its definition, which `vm create -f` takes.
        #[arg(short, long, value_enum)]
        output: Option<DefinitionFormat>,
    },
    /// Start a VM.
    Start(JobArgs),
    /// Shut a VM down.
    Stop {
        /// Which, and whether to wait.
        #[command(flatten)]
        vm: JobArgs,
        /// Switch it off at once, whatever the guest is doing.
        #[arg(long)]
        force: bool,
    },
    /// Shut a VM down and start it again.
    Restart(JobArgs),
    /// Make a VM's processors stand still; its memory is kept.
    Pause(JobArgs),
    /// Let a paused VM go on.
    Resume(JobArgs),
    /// Delete a VM that is off, and its disks.
    Delete(JobArgs),
    /// Connect to a VM's serial console; Ctrl-] leaves it.
    Console {
        /// Its name.
        name: String,
    },
    /// Move a VM to another node while it runs.
    Migrate {
        /// Which, and whether to wait.
        #[command(flatten)]
        vm: JobArgs,
        /// Where to; the node with the most room when absent.
        #[arg(long, value_name = "NODE")]
        to: Option<String>,
    },
}

/// A VM and whether its job is waited for.
#[derive(Clone, Debug, Args)]
pub struct JobArgs {
    /// Its name.
    pub name: String,
    /// Waiting.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Whether a job is waited for.
#[derive(Clone, Copy, Debug, Args)]
pub struct WaitArgs {
    /// Print the job's number and do not wait for it.
    #[arg(long)]
    pub no_wait: bool,
}

/// How a definition is printed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DefinitionFormat {
    /// As YAML.
    Yaml,
    /// As JSON.
    Json,
}

/// `holdfast vm create`.
#[derive(Clone, Debug, Args)]
pub struct CreateArgs {
    /// Its name.
    #[arg(required_unless_present = "file")]
    pub name: Option<String>,
    /// Take the definition from this file, YAML or JSON; - is the standard input.
    /// A name on the command line replaces the file's.
    #[arg(
        short,
        long,
        value_name = "FILE",
        conflicts_with_all = ["cpus", "memory", "disk", "image", "nic", "kernel", "initrd", "append", "priority", "machine", "cpu_model"]
    )]
    pub file: Option<PathBuf>,
    /// Virtual processors.
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
    /// RAM, like 512M or 4G.
    #[arg(long, default_value = "1G", value_name = "SIZE")]
    pub memory: api::Size,
    /// A disk: VOLUME[:SIZE][,format=raw|qcow2|vhdx|vhd][,allocate=full]; the boot disk first.
    /// Without SIZE it is as large as its image. VOLUME,file=PATH takes a disk that is there on an
    /// imported LUN (see `holdfast volume ls`).
    #[arg(long, value_name = "VOLUME:SIZE", value_parser = disk)]
    pub disk: Vec<api::DiskDefinition>,
    /// Fill the first disk from this image: a file of the node that is asked, or
    /// VOLUME:PATH.
    #[arg(long, value_name = "FILE", requires = "disk")]
    pub image: Option<String>,
    /// A network adapter: SWITCH[,mac=52:54:00:12:34:56][,vlan=10].
    #[arg(long, value_name = "SWITCH", value_parser = nic)]
    pub nic: Vec<api::NicDefinition>,
    /// Boot this kernel directly: a file of the node that is asked, or VOLUME:PATH.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<String>,
    /// The initial ramdisk for --kernel.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<String>,
    /// The command line for --kernel.
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Order and preference after a failure; none: never restarted elsewhere.
    #[arg(long, value_enum, default_value = "medium")]
    pub priority: PriorityArg,
    /// QEMU's machine type, versioned; the newest that all nodes offer when absent.
    #[arg(long, value_name = "TYPE")]
    pub machine: Option<String>,
    /// QEMU's CPU model.
    #[arg(long, value_name = "MODEL")]
    pub cpu_model: Option<String>,
    /// Start it when its disks are there.
    #[arg(long)]
    pub start: bool,
    /// Waiting.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Order and preference after a failure.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PriorityArg {
    /// Placed first.
    High,
    /// The default.
    Medium,
    /// Placed last.
    Low,
    /// Never restarted elsewhere.
    None,
}

/// Reads `VOLUME[:SIZE][,format=raw|qcow2|vhdx|vhd][,allocate=thin|full][,file=PATH]`.
fn disk(text: &str) -> Result<api::DiskDefinition, String> {
    let mut parts = text.split(',');
    let first = parts.next().unwrap_or_default();
    let (volume, size) = match first.split_once(':') {
        Some((volume, size)) => {
            let size = size.parse().map_err(|error: api::BadSize| error.to_string())?;
            (volume, Some(size))
        }
        None => (first, None),
    };
    if volume.is_empty() {
        return Err("name the volume: VOLUME:SIZE".into());
    }
    let (mut format, mut allocate, mut file) = (api::DiskFormat::Qcow2, api::Allocation::Thin, None);
    for part in parts {
        match part.split_once('=') {
            Some(("format", "raw")) => format = api::DiskFormat::Raw,
            Some(("format", "qcow2")) => format = api::DiskFormat::Qcow2,
            Some(("format", "vhdx")) => format = api::DiskFormat::Vhdx,
            Some(("format", "vhd")) => format = api::DiskFormat::Vhd,
            Some(("allocate", "thin")) => allocate = api::Allocation::Thin,
            Some(("allocate", "full")) => allocate = api::Allocation::Full,
            Some(("file", name)) => file = Some(name.to_owned()),
            _ => {
                let settings = "write format=raw|qcow2|vhdx|vhd, allocate=thin|full or file=PATH";
                return Err(format!("{part:?} is no setting of a disk: {settings}"));
            }
        }
    }
    Ok(api::DiskDefinition { volume: volume.into(), size, format, allocate, image: None, file })
}

/// Reads `SWITCH[,mac=…][,vlan=…]`.
fn nic(text: &str) -> Result<api::NicDefinition, String> {
    let mut parts = text.split(',');
    let switch = parts.next().filter(|switch| !switch.is_empty()).ok_or("name the switch")?.to_owned();
    let mut nic = api::NicDefinition { switch, mac: None, vlan: None };
    for part in parts {
        match part.split_once('=') {
            Some(("mac", mac)) => nic.mac = Some(mac.into()),
            Some(("vlan", vlan)) => {
                let id = vlan.parse().ok().filter(|id| (1..=4094).contains(id));
                nic.vlan = Some(id.ok_or_else(|| format!("{vlan:?} is no VLAN: write 1 to 4094"))?);
            }
            _ => return Err(format!("{part:?} is no setting of a NIC: write mac=… or vlan=…")),
        }
    }
    Ok(nic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_read_as_written() {
        let plain = disk("main").unwrap();
        assert_eq!((plain.size, plain.format), (None, api::DiskFormat::Qcow2));
        let raw = disk("main:20G,format=raw").unwrap();
        assert_eq!(
            (raw.volume.as_str(), raw.size, raw.format),
            ("main", Some(api::Size(20 << 30)), api::DiskFormat::Raw)
        );
        let full = disk("main:1G,allocate=full,format=qcow2").unwrap();
        assert_eq!((full.format, full.allocate), (api::DiskFormat::Qcow2, api::Allocation::Full));
        assert_eq!(raw.allocate, api::Allocation::Thin);
        assert!(disk("main:1G,allocate=some").unwrap_err().contains("allocate=thin|full"));
        assert_eq!(disk("main:1G,format=vhdx").unwrap().format, api::DiskFormat::Vhdx);
        assert_eq!(disk("main:1G,format=vhd").unwrap().format, api::DiskFormat::Vhd);
        assert!(disk("main:1G,format=vpc").unwrap_err().contains("vhd"));
        let there = disk("san,file=vms/web-1/disk0.raw").unwrap();
        assert_eq!((there.size, there.file.as_deref()), (None, Some("vms/web-1/disk0.raw")));
    }
}
