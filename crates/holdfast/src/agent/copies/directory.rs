//! Files on directory volumes. No name leads out of the volume's directory, not by a link
//! that stands in it either.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use holdfast_core::*;
use uuid::Uuid;

use super::super::{Agent, Failure};
use super::flow::Sink;

/// How the names begin of what is not a user's.
const OURS: &str = ".holdfast-";
/// How the names begin of files that are being put, before the number of the node that does.
const DRAFT: &str = ".holdfast-put-";
/// So many files are listed at most.
const MOST_FILES: usize = 100_000;

/// The drafts that are being written by this agent: others of this node are dead.
#[derive(Default)]
pub struct Drafts(Mutex<BTreeSet<PathBuf>>);

impl Drafts {
    fn locked(&self) -> std::sync::MutexGuard<'_, BTreeSet<PathBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file that was found in a directory.
pub struct Found {
    /// Its name, from the volume on.
    pub name: String,
    /// Its length, in bytes.
    pub bytes: u64,
    /// What of it has room on the storage, in bytes.
    pub allocated: u64,
}

/// A file that is being put, under the name that it has for now, until this is dropped.
pub struct Draft {
    pub(super) file: File,
    path: PathBuf,
    all: &'static Drafts,
}

impl Draft {
    fn create(path: PathBuf, all: &'static Drafts) -> io::Result<Draft> {
        // Known before it is there: whoever puts beside it takes others for dead.
        all.locked().insert(path.clone());
        match OpenOptions::new().write(true).create_new(true).mode(0o640).open(&path) {
            Ok(file) => Ok(Draft { file, path, all }),
            Err(error) => {
                all.locked().remove(&path);
                Err(error)
            }
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // One that was kept may not be there under this name any more.
        let _ = std::fs::remove_file(&self.path);
        self.all.locked().remove(&self.path);
    }
}

impl Agent {
    /// Refuses a file that cannot be on a directory volume.
    pub(super) async fn may_put_in_directory(
        &self,
        state: &ClusterState,
        volume: &str,
        naming: &Naming,
        bytes: u64,
    ) -> Result<(), Failure> {
        let root = self.root(state, volume)?;
        may_go(state, volume, &naming.name)?;
        let (target, replaces) = (root.join(&naming.name), naming.replaces);
        let found = blocking(volume, move || {
            may_stand(&target, replaces)?;
            Ok(nix::sys::statvfs::statvfs(&root)?)
        })
        .await?;
        let room = found.blocks() * found.fragment_size();
        match bytes > room {
            true => Err(Failure::other("no_space", format!("{bytes} bytes, and volume {volume:?} has {room}"))),
            false => Ok(()),
        }
    }

    /// Begins a file under a name for now, beside the one that it is to have.
    pub(super) async fn draft_in_directory(
        &self,
        state: &ClusterState,
        volume: &str,
        naming: &Naming,
    ) -> Result<Sink, Failure> {
        let member = self.member()?;
        let root = self.root(state, volume)?;
        let naming = naming.clone();
        let prefix = format!("{DRAFT}{}-", member.me);
        blocking(volume, move || {
            let target = root.join(&naming.name);
            let dir = target.parent().unwrap_or(&root);
            inside(&root, dir)?;
            std::fs::create_dir_all(dir)?;
            inside(&root, dir)?;
            may_stand(&target, naming.replaces)?;
            for entry in std::fs::read_dir(dir)?.flatten() {
                let dead = entry.file_name().to_string_lossy().starts_with(&prefix);
                if dead && !member.drafts.locked().contains(&entry.path()) {
                    let _ = std::fs::remove_file(entry.path());
                }
            }
            let draft = dir.join(format!("{prefix}{}", Uuid::new_v4()));
            Ok(Sink::File(Draft::create(draft, &member.drafts)?))
        })
        .await
    }

    /// Gives a file that is whole its name.
    pub(super) async fn keep_in_directory(&self, volume: &str, sink: Sink, naming: Naming) -> Result<(), Failure> {
        let root = self.root(&self.state(), volume)?;
        blocking(volume, move || {
            let Sink::File(draft) = sink else { return Ok(()) };
            let target = root.join(&naming.name);
            match naming.replaces {
                true => std::fs::rename(&draft.path, &target)?,
                // Unlike a rename, a link replaces nothing.
                false => std::fs::hard_link(&draft.path, &target)?,
            }
            drop(draft);
            File::open(target.parent().unwrap_or(&root))?.sync_all()
        })
        .await
    }

    pub(super) async fn open_in_directory(
        &self,
        state: &ClusterState,
        volume: &str,
        name: &str,
    ) -> Result<File, Failure> {
        let root = self.root(state, volume)?;
        not_ours(volume, name)?;
        if let Some(vm) = user(state, volume, name).filter(|vm| vm.placement != Placement::Nowhere) {
            return Err(used_by(name, vm));
        }
        let path = root.join(name);
        blocking(volume, move || {
            inside(&root, path.parent().unwrap_or(&root))?;
            // Opening a named pipe would wait for its writer.
            let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
            let file = OpenOptions::new().read(true).custom_flags(flags).open(&path)?;
            match file.metadata()?.is_file() {
                true => Ok(file),
                false => Err(io::Error::other("it is not a regular file")),
            }
        })
        .await
    }

