//! What the kernel offers to a process that must not be late: real-time priority,
//! locked memory, a clock that runs on in suspend, processes that cannot be
//! mistaken for others, and a fork whose child waits at a gate.
//!
//! The binary's only file with `unsafe`.

use std::ffi::{CString, OsStr};
use std::io::{self, IoSliceMut, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

use holdfast_core::lease::BootTime;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// The priority of lease threads among real-time threads: above ordinary ones, below
/// the kernel's own interrupt threads (50).
pub const LEASE_PRIORITY: i32 = 40;

/// Reads CLOCK_BOOTTIME.
pub fn boot_time() -> BootTime {
    // The clock exists since Linux 2.6.39 and reading it cannot fail.
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap_or(TimeSpec::new(0, 0));
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec()).unwrap_or(0);
    BootTime(seconds * 1_000_000_000 + nanoseconds)
}

/// An alarm on CLOCK_BOOTTIME: it goes off on time even across a suspend.
pub struct Alarm(TimerFd);

impl Alarm {
    /// Not set yet.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        Ok(Alarm(TimerFd::new(ClockId::CLOCK_BOOTTIME, flags)?))
    }

    /// Goes off at `at`, at once if that has passed, never for `None`. Setting it
    /// takes back an alarm that went off.
    pub fn set(&self, at: Option<BootTime>) -> io::Result<()> {
        let at = at.map_or(0, |at| at.0.max(1));
        let at = TimeSpec::new((at / 1_000_000_000) as _, (at % 1_000_000_000) as _);
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME;
        Ok(self.0.set(Expiration::OneShot(at), flags)?)
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Keeps every page of this process that was touched, or will be, in RAM.
pub fn lock_memory() -> io::Result<()> {
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT as libc::c_int;
    // SAFETY: mlockall takes flags only and touches no memory of ours.
    Errno::result(unsafe { libc::mlockall(flags) })?;
    Ok(())
}

/// Gives the calling thread real-time priority; what it forks does not inherit it.
pub fn go_realtime(priority: i32) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: priority };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: 0 names the calling thread; the kernel only reads `parameters`, which
    // outlives the call.
    Errno::result(unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) })?;
    Ok(())
}

/// Gives the calling thread precedence among ordinary threads; what it forks does
/// not inherit it.
pub fn go_first(nice: i32) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    let policy = libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK;
    // SAFETY: as in `go_realtime`.
    Errno::result(unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) })?;
    // SAFETY: setpriority takes numbers only; 0 names the calling thread.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) })?;
    Ok(())
}

/// A handle to the process that has `pid` now.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor (close-on-exec) and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends SIGKILL to the process behind a pidfd; `Ok(false)` when it is dead already.
/// The descriptor is a number because lease threads read it from an atomic: a
/// wrong one gives an error, never a signal to a process by number.
pub fn pidfd_kill(fd: RawFd) -> io::Result<bool> {
    let no_details = ptr::null::<libc::siginfo_t>();
    // SAFETY: pidfd_send_signal takes integers and a null pointer for "no details".
    let result = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, no_details, 0) });
    match result {
        Ok(_) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// What a watchdog's driver says of it: `struct watchdog_info` of linux/watchdog.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct WatchdogSupport {
    /// What it can do: `WDIOF_*`.
    pub options: u32,
    /// The version of its firmware.
    pub firmware: u32,
    /// What it is, filled up with zeros.
    pub identity: [u8; 32],
}

mod ioctls {
    nix::ioctl_read!(get_support, b'W', 0, super::WatchdogSupport);
    nix::ioctl_read!(keepalive, b'W', 5, libc::c_int);
    nix::ioctl_readwrite!(set_timeout, b'W', 6, libc::c_int);
}

/// Asks an open watchdog what it can do.
pub fn watchdog_support(watchdog: impl AsFd) -> io::Result<WatchdogSupport> {
    let mut support = WatchdogSupport::default();
    // SAFETY: the kernel writes one watchdog_info, whose layout this is and for which
    // every pattern of bits is a value; a file that is no watchdog gives an error.
    unsafe { ioctls::get_support(watchdog.as_fd().as_raw_fd(), &raw mut support) }?;
    Ok(support)
}

/// Sets an open watchdog's time in seconds, and says what the driver made of it.
pub fn watchdog_set_timeout(watchdog: impl AsFd, seconds: u32) -> io::Result<u32> {
    let mut value = libc::c_int::try_from(seconds).map_err(io::Error::other)?;
    // SAFETY: the kernel reads and writes one int, which outlives the call.
    unsafe { ioctls::set_timeout(watchdog.as_fd().as_raw_fd(), &raw mut value) }?;
    u32::try_from(value).map_err(io::Error::other)
}

