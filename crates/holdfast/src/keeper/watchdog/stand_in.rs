//! A watchdog for tests: files served over FUSE by a thread of the test. The kernel
//! carries opens, ioctls, writes and closes to it as it would to a driver; what it
//! does with them is what Linux's watchdog core does, except that it notes its bite
//! instead of resetting anything. It is mounted where only the test sees it. The
//! end-to-end tests include this file as well: it knows nothing of the keeper.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(30);

/// Everything that keepers need, by linux/watchdog.h.
pub const ABLE: u32 = 0x8180;

const WATCHDOG: u64 = 2;
const STUCK: u64 = 3;

/// What happened to the watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    Armed {
        recorded: bool,
    },
    Set(u32),
    Disarmed,
    /// Closed without the magic word.
    Abandoned,
    Bitten,
}

#[derive(Default)]
pub struct State {
    pub notes: Vec<Note>,
    pub feedings: u64,
    pub timeout_s: u32,
    /// Requests for the file that never answers, until it is told to.
    pub stuck: Vec<u64>,
    options: u32,
    longest_s: u32,
    /// The thread that opened it.
    open: Option<u32>,
    magic: bool,
    /// While armed: when it was fed last.
    fed: Option<Instant>,
    release: bool,
    end: bool,
}

pub struct StandIn {
    directory: TempDir,
    shared: Arc<(Mutex<State>, Condvar)>,
    server: Option<JoinHandle<()>>,
}

impl StandIn {
    /// Its directories, `dev` and `sys`, are seen by the calling thread, and by the
    /// processes that it starts from now on.
    pub fn new(record: PathBuf) -> StandIn {
        StandIn::with(record, ABLE, u32::MAX)
    }

    /// With other abilities, and a longest time in seconds.
    pub fn with(record: PathBuf, options: u32, longest_s: u32) -> StandIn {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (as root)");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (devices, described) = (directory.path().join("dev"), directory.path().join("sys/watchdog0"));
        fs::create_dir(&devices).unwrap();
        fs::create_dir_all(&described).unwrap();
        for (file, text) in [("nowayout", "0\n"), ("state", "inactive\n"), ("identity", "Stand-in\n")] {
            fs::write(described.join(file), text).unwrap();
        }
        let kernel = OpenOptions::new().read(true).write(true).open("/dev/fuse").expect("/dev/fuse");
        let options_of_mount = format!("fd={},rootmode=40000,user_id=0,group_id=0", kernel.as_raw_fd());
        mount(Some("stand-in"), &devices, Some("fuse"), MsFlags::empty(), Some(options_of_mount.as_str())).unwrap();
        let state = State { options, longest_s, timeout_s: 60.min(longest_s), ..State::default() };
        let shared = Arc::new((Mutex::new(state), Condvar::new()));
        let server = Server { kernel, record, state_file: described.join("state"), shared: shared.clone() };
        let server = Some(std::thread::spawn(move || server.run()));
        StandIn { directory, shared, server }
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    /// What the kernel would say of it in sysfs.
    pub fn describe(&self, file: &str, text: &str) {
        fs::write(self.root().join("sys/watchdog0").join(file), text).unwrap();
    }

    /// A file whose readers do not die, not even from SIGKILL, before [`StandIn::release`].
    pub fn stuck(&self) -> PathBuf {
        self.root().join("dev/stuck")
    }

    pub fn release(&self) {
        self.state().release = true;
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap()
    }

    /// Waits until something is so; all that happened until then.
    pub fn wait(&self, what: &str, so: impl Fn(&State) -> bool) -> Vec<Note> {
        let (state, timeout) = self.shared.1.wait_timeout_while(self.state(), SOON, |state| !so(state)).unwrap();
        assert!(!timeout.timed_out(), "{what}: {:?}", state.notes);
        state.notes.clone()
    }

    pub fn notes(&self) -> Vec<Note> {
        self.state().notes.clone()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.shared.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).end = true;
        // It takes its end of the mount with it, which frees whoever is stuck.
        let _ = self.server.take().map(JoinHandle::join);
        let _ = umount2(&self.root().join("dev"), MntFlags::MNT_DETACH);
    }
}

/// The end that the kernel asks: linux/fuse.h, protocol 7.31.
struct Server {
    kernel: File,
    record: PathBuf,
    state_file: PathBuf,
    shared: Arc<(Mutex<State>, Condvar)>,
}

/// A request's header and body.
struct Asked<'a> {
    opcode: u32,
    unique: u64,
    node: u64,
    pid: u32,
    body: &'a [u8],
}

impl Asked<'_> {
    fn number(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.body[at..at + 4].try_into().unwrap())
    }
}

type Answer = Result<Vec<u8>, i32>;

