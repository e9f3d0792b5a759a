//! Files on LUNs that this node has open without a VM: each is served by the volume server
//! like a VM's disk, and let go of when nothing of it is under way. What an earlier life of
//! this agent had open is let go of, too.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use holdfast_core::*;
use tokio::sync::Notify;
use uuid::Uuid;

use super::{Agent, Failure, Member};
use crate::volume::protocol::Disk;

/// A file that could not be let go of is tried again after this.
const AGAIN: Duration = Duration::from_secs(1);

/// What this node has open.
#[derive(Default)]
pub struct Holds {
    open: Mutex<BTreeSet<HoldId>>,
    over: Mutex<BTreeSet<HoldId>>,
    changed: Notify,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file on a LUN that this node holds, until this is dropped.
pub(super) struct Held {
    agent: Agent,
    member: &'static Member,
    id: HoldId,
    /// The file as it was when it was taken.
    pub file: LunFile,
    /// How long a part is, in bytes.
    pub part_bytes: u64,
    socket: PathBuf,
}

impl Held {
    /// Where it is served. A file of no length is not.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Lets go of it in order; one that was made gets its name.
    pub async fn end(self, by: &str, naming: Option<Naming>) -> Result<(), Failure> {
        let withdrawn = self.agent.withdraw_disks(self.member, self.id.as_vm(), None).await;
        withdrawn.map_err(|error| Failure::other("internal", format!("{error:#}")))?;
        self.agent.execute(by, Command::EndHold { id: self.id, naming }).await.map(drop)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let holds = &self.member.holds;
        locked(&holds.over).insert(self.id);
        locked(&holds.open).remove(&self.id);
        holds.changed.notify_one();
    }
}

impl Agent {
    /// Takes a file on a LUN into this node's hands, and has it served here.
    ///
    /// # Errors
    /// It is not there, or in use; this node does not reach it.
    pub(super) async fn hold(&self, by: &str, volume: &str, what: Holding) -> Result<Held, Failure> {
        let member = self.member()?;
        let id = HoldId(Uuid::new_v4());
        let term = self.0.keeper.watch().borrow().term;
        locked(&member.holds.open).insert(id);
        // From here on it is let go of, whatever comes.
        let (agent, socket) = (self.clone(), self.held_socket(id));
        let file = LunFile::new(id.as_vm(), 0);
        let mut held = Held { agent, member, id, file, part_bytes: 1, socket };
        let volume = volume.to_owned();
        self.execute(by, Command::HoldFile { id, volume, node: member.me, term, what }).await?;
        let state = member.consensus.state().borrow().clone();
        let unserved = |error: anyhow::Error| Failure::other("volume_unreachable", format!("{error:#}"));
        let disk = self.held_disk(member, &state, id).map_err(unserved)?;
        if let Some((_, lun, hold)) = state.hold(id)
            && let Some(file) = lun.files.get(&hold.file)
        {
            (held.part_bytes, held.file) = (lun.slab_bytes, file.clone());
        }
        if held.file.bytes > 0 {
            if let Some(dir) = held.socket.parent() {
                let made = std::fs::create_dir_all(dir).context("cannot make the directory for sockets of files");
                made.map_err(unserved)?;
            }
            self.serve_disk(member, disk).await.map_err(|error| unserved(error.into()))?;
        }
        Ok(held)
    }

    fn held_socket(&self, id: HoldId) -> PathBuf {
        self.0.config.run_dir.join("files").join(format!("{id}.sock"))
    }

    /// What the volume server serves for a hold.
    fn held_disk(&self, member: &'static Member, state: &ClusterState, id: HoldId) -> anyhow::Result<Disk> {
        let (volume, lun, hold) = state.hold(id).context("the file is not held any more")?;
        let known = state.volumes.get(volume).context("the volume is gone")?;
        let VolumeKind::Lun { device, .. } = &known.kind else { anyhow::bail!("the volume is no LUN") };
        let file = lun.files.get(&hold.file).context("the file is gone")?;
        Ok(Disk {
            vm: id.as_vm(),
            disk: 0,
            tenure: hold.tenure,
            socket: self.held_socket(id),
            volume: volume.clone(),
            volume_id: known.id,
            device: member.serving.device(known.id).unwrap_or_else(|| device.into()),
            bytes: file.bytes.next_multiple_of(LUN_BLOCK_BYTES),
            parts: file.parts.clone(),
            may_write: hold.kind == HoldKind::Writes,
        })
    }

    /// Lets go of files that nobody has open here any more.
    pub(super) async fn keep_holds(self, member: &'static Member) {
        let mut changes = self.changes();
        loop {
            let state = changes.borrow_and_update().clone();
            let mut over = locked(&member.holds.over).clone();
            let open = locked(&member.holds.open).clone();
            over.extend(state.holds_of(member.me).map(|(_, id, _)| id).filter(|id| !open.contains(id)));
            let mut left = false;
            for id in over {
                match self.let_go(member, id).await {
                    Ok(()) => drop(locked(&member.holds.over).remove(&id)),
                    Err(error) => {
                        tracing::warn!(hold = %id, error = format!("{error:#}"), "a file is still open here");
                        left = true;
                    }
                }
            }
            let wake = async {
                tokio::select! {
                    changed = changes.changed() => changed.is_ok(),
                    () = member.holds.changed.notified() => true,
                }
            };
            if left {
                tokio::time::sleep(AGAIN).await;
            } else if !wake.await {
                return;
            }
        }
    }

    async fn let_go(&self, member: &'static Member, id: HoldId) -> anyhow::Result<()> {
        let state = member.consensus.state().borrow().clone();
        let lasts = state.holds_of(member.me).any(|(_, held, _)| held == id);
        if lasts && !self.has_served_disks(member, id.as_vm()) {
            self.withdraw_unknown(member, self.held_disk(member, &state, id)?).await?;
        }
        self.withdraw_disks(member, id.as_vm(), None).await?;
        if !lasts {
            return Ok(());
        }
        match self.execute(&member.by(), Command::EndHold { id, naming: None }).await {
            Ok(_) | Err(Failure::Refused(Refusal::Unknown { .. })) => Ok(()),
            Err(failure) => Err(failure.into()),
        }
    }
}