/// Feeds an open watchdog.
pub fn watchdog_feed(watchdog: impl AsFd) -> io::Result<()> {
    let mut unused: libc::c_int = 0;
    // SAFETY: this ioctl is declared with an int, which drivers leave alone or write.
    unsafe { ioctls::keepalive(watchdog.as_fd().as_raw_fd(), &raw mut unused) }?;
    Ok(())
}

/// What everybody on this host who writes to shared disks must know of the node's
/// lease, in memory that the keeper shares with the volume server.
#[repr(C)]
#[derive(Debug)]
pub struct LeaseWords {
    /// Odd while VMs may run.
    pub generation: AtomicU64,
    /// The node's term.
    pub term: AtomicU64,
    /// When the lease ends, as [`BootTime`].
    pub ends: AtomicU64,
}

/// A page of memory with [`LeaseWords`], mapped for as long as this lives.
#[derive(Debug)]
pub struct LeasePage(NonNull<LeaseWords>);

// SAFETY: the page stays mapped, and only atomics are in it.
unsafe impl Send for LeasePage {}
// SAFETY: as above.
unsafe impl Sync for LeasePage {}

impl LeasePage {
    /// A new page, all zero, and what another process needs to read it.
    pub fn create() -> io::Result<(LeasePage, OwnedFd)> {
        // SAFETY: memfd_create takes a C string and flags.
        let fd = unsafe { libc::memfd_create(c"lease".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        let fd = Errno::result(fd)?;
        // SAFETY: the kernel just made this descriptor and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        nix::unistd::ftruncate(&fd, size_of::<LeaseWords>() as i64)?;
        let page = LeasePage::map(&fd, libc::PROT_READ | libc::PROT_WRITE)?;
        // Whoever gets it reads only, and a map of it never loses its memory.
        let seals = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: fcntl with a descriptor that is open and an integer.
        Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
        Ok((page, fd))
    }

    /// The page of the process that made `fd`; writing to it ends this process.
    pub fn open(fd: &OwnedFd) -> io::Result<LeasePage> {
        // SAFETY: fcntl with a descriptor that is open.
        let seals = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) })?;
        let size = nix::sys::stat::fstat(fd)?.st_size;
        if seals & libc::F_SEAL_SHRINK == 0 || usize::try_from(size) != Ok(size_of::<LeaseWords>()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "this is not the keeper's lease"));
        }
        LeasePage::map(fd, libc::PROT_READ)
    }

    fn map(fd: &OwnedFd, protection: libc::c_int) -> io::Result<LeasePage> {
        let (length, fd) = (size_of::<LeaseWords>(), fd.as_raw_fd());
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe { libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at.cast()).map(LeasePage).ok_or_else(|| io::Error::other("the kernel mapped nothing"))
    }
}

impl std::ops::Deref for LeasePage {
    type Target = LeaseWords;

    fn deref(&self) -> &LeaseWords {
        // SAFETY: mapped, aligned to a page, and as long as the words, which any bytes
        // are valid for; unmapped only when it is dropped.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for LeasePage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nobody can borrow it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<LeaseWords>()) };
    }
}

