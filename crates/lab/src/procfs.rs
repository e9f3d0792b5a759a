//! What `/proc` says about processes, seen from the machine that carries the lab.

use std::fs;
use std::os::unix::fs::MetadataExt;

/// A process on a lab host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its pid as the machine that carries the lab sees it.
    pub pid: i32,
    /// Its pid as the host itself sees it; 1 is the host's init.
    pub host_pid: i32,
    /// Its command line. Empty for a zombie.
    pub argv: Vec<String>,
    /// The scheduler's state letter of `proc(5)`; `Z` is a zombie.
    pub state: char,
}

impl Process {
    /// Whether the process can still do something, i.e. is no zombie.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }

    /// Whether every one of `words` is an argument, or a part of one.
    pub fn mentions(&self, words: &[&str]) -> bool {
        words.iter().all(|word| self.argv.iter().any(|argument| argument.contains(word)))
    }
}

/// Every process on the machine, zombies included.
pub(crate) fn all_pids() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The command line of `pid`; `None` when there is no such process.
pub(crate) fn argv(pid: i32) -> Option<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(split_argv(&bytes))
}

fn split_argv(bytes: &[u8]) -> Vec<String> {
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// The inode number that names the PID namespace of `pid`.
pub(crate) fn pid_namespace(pid: i32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/pid")).ok().map(|meta| meta.ino())
}

/// The pid of the parent of `pid`.
pub(crate) fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may itself contain spaces and parentheses.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The process `pid`, if there is one.
pub(crate) fn process(pid: i32) -> Option<Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim));
    Some(Process {
        pid,
        host_pid: field("NSpid")?.split_whitespace().last()?.parse().ok()?,
        argv: argv(pid)?,
        state: field("State")?.chars().next()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_with_its_command_line() {
        let pid = std::process::id() as i32;
        assert!(all_pids().contains(&pid));
        let me = process(pid).expect("own process");
        assert!(me.is_alive());
        let own: Vec<String> = std::env::args().collect();
        assert_eq!(me.argv, own);
        assert!(pid_namespace(pid).is_some_and(|inode| inode > 0));
    }

    #[test]
    fn empty_arguments_are_kept_and_a_zombie_has_none() {
        assert_eq!(split_argv(b"qemu\0\0-uuid\0"), ["qemu", "", "-uuid"]);
        assert!(split_argv(b"").is_empty());
    }
}
