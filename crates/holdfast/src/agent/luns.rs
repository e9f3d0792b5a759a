//! LUNs: adding one as a volume, and finding it on this node by what is written on it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_core::*;
use holdfast_volume::Lun;
use holdfast_volume::lun::{Device, Geometry, Identity, PAGE_BYTES, Store, StoreError, Superblock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::volumes::on_disk;
use super::{Agent, Failure, Member, now_ms, rpc};

/// How long a node may take to look at a LUN.
const DEADLINE: Duration = Duration::from_secs(10);
/// What is looked at for traces of other data, from the beginning, in bytes.
const LOOKED_AT: usize = 1 << 20;

/// Does this node see the LUN on which another one has just written this?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LunProbe {
    device: PathBuf,
    /// Who wrote.
    from: NodeId,
    /// What it wrote.
    token: Uuid,
}

/// What a node sees; the error is a clause that follows the node's name.
pub type LunProbed = Result<LunSeen, String>;

/// A LUN as a node sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LunSeen {
    /// Its size.
    bytes: u64,
}

impl Agent {
    /// Makes a LUN a volume, after every node that is up was seen to read there what
    /// the others write.
    ///
    /// # Errors
    /// The device is missing, holds data that were not named to be erased, or is not
    /// the same on all nodes; the name is taken.
    pub async fn add_lun(&self, by: &str, name: &str, device: &str, erase: Option<&str>) -> Result<(), Failure> {
        let (member, device, state) = (self.member()?, PathBuf::from(device), self.state());
        valid_lun(&state, name, &device)?;
        if let Some((other, _)) = state.volumes.iter().find(|(_, volume)| on(volume) == Some(device.as_path())) {
            return Err(Refusal::Conflict(format!("volume {other:?} is on {} already", device.display())).into());
        }
        let here = |why: String| Failure::other("bad_lun", format!("{} {why}", state.node_name(member.me)));
        let path = device.clone();
        let (lun, what) =
            on_disk(move || open(&path).and_then(|lun| Ok((lun.clone(), what_is_on(&lun)?)))).await.map_err(here)?;
        if let Some(what) = what.filter(|what| erase != Some(what.word.as_str())) {
            let text = format!(
                "{} holds {}: adding it would destroy that; if nobody needs it any more, repeat with --erase {}",
                device.display(),
                what.text,
                what.word
            );
            return Err(Failure::other("lun_in_use", text));
        }
        self.seen_by_all(member, &state, &lun).await?;
        let identity = Identity { volume: Uuid::new_v4(), cluster: state.cluster.id, name: name.into() };
        let id = identity.volume;
        let formatted = lun.clone();
        let geometry: Geometry = on_disk(move || {
            let store = Store::format(formatted, identity, None, now_ms(), 1);
            store.map(|store| store.superblock().geometry).map_err(|error| error.to_string())
        })
        .await
        .map_err(here)?;
        let kind = VolumeKind::Lun {
            device: device.to_string_lossy().into_owned(),
            slab_bytes: geometry.slab_bytes,
            slabs: geometry.slabs,
        };
        let added = self.execute(by, Command::AddVolume { name: name.into(), id, kind }).await.map(drop);
        // Only what is certainly no volume loses its mark.
        if let Err(failure) = &added
            && !matches!(failure, Failure::Unknown)
        {
            let _ = on_disk(move || lun.wipe(0, geometry.data_start()).map_err(|error| error.to_string())).await;
        }
        added
    }

    /// Writes on the LUN, has every other node read it there and write itself, and
    /// reads that.
    pub(super) async fn seen_by_all(
        &self,
        member: &'static Member,
        state: &ClusterState,
        lun: &Lun,
    ) -> Result<(), Failure> {
        let token = Uuid::new_v4();
        let (me, ours) = (member.me, lun.clone());
        on_disk(move || put_token(&ours, me, token))
            .await
            .map_err(|why| Failure::other("bad_lun", format!("{} {why}", state.node_name(me))))?;
        for node in state.nodes.values().filter(|node| node.id != me && node.is_up()) {
            let probe = LunProbe { device: lun.path().to_owned(), from: me, token };
            let probed: LunProbed = member
                .peers
                .ask(node.id, rpc::PROBE_LUN, &probe, DEADLINE + Duration::from_secs(1))
                .await
                .unwrap_or_else(|error| Err(format!("could not be asked: it {error}")));
            let (id, ours) = (node.id, lun.clone());
            let seen = match probed {
                Ok(seen) if seen.bytes != lun.bytes() => {
                    Err(format!("sees {} bytes there, and {} has {}", seen.bytes, state.node_name(me), lun.bytes()))
                }
                Ok(_) => on_disk(move || token_of(&ours, id)).await.and_then(|found| match found == Some(token) {
                    true => Ok(()),
                    false => Err("writes there, and its writes are not seen elsewhere".into()),
                }),
                Err(why) => Err(why),
            };
            if let Err(why) = seen {
                let text =
                    format!("{} {why}; a LUN has to be the same on every node: check its paths there", node.name);
                return Err(Failure::other("volume_not_shared", text));
            }
        }
        Ok(())
    }

