//! A LUN that one process has for itself: slabs come straight from its description.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Contents, FileId, Op, Store, StoreError};
use crate::device::Lun;
use crate::export::{Export, Fence, LunDisk, OpenError};
use crate::parts::{Allocator, Grant, Refusal, Release, Wanted};

/// A volume on a LUN that nobody else uses: for tools and for measurements. In a
/// cluster the nodes agree on slabs instead.
pub struct Alone {
    lun: Lun,
    store: Arc<Mutex<Store<Lun>>>,
    work: Sender<Work>,
}

enum Work {
    Allocate(FileId, Wanted, Grant),
    Release(FileId, Range<u32>, Release),
}

/// Why a file of the volume cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum AloneError {
    /// No file has this name.
    #[error("there is no file {0:?} on the volume")]
    NoFile(String),
    /// The description cannot be read or changed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is no disk.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl Alone {
    /// Takes a volume over that `store` describes.
    ///
    /// # Errors
    /// The device fails.
    pub fn new(lun: Lun, mut store: Store<Lun>) -> Result<Alone, StoreError> {
        store.take_over(store.epoch() + 1)?;
        let store = Arc::new(Mutex::new(store));
        let (work, todo) = channel();
        let worker = Worker { lun: lun.clone(), store: store.clone(), todo };
        // It ends when nobody is left who could ask it for anything.
        std::thread::Builder::new()
            .name("slabs".into())
            .spawn(move || worker.run())
            .map_err(|source| StoreError::Io { action: "start a thread", source })?;
        Ok(Alone { lun, store, work })
    }

    /// Makes changes, all of them or none.
    ///
    /// # Errors
    /// See [`Store::commit`].
    pub fn commit(&self, ops: &[Op]) -> Result<(), StoreError> {
        let mut store = lock(&self.store);
        let revision = store.revision() + 1;
        store.commit(revision, ops)
    }

    /// Looks at the files.
    pub fn look<T>(&self, at: impl FnOnce(&Contents) -> T) -> T {
        at(lock(&self.store).contents())
    }

    /// Opens a file as a disk of the same name.
    ///
    /// # Errors
    /// There is no such file, or it is no disk.
    pub fn open(&self, name: &str, fence: Arc<dyn Fence>) -> Result<Export, AloneError> {
        let store = lock(&self.store);
        let contents = store.contents();
        let found = contents.named(name).and_then(|id| Some((id, contents.file(id)?)));
        let (id, file) = found.ok_or_else(|| AloneError::NoFile(name.into()))?;
        let disk = LunDisk {
            name: name.into(),
            lun: self.lun.clone(),
            geometry: contents.geometry(),
            bytes: file.bytes,
            read_only: false,
            parts: file.parts().collect(),
        };
        Ok(Export::on_lun(disk, Arc::new(FileSlabs { id, work: self.work.clone() }), fence)?)
    }
}

fn lock(store: &Mutex<Store<Lun>>) -> MutexGuard<'_, Store<Lun>> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The slabs of one file.
struct FileSlabs {
    id: FileId,
    work: Sender<Work>,
}

impl Allocator for FileSlabs {
    fn allocate(&self, wanted: Wanted, grant: Grant) {
        let _ = self.work.send(Work::Allocate(self.id, wanted, grant));
    }

    fn release(&self, parts: Range<u32>, release: Release) {
        let _ = self.work.send(Work::Release(self.id, parts, release));
    }
}

struct Worker {
    lun: Lun,
    store: Arc<Mutex<Store<Lun>>>,
    todo: Receiver<Work>,
}

impl Worker {
    fn run(self) {
        while let Ok(work) = self.todo.recv() {
            match work {
                Work::Allocate(file, wanted, grant) => match self.allocate(file, &wanted) {
                    Ok(slabs) if slabs.is_empty() => grant.refuse(Refusal::NoSpace),
                    Ok(slabs) => grant.give(&slabs),
                    Err(error) => {
                        tracing::warn!(%error, "no slab can be given");
                        grant.refuse(Refusal::Unavailable);
                    }
                },
                Work::Release(file, parts, release) => {
                    let op = Op::Unmap { file, index: parts.start, count: parts.len() as u32 };
                    match self.commit(&op) {
                        Ok(()) => release.done(),
                        Err(error) => {
                            tracing::warn!(%error, "slabs cannot be given back");
                            release.refuse();
                        }
                    }
                }
            }
        }
    }

    fn commit(&self, op: &Op) -> Result<(), StoreError> {
        let mut store = lock(&self.store);
        let revision = store.revision() + 1;
        store.commit(revision, std::slice::from_ref(op))
    }

    /// Gives the parts a run of slabs, wiped before the description says whose they are.
    fn allocate(&self, file: FileId, wanted: &Wanted) -> Result<Vec<(u32, u32)>, StoreError> {
        let (found, geometry) = {
            let store = lock(&self.store);
            let contents = store.contents();
            let from = contents.file(file).and_then(|file| file.last_slab()).map_or(0, |last| last + 1);
            (contents.free_run(from, wanted.parts.len() as u32), contents.geometry())
        };
        let Some((slab, count)) = found else { return Ok(Vec::new()) };
        self.lun
            .wipe(geometry.slab(slab), geometry.slab_bytes * u64::from(count))
            .map_err(|source| StoreError::Io { action: "wipe slabs", source })?;
        self.commit(&Op::Map { file, index: wanted.parts.start, slab, count })?;
        Ok((0..count).map(|step| (wanted.parts.start + step, slab + step)).collect())
    }
}
