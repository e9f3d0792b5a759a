//! The programs that a lab starts beside itself: PID 1 of a host, which plays
//! systemd, and the guard, which tidies up after a lab that was killed.
//!
//! ```text
//! init:   Down ──start──▶ Running ──died──▶ Restarting (100 ms) ──▶ Running …
//!           ▲                │ stop, power off
//!           └────exited──── Stopping (SIGTERM, after the deadline SIGKILL)
//! ```
//!
//! The init and its lab speak over a socket that the init finds as its standard
//! input, in lines: `start`, `stop` and `poweroff` one way; `up`, `started PID`,
//! `exited STATUS` and `failed TEXT` the other. When the lab's end closes, the
//! init ends, and the kernel then kills everything on the host.

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};

use crate::{registry, sys};

/// As systemd's default `RestartSec`.
const RESTART_AFTER: Duration = Duration::from_millis(100);
/// How long what is not the service may take to end when the host is shut down.
const STRAGGLERS_MAY_TAKE: Duration = Duration::from_secs(2);
/// The longest command line from the lab, in bytes.
const MAX_LINE: usize = 64;

/// Runs the program that `args` (without the program's own name) ask for. A
/// binary that drives a lab offers this as a hidden subcommand and names itself
/// as the lab's [`crate::InitProgram`].
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut args = args.into_iter();
    let done = match args.next().as_deref().and_then(OsStr::to_str) {
        Some("host") => HostArgs::parse(args).and_then(run_host),
        Some("guard") => run_guard(args.next()),
        _ => Err(anyhow!("this program is started by a lab, not by hand")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-init: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Waits for the end of the lab and removes its remains. In a session of its
/// own, so that a Ctrl-C that ends the lab does not end its guard.
fn run_guard(tag: Option<OsString>) -> Result<()> {
    let tag = tag.context("the guard needs the lab's tag")?;
    setsid().context("leaving the lab's session")?;
    registry::outlive(tag.to_str().context("the lab's tag is no text")?)
}

/// What the init of a host is told on its command line.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct HostArgs {
    pub(crate) hostname: OsString,
    /// (source, target) directories; the target shows the source on this host only.
    pub(crate) binds: Vec<(PathBuf, PathBuf)>,
    /// Directories that are empty and private on this host.
    pub(crate) scratch: Vec<PathBuf>,
    pub(crate) log: PathBuf,
    pub(crate) stop_timeout: Duration,
    /// The service; empty when the host has none.
    pub(crate) service: Vec<OsString>,
    pub(crate) start: bool,
}

impl HostArgs {
    /// The command line, from which [`HostArgs::parse`] makes the same value.
    pub(crate) fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["--hostname".into(), self.hostname.clone()];
        for (source, target) in &self.binds {
            args.extend(["--bind".into(), source.into(), target.into()]);
        }
        for directory in &self.scratch {
            args.extend(["--scratch".into(), directory.into()]);
        }
        args.extend(["--log".into(), self.log.clone().into()]);
        args.extend(["--stop-ms".into(), self.stop_timeout.as_millis().to_string().into()]);
        if self.start {
            args.push("--start".into());
        }
        args.push("--".into());
        args.extend(self.service.iter().cloned());
        args
    }

    fn parse(args: impl Iterator<Item = OsString>) -> Result<Self> {
        let mut args = args;
        let mut parsed = Self::default();
        while let Some(option) = args.next() {
            let mut value = || args.next().with_context(|| format!("{} needs a value", option.display()));
            match option.to_str() {
                Some("--hostname") => parsed.hostname = value()?,
                Some("--bind") => parsed.binds.push((value()?.into(), value()?.into())),
                Some("--scratch") => parsed.scratch.push(value()?.into()),
                Some("--log") => parsed.log = value()?.into(),
                Some("--stop-ms") => {
                    let text = value()?;
                    let ms = text.to_str().and_then(|text| text.parse().ok());
                    parsed.stop_timeout = Duration::from_millis(ms.context("--stop-ms needs a number")?);
                }
                Some("--start") => parsed.start = true,
                Some("--") => {
                    parsed.service = args.collect();
                    return Ok(parsed);
                }
                _ => bail!("unknown option {}", option.display()),
            }
        }
        bail!("the service's command line is missing")
    }
}

