//! What this node sees of the volumes. Directory volumes: the link under the volumes directory, and the mark by
//! which every node knows that it sees the same directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_core::*;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

use super::{Agent, Failure, Member, luns, rpc};
use crate::identity::write_durably;

/// The file in a volume's directory that says which volume it is.
const MARK: &str = ".holdfast-volume.json";
/// A directory that does not answer for so long is as good as not there.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often the volumes are looked at when nothing changes.
const EVERY: Duration = Duration::from_secs(10);

/// What stands in the mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    volume: Uuid,
    name: String,
    cluster: String,
}

/// Does this node see the directory of this volume?
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Probe {
    path: PathBuf,
    volume: Uuid,
}

/// What a node sees; the error is a clause that follows the node's name.
pub type Probed = Result<(), String>;

impl Agent {
    /// Adds a directory volume, after every node that is up was seen to reach the
    /// same directory.
    ///
    /// # Errors
    /// The path is missing, not a directory, used by another volume, or not the
    /// same on all nodes; the name is taken.
    pub async fn add_volume(&self, by: &str, name: &str, path: &str) -> Result<(), Failure> {
        let member = self.member()?;
        state::valid_name("volume", name)?;
        let given = PathBuf::from(path);
        if !given.is_absolute() {
            return Err(Refusal::Invalid(format!("{path:?} is not an absolute path")).into());
        }
        let state = self.state();
        if state.volumes.contains_key(name) {
            return Err(Refusal::Duplicate { what: "volume".into(), name: name.into() }.into());
        }
        let id = Uuid::new_v4();
        let mark = Mark { volume: id, name: name.into(), cluster: state.cluster.name.clone() };
        let dir = given.clone();
        on_disk(move || put_mark(&dir, &mark))
            .await
            .map_err(|why| Failure::other("bad_path", format!("{} {why}", state.node_name(member.me))))?;
        let added = self.add_marked(member, &state, by, name, id, &given).await;
        // Only a volume that was certainly not added loses its mark.
        if let Err(failure) = &added
            && !matches!(failure, Failure::Unknown)
        {
            let mark = given.join(MARK);
            let _ = on_disk(move || std::fs::remove_file(mark).map_err(|error| error.to_string())).await;
        }
        added
    }

    async fn add_marked(
        &self,
        member: &Member,
        state: &ClusterState,
        by: &str,
        name: &str,
        id: Uuid,
        path: &Path,
    ) -> Result<(), Failure> {
        for node in state.nodes.values().filter(|node| node.id != member.me && node.is_up()) {
            let probe = Probe { path: path.to_owned(), volume: id };
            let probed: Probed = member
                .peers
                .ask(node.id, rpc::PROBE, &probe, DEADLINE + Duration::from_secs(1))
                .await
                .unwrap_or_else(|error| Err(format!("could not be asked: it {error}")));
            if let Err(why) = probed {
                let text = format!(
                    "{} {why}; a volume's directory has to be the same on every node: mount it there first",
                    node.name
                );
                return Err(Failure::other("volume_not_shared", text));
            }
        }
        let kind = VolumeKind::Directory { path: path.to_string_lossy().into_owned() };
        self.execute(by, Command::AddVolume { name: name.into(), id, kind }).await.map(drop)
    }

    /// Looks at a volume's directory on this node.
    pub(super) async fn probe_volume(&self, probe: Probe) -> Probed {
        on_disk(move || see_mark(&probe.path, probe.volume)).await
    }

    /// Keeps a link to each volume's directory, and says which cannot be reached.
    pub(super) async fn keep_volumes(self, member: &'static Member) {
        let mut changes = self.changes();
        let mut known: Option<BTreeMap<String, Volume>> = None;
        let (root, luns) = (&self.0.config.volumes_dir, &self.0.config.lun_dir);
        let mut looks = Looks::default();
        loop {
            let volumes = changes.borrow_and_update().volumes.clone();
            if !changes.borrow().cluster.name.is_empty() {
                drop_links(root, &volumes);
                let Seen { unreachable, devices } = looks.look(root, luns, &volumes, DEADLINE).await;
                let (looked, unreachable) = apart(&volumes, unreachable);
                member.serving.found(devices);
                member.reports.say(|report| report.unreachable = unreachable);
                self.looked_at(member, looked);
                known = Some(volumes);
            }
            let changed = changes.wait_for(|state| known.as_ref() != Some(&state.volumes));
            let _ = timeout(EVERY, changed).await;
        }
    }
}

/// Runs something that may hang with the storage behind it, for a bounded time.
pub(super) async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    match timeout(DEADLINE, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(done)) => done,
        Ok(Err(error)) => Err(format!("failed: {error}")),
        Err(_) => Err(no_answer()),
    }
}

