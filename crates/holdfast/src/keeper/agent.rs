//! The keeper's first child: the agent, restarted whenever it ends.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::protocol::Exit;
use crate::realtime::{Image, Report, fork_gated, pidfd_kill};

/// Waiting time before a restart, and the longest when it keeps dying.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// An agent that lived longer than this starts over with the short pause.
const SETTLED: Duration = Duration::from_secs(1);

/// After the VMs, which are bigger and can start elsewhere.
const OOM_SCORE: i16 = -500;

/// The agent's process and when to start the next.
pub struct Agent {
    image: Image,
    state: State,
    pause: Duration,
}

enum State {
    Down { due: Instant },
    Up { pid: i32, pidfd: OwnedFd, report: Report, since: Instant },
}

impl Agent {
    /// Not started yet.
    pub fn new(command: Vec<OsString>) -> io::Result<Agent> {
        Ok(Agent {
            image: Image::new(&command, &[])?.oom_score(OOM_SCORE),
            state: State::Down { due: Instant::now() },
            pause: PAUSES.0,
        })
    }

    /// When it has to be started, `None` while it lives.
    pub fn due(&self) -> Option<Instant> {
        match self.state {
            State::Down { due } => Some(due),
            State::Up { .. } => None,
        }
    }

    /// Whether it lives.
    pub fn alive(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// Starts it when its pause is over.
    pub fn start_if_due(&mut self) {
        let now = Instant::now();
        if self.due().is_none_or(|due| due > now) {
            return;
        }
        let started = fork_gated(&self.image).and_then(|gated| {
            let pid = gated.pid;
            let (pidfd, report) = gated.open()?;
            Ok((pid, pidfd, report))
        });
        self.state = match started {
            Ok((pid, pidfd, report)) => {
                tracing::info!(pid, "agent started");
                State::Up { pid, pidfd, report, since: now }
            }
            Err(error) => {
                tracing::error!(%error, "cannot start the agent");
                State::Down { due: now + self.longer_pause() }
            }
        };
    }

    /// Takes note of a child's end; `false` when it was another child.
    pub fn ended(&mut self, ended: i32, exit: Exit) -> bool {
        let State::Up { pid, report, since, .. } = &mut self.state else {
            return false;
        };
        if *pid != ended {
            return false;
        }
        let (failure, lived) = (report.read(), since.elapsed());
        let pause = if lived > SETTLED {
            self.pause = PAUSES.0;
            self.pause
        } else {
            self.longer_pause()
        };
        match failure {
            Some(Err(failure)) => {
                let reason = io::Error::from_raw_os_error(failure.errno);
                tracing::error!("the agent could not {}: {reason}", failure.step);
            }
            _ => tracing::warn!(%exit, ?pause, "the agent ended"),
        }
        self.state = State::Down { due: Instant::now() + pause };
        true
    }

    /// This pause; the next one is twice as long.
    fn longer_pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(PAUSES.1);
        pause
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        // By number: it is this process's child and not waited for yet.
        if let State::Up { pid, .. } = self.state
            && let Err(error) = kill(Pid::from_raw(pid), Signal::SIGTERM)
        {
            tracing::warn!(%error, "cannot ask the agent to end");
        }
    }

    /// Ends it.
    pub fn kill(&self) {
        if let State::Up { pidfd, .. } = &self.state
            && let Err(error) = pidfd_kill(pidfd.as_raw_fd())
        {
            tracing::warn!(%error, "cannot kill the agent");
        }
    }
}
