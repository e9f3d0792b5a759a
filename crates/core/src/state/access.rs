//! Who owns a volume on a LUN, and how nodes reach it.

use crate::model::*;
use crate::plan::Evidence;

use super::commands::{Executed, valid_name};
use super::{ClusterState, Refusal, Reply};

impl ClusterState {
    pub(super) fn set_owner(&mut self, at_ms: u64, by: &str, volume: &str, id: NodeId) -> Executed {
        let name = self.fit_for(volume, id)?;
        let void = self.owner(volume).is_none();
        let access = self.access(volume)?;
        if let Some(owner) = access.owner.as_mut().filter(|_| !void) {
            if owner.node == id && !owner.leaving {
                return Err(Refusal::Conflict(format!("{name} owns volume {volume:?} already")));
            }
            owner.leaving = true;
        }
        access.next = Some(id);
        self.event(at_ms, Severity::Info, subject(volume), format!("{by} wants it owned by {name}"));
        Ok(Reply::Done)
    }

    pub(super) fn set_redirect(&mut self, at_ms: u64, by: &str, volume: &str, id: NodeId, redirect: bool) -> Executed {
        let name = self.nodes.get(&id).ok_or_else(|| Refusal::unknown("node", id))?.name.clone();
        if redirect {
            let others = self.nodes.keys().filter(|other| **other != id);
            if !others.into_iter().any(|other| self.is_fit(volume, *other)) {
                let why = format!("no node but {name} has a path to volume {volume:?}, so none can do its I/O");
                return match self.luns.contains_key(volume) {
                    true => Err(Refusal::Conflict(why)),
                    false => Err(self.no_lun(volume)),
                };
            }
        }
        let access = self.access(volume)?;
        let text = match redirect {
            true if access.redirected.insert(id) => {
                access.next.take_if(|next| *next == id);
                format!("{by} wants the I/O of {name} to go through its owner")
            }
            false if access.redirected.remove(&id) => format!("{by} wants {name} to reach it by itself again"),
            true => return Err(Refusal::Conflict(format!("{name} is redirected on volume {volume:?} already"))),
            false => return Err(Refusal::Conflict(format!("{name} was not redirected on volume {volume:?} by hand"))),
        };
        self.event(at_ms, Severity::Info, subject(volume), text);
        Ok(Reply::Done)
    }

    /// Files of VMs that run are open under the old name, so they have to be off.
    pub(super) fn rename_volume(&mut self, at_ms: u64, by: &str, old: &str, new: &str) -> Executed {
        valid_name("volume", new)?;
        if !self.volumes.contains_key(old) {
            return Err(Refusal::unknown("volume", old));
        }
        if self.volumes.contains_key(new) {
            return Err(Refusal::duplicate("volume", new));
        }
        self.has_no_holds(old)?;
        let busy = |vm: &&Vm| {
            let off = vm.placement == Placement::Nowhere && !vm.desired.wants_qemu();
            vm.spec.uses_volume(old) && !(off && vm.disks == DiskStage::Ready)
        };
        if let Some(vm) = self.vms.values().find(busy) {
            return Err(Refusal::Conflict(format!(
                "VM {:?} has files on volume {old:?} open under that name: shut it down first",
                vm.name
            )));
        }
        for vm in self.vms.values_mut() {
            let boot = vm.spec.direct_boot.as_mut().map(|boot| &mut boot.volume);
            for volume in vm.spec.disks.iter_mut().map(|disk| &mut disk.volume).chain(boot) {
                if volume == old {
                    new.clone_into(volume);
                }
            }
        }
        if let Some(volume) = self.volumes.remove(old) {
            self.volumes.insert(new.into(), volume);
        }
        if let Some(lun) = self.luns.remove(old) {
            self.luns.insert(new.into(), lun);
        }
        self.event(at_ms, Severity::Info, subject(new), format!("{by} renamed it, it was {old}"));
        Ok(Reply::Done)
    }

    /// Whether a node may own a volume: it is up, and reaches it by itself.
    pub fn is_fit(&self, volume: &str, id: NodeId) -> bool {
        let direct = self.reached(volume, id).is_some_and(|reached| reached.path == LunPath::Direct);
        let stays = self.nodes.get(&id).is_some_and(|node| !node.leaves);
        direct && stays && self.luns.get(volume).is_some_and(|lun| !lun.access.redirected.contains(&id))
    }

