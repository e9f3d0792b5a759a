//! LUNs that are volumes already: taking one over with its files, and comparing what
//! stands on one with what is agreed on.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use holdfast_core::*;
use holdfast_volume::Lun;
use holdfast_volume::lun::{Agreed, Contents, Geometry, Identity, Inspection, Store, Superblock, inspect};
use tokio::time::{Instant, sleep, timeout};

use super::luns::{open, valid_lun};
use super::volumes::on_disk;
use super::{Agent, Failure, Member};

/// So many runs of parts are proposed at a time: some 200 KiB.
const RUNS_AT_ONCE: usize = 8192;
/// And so many files.
const FILES_AT_ONCE: usize = 256;
/// For how long a LUN may be behind, or be written to while it is read.
const SETTLES_WITHIN: Duration = Duration::from_secs(4);
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How long a repair may take.
const REPAIRED_WITHIN: Duration = Duration::from_secs(30);

/// A look at a LUN, beside what is agreed on.
pub struct Looked {
    /// Where it was found.
    pub device: PathBuf,
    /// What stands there.
    pub found: Inspection,
    /// What is wrong, a line each.
    pub findings: Vec<String>,
    /// The revision of the files that is agreed on.
    pub agreed: u64,
}

impl Agent {
    /// Makes a LUN that is a volume already one of this cluster, with its files.
    ///
    /// # Errors
    /// It holds no volume or a damaged one, belongs to another cluster and was not named,
    /// or is not the same on all nodes; the name is taken.
    pub async fn import_lun(&self, by: &str, name: &str, device: &str, take: Option<&str>) -> Result<(), Failure> {
        let (member, path, state) = (self.member()?, PathBuf::from(device), self.state());
        valid_lun(&state, name, &path)?;
        let here = |why: String| Failure::other("bad_lun", format!("{}: {why}", state.node_name(member.me)));
        let (lun, store) = on_disk(move || {
            let lun = open(&path)?;
            let store = Store::open(lun.clone()).map_err(|error| format!("{}: {error}", path.display()))?;
            Ok((lun, store))
        })
        .await
        .map_err(here)?;
        let before = store.superblock().identity.clone();
        if let Some(known) = state.volume_named_by(before.volume) {
            return Err(Refusal::Conflict(format!("{device} is volume {known:?} of this cluster already")).into());
        }
        if before.cluster != state.cluster.id && take != Some(before.name.as_str()) {
            let text = format!(
                "{device} holds volume {:?} of another cluster ({}), with {}: importing it takes it away from that cluster; if none of that cluster's nodes uses it any more, repeat with --take {}",
                before.name,
                before.cluster,
                holds(store.contents()),
                before.name
            );
            return Err(Failure::other("lun_in_use", text));
        }
        self.seen_by_all(member, &state, &lun).await?;

        let (geometry, contents) = (store.superblock().geometry, store.contents().clone());
        let identity = Identity { cluster: state.cluster.id, name: name.into(), ..before.clone() };
        let (epoch, revision) = identify(store, identity).await.map_err(here)?;
        let kind = VolumeKind::Lun { device: device.into(), slab_bytes: geometry.slab_bytes, slabs: geometry.slabs };
        let import = Command::ImportVolume { name: name.into(), id: before.volume, kind, journal: (epoch, revision) };
        if let Err(failure) = self.execute(by, import).await {
            // Only what certainly is not this cluster's is said to be the other's again.
            if !matches!(failure, Failure::Unknown)
                && let Ok(store) = on_disk(move || Store::open(lun).map_err(|error| error.to_string())).await
            {
                let _ = identify(store, before).await;
            }
            return Err(failure);
        }
        let batches = batches(&contents);
        let last = batches.len() - 1;
        for (number, files) in batches.into_iter().enumerate() {
            let files = Command::ImportFiles { volume: name.into(), files, last: number == last };
            if let Err(failure) = self.execute(by, files).await {
                if !matches!(failure, Failure::Unknown) {
                    let _ = self.execute(by, Command::RemoveVolume { name: name.into() }).await;
                }
                return Err(failure);
            }
        }
        Ok(())
    }

