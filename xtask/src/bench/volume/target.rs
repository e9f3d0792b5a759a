//! What is measured: a server process and how to ask it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{DISK_BYTES, Load};

const PATIENCE: Duration = Duration::from_secs(10);
/// Name of the disk on its LUN, which is this much larger than the disk.
const ON_LUN: &str = "disk";
const LUN_BYTES: u64 = DISK_BYTES + (1 << 30);

/// What serves a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The volume server, and the disk is a file.
    File,
    /// The volume server, and the disk is on a LUN.
    Lun,
    /// `qemu-storage-daemon`.
    Peer,
    /// Nobody: the file itself.
    Raw,
}

/// A disk that can be asked.
pub struct Target {
    server: Option<Child>,
    /// Arguments of `qemu-img bench` that name the disk.
    disk: Vec<String>,
    _socket: tempfile::TempDir,
}

impl Target {
    /// Starts a server for the disk at `path`, which is made if it is not there.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(kind: Kind, server: &Path, path: &Path) -> Result<Target> {
        let dir = tempfile::tempdir().context("a directory for a socket")?;
        let socket = dir.path().join("socket");
        let ours = |args: &[&str]| -> Result<Child> {
            let listener = UnixListener::bind(&socket).context("a socket")?;
            let mut command = Command::new(server);
            command.arg("1").args(args).arg(path).stdin(Stdio::from(OwnedFd::from(listener)));
            if kind == Kind::Lun {
                command.arg(ON_LUN);
            }
            command.spawn().context("the volume server")
        };
        let server = match kind {
            Kind::Raw => None,
            Kind::File => {
                make(path, DISK_BYTES)?;
                Some(ours(&["file"])?)
            }
            Kind::Lun => {
                make(path, LUN_BYTES)?;
                let bytes = DISK_BYTES.to_string();
                let made = Command::new(server).arg("format").arg(path).args([ON_LUN, &bytes]).status();
                ensure!(made.context("the volume server")?.success(), "the LUN could not be formatted");
                Some(ours(&["lun"])?)
            }
            Kind::Peer => Some(peer(path, &socket)?),
        };
        let disk = match kind {
            Kind::Raw => image(path),
            _ => vec!["-f".into(), "raw".into(), format!("nbd+unix:///disk?socket={}", socket.display())],
        };
        let target = Target { server, disk, _socket: dir };
        if kind != Kind::Raw {
            target.wait(&socket)?;
        }
        Ok(target)
    }

    fn wait(&self, socket: &Path) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while greeted(socket).is_err() {
            ensure!(Instant::now() < until, "nobody serves {}", socket.display());
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Requests a second, or MiB a second where they are of that size.
    ///
    /// # Errors
    /// When one fails.
    pub fn ask(&self, load: &Load) -> Result<f64> {
        let mut command = Command::new("qemu-img");
        command.args(["bench", "-n", "-t", "none"]);
        for (option, value) in
            [("-c", load.requests), ("-d", u64::from(load.depth)), ("-s", load.bytes), ("-S", load.stride)]
        {
            command.arg(option).arg(value.to_string());
        }
        if load.writes {
            command.arg("-w");
        }
        let output = command.args(&self.disk).output().context("qemu-img")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let seconds = text.rsplit_once("Run completed in ").and_then(|(_, rest)| rest.split_once(' '));
        let Some(seconds) = seconds.and_then(|(seconds, _)| seconds.parse::<f64>().ok()) else {
            bail!("qemu-img bench failed: {text}{}", String::from_utf8_lossy(&output.stderr));
        };
        Ok(load.requests as f64 / seconds)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

/// Says hello and good-bye.
fn greeted(socket: &Path) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.read_exact(&mut [0; 18])?;
    let mut hello = 3_u32.to_be_bytes().to_vec();
    hello.extend(b"IHAVEOPT");
    // NBD_OPT_ABORT, without data.
    hello.extend([0, 0, 0, 2, 0, 0, 0, 0]);
    stream.write_all(&hello)?;
    stream.read_exact(&mut [0; 20])
}

fn make(path: &Path, bytes: u64) -> Result<()> {
    let file = File::options().create(true).append(true).open(path).context("a disk")?;
    if file.metadata().context("a disk")?.len() < bytes {
        file.set_len(bytes).context("a disk")?;
    }
    Ok(())
}

/// The file itself, as QEMU opens it best.
fn image(path: &Path) -> Vec<String> {
    let options = format!("driver=raw,file.driver=file,file.aio=native,file.filename={}", path.display());
    vec!["--image-opts".into(), options]
}

fn peer(path: &Path, socket: &Path) -> Result<Child> {
    Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=file,cache.direct=on,aio=native,filename={}", path.display()))
        .args(["--blockdev", "driver=raw,node-name=disk,file=file"])
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={}", socket.display()))
        .args(["--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"])
        .spawn()
        .context("qemu-storage-daemon (Debian: qemu-system-common or qemu-utils)")
}
