//! Network namespaces: the hosts' and the network fabric's own worlds.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::sockopt::ReuseAddr;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, setsockopt, socket};

/// Where iproute2 keeps its named namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// A named network namespace that vanishes with this value.
///
/// It is an ordinary `ip netns` namespace, so a person can look inside with
/// `ip netns exec NAME ...`.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes a namespace with its loopback interface up.
    pub(crate) fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let namespace = Self { name: name.to_owned() };
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name, as `ip netns list` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        path_of(&self.name)
    }

    /// Runs `f` on a fresh thread inside the namespace. Sockets that `f` makes
    /// stay in the namespace wherever they are used later.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    ///
    /// # Panics
    /// When `f` panics.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        in_netns(&self.name, f)
    }

    /// Runs iproute2's `ip` with `lines`, one command in each, in one process.
    pub(crate) fn ip_batch(&self, lines: &str) -> Result<()> {
        pipe_into(Command::new("ip").args(["-n", &self.name, "-batch", "-"]), lines)
            .with_context(|| format!("setting up interfaces in {}", self.name))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A namespace that somebody removed already is as good as gone.
        let _ = remove(&self.name);
    }
}

/// Runs `f` on a fresh thread inside the namespace that iproute2 knows as
/// `name`; see [`Namespace::run`].
///
/// # Errors
/// When there is no such namespace or it cannot be entered.
///
/// # Panics
/// When `f` panics.
pub fn in_netns<T: Send>(name: &str, f: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            enter(name)?;
            Ok(f())
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// A TCP port on 127.0.0.1 that nobody has, for a server that is told its port.
///
/// Nothing listens on it while it is looked for: a process that is forked in that moment
/// would go on listening until it executes its program, and be taken for the server.
///
/// # Errors
/// The system's.
pub fn free_port() -> Result<u16> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // A socket that is only bound then stands in nobody's way who sets the same.
    setsockopt(&socket, ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0))?;
    Ok(getsockname::<SockaddrIn>(socket.as_raw_fd())?.port())
}

/// Moves the calling thread into the namespace `name`, for good.
pub(crate) fn enter(name: &str) -> Result<()> {
    let path = path_of(name);
    let file =
        File::open(&path).with_context(|| format!("network namespace {name} is not there ({})", path.display()))?;
    setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering network namespace {name} (needs root)"))
}

/// The namespaces whose name starts with `prefix`.
pub(crate) fn names_with_prefix(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(NETNS_DIR) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect()
}

/// Takes the name `name` away; the namespace ends with its last process and socket.
pub(crate) fn remove(name: &str) -> Result<()> {
    ip(&["netns", "del", name])
}

fn path_of(name: &str) -> PathBuf {
    PathBuf::from(NETNS_DIR).join(name)
}

fn ip(arguments: &[&str]) -> Result<()> {
    pipe_into(Command::new("ip").args(arguments), "").with_context(|| format!("ip {}", arguments.join(" ")))
}

/// Runs `command` with `input` on its standard input; its error output becomes
/// the error's text.
pub(crate) fn pipe_into(command: &mut Command, input: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program} (is its package installed?)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that gave up early says why on its error output.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("waiting for {program}"))?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
