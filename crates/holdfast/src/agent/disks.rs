//! Making and deleting the files of VMs. A VM's files have a directory of their
//! own, whose name nothing else ever has, so an attempt that was cut off is
//! simply begun again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use holdfast_core::*;
use holdfast_qemu::{Image, ImageAt, QemuError, QemuImg};
use holdfast_volume::lun::Device as _;
use tokio::task::JoinHandle;

use super::files::Held;
use super::{Agent, Failure, Member, copies};

/// How long `qemu-img` may take to look at an image.
const INSPECT_WITHIN: Duration = Duration::from_secs(20);
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
                let made = self.make(member, &vm, sources, progress).await;
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

    async fn make(
        &self,
        member: &Member,
        vm: &Vm,
        sources: &Sources,
        progress: impl Fn(u8, &str) + Sync,
    ) -> Result<(), String> {
        self.delete(vm).await?;
        for dir in self.directories(vm) {
            tokio::fs::create_dir_all(&dir).await.map_err(|error| format!("cannot make {}: {error}", dir.display()))?;
        }
        let qemu_img = QemuImg::new("qemu-img");
        let count = vm.spec.disks.len();
        for (index, disk) in vm.spec.disks.iter().enumerate() {
            let on_lun = self.is_on_lun(disk);
            let path = self.volume_path(&disk.volume, &disk.file);
            let image = sources.images.get(index).and_then(Option::as_ref);
            let told = |failure: Failure| failure.to_string();
            let part = |share: f64, note: &str| progress(((index as f64 + share) * 100.0 / count as f64) as u8, note);
            if on_lun && disk.allocation == Allocation::Full {
                let what = Holding::File { name: disk.file.clone(), kind: HoldKind::Writes };
                let target = self.hold(&member.by(), &disk.volume, what).await.map_err(told)?;
                let share = if image.is_some() { 0.5 } else { 1.0 };
                let taken = take_slabs(&target, |taken| part(taken * share, "taking room for its disks")).await;
                target.end(&member.by(), None).await.map_err(told)?;
                taken.map_err(told)?;
            }
            let Some(image) = image else {
                // Of a disk on a LUN nothing is there yet, or it was zeroed.
                if !on_lun {
                    let made = qemu_img.create(&path, disk, disk.size_bytes, DEADLINE).await;
                    made.map_err(|error| error.to_string())?;
                }
                continue;
            };
            let note = format!("copying {image}");
            let begin = if on_lun && disk.allocation == Allocation::Full { 0.5 } else { 0.0 };
            let on = |share: f64| part(begin + (1.0 - begin) * share, &note);
            let held = self.hold_image(member, image).await.map_err(told)?;
            let from = held.as_ref().map_or(ImageAt::File(Path::new(image)), |held| ImageAt::Socket(held.socket()));
            if on_lun {
                let what = Holding::File { name: disk.file.clone(), kind: HoldKind::Writes };
                let target = self.hold(&member.by(), &disk.volume, what).await.map_err(told)?;
                let filled = qemu_img.fill(from, target.socket(), DEADLINE, on).await;
                target.end(&member.by(), None).await.map_err(told)?;
                filled.map_err(|error| error.to_string())?;
            } else {
                let made = qemu_img.convert(from, &path, disk, Some(disk.size_bytes), DEADLINE, on).await;
                made.map_err(|error| error.to_string())?;
            }
            if let Some(held) = held {
                held.end(&member.by(), None).await.map_err(told)?;
            }
        }
        Ok(())
    }

    /// Takes an image into this node's hands that is on a LUN: `VOLUME:FILE`. Any other is
    /// a file that is there.
    async fn hold_image(&self, member: &Member, image: &str) -> Result<Option<Held>, Failure> {
        match image.split_once(':').filter(|_| !image.starts_with('/')) {
            Some((volume, file)) => {
                let what = Holding::File { name: file.to_owned(), kind: HoldKind::Reads };
                let held = self.hold(&member.by(), volume, what).await?;
                match held.file.bytes {
                    0 => Err(Failure::other("bad_image", format!("{image} is empty"))),
                    _ => Ok(Some(held)),
                }
            }
            None => Ok(None),
        }
    }

    /// What an image on a LUN is.
    ///
    /// # Errors
    /// The file is not there, or in use; this node does not reach it. The inner one is
    /// qemu-img's.
    pub async fn inspect_on_lun(&self, volume: &str, file: &str) -> Result<Result<Image, QemuError>, Failure> {
        let member = self.member()?;
        let Some(held) = self.hold_image(member, &format!("{volume}:{file}")).await? else {
            return Err(Failure::other("unreadable", format!("{file:?} is no file of volume {volume:?}")));
        };
        let found = QemuImg::new("qemu-img").inspect(ImageAt::Socket(held.socket()), INSPECT_WITHIN).await;
        held.end(&member.by(), None).await?;
        Ok(found)
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

/// Has a slab for each part of a disk on a LUN of which nothing is there yet. One that is
/// given is zeroed, so it is enough to write to each part. `on` is told how far it is, 0 to 1.
///
/// # Errors
/// The volume is full, or not reached.
async fn take_slabs(held: &Held, on: impl Fn(f64)) -> Result<(), Failure> {
    let Some(device) = copies::open(held).await? else { return Ok(()) };
    let device = Arc::new(device);
    let parts = held.file.bytes.div_ceil(held.part_bytes);
    for part in 0..parts {
        let (device, at) = (device.clone(), part * held.part_bytes);
        let write = move || match device.write(at, &[0; LUN_BLOCK_BYTES as usize]) {
            Ok(()) if part + 1 == parts => device.flush(),
            written => written,
        };
        let written = tokio::task::spawn_blocking(write).await;
        let written = written.map_err(|error| Failure::other("internal", error.to_string()))?;
        written.map_err(|error| {
            let text = format!("part {part} of the disk's {parts} got no room: {error}");
            Failure::other("no_space", text)
        })?;
        on((part + 1) as f64 / parts as f64);
    }
    Ok(())
}