fn no_answer() -> String {
    format!("gets no answer from the storage within {} s", DEADLINE.as_secs())
}

fn put_mark(dir: &Path, mark: &Mark) -> Result<(), String> {
    if !dir.is_dir() {
        return Err(format!("has no directory {}: create or mount it first", dir.display()));
    }
    match std::fs::read(dir.join(MARK)) {
        Ok(bytes) => {
            let whose = serde_json::from_slice::<Mark>(&bytes).map_or_else(
                |_| "a volume".into(),
                |mark| format!("volume {:?} of cluster {:?}", mark.name, mark.cluster),
            );
            return Err(format!(
                "finds {whose} in {}: choose another directory, or delete {MARK} there if that volume is not used any more",
                dir.display()
            ));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(format!("cannot read {}: {error}", dir.join(MARK).display())),
    }
    let bytes = serde_json::to_vec_pretty(mark).map_err(|error| error.to_string())?;
    write_durably(&dir.join(MARK), &bytes).map_err(|error| format!("{error:#}"))
}

fn see_mark(dir: &Path, volume: Uuid) -> Probed {
    if !dir.is_dir() {
        return Err(format!("has no directory {}", dir.display()));
    }
    let mark = std::fs::read(dir.join(MARK)).ok().and_then(|bytes| serde_json::from_slice::<Mark>(&bytes).ok());
    match mark {
        Some(mark) if mark.volume == volume => Ok(()),
        Some(mark) => Err(format!("sees another volume, {:?}, in {}", mark.name, dir.display())),
        None => Err(format!("does not see what is in {} elsewhere", dir.display())),
    }
}

/// What a node sees of the volumes.
struct Seen {
    /// Those that it does not reach, and why.
    unreachable: BTreeMap<String, String>,
    /// Where LUNs are, by their volumes' identities.
    devices: BTreeMap<Uuid, PathBuf>,
}

/// Where a LUN was found; the error is a clause that follows the node's name.
type Reached = Result<Option<PathBuf>, String>;

/// The looks at volumes that have not come to an end, by the volumes' identities. Each
/// volume is looked at by itself, so that storage that hangs holds up no other.
#[derive(Default)]
struct Looks(BTreeMap<Uuid, JoinHandle<Reached>>);

impl Looks {
    /// Looks which volumes this node reaches, and makes the links to them true. One look
    /// at a volume that hangs is enough: the next would hang, too, and hold a thread.
    async fn look(&mut self, root: &Path, luns: &Path, volumes: &BTreeMap<String, Volume>, within: Duration) -> Seen {
        for (name, volume) in volumes {
            self.0.entry(volume.id).or_insert_with(|| {
                let (at, luns, volume) = (root.join(name), luns.to_owned(), volume.clone());
                tokio::task::spawn_blocking(move || look_at(&at, &luns, &volume))
            });
        }
        self.0.retain(|id, _| volumes.values().any(|volume| volume.id == *id));
        let until = Instant::now() + within;
        let mut seen = Seen { unreachable: BTreeMap::new(), devices: BTreeMap::new() };
        for (name, volume) in volumes {
            let Some(look) = self.0.get_mut(&volume.id) else { continue };
            let reached = match timeout_at(until, look).await {
                Ok(over) => {
                    self.0.remove(&volume.id);
                    over.unwrap_or_else(|error| Err(format!("failed: {error}")))
                }
                Err(_) => Err(no_answer()),
            };
            match reached {
                Ok(device) => drop(device.map(|device| seen.devices.insert(volume.id, device))),
                Err(why) => drop(seen.unreachable.insert(name.clone(), why)),
            }
        }
        seen
    }
}

/// How LUNs are reached, by their volumes' identities, and directories that are not.
fn apart(
    volumes: &BTreeMap<String, Volume>,
    mut unreachable: BTreeMap<String, String>,
) -> (BTreeMap<Uuid, LunPath>, BTreeMap<String, String>) {
    let luns = volumes.iter().filter(|(_, volume)| matches!(volume.kind, VolumeKind::Lun { .. }));
    let looked = luns.map(|(name, volume)| {
        let path = match unreachable.remove(name) {
            Some(why) => LunPath::Unavailable { why },
            None => LunPath::Direct,
        };
        (volume.id, path)
    });
    (looked.collect(), unreachable)
}

fn look_at(at: &Path, luns: &Path, volume: &Volume) -> Reached {
    match &volume.kind {
        VolumeKind::Directory { path } => {
            let path = Path::new(path);
            see_mark(path, volume.id).and_then(|()| link(at, path)).map(|()| None)
        }
        VolumeKind::Lun { device, .. } => luns::find(volume.id, Path::new(device), luns).map(Some),
    }
}

/// Removes links to volumes that are gone; anything else there is not ours.
fn drop_links(root: &Path, volumes: &BTreeMap<String, Volume>) {
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        if is_link && !volumes.contains_key(&name) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn link(at: &Path, to: &Path) -> Result<(), String> {
    match std::fs::read_link(at) {
        Ok(current) if current == to => return Ok(()),
        Ok(_) => std::fs::remove_file(at).map_err(|error| format!("cannot replace {}: {error}", at.display()))?,
        Err(_) if at.exists() => return Err(format!("finds something else at {}: move it away", at.display())),
        Err(_) => {}
    }
    let make = || {
        if let Some(dir) = at.parent() {
            std::fs::create_dir_all(dir)?;
        }
        std::os::unix::fs::symlink(to, at)
    };
    make().map_err(|error| format!("cannot link {} to {}: {error}", at.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marked_directory_is_recognised_and_not_taken_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mark = Mark { volume: Uuid::from_u128(1), name: "vol1".into(), cluster: "lab".into() };
        assert!(see_mark(dir.path(), mark.volume).is_err());
        put_mark(dir.path(), &mark).unwrap();
        see_mark(dir.path(), mark.volume).unwrap();
        assert!(see_mark(dir.path(), Uuid::from_u128(2)).unwrap_err().contains("vol1"));
        let taken = put_mark(dir.path(), &mark).unwrap_err();
        assert!(taken.contains("vol1") && taken.contains("lab"), "{taken}");
        assert!(put_mark(&dir.path().join("missing"), &mark).unwrap_err().contains("missing"));
    }

    fn directory(id: u128, dir: &Path) -> Volume {
        let kind = VolumeKind::Directory { path: dir.to_string_lossy().into_owned() };
        Volume { id: Uuid::from_u128(id), kind, added_ms: 0 }
    }

    fn mark_of(volume: &Volume, name: &str) -> Mark {
        Mark { volume: volume.id, name: name.into(), cluster: "lab".into() }
    }

    #[tokio::test]
    async fn links_follow_the_volumes_and_leave_what_is_not_theirs() {
        let (root, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let volume = directory(1, dir.path());
        put_mark(dir.path(), &mark_of(&volume, "vol1")).unwrap();
        let volumes = BTreeMap::from([("vol1".to_owned(), volume)]);
        let mut looks = Looks::default();
        assert_eq!(looks.look(root.path(), root.path(), &volumes, DEADLINE).await.unreachable, BTreeMap::new());
        assert_eq!(std::fs::read_link(root.path().join("vol1")).unwrap(), dir.path());
        std::fs::create_dir(root.path().join("other")).unwrap();
        drop_links(root.path(), &BTreeMap::new());
        assert!(!root.path().join("vol1").exists() && root.path().join("other").exists());
        std::fs::create_dir(root.path().join("vol1")).unwrap();
        let seen = looks.look(root.path(), root.path(), &volumes, DEADLINE).await;
        assert!(seen.unreachable["vol1"].contains("something else"));
    }

    #[tokio::test]
    async fn a_volume_that_hangs_is_looked_at_once_and_holds_up_no_other() {
        let (root, hangs, works) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let volumes = BTreeMap::from([
            ("hangs".to_owned(), directory(1, hangs.path())),
            ("works".to_owned(), directory(2, works.path())),
        ]);
        // Whoever opens this for reading waits for somebody who writes.
        let pipe = hangs.path().join(MARK);
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        put_mark(works.path(), &mark_of(&volumes["works"], "works")).unwrap();
        let (mut looks, within) = (Looks::default(), Duration::from_secs(2));
        for _ in 0..2 {
            let seen = looks.look(root.path(), root.path(), &volumes, within).await;
            assert_eq!(seen.unreachable.keys().collect::<Vec<_>>(), ["hangs"]);
            assert_eq!(looks.0.keys().copied().collect::<Vec<_>>(), [volumes["hangs"].id]);
        }
        // One mark is enough for the one look that there is.
        let mark = serde_json::to_vec(&mark_of(&volumes["hangs"], "hangs")).unwrap();
        tokio::task::spawn_blocking(move || std::fs::write(pipe, mark)).await.unwrap().unwrap();
        let seen = looks.look(root.path(), root.path(), &volumes, DEADLINE).await;
        assert_eq!(seen.unreachable, BTreeMap::new());
        assert!(looks.0.is_empty());
    }
}