/// The descriptor that this process was started with under a number, from now on its
/// own. Call it once, before anything else was opened.
///
/// # Errors
/// There is none with this number.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl with an integer; it says whether there is such a descriptor.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and nobody else in this process knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Waits for a message with descriptors on a socket that keeps messages apart; no
/// bytes mean that the other end is gone.
pub fn receive(channel: &OwnedFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut room = nix::cmsg_space!([RawFd; 64]);
    loop {
        let mut parts = [IoSliceMut::new(&mut *bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<UnixAddr>(channel.as_raw_fd(), &mut parts, Some(&mut room), flags) {
            Err(Errno::EINTR) => continue,
            message => message?,
        };
        let mut fds = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: the kernel made these descriptors for this message and nobody
                // else owns them.
                fds.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        return Ok((message.bytes, fds));
    }
}

/// What a child becomes, prepared so that nothing needs memory after the fork.
pub struct Image {
    argv: Vec<CString>,
    environment: Vec<CString>,
    directory: Option<CString>,
    log: Option<CString>,
    cgroup: Option<CString>,
    inherited: Option<RawFd>,
    oom_score: CString,
}

/// How a child could not become its [`Image`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecFailure {
    /// At which step.
    pub step: &'static str,
    /// The system's error number.
    pub errno: i32,
}

/// The steps of a child between fork and exec, in the order of [`become_image`].
const STEPS: [&str; 6] = [
    "enter its cgroup",
    "enter its directory",
    "open its log",
    "open /dev/null",
    "redirect its output",
    "execute the program",
];

impl Image {
    /// Runs `argv` with this process's environment plus `variables`.
    pub fn new<S: AsRef<OsStr>>(argv: &[S], variables: &[(String, String)]) -> io::Result<Image> {
        if argv.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the command is empty: name a program"));
        }
        let mut environment = Vec::new();
        for (name, value) in std::env::vars_os() {
            if !variables.iter().any(|(other, _)| name == OsStr::new(other)) {
                environment.push(variable(&name, &value)?);
            }
        }
        for (name, value) in variables {
            environment.push(variable(OsStr::new(name), OsStr::new(value))?);
        }
        let argv = argv.iter().map(|argument| CString::new(argument.as_ref().as_bytes())).collect::<Result<_, _>>()?;
        Ok(Image {
            argv,
            environment,
            directory: None,
            log: None,
            cgroup: None,
            inherited: None,
            oom_score: c"0".into(),
        })
    }

    /// Works in this directory.
    pub fn directory(mut self, path: &Path) -> io::Result<Image> {
        self.directory = Some(CString::new(path.as_os_str().as_bytes())?);
        Ok(self)
    }

    /// Appends stdout and stderr to this file instead of inheriting them.
    pub fn log(mut self, path: &Path) -> io::Result<Image> {
        self.log = Some(CString::new(path.as_os_str().as_bytes())?);
        Ok(self)
    }

    /// Runs in the cgroup whose directory this is.
    pub fn cgroup(mut self, path: &Path) -> io::Result<Image> {
        let procs = path.join("cgroup.procs");
        self.cgroup = Some(CString::new(procs.as_os_str().as_bytes())?);
        Ok(self)
    }

    /// Keeps this descriptor, which has to stay open until the child was forked.
    pub fn inherits(mut self, fd: &impl AsFd) -> Image {
        self.inherited = Some(fd.as_fd().as_raw_fd());
        self
    }

    /// How readily the kernel kills it when memory runs out, -1000 (never) to 1000.
    pub fn oom_score(mut self, score: i16) -> Image {
        self.oom_score = CString::new(score.to_string()).unwrap_or_default();
        self
    }
}

fn variable(name: &OsStr, value: &OsStr) -> io::Result<CString> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(b'=');
    bytes.extend_from_slice(value.as_bytes());
    Ok(CString::new(bytes)?)
}

/// A child that waits at its gate, before it became its [`Image`].
pub struct Gated {
    /// The child's process id, its own until the parent waits for it.
    pub pid: i32,
    /// A handle to it.
    pub pidfd: OwnedFd,
    gate: OwnedFd,
    report: OwnedFd,
}

/// Says what became of a child behind its gate: readable once that is known.
pub struct Report(std::fs::File);

impl Gated {
    /// Lets the child go on. Dropping a [`Gated`] instead makes it exit.
    pub fn open(self) -> io::Result<(OwnedFd, Report)> {
        nix::unistd::write(&self.gate, &[1])?;
        Ok((self.pidfd, Report(self.report.into())))
    }
}

