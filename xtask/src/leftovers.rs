//! What tests may have left behind on this machine.
//!
//! Processes are recognised by a mark in their environment, which everything that
//! a test starts inherits: so nothing is missed, and what somebody else runs on
//! this machine is not taken for ours.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::step::processes;

/// The environment variable that marks what tests start.
pub const MARK: &str = "HOLDFAST_VERIFY";
/// How long the last ones may take to go: a lab's guard notices the lab's end
/// and then clears up.
const PATIENCE: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The network namespaces, interfaces and directories that there were before.
#[derive(Debug)]
pub struct Before {
    mark: String,
    things: BTreeSet<String>,
}

impl Before {
    /// Looks around before the tests.
    pub fn look() -> Self {
        let mark = format!("{}", std::process::id());
        Self { mark, things: things() }
    }

    /// The value of [`MARK`] for everything that the tests start.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// What the tests left behind, a line each; empty when all is clean.
    pub fn left(&self) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut left = marked(&self.mark);
            let new = things().into_iter().filter(|thing| !self.things.contains(thing));
            left.extend(new.filter(|thing| !in_use(thing)));
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// The living processes with our mark, but for this one.
fn marked(mark: &str) -> Vec<String> {
    let wanted = format!("{MARK}={mark}");
    let ours = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == wanted.as_bytes())
    };
    let line = |pid: u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&words).replace('\0', " ");
        format!("process {pid}: {}", line.chars().take(120).collect::<String>())
    };
    processes().filter(|pid| *pid != std::process::id()).filter(ours).map(line).collect()
}

/// Namespaces, interfaces of this one, and labs' directories with our names.
fn things() -> BTreeSet<String> {
    let places = ["/run/netns", "/sys/class/net", "/var/tmp", "/run/holdfast-lab"];
    let entries = places.iter().flat_map(|place| fs::read_dir(place).into_iter().flatten().flatten());
    let ours = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("hf"));
    ours.map(|entry| entry.path().display().to_string()).collect()
}

/// Names of labs and test benches hold the id of the process that they belong
/// to: when it lives, it is somebody else's, for ours have ended.
fn in_use(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let digits: String = name.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    !digits.is_empty() && Path::new("/proc").join(digits).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_mark() {
        let mut child = std::process::Command::new("sleep").arg("60").env(MARK, "a-test").spawn().unwrap();
        // The kernel lays out a new program's environment after it has told of its start.
        let deadline = Instant::now() + PATIENCE;
        let mut seen = marked("a-test");
        while seen.is_empty() && Instant::now() < deadline {
            std::thread::yield_now();
            seen = marked("a-test");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(seen, [format!("process {}: sleep 60 ", child.id())]);
        assert!(marked("a-test").is_empty());
    }

    #[test]
    fn what_a_living_process_owns_is_in_use() {
        let me = std::process::id();
        assert!(in_use(&format!("/run/netns/hf{me}-1-n1")));
        assert!(!in_use("/run/netns/hf4999999-1-n1"));
        assert!(!in_use("/sys/class/net/hf-lan"));
    }
}
