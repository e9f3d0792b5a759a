//! Volumes on LUNs as plain files: a mount of each below the volumes' directory, in a
//! process of its own (`crate::mount`), which is started again when it ends. It asks this
//! agent for lists and for holds; one that hangs or dies harms nothing else, and what it
//! had open is let go of.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use holdfast_core::*;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin};
use tokio::sync::mpsc::{Receiver, channel};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::files::Held;
use super::{Agent, Failure, Member};
use crate::mount::SOURCE;
use crate::mount::protocol::{Answer, Answered, Ask, Asked, Listing, Size};

/// Waiting time before a restart, and the longest when it keeps ending.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// One that lived longer than this starts over with the short pause.
const SETTLED: Duration = Duration::from_secs(1);
/// Answers that wait for a mount to take them.
const ANSWERS: usize = 16;

/// What a mount has open, by its handles.
type Open = Arc<Mutex<BTreeMap<u64, Held>>>;

impl Agent {
    /// Keeps a mount of each volume on a LUN.
    pub(super) async fn keep_mounts(self, member: &'static Member) {
        if !self.0.config.mount_luns {
            return;
        }
        let root = &self.0.config.volumes_dir;
        for at in ours(root) {
            tracing::info!(at = %at.display(), "a mount of an earlier agent goes away");
            detach(&at);
        }
        let mut changes = self.changes();
        let mut mounts = BTreeMap::new();
        loop {
            let state = changes.borrow_and_update().clone();
            mounts.retain(|name, _| state.luns.contains_key(name));
            for name in state.luns.keys() {
                mounts.entry(name.clone()).or_insert_with(|| {
                    let keeps = self.clone().keep_mount(member, name.clone());
                    AbortOnDropHandle::new(tokio::spawn(keeps))
                });
            }
            let others = |state: &Arc<ClusterState>| !state.luns.keys().eq(mounts.keys());
            tokio::select! {
                changed = changes.wait_for(others) => if changed.is_err() { return },
                () = self.0.stop.cancelled() => return,
            }
        }
    }