impl Report {
    /// `Ok` when the child executes its program, or died before it could say why
    /// not; `None` while it is under way.
    pub fn read(&mut self) -> Option<Result<(), ExecFailure>> {
        let mut bytes = [0; 5];
        match self.0.read(&mut bytes) {
            Ok(5) => {
                let [step, errno @ ..] = bytes;
                Some(Err(ExecFailure {
                    step: STEPS.get(usize::from(step)).copied().unwrap_or("start"),
                    errno: i32::from_ne_bytes(errno),
                }))
            }
            Ok(_) => Some(Ok(())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(_) => Some(Ok(())),
        }
    }
}

impl AsFd for Report {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Forks a child that waits until its gate opens and then becomes `image`. It dies
/// with the calling *thread* (PR_SET_PDEATHSIG), has a session of its own, empty
/// signal mask and null stdin.
///
/// Why not `std::process::Command`: its `spawn` returns when the program runs
/// already. A lease that ends in between would leave a VM that nobody has in
/// their books yet; here the books are written before the program can start.
pub fn fork_gated(image: &Image) -> io::Result<Gated> {
    let (gate_end, gate) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (report, report_end) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let pointers = |texts: &[CString]| -> Vec<*const libc::c_char> {
        let ends = std::iter::once(ptr::null());
        texts.iter().map(|text| text.as_ptr()).chain(ends).collect()
    };
    let (argv, environment) = (pointers(&image.argv), pointers(&image.environment));
    let parent = nix::unistd::getpid().as_raw();
    // SAFETY: the child runs only `child`, which calls async-signal-safe functions
    // on memory that was prepared above, and never returns.
    let pid = Errno::result(unsafe { libc::fork() })?;
    if pid == 0 {
        let ends = [gate_end.as_raw_fd(), gate.as_raw_fd(), report_end.as_raw_fd()];
        // SAFETY: this is the forked child; both arrays end with a null pointer and
        // point into `image`, whose copy lives as long as the child does.
        unsafe { child(image, &argv, &environment, parent, ends) }
    }
    match pidfd_open(pid) {
        Ok(pidfd) => Ok(Gated { pid, pidfd, gate, report }),
        Err(error) => {
            // The gate closes here, so the child exits by itself and is reaped
            // with the unknown ones.
            Err(error)
        }
    }
}

/// The child's life between fork and exec.
///
/// # Safety
/// Only in a forked child: it ends the process. `argv` and `environment` must be
/// arrays of C strings that end with a null pointer.
unsafe fn child(
    image: &Image,
    argv: &[*const libc::c_char],
    environment: &[*const libc::c_char],
    parent: i32,
    [gate, gate_far_end, report]: [RawFd; 3],
) -> ! {
    // SAFETY: system calls with integers, with C strings that `image` owns, and
    // with local variables that outlive the calls. None of them takes a lock or
    // memory that another thread of the parent might have held at the fork.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        // The parent may have died before that took effect.
        if libc::getppid() != parent {
            libc::_exit(127);
        }
        libc::close(gate_far_end);
        libc::setsid();
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        // Best effort: lowering it needs a capability, raising it does not.
        let score = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY);
        if score >= 0 {
            let text = &image.oom_score;
            libc::write(score, text.as_ptr().cast(), text.as_bytes().len());
            libc::close(score);
        }
        let mut word = 0u8;
        loop {
            match libc::read(gate, (&raw mut word).cast(), 1) {
                1 => break,
                -1 if *libc::__errno_location() == libc::EINTR => {}
                _ => libc::_exit(127),
            }
        }
        let step = become_image(image, argv, environment);
        let mut message = [0; 5];
        message[0] = step;
        message[1..].copy_from_slice(&(*libc::__errno_location()).to_ne_bytes());
        libc::write(report, message.as_ptr().cast(), message.len());
        libc::_exit(127)
    }
}

/// Returns the index in [`STEPS`] of what failed, with `errno` set.
///
/// # Safety
/// As for [`child`].
unsafe fn become_image(image: &Image, argv: &[*const libc::c_char], environment: &[*const libc::c_char]) -> u8 {
    let text = |text: &CString| text.as_ptr();
    // SAFETY: as in `child`.
    unsafe {
        if let Some(procs) = image.cgroup.as_ref().map(text) {
            let procs = libc::open(procs, libc::O_WRONLY | libc::O_CLOEXEC);
            if procs < 0 || libc::write(procs, c"0".as_ptr().cast(), 1) != 1 {
                return 0;
            }
        }
        if let Some(directory) = image.directory.as_ref().map(text)
            && libc::chdir(directory) != 0
        {
            return 1;
        }
        if let Some(log) = image.log.as_ref().map(text) {
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
            let log = libc::open(log, flags, 0o600);
            if log < 0 {
                return 2;
            }
            if libc::dup2(log, 1) < 0 || libc::dup2(log, 2) < 0 {
                return 4;
            }
        }
        if let Some(inherited) = image.inherited {
            libc::fcntl(inherited, libc::F_SETFD, 0);
        }
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        if null < 0 {
            return 3;
        }
        if libc::dup2(null, 0) < 0 {
            return 4;
        }
        libc::execvpe(argv[0], argv.as_ptr(), environment.as_ptr());
    }
    5
}

#[cfg(test)]
pub(crate) mod tests {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;
    use std::time::{Duration, Instant};

    use nix::poll::{PollFd, PollFlags, PollTimeout};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::Pid;

    use super::*;

    thread_local! {
        static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    }

    struct Counting;

    // SAFETY: every call goes on to the system's allocator unchanged.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
            // SAFETY: the caller keeps to the contract of `alloc`.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: the caller keeps to the contract of `dealloc`.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    #[global_allocator]
    static COUNTING: Counting = Counting;

    /// How often the calling thread asked for memory so far.
    pub(crate) fn allocations() -> u64 {
        ALLOCATIONS.with(Cell::get)
    }

