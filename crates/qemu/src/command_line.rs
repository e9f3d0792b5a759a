//! From a VM's description to QEMU's command line: pure.
//!
//! What the guest sees depends on the [`VmSpec`] alone, never on the node: both
//! ends of a migration and every restart must build the same machine. Disks and
//! adapters have fixed PCI slots, so that one more of a kind renames nothing.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use holdfast_core::{Accelerator, Epoch, VmId, VmSpec};
use serde_json::{Value, json};

use crate::QemuError;

/// Slots of the root bus. 0x00 and 0x1f are the chipset's.
const SLOT_RNG: usize = 0x01;
const SLOT_BALLOON: usize = 0x02;
const SLOT_NICS: usize = 0x03;
const NICS_MAX: usize = 8;
const SLOT_DISKS: usize = SLOT_NICS + NICS_MAX;
const DISKS_MAX: usize = 0x1f - SLOT_DISKS;

/// The longest path of a unix socket (`sun_path` less its final zero).
const SOCKET_PATH_MAX: usize = 107;

/// The name under which a disk's one export is served at its socket.
pub const NBD_EXPORT: &str = "disk";

/// How long requests wait for a disk's server that is gone, in seconds; then the guest
/// stands still until it is back.
const NBD_RECONNECT_S: u32 = 300;

/// A character device of this name and the epoch's number tells an agent under
/// which epoch a QEMU was started.
pub(crate) const EPOCH_LABEL: &str = "epoch-";

/// Everything that decides a QEMU's command line.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// The program.
    pub binary: &'a Path,
    /// The VM.
    pub vm: VmId,
    /// Its name.
    pub name: &'a str,
    /// The epoch under which it is started.
    pub epoch: Epoch,
    /// What its guest sees.
    pub spec: &'a VmSpec,
    /// How its guest is run.
    pub accelerator: Accelerator,
    /// Whether the kernel moves its packets; only with KVM.
    pub vhost_net: bool,
    /// Where the disks are, one for each of the spec's.
    pub disks: Vec<DiskAt>,
    /// The files of a direct boot; needed when the spec asks for one.
    pub kernel: Option<Kernel>,
    /// The tap interfaces, one for each of the spec's NICs. They must exist:
    /// QEMU would silently make a missing one, plugged into nothing.
    pub taps: Vec<String>,
    /// An existing directory for the sockets, of this VM alone.
    pub run_dir: PathBuf,
    /// Wait for the guest to come from another QEMU
    /// ([`crate::prepare_incoming`]), and hold it still when it has come.
    pub incoming: bool,
    /// Hold the guest still from the start.
    pub paused: bool,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskAt {
    /// In a file, absolute.
    File(PathBuf),
    /// Served over NBD at a unix socket, absolute.
    Socket(PathBuf),
}

/// The files of a direct boot, absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial ramdisk.
    pub initrd: Option<PathBuf>,
}

