//! What an earlier keeper may have left running: a record per QEMU in the run
//! directory, written before QEMU can execute, and the killing of those that
//! outlived their keeper. PR_SET_PDEATHSIG kills them with it, but the kernel
//! clears that when a program changes its credentials, so it is not relied on.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use serde::{Deserialize, Serialize};

use super::protocol::Tag;
use crate::realtime::{pidfd_kill, pidfd_open};

/// Names one process for ever: a pid alone is given again to others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Which VM's, under which epoch.
    pub tag: Tag,
    /// Its process id.
    pub pid: i32,
    /// When it was forked, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_ticks: u64,
    /// In which boot of the host.
    pub boot: String,
}

/// A keeper's records.
pub struct Records {
    directory: PathBuf,
    boot: String,
}

/// A process of an earlier keeper that is not known to be dead.
pub struct Leftover {
    /// Its record.
    pub file: PathBuf,
    state: State,
}

enum State {
    Alive(OwnedFd),
    /// Why nothing can be said about it.
    Unknown(String),
}

impl Records {
    /// Those below `run_dir`, which has to exist.
    pub fn open(run_dir: &Path) -> io::Result<Records> {
        let directory = run_dir.join("vms");
        fs::create_dir_all(&directory)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        Ok(Records { directory, boot: boot.trim().to_owned() })
    }

    fn file(&self, tag: Tag) -> PathBuf {
        self.directory.join(format!("{}-{}.json", tag.vm, tag.epoch))
    }

    /// Records a process that was just forked and not waited for yet.
    pub fn write(&self, tag: Tag, pid: i32) -> io::Result<()> {
        let start_ticks =
            start_ticks(pid)?.ok_or_else(|| io::Error::other(format!("process {pid} ended before it was recorded")))?;
        let boot = self.boot.clone();
        let record = ProcessRecord { tag, pid, start_ticks, boot };
        let file = self.file(tag);
        let unfinished = file.with_extension("new");
        fs::write(&unfinished, serde_json::to_vec(&record)?)?;
        fs::rename(&unfinished, &file)
    }

    /// Its process was waited for. A record that stays is harmless: its process
    /// will be found dead.
    pub fn remove(&self, tag: Tag) {
        if let Err(error) = fs::remove_file(self.file(tag)) {
            tracing::debug!(%error, "the record of a dead process stays");
        }
    }

    /// Sends SIGKILL to every recorded process and returns those not yet known to be dead.
    pub fn kill_leftovers(&self) -> io::Result<Vec<Leftover>> {
        let mut leftovers = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let file = entry?.path();
            if file.extension().is_some_and(|extension| extension == "new") {
                // Its gate never opened.
                fs::remove_file(&file)?;
                continue;
            }
            match self.examine(&file) {
                Ok(None) => fs::remove_file(&file)?,
                Ok(Some(pidfd)) => {
                    let state = State::Alive(pidfd);
                    leftovers.push(Leftover { file, state });
                }
                Err(error) => {
                    let state = State::Unknown(error.to_string());
                    leftovers.push(Leftover { file, state });
                }
            }
        }
        leftovers.retain_mut(|leftover| !self.dead(leftover));
        Ok(leftovers)
    }

    /// A handle to the recorded process if it lives.
    fn examine(&self, file: &Path) -> io::Result<Option<OwnedFd>> {
        let record: ProcessRecord = serde_json::from_slice(&fs::read(file)?)?;
        if record.boot != self.boot {
            return Ok(None);
        }
        let pidfd = match pidfd_open(record.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            // A thread of some process has the number now: the recorded one led its own.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(error) => return Err(error),
        };
        // In this order: if the number belongs to the recorded process *now*, it did
        // when the handle was opened.
        if start_ticks(record.pid)? != Some(record.start_ticks) {
            return Ok(None);
        }
        Ok(Some(pidfd))
    }

    /// Tries to kill it again; `true` once it is known to be dead. Its record is gone then.
    pub fn dead(&self, leftover: &mut Leftover) -> bool {
        if let State::Unknown(_) = leftover.state {
            leftover.state = match self.examine(&leftover.file) {
                Ok(Some(pidfd)) => State::Alive(pidfd),
                Ok(None) => return self.forget(leftover),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
                Err(error) => State::Unknown(error.to_string()),
            };
        }
        let State::Alive(pidfd) = &leftover.state else {
            return false;
        };
        // ESRCH is no proof for a process that is being torn down: its pidfd is.
        let _ = pidfd_kill(pidfd.as_raw_fd());
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(pidfd), PollFlags::POLLIN)];
        let gone = nix::poll::poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready == 1);
        gone && self.forget(leftover)
    }

    fn forget(&self, leftover: &Leftover) -> bool {
        if let Err(error) = fs::remove_file(&leftover.file) {
            tracing::warn!(file = %leftover.file.display(), %error, "the record of a dead process stays");
        }
        true
    }
}

