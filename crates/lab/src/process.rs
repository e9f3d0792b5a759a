//! A command that runs on a host at the lab's request, as over a serial line.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::Signal;

use crate::machine::Watcher;
use crate::sys;

/// How much of each of a command's two outputs is kept, in bytes.
const MAX_OUTPUT: usize = 16 << 20;
/// How long a killed process may take to be gone.
const DEATH_DEADLINE: Duration = Duration::from_secs(10);
/// How long after its end a command's output may still arrive, from children
/// that hold the pipe.
const OUTPUT_DEADLINE: Duration = Duration::from_millis(500);

/// A process that [`crate::Host::spawn`] started. Killed when dropped.
#[derive(Debug)]
pub struct HostProcess {
    name: String,
    pid: i32,
    pidfd: OwnedFd,
    stdout: Capture,
    stderr: Capture,
    ended: mpsc::Receiver<std::io::Result<ExitStatus>>,
    status: Option<ExitStatus>,
    thread: Option<JoinHandle<()>>,
}

impl HostProcess {
    pub(crate) fn spawn(host: &Watcher, argv: &[impl AsRef<OsStr>], env: &[(OsString, OsString)]) -> Result<Self> {
        let (program, arguments) = argv.split_first().context("an empty command line")?;
        let name = program.as_ref().to_string_lossy().into_owned();
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let (report, reported) = mpsc::channel();
        let (end, ended) = mpsc::channel();
        let init = Arc::clone(&host.init);
        // The thread moves into the host for good; it also collects the process
        // as soon as it is dead, because a host whose init was killed is not
        // gone before each of its processes has been collected.
        let thread = std::thread::Builder::new()
            .name(format!("host process {name}"))
            .spawn(move || {
                let started = (|| {
                    enter_host(&init)?;
                    let mut child = command.spawn().context("starting it")?;
                    let pidfd = sys::pidfd_open(child.id() as i32).context("opening it")?;
                    let stdout = child.stdout.take().context("its output is not piped")?;
                    let stderr = child.stderr.take().context("its errors are not piped")?;
                    Ok::<_, anyhow::Error>((child, pidfd, stdout, stderr))
                })();
                match started {
                    Ok((mut child, pidfd, stdout, stderr)) => {
                        let _ = report.send(Ok((child.id() as i32, pidfd, stdout, stderr)));
                        let _ = end.send(child.wait());
                    }
                    Err(error) => {
                        let _ = report.send(Err(error));
                    }
                }
            })
            .context("starting a thread")?;
        let (pid, pidfd, stdout, stderr) =
            reported.recv().map_err(|_| anyhow!("its thread died"))?.with_context(|| format!("running {name}"))?;
        Ok(Self {
            name,
            pid,
            pidfd,
            stdout: Capture::of(stdout)?,
            stderr: Capture::of(stderr)?,
            ended,
            status: None,
            thread: Some(thread),
        })
    }

    /// Its pid as this process sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What it has written to its standard output so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.bytes()).into_owned()
    }

    /// What it has written to its standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.bytes()).into_owned()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        sys::pidfd_send_signal(&self.pidfd, signal).with_context(|| format!("signalling {}", self.name))
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// When it has not ended within `deadline`; it goes on running then.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        match self.ended.recv_timeout(deadline) {
            Ok(status) => {
                let status = status.with_context(|| format!("waiting for {}", self.name))?;
                self.status = Some(status);
                Ok(status)
            }
            Err(_) => {
                bail!("{} has not ended within {deadline:?}; it wrote: {}{}", self.name, self.stdout(), self.stderr())
            }
        }
    }

    /// Waits until it ends, and returns all that it wrote.
    ///
    /// # Errors
    /// When it has not ended within `deadline`; it is killed then.
    pub fn output(mut self, deadline: Duration) -> Result<Output> {
        let status = self.wait(deadline)?;
        let until = Instant::now() + OUTPUT_DEADLINE;
        Ok(Output { status, stdout: self.stdout.finish(until), stderr: self.stderr.finish(until) })
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.signal(Signal::SIGKILL);
            let _ = self.wait(DEATH_DEADLINE);
        }
        if self.status.is_some()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// Moves the calling thread, and what it starts, into the namespaces of `init`.
fn enter_host(init: &OwnedFd) -> Result<()> {
    // A thread may change its mounts only when it shares no working directory.
    unshare(CloneFlags::CLONE_FS).context("leaving the shared working directory")?;
    let all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWPID;
    setns(init, all).context("entering the host; it may have lost its power")
}

/// Collects what comes out of a pipe.
#[derive(Debug)]
struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    finished: mpsc::Receiver<()>,
}

impl Capture {
    fn of(mut pipe: impl Read + Send + 'static) -> Result<Self> {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (finish, finished) = mpsc::channel();
        let into = Arc::clone(&bytes);
        std::thread::Builder::new()
            .name("host process output".to_owned())
            .spawn(move || {
                let mut buffer = [0; 16 << 10];
                loop {
                    match pipe.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(count) => {
                            let mut bytes = into.lock().unwrap_or_else(PoisonError::into_inner);
                            let room = MAX_OUTPUT.saturating_sub(bytes.len());
                            bytes.extend_from_slice(&buffer[..count.min(room)]);
                        }
                        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
                let _ = finish.send(());
            })
            .context("starting a thread")?;
        Ok(Self { bytes, finished })
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn finish(&self, until: Instant) -> Vec<u8> {
        let _ = self.finished.recv_timeout(until.saturating_duration_since(Instant::now()));
        self.bytes()
    }
}
