//! The descriptions of files on LUNs: who writes them, and what they are read for.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::model::*;

use super::commands::{Executed, valid_name};
use super::{ClusterState, Refusal, Reply};

impl ClusterState {
    /// The node that is to keep a LUN's journal: its owner, or the first node that is up
    /// while it has none.
    pub fn journal_keeper(&self, volume: &str) -> Option<NodeId> {
        self.luns.get(volume)?;
        match self.owner(volume) {
            Some(owner) => (!owner.leaving).then_some(owner.node),
            None => self.nodes.values().find(|node| node.is_up() && !node.leaves).map(|node| node.id),
        }
    }

    /// Why a node does not write a LUN's journal, if it does not and is not to begin.
    ///
    /// # Errors
    /// Another node is to write it, or still does; there is no such LUN.
    pub fn may_claim_journal(&self, volume: &str, writer: Writer) -> Result<(), Refusal> {
        let name = self.node_name(writer.node);
        let lun = self.luns.get(volume).ok_or_else(|| Refusal::unknown("volume", volume))?;
        lun.at_rest(volume)?;
        let lasts = |writer: &Writer| self.is_in_term(writer.node, writer.term);
        if !lasts(&writer) || self.journal_keeper(volume) != Some(writer.node) {
            return Err(Refusal::Conflict(format!("{name} is not the one to describe volume {volume:?}")));
        }
        match lun.journal.writer.filter(|known| *known != writer && lasts(known)) {
            Some(other) => {
                let other = self.node_name(other.node);
                Err(Refusal::Conflict(format!("{other} still describes volume {volume:?}")))
            }
            None => Ok(()),
        }
    }

    pub(super) fn claim_journal(&mut self, volume: &str, writer: Writer) -> Executed {
        self.may_claim_journal(volume, writer)?;
        if let Some(lun) = self.luns.get_mut(volume)
            && lun.journal.writer != Some(writer)
        {
            lun.journal.epoch += 1;
            lun.journal.writer = Some(writer);
        }
        Ok(Reply::Done)
    }

    pub(super) fn journal_written(
        &mut self,
        at_ms: u64,
        volume: &str,
        writer: Writer,
        outcome: Result<u64, String>,
        repaired: bool,
        ends: bool,
    ) -> Executed {
        let lun = self.luns.get_mut(volume).ok_or_else(|| Refusal::unknown("volume", volume))?;
        if lun.journal.writer != Some(writer) {
            return Err(Refusal::Conflict(format!("another node describes volume {volume:?}")));
        }
        let before = lun.journal.trouble.take();
        match outcome {
            Ok(revision) => {
                lun.described(revision.min(lun.revision));
                lun.journal.repair &= !repaired;
            }
            // Whoever wanted a repair is told, and may want it again.
            Err(why) => (lun.journal.repair, lun.journal.trouble) = (false, Some(why)),
        }
        if ends {
            lun.journal.writer = None;
        }
        let now = lun.journal.trouble.clone();
        let subject = format!("volume {volume}");
        match now {
            Some(why) if before.as_ref() != Some(&why) => {
                let text =
                    format!("what is on it cannot be written on it ({why}): see `holdfast volume check {volume}`");
                self.event(at_ms, Severity::Warning, subject, text);
            }
            None if before.is_some() => self.event(at_ms, Severity::Info, subject, "is described on its LUN again"),
            _ => {}
        }
        Ok(Reply::Done)
    }

    pub(super) fn repair_volume(&mut self, at_ms: u64, by: &str, name: &str) -> Executed {
        if !self.volumes.contains_key(name) {
            return Err(Refusal::unknown("volume", name));
        }
        let directory = || {
            Refusal::Invalid(format!("volume {name:?} is a directory: its file system is repaired by its own tools"))
        };
        let lun = self.luns.get_mut(name).ok_or_else(directory)?;
        lun.at_rest(name)?;
        (lun.journal.repair, lun.journal.trouble) = (true, None);
        self.event(at_ms, Severity::Info, format!("volume {name}"), format!("{by} has its description written anew"));
        Ok(Reply::Done)
    }

    pub(super) fn import_volume(
        &mut self,
        at_ms: u64,
        by: &str,
        name: &str,
        id: Uuid,
        kind: VolumeKind,
        (epoch, revision): (u64, u64),
    ) -> Executed {
        valid_name("volume", name)?;
        if self.volumes.contains_key(name) {
            return Err(Refusal::duplicate("volume", name));
        }
        if let Some((other, _)) = self.volumes.iter().find(|(_, volume)| volume.id == id || volume.kind == kind) {
            return Err(Refusal::Conflict(format!("it is volume {other:?} of this cluster already")));
        }
        let VolumeKind::Lun { slab_bytes, slabs, .. } = &kind else {
            return Err(Refusal::Invalid("only a LUN can be imported".into()));
        };
        let mut lun = Lun::new(*slab_bytes, *slabs);
        (lun.importing, lun.journal.epoch, lun.revision) = (true, epoch, revision);
        self.event(at_ms, Severity::Info, format!("volume {name}"), format!("{by} imports it"));
        self.luns.insert(name.into(), lun);
        self.volumes.insert(name.into(), Volume { id, kind, added_ms: at_ms });
        Ok(Reply::Done)
    }

    pub(super) fn import_files(
        &mut self,
        at_ms: u64,
        volume: &str,
        files: BTreeMap<String, (u64, Vec<Mapped>)>,
        last: bool,
    ) -> Executed {
        let lun = self.luns.get_mut(volume).ok_or_else(|| Refusal::unknown("volume", volume))?;
        if !lun.importing {
            return Err(Refusal::Conflict(format!("volume {volume:?} is not being imported")));
        }
        let mut trial = lun.clone();
        for (name, (bytes, parts)) in files {
            trial.import_file(&name, bytes, &parts).map_err(Refusal::Invalid)?;
        }
        trial.revision += 1;
        trial.importing = !last;
        let count = trial.files.len();
        *lun = trial;
        if last {
            self.event(at_ms, Severity::Info, format!("volume {volume}"), format!("was imported, with {count} files"));
        }
        Ok(Reply::Done)
    }
}

impl Lun {
    /// Whether it can be used.
    pub(super) fn at_rest(&self, volume: &str) -> Result<(), Refusal> {
        match self.importing {
            true => Err(Refusal::Conflict(format!(
                "volume {volume:?} is still being imported; if that has broken off, remove it and import it again"
            ))),
            false => Ok(()),
        }
    }
}