impl Launch<'_> {
    /// The monitor's socket, for [`crate::Qmp::connect`].
    pub fn monitor_socket(run_dir: &Path) -> PathBuf {
        run_dir.join("qmp.sock")
    }

    /// A second monitor, for when the first one hangs or is taken.
    pub fn rescue_socket(run_dir: &Path) -> PathBuf {
        run_dir.join("qmp2.sock")
    }

    /// The serial console. It serves one client at a time. Without a client the
    /// guest's output goes to the log only and never blocks the guest; a client
    /// that is connected and does not read slows the guest's console down. So
    /// one reader (the agent) stays connected and serves everybody else.
    pub fn console_socket(run_dir: &Path) -> PathBuf {
        run_dir.join("serial.sock")
    }

    /// What the guest wrote to its serial console, appended. Bounded by
    /// [`crate::trim_log`].
    pub fn console_log(run_dir: &Path) -> PathBuf {
        run_dir.join("serial.log")
    }

    /// The command line, the program first.
    ///
    /// # Errors
    /// [`QemuError::Unfit`] when the parts do not fit together, or something in
    /// them cannot be said to QEMU.
    pub fn argv(&self) -> Result<Vec<OsString>, QemuError> {
        self.check()?;
        let mut argv = Arguments(vec![self.binary.into()]);
        argv.flag("-nodefaults");
        argv.flag("-no-user-config");
        argv.option("-name", format!("guest={},debug-threads=on", escape(self.name)));
        argv.option("-uuid", self.vm.to_string());
        self.machine(&mut argv);
        self.lifecycle(&mut argv)?;
        self.console(&mut argv)?;
        self.boot(&mut argv);
        self.disks(&mut argv)?;
        self.nics(&mut argv);
        argv.json("-object", json!({"qom-type": "rng-random", "id": "rng", "filename": "/dev/urandom"}));
        argv.json("-device", json!({"driver": "virtio-rng-pci", "id": "rng0", "rng": "rng", "addr": slot(SLOT_RNG)}));
        // Not to take memory from the guest, which is never overcommitted, but
        // to learn what the guest does not use.
        argv.json(
            "-device",
            json!({
                "driver": "virtio-balloon-pci",
                "id": "balloon0",
                "addr": slot(SLOT_BALLOON),
                "free-page-reporting": true,
                "deflate-on-oom": true,
            }),
        );
        Ok(argv.0)
    }

    fn check(&self) -> Result<(), QemuError> {
        let spec = self.spec;
        let unfit = |why: String| Err(QemuError::Unfit { why });
        if !spec.machine.starts_with("pc-q35-") {
            return unfit(format!("its machine type is {:?}: only versioned pc-q35 types are supported", spec.machine));
        }
        if spec.cpus == 0 {
            return unfit("it has no processor".into());
        }
        if spec.memory_bytes == 0 || !spec.memory_bytes.is_multiple_of(1 << 20) {
            return unfit(format!("its memory is {} bytes: it must be a multiple of 1 MiB", spec.memory_bytes));
        }
        for (what, given, wanted, most) in [
            ("disks", self.disks.len(), spec.disks.len(), DISKS_MAX),
            ("network adapters", self.taps.len(), spec.nics.len(), NICS_MAX),
        ] {
            if given != wanted {
                return unfit(format!("it has {wanted} {what}, and {given} were given"));
            }
            if wanted > most {
                return unfit(format!("it has {wanted} {what}: at most {most} fit"));
            }
        }
        if spec.direct_boot.is_some() != self.kernel.is_some() {
            return unfit("its kernel's files are missing, or it boots from its disk".into());
        }
        let option_like = |text: &str| text.contains([',', '\0', '\n']);
        if let Some(cpu) = &spec.cpu_model
            && (cpu.is_empty() || cpu.contains(['\0', '\n']))
        {
            return unfit(format!("{cpu:?} is no processor model"));
        }
        if option_like(&spec.machine) {
            return unfit(format!("{:?} is no machine type", spec.machine));
        }
        if self.name.contains('\0') {
            return unfit(format!("its name {:?} contains a zero", self.name));
        }
        Ok(())
    }

    fn machine(&self, argv: &mut Arguments) {
        let spec = self.spec;
        // No legacy hardware that no guest of ours uses: it costs boot time and
        // timers, and widens what a hostile guest can reach. graphics=off makes
        // the firmware speak on the serial console.
        argv.option(
            "-machine",
            format!(
                "{},memory-backend=ram,usb=off,sata=off,smbus=off,vmport=off,hpet=off,\
                 graphics=off,dump-guest-core=off",
                spec.machine
            ),
        );
        let (accelerator, cpu) = match self.accelerator {
            Accelerator::Kvm => ("kvm", "host,migratable=on"),
            // TCG has no 5-level paging that every kernel gets along with.
            Accelerator::Tcg => ("tcg,thread=multi", "max,la57=off"),
        };
        argv.option("-accel", accelerator);
        argv.option("-cpu", spec.cpu_model.as_deref().unwrap_or(cpu));
        argv.option("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", spec.cpus));
        let memory_bytes = self.ram_bytes();
        argv.option("-m", format!("size={}K", memory_bytes >> 10));
        argv.json("-object", json!({"qom-type": "memory-backend-ram", "id": "ram", "size": memory_bytes}));
        argv.option("-rtc", "base=utc,driftfix=slew");
        argv.option("-display", "none");
        argv.json("-device", json!({"driver": "pvpanic", "id": "panic0"}));
    }

    /// The guest's RAM.
    ///
    /// QEMU before 9.0 loses writes of a guest that it migrates under TCG: it
    /// takes the dirty bitmap in words of 64 pages and does not tell the
    /// translated code, whose further writes to these pages go unnoticed. Seen
    /// with 7.2.22: a guest that dirties 128 pages without end was reported to
    /// dirty one. RAM that is no multiple of 64 pages is taken page by page, and
    /// rightly (at the price of some 200 ms for each 256 MiB when a migration
    /// begins). So such guests get 8 KiB less than they ask for; which ones is
    /// decided by what both ends of a migration have in common.
    fn ram_bytes(&self) -> u64 {
        let fixed = machine_version(&self.spec.machine).is_some_and(|version| version >= (9, 0));
        match self.accelerator {
            Accelerator::Tcg if !fixed => self.spec.memory_bytes - (8 << 10),
            _ => self.spec.memory_bytes,
        }
    }

    /// How it is watched, and what it does at its ends.
    fn lifecycle(&self, argv: &mut Arguments) -> Result<(), QemuError> {
        // A guest that powers off or panics leaves QEMU standing, so that an
        // agent that was away still learns which of the two it was.
        argv.option("-action", "shutdown=pause,panic=pause");
        argv.option("-msg", "timestamp=on");
        argv.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        for (id, socket) in [("qmp", Self::monitor_socket(&self.run_dir)), ("qmp2", Self::rescue_socket(&self.run_dir))]
        {
            argv.option("-chardev", format!("socket,id={id},server=on,wait=off,path={}", path(&socket)?));
            argv.option("-mon", format!("chardev={id},mode=control"));
        }
        argv.option("-chardev", format!("null,id={EPOCH_LABEL}{}", self.epoch));
        if self.incoming {
            argv.option("-incoming", "defer");
        }
        if self.incoming || self.paused {
            argv.flag("-S");
        }
        Ok(())
    }

    fn console(&self, argv: &mut Arguments) -> Result<(), QemuError> {
        argv.option(
            "-chardev",
            format!(
                "socket,id=serial,server=on,wait=off,path={},logfile={},logappend=on",
                path(&Self::console_socket(&self.run_dir))?,
                path(&Self::console_log(&self.run_dir))?
            ),
        );
        argv.json("-device", json!({"driver": "isa-serial", "id": "serial0", "chardev": "serial"}));
        Ok(())
    }

    fn boot(&self, argv: &mut Arguments) {
        argv.option("-boot", "strict=on");
        let (Some(direct), Some(files)) = (&self.spec.direct_boot, &self.kernel) else {
            return;
        };
        argv.option("-kernel", &files.kernel);
        if let Some(initrd) = &files.initrd {
            argv.option("-initrd", initrd);
        }
        if !direct.append.is_empty() {
            argv.option("-append", &direct.append);
        }
    }

    fn disks(&self, argv: &mut Arguments) -> Result<(), QemuError> {
        if self.disks.is_empty() {
            return Ok(());
        }
        // The guest's requests do not wait for the monitor, nor it for them.
        argv.json("-object", json!({"qom-type": "iothread", "id": "io0"}));
        for (index, (disk, at)) in self.spec.disks.iter().zip(&self.disks).enumerate() {
            let id = disk_id(index);
            let (DiskAt::File(place) | DiskAt::Socket(place)) = at;
            if !place.is_absolute() {
                return Err(QemuError::Unfit {
                    why: format!("the path of its disk {} is not absolute", place.display()),
                });
            }
            argv.json("-blockdev", protocol(&id, at)?);
            argv.json(
                "-blockdev",
                json!({
                    "driver": disk.format.as_str(),
                    "node-name": id,
                    "file": format!("{id}-file"),
                    "cache": {"direct": true, "no-flush": false},
                    "discard": if disk.takes_discards() { "unmap" } else { "ignore" },
                }),
            );
            let mut device = json!({
                    "driver": "virtio-blk-pci",
                    "id": id,
                    "drive": id,
                    "serial": id,
                    "addr": slot(SLOT_DISKS + index),
                    "bootindex": index + 1,
                    "iothread": "io0",
                    // A guest that sees errors may give its file system up; one
                    // that stands still can go on when the disk is back.
                    "werror": "stop",
                    "rerror": "stop",
            });
            if !disk.takes_discards() {
                device["discard"] = false.into();
            }
            argv.json("-device", device);
        }
        Ok(())
    }

    fn nics(&self, argv: &mut Arguments) {
        for (index, (nic, tap)) in self.spec.nics.iter().zip(&self.taps).enumerate() {
            let id = format!("nic{index}");
            let mut backend = json!({
                "type": "tap",
                "id": id,
                "ifname": tap,
                "script": "no",
                "downscript": "no",
            });
            if self.vhost_net && self.accelerator == Accelerator::Kvm {
                backend["vhost"] = true.into();
            }
            argv.json("-netdev", backend);
            argv.json(
                "-device",
                json!({
                    "driver": "virtio-net-pci",
                    "id": id,
                    "netdev": id,
                    "mac": nic.mac.to_string(),
                    "addr": slot(SLOT_NICS + index),
                    // No boot from the network: its firmware costs boot time.
                    "romfile": "",
                }),
            );
        }
    }
}

