//! The few system calls that have no safe wrapper: all `unsafe` of this crate.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::Signal;

/// Makes the child receive SIGKILL when the **thread** that spawns it ends.
///
/// The kernel ties the signal to the spawning thread, not to the process, so
/// that thread has to live for as long as the child should.
pub(crate) fn die_with_spawning_thread(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec of a threaded process; it
    // makes one system call, allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) == -1 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Lets the child receive every signal, whatever the caller has blocked for itself.
pub(crate) fn with_no_signal_blocked(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec; `sigemptyset` and
    // `sigprocmask` are async-signal-safe and write only to its own frame.
    unsafe {
        command.pre_exec(|| {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            if libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) == -1 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Touches so many bytes of memory, in huge pages where there are some, and gives them
/// back. Where this machine is a VM itself, its hypervisor may have taken free memory
/// away, and whoever gets such memory pays for it.
///
/// # Errors
/// When there is not that much.
pub fn touch_memory(bytes: usize) -> io::Result<()> {
    // SAFETY: the mapping is this function's own, it is written to within its bounds
    // and nothing points to it when it is unmapped.
    unsafe {
        let (read_write, own) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let memory = libc::mmap(std::ptr::null_mut(), bytes, read_write, own, -1, 0);
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Only advice: without it there are small pages.
        libc::madvise(memory, bytes, libc::MADV_HUGEPAGE);
        for page in (0..bytes).step_by(4096) {
            memory.cast::<u8>().add(page).write_volatile(1);
        }
        libc::munmap(memory, bytes);
    }
    Ok(())
}

/// A descriptor that stands for the process `pid` and becomes readable when it
/// has ended. Fails for a thread id that is no process.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed; a non-negative result is a fresh
    // descriptor that nobody else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Sends `signal` to exactly the process that `pidfd` stands for, even if its
/// pid has been given to another one since.
pub(crate) fn pidfd_send_signal(pidfd: impl AsFd, signal: Signal) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the call, and a null
    // `siginfo` is allowed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets or clears the "up" flag of the interface `name`, in the network
/// namespace in which `socket` was made.
pub(crate) fn set_interface_up(socket: impl AsFd, name: &str, up: bool) -> io::Result<()> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: `ifreq` is plain old data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: both requests read and write one `ifreq`, which lives on this
    // stack frame; SIOCGIFFLAGS fills the union's `ifru_flags`, so reading and
    // changing that member is defined.
    unsafe {
        if libc::ioctl(fd, libc::SIOCGIFFLAGS, &mut request) == -1 {
            return Err(io::Error::last_os_error());
        }
        let up_flag = libc::IFF_UP as libc::c_short;
        if up {
            request.ifr_ifru.ifru_flags |= up_flag;
        } else {
            request.ifr_ifru.ifru_flags &= !up_flag;
        }
        if libc::ioctl(fd, libc::SIOCSIFFLAGS, &mut request) == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
