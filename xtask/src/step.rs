//! One command of a task: named, timed, and ended when it takes too long.

use std::ffi::OsStr;
use std::fs;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::root;

const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long what was told to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(10);

/// So many minutes.
pub const fn minutes(count: u64) -> Duration {
    Duration::from_secs(count * 60)
}

/// A command to run in the root of the checkout.
#[derive(Debug)]
pub struct Step {
    name: &'static str,
    command: Command,
    deadline: Duration,
}

/// How a step went.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The step's name.
    pub name: &'static str,
    /// How long it took.
    pub took: Duration,
    /// Why it did not pass.
    pub failure: Option<String>,
}

impl Outcome {
    /// Whether it passed.
    pub fn passed(&self) -> bool {
        self.failure.is_none()
    }
}

impl Step {
    /// Runs `program`.
    pub fn new(name: &'static str, program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.current_dir(root());
        Self { name, command, deadline: minutes(20) }
    }

    /// Runs the cargo that runs this program.
    pub fn cargo(name: &'static str, args: &[&str]) -> Self {
        Self::new(name, std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).args(args)
    }

    /// The same with more arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    /// The same with an environment variable.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.command.env(key, value);
        self
    }

    /// The same with another deadline than 20 minutes.
    pub fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs it; its output goes where this program's goes.
    ///
    /// # Errors
    /// When the program cannot be started or its end cannot be awaited. That it
    /// fails or takes too long is an [`Outcome`].
    pub fn run(mut self) -> Result<Outcome> {
        let begun = Instant::now();
        println!("\n== {} ==", self.name);
        let program = self.command.get_program().to_string_lossy().into_owned();
        let mut child = self.command.spawn().with_context(|| format!("starting {program}"))?;
        let status = wait(&mut child, begun + self.deadline)?;
        let failure = match status {
            None => Some(format!("was not done after {} minutes and was ended", self.deadline.as_secs() / 60)),
            Some(status) if !status.success() => Some(status.to_string()),
            Some(_) => None,
        };
        Ok(Outcome { name: self.name, took: begun.elapsed(), failure })
    }
}

/// Waits for the end; `None` when it had to be ended at the deadline.
fn wait(child: &mut Child, deadline: Instant) -> Result<Option<ExitStatus>> {
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(LOOK_EVERY);
    }
    // Cargo does not pass signals on, so the tests below it are told as well.
    let family = descendants(child.id());
    signal("TERM", &family);
    let patience = Instant::now() + GRACE;
    while child.try_wait()?.is_none() && Instant::now() < patience {
        std::thread::sleep(LOOK_EVERY);
    }
    signal("KILL", &family);
    child.wait()?;
    Ok(None)
}

fn signal(name: &str, pids: &[u32]) {
    // Some are gone by now, which is what is wanted.
    let pids = pids.iter().map(u32::to_string);
    let _ = Command::new("kill").arg(format!("-{name}")).args(pids).stderr(std::process::Stdio::null()).status();
}

/// The process `pid` and all below it.
fn descendants(pid: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = processes().filter_map(|process| Some((process, parent(process)?))).collect();
    let mut family = vec![pid];
    let mut next = 0;
    while let Some(elder) = family.get(next).copied() {
        family.extend(parents.iter().filter(|(_, parent)| *parent == elder).map(|(process, _)| *process));
        next += 1;
    }
    family
}

/// The ids of all processes.
pub fn processes() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold anything; the state and the parent follow it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_takes_too_long_is_ended_with_all_below_it() {
        let begun = Instant::now();
        let step = Step::new("too long", "sh").args(["-c", "sleep 600 & sleep 600; true"]);
        let outcome = step.within(Duration::from_millis(300)).run().unwrap();
        assert!(outcome.failure.is_some_and(|failure| failure.contains("was ended")));
        assert!(begun.elapsed() < GRACE);
        assert!(!descendants(std::process::id()).iter().any(|pid| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"sleep\x00600"))
        }));
    }

    #[test]
    fn a_failure_is_told() {
        let outcome = Step::new("fails", "sh").args(["-c", "exit 3"]).run().unwrap();
        assert_eq!(outcome.failure.as_deref(), Some("exit status: 3"));
        assert!(Step::new("passes", "true").run().unwrap().passed());
        assert!(Step::new("is not there", "/nonexistent/program").run().is_err());
    }
}