/// The block node that fetches a disk's bytes.
fn protocol(id: &str, at: &DiskAt) -> Result<Value, QemuError> {
    let name = format!("{id}-file");
    Ok(match at {
        // The page cache of the host would keep what another host must see,
        // and lie about what is on the disk. QEMU's own locks stay on.
        DiskAt::File(file) => json!({
            "driver": "file",
            "node-name": name,
            "filename": utf8(file)?,
            "aio": "threads",
            "cache": {"direct": true, "no-flush": false},
            "discard": "unmap",
        }),
        DiskAt::Socket(socket) => {
            // Too long a path would fail only when QEMU runs.
            path(socket)?;
            json!({
                "driver": "nbd",
                "node-name": name,
                "server": {"type": "unix", "path": utf8(socket)?},
                "export": NBD_EXPORT,
                "reconnect-delay": NBD_RECONNECT_S,
                "cache": {"direct": true, "no-flush": false},
                "discard": "unmap",
            })
        }
    })
}

/// A disk's id, and the name of its block node.
pub(crate) fn disk_id(index: usize) -> String {
    format!("disk{index}")
}

/// The QEMU that brought a machine type, which is the oldest that can run it.
fn machine_version(machine: &str) -> Option<(u32, u32)> {
    let mut parts = machine.strip_prefix("pc-q35-")?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn slot(number: usize) -> String {
    format!("{number:#x}")
}

/// Doubles the commas, which separate an option's parts.
fn escape(text: &str) -> String {
    text.replace(',', ",,")
}

fn utf8(path: &Path) -> Result<&str, QemuError> {
    path.to_str().ok_or_else(|| QemuError::Unfit { why: format!("the path {} is not valid UTF-8", path.display()) })
}

/// A path as a part of an option; short enough for a socket.
fn path(path: &Path) -> Result<String, QemuError> {
    let text = utf8(path)?;
    if text.len() > SOCKET_PATH_MAX {
        return Err(QemuError::Unfit {
            why: format!(
                "the path {text} is longer than the {SOCKET_PATH_MAX} bytes of a socket's: use a shorter run directory"
            ),
        });
    }
    Ok(escape(text))
}

struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }

    fn json(&mut self, name: &str, value: Value) {
        self.option(name, value.to_string());
    }
}