    /// Looks for the LUN on which another node has written, and writes on it, too.
    pub(super) async fn probe_lun(&self, probe: LunProbe) -> LunProbed {
        let (me, dir) = (self.me().unwrap_or_default(), self.0.config.lun_dir.clone());
        on_disk(move || {
            let sees = |path: &Path| {
                let lun = open(path)?;
                match token_of(&lun, probe.from)? == Some(probe.token) {
                    true => Ok(lun),
                    false => Err(format!("does not see on {} what is written on it elsewhere", path.display())),
                }
            };
            let first = sees(&probe.device);
            let lun = first.or_else(|why| candidates(&dir).find_map(|path| sees(&path).ok()).ok_or(why))?;
            put_token(&lun, me, probe.token)?;
            Ok(LunSeen { bytes: lun.bytes() })
        })
        .await
    }
}

/// Whether there can be a volume with this name on a device, by what they look like.
pub(super) fn valid_lun(state: &ClusterState, name: &str, device: &Path) -> Result<(), Failure> {
    state::valid_name("volume", name)?;
    if !device.is_absolute() && !Lun::is_address(device) {
        return Err(Refusal::Invalid(format!("{device:?} is neither an absolute path nor nbd://...")).into());
    }
    match state.volumes.contains_key(name) {
        true => Err(Refusal::Duplicate { what: "volume".into(), name: name.into() }.into()),
        false => Ok(()),
    }
}

/// Finds the LUN that holds a volume; the error is a clause that follows the node's name.
pub fn find(volume: Uuid, device: &Path, dir: &Path) -> Result<PathBuf, String> {
    let holds = |path: &Path| match open(path).map(|lun| (lun.bytes(), Superblock::read(&lun)))? {
        (bytes, Ok(found)) if found.identity.volume == volume && bytes < found.geometry.end() => Err(format!(
            "sees {bytes} bytes on {}, and the volume needs {}: has the device become smaller?",
            path.display(),
            found.geometry.end()
        )),
        (_, Ok(found)) if found.identity.volume == volume => Ok(path.to_owned()),
        (_, Ok(found)) => Err(format!("sees another volume, {:?}, on {}", found.identity.name, path.display())),
        (_, Err(error)) => Err(format!("cannot use {}: {error}", path.display())),
    };
    let first = holds(device);
    first.or_else(|why| candidates(dir).find_map(|path| holds(&path).ok()).ok_or(why))
}

fn on(volume: &Volume) -> Option<&Path> {
    match &volume.kind {
        VolumeKind::Lun { device, .. } => Some(Path::new(device)),
        VolumeKind::Directory { .. } => None,
    }
}

pub(super) fn open(path: &Path) -> Result<Lun, String> {
    Lun::open(path).map_err(|error| format!("sees no device there: {error}"))
}

fn candidates(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort_unstable();
    // Many names of one device are looked at once.
    let mut seen = std::collections::BTreeSet::new();
    paths.into_iter().filter(move |path| std::fs::canonicalize(path).is_ok_and(|device| seen.insert(device)))
}

fn failed(error: io::Error) -> String {
    format!("cannot read or write it: {error}")
}

fn put_token(lun: &Lun, node: NodeId, token: Uuid) -> Result<(), String> {
    let mut page = vec![0; PAGE_BYTES];
    page[..16].copy_from_slice(token.as_bytes());
    page[16..24].copy_from_slice(&node.0.to_le_bytes());
    lun.write(Geometry::probe_page(node.0), &page).and_then(|()| lun.flush()).map_err(failed)
}

fn token_of(lun: &Lun, node: NodeId) -> Result<Option<Uuid>, String> {
    let mut page = vec![0; PAGE_BYTES];
    lun.read(Geometry::probe_page(node.0), &mut page).map_err(failed)?;
    let whose = page[16..24] == node.0.to_le_bytes();
    Ok(whose.then(|| Uuid::from_slice(&page[..16]).unwrap_or_default()))
}

/// What was found on a device.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// For people.
    text: String,
    /// What has to be typed to destroy it.
    word: String,
}