impl Server {
    fn run(mut self) {
        let mut bytes = vec![0; 1 << 16];
        loop {
            let mut fds = [PollFd::new(self.kernel.as_fd(), PollFlags::POLLIN)];
            // Short, because it also looks at the time and at what the test wants.
            let ready = poll(&mut fds, PollTimeout::from(20_u8)).unwrap() == 1;
            if ready {
                let Ok(length) = self.kernel.read(&mut bytes) else {
                    return;
                };
                self.serve(&bytes[..length]);
            }
            let (state, changed) = &*self.shared.clone();
            let mut state = state.lock().unwrap();
            if state.end {
                return;
            }
            let longest = Duration::from_secs(state.timeout_s.into());
            if state.fed.is_some_and(|fed| fed.elapsed() >= longest) && !state.notes.contains(&Note::Bitten) {
                state.notes.push(Note::Bitten);
            }
            if state.release {
                for unique in std::mem::take(&mut state.stuck) {
                    self.answer(unique, Ok(vec![]));
                }
            }
            changed.notify_all();
        }
    }

    fn answer(&self, unique: u64, answer: Answer) {
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno, vec![]),
        };
        let mut bytes = u32::try_from(16 + body.len()).unwrap().to_le_bytes().to_vec();
        bytes.extend(error.to_le_bytes());
        bytes.extend(unique.to_le_bytes());
        bytes.extend(body);
        // Whoever asked may be gone.
        let _ = (&self.kernel).write(&bytes);
    }

    fn serve(&self, bytes: &[u8]) {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let asked = Asked { opcode: word(4), unique: long(8), node: long(16), pid: word(32), body: &bytes[40..] };
        let answer = match asked.opcode {
            // FORGET, INTERRUPT, BATCH_FORGET: not answered.
            2 | 36 | 42 => return,
            // READ: of the file that never answers.
            15 => {
                self.shared.0.lock().unwrap().stuck.push(asked.unique);
                return;
            }
            1 => lookup(asked.body),
            3 => Ok([vec![0; 16], attributes(asked.node)].concat()),
            26 => Ok(initialised()),
            _ if asked.node == WATCHDOG => self.watchdog(&asked),
            14 => Ok(opened()),
            18 | 25 => Ok(vec![]),
            _ => Err(libc::ENOSYS),
        };
        self.answer(asked.unique, answer);
    }

    fn watchdog(&self, asked: &Asked<'_>) -> Answer {
        let mut state = self.shared.0.lock().unwrap();
        let state = &mut *state;
        match asked.opcode {
            // OPEN.
            14 => {
                if state.open.is_some() {
                    return Err(libc::EBUSY);
                }
                (state.open, state.magic) = (Some(asked.pid), false);
                if state.fed.replace(Instant::now()).is_none() {
                    state.notes.push(Note::Armed { recorded: self.record.exists() });
                }
                fs::write(&self.state_file, "active\n").unwrap();
                Ok(opened())
            }
            // WRITE.
            16 => {
                let size = asked.number(16);
                state.magic = asked.body[40..].contains(&b'V');
                state.fed = Some(Instant::now());
                Ok([size.to_le_bytes(), [0; 4]].concat())
            }
            39 => ioctl(state, asked),
            // FLUSH: its own thread has closed it. The kernel sends RELEASE only later.
            25 if state.open == Some(asked.pid) && state.magic => {
                (state.open, state.fed) = (None, None);
                state.notes.push(Note::Disarmed);
                fs::write(&self.state_file, "inactive\n").unwrap();
                Ok(vec![])
            }
            25 => Ok(vec![]),
            // RELEASE.
            18 => {
                if state.open.take().is_some() {
                    state.fed = Some(Instant::now());
                    state.notes.push(Note::Abandoned);
                }
                Ok(vec![])
            }
            _ => Err(libc::ENOSYS),
        }
    }
}

fn ioctl(state: &mut State, asked: &Asked<'_>) -> Answer {
    let value = || asked.number(32);
    let output = match asked.number(12) & 0xffff {
        0x5700 => [state.options.to_le_bytes().as_slice(), &[0; 4], b"Stand-in", &[0; 24]].concat(),
        0x5705 => {
            state.feedings += 1;
            vec![]
        }
        0x5706 => {
            state.timeout_s = value().min(state.longest_s);
            state.notes.push(Note::Set(state.timeout_s));
            state.timeout_s.to_le_bytes().to_vec()
        }
        _ => return Err(libc::ENOTTY),
    };
    state.fed = Some(Instant::now());
    Ok([vec![0; 16], output].concat())
}

fn lookup(name: &[u8]) -> Answer {
    let known = BTreeMap::from([(&b"watchdog0\0"[..], WATCHDOG), (&b"stuck\0"[..], STUCK)]);
    let node = *known.get(name).ok_or(libc::ENOENT)?;
    Ok([node.to_le_bytes().to_vec(), vec![0; 32], attributes(node)].concat())
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let mode: u32 = if node == 1 { 0o40_700 } else { 0o100_600 };
    let mut bytes = node.to_le_bytes().to_vec();
    bytes.extend([0; 52]);
    bytes.extend(mode.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend([0; 20]);
    bytes
}

/// `struct fuse_open_out`, with every read and write asked of the server.
fn opened() -> Vec<u8> {
    const DIRECT_IO: u32 = 1;
    [vec![0; 8], DIRECT_IO.to_le_bytes().to_vec(), vec![0; 4]].concat()
}

/// `struct fuse_init_out`.
fn initialised() -> Vec<u8> {
    let words = [7_u32, 31, 0, 0, 0, 4_096, 1, 1];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(64, 0);
    bytes
}
