//! Processes that eat processor time, for "a busy host must not look dead".

use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};

use crate::sys;

/// Busy processes that run until this value is dropped, or this process dies.
#[derive(Debug)]
pub struct CpuHogs {
    pids: Vec<i32>,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl CpuHogs {
    /// Starts `count` processes of ordinary priority, each of which keeps one
    /// core busy.
    ///
    /// # Errors
    /// When a process cannot be started; those that were are gone then.
    pub fn start(count: usize) -> Result<Self> {
        let (stop, stopped) = mpsc::channel::<()>();
        let (report, reported) = mpsc::channel();
        // The hogs are to die with this thread, so it stays for as long as they do.
        let thread = std::thread::Builder::new()
            .name("cpu-hogs".to_owned())
            .spawn(move || {
                let mut hogs = Vec::new();
                let started = spawn_hogs(count, &mut hogs);
                let failed = started.is_err();
                let pids = hogs.iter().map(|hog| hog.id() as i32).collect::<Vec<_>>();
                let _ = report.send(started.map(|()| pids));
                if !failed {
                    let _ = stopped.recv();
                }
                for hog in &mut hogs {
                    let _ = hog.kill();
                    let _ = hog.wait();
                }
            })
            .context("starting the thread of the CPU hogs")?;
        let pids = reported.recv().map_err(|_| anyhow!("the thread of the CPU hogs died"))??;
        Ok(Self { pids, stop: Some(stop), thread: Some(thread) })
    }

    /// The processes' pids.
    pub fn pids(&self) -> &[i32] {
        &self.pids
    }
}

impl Drop for CpuHogs {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn spawn_hogs(count: usize, hogs: &mut Vec<Child>) -> Result<()> {
    for _ in 0..count {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "while :; do :; done"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        sys::die_with_spawning_thread(&mut command);
        hogs.push(command.spawn().context("starting a CPU hog")?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::procfs;

    #[test]
    fn hogs_burn_cpu_and_are_gone_after_drop() {
        let hogs = CpuHogs::start(2).expect("hogs");
        let pids = hogs.pids().to_vec();
        assert_eq!(pids.len(), 2);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        // utime is field 14 of proc(5)'s stat, i.e. the 12th after the name.
        let ticks = |pid: i32| -> u64 {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
            let rest = stat.rsplit(')').next().expect("after the name");
            rest.split_whitespace().nth(11).and_then(|t| t.parse().ok()).expect("utime")
        };
        while pids.iter().any(|pid| ticks(*pid) == 0) {
            assert!(std::time::Instant::now() < deadline, "the hogs burn nothing");
            std::thread::yield_now();
        }
        drop(hogs);
        assert!(pids.iter().all(|pid| procfs::process(*pid).is_none()));
    }
}