    /// Whether `fd` gets readable within `within`.
    pub(crate) fn readable(fd: impl AsFd, within: Duration) -> bool {
        let until = Instant::now() + within;
        loop {
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            let left = until.saturating_duration_since(Instant::now());
            match nix::poll::poll(&mut fds, PollTimeout::try_from(left).unwrap()) {
                // A child of this process died: its parent's thread was told.
                Err(Errno::EINTR) => {}
                outcome => return outcome.unwrap() == 1,
            }
        }
    }

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn an_alarm_in_the_past_goes_off_at_once_and_can_be_taken_back() {
        let alarm = Alarm::new().unwrap();
        assert!(!readable(&alarm, Duration::ZERO));
        alarm.set(Some(BootTime(0))).unwrap();
        assert!(readable(&alarm, SOON));
        alarm.set(Some(boot_time().plus_ms(60_000))).unwrap();
        assert!(!readable(&alarm, Duration::ZERO));
        alarm.set(Some(boot_time().plus_ms(5))).unwrap();
        assert!(readable(&alarm, SOON));
    }

    #[test]
    fn a_child_does_nothing_before_its_gate_opens() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let image = Image::new(&["sh", "-c", "echo $WORD; pwd; exit 3"], &[("WORD".into(), "passed".into())])
            .and_then(|image| image.log(&log)?.directory(directory.path()))
            .unwrap();
        let closed = fork_gated(&image).unwrap();
        let pid = Pid::from_raw(closed.pid);
        drop(closed);
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 127));
        assert!(!log.exists());

        let gated = fork_gated(&image).unwrap();
        let pid = Pid::from_raw(gated.pid);
        let (pidfd, mut report) = gated.open().unwrap();
        assert!(readable(&report, SOON));
        assert_eq!(report.read(), Some(Ok(())));
        assert!(readable(&pidfd, SOON));
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 3));
        let said = std::fs::read_to_string(&log).unwrap();
        assert_eq!(said, format!("passed\n{}\n", directory.path().display()));
    }

    #[test]
    fn a_child_that_cannot_start_says_at_which_step() {
        let image = Image::new(&["/does/not/exist"], &[]).unwrap();
        let cases = [
            (image, "execute the program"),
            (
                Image::new(&["true"], &[]).and_then(|image| image.log(Path::new("/does/not/exist"))).unwrap(),
                "open its log",
            ),
            (
                Image::new(&["true"], &[]).and_then(|image| image.cgroup(Path::new("/does/not/exist"))).unwrap(),
                "enter its cgroup",
            ),
        ];
        for (image, step) in cases {
            let gated = fork_gated(&image).unwrap();
            let pid = Pid::from_raw(gated.pid);
            let (_, mut report) = gated.open().unwrap();
            assert!(readable(&report, SOON));
            let errno = libc::ENOENT;
            assert_eq!(report.read(), Some(Err(ExecFailure { step, errno })));
            assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 127));
        }
    }

    #[test]
    fn a_lease_is_read_where_it_was_not_written_and_only_read() {
        let (page, fd) = LeasePage::create().unwrap();
        let other = LeasePage::open(&fd).unwrap();
        page.ends.store(7, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(other.ends.load(std::sync::atomic::Ordering::SeqCst), 7);
        assert!(LeasePage::map(&fd, libc::PROT_READ | libc::PROT_WRITE).is_err(), "nobody else can write");
        assert!(LeasePage::open(&std::fs::File::open("/dev/null").unwrap().into()).is_err());
    }

    #[test]
    fn a_child_has_the_descriptor_that_it_inherits_and_no_other() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = theirs.as_raw_fd();
        let script = format!("echo here >&{number}; echo there >&{}", ours.as_raw_fd());
        let image = Image::new(&["bash", "-c", &script], &[]).unwrap().inherits(&theirs);
        let gated = fork_gated(&image).unwrap();
        let pid = Pid::from_raw(gated.pid);
        gated.open().unwrap();
        assert_eq!(waitpid(pid, None).unwrap(), WaitStatus::Exited(pid, 1), "the other end was closed");
        let mut said = [0; 16];
        let read = (&ours).read(&mut said).unwrap();
        assert_eq!(&said[..read], b"here\n");
    }

    #[test]
    fn a_dead_process_is_no_target() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = pidfd_open(child.id().cast_signed()).unwrap();
        assert!(pidfd_kill(pidfd.as_raw_fd()).unwrap());
        assert!(readable(&pidfd, SOON));
        child.wait().unwrap();
        assert!(!pidfd_kill(pidfd.as_raw_fd()).unwrap());
        let no_process = std::fs::File::open("/dev/null").unwrap();
        assert!(pidfd_kill(no_process.as_raw_fd()).is_err());
    }
}