    pub(super) async fn remove_in_directory(
        &self,
        state: &ClusterState,
        volume: &str,
        name: &str,
    ) -> Result<(), Failure> {
        let root = self.root(state, volume)?;
        may_go(state, volume, name)?;
        let path = root.join(name);
        blocking(volume, move || {
            inside(&root, path.parent().unwrap_or(&root))?;
            std::fs::remove_file(&path)
        })
        .await
    }

    /// The files in the directory of a volume.
    ///
    /// # Errors
    /// It cannot be read here.
    pub async fn files_in_directory(&self, volume: &str) -> Result<Vec<Found>, Failure> {
        let root = self.root(&self.state(), volume)?;
        blocking(volume, move || {
            let (mut found, mut dirs) = (Vec::new(), vec![root.clone()]);
            while let Some(dir) = dirs.pop() {
                for entry in std::fs::read_dir(&dir)? {
                    let entry = entry?;
                    let kind = entry.file_type()?;
                    let path = entry.path();
                    let name = path.strip_prefix(&root).ok().and_then(Path::to_str).map(str::to_owned);
                    let Some(name) = name.filter(|_| !entry.file_name().to_string_lossy().starts_with(OURS)) else {
                        continue;
                    };
                    if kind.is_dir() {
                        dirs.push(path);
                    } else if kind.is_file() {
                        let metadata = entry.metadata()?;
                        found.push(Found { name, bytes: metadata.len(), allocated: metadata.blocks() * 512 });
                    }
                    if found.len() > MOST_FILES {
                        return Err(io::Error::other(format!("it has more than {MOST_FILES} files")));
                    }
                }
            }
            found.sort_by(|one, other| one.name.cmp(&other.name));
            Ok(found)
        })
        .await
    }

    fn root(&self, state: &ClusterState, volume: &str) -> Result<PathBuf, Failure> {
        match state.volumes.get(volume).map(|volume| &volume.kind) {
            Some(VolumeKind::Directory { path }) => Ok(path.into()),
            _ => Err(Refusal::Unknown { what: "directory volume".into(), name: volume.into() }.into()),
        }
    }
}

/// The VM that a file on a directory volume belongs to, as a disk or to boot from.
pub fn user<'a>(state: &'a ClusterState, volume: &str, name: &str) -> Option<&'a Vm> {
    state.vms.values().find(|vm| {
        let disk = vm.spec.disks.iter().any(|disk| disk.volume == volume && disk.file == name);
        let boot = vm.spec.direct_boot.as_ref().filter(|boot| boot.volume == volume);
        disk || boot.is_some_and(|boot| boot.kernel == name || boot.initrd.as_deref() == Some(name))
    })
}

fn used_by(name: &str, vm: &Vm) -> Failure {
    Refusal::Conflict(format!("{name:?} is a file of VM {:?}", vm.name)).into()
}

fn may_go(state: &ClusterState, volume: &str, name: &str) -> Result<(), Failure> {
    not_ours(volume, name)?;
    user(state, volume, name).map_or(Ok(()), |vm| Err(used_by(name, vm)))
}

fn not_ours(volume: &str, name: &str) -> Result<(), Failure> {
    match name.split('/').any(|part| part.starts_with(OURS)) {
        true => Err(Refusal::Invalid(format!("{name:?} on volume {volume:?} is not a user's file")).into()),
        false => Ok(()),
    }
}

/// Refuses a name that a directory has, or a file that is not to be replaced.
fn may_stand(target: &Path, replaces: bool) -> io::Result<()> {
    match std::fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        Ok(_) if !replaces => Err(io::ErrorKind::AlreadyExists.into()),
        _ => Ok(()),
    }
}

/// Refuses a directory that is not in `root`; one that is not there yet is where the first
/// one above it is that is.
fn inside(root: &Path, dir: &Path) -> io::Result<()> {
    let there = dir.ancestors().find_map(|dir| dir.canonicalize().ok());
    match there.is_some_and(|there| root.canonicalize().is_ok_and(|root| there.starts_with(root))) {
        true => Ok(()),
        false => Err(io::Error::other("a link leads out of the volume")),
    }
}

async fn blocking<T: Send + 'static>(
    volume: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let done =
        tokio::task::spawn_blocking(work).await.map_err(|error| Failure::other("internal", error.to_string()))?;
    done.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            Failure::other("already_exists", format!("volume {volume:?} has such a file already"))
        }
        io::ErrorKind::NotFound => Failure::other("not_found", format!("there is no such file on volume {volume:?}")),
        _ => super::failed(volume, &error),
    })
}