fn run_host(args: HostArgs) -> Result<()> {
    let control = std::io::stdin().as_fd().try_clone_to_owned().context("taking the control socket")?;
    let control = UnixStream::from(control);
    // The lab may be slow to read: a status line that does not fit is lost, as
    // it must never hold up the reaping.
    control.set_nonblocking(true).context("standard input is no socket of a lab")?;
    let mut init = Init::new(args, control)?;
    if let Err(error) = init.make_private_world() {
        init.tell(&format!("failed {error:#}"));
        return Err(error);
    }
    init.tell("up");
    init.run()
}

#[derive(Debug)]
enum Service {
    Down,
    Running(Pid),
    Restarting(Instant),
    Stopping { pid: Pid, kill_at: Instant },
}

/// PID 1 of a host.
struct Init {
    args: HostArgs,
    control: UnixStream,
    /// The bytes of a line that has not ended yet.
    line: Vec<u8>,
    signals: SignalFd,
    service: Service,
    powering_off: bool,
}

impl Init {
    fn new(args: HostArgs, control: UnixStream) -> Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.add(Signal::SIGTERM);
        mask.thread_block().context("blocking signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&mask, flags).context("making a signal descriptor")?;
        Ok(Self { args, control, line: Vec::new(), signals, service: Service::Down, powering_off: false })
    }