    /// Looks at all of a LUN's description on this node, and compares it with what is
    /// agreed on. Changes nothing.
    ///
    /// # Errors
    /// There is no such volume, it is a directory, or the device cannot be read.
    pub async fn check_volume(&self, name: &str) -> Result<Looked, Failure> {
        let member = self.member()?;
        let until = Instant::now() + SETTLES_WITHIN;
        loop {
            self.catch_up().await;
            let state = self.state();
            let (looked, behind) = self.look_at_lun(member, &state, name).await?;
            // It is a moment behind while something changes, and half a change may be read.
            if (looked.findings.is_empty() && !behind) || Instant::now() >= until {
                return Ok(looked);
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    async fn look_at_lun(
        &self,
        member: &'static Member,
        state: &ClusterState,
        name: &str,
    ) -> Result<(Looked, bool), Failure> {
        let unknown = || Refusal::Unknown { what: "volume".into(), name: name.into() };
        let volume = state.volumes.get(name).ok_or_else(unknown)?;
        let (VolumeKind::Lun { device, slab_bytes, .. }, Some(lun)) = (&volume.kind, state.luns.get(name)) else {
            let text = format!("volume {name:?} is a directory: its file system is checked by its own tools");
            return Err(Refusal::Invalid(text).into());
        };
        let device = member.serving.device(volume.id).unwrap_or_else(|| device.into());
        let identity = Identity { volume: volume.id, cluster: state.cluster.id, name: name.into() };
        let (path, slab_bytes, made_ms, slabs) = (device.clone(), *slab_bytes, volume.added_ms, lun.slabs);
        let ours = identity.clone();
        let found = on_disk(move || {
            let lun = open(&path)?;
            let geometry = Geometry::of(lun.bytes(), Some(slab_bytes)).filter(|geometry| geometry.slabs == slabs);
            let known = geometry.map(|geometry| Superblock { identity: ours, geometry, made_ms, written: 0 });
            inspect(&lun, known.as_ref()).map_err(|error| error.to_string())
        })
        .await
        .map_err(|why| Failure::other("bad_lun", format!("{} {why}", state.node_name(member.me))))?;
        let mut findings = found.findings();
        if let Some(superblock) = &found.superblock {
            findings.extend(differences(superblock, &identity, lun));
        }
        if let Some((contents, revision)) = &found.contents {
            if *revision != lun.revision {
                findings.push(format!("revision {revision} stands there, and {} is agreed on", lun.revision));
            }
            findings.extend(contents.differences(&agreed(lun)));
        }
        findings.extend(lun.journal.trouble.iter().map(|why| format!("its description cannot be written: {why}")));
        let behind = found.contents.as_ref().is_some_and(|(_, revision)| *revision != lun.revision);
        Ok((Looked { device, found, findings, agreed: lun.revision }, behind))
    }

    /// Has a LUN's description written anew, and returns when it is.
    ///
    /// # Errors
    /// There is no such volume, or it cannot be written.
    pub async fn repair_volume(&self, by: &str, name: &str) -> Result<(), Failure> {
        self.execute(by, Command::RepairVolume { name: name.into() }).await?;
        let mut changes = self.changes();
        let over = changes.wait_for(|state| state.luns.get(name).is_none_or(|lun| !lun.journal.repair));
        let trouble = match timeout(REPAIRED_WITHIN, over).await {
            Ok(Ok(state)) => state.luns.get(name).and_then(|lun| lun.journal.trouble.clone()),
            _ => Some(format!("it was not written within {} s", REPAIRED_WITHIN.as_secs())),
        };
        match trouble {
            Some(why) => Err(Failure::other("not_repaired", format!("volume {name:?} was not repaired: {why}"))),
            None => Ok(()),
        }
    }
}

/// Begins an area of its own, says whose the volume is, and gives epoch and revision.
async fn identify(mut store: Store<Lun>, identity: Identity) -> Result<(u64, u64), String> {
    on_disk(move || {
        let taken = store.take_over(store.epoch() + 1).and_then(|()| store.identify(identity));
        taken.map(|()| (store.epoch(), store.revision())).map_err(|error| error.to_string())
    })
    .await
}

fn holds(contents: &Contents) -> String {
    let bytes = u64::from(contents.used_slabs()) * contents.geometry().slab_bytes;
    format!("{} files that have {} MiB", contents.files().count(), bytes >> 20)
}

fn agreed(lun: &holdfast_core::Lun) -> BTreeMap<String, Agreed> {
    crate::volume::agreed(lun.named_files().map(|(name, file)| (name, file.bytes, file.parts.as_slice())))
}

fn differences(superblock: &Superblock, identity: &Identity, lun: &holdfast_core::Lun) -> Vec<String> {
    let (there, geometry) = (&superblock.identity, superblock.geometry);
    let mut lines = Vec::new();
    if there.volume != identity.volume {
        lines.push(format!("the device holds another volume, {:?} ({})", there.name, there.volume));
    }
    if there.cluster != identity.cluster {
        lines.push(format!("the device says that it belongs to another cluster, {}", there.cluster));
    }
    if there.name != identity.name {
        lines.push(format!("the volume is called {:?} there", there.name));
    }
    if (geometry.slab_bytes, geometry.slabs) != (lun.slab_bytes, lun.slabs) {
        lines.push(format!(
            "{} slabs of {} bytes stand there, and {} of {} are agreed on",
            geometry.slabs, geometry.slab_bytes, lun.slabs, lun.slab_bytes
        ));
    }
    lines
}

type Files = BTreeMap<String, (u64, Vec<Mapped>)>;

/// The files in as many proposals as they need, one at least.
fn batches(contents: &Contents) -> Vec<Files> {
    let mut batches = vec![Files::new()];
    let mut left = RUNS_AT_ONCE;
    for (_, file) in contents.files() {
        let mut runs = file.runs().into_iter().map(Mapped::from).peekable();
        loop {
            let full = left == 0 || batches.last().is_some_and(|files| files.len() == FILES_AT_ONCE);
            if full {
                batches.push(Files::new());
                left = RUNS_AT_ONCE;
            }
            let some: Vec<_> = runs.by_ref().take(left).collect();
            left -= some.len();
            if let Some(files) = batches.last_mut() {
                files.insert(file.name.clone(), (file.bytes, some));
            }
            if runs.peek().is_none() {
                break;
            }
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use holdfast_volume::lun::{FileId, Op};

    use super::*;

    #[test]
    fn files_are_proposed_in_pieces_and_all_of_them() {
        let geometry = Geometry::of(2 << 40, Some(16 << 20)).unwrap();
        let mut contents = Contents::new(geometry);
        let slab = 16_u64 << 20;
        // Every other slab is one file's, so no two of its parts are in one run.
        for (number, slabs) in [(1, 20_000), (2, 8_000), (3, 0)] {
            let file = FileId(number);
            contents.apply(&Op::Create { file, bytes: 30_000 * slab, name: format!("f{number}") }).unwrap();
            for part in 0..slabs {
                let begin = (number as u32 - 1) * 40_000 + part * 2;
                contents.apply(&Op::Map { file, index: part, slab: begin, count: 1 }).unwrap();
            }
        }
        let batches = batches(&contents);
        assert!(batches.iter().all(|files| files.values().map(|(_, runs)| runs.len()).sum::<usize>() <= RUNS_AT_ONCE));
        let mut lun = holdfast_core::Lun::new(geometry.slab_bytes, geometry.slabs);
        for (name, (bytes, parts)) in batches.iter().flatten() {
            lun.import_file(name, *bytes, parts).unwrap();
        }
        assert_eq!(contents.differences(&agreed(&lun)), Vec::<String>::new());
        assert_eq!(lun.free_slabs(), geometry.slabs - 28_000);
        assert_eq!(super::batches(&Contents::new(geometry)), [Files::new()], "also of none the cluster has to hear");
    }
}