impl Leftover {
    /// What to tell a person.
    pub fn describe(&self) -> String {
        let file = self.file.display();
        match &self.state {
            State::Alive(_) => format!("the process recorded in {file} does not die from SIGKILL"),
            State::Unknown(why) => format!(
                "{file} does not tell which process it stands for ({why}): make sure that no QEMU of an earlier keeper runs on this host, then remove the file"
            ),
        }
    }
}

/// When a process was forked, `None` if there is none with this id.
fn start_ticks(pid: i32) -> io::Result<Option<u64>> {
    let stat = match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(error) => return Err(error),
    };
    // The second field is the program's name in parentheses and may contain both.
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    let ticks = fields.and_then(|fields| fields.split_whitespace().nth(19)?.parse().ok());
    ticks.map(Some).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use holdfast_core::{Epoch, VmId};

    use super::*;

    const TAG: Tag = Tag { vm: VmId(uuid::Uuid::nil()), epoch: Epoch(3) };

    fn sleep() -> Child {
        Command::new("sleep").arg("60").spawn().unwrap()
    }

    fn pid(child: &Child) -> i32 {
        child.id().cast_signed()
    }

    #[test]
    fn a_recorded_process_is_killed_and_its_record_removed() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        let mut child = sleep();
        records.write(TAG, pid(&child)).unwrap();
        let mut leftovers = records.kill_leftovers().unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while !leftovers.is_empty() {
            assert!(Instant::now() < deadline, "it does not die");
            leftovers.retain_mut(|leftover| !records.dead(leftover));
            std::thread::yield_now();
        }
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
        assert!(!records.file(TAG).exists());
    }

    #[test]
    fn a_recycled_process_id_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        let mut child = sleep();
        records.write(TAG, pid(&child)).unwrap();
        let file = records.file(TAG);
        let mut record: ProcessRecord = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        record.start_ticks -= 1;
        fs::write(&file, serde_json::to_vec(&record).unwrap()).unwrap();
        assert!(records.kill_leftovers().unwrap().is_empty());
        assert!(!file.exists());

        record.start_ticks += 1;
        record.boot = "an earlier boot".into();
        fs::write(&file, serde_json::to_vec(&record).unwrap()).unwrap();
        assert!(records.kill_leftovers().unwrap().is_empty());
        assert!(child.try_wait().unwrap().is_none(), "it still runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_record_that_cannot_be_read_is_not_taken_for_a_death() {
        let directory = tempfile::tempdir().unwrap();
        let records = Records::open(directory.path()).unwrap();
        fs::write(records.file(TAG), "{").unwrap();
        let mut leftovers = records.kill_leftovers().unwrap();
        assert_eq!(leftovers.len(), 1);
        assert!(leftovers[0].describe().contains("remove the file"));
        assert!(!records.dead(&mut leftovers[0]));
        fs::remove_file(records.file(TAG)).unwrap();
        assert!(records.dead(&mut leftovers[0]));
    }
}
