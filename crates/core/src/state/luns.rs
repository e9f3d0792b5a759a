//! Which slab of a LUN is whose. A former host of a VM maps nothing: it has no right
//! to the VM any more, and what it had taken is free.

use std::collections::BTreeMap;

use crate::model::*;

use super::commands::Executed;
use super::files::valid_file_name;
use super::{ClusterState, Refusal, Reply};

/// A node takes one of so many free slabs at a time at most.
const SHARE: u32 = 8;

impl ClusterState {
    pub(super) fn take_slabs(
        &mut self,
        volume: &str,
        id: NodeId,
        term: NodeTerm,
        known: &[Slabs],
        most: u32,
    ) -> Executed {
        let node = self.nodes.get(&id).ok_or_else(|| Refusal::unknown("node", id))?;
        if !self.is_in_term(id, term) {
            return Err(Refusal::Conflict(format!("{} is not in term {term} any more", node.name)));
        }
        let over = |(id, taken): (&NodeId, &Taken)| (!self.is_in_term(*id, taken.term)).then_some(*id);
        let lun = self.luns.get(volume).ok_or_else(|| Refusal::unknown("volume", volume))?;
        let over: Vec<_> = lun.taken.iter().filter_map(over).collect();
        let Some(lun) = self.luns.get_mut(volume) else { return Err(Refusal::unknown("volume", volume)) };
        lun.at_rest(volume)?;
        over.into_iter().for_each(|node| lun.give_back(node));
        // What is scarce is not kept ahead where nobody may need it.
        let most = most.min(lun.free_slabs().div_ceil(SHARE));
        Ok(Reply::Slabs(lun.take(id, term, known, most)))
    }

    pub(super) fn map_slabs(
        &mut self,
        id: VmId,
        disk: u32,
        tenure: &Tenure,
        wanted: &[Mapped],
        takings: &[u64],
    ) -> Executed {
        let (lun, file) = self.writable(id, disk, tenure)?;
        Ok(Reply::Mapped(lun.map(&file, tenure.node, tenure.term, wanted, takings)))
    }

    pub(super) fn unmap_slabs(
        &mut self,
        id: VmId,
        disk: u32,
        tenure: &Tenure,
        number: u64,
        parts: &[(u32, u32)],
    ) -> Executed {
        let (lun, file) = self.writable(id, disk, tenure)?;
        Ok(Reply::Unmapped(lun.unmap(&file, number, parts)))
    }

    pub(super) fn void_unmaps(&mut self, node: NodeId) -> Reply {
        let theirs = self.vms.values().filter(|vm| vm.tenures().any(|right| right.node == node));
        let disks = theirs.flat_map(|vm| &vm.spec.disks).map(|disk| (disk.volume.clone(), disk.file.clone()));
        let held = self.holds_of(node).map(|(volume, _, hold)| (volume.clone(), hold.file.clone()));
        for (volume, file) in disks.chain(held).collect::<Vec<_>>() {
            if let Some(lun) = self.luns.get_mut(&volume) {
                lun.void_unmaps(&file);
            }
        }
        Reply::Done
    }

    /// Says how full volumes are where that has changed.
    pub(super) fn tell_fullness(&mut self, at_ms: u64) {
        let changed = |(name, lun): (&String, &mut Lun)| {
            let (now, before) = (lun.fullness(), lun.told);
            lun.told = now;
            (now != before).then(|| (name.clone(), before, now, lun.used_percent()))
        };
        let changed: Vec<_> = self.luns.iter_mut().filter_map(changed).collect();
        for (name, before, now, percent) in changed {
            let (severity, text) = match now {
                Fullness::Full => (
                    Severity::Error,
                    "is full: VMs whose disks need more of it stand still until there is room".to_owned(),
                ),
                _ if now < before => (Severity::Info, format!("has room again: {percent} % are used")),
                Fullness::NearlyFull => (
                    Severity::Warning,
                    format!(
                        "is nearly full ({percent} %): when it is full, VMs whose disks need more of it stand still"
                    ),
                ),
                _ => (Severity::Warning, format!("fills up: {percent} % are used")),
            };
            self.event(at_ms, severity, format!("volume {name}"), text);
        }
    }

