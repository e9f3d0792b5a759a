//! The descriptions of files on LUNs, as this node writes them: each as the cluster has
//! agreed on it, never ahead, and never without the lease.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holdfast_core::Mapped;
use holdfast_volume::lun::{Agreed, Contents, Device, Geometry, Identity, Store, StoreError, Superblock};
use holdfast_volume::{Fence, Lun};
use uuid::Uuid;

use super::protocol::{Description, Known};

/// A LUN that is written to only while the lease lasts.
#[derive(Clone)]
struct Fenced {
    lun: Lun,
    lease: Arc<dyn Fence>,
}

impl Fenced {
    fn lasts(&self) -> io::Result<()> {
        match self.lease.may_write() {
            true => Ok(()),
            false => Err(io::Error::other("the node's lease is over")),
        }
    }
}

impl Device for Fenced {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.lun.bytes())
    }

    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.lun.read(at, into)
    }

    fn write(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.lasts()?;
        self.lun.write(at, from)
    }

    fn flush(&self) -> io::Result<()> {
        self.lasts()?;
        self.lun.flush()
    }
}

/// A description, while it is open; locked while it is written, which may take for ever.
type MaybeOpen = Mutex<Option<Store<Fenced>>>;

#[derive(Default)]
struct Place {
    store: Arc<MaybeOpen>,
    /// Up to this epoch nothing is written any more.
    over: u64,
}

/// The descriptions that this node writes, by their volumes' identities.
#[derive(Default)]
pub struct Journals(Mutex<BTreeMap<Uuid, Place>>);

impl Journals {
    fn places(&self) -> MutexGuard<'_, BTreeMap<Uuid, Place>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is written any more under an epoch, nor under an earlier one, but for what
    /// is under way: [`Journals::close`] waits for that.
    pub fn end(&self, volume: Uuid, epoch: u64) {
        let mut places = self.places();
        let place = places.entry(volume).or_default();
        place.over = place.over.max(epoch);
    }

    /// Lets go of a LUN, when nothing of its description is under way.
    pub fn close(&self, volume: Uuid) {
        let store = self.places().get(&volume).map(|place| place.store.clone());
        if let Some(store) = store {
            *lock(&store) = None;
        }
    }

    /// Describes a LUN's files on it; when this returns, that is on stable storage.
    ///
    /// # Errors
    /// Why it is not, or is not known to be.
    pub fn write(&self, lease: Arc<dyn Fence>, description: &Description) -> anyhow::Result<()> {
        let store = self.places().entry(description.volume_id).or_default().store.clone();
        let mut place = lock(&store);
        // Whoever ends it waits for this lock afterwards.
        if self.places().get(&description.volume_id).is_some_and(|place| place.over >= description.epoch) {
            anyhow::bail!("epoch {} of the volume's description is over", description.epoch);
        }
        // After a failure nobody knows how things stand.
        let mut store = match (place.take(), &description.repair) {
            (Some(store), None) => store,
            (_, None) => open(lease, description)?,
            (_, Some(known)) => rebuild(lease, description, *known)?,
        };
        if store.epoch() > description.epoch {
            let (ours, theirs) = (description.epoch, store.epoch());
            return Err(StoreError::Outdated { ours, theirs }.into());
        }
        if store.epoch() < description.epoch {
            store.take_over(description.epoch)?;
        }
        let identity = &store.superblock().identity;
        if identity.name != description.volume {
            let identity = Identity { name: description.volume.clone(), ..identity.clone() };
            store.identify(identity)?;
        }
        // An earlier life of the agent knew more than this one has read of yet.
        if store.revision() < description.revision {
            let ops = store.contents().changes_to(&described(description));
            store.commit(description.revision, &ops)?;
        }
        *place = Some(store);
        Ok(())
    }
}

fn lock(store: &MaybeOpen) -> MutexGuard<'_, Option<Store<Fenced>>> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

fn described(description: &Description) -> BTreeMap<String, Agreed> {
    agreed(description.files.iter().map(|(name, (bytes, parts))| (name, *bytes, parts.as_slice())))
}

/// Files with their names, sizes in bytes and parts, as a LUN's description is compared
/// with them.
pub fn agreed<'a>(files: impl Iterator<Item = (&'a String, u64, &'a [Mapped])>) -> BTreeMap<String, Agreed> {
    let file = |(name, bytes, parts): (&String, u64, &[Mapped])| {
        (name.clone(), Agreed { bytes, runs: parts.iter().copied().map(Into::into).collect() })
    };
    files.map(file).collect()
}

fn open(lease: Arc<dyn Fence>, description: &Description) -> anyhow::Result<Store<Fenced>> {
    let lun = Lun::open(&description.device)?;
    let store = Store::open(Fenced { lun, lease })?;
    let identity = &store.superblock().identity;
    if identity.volume != description.volume_id {
        anyhow::bail!("{} holds another volume, {:?}", description.device.display(), identity.name);
    }
    if identity.cluster != description.cluster {
        anyhow::bail!("it belongs to another cluster now, {}", identity.cluster);
    }
    Ok(store)
}

/// Writes all of the description anew, on the device that shows that it is the right one.
fn rebuild(lease: Arc<dyn Fence>, description: &Description, known: Known) -> anyhow::Result<Store<Fenced>> {
    let device = Fenced { lun: Lun::open(&description.device)?, lease };
    let identity =
        || Identity { volume: description.volume_id, cluster: description.cluster, name: description.volume.clone() };
    let superblock = match Superblock::read(&device) {
        Ok(found) if found.identity.volume == description.volume_id => Superblock { identity: identity(), ..found },
        Ok(found) => {
            anyhow::bail!("{} holds another volume, {:?}", description.device.display(), found.identity.name)
        }
        Err(StoreError::Damaged { .. } | StoreError::NoVolume) => {
            let geometry = Geometry::of(device.lun.bytes(), Some(known.slab_bytes));
            let Some(geometry) = geometry.filter(|geometry| geometry.slabs == known.slabs) else {
                anyhow::bail!("both superblocks are lost, and what the device has is not what the volume had");
            };
            let superblock = Superblock { identity: identity(), geometry, made_ms: known.made_ms, written: 0 };
            if !Store::leaves_traces(&device, &superblock)? {
                anyhow::bail!("nothing on {} says that it holds this volume", description.device.display());
            }
            superblock
        }
        Err(error) => return Err(error.into()),
    };
    let mut contents = Contents::new(superblock.geometry);
    for op in contents.changes_to(&described(description)) {
        contents.apply(&op)?;
    }
    Ok(Store::rebuild(device, superblock, contents, (description.epoch, description.revision))?)
}
