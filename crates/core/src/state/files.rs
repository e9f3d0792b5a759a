//! Files on LUNs that nodes have in their hands without a VM, and what users do with them.

use crate::model::*;

use super::commands::Executed;
use super::{ClusterState, Refusal, Reply};

/// What a node wants to hold.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Holding {
    /// A file that is there.
    File {
        /// Its name.
        name: String,
        /// To do what.
        kind: HoldKind,
    },
    /// A new file, to write it. It has no name before the hold ends.
    New {
        /// How long it is to be, in bytes.
        bytes: u64,
    },
}

/// The name that a file gets which was made.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Naming {
    /// The name.
    pub name: String,
    /// A file that has it already goes.
    pub replaces: bool,
}

impl ClusterState {
    pub(super) fn hold_file(
        &mut self,
        id: HoldId,
        volume: &str,
        node: NodeId,
        term: NodeTerm,
        what: &Holding,
    ) -> Executed {
        if !self.is_in_term(node, term) {
            return Err(Refusal::Conflict(format!("{} is not in term {term} any more", self.node_name(node))));
        }
        if self.nodes.get(&node).is_some_and(|node| node.leaves) {
            return Err(Refusal::Conflict(format!("node {:?} is being removed", self.node_name(node))));
        }
        let lun = self.lun_of(volume)?;
        lun.at_rest(volume)?;
        if lun.holds.contains_key(&id) {
            return Ok(Reply::Done);
        }
        let tenure = Tenure { node, term, epoch: Epoch(1) };
        match what {
            Holding::New { bytes } => {
                fits(lun, volume, *bytes)?;
                self.lun_mut(volume)?.make_nameless(id, tenure, *bytes);
            }
            Holding::File { name, kind } => {
                let file = file_of(lun, volume, name)?;
                if let Some(vm) = file.vm.and_then(|vm| self.vms.get(&vm)) {
                    let makes = matches!(vm.disks, DiskStage::Making { node: maker, .. } if maker == node);
                    if !makes {
                        return Err(is_disk_of(name, vm));
                    }
                }
                let shared = |hold: &FileHold| hold.kind == HoldKind::Reads && *kind == HoldKind::Reads;
                if let Some((_, hold)) = lun.holds_on(name).find(|(_, hold)| !shared(hold)) {
                    return Err(self.is_held(name, hold));
                }
                self.lun_mut(volume)?.holds.insert(id, FileHold { file: name.clone(), kind: *kind, tenure });
            }
        }
        Ok(Reply::Done)
    }

    pub(super) fn end_hold(&mut self, at_ms: u64, by: &str, id: HoldId, naming: Option<&Naming>) -> Executed {
        let found = self.luns.iter().find(|(_, lun)| lun.holds.contains_key(&id));
        let (volume, lun) = found.ok_or_else(|| Refusal::unknown("hold on a file", id))?;
        let volume = volume.clone();
        if let (Some(naming), Some(hold)) = (naming, lun.holds.get(&id)) {
            let key = hold.file.clone();
            if !is_nameless(&key) {
                return Err(Refusal::Conflict(format!("{key:?} has its name")));
            }
            let replaced = self.may_be_put(&volume, naming, 0)?;
            let lun = self.lun_mut(&volume)?;
            if let Some(replaced) = replaced {
                lun.drop_file(&replaced);
            }
            lun.rename_file(&key, &naming.name);
            let text = format!("{by} put {:?} there", naming.name);
            self.event(at_ms, Severity::Info, format!("volume {volume}"), text);
        }
        self.lun_mut(&volume)?.end_hold(id);
        Ok(Reply::Done)
    }

    /// Whether a file of `bytes` may get a name on a LUN; says which file it replaces.
    ///
    /// # Errors
    /// It is no name, or is in use; it can never be there.
    pub fn may_be_put(&self, volume: &str, naming: &Naming, bytes: u64) -> Result<Option<String>, Refusal> {
        let name = &naming.name;
        valid_file_name(name)?;
        let lun = self.lun_of(volume)?;
        fits(lun, volume, bytes)?;
        let Some(known) = lun.in_the_way(name) else { return Ok(None) };
        if known != name {
            return Err(Refusal::Conflict(format!("{known:?} is on volume {volume:?}, so {name:?} cannot be")));
        }
        self.may_go(lun, volume, name)?;
        match naming.replaces {
            true => Ok(Some(name.clone())),
            false => Err(Refusal::duplicate("file", name)),
        }
    }

    pub(super) fn remove_file(&mut self, at_ms: u64, by: &str, volume: &str, name: &str) -> Executed {
        let lun = self.lun_of(volume)?;
        lun.at_rest(volume)?;
        self.may_go(lun, volume, name)?;
        self.lun_mut(volume)?.drop_file(name);
        self.event(at_ms, Severity::Info, format!("volume {volume}"), format!("{by} removed {name:?}"));
        Ok(Reply::Done)
    }

