//! Clients of the tiny guest: what a user of a VM sees while the VM moves, dies and comes back.
//!
//! Every client can stand in a network namespace: its sockets are made there and stay there.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
pub use holdfast_guest::verify::{Acknowledged, RecordsReport};
pub use holdfast_guest::wire::{Kind, Outcome, PORT, Reply, Request};

pub use self::probe::{Gap, ProbeReport, Prober, Sample};
pub use self::session::{TcpReport, TcpSession};
pub use self::writer::{Writer, WriterReport};
use crate::netns::in_netns;

mod probe;
mod session;
#[cfg(test)]
mod tests;
mod writer;

const RESEND: Duration = Duration::from_millis(20);
/// How often a waiting thread looks whether it should stop.
const STOP_CHECK: Duration = Duration::from_millis(50);
const LINE_BYTES: u64 = 4096;

/// Asks a guest one thing at a time.
#[derive(Debug)]
pub struct GuestClient {
    socket: UdpSocket,
    netns: Option<String>,
    address: SocketAddrV4,
    sequence: u64,
}

impl GuestClient {
    /// A client of the guest at `address`, from inside `netns` if given. Nothing is sent yet.
    ///
    /// # Errors
    /// When the namespace is not there or has no route to the guest.
    pub fn connect(netns: Option<&str>, address: Ipv4Addr) -> Result<Self> {
        Self::connect_to(netns, SocketAddrV4::new(address, PORT))
    }

    /// The same, for a guest behind another port.
    ///
    /// # Errors
    /// As [`GuestClient::connect`].
    pub fn connect_to(netns: Option<&str>, address: SocketAddrV4) -> Result<Self> {
        let socket = udp_socket(netns, address)?;
        Ok(Self { socket, netns: netns.map(str::to_owned), address, sequence: 0 })
    }

    /// Pings until the guest answers, for `deadline` at most: the way to wait for a boot.
    ///
    /// # Errors
    /// When no answer came in time.
    pub fn ping(&mut self, deadline: Duration) -> Result<Reply> {
        self.ask(Kind::Ping, deadline, true)
    }

    /// Has one record written. `Ok` means: it is on stable storage.
    ///
    /// # Errors
    /// When the guest refused, or gave no answer in time (the record may be there or not).
    pub fn write(&mut self, deadline: Duration) -> Result<Acknowledged> {
        let reply = self.ask(Kind::Write, deadline, false)?;
        acknowledged(&reply).ok_or_else(|| anyhow!("the guest at {} did not write: {:?}", self.address, reply.outcome))
    }

    /// Asks how the guest is.
    ///
    /// # Errors
    /// When no answer came in time.
    pub fn status(&mut self, deadline: Duration) -> Result<Reply> {
        self.ask(Kind::Status, deadline, true)
    }

    /// Says one line over a TCP connection of its own and returns the answer, e.g. for `fill 64`.
    ///
    /// # Errors
    /// When the guest cannot be reached within `deadline` or answers with an error.
    pub fn command(&self, line: &str, deadline: Duration) -> Result<String> {
        let mut stream = tcp_stream(self.netns.as_deref(), self.address, deadline)?;
        stream.set_read_timeout(Some(deadline))?;
        stream.set_write_timeout(Some(deadline))?;
        stream.write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(stream)
            .take(LINE_BYTES)
            .read_line(&mut answer)
            .with_context(|| format!("the guest at {} did not answer {line:?}", self.address))?;
        ensure!(answer.ends_with('\n'), "the guest at {} hung up on {line:?}", self.address);
        let answer = answer.trim_end();
        match answer.strip_prefix("error ") {
            Some(error) => bail!("the guest at {} refused {line:?}: {error}", self.address),
            None => Ok(answer.to_owned()),
        }
    }

    fn ask(&mut self, kind: Kind, deadline: Duration, resend: bool) -> Result<Reply> {
        self.sequence += 1;
        let request = Request { kind, sequence: self.sequence };
        let until = Instant::now() + deadline;
        self.socket.set_read_timeout(Some(RESEND))?;
        let mut sent = false;
        while Instant::now() < until {
            if resend || !sent {
                // An unreachable guest may be one that boots: only the deadline ends the wait.
                sent = self.socket.send(&request.encode()).is_ok();
            }
            let again = Instant::now() + RESEND;
            while let Some(reply) = receive(&self.socket) {
                if reply.kind == kind && reply.sequence == self.sequence {
                    return Ok(reply);
                }
            }
            // A refusal by the guest's kernel comes back at once: do not spin on it.
            thread::sleep(again.saturating_duration_since(Instant::now()));
        }
        bail!("the guest at {} did not answer {kind:?} within {} ms", self.address, deadline.as_millis())
    }
}

/// The format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// The disk's bytes as they are.
    Raw,
    /// QEMU's.
    Qcow2,
    /// Hyper-V's.
    Vhdx,
    /// Virtual PC's.
    Vhd,
}

/// Reads the record disk in the image at `image`, which no QEMU may have open.
///
/// # Errors
/// When the image cannot be read, is in use, or is no record disk.
pub fn verify_records(image: &Path, format: ImageFormat) -> Result<RecordsReport> {
    let format = match format {
        ImageFormat::Raw => return Ok(RecordsReport::read(image)?),
        ImageFormat::Qcow2 => "qcow2",
        ImageFormat::Vhdx => "vhdx",
        ImageFormat::Vhd => "vpc",
    };
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = format!("holdfast-records-{}-{}.raw", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    let raw = Scratch(std::env::temp_dir().join(name));
    let output = Command::new("qemu-img")
        .args(["convert", "-f", format, "-O", "raw"])
        .args([image, &raw.0])
        .output()
        .context("starting qemu-img (is the package qemu-utils installed?)")?;
    ensure!(
        output.status.success(),
        "qemu-img cannot read {}: {}",
        image.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(RecordsReport::read(&raw.0)?)
}

/// A file that vanishes with this value.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn acknowledged(reply: &Reply) -> Option<Acknowledged> {
    (reply.outcome == Outcome::Done && reply.durable)
        .then_some(Acknowledged { sequence: reply.record, boot_id: reply.boot_id })
}

/// The next reply, or `None` after the socket's time-out or an error that a booting, moving or dead
/// guest causes (a refused port, an unreachable host).
fn receive(socket: &UdpSocket) -> Option<Reply> {
    let mut bytes = [0; 128];
    match socket.recv(&mut bytes) {
        Ok(length) => Reply::decode(&bytes[..length]).ok(),
        Err(error) => {
            if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
                // Such errors return at once, one per datagram sent: no faster than the sender.
                thread::yield_now();
            }
            None
        }
    }
}

fn within<T: Send>(netns: Option<&str>, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    match netns {
        Some(name) => in_netns(name, f)?,
        None => f(),
    }
}

fn udp_socket(netns: Option<&str>, address: SocketAddrV4) -> Result<UdpSocket> {
    within(netns, || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("making a UDP socket")?;
        socket.connect(address).with_context(|| format!("there is no route to the guest at {address}"))?;
        Ok(socket)
    })
}

fn tcp_stream(netns: Option<&str>, address: SocketAddrV4, deadline: Duration) -> Result<TcpStream> {
    within(netns, || {
        TcpStream::connect_timeout(&address.into(), deadline)
            .with_context(|| format!("cannot connect to the guest at {address}"))
    })
}