    async fn keep_mount(self, member: &'static Member, volume: String) {
        let at = self.0.config.volumes_dir.join(&volume);
        let mut pause = PAUSES.0;
        loop {
            let since = Instant::now();
            match Mount::start(&volume, &at, &self.0.config.log) {
                Ok(mount) => self.serve_mount(member, &volume, mount).await,
                Err(error) => {
                    tracing::warn!(volume, error = format!("{error:#}"), "the volume's files are not shown here");
                }
            }
            if since.elapsed() > SETTLED {
                pause = PAUSES.0;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Answers a mount until it ends.
    async fn serve_mount(&self, member: &'static Member, volume: &str, mut mount: Mount) {
        let (Some(asks), Some(hears)) = (mount.child.stdout.take(), mount.child.stdin.take()) else { return };
        let (send, receive) = channel(ANSWERS);
        let open = Open::default();
        let mut asks = BufReader::new(asks).lines();
        // What is under way ends with the mount, and what is open is let go of.
        let mut work = JoinSet::new();
        work.spawn(tell(hears, receive));
        while let Ok(Some(text)) = asks.next_line().await {
            let Ok(Asked { id, ask }) = serde_json::from_str(&text) else { break };
            while work.try_join_next().is_some() {}
            let (agent, volume, open, send) = (self.clone(), volume.to_owned(), open.clone(), send.clone());
            work.spawn(async move {
                let answer = agent.answer_mount(member, &volume, &open, id, ask).await;
                let _ = send.send(Answered { id, answer }).await;
            });
        }
        tracing::warn!(volume, "the process that shows the volume's files ended: it is started again");
    }

    async fn answer_mount(&self, member: &'static Member, volume: &str, open: &Open, id: u64, ask: Ask) -> Answer {
        let by = format!("the mount on {}", self.state().node_name(member.me));
        let held = |held: Held| {
            let address = (held.file.bytes > 0).then(|| holdfast_qemu::nbd_address(held.socket()));
            let answer = Answer::Opened { address, bytes: held.file.bytes };
            open.lock().unwrap_or_else(PoisonError::into_inner).insert(id, held);
            answer
        };
        let (name, answered) = match ask {
            Ask::List => {
                // Somebody may have put one through another node a moment ago.
                self.catch_up().await;
                let listing = listing(&self.state(), volume);
                return listing.map_or(Answer::Failed { errno: libc::ENOENT }, Answer::Listing);
            }
            Ask::Open { name } => {
                let what = Holding::File { name: name.clone(), kind: HoldKind::Reads };
                (name, self.hold(&by, volume, what).await.map(held))
            }
            Ask::Close { handle } => {
                let held = open.lock().unwrap_or_else(PoisonError::into_inner).remove(&handle);
                if let Some(held) = held
                    && let Err(failure) = held.end(&by, None).await
                {
                    tracing::warn!(volume, %failure, "a file that was closed is still held for a moment");
                }
                return Answer::Done;
            }
            Ask::Remove { name } => {
                let removed = self.remove_file(&by, volume, &name).await;
                (name, removed.map(|()| Answer::Done))
            }
        };
        answered.unwrap_or_else(|failure| {
            let errno = errno(&failure);
            if errno != libc::ENOENT {
                tracing::warn!(volume, file = name, %failure, "the mount gives an error");
            }
            Answer::Failed { errno }
        })
    }
}

async fn tell(mut hears: ChildStdin, mut answers: Receiver<Answered>) {
    while let Some(answered) = answers.recv().await {
        let Ok(mut text) = serde_json::to_string(&answered) else { return };
        text.push('\n');
        if hears.write_all(text.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn listing(state: &ClusterState, volume: &str) -> Option<Listing> {
    let (lun, known) = (state.luns.get(volume)?, state.volumes.get(volume)?);
    let bytes = |slabs: u32| u64::from(slabs) * lun.slab_bytes;
    let file =
        |(name, file): (&String, &LunFile)| (name.clone(), Size { bytes: file.bytes, allocated: bytes(file.slabs()) });
    Some(Listing {
        files: lun.named_files().map(file).collect(),
        size: bytes(lun.slabs),
        free: bytes(lun.slabs - lun.used_slabs()),
        since_ms: known.added_ms,
    })
}

/// What a system call says that did not do this.
fn errno(failure: &Failure) -> i32 {
    match failure {
        Failure::Refused(Refusal::Unknown { .. }) => libc::ENOENT,
        Failure::Refused(Refusal::Conflict(_)) => libc::EBUSY,
        Failure::Refused(Refusal::Invalid(_)) => libc::EINVAL,
        _ => libc::EIO,
    }
}

/// A process that shows a volume's files; with it goes the mount.
struct Mount {
    child: Child,
    at: PathBuf,
}

impl Mount {
    fn start(volume: &str, at: &Path, log: &str) -> anyhow::Result<Mount> {
        detach(at);
        std::fs::create_dir_all(at).with_context(|| format!("cannot make {}", at.display()))?;
        if std::fs::read_dir(at)?.next().is_some() {
            anyhow::bail!("there is something else in {}: move it away", at.display());
        }
        let mut command = tokio::process::Command::new(std::env::current_exe()?);
        command.args(["volume", "mount", "--log", log, volume]).arg(at).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.kill_on_drop(true).spawn().context("cannot start a process")?;
        Ok(Mount { child, at: at.to_owned() })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        detach(&self.at);
    }
}

/// Takes away what is mounted of ours at a directory, and the directory, if it is empty.
fn detach(at: &Path) {
    let Some(root) = at.parent() else { return };
    while ours(root).iter().any(|mounted| mounted == at) {
        match umount2(at, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Somebody else was faster.
            Err(Errno::EINVAL) => break,
            Err(error) => {
                tracing::warn!(at = %at.display(), %error, "cannot take a mount away");
                return;
            }
        }
    }
    let _ = std::fs::remove_dir(at);
}

/// Where something of ours is mounted below a directory, by what the kernel says: it asks
/// no mount, which may hang.
fn ours(root: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().filter_map(mount_of_ours).filter(|at| at.parent() == Some(root)).collect()
}

/// The directory of one line of `/proc/PID/mountinfo` (proc_pid_mountinfo(5)), if it is a
/// mount of ours.
fn mount_of_ours(line: &str) -> Option<PathBuf> {
    let (mount, kind) = line.split_once(" - ")?;
    let at = mount.split(' ').nth(4)?;
    let (kind, source) = kind.split_once(' ')?;
    (kind == "fuse" && source.starts_with(SOURCE)).then(|| unescaped(at))
}

/// A path as the kernel writes it: blanks and the like in octal.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_of_ours_are_known() {
        let ours = r"61 29 0:52 / /cluster\040storage/san rw,nosuid shared:1 - fuse holdfast:san rw,user_id=0";
        assert_eq!(mount_of_ours(ours), Some("/cluster storage/san".into()));
        for other in [
            "61 29 0:52 / /clusterstorage/san rw - fuse.sshfs san:/srv rw",
            "61 29 0:52 / /clusterstorage/san rw - ext4 /dev/sda rw",
            "",
        ] {
            assert_eq!(mount_of_ours(other), None, "{other}");
        }
        assert_eq!(unescaped(r"a\134b\"), PathBuf::from(r"a\b\"));
    }

    #[test]
    fn a_directory_with_something_in_it_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().join("san");
        std::fs::create_dir(&at).unwrap();
        std::fs::write(at.join("mine"), "x").unwrap();
        let refused = Mount::start("san", &at, "info").err().unwrap().to_string();
        assert!(refused.contains("move it away"), "{refused}");
        assert!(at.join("mine").exists());
    }
}
