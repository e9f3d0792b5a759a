//! A SAN: one LUN, exported over NBD beside the storage network's switch.
//!
//! ```text
//!  n1 ─ storage network ─┐                      ┌─ server of n1 ─┐
//!  n2 ───────────────────┼─ 10.77.4.1, one port ┼─ server of n2 ─┼─ the LUN, a file
//!  n3 ───────────────────┘   (by who asks)      └─ server of n3 ─┘
//! ```
//! Each host is served by a process of its own, so that the path of one host alone can
//! fail at once; a pulled cable ([`Fabric::pull`](crate::Fabric::pull)) makes it silent instead.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guest::{ImageFormat, RecordsReport, verify_records};
use crate::lab::Lab;
use crate::netns::{in_netns, pipe_into};
use crate::network::Network;

const EXPORT: &str = "lun";
/// The last byte of its address.
const ADDRESS: u8 = 1;
/// The port that hosts connect to; each host's server listens on one of those after it.
const PORT: u16 = 10809;
/// How long a server may take until it listens.
const STARTS_WITHIN: Duration = Duration::from_secs(10);
/// What a guest's record disk begins with, and between the places where slabs can begin.
const RECORD_DISK: &[u8; 8] = b"HFDISK01";
const STEP_BYTES: u64 = 1 << 20;

/// A LUN that hosts reach over the storage network, until it is dropped.
#[derive(Debug)]
pub struct San {
    file: PathBuf,
    /// The namespace of the switches.
    netns: String,
    servers: Mutex<BTreeMap<String, Server>>,
}

#[derive(Debug)]
struct Server {
    port: u16,
    process: Option<Child>,
}

impl San {
    /// Makes a LUN of so many bytes and serves it to every host that the lab has by now.
    ///
    /// # Errors
    /// When the file cannot be made, or `qemu-nbd` (Debian package `qemu-utils`) or `nft`
    /// does not do its part.
    pub fn start(lab: &Lab, file: &Path, bytes: u64) -> Result<San> {
        File::create(file).and_then(|file| file.set_len(bytes)).context("making a LUN")?;
        let netns = lab.fabric().namespace();
        let address = address();
        netns.ip_batch(&format!("addr add {address}/24 dev {}\n", Network::Storage.bridge()))?;
        let mut rules = String::from("table ip san {\nchain by-host {\ntype nat hook prerouting priority -100\n");
        let mut servers = BTreeMap::new();
        for (port, host) in (PORT + 1..).zip(lab.hosts()) {
            let from = host.address(Network::Storage).context("a host without storage network")?;
            let _ = writeln!(rules, "ip saddr {from} ip daddr {address} tcp dport {PORT} dnat to {address}:{port}");
            servers.insert(host.name().to_owned(), Server { port, process: None });
        }
        rules.push_str("}\n}\n");
        netns.run(|| pipe_into(Command::new("nft").args(["-f", "-"]), &rules))?.context("telling the hosts apart")?;
        let san = San { file: file.into(), netns: netns.name().to_owned(), servers: Mutex::new(servers) };
        lab.hosts().iter().try_for_each(|host| san.mend(host.name()))?;
        Ok(san)
    }

    /// The LUN as the hosts know it.
    pub fn lun(&self) -> String {
        format!("nbd://{}/{EXPORT}", address())
    }

    /// The file behind it.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Lets a host's path fail at once: what is under way on it as well as what comes.
    ///
    /// # Errors
    /// When there is no such host, or its server cannot be killed.
    pub fn fail(&self, host: &str) -> Result<()> {
        self.with(host, |server| {
            let Some(mut process) = server.process.take() else { return Ok(()) };
            process.kill().context("killing a host's NBD server")?;
            process.wait().context("killing a host's NBD server").map(drop)
        })
    }

    /// Ends what [`San::fail`] began, and returns when the host is served again.
    ///
    /// # Errors
    /// When there is no such host, or the server does not start.
    pub fn mend(&self, host: &str) -> Result<()> {
        self.with(host, |server| {
            if server.process.is_none() {
                server.process = Some(self.serve(server.port)?);
            }
            Ok(())
        })
    }

    fn with(&self, host: &str, does: impl FnOnce(&mut Server) -> Result<()>) -> Result<()> {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        does(servers.get_mut(host).with_context(|| format!("the SAN does not know host {host}"))?)
    }

    fn serve(&self, port: u16) -> Result<Child> {
        let address = address();
        // Several servers have the file open, so none locks it.
        let image = format!(
            "driver=raw,file.driver=file,file.locking=off,file.discard=unmap,file.filename={}",
            self.file.display()
        );
        // What it says of clients that leave; beside the LUN for who looks for a reason.
        let log = File::options().create(true).append(true).open(self.file.with_extension("log"))?;
        let mut child = in_netns(&self.netns, || {
            Command::new("qemu-nbd")
                .args(["--persistent", "--shared=0", "--cache=none", "--discard=unmap", "-x", EXPORT])
                .args([format!("--bind={address}"), format!("--port={port}")])
                .args(["--image-opts", &image])
                .stderr(log)
                .spawn()
        })?
        .context("starting qemu-nbd (is the package qemu-utils installed?)")?;
        let until = Instant::now() + STARTS_WITHIN;
        let connect = || TcpStream::connect(SocketAddr::from((address, port)));
        while in_netns(&self.netns, connect)?.is_err() {
            if let Some(status) = child.try_wait().context("watching qemu-nbd")? {
                bail!("qemu-nbd ended at once: {status}");
            }
            if Instant::now() > until {
                let _ = child.kill();
                let _ = child.wait();
                bail!("qemu-nbd does not listen within {} s", STARTS_WITHIN.as_secs());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(child)
    }
}

impl Drop for San {
    fn drop(&mut self) {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        for mut process in servers.values_mut().filter_map(|server| server.process.take()) {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn address() -> Ipv4Addr {
    Network::Storage.address_ending_in(ADDRESS)
}

/// Finds the record disk of a guest on a LUN, by its first slab: the one that begins like
/// one and holds the highest record of all such. `image` is a file to copy it to.
///
/// # Errors
/// When the LUN cannot be read, or there is none on it.
pub fn records_on(lun: &Path, slab_bytes: u64, image: &Path) -> Result<RecordsReport> {
    let device = File::open(lun).with_context(|| format!("opening {}", lun.display()))?;
    let bytes = device.metadata()?.len();
    let mut found = None::<RecordsReport>;
    let mut begin = [0; RECORD_DISK.len()];
    for at in (0..(bytes + 1).saturating_sub(slab_bytes)).step_by(STEP_BYTES as usize) {
        device.read_exact_at(&mut begin, at)?;
        if begin == *RECORD_DISK {
            let mut slab = vec![0; usize::try_from(slab_bytes)?];
            device.read_exact_at(&mut slab, at)?;
            std::fs::write(image, slab).with_context(|| format!("writing {}", image.display()))?;
            let report = verify_records(image, ImageFormat::Raw)?;
            if found.as_ref().is_none_or(|best| best.highest < report.highest) {
                found = Some(report);
            }
        }
    }
    found.with_context(|| format!("there is no guest's disk on {}", lun.display()))
}