/// What is on a device; `None` if it begins with nothing but zeroes.
fn what_is_on(lun: &Lun) -> Result<Option<Found>, String> {
    match Superblock::read(lun) {
        Ok(Superblock { identity, .. }) => {
            let text = format!("volume {:?} of the cluster {}", identity.name, identity.cluster);
            return Ok(Some(Found { text, word: identity.name }));
        }
        Err(StoreError::Version(_) | StoreError::Damaged { .. }) => {
            return Ok(Some(Found {
                text: "a volume of Holdfast that this version cannot read".into(),
                word: "holdfast".into(),
            }));
        }
        Err(_) => {}
    }
    let mut bytes = vec![0; LOOKED_AT.min(lun.bytes() as usize / PAGE_BYTES * PAGE_BYTES)];
    lun.read(0, &mut bytes).map_err(failed)?;
    Ok(name(&bytes))
}

/// What begins with these bytes.
fn name(bytes: &[u8]) -> Option<Found> {
    let known: [(usize, &[u8], &str, &str); 12] = [
        (0x200, b"EFI PART", "a partition table (GPT)", "gpt"),
        (0x218, b"LVM2 001", "a physical volume of LVM", "lvm"),
        (0x018, b"LVM2 001", "a physical volume of LVM", "lvm"),
        (0x000, b"LUKS\xba\xbe", "an encrypted volume (LUKS)", "luks"),
        (0x000, b"XFSB", "a file system (XFS)", "xfs"),
        (0x438, b"\x53\xef", "a file system (ext2, ext3 or ext4)", "ext"),
        (0x10040, b"_BHRfS_M", "a file system (Btrfs)", "btrfs"),
        (0x003, b"NTFS    ", "a file system (NTFS)", "ntfs"),
        (0xff6, b"SWAPSPACE2", "swap space", "swap"),
        (0x1000, b"\xfc\x4e\x2b\xa9", "a part of a RAID (md)", "raid"),
        (0x000, b"HFWITNES", "a witness of Holdfast", "witness"),
        (0x1fe, b"\x55\xaa", "a partition table or a boot sector", "mbr"),
    ];
    let at = |at: usize, magic: &[u8]| bytes.get(at..at + magic.len()) == Some(magic);
    let found = known.iter().find(|(offset, magic, ..)| at(*offset, magic));
    match found {
        Some((.., text, word)) => Some(Found { text: (*text).into(), word: (*word).into() }),
        None if bytes.iter().all(|byte| *byte == 0) => None,
        None => Some(Found { text: "data of a kind that is not known here".into(), word: "data".into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        path
    }

    #[test]
    fn what_is_on_a_device_is_named() {
        let word = |at: usize, magic: &[u8]| {
            let mut bytes = vec![0; LOOKED_AT];
            bytes[at..at + magic.len()].copy_from_slice(magic);
            name(&bytes).unwrap().word
        };
        assert_eq!(name(&vec![0; LOOKED_AT]), None);
        assert_eq!(word(0x438, b"\x53\xef"), "ext");
        assert_eq!(word(0x1fe, b"\x55\xaa"), "mbr");
        assert_eq!(word(77_777, b"x"), "data");
    }

    #[test]
    fn a_lun_is_found_by_what_is_on_it() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = device(dir.path(), "b");
        let _other = device(dir.path(), "a");
        let identity = Identity { volume: Uuid::from_u128(5), cluster: Uuid::from_u128(6), name: "san".into() };
        let lun = open(&path).unwrap();
        assert_eq!(what_is_on(&lun).unwrap(), None);
        Store::format(lun.clone(), identity, None, 0, 1).unwrap();
        assert_eq!(what_is_on(&lun).unwrap().unwrap().word, "san");
        let (id, gone) = (Uuid::from_u128(5), elsewhere.path().join("b"));
        assert_eq!(find(id, &path, elsewhere.path()), Ok(path.clone()));
        assert_eq!(find(id, &gone, dir.path()), Ok(path.clone()), "under another name");
        assert!(find(id, &gone, elsewhere.path()).unwrap_err().contains("no device"));
        assert!(find(Uuid::from_u128(7), &path, elsewhere.path()).unwrap_err().contains("san"));
    }

    #[test]
    fn a_token_is_whose_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let lun = open(&device(dir.path(), "a")).unwrap();
        let token = Uuid::from_u128(9);
        put_token(&lun, NodeId(3), token).unwrap();
        assert_eq!(token_of(&lun, NodeId(3)), Ok(Some(token)));
        assert_eq!(token_of(&lun, NodeId(3 + 256)), Ok(None), "another node of the same page");
    }
}
