//! VMs that boot the tiny guest.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use holdfast_api::{
    Allocation, CreateVm, DiskDefinition, DiskFormat, KernelBoot, NicDefinition, Priority, Size, VmDefinition, VmState,
};

use super::{ApiError, Cluster, SWITCH, VOLUME};
use crate::guest::{self, GuestClient, ImageFormat, Prober, RecordsReport, TcpSession, Writer};

/// How long a VM may take until its guest answers, on a busy machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(60);
const OFF_DEADLINE: Duration = Duration::from_secs(30);
/// A writer's and a session's patience: longer than a failover.
const PATIENCE: Duration = Duration::from_secs(60);
const PRODUCTION_PREFIX: u8 = 24;

/// What boots soonest; see guest/README.md.
const APPEND: &str = "console=ttyS0 panic=1 quiet nokaslr mitigations=off tsc=reliable no_timer_check \
                      cryptomgr.notests random.trust_cpu=on 8250.nr_uarts=1 audit=0 rcupdate.rcu_expedited=1";

/// A VM to be made.
#[derive(Debug, Clone)]
pub struct VmTemplate {
    /// Its name.
    pub name: String,
    /// Its guest's address on the production network.
    pub ip: Ipv4Addr,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// The volume of its one disk.
    pub volume: String,
    /// Size of its one disk in bytes.
    pub disk_bytes: u64,
    /// How the disk is laid out.
    pub format: DiskFormat,
    /// Order and preference after a failure.
    pub priority: Priority,
    /// What is added to the guest kernel's command line, such as `hf.fill=64`.
    pub append: String,
    /// Start it and wait until its guest answers.
    pub start: bool,
}

impl VmTemplate {
    /// A VM with 128 MiB of RAM and a raw disk of 64 MiB, whose guest has the
    /// address .`last` on the production network; it is started.
    pub fn new(name: &str, last: u8) -> Self {
        Self {
            name: name.into(),
            ip: Cluster::guest_address(last),
            memory_bytes: 128 << 20,
            volume: VOLUME.into(),
            disk_bytes: 64 << 20,
            format: DiskFormat::Raw,
            priority: Priority::Medium,
            append: String::new(),
            start: true,
        }
    }

    /// The same with another amount of RAM.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory_bytes = bytes;
        self
    }

    /// The same with its disk on another volume, so many bytes large.
    pub fn disk(mut self, volume: &str, bytes: u64) -> Self {
        (self.volume, self.disk_bytes) = (volume.into(), bytes);
        self
    }

    /// The same with another priority.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// The same with more on the guest kernel's command line.
    pub fn append(mut self, text: &str) -> Self {
        self.append = text.into();
        self
    }

    /// The same, left off.
    pub fn off(mut self) -> Self {
        self.start = false;
        self
    }
}

/// A VM that was made, as its user sees it.
#[derive(Debug, Clone)]
pub struct GuestVm {
    /// Its name.
    pub name: String,
    /// Its guest's address.
    pub ip: Ipv4Addr,
    /// Its id, also its guest's UUID.
    pub id: String,
    /// Its disk's file, as this process sees it.
    pub image: PathBuf,
    /// How the file is laid out.
    pub format: DiskFormat,
    /// The namespace in which its users are.
    pub netns: String,
}

impl GuestVm {
    /// Where its guest serves.
    pub fn address(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.ip, guest::PORT)
    }

    /// A client of its guest.
    ///
    /// # Errors
    /// When the lab is gone.
    pub fn client(&self) -> Result<GuestClient> {
        GuestClient::connect(Some(&self.netns), self.ip)
    }

    /// Waits until its guest answers.
    ///
    /// # Errors
    /// When it does not within `deadline`.
    pub fn wait_answer(&self, deadline: Duration) -> Result<guest::Reply> {
        self.client()?.ping(deadline)
    }

    /// Starts to ping its guest every 5 ms.
    ///
    /// # Errors
    /// When the lab is gone.
    pub fn probe(&self) -> Result<Prober> {
        Prober::start(Some(&self.netns), self.address(), Duration::from_millis(5))
    }

    /// Has its guest write a record every `interval`.
    ///
    /// # Errors
    /// When the lab is gone.
    pub fn writer(&self, interval: Duration) -> Result<Writer> {
        Writer::start(Some(&self.netns), self.address(), interval, Duration::from_millis(500))
    }

    /// Opens a TCP connection to its guest and keeps it busy.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn session(&self) -> Result<TcpSession> {
        TcpSession::start(Some(&self.netns), self.address(), Duration::from_millis(20), PATIENCE)
    }

    /// Reads the records on its disk; no QEMU may have it open.
    ///
    /// # Errors
    /// As for [`guest::verify_records`].
    pub fn verify(&self) -> Result<RecordsReport> {
        let format = match self.format {
            DiskFormat::Raw => ImageFormat::Raw,
            DiskFormat::Qcow2 => ImageFormat::Qcow2,
            DiskFormat::Vhdx => ImageFormat::Vhdx,
            DiskFormat::Vhd => ImageFormat::Vhd,
        };
        guest::verify_records(&self.image, format)
    }
}