    /// Refuses a file that a VM has or that somebody has open.
    fn may_go(&self, lun: &Lun, volume: &str, name: &str) -> Result<(), Refusal> {
        let file = file_of(lun, volume, name)?;
        if let Some(vm) = file.vm.and_then(|vm| self.vms.get(&vm)) {
            return Err(is_disk_of(name, vm));
        }
        match lun.holds_on(name).next() {
            Some((_, hold)) => Err(self.is_held(name, hold)),
            None => Ok(()),
        }
    }

    /// Ends the holds of nodes whose terms are over, and what they were making.
    pub(super) fn end_void_holds(&mut self) {
        let held = self.luns.iter().flat_map(|(name, lun)| lun.holds.iter().map(move |(id, hold)| (name, id, hold)));
        let void = held.filter(|(.., hold)| self.is_void(&hold.tenure));
        for (name, id) in void.map(|(name, id, _)| (name.clone(), *id)).collect::<Vec<_>>() {
            if let Some(lun) = self.luns.get_mut(&name) {
                lun.end_hold(id);
            }
        }
    }

    /// A hold, and the volume that its file is on.
    pub fn hold(&self, id: HoldId) -> Option<(&String, &Lun, &FileHold)> {
        self.luns.iter().find_map(|(name, lun)| Some((name, lun, lun.holds.get(&id)?)))
    }

    /// The holds of a node that are not void, with the volumes that they are on.
    pub fn holds_of(&self, node: NodeId) -> impl Iterator<Item = (&String, HoldId, &FileHold)> {
        let lasts = move |hold: &FileHold| hold.tenure.node == node && !self.is_void(&hold.tenure);
        self.luns.iter().flat_map(move |(name, lun)| {
            let theirs = lun.holds.iter().filter(move |(_, hold)| lasts(hold));
            theirs.map(move |(id, hold)| (name, *id, hold))
        })
    }

    /// Refuses to touch a volume of which nodes have files open.
    pub(super) fn has_no_holds(&self, volume: &str) -> Result<(), Refusal> {
        match self.luns.get(volume).and_then(|lun| lun.holds.values().next()) {
            Some(hold) => Err(Refusal::Conflict(format!(
                "{} has a file of volume {volume:?} open: wait until that is copied",
                self.node_name(hold.tenure.node)
            ))),
            None => Ok(()),
        }
    }

    fn is_held(&self, name: &str, hold: &FileHold) -> Refusal {
        let does = match hold.kind {
            HoldKind::Reads => "read",
            HoldKind::Writes => "written to",
        };
        Refusal::Conflict(format!("{name:?} is in use: it is being {does} on {}", self.node_name(hold.tenure.node)))
    }

    fn lun_of(&self, volume: &str) -> Result<&Lun, Refusal> {
        match self.luns.get(volume) {
            Some(lun) => Ok(lun),
            None if self.volumes.contains_key(volume) => {
                Err(Refusal::Invalid(format!("volume {volume:?} is a directory, and no LUN")))
            }
            None => Err(Refusal::unknown("volume", volume)),
        }
    }

    fn lun_mut(&mut self, volume: &str) -> Result<&mut Lun, Refusal> {
        self.luns.get_mut(volume).ok_or_else(|| Refusal::unknown("volume", volume))
    }
}

/// Refuses what is no name of a file.
///
/// # Errors
/// [`Refusal::Invalid`] says what a name looks like.
pub fn valid_file_name(name: &str) -> Result<(), Refusal> {
    match is_file_name(name) {
        true => Ok(()),
        false => Err(Refusal::Invalid(format!(
            "{name:?} cannot be the name of a file: parts of 1 to 255 bytes with single slashes between them, no \".\" or \"..\", no control characters, 1024 bytes in all"
        ))),
    }
}

fn fits(lun: &Lun, volume: &str, bytes: u64) -> Result<(), Refusal> {
    let whole = lun.slab_bytes * u64::from(lun.slabs);
    match bytes > whole {
        true => Err(Refusal::Invalid(format!("the file has {bytes} bytes, and volume {volume:?} {whole}"))),
        false => Ok(()),
    }
}

fn file_of<'a>(lun: &'a Lun, volume: &str, name: &str) -> Result<&'a LunFile, Refusal> {
    let found = lun.files.get(name).filter(|_| !is_nameless(name));
    found.ok_or_else(|| Refusal::unknown("file", format!("{name} on volume {volume}")))
}

fn is_disk_of(name: &str, vm: &Vm) -> Refusal {
    Refusal::Conflict(format!("{name:?} is a disk of VM {:?}", vm.name))
}