    /// Makes what a machine has to itself: mounts, `/proc`, `/run`, its name.
    fn make_private_world(&self) -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)
            .context("making the host's namespaces (needs root)")?;
        mount_at(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
        for (source, target) in &self.args.binds {
            mount_at(Some(source), target, None, MsFlags::MS_BIND | MsFlags::MS_REC)?;
        }
        let plain = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        for directory in &self.args.scratch {
            mount_at(None, directory, Some("tmpfs"), plain)?;
        }
        mount_at(None, Path::new("/proc"), Some("proc"), plain | MsFlags::MS_NOEXEC)?;
        // A sysfs shows the network interfaces of the namespace that mounted it.
        mount_at(None, Path::new("/sys"), Some("sysfs"), plain | MsFlags::MS_NOEXEC)?;
        fs::write("/proc/sys/kernel/hostname", self.args.hostname.as_encoded_bytes())
            .context("setting the host's name")?;
        std::env::set_current_dir("/").context("leaving the lab's directory")
    }

    fn run(mut self) -> Result<()> {
        if self.args.start {
            self.start();
        }
        loop {
            self.wait_for_event()?;
            self.reap();
            self.read_signals();
            if !self.read_control() {
                return Ok(());
            }
            self.act_on_time();
            if self.powering_off && matches!(self.service, Service::Down) {
                end_stragglers();
                return Ok(());
            }
        }
    }

    fn wait_for_event(&self) -> Result<()> {
        let due = match &self.service {
            Service::Restarting(at) => Some(*at),
            Service::Stopping { kill_at, .. } => Some(*kill_at),
            Service::Down | Service::Running(_) => None,
        };
        let timeout = match due {
            // Rounded up, lest the loop spins through the last millisecond.
            Some(at) => {
                let ms = at.saturating_duration_since(Instant::now()).as_millis() + 1;
                PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        let mut fds = [
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno).context("waiting for events"),
        }
    }

    fn start(&mut self) {
        let Some((program, arguments)) = self.args.service.split_first() else {
            self.tell("failed this host has no service");
            return;
        };
        match spawn(program, arguments, &self.args.log) {
            Ok(pid) => {
                self.tell(&format!("started {pid}"));
                self.service = Service::Running(pid);
            }
            Err(error) => {
                self.tell(&format!("failed {error:#}"));
                self.service = Service::Restarting(Instant::now() + RESTART_AFTER);
            }
        }
    }

    fn stop(&mut self) {
        match self.service {
            Service::Running(pid) => {
                let _ = kill(pid, Signal::SIGTERM);
                let kill_at = Instant::now() + self.args.stop_timeout;
                self.service = Service::Stopping { pid, kill_at };
            }
            Service::Restarting(_) => self.service = Service::Down,
            Service::Down | Service::Stopping { .. } => {}
        }
    }

    fn act_on_time(&mut self) {
        let now = Instant::now();
        match self.service {
            Service::Restarting(at) if now >= at => self.start(),
            Service::Stopping { pid, kill_at } if now >= kill_at => {
                let _ = kill(pid, Signal::SIGKILL);
                self.service = Service::Stopping { pid, kill_at: now + self.args.stop_timeout.max(RESTART_AFTER) };
            }
            _ => {}
        }
    }

    /// Collects every dead child: the service, and orphans that became ours.
    fn reap(&mut self) {
        loop {
            let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, format!("code {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("signal {signal}")),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            match self.service {
                Service::Running(service) if service == pid => {
                    self.tell(&format!("exited {status}"));
                    self.service = Service::Restarting(Instant::now() + RESTART_AFTER);
                }
                Service::Stopping { pid: service, .. } if service == pid => {
                    self.tell(&format!("exited {status}"));
                    self.service = Service::Down;
                }
                _ => {}
            }
        }
    }

    fn read_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo == Signal::SIGTERM as u32 {
                self.power_off();
            }
        }
    }

    fn power_off(&mut self) {
        self.powering_off = true;
        self.stop();
    }

    /// Whether the lab is still there.
    fn read_control(&mut self) -> bool {
        let mut bytes = [0; 256];
        loop {
            match self.control.read(&mut bytes) {
                Ok(0) => return false,
                Ok(count) => bytes[..count].iter().for_each(|byte| self.take_byte(*byte)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    fn take_byte(&mut self, byte: u8) {
        if byte != b'\n' {
            if self.line.len() < MAX_LINE {
                self.line.push(byte);
            }
            return;
        }
        match std::mem::take(&mut self.line).as_slice() {
            b"start" if matches!(self.service, Service::Down) && !self.powering_off => self.start(),
            b"start" => {}
            b"stop" => self.stop(),
            b"poweroff" => self.power_off(),
            other => {
                let text = String::from_utf8_lossy(other).into_owned();
                self.tell(&format!("failed unknown command {text}"));
            }
        }
    }

    fn tell(&mut self, line: &str) {
        let _ = self.control.write_all(format!("{}\n", line.replace('\n', " ")).as_bytes());
    }
}

fn spawn(program: &OsStr, arguments: &[OsString], log: &Path) -> Result<Pid> {
    let output =
        OpenOptions::new().create(true).append(true).open(log).with_context(|| format!("opening {}", log.display()))?;
    let errors = output.try_clone().context("duplicating the log's descriptor")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(output).stderr(errors);
    // The init blocks the signals that it waits for; the service must get them.
    sys::with_no_signal_blocked(&mut command);
    let child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
    // Dropping `child` neither waits nor kills: `reap` collects it with the rest.
    Ok(Pid::from_raw(child.id() as i32))
}

/// Asks every other process on the host to end and gives it a moment. The
/// kernel kills the rest when the init ends.
fn end_stragglers() {
    let everybody = Pid::from_raw(-1);
    let _ = kill(everybody, Signal::SIGTERM);
    let deadline = Instant::now() + STRAGGLERS_MAY_TAKE;
    while Instant::now() < deadline {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_millis(5)),
            Ok(_) => {}
            Err(_) => return,
        }
    }
}

fn mount_at(source: Option<&Path>, target: &Path, kind: Option<&str>, flags: MsFlags) -> Result<()> {
    mount(source, target, kind, flags, None::<&str>)
        .with_context(|| format!("mounting on {} of the host", target.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_survives_the_round_trip() {
        let args = HostArgs {
            hostname: "n1".into(),
            binds: vec![("/a b".into(), "/c".into())],
            scratch: vec!["/run".into()],
            log: "/log".into(),
            stop_timeout: Duration::from_millis(1500),
            service: vec!["sleep".into(), "--start".into()],
            start: true,
        };
        assert_eq!(HostArgs::parse(args.to_args().into_iter()).expect("parse"), args);
    }

    #[test]
    fn bad_command_lines_are_refused() {
        for args in [&["--hostname"][..], &["--stop-ms", "x", "--"], &["--nope", "--"], &[]] {
            let args = args.iter().map(OsString::from);
            assert!(HostArgs::parse(args).is_err());
        }
    }
}