    fn fit_for(&self, volume: &str, id: NodeId) -> Result<String, Refusal> {
        let node = self.nodes.get(&id).ok_or_else(|| Refusal::unknown("node", id))?;
        let lun = self.luns.get(volume).ok_or_else(|| self.no_lun(volume))?;
        let why = match self.reached(volume, id).map(|reached| &reached.path) {
            _ if !node.is_up() => "is not up".into(),
            _ if node.drained_ms.is_some() => {
                format!("is drained for maintenance (`holdfast node resume {}` ends that)", node.name)
            }
            _ if node.leaves => "is being removed".into(),
            _ if lun.access.redirected.contains(&id) => {
                format!(
                    "is redirected by hand: take that back first (`volume maintenance {volume} --direct {}`)",
                    node.name
                )
            }
            Some(LunPath::Direct) => return Ok(node.name.clone()),
            Some(LunPath::Redirected { why, .. } | LunPath::Unavailable { why }) => {
                format!("does not reach it by itself: {why}")
            }
            None => "has not said yet whether it reaches it".into(),
        };
        Err(Refusal::Conflict(format!("{} cannot own volume {volume:?}: it {why}", node.name)))
    }

    fn access(&mut self, volume: &str) -> Result<&mut Access, Refusal> {
        let missing = self.no_lun(volume);
        self.luns.get_mut(volume).map(|lun| &mut lun.access).ok_or(missing)
    }

    fn no_lun(&self, volume: &str) -> Refusal {
        match self.volumes.contains_key(volume) {
            true => Refusal::Conflict(format!(
                "volume {volume:?} is a directory: only a volume on a LUN has an owner and paths"
            )),
            false => Refusal::unknown("volume", volume),
        }
    }

    pub(super) fn path_is(&mut self, at_ms: u64, volume: &str, id: NodeId, path: &LunPath) {
        let Some(node) = self.nodes.get(&id) else { return };
        let (name, term) = (node.name.clone(), node.term);
        let (severity, text) = match path {
            LunPath::Direct => (Severity::Info, format!("{name} reaches it by itself again")),
            LunPath::Redirected { why, through } => {
                (Severity::Warning, format!("{name} reaches it through {}: {why}", self.node_name(*through)))
            }
            LunPath::Unavailable { why } => (Severity::Warning, format!("{name} does not reach it: {why}")),
        };
        let Some(lun) = self.luns.get_mut(volume) else { return };
        let before = lun.access.paths.get(&id);
        let same = before.is_some_and(|before| before.path.is_like(path));
        // Whoever goes through another owner now has not reached it by itself meanwhile.
        let kind = std::mem::discriminant(path);
        let lasts = before.filter(|before| std::mem::discriminant(&before.path) == kind);
        let since_ms = lasts.map_or(at_ms, |before| before.since_ms);
        let news = !same && (before.is_some() || *path != LunPath::Direct);
        lun.access.paths.insert(id, Reached { path: path.clone(), term, since_ms });
        if news {
            self.event(at_ms, severity, subject(volume), text);
        }
    }

    pub(super) fn leave_volume(&mut self, at_ms: u64, volume: &str, cause: &Cause) {
        let Some(owner) = self.luns.get_mut(volume).and_then(|lun| lun.access.owner.as_mut()) else { return };
        owner.leaving = true;
        let node = owner.node;
        let text = format!("{} hands it over: {cause}", self.node_name(node));
        self.event(at_ms, Severity::Warning, subject(volume), text);
    }

    pub(super) fn own_volume(
        &mut self,
        at_ms: u64,
        volume: &str,
        to: Option<NodeId>,
        after: Option<Evidence>,
        cause: &Cause,
    ) {
        let to = to.and_then(|id| self.nodes.get(&id)).map(|node| (node.id, node.term));
        let Some(lun) = self.luns.get_mut(volume) else { return };
        let access = &mut lun.access;
        access.owner = to.map(|(node, term)| {
            access.last_epoch = access.last_epoch.next();
            access.next = None;
            Owner { node, term, epoch: access.last_epoch, leaving: false }
        });
        let (severity, text) = match access.owner {
            Some(owner) => {
                (Severity::Info, format!("is owned by {} (epoch {}): {cause}", self.node_name(owner.node), owner.epoch))
            }
            None => (Severity::Error, format!("is owned by nobody: {cause}")),
        };
        let severity = match after {
            Some(Evidence::TermOver) if to.is_some() => Severity::Warning,
            _ => severity,
        };
        self.event(at_ms, severity, subject(volume), text);
    }
}

fn subject(volume: &str) -> String {
    format!("volume {volume}")
}