    /// The file of a disk, for whoever has a right to the VM; or one that is held.
    fn writable(&mut self, id: VmId, disk: u32, tenure: &Tenure) -> Result<(&mut Lun, String), Refusal> {
        if !self.vms.contains_key(&id)
            && let Some((volume, _, hold)) = self.hold(HoldId(id.0))
        {
            let (volume, file) = (volume.clone(), hold.file.clone());
            if hold.kind != HoldKind::Writes || hold.tenure != *tenure || self.is_void(tenure) {
                let node = self.node_name(tenure.node);
                return Err(Refusal::Conflict(format!("{node} may not write to {file:?}")));
            }
            let lun = self.luns.get_mut(&volume).ok_or_else(|| Refusal::unknown("volume", &volume))?;
            return Ok((lun, file));
        }
        let vm = self.vms.get(&id).ok_or_else(|| Refusal::unknown("VM", id))?;
        if self.is_void(tenure) || !vm.tenures().any(|right| right == tenure) {
            return Err(Refusal::Conflict(format!(
                "{} may not write to the disks of VM {:?} under epoch {}",
                self.node_name(tenure.node),
                vm.name,
                tenure.epoch
            )));
        }
        let disk = vm.spec.disks.get(disk as usize).ok_or_else(|| Refusal::unknown("disk", disk))?;
        let lun = self.luns.get_mut(&disk.volume).ok_or_else(|| Refusal::unknown("volume", &disk.volume))?;
        Ok((lun, disk.file.clone()))
    }

    /// Whether its disks can be on LUNs where they are to be.
    pub(super) fn valid_lun_disks(&self, spec: &VmSpec) -> Result<(), Refusal> {
        if let Some(boot) = &spec.direct_boot
            && self.luns.contains_key(&boot.volume)
        {
            return Err(Refusal::Invalid(format!(
                "volume {:?} is on a LUN, which holds disks only: put the kernel on a directory volume",
                boot.volume
            )));
        }
        let mut taken_whole = BTreeMap::<&str, u32>::new();
        for (index, disk) in spec.disks.iter().enumerate() {
            let Some(lun) = self.luns.get(&disk.volume) else { continue };
            lun.at_rest(&disk.volume)?;
            let invalid = |text: String| Err(Refusal::Invalid(format!("disk {index}: {text}")));
            if disk.format != DiskFormat::Raw {
                return invalid(format!(
                    "volume {:?} is on a LUN, where disks are thin without a format of their own: use format=raw; an image of any format fills it",
                    disk.volume
                ));
            }
            if !disk.size_bytes.is_multiple_of(LUN_BLOCK_BYTES) {
                return invalid(format!("{} bytes: on a LUN it is a multiple of {LUN_BLOCK_BYTES}", disk.size_bytes));
            }
            let whole = lun.slab_bytes * u64::from(lun.slabs);
            if disk.size_bytes > whole {
                return invalid(format!("{} bytes, and volume {:?} has {whole}", disk.size_bytes, disk.volume));
            }
            if disk.allocation == Allocation::Full {
                // What nodes keep ahead is given to disks, and what was freed is free in a moment.
                let room = lun.free_slabs() + lun.freed_slabs() + lun.taken_slabs();
                let taken = taken_whole.entry(&disk.volume).or_default();
                *taken = taken.saturating_add(lun.parts(disk.size_bytes));
                if *taken > room {
                    let (needs, has) = (u64::from(*taken) * lun.slab_bytes, u64::from(room) * lun.slab_bytes);
                    return invalid(format!(
                        "fully allocated, it makes {} MiB that are needed on volume {:?}, where {} MiB are free",
                        needs >> 20,
                        disk.volume,
                        has >> 20
                    ));
                }
            }
            valid_file_name(&disk.file)?;
            if let Some(known) = lun.in_the_way(&disk.file).filter(|known| **known != disk.file) {
                return invalid(format!("{known:?} is on volume {:?}, so {:?} cannot be", disk.volume, disk.file));
            }
            if let Some((_, hold)) = lun.holds_on(&disk.file).next() {
                return invalid(format!("{:?} is in use on {}", disk.file, self.node_name(hold.tenure.node)));
            }
            match lun.files.get(&disk.file) {
                Some(LunFile { vm: Some(_), .. }) => return Err(Refusal::duplicate("file", &disk.file)),
                Some(file) if file.bytes != disk.size_bytes => {
                    return invalid(format!("file {:?} has {} bytes", disk.file, file.bytes));
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(super) fn make_lun_files(&mut self, vm: VmId, spec: &VmSpec) {
        for disk in &spec.disks {
            if let Some(lun) = self.luns.get_mut(&disk.volume) {
                lun.make_file(&disk.file, vm, disk.size_bytes);
            }
        }
    }

    pub(super) fn unmake_lun_files(&mut self, vm: VmId) {
        self.luns.values_mut().for_each(|lun| lun.unmake_files(vm));
    }

    pub(super) fn drop_lun_files(&mut self, vm: VmId) {
        self.luns.values_mut().for_each(|lun| lun.drop_files(vm));
    }
}
