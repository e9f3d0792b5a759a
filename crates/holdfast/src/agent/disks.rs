//! Making and deleting the files of VMs. A VM's files have a directory of their
//! own, whose name nothing else ever has, so an attempt that was cut off is
//! simply begun again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_core::*;
use holdfast_qemu::QemuImg;
use tokio::task::JoinHandle;

use super::{Agent, Member};

/// Long enough for the largest image on the slowest storage.
const DEADLINE: Duration = Duration::from_secs(24 * 3600);

impl Agent {
    /// Does the work on disks that the cluster gave to this node.
    pub(super) async fn keep_disks(self, member: &'static Member) {
        let mut changes = self.changes();
        let mut working: BTreeMap<JobId, (Vm, JoinHandle<()>)> = BTreeMap::new();
        loop {
            let state = changes.borrow_and_update().clone();
            let mut mine = BTreeMap::new();
            for vm in state.vms.values() {
                match &vm.disks {
                    DiskStage::Making { node, job, .. } | DiskStage::Deleting { node, job } if *node == member.me => {
                        mine.insert(*job, vm.clone());
                    }
                    _ => {}
                }
            }
            let over: Vec<_> = working.keys().copied().filter(|job| !mine.contains_key(job)).collect();
            for (vm, work) in over.iter().filter_map(|job| working.remove(job)) {
                work.abort();
                let _ = work.await;
                // A VM that is not wanted any more leaves nothing behind.
                if !state.vms.contains_key(&vm.id)
                    && let Err(why) = self.delete(&vm).await
                {
                    tracing::warn!(vm = vm.name, why, "files of a VM that is gone stay");
                }
            }
            member.reports.say(|report| report.work.retain(|job, _| mine.contains_key(job)));
            for (job, vm) in mine {
                working.entry(job).or_insert_with(|| {
                    let work = self.clone().work_on_disks(member, job, vm.clone());
                    (vm, tokio::spawn(work))
                });
            }
            drop(state);
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    async fn work_on_disks(self, member: &'static Member, job: JobId, vm: Vm) {
        let progress = |percent: u8, note: &str| {
            let progress = Progress { percent, note: note.to_owned() };
            member.reports.say(|report| report.work.entry(job).or_default().progress = progress);
        };
        let end = match &vm.disks {
            DiskStage::Making { sources, .. } => {
                progress(0, "making its disks");
                let made = self.make(&vm, sources, progress).await;
                if made.is_err() {
                    // Nothing half-made.
                    let _ = self.delete(&vm).await;
                }
                made
            }
            DiskStage::Deleting { .. } => {
                progress(0, "deleting its disks");
                self.delete(&vm).await
            }
            DiskStage::Ready => return,
        };
        member.reports.say(|report| report.work.entry(job).or_default().end = Some(end));
    }

    async fn make(&self, vm: &Vm, sources: &Sources, progress: impl Fn(u8, &str) + Sync) -> Result<(), String> {
        self.delete(vm).await?;
        for dir in self.directories(vm) {
            tokio::fs::create_dir_all(&dir).await.map_err(|error| format!("cannot make {}: {error}", dir.display()))?;
        }
        let qemu_img = QemuImg::new("qemu-img");
        let count = vm.spec.disks.len();
        for (index, disk) in vm.spec.disks.iter().enumerate() {
            if self.is_on_lun(disk) {
                // Nothing of it is there, so it reads as zero.
                continue;
            }
            let path = self.volume_path(&disk.volume, &disk.file);
            let made = match sources.images.get(index).and_then(Option::as_ref) {
                None => qemu_img.create(&path, disk.format, disk.size_bytes, DEADLINE).await,
                Some(image) => {
                    let note = format!("copying {image}");
                    let on = |share: f64| progress(((index as f64 + share) * 100.0 / count as f64) as u8, &note);
                    qemu_img.convert(Path::new(image), &path, disk.format, Some(disk.size_bytes), DEADLINE, on).await
                }
            };
            made.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    async fn delete(&self, vm: &Vm) -> Result<(), String> {
        for dir in self.directories(vm) {
            match tokio::fs::remove_dir_all(&dir).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(format!("cannot delete {}: {error}", dir.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether a disk is slabs, and no file.
    fn is_on_lun(&self, disk: &DiskSpec) -> bool {
        self.state().luns.contains_key(&disk.volume)
    }

    /// The VM's own directory on each directory volume that it uses.
    fn directories(&self, vm: &Vm) -> Vec<PathBuf> {
        let files = vm.spec.disks.iter().filter(|disk| !self.is_on_lun(disk));
        let mut volumes: Vec<_> = files.map(|disk| &disk.volume).collect();
        volumes.sort_unstable();
        volumes.dedup();
        volumes.into_iter().map(|volume| self.volume_path(volume, &Vm::directory(vm.id, &vm.name))).collect()
    }
}
