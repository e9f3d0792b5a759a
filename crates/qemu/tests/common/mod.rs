//! Real QEMUs for the tests, and a deadline for everything that is waited for.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use holdfast_core::{Accelerator, Allocation, DiskFormat, DiskSpec, Epoch, Mac, NicSpec, Priority, VmId, VmSpec};
use holdfast_qemu::{Launch, Qmp};
use tempfile::TempDir;
use uuid::Uuid;

pub const SOON: Duration = Duration::from_secs(20);

pub fn qemu() -> PathBuf {
    let path = std::env::var_os("HOLDFAST_QEMU");
    path.unwrap_or("qemu-system-x86_64".into()).into()
}

pub fn qemu_img() -> PathBuf {
    let path = std::env::var_os("HOLDFAST_QEMU_IMG");
    path.unwrap_or("qemu-img".into()).into()
}

pub fn vm_id() -> VmId {
    VmId(Uuid::from_u128(0x5c6f_1a52_0d5e_4f0b_9b5e_2f1d_7f4e_0001))
}

/// A small guest without disks and adapters.
pub fn spec() -> VmSpec {
    VmSpec {
        cpus: 1,
        memory_bytes: 64 << 20,
        machine: "pc-q35-7.2".into(),
        cpu_model: None,
        direct_boot: None,
        disks: Vec::new(),
        nics: Vec::new(),
        priority: Priority::Medium,
        stop_timeout_s: 10,
    }
}

pub fn disk(format: DiskFormat) -> DiskSpec {
    DiskSpec { volume: "v".into(), file: "d".into(), size_bytes: 1 << 20, format, allocation: Allocation::Thin }
}

pub fn nic(last: u8) -> NicSpec {
    NicSpec { switch: "s".into(), mac: Mac([0x52, 0x54, 0, 0, 0, last]), vlan: None }
}

/// A QEMU that is killed when the test ends, however it ends.
pub struct Guest {
    pub qmp: Qmp,
    pub process: Process,
}

pub struct Process {
    child: Child,
    pub run_dir: TempDir,
}

impl Process {
    /// Starts a QEMU as `change` wants it, its standard error in `stderr.log`.
    pub fn start(spec: &VmSpec, change: impl FnOnce(&mut Launch<'_>)) -> Process {
        Self::start_under(&[], spec, change)
    }

    /// The same below another program, such as `unshare`.
    pub fn start_under(wrapper: &[&str], spec: &VmSpec, change: impl FnOnce(&mut Launch<'_>)) -> Process {
        let run_dir = TempDir::with_prefix("hfq-").expect("a run directory");
        let qemu = qemu();
        let mut launch = launch(&qemu, spec, run_dir.path());
        change(&mut launch);
        let argv = launch.argv().expect("a command line");
        let log = std::fs::File::create(run_dir.path().join("stderr.log")).expect("a log");
        let mut words = wrapper.iter().map(Into::into).chain(argv);
        let child = Command::new(words.next().expect("a program"))
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("QEMU must be installed: apt install qemu-system-x86");
        Process { child, run_dir }
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        until("QEMU to end", async || self.child.try_wait().expect("its status")).await
    }

    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.run_dir.path().join("stderr.log")).expect("its log")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Guest {
    pub async fn start(spec: &VmSpec, change: impl FnOnce(&mut Launch<'_>)) -> Guest {
        let process = Process::start(spec, change);
        let socket = Launch::monitor_socket(process.run_dir.path());
        let qmp = match Qmp::connect(&socket, SOON).await {
            Ok(qmp) => qmp,
            Err(error) => panic!("{error}; QEMU said: {}", process.stderr()),
        };
        Guest { qmp, process }
    }
}

pub fn launch<'a>(binary: &'a Path, spec: &'a VmSpec, run_dir: &Path) -> Launch<'a> {
    Launch {
        binary,
        vm: vm_id(),
        name: "mail, old",
        epoch: Epoch(7),
        spec,
        accelerator: Accelerator::Tcg,
        vhost_net: false,
        disks: Vec::new(),
        kernel: None,
        taps: Vec::new(),
        run_dir: run_dir.to_owned(),
        incoming: false,
        paused: false,
    }
}

/// Asks until there is an answer, for a while.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    within(what, async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(SOON, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited for {what} in vain"),
    }
}

/// A disk of 1 MiB whose boot sector begins with `code`.
pub fn boot_disk(directory: &Path, code: &[u8]) -> PathBuf {
    let mut content = vec![0; 1 << 20];
    content[..code.len()].copy_from_slice(code);
    content[510..512].copy_from_slice(&[0x55, 0xaa]);
    let path = directory.join("boot.raw");
    std::fs::write(&path, content).expect("a disk");
    path
}