impl Cluster {
    /// What creates a VM like the template.
    pub fn definition(&self, template: &VmTemplate) -> VmDefinition {
        let guest = &self.spec().guest;
        let address = format!("hf.ip={}/{PRODUCTION_PREFIX}", template.ip);
        VmDefinition {
            name: template.name.clone(),
            cpus: 1,
            memory: Size(template.memory_bytes),
            machine: None,
            cpu_model: None,
            boot: Some(KernelBoot {
                kernel: guest.kernel.display().to_string(),
                initrd: Some(guest.initrd.display().to_string()),
                append: format!("{APPEND} {address} {}", template.append).trim_end().to_owned(),
            }),
            disks: vec![DiskDefinition {
                volume: template.volume.clone(),
                size: Some(Size(template.disk_bytes)),
                format: template.format,
                allocate: Allocation::Thin,
                image: None,
                file: None,
            }],
            nics: vec![NicDefinition { switch: SWITCH.into(), mac: None, vlan: None }],
            priority: template.priority,
            stop_timeout_s: 30,
        }
    }

    /// Creates a VM and, when it is to be started, waits until its guest answers.
    ///
    /// # Errors
    /// When a node refuses, or it takes too long: with the cluster's state.
    pub fn create_vm(&self, template: &VmTemplate) -> Result<GuestVm> {
        let vm = self.create_vm_unawaited(template)?;
        if template.start
            && let Err(error) = vm.wait_answer(BOOT_DEADLINE)
        {
            bail!("VM {} was created, but: {error:#}\n{}", vm.name, self.diagnosis());
        }
        Ok(vm)
    }

    /// Creates a VM and has it started when it is to be, but does not wait for
    /// its guest.
    ///
    /// # Errors
    /// When a node refuses, or making the disk fails.
    pub fn create_vm_unawaited(&self, template: &VmTemplate) -> Result<GuestVm> {
        let request = CreateVm { vm: self.definition(template), start: template.start };
        let job = self.any()?.create_vm(&request)?;
        self.job_done(&job, BOOT_DEADLINE)?;
        let view = self.wait_vm(&template.name, BOOT_DEADLINE, |_| true)?;
        let Some(disk) = view.disks.first() else { bail!("VM {} has no disk", view.name) };
        Ok(GuestVm {
            name: view.name.clone(),
            ip: template.ip,
            id: view.id.clone(),
            image: self.on_volume(&disk.file),
            format: disk.format,
            netns: self.lab().fabric().client().name().to_owned(),
        })
    }

    /// Moves a VM and waits until that is done.
    ///
    /// # Errors
    /// When a node refuses, or the migration fails or takes longer than `deadline`.
    pub fn migrate(&self, vm: &str, to: &str, deadline: Duration) -> Result<holdfast_api::JobView> {
        let job = self.any()?.migrate_vm(vm, Some(to))?;
        self.job_done(&job, deadline)
    }

    /// Makes sure that a VM is off.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn switch_off(&self, vm: &str) -> Result<()> {
        match self.any()?.stop_vm(vm, true) {
            // It is off already.
            Ok(_) | Err(ApiError::Refused { status: 409, .. }) => {}
            Err(error) => return Err(error.into()),
        }
        self.wait_vm(vm, OFF_DEADLINE, |vm| vm.state == VmState::Off)?;
        Ok(())
    }
}
