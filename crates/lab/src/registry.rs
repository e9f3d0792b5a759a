//! Which labs exist on this machine, so that what a dead one left behind can be
//! told from what a living one uses.
//!
//! Every lab holds a lock on a file of its own in [`REGISTRY`] for as long as
//! its process lives: the kernel lets go of it however the process ends, and a
//! pid that is used again deceives nobody. The file's text is the lab's directory.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};

use crate::netns;

const REGISTRY: &str = "/run/holdfast-lab";
/// How long another lab's process may take to enter itself or to look around.
const REGISTRY_LOCK_DEADLINE: Duration = Duration::from_secs(10);
/// How long the files of a dead lab may still be in use by its dying processes.
const REMOVAL_DEADLINE: Duration = Duration::from_secs(10);

static NEXT: AtomicU32 = AtomicU32::new(1);

/// A lab's entry: its tag, its directory and the lock that says that it lives.
#[derive(Debug)]
pub(crate) struct Registration {
    tag: String,
    directory: PathBuf,
    _lock: Flock<File>,
}

impl Registration {
    /// Enters a new lab whose directory will be inside `base`, and makes that.
    pub(crate) fn new(base: &Path) -> Result<Self> {
        fs::create_dir_all(REGISTRY).with_context(|| format!("creating {REGISTRY} (needs root)"))?;
        let _exclusive = lock_registry()?;
        loop {
            let counter = NEXT.fetch_add(1, Ordering::Relaxed);
            let tag = format!("hf{}-{counter}", std::process::id());
            let entry = match OpenOptions::new().write(true).create_new(true).open(entry(&tag)) {
                Ok(file) => file,
                // A lab of another PID namespace, or a dead one with our pid.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error).context(format!("creating {REGISTRY}/{tag}")),
            };
            let mut lock = Flock::lock(entry, FlockArg::LockExclusiveNonblock)
                .map_err(|(_, errno)| errno)
                .context("locking the lab's entry")?;
            let directory = base.join(&tag);
            lock.write_all(directory.as_os_str().as_encoded_bytes()).context("writing the lab's entry")?;
            fs::create_dir_all(&directory)
                .with_context(|| format!("creating the lab's directory {}", directory.display()))?;
            return Ok(Self { tag, directory, _lock: lock });
        }
    }

    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _ = remove_remains(&self.tag, &self.directory);
        let _ = fs::remove_file(entry(&self.tag));
    }
}

/// Removes what labs left behind whose process is gone.
pub(crate) fn sweep() -> Result<()> {
    let mut dead = Vec::new();
    if let Ok(entries) = fs::read_dir(REGISTRY) {
        let _exclusive = lock_registry()?;
        for file in entries.flatten() {
            let Ok(tag) = file.file_name().into_string() else {
                continue;
            };
            if !tag.starts_with("hf") {
                continue;
            }
            let Ok(file) = OpenOptions::new().read(true).write(true).open(file.path()) else {
                continue;
            };
            if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                dead.push((tag, lock));
            }
        }
    }
    dead.into_iter().try_for_each(|(tag, lock)| remove_claimed(&tag, lock))
}

/// Waits until the lab `tag` is gone, however long that takes, and removes what
/// it left behind.
pub(crate) fn outlive(tag: &str) -> Result<()> {
    let file = match OpenOptions::new().read(true).write(true).open(entry(tag)) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context(format!("opening the entry of lab {tag}")),
    };
    // No deadline: to wait for as long as the lab lives is the purpose.
    let lock = Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("waiting for the end of lab {tag}"))?;
    remove_claimed(tag, lock)
}

/// Removes a lab whose entry we have locked, unless somebody has done it.
fn remove_claimed(tag: &str, mut lock: Flock<File>) -> Result<()> {
    if lock.metadata().context("reading a dead lab's entry")?.nlink() == 0 {
        return Ok(());
    }
    let mut directory = String::new();
    lock.seek(SeekFrom::Start(0)).context("reading a dead lab's entry")?;
    lock.read_to_string(&mut directory).context("reading a dead lab's entry")?;
    let directory = PathBuf::from(directory);
    // Killed before it wrote its entry: it had no directory yet either. And
    // never remove a directory that does not carry the lab's own name.
    if directory.is_absolute() && directory.file_name().is_some_and(|name| name == tag) {
        remove_remains(tag, &directory)?;
    }
    match fs::remove_file(entry(tag)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(format!("removing the entry of lab {tag}"))
        }
        _ => Ok(()),
    }
}

fn remove_remains(tag: &str, directory: &Path) -> Result<()> {
    for name in netns::names_with_prefix(&format!("{tag}-")) {
        netns::remove(&name)?;
    }
    let deadline = Instant::now() + REMOVAL_DEADLINE;
    unmount_below(directory);
    loop {
        match fs::remove_dir_all(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            // Processes that are just being killed may still create files.
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Err(error) => {
                return Err(error).context(format!("removing {}", directory.display()));
            }
        }
    }
}

/// Takes hosts' small disks away. Dying processes may still hold them: they keep
/// what they hold and nobody else sees it.
fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // proc(5): the fifth word is the place; a lab's own paths have nothing to escape.
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    for place in places.filter(|place| place.starts_with(directory)) {
        let _ = umount2(place, MntFlags::MNT_DETACH);
    }
}

fn entry(tag: &str) -> PathBuf {
    Path::new(REGISTRY).join(tag)
}

/// Between making an entry and locking it, a lab looks dead: nobody may look then.
fn lock_registry() -> Result<Flock<File>> {
    let path = Path::new(REGISTRY).join("lock");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("opening {} (needs root)", path.display()))?;
    let deadline = Instant::now() + REGISTRY_LOCK_DEADLINE;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, nix::errno::Errno::EWOULDBLOCK)) => file,
            Err((_, errno)) => return Err(errno).context("locking the register of labs"),
        };
        if Instant::now() >= deadline {
            bail!("another process has held {} for {REGISTRY_LOCK_DEADLINE:?}", path.display());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
